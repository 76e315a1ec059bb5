"""What does the engine cost over a bare PyTorch loop, and what do the EMA and the probes cost?

    nice .venv/bin/python benchmarks/overhead.py --out runs/overhead       # about 15 minutes on 2 idle cores; goes on where it stopped

Two networks: ResNet-50 at 224 px with a batch of 16 (goal: at most 1.05 times the bare loop's step) and ResNet-18 at 64 px with a batch of
8 (goal: at most 5 ms a step more). Both sides train SimCLR on the same batches of the same loader with the same optimiser and threads:

    engine   pretraining under Ray Train as a study runs it: DeepSpeed, global batch norm, probes, health, metrics; its own metrics.jsonl
    bare     in a process of its own with the worker's environment: encoder, head, NT-Xent, backward, clipping, AdamW, and nothing else

Rounds alternate the two (a shared machine drifts: only ratios of one round mean something); medians over rounds. The first four steps of
the large network and the first twenty of the small one are left out: they pay for allocations, and Ray's helpers are still starting. The
parts are then timed alone: the update of a BYOL teacher each step, probes, what is measured of the teacher and the verdict once in twenty,
those of the labels once in a hundred (goal: at most 3 % together), against the bare step, which has no teacher, and against BYOL's own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LOGGED = 20  # steps, the default cadence
CLIP = 5.0


class Case(NamedTuple):
    """skipped: steps that are not timed, up to a logged one; every: steps from one logged one to the next."""

    architecture: str
    size: int
    batch: int
    steps: int
    skipped: int
    every: int


CASES = {"resnet50": Case("resnet50", 224, 16, 8, 4, 4), "resnet18": Case("resnet18", 64, 8, 2 * LOGGED, LOGGED, LOGGED)}


def recipe_of(case: Case) -> Any:
    from pretrain.recipe import load_recipe

    settings: dict[str, Any] = {
        "views.size": case.size,
        "global_batch": case.batch,
        "max_steps": case.steps,
        "epochs": 1000,
        "log_every_steps": case.every,
    }
    settings |= {
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "clip": CLIP},
        "precision": "fp32",
        "checkpoint_every_steps": 0,
    }
    return load_recipe("simclr/small", settings | {"stop_when_collapsed": False})


def engine(case: Case, shards: str, out: str, threads: int) -> float:
    """Seconds a step under Ray Train; a cluster must be there."""
    from cluster.pretraining import pretrain_on_ray
    from cluster.study import Resources
    from pretrain.run import DataRef, PretrainConfig
    from shards.corpus import Corpus

    data = [DataRef(dataset="bench", shards=shards, digest=Corpus(shards).manifest.digest)]
    config = PretrainConfig(
        name="overhead", key="0", recipe=recipe_of(case), architecture=case.architecture, in_chans=1, data=data, out=out, threads=threads
    )
    pretrain_on_ray(config, Resources(pretrain_workers=1, threads=threads))
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row for row in rows if "img_per_s" in row}
    assert case.skipped in logged
    return float(case.batch / logged[case.steps]["img_per_s"])


def bare(case: Case, shards: str, threads: int) -> float:
    """Seconds a step of the plain loop."""
    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead

    from encoders.build import build
    from shards.corpus import Corpus
    from shards.loader import TrainLoader

    torch.set_num_threads(threads)
    recipe, encoder = recipe_of(case), build(case.architecture, 1)
    network = torch.nn.Sequential(encoder, SimCLRProjectionHead(encoder.num_features, encoder.num_features, 128))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    criterion = NTXentLoss(temperature=0.1)
    batches = TrainLoader([Corpus(shards)], None, recipe.views, case.batch, seed=0, labels=[]).batches(0)
    for step in range(case.steps):
        if step == case.skipped:
            started = time.perf_counter()
        views = torch.cat(next(batches).views).contiguous(memory_format=torch.channels_last)
        first, second = network(views).chunk(2)
        loss = criterion(first, second)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
    return (time.perf_counter() - started) / (case.steps - case.skipped)


def parts(case: Case, threads: int) -> dict[str, float]:
    """Seconds of the EMA each time, of all that is done at a logging step, without and with the probes of labels, and of BYOL's step."""
    import torch

    from encoders.build import build
    from engine import ema
    from pretrain import health, methods, probes
    from shards.batches import Batch

    torch.set_num_threads(threads)
    encoder, stream = build(case.architecture, 1), torch.Generator().manual_seed(0)
    facts = methods.Facts(seed=0, samples=1000, global_batch=case.batch, sizes=(case.size, case.size))
    byol = methods.build("byol", encoder, {}, facts)
    window, width = probes.Window(), byol.width
    rows: list[dict[str, Any]] = []

    def probe(by_labels: bool) -> None:
        ids = torch.randint(1000, (case.batch,), generator=stream)
        known_BL = torch.ones(case.batch, 14)
        target_BL = torch.randint(2, (case.batch, 14), generator=stream).float()
        batch = Batch(ids, [], target_BL, known_BL, None, ids >= 0, ids)
        widths = {"backbone": width, "projector_0": 128, "projector_1": 128}
        features = {name: torch.randn(case.batch, d, generator=stream) for name, d in widths.items()}
        measured = window.measure(features, batch, by_labels=by_labels)
        for name, teacher in byol.teachers.items():
            student = byol.followed(name)
            assert student is not None
            before = list(teacher.parameters())[ema.largest(teacher)].clone()
            ema.lag(teacher, student)
            ema.moved(before, teacher, student)
        rows.append(measured | {"step": LOGGED * len(rows), "steps": 10_000, "epoch": 1.0, "loss": 3.0, "data_wait": 0.0})
        health.judge(rows, chance_loss=3.4, width=width, labelled=False)

    optimizer = torch.optim.AdamW(byol.parameters(), lr=1e-6, weight_decay=1e-4, fused=True)
    for network in (byol, *byol.teachers.values()):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = [torch.randint(256, (case.batch, 1, case.size, case.size), dtype=torch.uint8, generator=stream) for _ in range(2)]

    def step() -> None:
        loss = byol(Batch(torch.arange(case.batch), views, None, None, None, torch.ones(case.batch, dtype=torch.bool), torch.zeros(0))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(byol.parameters(), CLIP)
        optimizer.step()

    for _ in range(probes.WINDOW // case.batch):  # it fills
        window._add({"backbone_ND": torch.randn(case.batch, width), "index_N": torch.randint(1000, (case.batch,))})
        window._add({"target_NL": torch.randint(2, (case.batch, 14)).float(), "mask_NL": torch.ones(case.batch, 14)})
    timed = {"byol": step, "ema": byol.on_step_end, "probes": lambda: probe(False), "full": lambda: probe(True)}
    return {name: _seconds(call) for name, call in timed.items()}


def _seconds(call: Callable[[], object], times: int = 7) -> float:
    call()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def alone(task: str, name: str, shards: str, threads: int) -> Any:
    """A task of this file in a process with the environment of a worker."""
    from cluster.session import WORKER_SETTINGS

    command = [sys.executable, __file__, "--task", task, "--case", name, "--shards", shards, "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | WORKER_SETTINGS, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> None:
    from pretrain.loop import LOGS_BETWEEN_LABEL_PROBES as between

    def median(name: str, what: str) -> float:
        return statistics.median(row[what] for row in rows if row["case"] == name and what in row)

    for name, case in CASES.items():
        if not any(row["case"] == name for row in rows):
            continue
        ours, theirs = median(name, "engine"), median(name, "bare")
        ratios = [row["engine"] / row["bare"] for row in rows if row["case"] == name]
        print(f"{case.architecture} at {case.size} px, batch {case.batch}: engine {ours * 1e3:.1f} ms a step, bare {theirs * 1e3:.1f} ms")
        print(f"    ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)")
        print(f"    {statistics.median(1e3 * (row['engine'] - row['bare']) for row in rows if row['case'] == name):+.1f} ms a step")
        ema, probe, full = (median(name, what) for what in ("ema", "probes", "full"))
        more = ema + (probe * (between - 1) + full) / between / LOGGED
        often = f"once in {LOGGED}, {full * 1e3:.1f} ms with those of labels once in {LOGGED * between}"
        print(f"    EMA {ema * 1e3:.1f} ms a step, probes {probe * 1e3:.1f} ms {often}")
        print(f"    together {more / theirs:.1%} of the bare step, {more / median(name, 'byol'):.1%} of BYOL's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/overhead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help="this one only")
    parser.add_argument("--task", choices=["bare", "parts"], help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        case = CASES[options.case]
        print(json.dumps(parts(case, options.threads) if options.task == "parts" else bare(case, options.shards, options.threads)))
        return
    import xrays

    from cluster.session import session

    out = Path(options.out).absolute()
    shards, kept = out / "shards", out / "rows.jsonl"
    if not (shards / "manifest.json").exists():
        shards.mkdir(parents=True, exist_ok=True)
        xrays.write(shards, 2, 100)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    wanted = [(name, i) for i in range(options.rounds) for name in CASES if options.case in (None, name)]
    todo = [(name, i) for name, i in wanted if not any((row["case"], row["round"]) == (name, i) for row in rows)]
    if todo:
        with session():
            for name, i in todo:
                place = str(out / f"{name}-{i}-{time.time_ns()}")
                row: dict[str, Any] = {"case": name, "round": i, "threads": options.threads}
                row["engine"] = engine(CASES[name], str(shards), place, options.threads)
                row["bare"] = alone("bare", name, str(shards), options.threads)
                row |= alone("parts", name, str(shards), options.threads)
                rows.append(row)
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    table(rows)


if __name__ == "__main__":
    main()
