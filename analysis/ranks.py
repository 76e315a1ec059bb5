"""Average ranks of sources over settings, with Friedman's test and Nemenyi's critical difference (Demsar, JMLR 2006). Never declared.

found = ranks(table)      # table: one row a setting, one column a source, the metric; higher is better

Settings count as independent and alike, which tasks of one dataset are not; seeds and patients do not enter at all.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

# Sums of ranks that the exact distribution may hold at a time and go through in all; beyond these the asymptotic one stands for it.
TOGETHER, TRIED = 500_000, 4_000_000


@dataclass(frozen=True)
class Ranks:
    """`average`: of every source, 1 is best, best first. `critical_difference`: sources nearer than that are not told apart; `cliques`: the
    largest groups of such, in order. `statistic`, `p`: Friedman's, NaN where `why` says so; `exact`: p is over all orders of the
    sources, not asymptotic. `dropped`: settings that lack a source."""

    average: dict[str, float]
    settings: int
    dropped: int
    statistic: float
    p: float
    critical_difference: float
    cliques: list[tuple[str, ...]]
    why: str = ""
    exact: bool = False


def critical_difference(sources: int, settings: int, alpha: float = 0.05) -> float:
    """Nemenyi's: by how much average ranks must differ (Demsar 2006, section 3.2.2)."""
    q = float(stats.studentized_range.ppf(1 - alpha, sources, math.inf)) / math.sqrt(2)
    return q * math.sqrt(sources * (sources + 1) / (6 * settings))


def _cliques(average: dict[str, float], apart: float) -> list[tuple[str, ...]]:
    """Longest runs of sources, in the order of their ranks, whose first and last are nearer than `apart`."""
    names, values = list(average), list(average.values())
    runs: list[tuple[int, int]] = []
    for first in range(len(names)):
        last = max(at for at in range(first, len(names)) if values[at] - values[first] < apart)
        if last > first and not (runs and runs[-1][1] >= last):
            runs.append((first, last))
    return [tuple(names[first : last + 1]) for first, last in runs]


def exact(ranks_NK: NDArray[np.float64]) -> tuple[float, float]:
    """Friedman's p, all orders of the sources equally likely in every setting, ties as they are (Friedman 1937), and the least that any
    orders have; NaN where that takes too much.

    Args:
        ranks_NK: ranks of K sources in each of N settings.
    """
    twice_NK = np.rint(2 * ranks_NK).astype(np.int64)  # mean ranks of ties are halves
    settings, sources = twice_NK.shape
    if settings == 1:
        return 1.0, 1.0
    if math.factorial(sources) > TOGETHER:
        return math.nan, math.nan
    orders = np.array(list(itertools.permutations(range(sources))))
    place_K = (2 * settings * sources + 1) ** np.arange(sources, dtype=np.int64)
    # Sums of ranks of the settings so far, sorted: which source has which makes no difference. One setting's are the same in any order.
    sums_MK, weight_M = np.sort(twice_NK[:1]), np.ones(1, np.float64)
    tried = 0
    for row_K in twice_NK[1:]:
        step = len(sums_MK) * len(orders)
        tried += step
        if step > TOGETHER or tried > TRIED:
            return math.nan, math.nan
        every_MK = np.sort(sums_MK[:, None] + row_K[orders], axis=-1).reshape(-1, sources)
        _, first, which = np.unique(every_MK @ place_K, return_index=True, return_inverse=True)
        sums_MK, weight_M = every_MK[first], np.bincount(which, np.repeat(weight_M, len(orders))).astype(np.float64) / len(orders)
    middle = settings * (sources + 1)
    apart_M, seen = np.square(sums_MK - middle).sum(1), np.square(twice_NK.sum(0) - middle).sum()
    return float(weight_M[apart_M >= seen].sum()), float(weight_M[apart_M == apart_M.max()].sum())


def ranks(table: pd.DataFrame, alpha: float = 0.05) -> Ranks:
    """Ranks of the sources (columns) over the settings (rows) in which all of them have a number.

    Friedman's p is exact where that is cheap, else asymptotic; the test is refused where its smallest reachable p is above alpha.
    """
    whole = table.dropna()
    settings, sources = whole.shape
    nan = math.nan
    if settings < 1 or sources < 2:
        why = "no setting has every source" if sources > 1 else "fewer than two sources"
        return Ranks({}, settings, len(table) - settings, nan, nan, nan, [], why)
    ranked = whole.rank(axis=1, ascending=False)
    average = {str(name): float(value) for name, value in ranked.mean().sort_values(kind="stable").items()}
    statistic, p, why, known = nan, nan, "", False
    if sources < 3:
        why = "Friedman's test is of three sources or more"
    elif (np.ptp(whole.to_numpy(float), axis=1) == 0).all():
        why = "all sources are equal in every setting"
    else:
        p, least = exact(ranked.to_numpy(float))
        known = math.isfinite(p)
        test = stats.friedmanchisquare(*(whole[name].to_numpy(float) for name in whole.columns))
        statistic, p = float(test.statistic), p if known else float(test.pvalue)
        if least > alpha:
            statistic, p, why = (
                nan,
                nan,
                f"Friedman's test is refused: of {sources} sources in {settings} settings its smallest p is {least:.2g}",
            )
    apart = critical_difference(sources, settings, alpha)
    return Ranks(average, settings, len(table) - settings, statistic, p, apart, _cliques(average, apart), why, known)
