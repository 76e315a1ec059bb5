"""How fast do samples come out of an object store 30 ms away, against webdataset over an s3fs file?

    nice .venv/bin/python benchmarks/s3.py                           # about 3 minutes on 2 idle cores

moto's server on loopback, behind a proxy that answers 30 ms late and sends 80 MB/s on a connection (tests/faulty_s3.py); 32 shards of 200
grey JPEGs of 512 px, 9 MB each. Both sides read the bytes of every sample once, shard after shard, and start with nothing cached. Rows:

    allograft        shards.evaluate.in_order and Corpus.stored: whole shards, fetched ahead by a process of their own, their sha256 and
                     each sample's checksum compared, and kept on disk for the next epoch
    webdataset       WebDataset over s3fs file objects as they come (read-ahead cache, 50 MB blocks)

A round starts afresh; the clock runs from the end of the first 4 shards, which one side fetches together while it starts, to the last
sample. Rounds are interleaved; medians. The last line is the ratio. Server, proxy and client share the machine's cores.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import webdataset
import xrays

from base import storage
from base.paths import ROOT
from shards import shardfile
from shards.corpus import Corpus
from shards.evaluate import in_order

sys.path.insert(0, str(ROOT / "tests"))
from faulty_s3 import store

SHARDS, SAMPLES, SKIPPED = 32, 200, 4
URL = "s3://allograft/bench"


def ours() -> Iterator[object]:
    shardfile.forget()
    with tempfile.TemporaryDirectory() as cache_dir:
        corpus = Corpus(URL, cache_dir=cache_dir)
        for i in in_order(corpus):
            yield corpus.stored(i, seg=False)


def through_webdataset() -> Iterator[object]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    names = [name for name in storage.listing(URL) if name.endswith(".tar")]

    def files() -> Iterator[dict[str, object]]:
        for name in names:
            yield {"url": name, "stream": fs.open(f"{URL}/{name}", "rb")}

    return iter(webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander(files())))


def speed(samples: Iterator[object]) -> float:
    """Samples a second after the first shards."""
    count, started = 0, 0.0
    for count, _ in enumerate(samples, 1):
        if count == SKIPPED * SAMPLES:
            started = time.perf_counter()
    assert count == SHARDS * SAMPLES, count
    return (count - SKIPPED * SAMPLES) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, store(Path(name), far=True):
        folder = Path(name) / "shards"
        folder.mkdir()
        size = xrays.write(folder, SHARDS, SAMPLES)
        storage.put_dir(folder, URL, last=("manifest.json",))
        print(f"{SHARDS} shards of {SAMPLES} grey JPEGs, {size:.1f} KB on average")
        rows = {"allograft": ours, "webdataset": through_webdataset}
        measured: dict[str, list[float]] = {row: [] for row in rows}
        for number in range(options.rounds + 1):
            for row, start in rows.items():
                found = speed(start())
                if number:  # the first round warms up
                    measured[row].append(found)
    median = {row: statistics.median(speeds) for row, speeds in measured.items()}
    print(f"{'':12s}{'samples/s':>10s}{'lowest':>10s}{'highest':>10s}")
    for row, speeds in measured.items():
        print(f"{row:12s}{median[row]:10.0f}{min(speeds):10.0f}{max(speeds):10.0f}")
    print(f"allograft over webdataset with s3fs: {median['allograft'] / median['webdataset']:.2f}x")


if __name__ == "__main__":
    main()
