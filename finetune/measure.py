"""Metric rows of a table of predictions: what a cell writes down, and what anybody can compute again from its predictions.parquet.

    rows = rows_of(task, pd.read_parquet("predictions.parquet"))     # [{"split", "class", "metric", "unit", "value", "n"}]
    headline(task, rows)

Rows of labels, one label against the rest (n: rows of the table whose label is known):
    auroc, auprc, prevalence (what auprc is of scores that say nothing); auroc_within, of those whose stratum is known, where there are two
    ece: multilabel
Rows of decisions, test split only, thresholds chosen on validation (metrics.operating_points):
    sensitivity_at_spec95, specificity_at_spec95, sensitivity_at_sens95, specificity_at_sens95
    multilabel, at Youden's threshold: threshold, sensitivity, specificity, precision, f1, accuracy, balanced_accuracy, kappa
    Of labels that exclude each other the decision is the most likely one, or the median grade, and needs no threshold: sensitivity,
    precision and f1 of each; accuracy, balanced_accuracy, f1_macro, kappa, kappa_quadratic (of labels in order), ece over all.
Rows over all labels (class ""): <metric>_mean over the labels that have a value, n how many those are; auroc_mean_min10 and
    auprc_mean_min10 over those of at least ten positives; of labels in order auroc_from_<label> of P(that one or a later one), all but the
    first.
Rows of masks (n: images): dice, iou, dice_nonempty (of images whose true mask is not empty), dice_tuned, threshold_tuned, hd95 and hd95_mm
    (n: images that have one), dice_pooled and iou_pooled (of all pixels at once), dice_resized, iou_resized.
Rows of strata, test split only, where at least two are known: the rows over all labels or masks, as `<metric>/<stratum>`.

A value that is not defined is None, and is in no mean.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import metrics
from finetune.task import Task

Row = dict[str, Any]
UNITS = {"hd95": "px", "hd95_mm": "mm"}  # of all others: fraction
FEW = 10  # positives; an area of fewer is mostly chance


def headline(task: Task, rows: list[Row]) -> float:
    """The value of the task's metric, of the first split that has a row; nan where it is not defined."""
    wanted = (row for row in rows if row["metric"] == task.metric and row["class"] == "")
    value = next((row["value"] for row in wanted), None)
    return float("nan") if value is None else float(value)


def rows_of(task: Task, table: pd.DataFrame) -> list[Row]:
    """Metric rows of each split in the table, in its order."""
    points = {}
    if task.kind != "segmentation" and {"val", "test"} <= set(table["split"]):  # validation alone, after each epoch, decides nothing
        val = table[table["split"] == "val"]
        points = {label: metrics.operating_points(*_known(val, label)[:2]) for label in task.measured}
    rows: list[Row] = []
    for split in table["split"].unique():
        part = table[table["split"] == split]
        test = split == "test"
        rows += [_row(split, *found) for found in _measured(task, part, points if test else {})]
        strata = sorted(map(str, part.loc[part["stratum"].notna(), "stratum"].unique())) if test else []
        for stratum in strata if len(strata) > 1 else []:
            inside = part[part["stratum"].notna() & (part["stratum"].astype(str) == stratum)].assign(stratum=None)
            over_all = [found for found in _measured(task, inside, points) if not found[0]]
            rows += [_row(split, "", f"{metric}/{stratum}", value, n) for _, metric, value, n in over_all]
    return rows


Found = tuple[str, str, float, int]  # class, metric, value, n
Points = dict[str, dict[str, float]]


def _row(split: str, name: str, metric: str, value: float, n: int) -> Row:
    value = float(value)
    shown = value if math.isfinite(value) else None
    return {"split": split, "class": name, "metric": metric, "unit": UNITS.get(metric.split("/")[0], "fraction"), "value": shown, "n": n}


def _measured(task: Task, part: pd.DataFrame, points: Points) -> list[Found]:
    if task.kind == "segmentation":
        return _masks(part)
    return _labels(task, part, points) + (_exclusive(task, part) if task.kind != "multilabel" else [])


def _known(part: pd.DataFrame, label: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.object_]]:
    """Score, target and stratum of the rows whose label is known."""
    part = part[part[f"target_{label}"].notna()]
    strata = part["stratum"].astype(object).where(part["stratum"].notna(), None).to_numpy()
    return part[f"score_{label}"].to_numpy(float), part[f"target_{label}"].to_numpy(float), strata


def _labels(task: Task, part: pd.DataFrame, points: Points) -> list[Found]:
    found: list[Found] = []
    positives: dict[str, int] = {}
    within = metrics.stratified(value for value in part["stratum"] if not pd.isna(value))
    for label in task.measured:
        score, target, strata = _known(part, label)
        n, positives[label] = len(target), int(target.sum())
        found.append((label, "auroc", metrics.auroc(score, target), n))
        found.append((label, "auprc", metrics.auprc(score, target), n))
        found.append((label, "prevalence", target.mean() if n else math.nan, n))
        if within:
            placed = int(sum(value is not None for value in strata))
            found.append((label, "auroc_within", metrics.auroc_within(score, target, list(strata)), placed))
        if task.kind == "multilabel":
            found.append((label, "ece", metrics.ece(score, target), n))
        if label in points:
            found += [(label, metric, value, n) for metric, value in _decided(score, target, points[label], task.kind == "multilabel")]
    for metric in dict.fromkeys(metric for _, metric, _, _ in found):
        values = {label: value for label, name, value, _ in found if name == metric}
        if metric != "threshold":
            found.append(("", f"{metric}_mean", *metrics.mean_defined(values.values())))
        if metric in ("auroc", "auprc"):
            enough = [value for label, value in values.items() if positives[label] >= FEW]
            found.append(("", f"{metric}_mean_min{FEW}", *metrics.mean_defined(enough)))
    return found


def _decided(score: NDArray[np.float64], target: NDArray[np.float64], at: dict[str, float], youden: bool) -> list[tuple[str, float]]:
    """Decisions at thresholds; nan where validation had none to give, or this split has one class only."""
    both = 0 < target.sum() < len(target)
    found: list[tuple[str, float]] = []
    for point, threshold in at.items():
        defined = both and not math.isnan(threshold)
        said = score >= threshold
        if point != "youden":
            found.append((f"sensitivity_at_{point}", said[target == 1].mean() if defined else math.nan))
            found.append((f"specificity_at_{point}", 1 - said[target == 0].mean() if defined else math.nan))
        elif youden:
            values = metrics.decided(target, said, 2) if defined else metrics.decided([], [], 2)
            found += [("threshold", threshold), ("specificity", values["sensitivity"][0])]
            found += [(name, values[name][1]) for name in ("sensitivity", "precision", "f1")]
            found += [(name, float(values[name])) for name in ("accuracy", "balanced_accuracy", "kappa")]
    return found


def _exclusive(task: Task, part: pd.DataFrame) -> list[Found]:
    """Of labels that exclude each other."""
    scores = part[[f"score_{label}" for label in task.labels]].to_numpy(float)
    true = part[[f"target_{label}" for label in task.labels]].to_numpy(float).argmax(1)
    n, classes = len(part), len(task.labels)
    said = metrics.decided(true, [task.labels.index(label) for label in part["decided"]], classes)
    found: list[Found] = []
    for metric in ("sensitivity", "precision", "f1"):
        found += [(label, metric, float(said[metric][task.labels.index(label)]), n) for label in task.measured]
    if task.kind == "ordinal":
        for k, grade in enumerate(task.labels[1:], 1):
            found.append(("", f"auroc_from_{grade}", metrics.auroc(scores[:, k:].sum(1), true >= k), n))
    over_all = ("accuracy", "balanced_accuracy", "f1_macro", "kappa", "kappa_quadratic")
    found += [("", metric, float(said[metric]), n) for metric in over_all]
    likeliest = scores.argmax(1)
    confidence = np.minimum(scores.max(1), 1.0)
    return [*found, ("", "ece", metrics.ece(confidence, likeliest == true), n)]


def _masks(part: pd.DataFrame) -> list[Found]:
    found: list[Found] = []
    for metric in ("dice", "iou", "dice_tuned", "threshold_tuned", "hd95", "hd95_mm", "dice_resized", "iou_resized"):
        if metric in part:
            mean, n = metrics.mean_defined(part[metric])
            if metric != "hd95_mm" or n:
                found.append(("", metric, mean, n))
    if "true_px" in part:
        full = part[part["true_px"] > 0]
        found.append(("", "dice_nonempty", *metrics.mean_defined(full["dice"])))
        counts = [float(part[name].sum()) for name in ("overlap_px", "predicted_px", "true_px")]
        found.append(("", "dice_pooled", float(metrics.dice_of(*counts)), len(part)))
        found.append(("", "iou_pooled", float(metrics.iou_of(*counts)), len(part)))
    return found
