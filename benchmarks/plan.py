"""How long does `allograft plan` take for a study of 10,000 cells? Goal: under 10 s, imports included.

    nice .venv/bin/python benchmarks/plan.py            # some 2 minutes on 2 cores, most of them packing

1,000 settings (four sources, one of them not trained yet, five strategies, two tasks, 25 fractions) with ten seeds each, over packed
phantoms. The command is run as a person runs it, in a process of its own, three times; the time goes from its start to its end.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from base.paths import ROOT
from cluster.load import load_study
from cluster.standing import shards_url
from shards.card import load_card
from shards.pack import pack

ROUNDS, GOAL_S = 3, 10.0
RANDOM = ["random", {"name": "random-b", "source": "random"}, {"name": "random-c", "source": "random"}]


def tree(folder: Path) -> dict[str, Any]:
    """The study file."""
    return {
        "schema": 1,
        "study": "ten-thousand",
        "out": str(folder / "out"),
        "data": {"phantom-chest": {"raw": "phantom:240"}, "phantom-fundus": {"raw": "phantom:60"}},
        "pretrain": [{"name": "simclr", "recipe": "simclr/demo", "data": {"phantom-chest": "train"}, "architecture": "test_resnet"}],
        "cells": {
            "sources": [*RANDOM, "pretrain:simclr"],
            "strategies": ["full", "linear", "lwft", "lp-ft", "l2-sp"],
            "tasks": ["phantom-chest", "phantom-vessels"],
            "fractions": [round(0.52 + 0.02 * i, 2) for i in range(25)],
            "seeds": list(range(10)),
        },
    }


def main() -> int:
    """Pack, plan, print."""
    with tempfile.TemporaryDirectory(prefix="allograft-plan-") as name:
        path = Path(name) / "study.yaml"
        path.write_text(yaml.safe_dump(tree(Path(name)), sort_keys=False))
        study = load_study(str(path))
        for dataset, entry in study.data.items():
            assert entry.raw is not None
            pack(load_card(dataset), entry.raw, shards_url(study, dataset))
        took, said = [], ""
        for _ in range(ROUNDS):
            began = time.monotonic()
            command = [str(Path(sys.executable).with_name("allograft")), "plan", str(path)]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            took.append(time.monotonic() - began)
    print(next(line for line in said.splitlines() if "10,000" in line))
    print(f"plan of 10,000 cells: {statistics.median(took):.1f} s ({min(took):.1f} to {max(took):.1f}; goal {GOAL_S:g})")
    return 0 if statistics.median(took) < GOAL_S else 1


if __name__ == "__main__":
    sys.exit(main())
