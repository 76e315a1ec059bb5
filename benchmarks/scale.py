"""What limits at 8, 64 and 512 GPUs, 10,000 cells, 1,000,000,000 images? Simulated with the project's own code; needs no GPU and no store.

nice .venv/bin/python benchmarks/scale.py                           # about 3 minutes, 2 GB of memory; docs/scaling.md reads the numbers

data        manifests of 1,000, 10,000 and 100,000 shards of 10,000 images each: bytes, seconds and memory to read one, to draw the first
            batch and one from the middle of an epoch, each in a process of its own; bytes of the indices
requests    what is asked of an object store, counted in an fsspec store in memory that takes 30 ms for each: a cell, its projection,
            what a driver that starts again looks at, a checkpoint of 8, 64 and 512 ranks
cells       10,000 cells on 8, 64 and 512 GPUs against a clock that is not real: the line of the fan-out itself, in the order of the
            plan and longest first, cells that stop early, nodes of 8 GPUs that die, and a driver that takes its time for each cell
checkpoint  how fast one is written on this disk, and what that means for larger networks
"""

import argparse
import heapq
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from engine.saved import State

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
IMAGES = 10_000  # in a shard
LATENCY_S = 0.03
GPUS_OF_NODE = 8
MTBF_H = 24.0  # of a node: spot machines of a busy zone
RANKS, SCALING = 4, 0.9  # GPUs of a cell that several train together, and what each of them does of what one alone does


# -- data


def corpus(folder: Path, shards: int) -> None:
    """A manifest of that many shards; no shard is there, for nothing is read."""
    import xrays

    from shards.card import Card
    from shards.manifest import MANIFEST, Manifest, ShardEntry

    entries = [
        ShardEntry(
            name=f"bench-train-{i:06d}", split="train", bytes=450_000_000, samples=IMAGES, sha256=f"{i:064x}", index_sha256=f"{i + 1:064x}"
        )
        for i in range(shards)
    ]
    fields: dict[str, Any] = {"dataset": "bench", "card": Card.model_validate(xrays.CARD), "layout": "phantom", "shards": entries}
    fields |= {"counts": {"train": shards * IMAGES}, "patients": {"train": shards * IMAGES}, "positives": {"train": {}}, "quarantined": 0}
    fields |= {"schema": 2, "split_rule": "hash", "secret_fingerprint": "public", "raw_digest": "0" * 64}
    (folder / MANIFEST).write_text(Manifest.model_validate(fields).text())


def use(folder: str) -> None:
    """The process that is measured: a line of JSON."""
    import psutil

    import shards.loader  # noqa: F401  what a rank has loaded anyway
    from shards.corpus import Corpus
    from shards.order import Order, Source

    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    held = Corpus(folder)
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    order = Order([Source(held.manifest.digest, tuple(shard.samples for shard in held.shards))], seed=0, global_batch=4096)
    order.batch(0)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    order.batch(len(held) // 4096 // 2)
    seek_s = time.perf_counter() - began
    grown = psutil.Process().memory_info().rss - before
    print(json.dumps({"read_s": read_s, "first_s": first_s, "seek_s": seek_s, "rss_mb": grown / 1e6}))


def data(counts: Sequence[int]) -> None:
    from shards.manifest import INDEX_DTYPE, MANIFEST

    heads = (("shards", 10), ("images", 16), ("manifest, MB", 14), ("read, s", 9), ("first batch, s", 16), ("seek, s", 9))
    print("".join(f"{head:>{width}s}" for head, width in (*heads, ("memory, MB", 12), ("indices, GB", 13))))
    for shards in counts:
        with tempfile.TemporaryDirectory() as name:
            corpus(Path(name), shards)
            size = os.path.getsize(Path(name, MANIFEST)) / 1e6
            told = subprocess.run([sys.executable, __file__, "--use", name], check=True, capture_output=True, text=True).stdout
        row = json.loads(told.splitlines()[-1])
        index_gb = shards * IMAGES * INDEX_DTYPE.itemsize / 1e9
        print(
            f"{shards:10,d}{shards * IMAGES:16,d}{size:14.1f}{row['read_s']:9.2f}{row['first_s']:16.2f}{row['seek_s']:9.2f}"
            f"{row['rss_mb']:12.0f}{index_gb:13.1f}",
            flush=True,
        )


# -- requests


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests to an object store inside, by what is asked; each takes LATENCY_S."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    from base import storage

    asked: Counter[str] = Counter()

    def ask(what: str, keys: int = 1) -> None:
        pages = max(1, -(-keys // 1000))  # of a listing of S3, each with 1,000 keys
        asked[what] += pages
        time.sleep(LATENCY_S * pages)

    class Counting(MemoryFileSystem):
        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
            found = super().ls(path, detail, **kwargs)
            ask("list", len(found))
            return found

        def find(self, path: str, *_: Any, **kwargs: Any) -> list[str]:
            found = [key for key in self.store if key.startswith(f"{path}/")]  # as s3fs does: all keys below, folders are none
            ask("list", len(found))
            return found

        def exists(self, path: str, **kwargs: Any) -> bool:
            ask("head")
            return bool(super().exists(path, **kwargs))

        def cat_file(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
            ask("get")
            return super().cat_file(path, *arguments, **kwargs)

        def get_file(self, *arguments: Any, **kwargs: Any) -> None:
            ask("get")
            super().get_file(*arguments, **kwargs)

        def pipe_file(self, *arguments: Any, **kwargs: Any) -> None:
            ask("put")
            super().pipe_file(*arguments, **kwargs)

        def put_file(self, *arguments: Any, **kwargs: Any) -> None:
            ask("put")
            super().put_file(*arguments, **kwargs)

    fsspec.register_implementation("counted", Counting, clobber=True)
    Counting.protocol = "counted"
    known, storage._fs = storage._fs, lambda url: (Counting(), "/" + url.partition("://")[2])
    try:
        yield asked
    finally:
        storage._fs = known


def told(what: str, asked: Counter[str], act: Callable[[], object]) -> None:
    asked.clear()
    began = time.perf_counter()
    act()
    seconds, every = time.perf_counter() - began, sum(asked.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(asked.items()))
    print(
        f"    {what:62s}{every:6,d} requests, {every * LATENCY_S:5.1f} s one after the other, took {seconds:4.1f} s ({kinds})", flush=True
    )


def requests(cells: int) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    from base import storage
    from cluster.standing import finished
    from engine import checkpoint

    state = saved()
    with counted() as asked, tempfile.TemporaryDirectory() as name:
        local = Path(name)
        for file in ("config.yaml", "metrics.jsonl", "predictions.parquet", "heat.npz"):
            (local / file).write_bytes(b"0" * 1000)
        (local / "result.json").write_bytes((GOLDEN / "cell_result.json").read_bytes())
        cell = "counted://out/cells/0"

        def leave() -> None:
            storage.exists(f"{cell}/result.json")
            storage.put_dir(local, cell, last=("result.json",))

        told("a cell leaves its files", asked, leave)
        read = ("result.json", "config.yaml", "metrics.jsonl")
        told("its projection into MLflow reads them", asked, lambda: [storage.read_bytes(f"{cell}/{file}") for file in read])
        files = [path.name for path in local.iterdir()]
        plain = MemoryFileSystem()  # the same store, which takes no time
        for i in range(cells):
            for file in files:
                plain.pipe_file(f"/many/cells/{i:016x}/{file}", b"{}")

        def stand() -> None:
            assert len(finished("counted://many/cells")) == cells

        told(f"which of {cells:,} cells stand, for a driver that starts again", asked, stand)
        for world in (8, 64, 512):
            place, snapshot = f"counted://run/{world}/step-00000001", checkpoint.Snapshot(1, {}, {}, state)
            done = [(f"/run/{world}/step-00000001/rank{rank}.done", json.dumps({f"rank{rank}.safetensors": ""})) for rank in range(world)]
            for path, hashes in done[1:]:
                plain.pipe_file(path, hashes.encode())

            def commit(place: str = place, snapshot: checkpoint.Snapshot = snapshot, world: int = world) -> None:
                checkpoint._write_files(place, snapshot, 0, world)
                checkpoint._commit(place, snapshot, world)

            told(f"rank 0 commits a checkpoint of {world} ranks", asked, commit)


# -- cells against a clock that is not real


class Run(NamedTuple):
    """What a simulated fan-out took. useful: share of the GPUs' time that ended in results; driver: of the driver's time that it worked."""

    hours: float
    useful: float
    driver: float
    lost: int
    failed: int


def simulate(hours_of: Sequence[float], guess_of: Sequence[float], gpus: int, dispatch_s: float, mtbf_h: float, seed: int) -> Run:
    """10,000 cells on so many GPUs, one each: the fan-out's own line.

    Args:
        hours_of: what each cell takes. guess_of: what it was estimated to.
        dispatch_s: of the driver, one cell after the other.
        mtbf_h: of a node of 8 GPUs, which comes back after ten minutes; 0: none dies.
    """
    from cluster.waiting import Line
    from finetune.cell import CellConfig

    draw = random.Random(seed)
    line = Line(cost=lambda config: guess_of[config.seed])
    known: list[dict[str, Any]] = [{"key": f"{i}", "seed": i, "role": "cell"} for i in range(len(hours_of))]
    line.add(CellConfig.model_construct(**facts) for facts in known)
    events: list[tuple[float, int, str, int]] = [(0.0, gpu, "free", 0) for gpu in range(gpus)]
    nodes = -(-gpus // GPUS_OF_NODE)
    if mtbf_h:
        events += [(draw.expovariate(1 / mtbf_h), node, "dies", 0) for node in range(nodes)]
    heapq.heapify(events)
    running: dict[int, tuple[float, Any]] = {}
    turn = Counter[int]()  # of a GPU: what was started there before its node died is not heard of
    driver, busy, useful, ended, lost, failed = 0.0, 0.0, 0.0, 0.0, 0, 0
    while line or running:
        now, who, what, number = heapq.heappop(events)
        if what == "dies":
            for gpu in range(who * GPUS_OF_NODE, min(gpus, (who + 1) * GPUS_OF_NODE)):
                turn[gpu] += 1
                if gpu in running:
                    lost += 1
                    failed += not line.again(running.pop(gpu)[1], "its node died", guilty=False)
                heapq.heappush(events, (now + 1 / 6, gpu, "free", turn[gpu]))
            heapq.heappush(events, (now + 1 / 6 + draw.expovariate(1 / mtbf_h), who, "dies", 0))
            continue
        if number != turn[who]:
            continue
        if who in running:
            began, _ = running.pop(who)
            useful, ended = useful + now - began, now
        if line:
            driver = max(driver, now) + dispatch_s / 3600
            busy += dispatch_s / 3600
            waiting = line.next()
            running[who] = (driver, waiting)
            heapq.heappush(events, (driver + hours_of[waiting.config.seed], who, "free", number))
        elif not running:
            break
        else:
            turn[who] += 1
            heapq.heappush(events, (now + 1 / 60, who, "free", turn[who]))  # idle; asks again, since a node may die yet
    return Run(ended, useful / (ended * gpus), busy / ended, lost, failed)


def matrix(count: int, seed: int) -> tuple[list[float], list[float]]:
    """Hours and estimates of the cells of a study: strategies, tasks, fractions, resolutions, in the order of a plan."""
    draw = random.Random(seed)
    hours, guesses = [], []
    axes = [
        (strategy, task, fraction, side)
        for task in (1.0, 2.5, 0.4, 0.1)
        for strategy in (3.0, 0.05, 2.0, 3.0, 0.05)
        for fraction in (1.0, 0.1, 0.01)
        for side in (1.0, 5.2)
    ]
    repeats = -(-count // len(axes))
    for strategy, task, fraction, side in axes:
        for _ in range(repeats):
            guess = 0.1 * strategy * task * fraction * side
            guesses.append(guess)
            hours.append(guess * draw.uniform(0.35, 1.0) + 0.004)  # early stopping; 15 s that every cell takes
    return hours[:count], guesses[:count]


def fan_out(count: int, dispatch_ms: float) -> None:
    hours, guesses = matrix(count, 0)
    whole = sum(hours)
    print(f"    {count:,} cells of {whole:,.0f} GPU hours, from {min(hours) * 3600:.0f} s to {max(hours):.1f} h;", end=" ")
    print(f"{dispatch_ms:g} ms of the driver for each")
    print(f"    {'GPUs':>6s}{'order':>16s}{'hours':>9s}{'least':>9s}{'useful':>9s}{'driver':>9s}{'lost':>7s}{'failed':>8s}")
    for gpus in (8, 64, 512):
        least = max(whole / gpus, max(hours))
        cases = [("of the plan", [0.0] * count, 0.0, 1), ("longest first", guesses, 0.0, 1), ("... nodes die", guesses, MTBF_H, 1)]
        for name, guess_of, mtbf_h, ranks in [*cases, (f"{RANKS} GPUs a cell", guesses, 0.0, RANKS)]:
            of_team = [taken / (1 if ranks == 1 else ranks * SCALING) for taken in hours]
            run = simulate(of_team, guess_of, gpus // ranks, dispatch_ms / 1e3, mtbf_h, seed=1)
            print(
                f"    {gpus:6d}{name:>16s}{run.hours:9.2f}{least:9.2f}{run.useful:9.1%}{run.driver:9.2%}{run.lost:7d}{run.failed:8d}",
                flush=True,
            )


# -- checkpoints


def saved() -> "State":
    """What a run says of itself in a checkpoint."""
    from engine.saved import State

    return State.model_validate_json((GOLDEN / "checkpoint_state.json").read_text())


def checkpoints() -> None:
    import torch

    from engine.checkpoint import Saver, Snapshot

    parameters = 25_000_000
    tensors = {f"layer{i}": torch.zeros(parameters // 10) for i in range(10)}
    states = {f"{name}.{moment}": tensor.clone() for name, tensor in tensors.items() for moment in ("m", "v")}
    with tempfile.TemporaryDirectory() as name:
        saver = Saver(name)
        began = time.perf_counter()
        saver.save(Snapshot(1, tensors, states, saved()))
        saver.finish()
        seconds = time.perf_counter() - began
    size = 12 * parameters / 1e9
    print(f"    {size:.2f} GB (ResNet-50 with AdamW) written, hashed and committed in {seconds:.1f} s: {size / seconds:.2f} GB/s")
    for network, millions in (("ResNet-50", 25), ("ViT-B", 86), ("ViT-L", 304), ("ViT-g", 1136)):
        with_teacher = 16 * millions / 1e3
        print(f"    {network}: {12 * millions / 1e3:.1f} GB; with a teacher {with_teacher:.1f} GB, {with_teacher * seconds / size:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["data", "requests", "cells", "checkpoint"])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--dispatch-ms", type=float, default=2.0, help="of the driver for a cell: what benchmarks/fanout.py measures")
    parser.add_argument("--use", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.use:
        use(options.use)
        return
    parts = {
        "data": lambda: data([1_000, 10_000, 100_000]),
        "requests": lambda: requests(options.cells),
        "cells": lambda: fan_out(options.cells, options.dispatch_ms),
        "checkpoint": checkpoints,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            print(f"{name}:")
            part()


if __name__ == "__main__":
    main()
