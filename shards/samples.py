"""From records to a WebDataset tar: each sample's files read, checked and written, or quarantined; and the index of a finished tar.

    positives, quarantined = write_tar(card, raw, records, Path("x.tar"))
    index_N = index_of_tar("x.tar")

A sample is `<dataset>-<20 hex>.jpg|png|u16.zst`, `.json` and, where the card has masks, `.seg.png`; any WebDataset reader takes it.
A record is one sample, or several where its file has several frames and the card unfolds them; each has a key of its own.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from base import storage
from base.config import canonical_json
from shards import containers, ingest, masks
from shards.card import Card
from shards.deidentify import clean_metadata, keyed
from shards.manifest import EXTENSIONS, INDEX_DTYPE, Quarantined
from shards.phantoms import GENERATORS
from shards.readers import Record


def write_tar(
    card: Card, raw: str, records: Iterable[Record], tar: Path, tell: Callable[[int], object] | None = None
) -> tuple[dict[str, int], list[Quarantined]]:
    """Write the samples of these records; the positives of each label, and what was left out with its reason. Raises OSError.

    tell: called with the number of records done, before each.
    """
    positives: Counter[str] = Counter()
    quarantined: list[Quarantined] = []
    # Owner, mode and time are fixed and the format is ustar: the bytes depend on the samples alone.
    with tar.open("wb") as stream, wds.TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for key, file, sample in _samples(card, raw, told(records, tell)):
            if isinstance(sample, str):
                quarantined.append(Quarantined(key=key, reason=sample, file=file if card.public else None))
                continue
            content, labels = sample
            for label, value in labels.items():
                positives[label] += value == 1
            writer.write({"__key__": f"{card.dataset}-{key}", **content})
    return known(card, positives), quarantined


def known(card: Card, positives: Counter[str]) -> dict[str, int]:
    """The positives of each label; of classes, of which there may be thousands, those that occur."""
    return {label: positives[label] for label in card.labels if positives[label] or card.kind != "multiclass"}


def told(records: Iterable[Record], tell: Callable[[int], object] | None) -> Iterator[Record]:
    """The records, the number of those done told before each."""
    for done, record in enumerate(records):
        if tell:
            tell(done)
        yield record


def _samples(card: Card, raw: str, records: Iterable[Record]) -> Iterator[tuple[str, str, tuple[dict[str, bytes], dict[str, Any]] | str]]:
    """Key and file of each sample, with its contents and labels, or with the reason why it has none."""
    for record in records:
        if card.phantom:
            yield record.key, record.file, _phantom_sample(card, record)
            continue
        try:
            for first, stored in ingest.unfold(_files(card, raw, record), card):
                if first is None:
                    yield record.key, record.file, _file_sample(card, raw, record, stored)
                else:
                    key = keyed(record.key.encode(), f"frame\x1f{first}", 20)
                    yield key, f"{record.file}#{first}", _file_sample(card, raw, record, stored)
        except ingest.Unusable as reason:
            yield record.key, record.file, str(reason)


def _file_sample(
    card: Card, raw: str, record: Record, stored: ingest.Stored | ingest.Unusable
) -> tuple[dict[str, bytes], dict[str, Any]] | str:
    if isinstance(stored, ingest.Unusable):
        return str(stored)
    content = {stored.ext: stored.data}
    if card.has_masks:
        try:
            seg = masks.mask_png(card, record, stored, lambda name: _read(raw, name, "mask"))
            content |= {} if seg is None else {"seg.png": seg}
        except ingest.Unusable as reason:
            return str(reason)
    header = {name: clean_metadata(name, value) for name, value in stored.meta.items()}
    meta = header | {name: value for name, value in record.meta.items() if value is not None or name not in header}
    return content | {"json": _side(record, record.labels, meta, stored.facts)}, record.labels


def _side(record: Record, labels: dict[str, Any], meta: dict[str, Any], facts: dict[str, Any]) -> bytes:
    side = {"labels": labels, "patient": record.patient, "split": record.split, "meta": meta}
    return canonical_json(side | ({"image": facts} if facts else {})).encode()


def _files(card: Card, raw: str, record: Record) -> list[bytes]:
    """The bytes of an image file, in a container or not, or of all files of a folder, whose name ends in a slash."""
    name = record.file
    if record.inside is not None:
        return [containers.read(raw, record.inside, record.stamp, slices=card.frames != "first")]
    if not name.endswith("/"):
        return [_read(raw, name, "image")]
    return [_read(raw, storage.join(name, file), "image") for file in storage.listing(storage.join(raw, name))]


def _read(raw: str, name: str, what: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(raw, name))
    except (FileNotFoundError, IsADirectoryError):
        raise ingest.Unusable(f"{what} is not there") from None
    except PermissionError:
        raise ingest.Unusable(f"{what} may not be read") from None


def _phantom_sample(card: Card, record: Record) -> tuple[dict[str, bytes], dict[str, Any]]:
    assert card.phantom is not None
    seed, size = (int(part) for part in record.stamp.split("/"))
    phantom = GENERATORS[card.phantom.generator](seed, int(record.file), size)
    content = {"png": ingest.png(phantom.image)}
    if card.has_masks:
        assert phantom.mask is not None
        content["seg.png"] = ingest.png(phantom.mask)
    meta = {name: value for name, value in phantom.metadata.items() if name in card.metadata}
    return content | {"json": _side(record, dict(phantom.labels), meta, {})}, dict(phantom.labels)


def index_of_tar(tar: str | Path) -> np.ndarray:
    """The index of a WebDataset tar in our naming, made by scanning it: N rows of INDEX_DTYPE, in the tar's order."""
    rows: dict[str, Any] = {}
    with tarfile.open(tar, "r:") as archive, open(tar, "rb") as stream:
        for member in archive:
            name, _, field = os.path.basename(member.name).partition(".")
            row = rows.setdefault(name, np.zeros((), INDEX_DTYPE))
            row["key"] = name[-20:].encode()
            stream.seek(member.offset_data)
            data = stream.read(member.size)
            column = {"json": "json", "seg.png": "seg"}.get(field, "image")
            if column == "image":
                row["ext"] = EXTENSIONS.index(field)
            elif column == "json":
                row["patient"] = json.loads(data)["patient"].encode()
            row[f"{column}_off"], row[f"{column}_len"], row[f"{column}_crc"] = member.offset_data, member.size, zlib.crc32(data)
    return np.array(list(rows.values()), INDEX_DTYPE).reshape(-1)
