"""How fast are two-view batches made, against the loaders that people use, and against the limit that decoding sets?

    nice .venv/bin/python benchmarks/loader.py                       # about 6 minutes on 2 idle cores; --rounds 2 for a quick look

Data: grey JPEGs of 512 px, about 45 KB each (benchmarks/xrays.py), in shards that both sides read from the page cache.
All: 224 px views, batches of 64, the same number of workers, crops of 8 to 100 % of the area, brightness and contrast 0.8 with probability
0.8, blur of sigma 0.1 to 2 with probability 0.5, mirroring with probability 0.5. Rows:

    allograft        shards.loader.TrainLoader; leaves out saturation, hue and greyscale, which do nothing to a grey image
    lightly default  webdataset, decode to RGB, lightly.transforms.SimCLRTransform() as it comes
    lightly grey     the same tuned as far as its options go: decode to one channel, no saturation, hue or greyscale
    albumentations   webdataset, decoded by OpenCV to one channel, the same operations with the same probabilities by albumentations, which
                     is OpenCV too; uint8 with one channel all the way, as ours: the fair peer. Crops are resized as it does by itself,
                     bilinear, so that those shrunk by more than 2 alias (ours are halved first)
    ... by area      the same with its antialiased resize
    limit            our reader decodes each image and returns nothing

Rounds are interleaved (a shared machine drifts by 50 %: only ratios of one run mean something); a round starts a loader afresh, skips the
batches that were prefetched, and times the arrivals of the next. Medians over rounds. The last line is the ratio to albumentations.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
import xrays
from lightly.transforms import SimCLRTransform

from shards.batches import BatchReader, Parts
from shards.corpus import Corpus
from shards.loader import TrainLoader
from shards.views import ViewsConfig

VIEW, BATCH, SHARDS = 224, 64, 8
VIEWS = ViewsConfig(kind="two", size=VIEW, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8)


def ours(folder: Path, workers: int) -> Iterator[Any]:
    return TrainLoader([Corpus(str(folder))], None, VIEWS, BATCH, seed=0, workers=workers, labels=[]).batches(0)


class DecodeOnly(BatchReader):
    """Reads and decodes, and hands nothing over."""

    def read(self, id_B: np.ndarray, epoch_B: np.ndarray, slot: int | None = None) -> Parts:
        for i in id_B.tolist():
            self.sample(i)
        return Parts(id_B, epoch_B, torch.empty(0, dtype=torch.uint8), [], None, None, None, id_B >= 0, None, [])


def limit(folder: Path, workers: int) -> Iterator[Any]:
    corpora = [Corpus(str(folder))]
    loader = TrainLoader(corpora, None, VIEWS, BATCH, seed=0, workers=workers, labels=[])
    loader.reader = DecodeOnly(corpora, VIEWS, [], 0)
    return loader.batches(0)


def albumentations_two_views(interpolation: int) -> Callable[[bytes], list[np.ndarray]]:
    """JPEG bytes to two u8 (1, VIEW, VIEW)."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the package index for newer versions when imported
    import albumentations

    transform = albumentations.Compose(
        [
            albumentations.RandomResizedCrop((VIEW, VIEW), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=interpolation),
            albumentations.ColorJitter(brightness=0.8, contrast=0.8, saturation=0, hue=0, p=0.8),
            albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            albumentations.HorizontalFlip(p=0.5),
        ]
    )

    def views(data: bytes) -> list[np.ndarray]:
        decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
        assert decoded is not None
        image = decoded[:, :, None]
        return [transform(image=image)["image"].transpose(2, 0, 1) for _ in range(2)]

    return views


def tars_through(folder: Path, workers: int, decode: str | None, transform: Any) -> Iterator[Any]:
    """webdataset and a torch DataLoader."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=SHARDS, seed=0).shuffle(200)
    dataset = dataset.decode(decode) if decode else dataset
    dataset = dataset.to_tuple("jpg").map_tuple(transform).repeat()
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, worker_init_fn=_one_thread))


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # as our workers do


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
    parser.add_argument("--only", help="measure one row alone, for profiling")
    options = parser.parse_args()
    torch.set_num_threads(1)
    default = SimCLRTransform(input_size=VIEW)
    tuned = SimCLRTransform(input_size=VIEW, cj_sat=0.0, cj_hue=0.0, random_gray_scale=0.0, normalize={"mean": [0.5], "std": [0.25]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = xrays.write(folder, SHARDS, options.samples // SHARDS)
        print(
            f"{options.samples} grey JPEGs of {xrays.SIZE} px, {size:.1f} KB on average; {options.workers} workers, batches of {BATCH}, "
            f"two views of {VIEW} px"
        )
        rows: dict[str, tuple[int, Callable[[], Iterator[Any]]]] = {
            "allograft": (32, lambda: ours(folder, options.workers)),
            "lightly default": (6, lambda: tars_through(folder, options.workers, "pilrgb", default)),
            "lightly grey": (8, lambda: tars_through(folder, options.workers, "pill", tuned)),
            "albumentations": (16, lambda: tars_through(folder, options.workers, None, albumentations_two_views(cv2.INTER_LINEAR))),
            "... by area": (16, lambda: tars_through(folder, options.workers, None, albumentations_two_views(cv2.INTER_AREA))),
            "limit": (32, lambda: limit(folder, options.workers)),
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
        for peer in ("limit", "lightly default", "lightly grey", "... by area", "albumentations"):
            print(f"allograft over {peer}: {median['allograft'] / median[peer]:.2f}x")


if __name__ == "__main__":
    main()
