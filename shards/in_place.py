"""WebDataset tars of others, read where they lie: indexed once, copied nowhere. A card asks for it by `reader: tars-in-place`.

    positives, quarantined, index_N, images = write(card, "s3://bucket/tars", records, Path("x.tar"))     # records of one tar

What packing would have written of their samples but the images (labels, split, keyed names) becomes a small shard for each tar and split,
whose index points into the tar; the manifest holds each tar's address, size and sha256, and every image has its checksum. The images are
served as they are, neither reduced nor rid of what their headers say: this is for public data. `reader: tars` copies them instead.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import webdataset as wds

from base import storage
from base.config import canonical_json
from base.paths import absolute
from shards.card import Card
from shards.manifest import EXTENSIONS, Elsewhere, Quarantined
from shards.readers import Record
from shards.samples import index_of_tar, known, told

_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png"}  # what shards.decode takes as it is


def write(
    card: Card, raw: str, records: Iterable[Record], tar: Path, tell: Callable[[int], object] | None = None
) -> tuple[dict[str, int], list[Quarantined], np.ndarray, Elsewhere]:
    """Write what is said of the samples of one tar into the shard `tar`, and make the index that points into theirs.

    Args:
        tell: called with the number of records done, before each.
    Returns:
        the positives of each label; what cannot be read where it lies, with its reason; N rows of INDEX_DTYPE; the tar of the images.
    """
    positives: Counter[str] = Counter()
    quarantined, images = [], []
    theirs, elsewhere = b"", None
    with tar.open("wb") as stream, wds.TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for record in told(records, tell):
            assert record.inside is not None
            if elsewhere is None:
                url = storage.join(absolute(raw), record.inside.container)
                theirs = storage.read_bytes(url)
                elsewhere = Elsewhere(url=url, bytes=len(theirs), sha256=hashlib.sha256(theirs).hexdigest())
            extension = _EXTENSIONS.get(record.file.rpartition(".")[2].lower())
            image = memoryview(theirs)[record.inside.start : record.inside.start + record.inside.length]
            if extension is None or not len(image) or len(image) < record.inside.length:
                reason = "the tar is cut short" if extension else "neither JPEG nor PNG: only packing reads it"
                quarantined.append(Quarantined(key=record.key, reason=reason, file=record.file))
                continue
            images.append((record.inside.start, len(image), zlib.crc32(image), EXTENSIONS.index(extension)))
            side = {"labels": record.labels, "patient": record.patient, "split": record.split, "meta": record.meta}
            writer.write({"__key__": f"{card.dataset}-{record.key}", "json": canonical_json(side).encode()})
            positives.update(label for label, value in record.labels.items() if value == 1)
    index_N = index_of_tar(tar)
    for row, (offset, length, crc, extension_number) in zip(index_N, images, strict=True):
        row["image_off"], row["image_len"], row["image_crc"], row["ext"] = offset, length, crc, extension_number
    assert elsewhere is not None
    return known(card, positives), quarantined, index_N, elsewhere
