"""What a network says about a split, as a table of predictions. All metrics are made of that table (finetune.measure), now or years later.

    val = predictions(task, arrays, logits)                   # a pandas frame, one row an image, or a study where the task aggregates
    test = predictions(task, arrays, logits, val)             # mask thresholds are validation's
    rows = measure(task, arrays, logits)                      # one split in an epoch: what needs neither validation nor original masks

Legend: N images, S studies, L labels, H W pixels.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import metrics
from base.errors import RequestError, WorkError
from finetune.data import Arrays, at_origin, original_masks, studies_of
from finetune.measure import Row, rows_of
from finetune.task import Aggregate, Task
from shards.raster import png

THRESHOLDS = np.round(np.arange(0.05, 1.0, 0.05), 2)  # of a mask, tried on validation


def probabilities(task: Task, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sigmoid; softmax over the labels of a multiclass task; differences of P(grade > k) over the grades of an ordinal one, L of L-1."""
    x = logits.astype(np.float64)
    if task.kind == "multiclass":
        e = np.exp(x - x.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))
    p = np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))
    if task.kind != "ordinal":
        return p
    ends = np.ones((len(p), 1)), np.zeros((len(p), 1))
    return np.asarray(-np.diff(np.concatenate([ends[0], p, ends[1]], axis=1), axis=1))


def predictions(task: Task, arrays: Arrays, logits: NDArray[np.float32], val: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row an image, or a study.

    Columns split, sample_id (the sample's key, or the study's name, then with `images`, its samples' keys), patient, stratum.
    Labels: target_ (nan: not known) and score_ per label; where they exclude each other decided, the most likely one or the median grade.
    Masks, against the original mask, to whose size the logits are brought: dice, iou, hd95 (px), hd95_mm where the spacing is known, all
    at probability 0.5; overlap_px, predicted_px, true_px, which pooled values are made of; threshold_tuned and dice_tuned, at the
    threshold of validation; dice_resized and iou_resized against the mask at the resolution, as most papers do; probability_png, 255 times
    the probability of every pixel at the resolution, rounded, u8 HW as PNG bytes: what any of these is made of at another threshold.

    Args:
        val: the table of validation; None: this is it.

    Raises:
        WorkError: logits that are not finite, or not of the images' size.
        RequestError: a study of several patients or, where labels exclude each other, of several labels.
    """
    _check(arrays, logits)
    frame: dict[str, Any] = {
        "split": [arrays.split] * len(arrays),
        "sample_id": list(arrays.ids),
        "patient": list(arrays.patients),
        "stratum": list(arrays.strata),
    }
    if task.kind == "segmentation":
        tuned = _tuned(arrays, logits) if val is None else float(val["threshold_tuned"].iloc[0])
        pixels = [np.rint(255 * probabilities(task, logits_HW)).astype(np.uint8) for logits_HW in logits]
        frame |= _resized(arrays, logits) | _original(arrays, logits, tuned)
        return pd.DataFrame(frame | {"probability_png": [png(pixels_HW) for pixels_HW in pixels]})
    frame |= _labels(task, probabilities(task, logits), arrays.target, arrays.known)
    table = pd.DataFrame(frame)
    if task.aggregate is not None:
        table = _studies(task, task.aggregate, arrays, table)
    return table if task.kind == "multilabel" else table.assign(decided=_decided(task, table))


def measure(task: Task, arrays: Arrays, logits: NDArray[np.float32]) -> list[Row]:
    """Rows of one split by itself, as an epoch needs them: masks at the resolution, no distances, no operating points."""
    _check(arrays, logits)
    if task.kind == "segmentation":
        who = {"split": [arrays.split] * len(arrays), "stratum": list(arrays.strata)}
        resized = _resized(arrays, logits)
        return rows_of(task, pd.DataFrame(who | {"dice": resized["dice_resized"], "iou": resized["iou_resized"]}))
    return rows_of(task, predictions(task, arrays, logits))


def _check(arrays: Arrays, logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise WorkError(f"the network's output is not finite on split {arrays.split}", hint="lower the learning rate")
    if arrays.target.ndim == 3 and logits.shape != arrays.target.shape:
        raise WorkError(f"masks of split {arrays.split} are {list(arrays.target.shape)}, the network's {list(logits.shape)}")


# -- labels and studies

HOW: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda p_NL: p_NL.mean(0),
    "max": lambda p_NL: p_NL.max(0),
    "noisy-or": lambda p_NL: 1 - (1 - p_NL).prod(0),
}


def _labels(task: Task, scores: NDArray[np.float64], target: NDArray[Any], known: NDArray[Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column, label in enumerate(task.labels):
        columns[f"target_{label}"] = np.where(known[:, column] > 0, target[:, column], np.nan)
        columns[f"score_{label}"] = scores[:, column]
    return columns


def _decided(task: Task, table: pd.DataFrame) -> list[str]:
    scores = table[[f"score_{label}" for label in task.labels]].to_numpy()
    # The median grade is how many of P(grade > k) are over a half.
    at = (scores.cumsum(1)[:, :-1] < 0.5).sum(1) if task.kind == "ordinal" else scores.argmax(1)
    return [task.labels[i] for i in at]


def _studies(task: Task, aggregate: Aggregate, arrays: Arrays, images: pd.DataFrame) -> pd.DataFrame:
    """Rows of studies in order of first appearance.

    A study's label is positive if one image's is, negative if all are known to be, else not known. Where labels exclude each other, scores
    are divided by their sum after `max` and `noisy-or`. An image without a value of `by` is a study of its own. The stratum is the one
    that all images share, or None.
    """
    made: list[dict[str, Any]] = []
    exclusive = task.kind != "multilabel"
    for study, positions in studies_of(arrays, aggregate.by).items():
        part = images.iloc[positions]
        where = f"task {task.task}: aggregate.by, study {study}"
        if part["patient"].nunique() > 1:
            raise RequestError(f"a study of {part['patient'].nunique()} patients", where=where, hint="by a column whose values are studies")
        strata = {arrays.strata[i] for i in positions}
        row = {
            "split": arrays.split,
            "sample_id": study,
            "patient": part["patient"].iloc[0],
            "stratum": strata.pop() if len(strata) == 1 else None,
            "images": " ".join(part["sample_id"]),
        }
        scores = part[[f"score_{label}" for label in task.labels]].to_numpy()
        score = HOW[aggregate.how](scores)
        if exclusive:
            score = score / score.sum()
        targets = part[[f"target_{label}" for label in task.labels]].to_numpy()
        target = np.where((targets == 1).any(0), 1.0, np.where(np.isnan(targets).any(0), np.nan, 0.0))
        if exclusive and target.sum() != 1:
            raise RequestError("images of one study have several labels, of which each has one", where=where)
        for column, label in enumerate(task.labels):
            row |= {f"target_{label}": target[column], f"score_{label}": score[column]}
        made.append(row)
    return pd.DataFrame(made)


# -- masks


def _masks(logits: NDArray[np.float32], target: NDArray[Any], threshold: float = 0.5) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Predicted and true masks; both False where nobody judged."""
    return (logits > np.log(threshold / (1 - threshold))) & (target <= 1), target == 1


def _resized(arrays: Arrays, logits: NDArray[np.float32]) -> dict[str, Any]:
    counts = metrics.overlaps(*_masks(logits, arrays.target)).T
    return {"dice_resized": metrics.dice_of(*counts), "iou_resized": metrics.iou_of(*counts)}


def _tuned(arrays: Arrays, logits: NDArray[np.float32]) -> float:
    """The threshold with the best mean Dice at the resolution; of several the one nearest to 0.5."""
    found = [float(metrics.dice_per_image(*_masks(logits, arrays.target, t)).mean()) for t in THRESHOLDS]
    return float(min(THRESHOLDS[np.isclose(found, max(found), rtol=0, atol=1e-12)], key=lambda t: abs(t - 0.5)))


def _original(arrays: Arrays, logits: NDArray[np.float32], tuned: float) -> dict[str, Any]:
    """Columns of comparisons with the masks as they were drawn, one image in memory at a time."""
    assert arrays.origin is not None
    columns: dict[str, list[float]] = {}
    for position, (true, logits_HW) in enumerate(zip(original_masks(arrays), logits, strict=True)):
        large = at_origin(logits_HW, (true.shape[0], true.shape[1]), arrays.origin.pad)
        pred, inside = _masks(large, true)
        overlap, predicted, positive = metrics.overlaps(pred[None], inside[None])[0]
        spacing = _spacing(arrays, position, (true.shape[0], true.shape[1]))
        row = {
            "dice": float(metrics.dice_of(overlap, predicted, positive)),
            "iou": float(metrics.iou_of(overlap, predicted, positive)),
            "hd95": metrics.hd95(pred, inside),
            "hd95_mm": float("nan") if spacing is None else metrics.hd95(pred, inside, spacing),
            "overlap_px": int(overlap),
            "predicted_px": int(predicted),
            "true_px": int(positive),
            "dice_tuned": float(metrics.dice_per_image(*(mask[None] for mask in _masks(large, true, tuned)))[0]),
            "threshold_tuned": tuned,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _spacing(arrays: Arrays, position: int, shape: tuple[int, int]) -> tuple[float, float] | None:
    """Millimetres between rows and between columns of the mask of that shape, where the shards say them of its image."""
    assert arrays.origin is not None
    corpus, i = arrays.origin.corpus, int(arrays.origin.at[position])
    side = corpus.stored(i, image=False, seg=False)[1]["json"]
    found = json.loads(bytes(side)).get("image", {}).get("spacing_mm")
    if found is None:
        return None
    height, width = corpus.read(i, seg=False, text=False).image.shape[:2]
    return found[-2] * height / shape[0], found[-1] * width / shape[1]


SHOWN = 8  # images of a split kept with their predicted masks


def shown(arrays: Arrays, logits: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A few images with their masks for the report, the same for every cell of a task.

    Returns:
        ids K, image K H W [3] u8, true and pred K H W u8, dice K, at the resolution.
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
