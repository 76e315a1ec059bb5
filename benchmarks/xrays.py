"""What the benchmarks of the data plane read: packed shards of grey JPEGs of 512 px at quality 90, x-ray-like noise of about 45 KB each."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import webdataset

from shards.card import Card
from shards.manifest import Manifest, ShardEntry, dump_index
from shards.samples import index_of_tar

SIZE = 512
CARD = {
    "schema": 2,
    "dataset": "bench",
    "title": "x-ray-like noise",
    "reader": "phantom",
    "phantom": {"generator": "chest", "size": SIZE},
    "kind": "multilabel",
    "channels": 1,
    "labels": ["none"],
    "namespace": "bench",
    "public": True,
    "licence": "none",
    "access": "generated",
    "citation": "none",
}


def xray(i: int, size: int = SIZE) -> bytes:
    """A grey JPEG: broad shadows, finer structure, and film grain."""
    random = np.random.default_rng(i)
    image = np.zeros((size, size), dtype=np.float32)
    for cells, weight in ((4, 60.0), (16, 25.0), (64, 10.0)):
        coarse = random.standard_normal((cells, cells)).astype(np.float32)
        image += weight * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    image += 128 + cv2.GaussianBlur(random.standard_normal((size, size)).astype(np.float32), (0, 0), 0.8) * 9
    return cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def tar(path: Path, images: Sequence[bytes], first: int = 0) -> np.ndarray:
    """Write a shard; its index, a row a sample. Keys count from `first`."""
    side = b'{"labels":{},"meta":{},"patient":"0000000000000000"}'
    with path.open("wb") as stream, webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"bench-{first + i:020x}", "jpg": image, "json": side})
    return index_of_tar(path)


def entry(path: Path, index_N: np.ndarray, sha256: str) -> ShardEntry:
    """Write the index beside a tar; what the manifest says of both."""
    index = dump_index(index_N)
    path.with_suffix(".idx").write_bytes(index)
    sums = {"sha256": sha256, "index_sha256": hashlib.sha256(index).hexdigest()}
    return ShardEntry.model_validate(
        {"name": path.stem, "split": "train", "bytes": path.stat().st_size, "samples": len(index_N), "positives": {}, **sums}
    )


def manifest(folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Write the manifest of these shards."""
    counts = {"train": sum(shard.samples for shard in entries)}
    fields = {"dataset": "bench", "card": Card.model_validate(CARD), "layout": "phantom", "shards": list(entries), "counts": counts}
    fields |= {"schema": 2, "patients": counts, "positives": {}, "quarantined": 0, "split_rule": "none"}
    fields |= {"secret_fingerprint": "public", "raw_digest": "0" * 64}
    (folder / "manifest.json").write_text(Manifest.model_validate(fields).text())


def write(folder: Path, shards: int, samples: int) -> float:
    """That many shards of that many images each; the images' mean size in KB."""
    entries, total = [], 0
    for number in range(shards):
        images = [xray(number * samples + i) for i in range(samples)]
        path = folder / f"bench-train-{number:05d}.tar"
        index_N = tar(path, images, first=number * samples)
        entries.append(entry(path, index_N, hashlib.sha256(path.read_bytes()).hexdigest()))
        total += sum(map(len, images))
    manifest(folder, entries)
    return total / shards / samples / 1e3
