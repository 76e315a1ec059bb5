"""Does the search for a cut find the depth at which a label was planted?

    nice .venv/bin/python benchmarks/planted_depth.py --out runs/planted-depth      # goes on where it stopped

Scales phantoms have three labels, of which each is a relation at a scale of its own (shards/phantom_scales.py): `texture` in 4 pixels of
96, `count` in 13, `arrangement` in 36. Each is the one label of a task here. A cut sees as many pixels as are printed (its receptive
field); what sees less than a label's scale is at chance, whatever it is trained for. The source is a narrow ResNet-26 (nine cuts), trained
on all three labels of other phantoms; the strategy is `truncated`: the network up to the cut with a head on its means, trained in full.
What is asked for: an early, a middle and a late cut, by fewer trials than trying every one, on validation alone. The study runs as any
other does; curves and picks are what stands in OUT/analyses.
"""

import argparse
from pathlib import Path
from typing import Any

from base import storage
from base.config import parse
from base.paths import revision

ARCHITECTURE, WIDTHS, CARD = "resnet26", (8, 16, 32, 64), "phantom-scales"
WAYS = ("two-stage", "halving", "random", "exhaustive")


def source(folder: Path, images: int, epochs: int, size: int) -> None:
    """Train the encoder on phantoms of a series of its own, and export it."""
    import numpy as np
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from encoders.build import build
    from encoders.export import export
    from shards.phantoms import GENERATORS, LABELS

    torch.manual_seed(0)
    made = [GENERATORS["scales"](5, i, size) for i in range(images)]
    x = torch.from_numpy(np.stack([phantom.image for phantom in made]))[:, None]
    target = torch.tensor([[float(phantom.labels[name]) for name in LABELS] for phantom in made])
    encoder = build(ARCHITECTURE, 1, widths=WIDTHS)
    network = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, len(LABELS)))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batches = [index for _ in range(epochs) for index in torch.randperm(images).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, len(batches))
    total = torch.zeros(len(LABELS))
    for step, index in enumerate(batches, 1):
        batch = x[index].flip(-1) if torch.rand(()) < 0.5 else x[index]  # a mirror image keeps all three labels
        losses = binary_cross_entropy_with_logits(network(batch), target[index], reduction="none").mean(0)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        total += losses.detach()
        if step % (len(batches) // epochs) == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(LABELS, total / (len(batches) // epochs), strict=True))
            print(f"source: step {step} of {len(batches)}, mean loss {shown}", flush=True)
            total.zero_()
    export(encoder.eval(), folder, name="planted", method="supervised", lineage=[], data=[], revision=revision(), image_size=size)


def study(out: Path, images: int, seeds: int, ways: list[str]) -> Any:
    """One task a label, and the ways of searching."""
    import yaml

    from base.config import load_tree
    from base.paths import named
    from cluster.load import load_study
    from shards.phantoms import LABELS

    whole = load_tree(named("task", CARD))
    paths = []
    for label in LABELS:
        path = out / f"{label}.yaml"
        path.write_text(yaml.safe_dump({**whole, "task": label, "title": label, "labels": [label]}))
        paths.append(str(path))
    tree = {
        "schema": 1,
        "study": "planted-depth",
        "out": str(out / "study"),
        "data": {CARD: {"raw": f"phantom:{images}@1"}},
        "cells": {
            "sources": [{"name": "planted", "source": str(out / "source")}],
            "strategies": [{"name": "truncated", "cut": "auto", "search": way} for way in ways],
            "tasks": paths,
            "trial_seeds": list(range(seeds)),
        },
    }
    (out / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_study(str(out / "study.yaml"))


def receptive_fields(side: int = 512) -> dict[str, int]:
    """By cut, how many pixels a side one value of its map is computed from: those that it has a gradient for, far from the border."""
    import torch

    from encoders.build import build
    from encoders.cuts import cuts
    from encoders.truncate import truncate

    whole = build(ARCHITECTURE, 1, widths=WIDTHS).eval()
    for parameter in whole.parameters():  # all alike and positive: no path is closed, nor one chosen
        torch.nn.init.constant_(parameter, 1.0 / parameter[0].numel())
    whole.net.maxpool = torch.nn.AvgPool2d(3, 2, 1)
    found = {}
    for cut in cuts(ARCHITECTURE):
        x = torch.ones(1, 1, side, side, requires_grad=True)
        map_HW = truncate(whole, cut.name).features(x)[0].sum(0)
        map_HW[len(map_HW) // 2, len(map_HW) // 2].backward()
        assert x.grad is not None
        found[cut.name] = int((x.grad[0, 0] != 0).any(0).sum())
    return found


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


def show(held: dict[tuple[str, str], Any], ways: list[str]) -> None:
    """Curves and picks as two tables."""
    from encoders.cuts import cuts
    from shards.phantoms import LABELS

    fields = receptive_fields()
    print(f"\n| cut | sees, px | {' | '.join(LABELS)} |\n|---|---|{'---|' * len(LABELS)}")
    for cut in cuts(ARCHITECTURE):
        row = []
        for label in LABELS:
            points = [point for way in ways for point in held[label, way].curve if point.at == cut.name and point.epochs is None]
            row.append(f"{points[-1].mean:.3f} ± {points[-1].error:.3f}" if points and points[-1].mean is not None else "")
        print(f"| {cut.name} | {fields[cut.name]} | {' | '.join(row)} |")
    print("\n| label | " + " | ".join(f"{way}: pick, trials, cost" for way in ways) + " |\n|---|" + "---|" * len(ways))
    for label in LABELS:
        found = [held[label, way] for way in ways]
        print(f"| {label} | " + " | ".join(f"{one.choice}, {one.trials}, {one.cost:g}" for one in found) + " |")
    names = [cut.name for cut in cuts(ARCHITECTURE)]
    for way in ways:
        places = [names.index(held[label, way].choice) for label in LABELS]
        fewer = [held[label, way].trials < held[label, way].exhaustive for label in LABELS]
        said = "in order" if places == sorted(set(places)) else "not in order"
        print(f"{way}: picks at {places} of 0..{len(names) - 1}, {said}; fewer trials than exhaustive: {fewer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/planted-depth")
    parser.add_argument("--images", type=int, default=1500, help="phantoms; a fifth of them validate")
    parser.add_argument("--seeds", type=int, default=1, help="trial seeds")
    parser.add_argument("--source-images", type=int, default=4000, help="other phantoms, which the source learns from")
    parser.add_argument("--epochs", type=int, default=20, help="of the source")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    asked = parser.parse_args()
    out = Path(asked.out).absolute()
    out.mkdir(parents=True, exist_ok=True)

    from finetune.task import load_task

    size = load_task(CARD).resolution
    if not storage.exists(str(out / "source" / "allograft.json")):
        source(out / "source", asked.source_images, asked.epochs, size)

    from cluster.run import require_done, run

    made = study(out, asked.images, asked.seeds, asked.ways)
    require_done(run(made))
    print(f"\n{only_validation(made.out)} trials, each of validation alone")
    show(answers(made.out), asked.ways)


if __name__ == "__main__":
    main()
