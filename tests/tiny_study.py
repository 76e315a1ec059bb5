"""The study of the cluster tests: every stage of the main job, on phantoms so small that it takes about a minute."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import yaml
from tiny_corpus import picture

from base.paths import ROOT
from cluster import plan
from cluster.plan import Packed, Weights
from cluster.study import Study
from finetune.cell import CellConfig

SIMCLR = {"name": "simclr", "recipe": "simclr/smoke", "data": {"phantom-chest": "train"}, "architecture": "test_resnet"}
CHAIN = {"name": "chain", "recipe": "supervised/smoke", "data": {"phantom-chest": "train"}, "start_from": "pretrain:simclr"}
STUDY: dict[str, Any] = {
    "schema": 1,
    "study": "tiny",
    "data": {"phantom-chest": {"raw": "phantom:160"}},
    "pretrain": [SIMCLR, CHAIN],
    "cells": {
        "sources": ["random", "pretrain:simclr", "pretrain:chain"],
        "strategies": ["linear"],
        "tasks": ["phantom-chest"],
        "resolutions": [32],
        "seeds": [0, 1],
        "task_settings": {"phantom-chest": {"linear.epochs": 3}},
    },
    "champion": {"task": "phantom-chest", "metric": "auroc_mean"},
}
# One pretraining and two cells, on one process each.
SMALLER: dict[str, Any] = {
    **STUDY,
    "resources": {"pretrain_workers": 1, "cell_workers": 1},
    "data": {"phantom-chest": {"raw": "phantom:120"}},
    "pretrain": [SIMCLR],
    "cells": {**STUDY["cells"], "sources": ["random", "pretrain:simclr"], "seeds": [0]},
}


def write(folder: Path, tree: dict[str, Any], **changes: object) -> str:
    """The study as a file with results in `folder/out`; returns the file's path."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**tree, "out": str(folder / "out"), **changes}))
    return str(path)


def own(folder: Path) -> dict[str, Any]:
    """A study of data of one's own in `folder`, the caller's directory: 24 images with a table, the card of docs/datasets.md and the task
    of docs/tasks.md beside the study file. A secret is wanted for packing."""
    (folder / "raw" / "images").mkdir(parents=True)
    lines = ["image,patient,effusion"]
    for i in range(24):
        cv2.imwrite(str(folder / "raw" / "images" / f"{i}.png"), picture(i, 32))
        lines.append(f"{i}.png,p{i},{i % 2}")
    (folder / "raw" / "labels.csv").write_text("\n".join(lines))
    for page, file in (("datasets", "my-ward.yaml"), ("tasks", "effusion.yaml")):
        (folder / file).write_text((ROOT / "docs" / f"{page}.md").read_text().partition("```yaml\n")[2].partition("```")[0])
    return {
        "schema": 1,
        "study": "own",
        "resources": {"pretrain_workers": 1, "cell_workers": 1},
        "data": {"my-ward.yaml": {"raw": "raw"}},
        "pretrain": [{**SIMCLR, "data": {"my-ward": "train"}, "settings": {"global_batch": 8}}],
        "cells": {
            "sources": ["random", "pretrain:simclr"],
            "strategies": ["linear"],
            "tasks": ["effusion.yaml"],
            "resolutions": [32],
            "task_settings": {"effusion.yaml": {"linear.epochs": 2}},
        },
    }


def cells(study: Study, corpora: Mapping[str, Packed], weights: Mapping[str, Sequence[Weights]]) -> Iterator[CellConfig]:
    """Every cell of a study in which nothing is searched."""
    for setting in plan.settings(study, corpora, weights):
        for seed in setting.seeds:
            yield plan.cell(setting, seed)
