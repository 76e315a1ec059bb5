"""A small packed dataset written by hand, so that the reading side is tested without the packing side."""

import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import webdataset

from shards.card import Card
from shards.manifest import INDEX_DTYPE, Manifest, ShardEntry, dump_index

LABELS = ["a", "b"]


def picture(i: int, size: int, channels: int = 1) -> np.ndarray:
    """Smooth noise, u8 HWC, another for each i."""
    random = np.random.default_rng(i)
    coarse = random.integers(0, 256, (8, 8, channels), dtype=np.uint8)
    fine = random.integers(0, 24, (size, size, channels), dtype=np.uint8)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)
    return cv2.add(smooth // 2 + 40, fine).reshape(size, size, channels)


def card(dataset: str, *, channels: int = 1, masks: bool = False, labels: Sequence[str] = LABELS) -> Card:
    return Card.model_validate(
        {
            "schema": 2,
            "dataset": dataset,
            "title": "tiny",
            "reader": "phantom",
            "phantom": {"generator": "chest", "size": 64},
            "kind": "mixed" if masks else "multilabel",
            "channels": channels,
            "labels": list(labels),
            "mask_classes": ["square"] if masks else [],
            "namespace": dataset,
            "metadata": ["age"],
            "public": True,
            "licence": "none",
            "access": "none",
            "citation": "none",
        }
    )


def write(
    folder: Path,
    shard_samples: Sequence[int] = (40, 33, 27),
    *,
    dataset: str = "tiny",
    size: int = 40,
    channels: int = 1,
    masks: bool = False,
    labels: Sequence[str] = LABELS,
    splits: Sequence[str] | None = None,
    suffix: str = "jpg",
    spacing: tuple[float, float] | None = None,
) -> str:
    """Shards of those sizes (all `train` unless said otherwise); the path of the folder. Raw labels cycle through 0, 1, -1, None.

    spacing: millimetres between rows and columns, where the shards are to say them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, at = [], 0
    splits = splits or ["train"] * len(shard_samples)
    for number, (count, split) in enumerate(zip(shard_samples, splits, strict=True)):
        name = f"{dataset}-{split}-{number:05d}"
        payload, rows = {}, np.zeros(count, dtype=INDEX_DTYPE)
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, user="root", group="root", mtime=0, encoder=False) as tar:
            for row in range(count):
                i = at + row
                key = hashlib.sha256(f"{dataset}{i}".encode()).hexdigest()
                payload[row] = _parts(i, size, channels, masks, labels, split, suffix, spacing)
                tar.write({"__key__": f"{dataset}-{key[:20]}", **payload[row]})
                rows[row]["key"], rows[row]["patient"] = key[:20].encode(), key[20:36].encode()
        data, offset = buffer.getvalue(), 0
        for row in range(count):
            for extension, part in sorted(payload[row].items()):  # the order in which TarWriter writes
                column = {"json": "json", "seg.png": "seg"}.get(extension, "image")
                offset = data.index(part, offset)
                rows[row][f"{column}_off"], rows[row][f"{column}_len"], rows[row][f"{column}_crc"] = offset, len(part), zlib.crc32(part)
                offset += len(part)
        index = dump_index(rows)
        (folder / f"{name}.tar").write_bytes(data)
        (folder / f"{name}.idx").write_bytes(index)
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
        entries.append(ShardEntry.model_validate({"name": name, "split": split, "bytes": len(data), "samples": count, **sums}))
        at += count
    counts = {split: sum(entry.samples for entry in entries if entry.split == split) for split in splits}
    manifest = Manifest.model_validate(
        {
            "schema": 2,
            "dataset": dataset,
            "card": card(dataset, channels=channels, masks=masks, labels=labels),
            "layout": "phantom",
            "shards": entries,
            "counts": counts,
            "patients": counts,
            "positives": {},
            "quarantined": 0,
            "split_rule": "by hand",
            "secret_fingerprint": "public",
            "raw_digest": "0" * 64,
        }
    )
    (folder / "manifest.json").write_text(manifest.text())
    return str(folder)


def _parts(
    i: int,
    size: int,
    channels: int,
    masks: bool,
    labels: Sequence[str],
    split: str,
    suffix: str,
    spacing: tuple[float, float] | None,
) -> dict[str, bytes]:
    pixels, mask = picture(i, size, channels), np.zeros((size, size), dtype=np.uint8)
    if masks:  # a white square, and the mask that says where
        x, y = np.random.default_rng(1000 + i).integers(4, size - 16, 2)
        mask[y : y + 12, x : x + 12] = 1
        pixels = np.where(mask[:, :, None] == 1, np.uint8(255), pixels // 3)
    cycle = (0, 1, -1, None)
    side = {
        "labels": {name: cycle[(i // 4**place) % 4] for place, name in enumerate(labels)},
        "patient": "0" * 16,
        "split": split,
        "meta": {"age": i},
        **({"image": {"spacing_mm": list(spacing)}} if spacing else {}),
    }
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == "jpg" else []
    parts = {suffix: cv2.imencode(f".{suffix}", pixels[:, :, ::-1] if channels == 3 else pixels, quality)[1].tobytes()}
    parts["json"] = json.dumps(side).encode()
    if masks and i % 7:  # one in seven has none
        parts["seg.png"] = cv2.imencode(".png", mask)[1].tobytes()
    return parts
