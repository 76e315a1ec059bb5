"""Does the demo's answer hold? The study over ten seeds of pretraining, each with its own fine-tuning seeds.

    .venv/bin/python benchmarks/demo_seeds.py [OUT] [REPEATS]      # default runs/demo-seeds, 10; goes on where it stopped

Prints, for each seed, the gain of simclr over random and the A/A control, each with its interval, and last how often the gain's interval
excludes 0 (wanted: at least 9 of 10) and how often the control's does (wanted: at most 1). Shards are packed once. Takes some 4 minutes
a seed on two cores; the table is kept in docs/benchmarks.md with date and machine.
"""

import io
import os
import subprocess
import sys

import pandas as pd

from base import storage
from base.paths import ROOT


def study(out: str, seed: int, shards: dict[str, str]) -> str:
    """Run one repetition (again = only what is missing); returns its folder."""
    place = f"{out}/seed-{seed}"
    settings = [f"pretrain.simclr.seeds=[{seed}]", f"cells.seeds=[{5 * seed},{5 * seed + 1},{5 * seed + 2},{5 * seed + 3},{5 * seed + 4}]"]
    for dataset, url in shards.items():
        settings += [f"data.{dataset}={{shards: {url}}}"]
    command = [sys.executable, "-m", "cluster", "run", str(ROOT / "studies" / "demo.yaml"), f"out={place}", *settings]
    subprocess.run(command, check=True)
    return place


def main() -> int:
    """Run all repetitions and count."""
    out = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-seeds")
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    tables = []
    shards: dict[str, str] = {}
    for seed in range(repeats):
        place = study(out, seed, shards)
        shards = shards or {name: f"{place}/shards/{name}" for name in storage.listing(f"{place}/shards")}
        table = pd.read_csv(io.BytesIO(storage.read_bytes(f"{place}/report/significance.csv")))
        tables.append(table.assign(repetition=seed))
    every = pd.concat(tables)
    every["excludes_0"] = (every["low"] > 0) | (every["high"] < 0)
    shown = ["repetition", "kind", "a", "b", "task", "strategy", "estimate", "low", "high", "p_holm", "declared"]
    print(every[shown].to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for (kind, task, strategy), group in every.groupby(["kind", "task", "strategy"]):
        up = int((group["low"] > 0).sum())
        print(
            f"{kind} {task} {strategy}: interval excludes 0 in {int(group['excludes_0'].sum())} of {len(group)} (above 0 in {up}), ", end=""
        )
        print(f"declared in {int(group['declared'].sum())}, mean {group['estimate'].mean():+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
