"""What a network says about a split, as metric rows and as the table of predictions.

    rows = measure(task, arrays, logits)          # [{"split", "class", "metric", "unit", "value", "n"}]
    table = predictions(task, arrays, logits)     # a pandas frame, one row an image

Legend: N images, L labels, H W pixels.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import metrics
from finetune.data import Arrays
from finetune.task import Task

Row = dict[str, Any]


def probabilities(task: Task, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sigmoid, or softmax over the labels of a multiclass task."""
    x = logits.astype(np.float64)
    if task.kind != "multiclass":
        return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _row(split: str, name: str, metric: str, value: float, n: int) -> Row:
    return {"split": split, "class": name, "metric": metric, "unit": "fraction", "value": None if math.isnan(value) else value, "n": n}


def measure(task: Task, arrays: Arrays, logits: NDArray[np.float32]) -> list[Row]:
    """Metric rows of one split.

    Labels: `auroc`, `auprc` (and `auroc_within` where at least two strata are known) per label, n = images whose label is known (and whose
    stratum is); the value is None where only one class is present. `<metric>_mean` over the labels that have a value, n = how many those
    are.
    Masks: `dice`, the mean over images, n = images.
    """
    split = arrays.split
    if task.kind == "segmentation":
        dice = metrics.dice_per_image(*_masks(logits, arrays.target))
        return [_row(split, "", "dice", float(dice.mean()), len(dice))]
    scores = probabilities(task, logits)
    rows: list[Row] = []
    kinds = ["auroc", "auprc"] + ["auroc_within"] * metrics.stratified(arrays.strata)
    placed = np.array([value is not None for value in arrays.strata])
    for kind in kinds:
        values: list[float] = []
        for column, label in enumerate(task.labels):
            known = (arrays.known[:, column] > 0) & (placed | (kind != "auroc_within"))
            score, target = scores[known, column], arrays.target[known, column]
            if kind == "auroc_within":
                value = metrics.auroc_within(score, target, [stratum for stratum, kept in zip(arrays.strata, known, strict=True) if kept])
            else:
                value = getattr(metrics, kind)(score, target)
            values.append(value)
            rows.append(_row(split, label, kind, value, int(known.sum())))
        mean, count = metrics.mean_defined(values)
        rows.append(_row(split, "", f"{kind}_mean", mean, count))
    return rows


def _masks(logits: NDArray[np.float32], target: NDArray[np.float32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Predicted and true masks; both False where nobody judged."""
    return (logits > 0) & (target <= 1), target == 1  # logit 0 is probability 0.5


def headline(task: Task, rows: list[Row]) -> float:
    """The value of the task's metric; nan where it is not defined."""
    value = next((row["value"] for row in rows if row["metric"] == task.metric and row["class"] == ""), None)
    return float("nan") if value is None else float(value)


def predictions(task: Task, arrays: Arrays, logits: NDArray[np.float32]) -> pd.DataFrame:
    """Columns split, sample_id (the sample's key), patient, stratum, then target_ and score_ per label, or dice."""
    frame: dict[str, Any] = {
        "split": [arrays.split] * len(arrays),
        "sample_id": list(arrays.ids),
        "patient": list(arrays.patients),
        "stratum": list(arrays.strata),
    }
    if task.kind == "segmentation":
        frame["dice"] = metrics.dice_per_image(*_masks(logits, arrays.target))
    else:
        scores = probabilities(task, logits)
        for column, label in enumerate(task.labels):
            known = arrays.known[:, column] > 0
            frame[f"target_{label}"] = np.where(known, arrays.target[:, column], np.nan)
            frame[f"score_{label}"] = scores[:, column]
    return pd.DataFrame(frame)


SHOWN = 8  # images of a split kept with their predicted masks


def shown(arrays: Arrays, logits: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A few images with their masks for the report, the same for every cell of a task.

    Returns:
        ids K, image K H W [3] u8, true and pred K H W u8, dice K.
    """
    at = np.unique(np.linspace(0, len(arrays) - 1, SHOWN).round().astype(int))
    image = arrays.image[at].transpose(0, 2, 3, 1)
    pred, true = _masks(logits[at], arrays.target[at])
    return {
        "ids": np.array([arrays.ids[i] for i in at]),
        "image": image[..., 0] if image.shape[-1] == 1 else image,
        "true": true.astype(np.uint8),
        "pred": pred.astype(np.uint8),
        "dice": metrics.dice_per_image(pred, true),
    }
