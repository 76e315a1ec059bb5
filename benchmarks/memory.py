"""What does a loader over ten million samples take: how much memory on the node, and how long until the first batch?

    .venv/bin/python benchmarks/memory.py                            # about a minute, and 1.1 GB of disk for the indices

10,000 shards of 1,000 samples, two workers. Every shard has an index of its own; the tars are links to one tar of 64 px images, for what
is measured is what grows with the number of samples. Memory is the proportional set size of the process and its workers together (a page
that several share counts once), after start and after the steps, which have by then opened shards all over the dataset. The start is the
time from the manifest's address to the first batch in hand. The same with 10,000 samples shows what is Python and torch.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import xrays

SAMPLES = 1000  # in a shard
LIMIT_GB, LIMIT_S = 1.0, 10.0


def write(folder: Path, shards: int) -> None:
    """Shards that differ in their keys and share their images."""
    one = folder / "one.tar"
    images = [xrays.xray(i, 64) for i in range(20)]
    index_N = xrays.tar(one, [images[i % 20] for i in range(SAMPLES)])
    entries = []
    for number in range(shards):
        path = folder / f"bench-train-{number:05d}.tar"
        path.symlink_to(one)
        index_N["key"] = [f"{number * SAMPLES + i:020x}" for i in range(SAMPLES)]
        entries.append(xrays.entry(path, index_N, f"{number:064x}"))
    xrays.manifest(folder, entries)


def use(folder: str, workers: int, steps: int) -> None:
    """The process that is measured: prints seconds to the first batch, gigabytes then, and gigabytes after the steps."""
    from shards.corpus import Corpus
    from shards.loader import TrainLoader
    from shards.views import ViewsConfig

    started = time.perf_counter()
    loader = TrainLoader([Corpus(folder)], None, ViewsConfig(kind="two", size=32), 256, seed=0, workers=workers, labels=[])
    batches = loader.batches(0)
    next(batches)
    seconds, first = time.perf_counter() - started, gigabytes()
    seen = np.concatenate([batch.index_B for batch in itertools.islice(batches, steps)])
    print(f"{seconds} {first} {gigabytes()} {len(np.unique(seen // SAMPLES))}")


def gigabytes() -> float:
    """Proportional set size of this process and its children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().pss for process in family) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--use", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.use:
        use(options.use, options.workers, options.steps)
        return
    print(f"{'samples':>12s}{'start, s':>10s}{'GB at start':>13s}{'GB after':>10s}{'shards read':>13s}")
    for shards in (10, options.shards):
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), shards)
            command = [sys.executable, __file__, "--use", name, "--workers", str(options.workers), "--steps", str(options.steps)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
            seconds, first, last, read = (float(part) for part in told.split())
            print(f"{shards * SAMPLES:12,d}{seconds:10.1f}{first:13.2f}{last:10.2f}{read:13.0f}")
    print(f"of what is allowed: start {seconds / LIMIT_S:.2f}, memory {max(first, last) / LIMIT_GB:.2f}")


if __name__ == "__main__":
    main()
