"""Metrics, exact and defined where others crash or mislead. Fractions, never percent; nan where a value is not defined.

    auroc(score_N, target_N)                      # nan when only one class is present
    auroc_within(score_N, target_N, stratum_N)    # pairs are compared inside a stratum only: a confounder that is the stratum gains nothing
    points = operating_points(score_N, target_N)  # thresholds, to be chosen on validation
    decided(target_N, score_N >= points["youden"], 2)["sensitivity"]
    dice_per_image(pred_NHW, true_NHW)            # N values; two empty masks agree: 1

Areas are computed here: of 500 samples in 0.06 ms, where scikit-learn takes 2.5 and 1.2 ms (roc_auc_score, average_precision_score), and
cells compute them by label, stratum and epoch; tests hold them against scikit-learn.
Legend: N samples, L labels, H W pixels. Targets are 0 and 1; unknown labels are left out by the caller.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _checked(score_N: ArrayLike, target_N: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    score = np.asarray(score_N, dtype=np.float64)
    target = np.asarray(target_N)
    if score.ndim != 1 or score.shape != target.shape:
        raise ValueError(f"expected two vectors of one length, got {score.shape} and {target.shape}")
    if not np.isin(target, (0, 1)).all():
        raise ValueError("targets must be 0 or 1")
    if np.isnan(score).any():
        raise ValueError("scores hold nan")
    return score, target.astype(bool)


def auroc(score_N: ArrayLike, target_N: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked right, ties counting a half (Mann and Whitney 1947).

    nan when there is no positive or no negative.
    """
    score, target = _checked(score_N, target_N)
    positives = int(target.sum())
    negatives = len(target) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mid-ranks, from 1
    u = rank[inverse][target].sum() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def auprc(score_N: ArrayLike, target_N: ArrayLike) -> float:
    """Average precision: the sum over thresholds of (recall gained) x (precision there), without interpolation.

    Equal scores are one threshold. nan when there is no positive or no negative.
    """
    score, target = _checked(score_N, target_N)
    positives = int(target.sum())
    if not positives or positives == len(target):
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(target[order])
    last = np.append(np.diff(score[order]) != 0, True)  # last sample of each group of equal scores
    hits, seen = hits[last], (np.arange(len(score)) + 1)[last]
    gained = np.diff(hits, prepend=0) / positives
    return float((gained * hits / seen).sum())


def auroc_within(score_N: ArrayLike, target_N: ArrayLike, stratum_N: Sequence[object]) -> float:
    """AUROC inside strata, averaged with weights positives x negatives: of all pairs within a stratum, the share ranked right.

    Strata of one class hold no pair and do not count, nor do samples whose stratum is not known (None); nan when none holds both.
    """
    score, target = _checked(score_N, target_N)
    if len(stratum_N) != len(score):
        raise ValueError(f"{len(score)} scores but {len(stratum_N)} strata")
    strata = np.asarray(["" if value is None else f"={value}" for value in stratum_N])
    right = pairs = 0.0
    for value in np.unique(strata[strata != ""]):
        inside = strata == value
        weight = float(target[inside].sum()) * float((~target[inside]).sum())
        if weight:
            right += weight * auroc(score[inside], target[inside])
            pairs += weight
    return right / pairs if pairs else float("nan")


def stratified(stratum_N: Iterable[object]) -> bool:
    """Whether "within strata" means anything: at least two strata are known. Within one it would be the plain AUROC by another name."""
    return len({str(value) for value in stratum_N if value is not None}) >= 2


def mean_defined(values: Iterable[float]) -> tuple[float, int]:
    """Mean over the values that are not nan, and how many those are: (nan, 0) when none is."""
    kept = [value for value in values if not np.isnan(value)]
    return (float(np.mean(kept)), len(kept)) if kept else (float("nan"), 0)


# -- decisions


def operating_points(score_N: ArrayLike, target_N: ArrayLike) -> dict[str, float]:
    """Thresholds, a score of at least which is a positive: `youden` (most sensitivity + specificity; Youden 1950), `spec95` (the most
    sensitivity at a specificity of 0.95 at least) and `sens95` (the most specificity at a sensitivity of 0.95 at least).

    Each is a score that occurs, or inf where only calling nothing positive will do; nan when there is no positive or no negative. Of
    several that are Youden's the first in float64, from the highest down: the same on every machine, and arbitrary where exact fractions
    tie and their float64 differences do not. Another rule would give stored cells other numbers.
    """
    from sklearn.metrics import roc_curve

    score, target = _checked(score_N, target_N)
    if not len(target) or target.all() or not target.any():
        return dict.fromkeys(("youden", "spec95", "sens95"), float("nan"))
    fall_out, sensitivity, threshold = roc_curve(target, score, drop_intermediate=False)
    # Both rise along the curve: the last point with enough specificity, the first with enough sensitivity.
    spec95 = int(np.flatnonzero(fall_out <= 0.05 + 1e-12)[-1])
    at = {"youden": int(np.argmax(sensitivity - fall_out)), "spec95": spec95, "sens95": int(np.argmax(sensitivity >= 0.95 - 1e-12))}
    return {name: float(threshold[place]) for name, place in at.items()}


def decided(true_N: ArrayLike, pred_N: ArrayLike, classes: int) -> dict[str, Floats]:
    """Metrics of decisions for classes 0..L-1.

    Returns:
        Of each class, L values: `sensitivity` (recall: of the samples that are of it, how many were called so), `precision` (of those that
        were called so, how many are), `f1`. Over all, one value: `accuracy`; `balanced_accuracy`, the mean sensitivity of the classes
        that occur, nan where that is one; `f1_macro`, the mean of the defined f1; `kappa` and, for grades, `kappa_quadratic` (Cohen 1960,
        1968), nan where truth and decisions are of one and the same class.
    """
    from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

    true, pred = np.asarray(true_N).astype(int), np.asarray(pred_N).astype(int)
    if not len(true):
        empty = {name: np.full(classes, np.nan) for name in ("precision", "sensitivity", "f1")}
        return empty | {name: np.array(np.nan) for name in ("accuracy", "balanced_accuracy", "f1_macro", "kappa", "kappa_quadratic")}
    labels = list(range(classes))
    right = float(np.mean(true == pred))
    # Each pair of truth and decision once, weighted by how often it occurs: scikit-learn sorts and checks samples many times over.
    counts = np.bincount(true * classes + pred, minlength=classes * classes)
    pairs = np.flatnonzero(counts)
    (true, pred), weight = np.divmod(pairs, classes), counts[pairs].astype(float)
    of = {"labels": labels, "sample_weight": weight}
    precision, sensitivity, f1, support = precision_recall_fscore_support(true, pred, **of, zero_division=np.nan)
    one = len(np.union1d(true, pred)) == 1
    several = int((support > 0).sum()) > 1
    return {
        "precision": precision,
        "sensitivity": sensitivity,
        "f1": f1,
        "accuracy": np.array(right),
        "balanced_accuracy": np.array(np.nanmean(sensitivity) if several else np.nan),
        "f1_macro": np.nanmean(f1),
        "kappa": np.array(np.nan if one else cohen_kappa_score(true, pred, **of)),
        "kappa_quadratic": np.array(np.nan if one else cohen_kappa_score(true, pred, **of, weights="quadratic")),
    }


ECE_BINS = 15


def ece(confidence_N: ArrayLike, right_N: ArrayLike) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599): the mean over samples of |mean confidence - share
    right| of their bin, in 15 bins of equal width over 0..1. nan without samples.

    Of one label, confidence is its score and right its target; of several classes, the highest score and whether that is the true class's.
    """
    confidence, right = _checked(confidence_N, right_N)
    if not len(right):
        return float("nan")
    if confidence.min() < 0 or confidence.max() > 1:
        raise ValueError("confidences must be probabilities")
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)  # [lower, upper), the last with 1
    gaps = np.bincount(bins, confidence - right, ECE_BINS)
    return float(np.abs(gaps).sum() / len(right))


# -- masks


def overlaps(pred_NHW: ArrayLike, true_NHW: ArrayLike) -> NDArray[np.int64]:
    """Pixels of each image that are in both masks, in the predicted and in the true one: N3."""
    pred, true = np.asarray(pred_NHW, dtype=bool), np.asarray(true_NHW, dtype=bool)
    if pred.shape != true.shape or pred.ndim < 2:
        raise ValueError(f"masks of one shape are needed, got {pred.shape} and {true.shape}")
    axes = tuple(range(1, pred.ndim))
    return np.stack([mask.sum(axis=axes, dtype=np.int64) for mask in (pred & true, pred, true)], axis=1)


def dice_of(overlap: ArrayLike, predicted: ArrayLike, true: ArrayLike) -> Floats:
    """Dice (1945) of counted pixels: 2 |A and B| / (|A| + |B|). Empty policy: both empty is 1, one empty is 0."""
    total = np.asarray(predicted, float) + np.asarray(true, float)
    return np.where(total == 0, 1.0, 2 * np.asarray(overlap, float) / np.maximum(total, 1))


def iou_of(overlap: ArrayLike, predicted: ArrayLike, true: ArrayLike) -> Floats:
    """Intersection over union (Jaccard) of counted pixels. Empty policy as `dice_of`."""
    union = np.asarray(predicted, float) + np.asarray(true, float) - np.asarray(overlap, float)
    return np.where(union == 0, 1.0, np.asarray(overlap, float) / np.maximum(union, 1))


def dice_per_image(pred_NHW: ArrayLike, true_NHW: ArrayLike) -> Floats:
    """`dice_of` each image."""
    return dice_of(*overlaps(pred_NHW, true_NHW).T)


def hd95(pred_HW: NDArray[np.bool_], true_HW: NDArray[np.bool_], spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """Hausdorff distance at 95 % of one image: the larger of the two 95th percentiles, over the border pixels of one mask, of the distance
    to the nearest border pixel of the other. In pixels, or in the unit of `spacing` (between rows, between columns).

    A border pixel is one with a neighbour, above, below, left or right, outside the mask or the image. Empty policy: both masks empty is
    0; one empty has no distance: nan, to be left out and counted.
    """
    from scipy.spatial import KDTree

    if pred_HW.shape != true_HW.shape or pred_HW.ndim != 2:
        raise ValueError(f"two masks of one shape are needed, got {pred_HW.shape} and {true_HW.shape}")
    a, b = (np.argwhere(_border(mask)) * np.asarray(spacing) for mask in (pred_HW, true_HW))
    if not len(a) or not len(b):
        return 0.0 if len(a) == len(b) else float("nan")
    return float(max(np.percentile(KDTree(one).query(other)[0], 95) for one, other in ((a, b), (b, a))))


def _border(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    around = np.pad(mask_HW, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return np.asarray(mask_HW & ~inner)
