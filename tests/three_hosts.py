"""A study over three hosts of one machine, one of which loses its network while it pretrains and another its power while cells run.

    ended = disturbed(folder, steps=1000, every=50, cells=8, killed_after=2)

The hosts are those of tests/namespaces.py, a Ray node of one processor on each, the driver on the first; the disk is shared, as by NFS.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_study
from namespaces import hosts

from base import storage
from base.paths import ROOT

PATIENCE_S = 900.0
# The commands of docs/deploy.md, as they stand there.
NOTICE = "\n".join(re.findall(r"^(?:node=|ray drain-node).*$", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE))
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@dataclass(frozen=True)
class Ended:
    """How it ended. code: of the driver; stand: cells with a result; computed: cells that a driver computed to their end; logged: the last
    step in metrics.jsonl when the third host went; resumes: (step, workers) of each time that the pretraining went on."""

    code: int
    stand: int
    computed: int
    logged: int
    resumes: list[tuple[int, int]]


def disturbed(folder: Path, *, steps: int, every: int, cells: int, killed_after: int, drain: bool = False) -> Ended:
    """SimCLR on three trainers, one a host (two are enough), then cells.

    1. When the pretraining has made steps on three workers, and a checkpoint, the network cable of the third host is pulled (with `drain`
       it is told, as by a spot notice, that it will go in 100 s).
    2. When the run goes on with two workers and cells are done, every process of the second host is killed.

    Args:
        every: steps from checkpoint to checkpoint.
        killed_after: cells that are done when the second host is killed.
    """
    out = folder / "out"
    settings = {"global_batch": 24, "max_steps": steps, "epochs": 10_000, "checkpoint_every_steps": every, "log_every_steps": 10}
    study: dict[str, Any] = {
        **tiny_study.SMALLER,
        "resources": {"pretrain_workers": [2, 3]},
        "pretrain": [{**tiny_study.SIMCLR, "settings": settings}],
        # Cells of random weights would begin at once, on the third processor.
        "cells": {**tiny_study.STUDY["cells"], "sources": ["pretrain:simclr"], "seeds": list(range(cells))},
        "champion": None,
    }
    path, began = tiny_study.write(folder, study), time.monotonic()
    with hosts(folder, 3) as found:
        print(f"{time.monotonic() - began:6.1f} s until three hosts are up", flush=True)
        driver = found.popen(0, [sys.executable, "-m", "cluster", "run", path], {"RAY_ADDRESS": found.ray})
        threading.Thread(target=_echo, args=[driver], daemon=True).start()
        _until("steps on three workers", lambda: any(len(row.get("rank_s", [])) == 3 for row in _rows(out)), driver)
        _until("a checkpoint", lambda: list(out.glob("pretrain/*/checkpoints/*/COMMIT")), driver)
        if drain:
            told = found.run(2, ["env", f"PATH={PATH}", "bash", "-ec", NOTICE])
            assert told.returncode == 0, told.stdout
        else:
            found.cut(2)
        logged = max(row["step"] for row in _rows(out))
        lost = "was drained" if drain else "lost its network"
        on_two = lambda: [step for step, workers in _resumes(out) if workers == 2]  # noqa: E731
        _until(f"the run goes on, on two workers, after the third host {lost}", on_two, driver)
        print(f"         it had logged step {logged}; it went on (step, workers): {_resumes(out)}", flush=True)
        _until(f"{killed_after} cells are done", lambda: len(_results(out)) >= killed_after, driver)
        found.kill(1)
        print("         the second host was killed", flush=True)
        code = driver.wait(timeout=PATIENCE_S)
    events = storage.read_rows(str(out / "events.jsonl"))
    computed = sum(int(event.get("done", 0)) for event in events if event.get("event") == "cells")
    print(f"{time.monotonic() - began:6.1f} s in all", flush=True)
    return Ended(code, len(_results(out)), computed, logged, _resumes(out))


def _rows(out: Path) -> list[dict[str, Any]]:
    """Of the pretraining's metrics."""
    return [row for path in out.glob("pretrain/*/metrics.jsonl") for row in storage.read_rows(str(path))]


def _resumes(out: Path) -> list[tuple[int, int]]:
    return [(row["step"], row["workers"]) for row in _rows(out) if row.get("event") == "resumed"]


def _results(out: Path) -> list[Path]:
    return sorted(out.glob("cells/*/result.json"))


def _until(what: str, ready: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
    """Wait, and say how long it took."""
    began = time.monotonic()
    while not ready():
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before: {what}"
        assert time.monotonic() - began < PATIENCE_S, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.2)
    print(f"{time.monotonic() - began:6.1f} s until {what}", flush=True)


def _echo(driver: subprocess.Popen[str]) -> None:
    assert driver.stdout is not None
    for line in driver.stdout:
        print(f"         | {line.rstrip()}", flush=True)
