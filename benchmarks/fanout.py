"""What does the orchestration cost a cell? 1,000 cells that have nothing to compute, and their projection into MLflow.

    nice .venv/bin/python benchmarks/fanout.py                          # about 3 minutes on 2 cores; goal: 50 ms a cell
    nice .venv/bin/python benchmarks/fanout.py --projected 1000 3000 10000 [--server]       # goal: 10,000 in under 30 minutes

Cells: each has its result in storage already, so a worker reads its configuration, finds the result, checks and hands it back: everything
of a cell but its work. Real Ray, real workers, two at a time; estimates of cost by the shards' manifest and the network, as in a study.

    pool       from nothing to the first worker that is up: Ray, a process, torch
    cells      from the first worker to the last answer, by the number of cells

Projection: finished cells as a study leaves them, written by this script, into a new MLflow store: SQLite, or with --server an `mlflow
server` over SQLite. One figure for each number of cells, so that one sees whether the time grows with it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.config import canonical_json, parse, to_yaml
from base.paths import ROOT


def cells(folder: Path, count: int, shards: str) -> list[Any]:
    """Cells of a study of that many seeds, with results that stand."""
    import yaml

    from finetune.cell import CellConfig
    from shards.manifest import read

    base = yaml.safe_load((ROOT / "tests" / "golden" / "cell.yaml").read_text())
    result = json.loads((ROOT / "tests" / "golden" / "cell_result.json").read_text())
    epochs = [{"epoch": i, "train_loss": 0.5, "val_loss": 0.5, "val_auroc_mean": 0.7, "seconds": 1.0} for i in range(30)]
    curve = "".join(json.dumps(row) + "\n" for row in epochs)
    found = []
    for i in range(count):
        key, out = f"{i:016x}", folder / "out" / "cells" / f"{i:016x}"
        fields = {"key": key, "out": str(out), "shards": shards, "manifest_digest": read(shards).digest, "seed": i}
        fields |= {"source_kind": "random", "encoder_dir": None, "encoder_sha256": None}
        found.append(parse({**base, **fields}, CellConfig, "golden cell"))
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text(curve)
        (out / "config.yaml").write_text(to_yaml(found[-1]))
        (out / "result.json").write_text(json.dumps({**result, "key": key, "seed": i}))
    return found


def fan_out(configs: list[Any], workers: int) -> dict[str, float]:
    """Seconds until the first worker is up, and a cell after that."""
    from cluster.fanout import Tally, run_cells
    from cluster.session import session
    from cluster.study import Resources

    first: list[float] = []

    def show(tally: Tally) -> None:
        if tally.running and not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    with session():
        tally = run_cells(configs, Resources(cell_workers=workers), show)
        ended = time.perf_counter()
    if tally.done != len(configs):
        raise SystemExit(f"cells failed: {dict(list(tally.failed.items())[:3])}")
    return {"pool_s": first[0] - began, "cells_s": ended - first[0], "ms_a_cell": 1e3 * (ended - first[0]) / len(configs)}


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of an `mlflow server` of our own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("w") as log:
        running = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(running.pid, 15)
        running.wait()


def project(folder: Path, count: int, server: bool) -> tuple[float, float]:
    """Seconds to project so many finished cells into a new store, and of them the processor's in this process."""
    from cluster.projection import Projection

    shards = corpus(folder)
    cells(folder, count, shards)

    def timed(uri: str) -> tuple[float, float]:
        projection = Projection(str(folder / "out"), "fanout", uri)
        began, busy = time.perf_counter(), time.process_time()
        projection.update()
        assert len(projection.finished) == count
        return time.perf_counter() - began, time.process_time() - busy

    if not server:
        return timed(f"sqlite:///{folder}/mlflow.db")
    with mlflow_server(folder) as address:
        return timed(address)


def corpus(folder: Path) -> str:
    """Shards that the estimates read: their manifest."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_cell

    return str(tiny_cell.corpora(folder / "corpora")["phantom-chest"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--projected", type=int, nargs="*", default=[], help="numbers of cells to project, instead of the fan-out")
    parser.add_argument("--server", action="store_true", help="through an mlflow server")
    options = parser.parse_args()
    for count in options.projected:
        with tempfile.TemporaryDirectory(prefix="allograft-fanout-") as name:
            seconds, busy = project(Path(name), count, options.server)
        way = "mlflow server" if options.server else "SQLite"
        each = f"{1e3 * seconds / count:.0f} ms a cell, {1e3 * busy / count:.0f} of them of this process's processor"
        print(f"{count:,} cells projected through {way}: {seconds:.0f} s, {each}", flush=True)
    if not options.projected:
        with tempfile.TemporaryDirectory(prefix="allograft-fanout-") as name:
            folder = Path(name)
            configs = cells(folder, options.cells, corpus(folder))
            sent = len(canonical_json(configs[0]))
            print(json.dumps(found := fan_out(configs, options.workers)))
        print(f"{options.cells:,} cells of {sent:,} bytes, {options.workers} workers; pool up after {found['pool_s']:.1f} s")
        whole_ms = 1e3 * (found["pool_s"] + found["cells_s"]) / options.cells
        print(f"orchestration of a cell: {found['ms_a_cell']:.1f} ms; with the start of Ray and of the pool {whole_ms:.1f} ms (goal: 50)")


if __name__ == "__main__":
    main()
