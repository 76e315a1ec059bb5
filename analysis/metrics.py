"""Metrics, exact and defined where others crash or mislead. Fractions, never percent.

    auroc(score_N, target_N)                      # nan when only one class is present
    auroc_within(score_N, target_N, stratum_N)    # pairs are compared inside a stratum only: a confounder that is the stratum gains nothing
    dice_per_image(pred_NHW, true_NHW)            # N values; two empty masks agree: 1

Legend: N samples, H W pixels. Targets are 0 and 1; unknown labels are left out by the caller.
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


def dice_per_image(pred_NHW: ArrayLike, true_NHW: ArrayLike) -> Floats:
    """Dice (1945) of each image: 2 |A and B| / (|A| + |B|). Empty policy: both empty is 1, one empty is 0."""
    pred, true = np.asarray(pred_NHW, dtype=bool), np.asarray(true_NHW, dtype=bool)
    if pred.shape != true.shape or pred.ndim < 2:
        raise ValueError(f"masks of one shape are needed, got {pred.shape} and {true.shape}")
    axes = tuple(range(1, pred.ndim))
    both = (pred & true).sum(axis=axes, dtype=np.float64)
    total = pred.sum(axis=axes, dtype=np.float64) + true.sum(axis=axes, dtype=np.float64)
    return np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1))
