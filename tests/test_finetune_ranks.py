"""Inception's auxiliary classifier in a cell that several processes train together."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_cell
import tiny_corpus

from engine.context import LocalContext
from finetune.cell import CellConfig
from finetune.run import run

SETTINGS = {
    "recipe.epochs": 1,
    "recipe.batch": 16,
    "recipe.lr": 1e-2,
    "recipe.optimizer": "sgd",
    "recipe.momentum": 0.0,
    "recipe.warmup": 0,
}
# The block that is read trains, what is before it rests: at 75 px, rounding grows a thousandfold through 90 layers of batch norm.
STRATEGY = {"name": "lwft", "cut": "Mixed_6d", "base_lr_div": 1.0}


def answers(config: CellConfig) -> pd.DataFrame:
    return pd.read_parquet(Path(config.out) / "predictions.parquet")


@pytest.mark.timeout(600)
def test_inceptions_auxiliary_classifier_trains_over_two_workers_as_over_one(tmp_path: Path) -> None:
    """Losses and answers are those of one worker; tests/test_finetune_train.py has what the classifier changes."""
    of: dict[str, Any] = {"dataset": "phantom-chest", "labels": tiny_cell.LABELS, "splits": ["train", "val", "test"]}
    shards = {"phantom-chest": tiny_corpus.write(tmp_path / "corpus", (16, 12, 12), size=80, suffix="png", channels=1, masks=False, **of)}

    def cell(name: str, workers: int = 1) -> CellConfig:
        return tiny_cell.config(
            shards, tmp_path / name, settings=SETTINGS, architecture="inception_v3", strategy=STRATEGY, resolution=75, workers=workers
        )

    one, two = cell("one"), cell("two", workers=2)
    run(one, LocalContext(dir=str(tmp_path)))
    assert "Traceback" not in tiny_cell.together([two], tmp_path, 2)
    alone, both = (json.loads((Path(config.out) / "metrics.jsonl").read_text()) for config in (one, two))
    assert both["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    assert both["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    pd.testing.assert_frame_equal(answers(one), answers(two), atol=1e-4, rtol=1e-4)
