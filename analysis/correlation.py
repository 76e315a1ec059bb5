"""How two rows of numbers go together, one number a source or a pair of runs on each side, with what chance alone would do.

found = correlation(x, y); found.rho.words(2), found.p, found.tau, found.n        # of ranks: which source is the better one
pearson(x, y)                                                                     # of the numbers themselves
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from base.seeds import rng

FEWEST = 3  # points, under which an order says nothing
ALPHA = 0.05  # a test whose smallest p is above it is not made
EXACT = 8  # points up to which all orders are tried
FEWEST_OF_INTERVAL = 8  # under which Fisher's transformation, an approximation for many, is no guide


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN bounds where there is too little for one."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    def words(self, digits: int = 3) -> str:
        bounds = f" [{self.low:.{digits}f}, {self.high:.{digits}f}]" if math.isfinite(self.low) else ""
        return f"{self.estimate:.{digits}f}{bounds}" if math.isfinite(self.estimate) else "-"


@dataclass(frozen=True)
class Rank:
    """Of `n` points: Spearman's rank correlation with its interval, the probability of as strong a one by chance, and Kendall's tau that
    weighs the top. `why`: said where they are NaN, which of a p that no order could bring under 5 % is alone."""

    n: int
    rho: Interval = Interval(math.nan)
    p: float = math.nan
    tau: float = math.nan
    why: str = ""


def correlation(x: Sequence[float], y: Sequence[float]) -> Rank:
    """Do sources that are better at one thing do better at the other? Pairs that are not finite are left out.

    Interval by Fisher's transformation with the variance of Bonett and Wright (Psychometrika 65, 2000), (1 + rho^2 / 2) / (n - 3): none
    under 8 points, nor of a perfect order, where it would have no width; p from permutations, all of them up to 8 points, and refused where
    the smallest that any order of these ranks has is above 5 % (of three and four points always: 1/3 and 1/12); tau after Vigna
    (2015), as You et al. (LogME, 2021) use it.
    """
    from scipy import stats

    held = _finite(x, y)
    n = len(held)
    if n < FEWEST:
        return Rank(n, why=f"{n} sources: an order takes {FEWEST}")
    if np.ptp(held, axis=0).min() == 0:  # of equal numbers the standard deviation may be that of rounding
        return Rank(n, why="all sources are alike on one side")
    ranks = stats.rankdata(held, axis=0)
    one, other = ((ranks - ranks.mean(0)) / np.sqrt(((ranks - ranks.mean(0)) ** 2).sum(0))).T
    resamples = math.factorial(n) if n <= EXACT else 10_000
    of = {"permutation_type": "pairings", "n_resamples": resamples, "alternative": "two-sided", "rng": rng("spearman", n)}
    # Of standardised ranks the correlation is one product: all orders of eight sources in one array.
    test = stats.permutation_test((one,), lambda one, axis: (one * other).sum(axis), vectorized=True, **of)
    tau = float(stats.weightedtau(held[:, 0], held[:, 1]).statistic)
    rho, null = _interval(float((one * other).sum()), n), np.round(test.null_distribution, 12)
    least = 2 * min(float((null == null.max()).mean()), float((null == null.min()).mean()))
    if n <= EXACT and least > ALPHA:
        return Rank(n, rho, math.nan, tau, f"refused: of these {n} sources the smallest p is {least:.2g}")
    return Rank(n, rho, float(test.pvalue), tau)


def _interval(rho: float, n: int) -> Interval:
    if n < FEWEST_OF_INTERVAL or abs(rho) > 1 - 1e-12:
        return Interval(rho)
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    centre = math.atanh(rho)
    return Interval(rho, math.tanh(centre - half), math.tanh(centre + half))


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation; NaN where one of the two does not vary or fewer than three pairs are finite."""
    held = _finite(x, y)
    if len(held) < FEWEST or held.std(0).min() < 1e-12:
        return math.nan
    return float(np.asarray(np.corrcoef(held.T))[0, 1])


def _finite(x: Sequence[float], y: Sequence[float]) -> NDArray[np.float64]:
    return np.array([pair for pair in zip(x, y, strict=True) if all(map(math.isfinite, pair))], float).reshape(-1, 2)
