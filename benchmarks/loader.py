"""How fast are two-view batches made, against webdataset with lightly's SimCLR transform in a torch DataLoader?

    nice .venv/bin/python benchmarks/loader.py                       # about 4 minutes on 2 idle cores; --rounds 2 for a quick look

Data: grey JPEGs of 512 px at quality 90, x-ray-like noise tuned to about 45 KB each, in shards that both sides read from the page cache.
All: 224 px views, batches of 64, the same number of workers, crops of 8 to 100 % of the area, brightness and contrast 0.8 with probability
0.8, blur of sigma 0.1 to 2 with probability 0.5, mirroring with probability 0.5. Rows:

    allograft        shards.loader.TrainLoader; leaves out saturation, hue and greyscale, which do nothing to a grey image
    lightly default  webdataset, decode to RGB, lightly.transforms.SimCLRTransform() as it comes
    lightly grey     the same tuned as far as its options go: decode to one channel, no saturation, hue or greyscale

Rounds are interleaved (a shared machine drifts by 50 %: only ratios of one run mean something); a round starts a loader afresh, skips the
batches that were prefetched, and times the arrivals of the next. Medians over rounds. The last line is the ratio to lightly default.
"""

import argparse
import hashlib
import io
import itertools
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from lightly.transforms import SimCLRTransform

from shards.card import Card
from shards.loader import Corpus, TrainLoader
from shards.manifest import INDEX_DTYPE, Manifest, ShardEntry, dump_index
from shards.views import ViewsConfig

SIZE, VIEW, BATCH, SHARDS = 512, 224, 64, 8
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


def xray(i: int) -> bytes:
    """A grey JPEG: broad shadows, finer structure, and film grain."""
    random = np.random.default_rng(i)
    image = np.zeros((SIZE, SIZE), dtype=np.float32)
    for cells, weight in ((4, 60.0), (16, 25.0), (64, 10.0)):
        coarse = random.standard_normal((cells, cells)).astype(np.float32)
        image += weight * cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    image += 128 + cv2.GaussianBlur(random.standard_normal((SIZE, SIZE)).astype(np.float32), (0, 0), 0.8) * 9
    return cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def write(folder: Path, samples: int) -> float:
    """Shards, indices and manifest of that many images; their mean size in KB."""
    entries, total = [], 0
    for number in range(SHARDS):
        name, count, buffer = f"bench-train-{number:05d}", samples // SHARDS, io.BytesIO()
        rows, parts = np.zeros(count, dtype=INDEX_DTYPE), []
        with webdataset.TarWriter(buffer, user="root", group="root", mtime=0, encoder=False) as tar:
            for row in range(count):
                key = hashlib.sha256(f"{number}-{row}".encode()).hexdigest()[:20]
                sample = {"jpg": xray(number * count + row), "json": b'{"labels":{},"meta":{}}'}
                tar.write({"__key__": f"bench-{key}", **sample})
                rows[row]["key"] = key.encode()
                parts.append(sample)
                total += len(sample["jpg"])
        data, at = buffer.getvalue(), 0
        for row, sample in enumerate(parts):
            for extension, column in (("jpg", "image"), ("json", "json")):
                part = sample[extension]
                at = data.index(part, at)
                rows[row][f"{column}_off"], rows[row][f"{column}_len"], rows[row][f"{column}_crc"] = at, len(part), zlib.crc32(part)
        index = dump_index(rows)
        (folder / f"{name}.tar").write_bytes(data)
        (folder / f"{name}.idx").write_bytes(index)
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": hashlib.sha256(index).hexdigest()}
        entries.append(ShardEntry.model_validate({"name": name, "split": "train", "bytes": len(data), "samples": count, **sums}))
    counts = {"train": sum(entry.samples for entry in entries)}
    fields = {"schema": 2, "dataset": "bench", "card": Card.model_validate(CARD), "layout": "phantom", "shards": entries, "counts": counts}
    fields |= {"patients": counts, "positives": {}, "quarantined": 0, "split_rule": "none", "secret_fingerprint": "public", "raw_digest": "0" * 64}
    (folder / "manifest.json").write_text(Manifest.model_validate(fields).text())
    return total / counts["train"] / 1e3


def ours(folder: Path, workers: int) -> Iterator[Any]:
    views = ViewsConfig(kind="two", size=VIEW, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8)
    return TrainLoader([Corpus(str(folder))], None, views, BATCH, seed=0, workers=workers, labels=[]).batches(0)


def lightly(folder: Path, workers: int, decode: str, transform: Any) -> Iterator[Any]:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=SHARDS, seed=0).shuffle(200).decode(decode).to_tuple("jpg").map_tuple(transform).repeat()
    )
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def speed(batches: Iterator[Any], workers: int, count: int) -> float:
    """Images a second, two views each, over the arrivals of `count` batches after those that start-up had prefetched."""
    for _ in range(2 * workers + 1):
        next(batches)
    started = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return count * BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--only", choices=["allograft"], help="measure our loader alone, for profiling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    default = SimCLRTransform(input_size=VIEW)
    tuned = SimCLRTransform(input_size=VIEW, cj_sat=0.0, cj_hue=0.0, random_gray_scale=0.0, normalize={"mean": [0.5], "std": [0.25]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder, options.samples)
        print(
            f"{options.samples} grey JPEGs of {SIZE} px, {size:.1f} KB on average; {options.workers} workers, batches of {BATCH}, "
            f"two views of {VIEW} px"
        )
        rows: dict[str, tuple[int, Callable[[], Iterator[Any]]]] = {
            "allograft": (32, lambda: ours(folder, options.workers)),
            "lightly default": (6, lambda: lightly(folder, options.workers, "pilrgb", default)),
            "lightly grey": (8, lambda: lightly(folder, options.workers, "pill", tuned)),
        }
        if options.only:
            rows = {options.only: rows[options.only]}
        measured: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(options.rounds):
            for row, (count, start) in rows.items():
                measured[row].append(speed(start(), options.workers, count))
    median = {row: statistics.median(speeds) for row, speeds in measured.items()}
    print(f"{'loader':18s}{'images/s':>10s}{'lowest':>10s}{'highest':>10s}")
    for row, speeds in measured.items():
        print(f"{row:18s}{median[row]:10.0f}{min(speeds):10.0f}{max(speeds):10.0f}")
    if not options.only:
        print(f"allograft over lightly grey: {median['allograft'] / median['lightly grey']:.1f}x")
        print(f"allograft over lightly default: {median['allograft'] / median['lightly default']:.1f}x")


if __name__ == "__main__":
    main()
