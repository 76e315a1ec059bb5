"""How fast are stored samples read, and what does the decoded cache give?

    nice .venv/bin/python benchmarks/reading.py                      # about 2 minutes on an idle core

One process, one thread, shards in the page cache; 512 px grey JPEGs of about 45 KB (benchmarks/xrays.py). Rows:

    webdataset       WebDataset over tars of the same samples as its ShardWriter writes them: image and metadata of each as bytes, one
                     shard after the other
    ... our tars     the same over our tars, whose headers are plain ustar: half as many to parse
    raw              index and the same bytes, in random order, each touched once by a CRC-32: a mapped file costs nothing before
    checked          Corpus.stored in random order, as our loader reads: image and metadata with a checksum each, compared
    jpeg, 2 views    Corpus.read (read, check, decode) and two views of 224 px, as a pretraining worker does
    decoded, 2 views the same views of an image from the decoded cache (shards.decoded at 512 px)
    jpeg             Corpus.read alone: the limit that decoding sets
    decoded          a copy of the decoded image alone

Rounds are interleaved, every row once a round; medians. The ratios come last.
"""

import argparse
import os
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import webdataset
import xrays
from isal import isal_zlib

from shards.corpus import Corpus
from shards.decoded import decode_all
from shards.shardfile import opened
from shards.views import ViewsConfig, make

VIEWS = ViewsConfig(kind="two", size=224, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8)
SHARDS = 8


def stock(folder: Path, corpus: Corpus) -> Path:
    """The same samples as webdataset's own writer stores them."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "stock-%05d.tar"), maxcount=len(corpus) // SHARDS, verbose=0) as writer:
        for i in range(len(corpus)):
            _, parts = corpus.stored(i, seg=False)
            writer.write({"__key__": f"bench-{i:020x}", "jpg": bytes(parts["image"]), "json": bytes(parts["json"])})
    return folder


def raw(corpus: Corpus) -> Callable[[int], int]:
    """Sample -> CRC-32 of the bytes of its image and metadata."""
    starts = corpus.starts.tolist()

    def read(i: int) -> int:
        number = bisect_right(starts, i) - 1
        shard = opened(corpus.shards[number], corpus.url, None)
        row = shard.row(i - starts[number])
        return isal_zlib.crc32(shard.read(row.image_off, row.json_off + row.json_len - row.image_off))

    return read


def through_webdataset(folder: Path) -> int:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return sum(1 for sample in webdataset.WebDataset(tars, shardshuffle=False) if sample["jpg"] and sample["json"])


def each(ids: Iterable[int], act: Callable[[int], object]) -> int:
    return sum(1 for i in ids if act(i) is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ALLOGRAFT_CACHE"] = str(folder / "cache")
        size = xrays.write(folder, SHARDS, options.samples // SHARDS)
        corpus = Corpus(str(folder))
        theirs = stock(folder / "stock", corpus)
        image_NCHW = decode_all(corpus, xrays.SIZE).images
        print(f"{len(corpus)} grey JPEGs of {xrays.SIZE} px, {size:.1f} KB on average; one process")
        ids = np.random.default_rng(0).permutation(len(corpus)).tolist()
        few = ids[:400]
        rows: dict[str, Callable[[], int]] = {
            "webdataset": lambda: through_webdataset(theirs),
            "... our tars": lambda: through_webdataset(folder),
            "raw": lambda: each(ids, raw(corpus)),
            "checked": lambda: each(ids, lambda i: corpus.stored(i, seg=False)),
            "jpeg, 2 views": lambda: each(few, lambda i: make(corpus.read(i, text=False).image, None, VIEWS, (0, 0, i))),
            "decoded, 2 views": lambda: each(few, lambda i: make(image_NCHW[i].transpose(1, 2, 0), None, VIEWS, (0, 0, i))),
            "jpeg": lambda: each(few, lambda i: corpus.read(i, text=False)),
            "decoded": lambda: each(few, lambda i: image_NCHW[i].transpose(1, 2, 0).copy()),
        }
        measured: dict[str, list[float]] = {row: [] for row in rows}
        for number in range(options.rounds + 1):
            for row, run in rows.items():
                started = time.perf_counter()
                count = run()
                if number:  # the first round warms up
                    measured[row].append(count / (time.perf_counter() - started))
    median = {row: statistics.median(speeds) for row, speeds in measured.items()}
    print(f"{'':18s}{'samples/s':>10s}{'lowest':>10s}{'highest':>10s}")
    for row, speeds in measured.items():
        print(f"{row:18s}{median[row]:10.0f}{min(speeds):10.0f}{max(speeds):10.0f}")
    print(f"decoded cache over JPEG decode, no views: {median['decoded'] / median['jpeg']:.1f}x")
    print(f"decoded cache over JPEG decode, two views made: {median['decoded, 2 views'] / median['jpeg, 2 views']:.2f}x")
    print(f"raw indexed read over webdataset iteration of our tars: {median['raw'] / median['... our tars']:.1f}x")
    print(f"checked indexed read over webdataset iteration: {median['checked'] / median['webdataset']:.1f}x")
    print(f"raw indexed read over webdataset iteration: {median['raw'] / median['webdataset']:.1f}x")


if __name__ == "__main__":
    main()
