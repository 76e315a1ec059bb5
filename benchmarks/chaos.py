"""Does a study end complete and unchanged whatever dies under it?

    nice .venv/bin/python benchmarks/chaos.py [SEEDS] [RESULTS]          # default: 20, build/chaos.jsonl; 2 to 4 minutes a seed on 2 cores

Packing, a pretraining on two workers and 40 cells on a Ray cluster of three nodes, with PostgreSQL, an MLflow server with accounts and an
S3 server, all started from packages (tests/services.py). Once undisturbed, then once for each seed under four faults, whose kinds and
moments are drawn from the seed: a trainer, a cell worker, a raylet (the head's takes the cluster with it) or the driver ended with SIGKILL;
the MLflow server away for 30 s; half of all requests to the store answered by 503 for 15 s; the scratch volume full for 10 s; half of the
newest checkpoint cut off and a trainer killed. Whatever ends is started again.

A seed holds when the last driver ended with 0, the store took every cell's result once, all predictions and the encoder are equal to the
bit and all result rows equal to the undisturbed study's but for run_id, seconds and the study's name, and MLflow holds every run once,
finished. One line for each seed goes to RESULTS, and seeds that stand there are not run again. The summary comes last. Exit code 0 when all
hold.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.paths import ROOT, revision

sys.path.insert(0, str(ROOT / "tests"))
import tiny_study
from faults import Cluster, draw
from services import running

TREE: dict[str, Any] = {
    **tiny_study.SMALLER,
    "resources": {"pretrain_workers": 2, "cell_workers": 3},
    "pretrain": [{**tiny_study.SIMCLR, "settings": {"epochs": 40, "max_steps": 80, "checkpoint_every_steps": 10}}],
    "cells": {
        **tiny_study.SMALLER["cells"],
        "strategies": ["linear", "full"],
        "seeds": list(range(10)),
        "task_settings": {"phantom-chest": {"linear.epochs": 3, "recipe.epochs": 2}},
    },
}
SCRATCH = "128m"


@contextmanager
def volume(folder: Path) -> Iterator[Path]:
    """A small file system of its own, so that it can be full. Needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SCRATCH}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    """Run the seeds that are missing, print the summary."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    results = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "build" / "chaos.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    missing = [seed for seed in seeds if seed not in {row["seed"] for row in rows}]
    if missing:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        print(f"logs in {folder}", flush=True)
        with (
            volume(folder / "scratch") as scratch,
            running(folder, proxied=True, TMPDIR=str(scratch), ALLOGRAFT_CACHE=str(scratch / "cache")) as services,
        ):
            os.environ.update({**services.environment, "AWS_ENDPOINT_URL": services.store, "TMPDIR": "/tmp"})
            cluster = Cluster(services, scratch)
            calm = cluster.run(TREE, "calm", [])
            print(f"undisturbed: {calm.seconds:.0f} s, {len(calm.written)} cells {calm.differences(calm) or ''}", flush=True)
            for seed in missing:
                told = cluster.run(TREE, f"seed-{seed}", draw(seed))
                rows.append(
                    {
                        "seed": seed,
                        "revision": revision(),
                        "happened": told.happened,
                        "missed": told.missed,
                        "codes": told.codes,
                        "seconds": told.seconds,
                        "calm_seconds": calm.seconds,
                        "problems": told.differences(calm),
                    }
                )
                with open(results, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    return summary([row for row in rows if row["seed"] in seeds])


def summary(rows: list[dict[str, Any]]) -> int:
    """What happened how often, and what did not hold."""
    kinds = Counter(fault.partition(" at ")[0] for row in rows for fault in row["happened"])
    for row in rows:
        for problem in row["problems"]:
            print(f"seed {row['seed']}: {problem}")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    starts, seconds = sum(len(row["codes"]) for row in rows), sum(row["seconds"] for row in rows) / len(rows)
    held = sum(not row["problems"] for row in rows)
    print(f"{held} of {len(rows)} seeds hold; {sum(kinds.values())} faults, {starts} drivers, {seconds:.0f} s a seed")
    return 0 if held == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
