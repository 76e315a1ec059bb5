"""What cells predicted for the test images, and their metrics over bootstrap draws of patients.

bootstrap = Bootstrap(); point, *replicates = bootstrap(scores, "auroc_mean"); bootstrap.draw(scores, "auroc_mean").redrawn

Patients are drawn, not images, and the same draw serves every cell of a task, so that differences between cells are paired. A replicate
in which a label has lost a class is drawn again, and counted.
Legend: B replicates, C the test set itself and then the replicates, N images, L labels, P positives, T thresholds.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.seeds import rng

Array = NDArray[np.float64]
Weights = NDArray[np.float32] | NDArray[np.float64]
REPLICATES = 2000
CHUNK = 8_000_000  # weights held at a time as floats: 32 MB, or 64
DRAWS = 4  # kept: 2000 of 25,000 images are 100 MB
EXACT = 4096  # images, of which at most half squared, and halves of that, are pairs: whole numbers that 24 bits hold


def _digest(*arrays: NDArray[Any] | None) -> str:
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(b"-" if array is None else f"{array.shape} {array.dtype.str} ".encode() + array.tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Scores:
    """What one cell predicted for the test images.

    Either `target_NL` (0, 1, NaN unknown) with `score_NL`, and where labels exclude each other `true_N` and `decided_N` (their numbers);
    or `dice_N` and `iou_N`. `patient_N`, `stratum_N`: any labels, a stratum that is not known is None; `ids_N`: which images.
    """

    seed: int
    ids_N: NDArray[np.str_]
    patient_N: NDArray[np.object_]
    target_NL: Array | None = None
    score_NL: Array | None = None
    dice_N: Array | None = None
    stratum_N: NDArray[np.object_] | None = None
    source_seed: int = 0
    iou_N: Array | None = None
    true_N: NDArray[np.int64] | None = None
    decided_N: NDArray[np.int64] | None = None

    @cached_property
    def clusters_N(self) -> NDArray[np.int64]:
        """Patients as numbers 0..P-1, in the order of their first image: other names for them change nothing."""
        _, first, at = np.unique(self.patient_N.astype(str), return_index=True, return_inverse=True)
        return np.asarray(np.argsort(np.argsort(first))[at], np.int64)

    @cached_property
    def drawn_by(self) -> str:
        """What decides which patients are drawn: images, patients and targets."""
        return _digest(self.ids_N, self.clusters_N, self.target_NL)

    @cached_property
    def digest(self) -> str:
        """What decides the values of a metric and their replicates: `drawn_by` and what was predicted."""
        known, strata = (None, None) if (s := self.stratum_N) is None else (np.array([value is not None for value in s]), s.astype(str))
        return self.drawn_by + _digest(self.score_NL, self.dice_N, self.iou_N, self.true_N, self.decided_N, known, strata)

    def again(self, **predicted: Any) -> "Scores":
        """Another cell's predictions for the very same images: what follows from these is not worked out again."""
        other = replace(self, **predicted)
        other.__dict__.update({name: getattr(self, name) for name in ("clusters_N", "drawn_by", "strata")})
        return other

    @cached_property
    def strata(self) -> list[NDArray[np.int64]]:
        """Positions of the images of each known stratum; one stratum of all where there are none."""
        if self.stratum_N is None:
            return [np.arange(len(self.ids_N))]
        known, names = np.array([value is not None for value in self.stratum_N]), self.stratum_N.astype(str)
        return [np.flatnonzero(known & (names == name)) for name in np.unique(names[known])]


class Rows:
    """Weights as AUROC takes them: of each image its row of replicates, and sums of rows, each made once for all cells of a task."""

    def __init__(self, weight_BN: NDArray[np.uint16] | Array) -> None:
        # Whole numbers, in the shortest floats that hold every sum of wins exactly.
        row_NB: Weights = np.ascontiguousarray(weight_BN.T, np.float32)
        if row_NB.sum(axis=0).max(initial=0) > EXACT:
            row_NB = np.ascontiguousarray(weight_BN.T, np.float64)
        self.of_image = list(row_NB)
        self._sums: dict[bytes, Array] = {}

    def sum_B(self, at: NDArray[np.int64]) -> Array:
        """Over the images `at`."""
        key = at.tobytes()
        if key not in self._sums:
            self._sums[key] = np.sum([self.of_image[place] for place in at], axis=0, dtype=float)
        return self._sums[key]


@dataclass(frozen=True)
class Resample:
    """How often an image counts in the test set itself, once, and in every replicate (those of an image lie together in memory); how many
    replicates were redrawn because a label lost a class."""

    weight_CN: NDArray[np.uint16]
    redrawn: int
    patients: int

    @property
    def weight_BN(self) -> NDArray[np.uint16]:
        return self.weight_CN[1:]

    @cached_property
    def rows(self) -> Rows | None:
        """`weight_CN` as AUROC takes it, where that is one chunk."""
        return Rows(self.weight_CN) if self.weight_CN.size <= CHUNK else None


def _auroc_B(rows: Rows, score_N: Array, positive_N: NDArray[np.bool_], at: NDArray[np.int64]) -> tuple[Array, Array]:
    """(wins over positive-negative pairs, ties half; pairs) of every replicate, over the images `at`.

    From the lowest score up, every positive wins against the negatives that were passed: sums of whole rows of replicates.
    """
    row_of = rows.of_image
    below_B, wins_B, won_B = (np.zeros_like(row_of[0]) for _ in range(3))
    order = np.argsort(score_N, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score_N[order]) != 0, True)) + 1
    place, positive, start = at[order].tolist(), positive_N[order].tolist(), 0
    for end in ends.tolist():
        if end - start > 1:  # equal scores: half of the negatives among them are won
            level = range(start, end)
            lost_B = sum((row_of[place[i]] for i in level if not positive[i]), start=np.zeros_like(below_B))
            held_B = sum((row_of[place[i]] for i in level if positive[i]), start=np.zeros_like(below_B))
            wins_B += held_B * (below_B + 0.5 * lost_B)
            below_B += lost_B
        elif positive[start]:
            np.multiply(row_of[place[start]], below_B, out=won_B)
            wins_B += won_B
        else:
            below_B += row_of[place[start]]
        start = end
    return wins_B.astype(float), rows.sum_B(at[positive_N]) * below_B


def _labels(scores: Scores, strata: list[NDArray[np.int64]]) -> list[list[tuple[NDArray[np.int64], NDArray[np.bool_]]]]:
    """For each label that has both classes in some stratum: (positions, positive?) by stratum that has both."""
    assert scores.target_NL is not None
    kept = []
    for label in range(scores.target_NL.shape[1]):
        parts = []
        for at in strata:
            known = at[np.isfinite(scores.target_NL[at, label])]
            positive = scores.target_NL[known, label] > 0.5
            if positive.any() and not positive.all():
                parts.append((known, positive))
        kept.append(parts)
    return kept


def _strata(scores: Scores, metric: str) -> list[NDArray[np.int64]]:
    return scores.strata if "within" in metric else [np.arange(len(scores.ids_N))]


def _auprc_B(weight_BN: Array, score_N: Array, positive_N: NDArray[np.bool_]) -> Array:
    """Weighted average precision of every replicate; equal scores are one threshold."""
    order = np.argsort(-score_N, kind="stable")
    last = np.append(np.diff(score_N[order]) != 0, True)
    weight_BN, positive_N = weight_BN[:, order], positive_N[order]
    hits_BT, seen_BT = np.cumsum(weight_BN * positive_N, axis=1)[:, last], np.cumsum(weight_BN, axis=1)[:, last]
    gained_BT = np.diff(hits_BT, prepend=0, axis=1)
    return np.asarray((gained_BT * hits_BT / np.maximum(seen_BT, 1)).sum(axis=1) / hits_BT[:, -1])


def _decided_B(scores: Scores, metric: str, weight_BN: Array) -> Array:
    """Accuracy, balanced accuracy or quadratic kappa of every replicate, from its weighted confusion matrix; NaN where not defined."""
    assert scores.true_N is not None
    assert scores.decided_N is not None
    count = 1 + int(max(scores.true_N.max(), scores.decided_N.max()))
    one_hot = np.eye(count * count)[scores.true_N * count + scores.decided_N]
    matrix_BLL = (weight_BN @ one_hot).reshape(-1, count, count)
    true_BL, said_BL, total_B = matrix_BLL.sum(2), matrix_BLL.sum(1), matrix_BLL.sum((1, 2))
    right_BL = np.diagonal(matrix_BLL, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "accuracy":
            return np.asarray(right_BL.sum(1) / total_B)
        if metric == "balanced_accuracy":
            there_BL = true_BL > 0
            recall_BL = np.divide(right_BL, true_BL, out=np.zeros_like(true_BL), where=there_BL)
            return np.where(there_BL.sum(1) > 1, recall_BL.sum(1) / there_BL.sum(1), math.nan)
        apart_LL = np.square(np.subtract.outer(np.arange(count), np.arange(count)))
        chance_B = (apart_LL * true_BL[:, :, None] * said_BL[:, None, :]).sum((1, 2)) / total_B
        return np.asarray(1 - (apart_LL * matrix_BLL).sum((1, 2)) / chance_B)


DECIDED = ("accuracy", "balanced_accuracy", "kappa_quadratic")


def metric_B(scores: Scores, metric: str, weight_BN: NDArray[np.uint16] | Array, rows: Rows | None = None) -> Array:
    """The metric for every row of weights: of masks `dice` or `iou`, of decisions one of DECIDED, of scores `auroc_mean`,
    `auroc_within_mean` or `auprc_mean` (means over labels that have both classes).

    Within strata: a label's AUROC is the mean over strata weighted by positives x negatives.

    rows: the weights as `Resample.rows` has them.
    """
    if metric in ("dice", "iou"):
        of_image_N = scores.dice_N if metric == "dice" else scores.iou_N
        assert of_image_N is not None
        known = np.isfinite(of_image_N)
        weight = weight_BN[:, known].astype(float)
        return weight @ of_image_N[known] / weight.sum(axis=1)
    if metric in DECIDED:
        return _decided_B(scores, metric, weight_BN.astype(float))
    if metric not in ("auroc_mean", "auroc_within_mean", "auprc_mean"):
        raise ValueError(f"no bootstrap for the metric '{metric}'")
    assert scores.score_NL is not None
    labels = [(label, parts) for label, parts in enumerate(_labels(scores, _strata(scores, metric))) if parts]
    total_B = np.full(len(weight_BN), 0.0 if labels else math.nan)
    step = max(1, CHUNK // max(1, len(scores.ids_N)))
    for start in range(0, len(weight_BN), step):
        chunk = slice(start, start + step)
        if metric == "auprc_mean":
            for label, ((at, positive),) in labels:
                total_B[chunk] += _auprc_B(weight_BN[chunk, at].astype(float), scores.score_NL[at, label], positive)
            continue
        held = rows or Rows(weight_BN[chunk])
        for label, parts in labels:
            sums = [_auroc_B(held, scores.score_NL[at, label], positive, at) for at, positive in parts]
            with np.errstate(invalid="ignore"):
                total_B[chunk] += sum(wins for wins, _ in sums) / sum(pairs for _, pairs in sums)
    return total_B / max(1, len(labels))


def resample(scores: Scores, metric: str, replicates: int = REPLICATES, seed: int = 0) -> Resample:
    """Draw patients with replacement; a replicate in which a label has lost a class is drawn again, and counted.

    Depends on patients, targets and strata only, so that all cells of a task and dataset share it and differences are paired.
    """
    generator = rng("bootstrap", seed)
    clusters = scores.clusters_N
    patients = int(clusters.max()) + 1
    labels = [parts for parts in _labels(scores, _strata(scores, metric)) if parts] if scores.target_NL is not None else []
    kept = [np.ones((1, len(clusters)), np.uint16)]
    have = redrawn = 0
    while have < replicates:
        wanted = replicates - have
        counts = generator.multinomial(patients, np.full(patients, 1 / patients), size=wanted).astype(np.uint16)
        weight = counts[:, clusters]
        good = np.ones(wanted, bool)
        for parts in labels:
            whole = np.zeros(wanted, bool)
            for at, positive in parts:
                whole |= weight[:, at[positive]].any(axis=1) & weight[:, at[~positive]].any(axis=1)
            good &= whole
        redrawn += int((~good).sum())
        kept.append(weight[good])
        have += int(good.sum())
        if redrawn > 500 * replicates:
            break  # practically every draw loses a class; what there is may be too little to compare by
    return Resample(np.asfortranarray(np.concatenate(kept)), redrawn, patients)


def same_images(scores: Sequence[Scores]) -> bool:
    """Whether all cells tested the same images of the same patients with the same targets."""
    return len({held.drawn_by for held in scores}) == 1


class Bootstrap:
    """Replicates of cells, each computed once and shared by all comparisons of it; of draws, which are larger, the last few are kept."""

    def __init__(self, replicates: int = REPLICATES, seed: int = 0) -> None:
        self.replicates, self.seed = replicates, seed
        self._draws: dict[tuple[str, str], Resample] = {}
        self._values: dict[tuple[str, str], Array] = {}

    def draw(self, scores: Scores, metric: str) -> Resample:
        key = (metric, scores.drawn_by)
        if key not in self._draws:
            if len(self._draws) >= DRAWS:
                del self._draws[next(iter(self._draws))]
            self._draws[key] = resample(scores, metric, self.replicates, self.seed)
        return self._draws[key]

    def __call__(self, scores: Scores, metric: str) -> Array:
        """The metric itself, then its replicates: C."""
        key = (scores.digest, metric)  # not the scores themselves: a study of 10,000 cells has more of them than memory
        if key not in self._values:
            drawn = self.draw(scores, metric)
            self._values[key] = metric_B(scores, metric, drawn.weight_CN, drawn.rows if "auroc" in metric else None)
        return self._values[key]

    def forget(self) -> None:
        """Let go of the replicates, which are many; not of the draws, which the next cells of a task share."""
        self._values.clear()
