"""A study over three hosts of one machine, one of which loses its network in the middle and another its power: does it end complete?

    nice .venv/bin/python benchmarks/hosts.py --out runs/hosts        # as root; some ten minutes on 2 cores

The hosts are network namespaces with addresses and names of their own (tests/hosts.py), a Ray node of one processor on each, the driver on
the first; the disk is shared, as by NFS. The study: SimCLR on three trainers, one a host (two are enough), then eight cells.

    1. when the pretraining has made steps on three workers, the network cable of the third host is pulled (with --drain it is told, as by
       a spot notice, that it will go in 100 s, and nothing of the run may be lost);
    2. when two cells are done, every process of the second host is killed.

Exit code 0 when the study ends with 0, every cell stands, and none was computed twice to its end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.paths import ROOT

sys.path.insert(0, str(ROOT / "tests"))
PATIENCE_S = 900.0
CELLS = 8
NOTICE = [str(Path(sys.executable).parent / "ray"), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
NOTICE += ["--deadline-remaining-seconds", "100"]
STUDY: dict[str, Any] = {
    "resources": {"pretrain_workers": [2, 3]},
    "pretrain": [
        {
            "name": "simclr",
            "recipe": "simclr/smoke",
            "data": {"phantom-chest": "train"},
            "architecture": "test_resnet",
            "settings": {"global_batch": 24, "max_steps": 3000, "epochs": 10_000, "checkpoint_every_steps": 50, "log_every_steps": 10},
        }
    ],
    "champion": None,
}


def rows(out: Path) -> list[dict[str, Any]]:
    """Of the pretraining's metrics."""
    return [json.loads(line) for path in out.glob("pretrain/*/metrics.jsonl") for line in path.read_text().splitlines()]


def results(out: Path) -> list[Path]:
    """Of finished cells."""
    return sorted(out.glob("cells/*/result.json"))


def until(what: str, ready: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
    """Wait, and say how long it took."""
    began = time.monotonic()
    while not ready():
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before: {what}"
        assert time.monotonic() - began < PATIENCE_S, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.2)
    print(f"{time.monotonic() - began:6.1f} s until {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/hosts")
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    import tiny_study
    from hosts import hosts, why_not

    if reason := why_not():
        print(f"not possible here: {reason}")
        return 2
    folder = Path(options.out).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Cells of random weights would begin at once, on the third processor.
    cells = {**tiny_study.STUDY["cells"], "sources": ["pretrain:simclr"], "seeds": list(range(CELLS))}
    path, out = tiny_study.write(folder, tiny_study.STUDY, **STUDY, cells=cells), folder / "out"
    began = time.monotonic()
    with hosts(folder, 3) as found:
        print(f"{time.monotonic() - began:6.1f} s until three hosts are up", flush=True)
        words = [sys.executable, "-m", "cluster", "run", path]
        driver = found.popen(0, words, {"RAY_ADDRESS": found.ray})
        said: list[str] = []
        threading.Thread(target=lambda: said.extend(_echo(driver)), daemon=True).start()
        until("steps on three workers", lambda: any(len(row.get("rank_s", [])) == 3 for row in rows(out)), driver)
        until("a checkpoint", lambda: list(out.glob("pretrain/*/checkpoints/*/COMMIT")), driver)
        if options.drain:
            done = found.run(2, NOTICE)
            assert done.returncode == 0, done.stdout
        else:
            found.cut(2)
        last = max(row["step"] for row in rows(out))
        two = lambda: [row["step"] for row in rows(out) if row.get("event") == "resumed" and row["workers"] == 2]  # noqa: E731
        lost = "was drained" if options.drain else "lost its network"
        until(f"the run goes on, on two workers, after the third host {lost}", two, driver)
        print(f"         it had logged step {last} and goes on from {two()[0]}", flush=True)
        until("two cells are done", lambda: len(results(out)) >= 2, driver)
        found.kill(1)
        print("         the second host was killed", flush=True)
        code = driver.wait(timeout=PATIENCE_S)
    stand = results(out)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    done = sum(int(event.get("done", 0)) for event in events if event.get("event") == "cells")
    print(f"exit code {code}; {len(stand)} of {CELLS} cells stand, {done} were computed; {time.monotonic() - began:.0f} s in all")
    resumes = [(row["step"], row["workers"]) for row in rows(out) if row.get("event") == "resumed"]
    print(f"pretraining resumed at (step, workers): {resumes}")
    kept = not options.drain or resumes[0][0] >= last
    return 0 if code == 0 and len(stand) == CELLS and done <= CELLS and kept else 1


def _echo(driver: subprocess.Popen[str]) -> list[str]:
    assert driver.stdout is not None
    lines = []
    for line in driver.stdout:
        print(f"         | {line.rstrip()}", flush=True)
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
