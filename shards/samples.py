"""From records to a WebDataset tar: each sample's files read, checked and written, or quarantined; and the index of a finished tar.

    positives, quarantined = write_tar(card, raw, records, Path("x.tar"))
    index_N = index_of_tar("x.tar")

A sample is `<dataset>-<20 hex>.jpg|png`, `.json` and, where the card has masks, `.seg.png`; any WebDataset reader takes it.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from base import storage
from base.config import canonical_json
from shards import ingest
from shards.card import Card
from shards.manifest import EXTENSIONS, INDEX_DTYPE, Quarantined
from shards.phantoms import GENERATORS
from shards.readers import Record


def write_tar(card: Card, raw: str, records: Iterable[Record], tar: Path) -> tuple[dict[str, int], list[Quarantined]]:
    """Write the samples of these records; the positives of each label, and what was left out with its reason. Raises OSError."""
    positives = dict.fromkeys(card.labels, 0)
    quarantined: list[Quarantined] = []
    # Owner, mode and time are fixed and the format is ustar: the bytes depend on the samples alone.
    with tar.open("wb") as stream, wds.TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for record, sample in _samples(card, raw, records):
            if isinstance(sample, str):
                named = record.file if card.public else None
                quarantined.append(Quarantined(key=record.key, reason=sample, file=named))
                continue
            content, labels = sample
            for label, value in labels.items():
                positives[label] += value == 1
            writer.write({"__key__": f"{card.dataset}-{record.key}", **content})
    return positives, quarantined


def _samples(card: Card, raw: str, records: Iterable[Record]) -> Iterator[tuple[Record, tuple[dict[str, bytes], dict[str, Any]] | str]]:
    """Each record with the files of its sample and its labels, or with the reason why it has none."""
    make = _phantom_sample if card.phantom else _file_sample
    for record in records:
        try:
            content, labels, meta = make(card, raw, record)
        except ingest.Unusable as reason:
            yield record, str(reason)
            continue
        text = canonical_json({"labels": labels, "patient": record.patient, "split": record.split, "meta": meta})
        yield record, ({**content, "json": text.encode()}, labels)


def _file_sample(card: Card, raw: str, record: Record) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    stored = ingest.image(_read(raw, record.file, "image"), card.channels, card.max_side)
    content = {stored.ext: stored.data}
    if card.has_masks:
        if not record.masks:
            raise ingest.Unusable("no mask is named")
        files = [_read(raw, name, "mask") for name in record.masks]
        content["seg.png"] = ingest.mask(files, len(card.mask_classes), stored)
    return content, record.labels, record.meta


def _read(raw: str, name: str, what: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(raw, name))
    except (FileNotFoundError, IsADirectoryError):
        raise ingest.Unusable(f"{what} is not there") from None
    except PermissionError:
        raise ingest.Unusable(f"{what} may not be read") from None


def _phantom_sample(card: Card, raw: str, record: Record) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    assert card.phantom is not None
    seed, size = (int(part) for part in record.stamp.split("/"))
    phantom = GENERATORS[card.phantom.generator](seed, int(record.file), size)
    content = {"png": ingest.png(phantom.image)}
    if card.has_masks:
        assert phantom.mask is not None
        content["seg.png"] = ingest.png(phantom.mask)
    return content, dict(phantom.labels), {name: value for name, value in phantom.metadata.items() if name in card.metadata}


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
