"""Does the search for a cut find the depth at which a label was planted?

    nice .venv/bin/python benchmarks/planted_depth.py --out runs/planted-depth  # some minutes on 2 idle cores; goes on where it stopped

Figures phantoms have three labels: `texture`, the direction of lines 4 pixels apart; `count`, how many of six figures 13 pixels wide are
closed; `arrangement`, the half of the image that they lie in. Each is the one label of a task here. The source is a ResNet-18 (nine cuts)
trained on all three labels of other phantoms, or with --epochs 0 a random one, whose blocks are identities; the strategy is `fat`: the
network up to the cut frozen, a linear head on the means of its features. So a curve says at which depth a label has become linear, and
nothing else is fitted. What is asked for: an early, a middle and a late cut, by fewer trials than trying every cut, on validation alone.
The study runs as any other does; curves and picks are what stands in OUT/analyses.
"""

import argparse
from pathlib import Path
from typing import Any

from base import storage
from base.config import parse
from base.paths import revision

ARCHITECTURE, SIZE, CARD = "resnet18", 64, "phantom-figures"
WAYS = ("two-stage", "halving", "exhaustive")


def source(folder: Path, images: int, epochs: int) -> None:
    """Train the encoder on phantoms of a series of its own, and export it."""
    import numpy as np
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from encoders.build import build
    from encoders.export import export
    from shards.phantoms import GENERATORS, LABELS

    torch.set_num_threads(2)
    torch.manual_seed(0)
    made = [GENERATORS["figures"](5, i, SIZE) for i in range(images)]
    x = torch.from_numpy(np.stack([phantom.image for phantom in made]))[:, None]
    target = torch.tensor([[float(phantom.labels[name]) for name in LABELS] for phantom in made])
    encoder = build(ARCHITECTURE, 1)
    network = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, len(LABELS)))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batches = [index for _ in range(epochs) for index in torch.randperm(images).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(1, len(batches)))
    total = 0.0
    for step, index in enumerate(batches, 1):
        batch = x[index].flip(-1) if torch.rand(()) < 0.5 else x[index]  # a mirror image keeps all three labels
        loss = binary_cross_entropy_with_logits(network(batch), target[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % (len(batches) // epochs) == 0:
            print(f"source: step {step} of {len(batches)}, mean loss {total / (len(batches) // epochs):.3f}", flush=True)
            total = 0.0
    export(encoder.eval(), folder, name="planted", method="supervised", lineage=[], data=[], revision=revision(), image_size=SIZE)


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
            "sources": [{"name": "planted", "source": str(out / "source")}],
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
    parser.add_argument("--seeds", type=int, default=1, help="trial seeds")
    parser.add_argument("--epochs", type=int, default=3, help="of the source, on as many other phantoms")
    parser.add_argument("--strategy", choices=("fat", "truncated"), default="fat", help="truncated trains what fat only reads")
    asked = parser.parse_args()
    out = Path(asked.out).absolute()
    out.mkdir(parents=True, exist_ok=True)

    if not storage.exists(str(out / "source" / "allograft.json")):
        source(out / "source", asked.images, asked.epochs)

    from cluster.run import require_done, run

    made = study(out, asked.images, asked.seeds, asked.strategy)
    require_done(run(made))
    print(f"\n{only_validation(made.out)} trials, each of validation alone")
    show(answers(made.out))


if __name__ == "__main__":
    main()
