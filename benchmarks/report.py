"""The report of a study of 10,000 finished cells: time and size, the first time and again.

    python benchmarks/report.py [--cells 10000] [--images 200] [--out DIR] [--profile]

Cells are made, not trained, in the layout of finetune.run (result.json, config.yaml, metrics.jsonl, predictions.parquet): 20 sources, 10
tasks of three labels, seeds 0 to 4, as many strategies as it takes. What is measured is `allograft report` as a command, the start of its
interpreter included: reading them all, every comparison, every section, results.csv. The first time no comparison is kept.
"""

import argparse
import cProfile
import itertools
import json
import os
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis.report import report
from base.paths import ROOT
from base.seeds import rng
from finetune.cell import CELL_VERSION, Result
from finetune.measure import rows_of
from finetune.task import Task, load_task

SOURCES, TASKS, SEEDS = 20, 10, 5
PLANNED = ("key", "architecture", "source", "source_seed", "fraction", "resolution", "seed", "strategy", "task")


def predictions(task: Task, images: int, draw: np.random.Generator) -> pd.DataFrame:
    """Validation and test rows of one cell, as finetune.predict has them."""
    frames = []
    fixed = rng("images", images)
    for split, n in (("val", images // 2), ("test", images)):
        frame: dict[str, Any] = {"split": split, "sample_id": [f"{task.dataset}-{i:020x}" for i in range(n)]}
        frame |= {"patient": [f"{i:016x}" for i in fixed.integers(0, n, n)], "stratum": None}
        for label in task.labels:
            target = (fixed.random(n) < 0.3).astype(float)
            frame[f"target_{label}"] = target
            frame[f"score_{label}"] = 1 / (1 + np.exp(-(draw.normal(0.5, 0.1) * target + draw.normal(0, 1, n))))
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def make(out: Path, cells: int, images: int) -> int:
    """Write the study; how many cells it has."""
    base = load_task("phantom-chest")
    strategies = [f"lwft{i}" if i else "full" for i in range(max(1, cells // (SOURCES * TASKS * SEEDS)))]
    sources = ["random", "random-b", *(f"source-{i:02d}" for i in range(SOURCES - 2))]
    study = {"schema": 1, "study": "large", "out": str(out), "data": {}, "cells": {"sources": sources, "strategies": strategies}}
    (out / "cells").mkdir(parents=True)
    (out / "study.yaml").write_text(yaml.safe_dump(study))
    draw = rng("large")
    plan: list[dict[str, Any]] = []
    rows = rows_of(base, predictions(base, images, draw))
    curve = [{"epoch": e, "step": 10 * e, "train_loss": 1 / e, "val_loss": 1 / e, "val_auroc_mean": 0.5 + e / 100} for e in range(1, 21)]
    history = [json.dumps(row) for row in curve]
    for source, number, strategy, seed in itertools.product(sources, range(TASKS), strategies, range(SEEDS)):
        key = f"{len(plan):016x}"
        folder = out / "cells" / key
        folder.mkdir()
        task = base.model_copy(update={"task": f"task-{number}", "dataset": f"corpus-{number}"})
        moved = [{**row, "value": None if row["value"] is None else min(1.0, row["value"] + float(draw.normal(0, 0.01)))} for row in rows]
        facts: dict[str, Any] = {"key": key, "architecture": "resnet18", "source": source, "strategy": strategy, "task": task.task}
        facts |= {
            "source_seed": seed if source.startswith("random") else 0,
            "options": {},
            "dataset": task.dataset,
            "fraction": 1.0,
            "resolution": 48,
            "seed": seed,
        }
        facts |= {
            "own_source": False,
            "metric": task.metric,
            "metrics": moved,
            "train_images": 500,
            "params": 11_170_000,
            "macs": 85_000_000,
        }
        facts |= {
            "selection": {"metric": task.metric, "value": 0.7, "epoch": 18, "epochs": 20},
            "seconds": 14.2,
            "manifest_digest": "0" * 64,
        }
        facts |= {"encoder_sha256": f"{sources.index(source):064x}", "transplanted_sha256": "1" * 64, "cell_version": CELL_VERSION}
        facts |= {"revision": "0000000", "host": "node-1", "device": "cpu", "role": "cell"}
        result = Result.model_validate(facts).model_dump(mode="json", by_alias=True)
        predictions(task, images, draw).to_parquet(folder / "predictions.parquet", index=False)
        (folder / "metrics.jsonl").write_text("\n".join(history) + "\n")
        kind = "random" if source.startswith("random") else "weights"
        (folder / "config.yaml").write_text(yaml.safe_dump({"key": key, "source": source, "source_kind": kind}))
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        plan.append({name: facts[name] for name in PLANNED})
    (out / "plan.json").write_text(json.dumps(plan))
    return len(plan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="report-"))
    if not (out / "plan.json").exists():
        started = time.perf_counter()
        count = make(out, given.cells, given.images)
        print(f"made {count} cells of {given.images} test images in {time.perf_counter() - started:.0f} s: {out}", flush=True)
    shutil.rmtree(out / "report", ignore_errors=True)
    for word in ("first", "again"):
        if given.profile:
            profile = cProfile.Profile()
            profile.runcall(report, str(out))
            for order in ("cumulative", "tottime"):
                pstats.Stats(profile).sort_stats(order).print_stats(45)
            continue
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "cluster", "report", str(out)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size, load = (out / "report" / "index.html").stat().st_size / 1e6, os.getloadavg()[0]
        peak = f"peak memory of its largest process {after.ru_maxrss / 1e6:.1f} GB"
        print(f"{word}: {took:.1f} s, {busy:.1f} s of processors, page {size:.1f} MB, {peak}, load {load:.1f}", flush=True)
    if given.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
