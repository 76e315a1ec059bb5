"""`allograft analyze efficiency`: which networks of a study are measured, and that they are those that were trained."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_study
import torch

from cluster.costs import efficiency
from cluster.load import load_study
from cluster.plan import Packed
from cluster.sources import read_weights
from encoders.build import build
from encoders.export import export
from encoders.truncate import truncate
from engine.context import LocalContext
from finetune import efficiency as measured
from finetune.run import run
from shards import manifest


def test_networks_of_truncated_and_slim_sources_are_their_own(
    tmp_path: Path, phantom_chest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.001)
    torch.set_num_threads(1)
    whole = build("test_resnet", 1, seed=0)
    encoders = {"whole": whole, "again": build("test_resnet", 1, seed=1), "short": truncate(whole, "layer2.0")}
    encoders["slim"] = build("test_resnet", 1, seed=0, widths=(8, 8, 8, 8))
    facts: dict[str, Any] = {"method": "made", "lineage": [], "data": [], "revision": "0", "image_size": 32}
    for name, encoder in encoders.items():
        export(encoder, tmp_path / name, name=name, **facts)
    tree = {**tiny_study.SMALLER, "data": {"phantom-chest": {"shards": phantom_chest}}, "pretrain": []}
    tree.pop("champion")
    cells = {**tree["cells"], "sources": [{"name": name, "source": str(tmp_path / name)} for name in encoders]}
    cells["task_settings"] = {"phantom-chest": {"linear.epochs": 1}}
    study = load_study(tiny_study.write(tmp_path, {**tree, "cells": cells}))
    weights = {name: [read_weights(str(tmp_path / name))] for name in encoders}
    params = {}
    for config in tiny_study.cells(study, {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}, weights):
        params[config.source] = run(config, LocalContext(dir=str(tmp_path / "work")))["params"]
    shutil.copy(tmp_path / "study.yaml", Path(study.out) / "study.yaml")
    efficiency([study.out], 1, str(tmp_path / "table"))
    rows = pd.read_csv(tmp_path / "table" / "efficiency.csv", keep_default_na=False)
    assert sorted(rows["params"]) == sorted({params["whole"], params["short"], params["slim"]})
    assert set(rows["whole_params"]) == {params["whole"]}
    assert dict(zip(rows["params"], rows["source_cut"], strict=True))[params["short"]] == "layer2.0"
    assert "source cut layer2.0" in " ".join(capsys.readouterr().out.split())
