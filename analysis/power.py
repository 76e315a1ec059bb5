"""What a study of a given size can find, before it is computed.

found = power("auroc_mean", patients=400, prevalence=[0.1], seeds=5, family=6, wanted=0.02)
found.detectable, found.seeds_needed, found.assumptions

The smallest true difference of two sources that `analysis.statistics.compare` declares in 80 % of repetitions, at 5 % after Holm's first
step. Patients: the variance of AUROC of Hanley and McNeil (Radiology 1982), of average precision Boyd's (ECML 2013), of Dice its spread
over images. Two cells make the same mistakes on a patient to a degree, so that their difference varies less. Seeds: their variance
is itself estimated from few of them, which costs more than it adds; the chance of declaring is therefore taken over what `compare`
would estimate, not at its expectation.
Legend: K draws of what is estimated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, special, stats

from analysis.components import Parts, critical
from analysis.replicates import DECIDED, Array
from base.seeds import rng

ALPHA, WANTED_POWER = 0.05, 0.8
DRAWS = 2000
MOST_SEEDS = 1000
UNKNOWN_PREVALENCE = 0.1


@dataclass(frozen=True)
class Spread:
    """What is assumed of a task. Pass your own where an earlier study of yours says otherwise.

    `level`: the metric. `tuning_sd`, `pretraining_sd`: of the metric over fine-tuning seeds of one checkpoint, and over pretraining seeds
    of one method. `same`, `other`: how far the chance of the patients moves two cells together, of one checkpoint and of two (correlation
    of their metrics over draws of patients). `labels`: the same between two labels of a cell. `patient_sd`: of Dice over images.
    """

    level: float = 0.8
    tuning_sd: float = 0.01
    pretraining_sd: float = 0.01
    same: float = 0.8
    other: float = 0.65
    labels: float = 0.02
    patient_sd: float = 0.1


# Of the NIH and Montgomery images of studies/real-mini.yaml, rounded to the side of more patients; Dice over images was 0.02 to 0.05 there,
# and lesions vary more than lungs.
AUROC = Spread()
MASKS = Spread(level=0.9, tuning_sd=0.005, pretraining_sd=0.005, same=0.95, other=0.75, patient_sd=0.1)


@dataclass(frozen=True)
class Power:
    """`detectable`: smallest true difference found in 80 % of studies, in units of the metric; inf where nothing can be declared.
    `seeds_needed`: for `wanted`: fine-tuning seeds, or pretraining seeds where there are several; None where no number is enough, or none
    was wanted. `floor`: what no number of seeds can find with these patients. `se`: of the difference."""

    detectable: float
    seeds_needed: int | None
    assumptions: str
    floor: float
    se: float


def auroc_variance(auroc: float, positives: float, negatives: float) -> float:
    """Variance of an AUROC from its size and the number of patients of both classes (Hanley and McNeil 1982, for normal scores).

    The chance that one of a class is on the right side of two of the other is that of two normals correlated by a half, Owen's T; the
    paper's own, of exponential scores, makes the variance a quarter larger where 3 of 10 are positive, and more where fewer are.
    """
    of_two = auroc - 2 * float(special.owens_t(special.ndtri(auroc), 1 / math.sqrt(3)))
    return (auroc * (1 - auroc) + (positives + negatives - 2) * (of_two - auroc**2)) / (positives * negatives)


def cell_variance(metric: str, patients: int, prevalence: Sequence[float] | None, spread: Spread) -> float:
    """Variance of one cell's metric over draws of patients; inf where no label has both classes.

    Raises ValueError for a metric that `compare` does not know.
    """
    level = spread.level
    if metric in ("dice", "iou"):
        return spread.patient_sd**2 / patients
    shares = [UNKNOWN_PREVALENCE] if prevalence is None else [p for p in prevalence if 0 < p < 1]
    if metric == "accuracy":
        return level * (1 - level) / patients
    if metric == "kappa_quadratic":
        return (1 - level**2) ** 2 / patients
    if metric not in ("auroc_mean", "auroc_within_mean", "auprc_mean", *DECIDED):
        raise ValueError(f"no power for the metric '{metric}'")
    if not shares:
        return math.inf
    counts = [max(1.0, p * patients) for p in shares]
    if metric == "balanced_accuracy":
        return sum(level * (1 - level) / count for count in counts) / len(counts) ** 2
    if metric == "auprc_mean":
        of_label = np.array([level * (1 - level) / count for count in counts])
    else:
        of_label = np.array([auroc_variance(level, count, max(1.0, patients - count)) for count in counts])
    apart, together = of_label.sum(), np.sqrt(of_label).sum() ** 2
    return float((1 - spread.labels) * apart + spread.labels * together) / len(counts) ** 2


@cache
def _uniform() -> Array:
    """(3, K): of the seeds' variances that compare estimates: two sides' pretraining seeds, fine-tuning seeds."""
    return rng("power").random((3, DRAWS))


def _detectable(of_cell: float, spread: Spread, patients: int, seeds: int, pretraining_seeds: int, alpha: float) -> tuple[float, float]:
    """(smallest difference, standard error of the difference)."""
    r, s = pretraining_seeds, seeds
    if r * s < 2 or not math.isfinite(of_cell):
        return math.inf, math.inf
    own, checkpoint = of_cell * (1 - spread.same), of_cell * (spread.same - spread.other)
    tuning = 2 * spread.tuning_sd**2 / (r * s)
    # What compare finds among seeds, each part with what they do on few patients only, and what is left for patients.
    if r > 1:
        of_side = (spread.pretraining_sd**2 + (spread.tuning_sd**2 + own) / s + checkpoint) / r
        among, of_patients = [(of_side, r - 1), (of_side, r - 1)], 0.0
        if s > 1:
            # Fine-tuning seeds have nothing in common over checkpoints here: what is found of them is the error of a difference around 0.
            rest = 2 * (spread.tuning_sd**2 + own) / (r * s)
            among.append((rest, s - 1))
    else:
        among, of_patients = [(tuning + 2 * own / s, s - 1)], 2 * checkpoint
    found_K = [whole * stats.chi2.ppf(u, df) / df for (whole, df), u in zip(among, _uniform(), strict=False)]
    if r > 1 and s > 1:
        found_K[2] = np.maximum(0, found_K[2] - among[2][0])
    seeds_K = np.sum(found_K, axis=0)
    squares_K = np.sum([found**2 / df for found, (_, df) in zip(found_K, among, strict=True)], axis=0)
    df_K = np.divide(seeds_K**2, squares_K, out=np.ones(DRAWS), where=squares_K > 0)
    half_K = _half_K(seeds_K, df_K, of_patients, patients, alpha / 2)
    se = math.sqrt(of_patients + sum(whole for whole, _ in among[:2]))
    return _found(half_K, se), se


def _half_K(seeds_K: Array, df_K: Array, of_patients: float, patients: int, tail: float) -> Array:
    """Half of the interval that compare would give, from what it would find of the seeds' variance."""
    return np.asarray(critical(seeds_K, df_K, of_patients, max(1, patients - 1), tail) * np.sqrt(seeds_K + of_patients))


def _found(half_K: Array, se: float) -> float:
    """The smallest difference whose interval leaves 0 out in 80 % of repetitions."""

    def short(difference: float) -> float:
        either_K = stats.norm.sf((half_K - difference) / se) + stats.norm.cdf((-half_K - difference) / se)
        return float(np.mean(either_K)) - WANTED_POWER

    return float(optimize.brentq(short, 0.0, se + 2 * float(half_K.max())))


def observed(parts: Parts, patients: int, alpha: float, equivalent: bool = False) -> float:
    """`detectable` of a study whose variances were seen; with `equivalent` the smallest margin that two one-sided tests at alpha keep a
    difference of nothing within in 80 % of repetitions."""
    seeds, of_patients = parts.seeds, parts.patients
    if seeds + of_patients == 0:
        return 0.0
    free = parts.seeds_df if seeds > 0 else 1.0  # of seeds that do not vary any will do
    seeds_K = seeds * stats.chi2.ppf(_uniform()[0], free) / free
    df_K = np.full(DRAWS, free)
    half_K = _half_K(seeds_K, df_K, of_patients, patients, alpha if equivalent else alpha / 2)
    if not equivalent:
        return _found(half_K, parts.se)

    def short(margin: float) -> float:
        return float(np.mean(np.maximum(0, 2 * stats.norm.cdf((margin - half_K) / parts.se) - 1))) - WANTED_POWER

    return float(optimize.brentq(short, 0.0, 4 * parts.se + 2 * float(half_K.max())))


def power(
    metric: str,
    *,
    patients: int,
    prevalence: Sequence[float] | None,
    seeds: int,
    pretraining_seeds: int = 1,
    family: int = 1,
    wanted: float | None = None,
    spread: Spread | None = None,
) -> Power:
    """Smallest detectable difference of two sources, and the seeds that a wanted one needs.

    Args:
        metric: one of those that `compare` knows.
        patients: of the test split. An image without a patient is one.
        prevalence: share of positive patients of every label; None where it is not known, and for masks.
        seeds: fine-tuning seeds of every checkpoint; paired over the two sources.
        pretraining_seeds: of both sources; 1 for a comparison of these weights.
        family: comparisons that Holm corrects for.
        spread: what is assumed; by default the values that `assumptions` names.
    """
    spread = spread or (MASKS if metric in ("dice", "iou") else AUROC)
    of_cell, alpha = cell_variance(metric, patients, prevalence, spread), ALPHA / max(1, family)
    least, se = _detectable(of_cell, spread, patients, seeds, pretraining_seeds, alpha)
    several = pretraining_seeds > 1

    def with_seeds(count: int) -> float:
        return _detectable(of_cell, spread, patients, *((seeds, count) if several else (count, 1)), alpha)[0]

    floor = with_seeds(MOST_SEEDS)
    needed = None
    if wanted is not None and floor <= wanted:
        low, high = 1, MOST_SEEDS  # low is not enough, high is
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if with_seeds(middle) <= wanted else (middle, high)
        needed = high
    return Power(least, needed, _words(metric, prevalence, seeds, pretraining_seeds, spread, of_cell), floor, se)


def _words(metric: str, prevalence: Sequence[float] | None, seeds: int, pretraining_seeds: int, spread: Spread, of_cell: float) -> str:
    if not math.isfinite(of_cell):
        return "no label has positive and negative patients: nothing can be found"
    masks = metric in ("dice", "iou")
    parts = [f"{spread.patient_sd:g} over images" if masks else f"at {spread.level:g}", f"{spread.tuning_sd:g} over fine-tuning seeds"]
    if pretraining_seeds > 1:
        parts.append(f"{spread.pretraining_sd:g} over pretraining seeds")
    parts.append(f"test patients move two checkpoints together by {spread.other:g}")
    if not masks and prevalence is None and metric not in ("accuracy", "kappa_quadratic"):
        parts.append(f"prevalence not known: {UNKNOWN_PREVALENCE:.0%}")
    if seeds * pretraining_seeds < 2:
        parts.append("one seed: nothing is declared")
    return "assumes " + ", ".join(parts)
