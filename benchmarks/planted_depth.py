"""Does the search for a cut find the depth at which a label was planted?

    nice .venv/bin/python benchmarks/planted_depth.py --out runs/planted-depth  # a few minutes on 2 idle cores; goes on where it stopped

Figures phantoms have three labels: `texture`, the direction of lines 4 pixels apart; `count`, how many of six figures 13 pixels wide are
closed; `arrangement`, the half of the image that they lie in. Each is the one label of a task here. The source is a random ResNet-18 (nine
cuts), the strategy `fat`: the network up to the cut frozen, a linear head on the means of its features. So a curve says at which depth a
label has become linear, and nothing else is fitted. What is asked for: an early, a middle and a late cut, by fewer trials than trying every
cut, on validation alone. The study runs as any other does; curves and picks are what stands in OUT/analyses.
"""

import argparse
from pathlib import Path
from typing import Any

from base import storage
from base.config import parse

ARCHITECTURE, SIZE, CARD = "resnet18", 64, "phantom-figures"
WAYS = ("two-stage", "halving", "exhaustive")


def study(out: Path, images: int, seeds: int, strategy: str) -> Any:
    """One task a label, three ways of searching."""
    import yaml

    from cluster.load import load_study
    from shards.phantoms import LABELS

    paths = []
    for label in LABELS:
        recipe = {"epochs": 20, "batch": 32, "lr": 1e-3, "patience": 8, "views": {"crop_scale": [0.8, 1.0], "flip": True}}
        facts = {
            "schema": 3,
            "task": label,
            "title": label,
            "dataset": CARD,
            "kind": "multilabel",
            "labels": [label],
            "metric": "auroc_mean",
        }
        presets = {name: {"resolution": SIZE, "recipe": recipe, "linear": {"epochs": 100}} for name in ("smoke", "small", "paper")}
        path = out / f"{label}.yaml"
        path.write_text(yaml.safe_dump({**facts, "source": "this benchmark", "presets": presets}))
        paths.append(str(path))
    tree = {
        "schema": 1,
        "study": "planted-depth",
        "out": str(out / "study"),
        "data": {CARD: {"raw": f"phantom:{images}@1"}},
        "cells": {
            "sources": ["random"],
            "architectures": [ARCHITECTURE],
            "strategies": [{"name": strategy, "cut": "auto", "search": way} for way in WAYS],
            "tasks": paths,
            "trial_seeds": list(range(seeds)),
        },
    }
    (out / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_study(str(out / "study.yaml"))


def answers(out: str) -> dict[tuple[str, str], Any]:
    """By task and way of searching."""
    from finetune.search import Answer

    held = {}
    for row in storage.read_json(storage.join(out, "plan.json")):
        for key in row["searches"]:
            url = storage.join(out, "analyses", key, "search.json")
            held[row["task"], row["asked"]["search"]] = parse(storage.read_json(url), Answer, url)
    return held


def only_validation(out: str) -> int:
    """How many trials stand; each has metrics of the validation split alone."""
    urls = [storage.join(out, "cells", key, "result.json") for key in storage.listing(storage.join(out, "cells"))]
    trials = [held for url in urls if (held := storage.read_json(url))["role"] == "trial"]
    assert all(row["split"] == "val" for held in trials for row in held["metrics"])
    return len(trials)


def show(held: dict[tuple[str, str], Any]) -> None:
    """Curves and picks as two tables."""
    from encoders.cuts import cuts
    from shards.phantoms import LABELS

    print(f"\n| cut | {' | '.join(LABELS)} |\n|---|{'---|' * len(LABELS)}")
    curves = {label: {point.at: point for point in held[label, "exhaustive"].curve} for label in LABELS}
    for cut in cuts(ARCHITECTURE):
        points = [curves[label][cut.name] for label in LABELS]
        print(f"| {cut.name} | {' | '.join(f'{point.mean:.3f} ± {point.error:.3f}' for point in points)} |")
    print("\n| label | " + " | ".join(f"{way}: pick, trials, cost" for way in WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for label in LABELS:
        found = [held[label, way] for way in WAYS]
        print(f"| {label} | " + " | ".join(f"{one.choice}, {one.trials}, {one.cost:g}" for one in found) + " |")
    names = [cut.name for cut in cuts(ARCHITECTURE)]
    for way in WAYS:
        places = [names.index(held[label, way].choice) for label in LABELS]
        fewer = [held[label, way].trials < held[label, way].exhaustive for label in LABELS]
        said = "in order" if places == sorted(set(places)) else "not in order"
        print(f"{way}: picks at {places} of 0..{len(names) - 1}, {said}; fewer trials than exhaustive: {fewer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/planted-depth")
    parser.add_argument("--images", type=int, default=2000, help="phantoms; a tenth of them validate")
    parser.add_argument("--seeds", type=int, default=1, help="trial seeds; each is another random network")
    parser.add_argument("--strategy", choices=("fat", "truncated"), default="fat", help="truncated trains what fat only reads")
    asked = parser.parse_args()
    out = Path(asked.out).absolute()
    out.mkdir(parents=True, exist_ok=True)

    from cluster.run import require_done, run

    made = study(out, asked.images, asked.seeds, asked.strategy)
    require_done(run(made))
    print(f"\n{only_validation(made.out)} trials, each of validation alone")
    show(answers(made.out))


if __name__ == "__main__":
    main()
