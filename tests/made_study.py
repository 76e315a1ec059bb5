"""A synthetic OUT folder in the shapes that finetune and pretrain write, for tests of the analysis room. Nothing is trained.

make(tmp_path, sources={"random": 0.0, "simclr": 1.0}, seeds=3)      # a source's number is how far its positives stand out
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis import metrics
from analysis.claims import Claim
from base.config import parse
from base.seeds import rng

LABELS = ("texture", "count", "arrangement")
SHA = {"simclr": "a" * 64, "simclr-sup": "b" * 64}
CLAIM: dict[str, Any] = {
    "name": "pretraining-helps",
    "sentence": "Pretraining on chests helps.",
    "about": "encoders",
    "comparison": {"a": {"source": "simclr"}, "b": {"source": "random"}},
    "expect": "greater",
    "margin": 0.02,
}


def card(dataset: str, stratify_by: str | None = None, share_images: bool = False) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "title": f"made {dataset}",
        "licence": "none needed",
        "citation": "nobody",
        "share_images": share_images,
        "stratify_by": stratify_by,
    }


def _classification(key: Sequence[object], lift: float, seed: int, images: int, strata: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    fixed, own = rng("images", images, strata), rng("cell", *map(str, key), seed)
    frames, rows = [], []
    for split, n in (("val", images // 2), ("test", images)):
        patient = fixed.integers(0, max(2, int(n * 0.8)), n)
        stratum = fixed.integers(0, strata, n) if strata else None
        table: dict[str, Any] = {"split": split, "sample_id": [f"{i:020d}" for i in range(n)], "patient": [f"{p:016x}" for p in patient]}
        table["stratum"] = [None] * n if stratum is None else [f"s{s}" for s in stratum]
        found: dict[str, list[float]] = {"auroc": [], "auroc_within": []}
        for label in LABELS:
            target = (fixed.random(n) < 0.35).astype(float)
            target[:2] = 0, 1
            shared = fixed.normal(0, 1, n)
            score = 1 / (1 + np.exp(-(0.4 * target + (lift + own.normal(0, 0.08)) * target + shared + own.normal(0, 0.5, n))))
            table[f"target_{label}"], table[f"score_{label}"] = target, score
            found["auroc"].append(metrics.auroc(score, target))
            if strata:
                found["auroc_within"].append(metrics.auroc_within(score, target, table["stratum"]))
        for name, values in found.items():
            for label, value in zip(LABELS, values, strict=False):
                rows.append({"split": split, "class": label, "metric": name, "unit": "fraction", "value": value, "n": n})
            if values:
                rows.append(
                    {
                        "split": split,
                        "class": "",
                        "metric": f"{name}_mean",
                        "unit": "fraction",
                        "value": float(np.mean(values)),
                        "n": len(values),
                    }
                )
        frames.append(pd.DataFrame(table))
    return pd.concat(frames), rows


def _segmentation(key: Sequence[object], lift: float, seed: int, images: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    fixed, own = rng("masks", images), rng("cell", *map(str, key), seed)
    frames, rows = [], []
    for split, n in (("val", images // 2), ("test", images)):
        hard = fixed.normal(0, 0.02, n)
        dice = np.clip(0.93 + 0.02 * lift + hard + own.normal(0, 0.004) + own.normal(0, 0.006, n), 0, 1)
        held = {
            "split": split,
            "sample_id": [f"{i:020d}" for i in range(n)],
            "patient": [f"{i:016x}" for i in range(n)],
            "stratum": [None] * n,
            "dice": dice,
        }
        frames.append(pd.DataFrame(held))
        rows.append({"split": split, "class": "", "metric": "dice", "unit": "fraction", "value": float(dice.mean()), "n": n})
    return pd.concat(frames), rows


def make(
    out: Path,
    sources: Mapping[str, float],
    *,
    tasks: Mapping[str, str] | None = None,
    strategies: Sequence[str] = ("full",),
    seeds: int = 3,
    images: int = 200,
    strata: int = 0,
    fractions: Sequence[float] = (1.0,),
    own: Sequence[tuple[str, str]] = (),
    pretrain: bool = True,
    manifests: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the study and return `out`. tasks: name -> "classification" or "segmentation"; own: (source, task) pairs of own source."""
    tasks = tasks or {"phantom-chest": "classification"}
    names = {source: source if source.startswith("random") else f"pretrain:{source}" for source in sources}
    study = {
        "study": "made",
        "out": "runs/made",
        "pretrain": [
            {"name": s, "recipe": "simclr/smoke", "start_from": "pretrain:simclr" if s == "simclr-sup" else "random"}
            for s in sources
            if s in SHA
        ],
        "cells": {
            "sources": list(names.values()),
            "strategies": list(strategies),
            "tasks": list(tasks),
            "fractions": list(fractions),
            "resolutions": [48],
            "seeds": list(range(seeds)),
        },
        "champion": {"task": next(iter(tasks)), "metric": "auroc_mean" if tasks[next(iter(tasks))] == "classification" else "dice"},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    for task, kind in tasks.items():
        for dataset_card in [{**card(task, "source" if strata else None), **(manifests or {}).get(task, {})}]:
            folder = out / "shards" / task
            folder.mkdir(parents=True, exist_ok=True)
            counts = {"train": 500, "val": images // 2, "test": images}
            held = {
                "schema": 2,
                "dataset": task,
                "split_rule": "by hand",
                "card": dataset_card,
                "layout": "made",
                "counts": counts,
                "patients": counts,
                "quarantined": 0,
            }
            (folder / "manifest.json").write_text(json.dumps({**held, "positives": {"test": dict.fromkeys(LABELS, 30)}}))
        for number, (source, lift) in enumerate(sources.items()):
            for strategy in strategies:
                for fraction in fractions:
                    for seed in range(seeds):
                        key = (source, task, strategy, fraction)
                        reached = lift * (0.6 if strategy == "linear" else 1) * fraction**0.2
                        maker = (
                            _segmentation(key, reached, seed, images)
                            if kind == "segmentation"
                            else _classification(key, reached, seed, images, strata)
                        )
                        _cell(out, source, names[source], key, seed, number, maker, (source, task) in own)
    kept = ("key", "architecture", "source", "source_seed", "fraction", "resolution", "seed", "strategy", "task")
    results = [json.loads(file.read_text()) for file in sorted((out / "cells").glob("*/result.json"))]
    results.sort(key=lambda result: list(names.values()).index(result["source"]))
    (out / "plan.json").write_text(json.dumps([{name: result[name] for name in kept} for result in results]))
    for name in (s for s in sources if s in SHA and pretrain):
        _pretraining(out, name)
    return out


def claim(**changes: Any) -> Claim:
    """A claim of a made study."""
    return parse({**CLAIM, **changes}, Claim, "claim")


def write_claims(out: Path, claims: Sequence[Claim], late: Sequence[str] | None = ()) -> None:
    """Claims in a made study's file, written into its diary before its results but for those in `late`; None leaves the diary as it is."""
    tree = yaml.safe_load((out / "study.yaml").read_text())
    tree["claims"] = [one.model_dump(mode="json", by_alias=True) for one in claims]
    (out / "study.yaml").write_text(yaml.safe_dump(tree))
    if late is not None:
        rows = [{"event": "claim", "claim": one.name, "sha256": one.sha256, "standing": int(one.name in late)} for one in claims]
        (out / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _cell(
    out: Path,
    source: str,
    name: str,
    key: tuple[Any, ...],
    seed: int,
    number: int,
    made: tuple[pd.DataFrame, list[dict[str, Any]]],
    own: bool,
) -> None:
    frame, rows = made
    _, task, strategy, fraction = key
    digest = f"{rng('key', *map(str, key), seed).integers(0, 1 << 62):016x}"
    folder = out / "cells" / digest
    folder.mkdir(parents=True)
    metric = "dice" if any(row["metric"] == "dice" for row in rows) else "auroc_mean"
    best = next(row["value"] for row in rows if row["metric"] == metric and row["split"] == "val")
    epochs = 12 + seed
    curve = [best * (1 - 0.35 * np.exp(-e / 3)) for e in range(1, epochs + 1)]
    held = [
        {"epoch": e + 1, "train_loss": 1 / (e + 1), f"val_{metric}": value, "lr": 1e-3, "seconds": 0.5} for e, value in enumerate(curve)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    random = source.startswith("random")
    (folder / "config.yaml").write_text(yaml.safe_dump({"key": digest, "source": name, "source_kind": "random" if random else "weights"}))
    frame.to_parquet(folder / "predictions.parquet", index=False)
    result = {
        "schema": 1,
        "key": digest,
        "architecture": "resnet18",
        "source": name,
        "source_seed": 0,
        "strategy": strategy,
        "options": {},
        "task": task,
    }
    result |= {
        "dataset": task,
        "fraction": fraction,
        "resolution": 48,
        "seed": seed,
        "own_source": own,
        "metrics": rows,
        "params": 11_170_000,
    }
    result |= {
        "selection": {"metric": metric, "value": best, "epoch": epochs - 2, "epochs": epochs},
        "macs": 85_000_000,
        "seconds": 14.2 + number,
        "role": "cell",
    }
    result |= {
        "encoder_sha256": SHA.get(source, f"{seed}{number}" * 32),
        "revision": "v0.1-3-gabc",
        "host": "node-1",
        "device": "cpu",
        "cell_version": 1,
    }
    (folder / "result.json").write_text(json.dumps(result))


def _pretraining(out: Path, name: str) -> None:
    folder = out / "pretrain" / f"{name}-{SHA[name][:16]}"
    folder.mkdir(parents=True)
    draw = rng("pretraining", name)
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "epoch": s / 20,
            "loss": 4.8 * float(np.exp(-s / 150)) + 1.5 + draw.normal(0, 0.03),
            "std_ratio": 1 - float(np.exp(-s / 40)) * 0.8,
            "rankme": 5 + s / 8,
        }
        for s in range(0, 400, 10)
    ]
    rows.append({"event": "health", "step": 400, "health": "healthy", "why": "loss 1.8, spread 0.95, effective rank 55 of 512"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"name": name, "recipe": {"method": "simclr"}, "data": [{"dataset": "phantom-chest"}], "seed": 0})
    )
    result = {
        "schema": 1,
        "name": name,
        "key": SHA[name][:16],
        "method": "simclr",
        "encoder_sha256": SHA[name],
        "steps": 400,
        "epochs": 20,
        "img_per_s": 910.0,
    }
    (folder / "result.json").write_text(
        json.dumps({**result, "seconds": 95.0, "lineage": [], "labelled": [], "health": "healthy", "restarts": 1})
    )
