"""Tests that readers of earlier studies expect: printed beside the primary analysis, which counts what each leaves out; never declared.

secondary(a, b, "auroc_mean", family=6)      {"t_paired": 3.1, "p_paired": 0.02, ..., "p_wilcoxon": "refused: ..."}

Tests over seeds take the test patients as given, DeLong takes the trained networks as given; none speaks of the next study. A test that
cannot be made stands as the word "refused" with its reason. With several pretraining seeds the units are these.
Legend: K cells, L labels, M positives, N images, P patients, S seeds.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from analysis.replicates import Array, Scores, metric_B, same_images

ALPHA = 0.05
# Of the benchmark's figures (Hosseinzadeh Taher et al. 2021): "n.s." above all of them.
STARS = ((1e-4, ">***"), (1e-3, "***"), (1e-2, "**"), (5e-2, "*"))


def stars(p: float) -> str:
    """The benchmark's mark of an uncorrected p value."""
    return next((mark for limit, mark in STARS if p < limit), "n.s.")


def placements(score_KN: Array, positive_N: NDArray[np.bool_]) -> tuple[Array, Array]:
    """(K,) AUROC and (K, N) share of the other class that every image is on the right side of, ties half (DeLong's components).

    By midranks, in O(N log N): Sun and Xu, IEEE Signal Processing Letters 2014.
    """
    of_all_KN = stats.rankdata(score_KN, axis=1)
    place_KN = np.empty_like(of_all_KN)
    for mine, others in ((positive_N, ~positive_N), (~positive_N, positive_N)):
        below_KM = of_all_KN[:, mine] - stats.rankdata(score_KN[:, mine], axis=1)  # of the other class, ties half
        place_KN[:, mine] = below_KM / others.sum()
    place_KN[:, ~positive_N] = 1 - place_KN[:, ~positive_N]
    return place_KN[:, positive_N].mean(axis=1), place_KN


def influence(score_KN: Array, positive_N: NDArray[np.bool_]) -> tuple[Array, Array]:
    """(K,) AUROC and (K, N) what every image moves it by; the sum of their products over images is DeLong's covariance."""
    auroc_K, place_KN = placements(score_KN, positive_N)
    moved_KN = place_KN - auroc_K[:, None]
    for mine in (positive_N, ~positive_N):
        count = int(mine.sum())
        moved_KN[:, mine] /= math.sqrt(count * max(1, count - 1))
    return auroc_K, moved_KN


def delong_difference(a: Sequence[Scores], b: Sequence[Scores]) -> tuple[float, float]:
    """(difference of the sides' mean AUROC, its standard error from patients alone).

    Mean over cells and over labels that have both classes. What the images of one patient move is added before it is squared (Obuchowski,
    Biometrics 1997); of one label with one image a patient it is DeLong's. Raises ValueError where no label has both classes.
    """
    target_NL, cells = a[0].target_NL, [*a, *b]
    assert target_NL is not None
    score_KNL = np.stack([cell.score_NL for cell in cells if cell.score_NL is not None])
    sign_K = np.array([1 / len(a)] * len(a) + [-1 / len(b)] * len(b))
    moved_N, differences = np.zeros(len(target_NL)), []
    for label in range(target_NL.shape[1]):
        known_N = np.isfinite(target_NL[:, label])
        positive = target_NL[known_N, label] > 0.5
        if positive.any() and not positive.all():
            auroc_K, moved_KN = influence(score_KNL[:, known_N, label], positive)
            differences.append(sign_K @ auroc_K)
            moved_N[known_N] += sign_K @ moved_KN
    if not differences:
        raise ValueError("no label has both classes")
    moved_P = np.bincount(a[0].clusters_N, moved_N / len(differences))
    return float(np.mean(differences)), float(np.sqrt(moved_P @ moved_P))


def hedges(a_S: Array, b_S: Array) -> tuple[float, float]:
    """(Cohen's d with the pooled standard deviation, Hedges' g: without its bias of few seeds)."""
    df = len(a_S) + len(b_S) - 2
    pooled = ((len(a_S) - 1) * a_S.var(ddof=1) + (len(b_S) - 1) * b_S.var(ddof=1)) / df
    d = float((a_S.mean() - b_S.mean()) / math.sqrt(pooled))
    return d, d * math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def unpaired(a_S: Array, b_S: Array) -> dict[str, float | str]:
    """Welch's and Student's test, effect sizes, and the benchmark's stars of Student's; "refused: " and why without them."""
    if min(len(a_S), len(b_S)) < 2:
        return dict.fromkeys(("p_welch", "p_student"), "refused: one seed")
    if np.ptp(a_S) == 0 and np.ptp(b_S) == 0:
        return dict.fromkeys(("p_welch", "p_student"), "refused: no spread between seeds")
    # In closed form, as scipy.stats.ttest_ind gives them in a hundred times as long: the papers' tables of a large study hold thousands.
    counts, variances = np.array([len(a_S), len(b_S)]), np.array([a_S.var(ddof=1), b_S.var(ddof=1)])
    of_means, df = variances / counts, float(counts.sum() - 2)
    pooled = float((counts - 1) @ variances) / df * float((1 / counts).sum())
    welch_df = float(of_means.sum() ** 2 / (of_means**2 / (counts - 1)).sum())
    found: dict[str, float | str] = {}
    for name, variance, free in (("welch", float(of_means.sum()), welch_df), ("student", pooled, df)):
        t = float(a_S.mean() - b_S.mean()) / math.sqrt(variance)
        found |= {f"t_{name}": t, f"p_{name}": float(2 * special.stdtr(free, -abs(t)))}
    found["cohen_d"], found["hedges_g"] = hedges(a_S, b_S)
    return {**found, "stars": stars(float(found["p_student"]))}


def units(values: Mapping[tuple[int, int], float]) -> tuple[dict[int, float], bool]:
    """Of values by (pretraining seed, fine-tuning seed): by fine-tuning seed, or their mean by pretraining seed where fine-tuning seeds
    come again (then True)."""
    several = len({seed for _, seed in values}) < len(values)
    groups: dict[int, list[float]] = {}
    for (source, seed), value in values.items():
        groups.setdefault(source if several else seed, []).append(value)
    return {unit: fmean(held) for unit, held in groups.items()}, several


def _units(cells: Sequence[Scores], metric: str) -> tuple[dict[int, float], bool]:
    return units({(cell.source_seed, cell.seed): float(metric_B(cell, metric, np.ones((1, len(cell.ids_N))))[0]) for cell in cells})


def _wilcoxon(d_S: Array, family: int) -> float | str:
    moved = int((d_S != 0).sum())
    if not moved:
        return "refused: no seed differs"
    least, limit = 2.0 ** (1 - moved), ALPHA / family
    if least > limit:
        return f"refused: with {moved} seeds that differ its smallest p is {least:.2g}, above {limit:.2g}, Holm's first of {family}"
    return float(stats.wilcoxon(d_S).pvalue)


def secondary(a: Sequence[Scores], b: Sequence[Scores], metric: str, *, family: int = 1) -> dict[str, float | str]:
    """Secondary tests of A against B: each key a number, or "refused: " and why.

    Args:
        family: comparisons that Holm corrects for: a test that could never pass its first step is not made.
    """
    names = ["p_paired", "p_welch", "p_student", "p_wilcoxon", "p_delong"]
    if not a or not b:
        return dict.fromkeys(names, "refused: one of the two has no finished cell")
    (by_a, several_a), (by_b, several_b) = _units(a, metric), _units(b, metric)
    a_S, b_S = (np.array(list(units.values())) for units in (by_a, by_b))
    if not np.isfinite([*a_S, *b_S]).all():
        return dict.fromkeys(names, "refused: the metric is not a number")
    found = unpaired(a_S, b_S)
    common = sorted(set(by_a) & set(by_b))
    d_S = np.array([by_a[unit] - by_b[unit] for unit in common])
    paired = ("p_paired", "p_wilcoxon")
    if several_a or several_b:
        found |= dict.fromkeys(paired, "refused: pretraining seeds of two sources are not pairs")
    elif len(d_S) < 2:
        found |= dict.fromkeys(paired, "refused: fewer than two fine-tuning seeds in common")
    else:
        if np.ptp(d_S) == 0:
            found["p_paired"] = "refused: no spread between seeds"
        else:
            test = stats.ttest_1samp(d_S, 0.0)
            found |= {"t_paired": float(test.statistic), "p_paired": float(test.pvalue)}
        found["p_wilcoxon"] = _wilcoxon(d_S, family)
    found |= _delong(a, b, metric)
    return found


def _delong(a: Sequence[Scores], b: Sequence[Scores], metric: str) -> dict[str, float | str]:
    if metric != "auroc_mean":
        return {"p_delong": "refused: it is of AUROC over all images"}
    if not same_images([*a, *b]):
        return {"p_delong": "refused: the two were not tested on the same images"}
    difference, se = delong_difference(a, b)
    if se == 0:
        return {"p_delong": "refused: the two order the images alike"}
    return {"z_delong": difference / se, "p_delong": float(2 * stats.norm.sf(abs(difference / se)))}
