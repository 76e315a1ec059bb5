"""Does the search for a cut find the depth at which a label was planted?

    nice .venv/bin/python benchmarks/planted_depth.py --out runs/planted-depth  # about 10 minutes on 2 idle cores; goes on where it stopped

Chest phantoms have three labels: `texture`, the direction of lines 4 pixels apart; `count`, few large or many small opacities of the same
total area; `arrangement`, opacities in the upper or the lower zone of the lungs, their surroundings alike. Each is the one label of a task
here. The source is a ResNet-18 (nine cuts) trained on all three labels of other phantoms, so that each can be read from it somewhere; the
strategy is `fat`: the network up to the cut frozen, a linear head on the means of its features. So a curve says at which depth a label has
become linear, and nothing else is fitted. What is asked for: an early, a middle and a late cut, by fewer trials than trying every cut, on
validation alone. The study runs as any other does; curves and picks are what stands in OUT/analyses.
"""

import argparse
from pathlib import Path
from typing import Any

from base import storage
from base.config import parse
from base.paths import revision

ARCHITECTURE, SIZE, CARD = "resnet18", 64, "phantom-chest"
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
    made = [GENERATORS["chest"](5, i, SIZE) for i in range(images)]
    x = torch.from_numpy(np.stack([phantom.image for phantom in made]))[:, None]
    target = torch.tensor([[float(phantom.labels[name]) for name in LABELS] for phantom in made])
    encoder = build(ARCHITECTURE, 1)
    network = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, len(LABELS))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(images).split(32):
            batch = x[index].flip(-1) if torch.rand(()) < 0.5 else x[index]  # a mirror image keeps all three labels
            loss = binary_cross_entropy_with_logits(network(batch), target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index) / images
        schedule.step()
        print(f"source: epoch {epoch + 1} of {epochs}, loss {total:.3f}", flush=True)
    export(encoder.eval(), folder, name="planted", method="supervised", lineage=[], data=[], revision=revision(), image_size=SIZE)


def study(out: Path, images: int) -> Any:
    """One task a label, three ways of searching."""
    import yaml

    from cluster.load import load_study
    from finetune.task import load_task
    from shards.phantoms import LABELS

    paths = []
    for label in LABELS:
        recipe = load_task(CARD).recipe.model_dump(mode="json")
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
            "strategies": [{"name": "fat", "cut": "auto", "search": way} for way in WAYS],
            "tasks": paths,
        },
    }
    (out / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_study(str(out / "study.yaml"))


def answers(out: str) -> dict[tuple[str, str], Any]:
    """By task and way of searching."""
    from finetune.search import Answer

    held = {}
    for key in storage.listing(storage.join(out, "analyses")):
        url = storage.join(out, "analyses", key, "search.json")
        if storage.exists(url):
            found = parse(storage.read_json(url), Answer, url)
            held[found.about["task"], found.kind] = found
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
    parser.add_argument("--images", type=int, default=3000, help="phantoms of the tasks; a tenth validate")
    parser.add_argument("--source-images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=5, help="of the source")
    asked = parser.parse_args()
    out = Path(asked.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "source" / "allograft.json").exists():
        source(out / "source", asked.source_images, asked.epochs)

    from cluster.run import require_done, run

    made = study(out, asked.images)
    require_done(run(made))
    print(f"\n{only_validation(made.out)} trials, each of validation alone")
    show(answers(made.out))


if __name__ == "__main__":
    main()
