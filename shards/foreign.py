"""WebDataset tars of others, read where they lie: indexed once, copied nowhere.

    manifest = index(load_card("imagenet-1k"), "s3://bucket/imagenet-tars", "OUT/shards/imagenet-1k")
    corpus = Corpus("OUT/shards/imagenet-1k")            # as of any packed dataset

What packing would have written of their samples but the images (labels, split, keyed names) becomes small shards, one a tar and split,
whose index points into the tars; the manifest holds each tar's address, size and sha256, and every image has its checksum. The images are
served as they are, neither reduced nor rid of what their headers say: this is for public data. `shards.pack` copies them instead.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import webdataset as wds

from base import storage
from base.config import canonical_json, digest
from base.errors import RequestError
from base.paths import absolute
from shards.card import Card
from shards.manifest import EXTENSIONS, MANIFEST, Elsewhere, Manifest, Quarantined, ShardEntry, dump_index
from shards.pack import Receipt, ShardJob, commit, kept, plan, refuse_another_secret
from shards.samples import index_of_tar

_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png"}  # what shards.decode takes as it is


@dataclass(frozen=True)
class InPlaceJob(ShardJob):
    """The samples of one split in one tar."""

    @property
    def fingerprint(self) -> str:
        """Another one than that of a packed shard of the same name."""
        return digest(["in place", super().fingerprint])


def index(
    card: Card, raw: str, out_url: str, map: Callable[..., Iterable[Any]] = map, secret: bytes | None = None, split_files: str | None = None
) -> Manifest:
    """Index the tars of a folder through `map` (the built-in's signature); again, only those that changed.

    Raises:
        RequestError: the card is not of public data, its layout there is not of tars, and what `shards.pack.plan` refuses.
        WorkError: as `shards.pack.commit`.
    """
    if not card.public:
        raise RequestError(
            "tars that are read where they lie are not de-identified", where=f"card {card.dataset}", hint="pack them instead"
        )
    refuse_another_secret(card, out_url, secret)
    planned = plan(card, absolute(raw), secret, split_files=split_files)
    records = [(job, record) for job in planned for record in job.records]
    if any(record.inside is None or record.inside.array is not None for _, record in records):
        raise RequestError(f"the layout {planned[0].origin.layout} is not one of tars", where=raw, hint="pack it instead")
    jobs, numbers = [], dict.fromkeys((job.split for job in planned), 0)
    for (split, _), group in groupby(records, key=lambda pair: (pair[0].split, pair[1].inside.container)):  # type: ignore[union-attr]
        held = list(group)
        name = f"{card.dataset}-{split}-{numbers[split]:05d}"
        jobs.append(InPlaceJob(**vars(replace(held[0][0], name=name, records=tuple(record for _, record in held)))))
        numbers[split] += 1
    return commit(jobs[0].card, list(map(partial(write, out_url=out_url), jobs)), out_url)


def write(job: InPlaceJob, out_url: str) -> ShardEntry:
    """Index the samples of a tar, or keep the index that stands. What cannot be read where it lies is quarantined."""
    standing = kept(job, out_url)
    if standing is not None:
        return standing
    receipt_url = storage.join(out_url, f"{job.name}.entry.json")
    for url in (storage.join(out_url, MANIFEST), receipt_url):  # neither may be believed from here on
        storage.remove(url)
    inside = job.records[0].inside
    assert inside is not None
    tar_url = storage.join(job.raw, inside.container)
    theirs = memoryview(storage.read_bytes(tar_url))
    positives, quarantined, images = dict.fromkeys(job.card.labels, 0), [], []
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / f"{job.name}.tar"
        with tar.open("wb") as stream, wds.TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
            for record in job.records:
                assert record.inside is not None
                extension = _EXTENSIONS.get(record.file.rpartition(".")[2].lower())
                image = theirs[record.inside.start : record.inside.start + record.inside.length]
                if extension is None or not len(image) or len(image) < record.inside.length:
                    reason = "the tar is cut short" if extension else "neither JPEG nor PNG: only packing reads it"
                    quarantined.append(Quarantined(key=record.key, reason=reason, file=record.file))
                    continue
                images.append((record.inside.start, len(image), zlib.crc32(image), EXTENSIONS.index(extension)))
                side = {"labels": record.labels, "patient": record.patient, "split": record.split, "meta": record.meta}
                writer.write({"__key__": f"{job.card.dataset}-{record.key}", "json": canonical_json(side).encode()})
                for label, value in record.labels.items():
                    positives[label] += value == 1
        index_N = index_of_tar(tar)
        for row, (offset, length, crc, extension_number) in zip(index_N, images, strict=True):
            row["image_off"], row["image_len"], row["image_crc"], row["ext"] = offset, length, crc, extension_number
        data, rows = tar.read_bytes(), dump_index(index_N)
    storage.put(storage.join(out_url, f"{job.name}.tar"), data)
    storage.put(storage.join(out_url, f"{job.name}.idx"), rows)
    entry = ShardEntry(
        name=job.name,
        split=job.split,
        bytes=len(data),
        samples=len(index_N),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(rows).hexdigest(),
        positives=positives,
        quarantined=quarantined,
        images=Elsewhere(url=tar_url, bytes=len(theirs), sha256=hashlib.sha256(theirs).hexdigest()),
    )
    storage.put(receipt_url, canonical_json(Receipt(fingerprint=job.fingerprint, origin=job.origin, entry=entry)))
    return entry
