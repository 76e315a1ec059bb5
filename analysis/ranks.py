"""Average ranks of sources over settings, with Friedman's test and Nemenyi's critical difference (Demsar, JMLR 2006). Never declared.

found = ranks(table)      # table: one row a setting, one column a source, the metric; higher is better

Settings count as independent and alike, which tasks of one dataset are not; seeds and patients do not enter at all.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Ranks:
    """`average`: of every source, 1 is best, best first. `critical_difference`: sources nearer than that are not told apart; `cliques`: the
    largest groups of such, in order. `statistic`, `p`: Friedman's, NaN where `why` says so. `dropped`: settings that lack a source."""

    average: dict[str, float]
    settings: int
    dropped: int
    statistic: float
    p: float
    critical_difference: float
    cliques: list[tuple[str, ...]]
    why: str = ""


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


def ranks(table: pd.DataFrame, alpha: float = 0.05) -> Ranks:
    """Ranks of the sources (columns) over the settings (rows) in which all of them have a number.

    Friedman's test is refused where its smallest reachable p, of settings that all agree, is above alpha.
    """
    whole = table.dropna()
    settings, sources = whole.shape
    nan = math.nan
    if settings < 1 or sources < 2:
        why = "no setting has every source" if sources > 1 else "fewer than two sources"
        return Ranks({}, settings, len(table) - settings, nan, nan, nan, [], why)
    mean = whole.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    average = {str(name): float(value) for name, value in mean.items()}
    statistic, p, why = nan, nan, ""
    if sources < 3:
        why = "Friedman's test is of three sources or more"
    elif (np.ptp(whole.to_numpy(float), axis=1) == 0).all():
        why = "all sources are equal in every setting"
    elif (least := float(stats.chi2.sf(settings * (sources - 1), sources - 1))) > alpha:
        why = f"Friedman's test is refused: of {sources} sources in {settings} settings its smallest p is {least:.2g}"
    else:
        test = stats.friedmanchisquare(*(whole[name].to_numpy(float) for name in whole.columns))
        statistic, p = float(test.statistic), float(test.pvalue)
    apart = critical_difference(sources, settings, alpha)
    return Ranks(average, settings, len(table) - settings, statistic, p, apart, _cliques(average, apart), why)
