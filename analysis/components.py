"""Variance of a difference of two sources, by what it comes from: seeds and test patients; head of analysis/statistics.py.

found = parts((side_of(a, metric, bootstrap), side_of(b, metric, bootstrap)), patients); found.se, found.critical(0.025), found.p(2.1)

Legend: C one column for the test set itself and one for each bootstrap draw of patients, R pretraining seeds, S fine-tuning seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from analysis.replicates import Array, Bootstrap, Scores

ROUNDING = 64 * float(np.finfo(float).eps)  # of a metric, relative: what varies by no more than this does not vary
HALVINGS = 40  # to 1e-12 of the distance between two quantiles


@dataclass(frozen=True)
class Parts:
    """Variance of an estimate by what it comes from, and the degrees of freedom with which each was estimated (0: it was not)."""

    seeds: float
    seeds_df: float
    patients: float
    patients_df: float
    pretraining: float = math.nan  # of `seeds`, the part between pretraining seeds, where it can be told apart

    @property
    def se(self) -> float:
        return math.sqrt(self.seeds + self.patients)

    def critical(self, tail: float) -> float:
        """Standard errors from 0 that have this chance in each tail; infinite where there is no variance."""
        held = self._held()
        if not held:
            return math.inf
        return float(critical(self.seeds, self.seeds_df, self.patients, self.patients_df, tail)) if len(held) > 1 else t(held[0], tail)

    def p(self, away: float) -> float:
        """Two-sided p of an estimate that is so many standard errors from 0; 1 where there is no variance."""
        held = self._held()
        if len(held) > 1:
            return float(2 * beyond(away, weight(self.seeds, self.seeds_df, self.patients), self.seeds_df, self.patients_df))
        return 2 * float(special.stdtr(held[0], -away)) if held else 1.0

    def df(self, tail: float) -> float:
        """Degrees of freedom of the one t distribution with this critical value; NaN where there is no variance."""
        held = self._held()
        if not held:
            return math.nan
        if min(held) == max(held):
            return held[0]
        # A part that is nothing beside the other rounds the critical value to an end, or past it.
        ends = [t(max(held), tail), t(min(held), tail)]
        wanted = min(max(self.critical(tail), ends[0]), ends[1])
        return float(optimize.brentq(lambda df: t(df, tail) - wanted, min(held), max(held)))

    def _held(self) -> list[float]:
        return [df for part, df in ((self.seeds, self.seeds_df), (self.patients, self.patients_df)) if part > 0 and df > 0]


def t(df: float, tail: float) -> float:
    return -float(special.stdtrit(df, tail))


def weight(seeds: Array | float, seeds_df: Array | float, patients: Array | float) -> Array:
    """The weight of Student's distribution for seeds: their share of the variance, to a power that rises with their degrees of freedom.

    With few of them the share itself is often far too small by chance, which a power under 1 makes up for (docs/statistics.md).
    """
    half = np.asarray(seeds_df) / 2
    return np.asarray((seeds / (np.asarray(seeds) + patients)) ** np.where(half < 1, half, np.sqrt(half)))


def beyond(away: Array | float, weight: Array, seeds_df: Array | float, patients_df: Array | float) -> Array:
    """Chance of one tail: that of Student's distribution for seeds and of that for patients, mixed."""
    return np.asarray(weight * special.stdtr(seeds_df, -away) + (1 - weight) * special.stdtr(patients_df, -away))


def critical(seeds: Array | float, seeds_df: Array | float, patients: Array | float, patients_df: float, tail: float) -> Array:
    """Where `beyond` is `tail`, by halving: between the quantiles of the two."""
    mixed = weight(seeds, seeds_df, patients)
    ends = [-special.stdtrit(seeds_df, tail), -special.stdtrit(patients_df, tail) + np.zeros_like(mixed)]
    low, high = np.minimum(*ends), np.maximum(*ends)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = beyond(middle, mixed, seeds_df, patients_df) > tail
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)


@dataclass(frozen=True)
class Side:
    """Cells of one source by pretraining seed and fine-tuning seed, each its metric on the test set and in every replicate.

    Where every cell has a fine-tuning seed of its own they are the units, whichever weights each began with (random weights are drawn with
    the fine-tuning seed): one group.
    """

    groups: list[dict[int, Array]]

    @property
    def nested(self) -> bool:
        return len(self.groups) > 1

    @property
    def units(self) -> int:
        return len(self.groups) if self.nested else len(self.groups[0])

    @property
    def common(self) -> set[int]:
        """Fine-tuning seeds that all groups hold."""
        return set.intersection(*(set(group) for group in self.groups))

    def mean_C(self) -> Array:
        return np.asarray(np.mean([np.mean(list(group.values()), axis=0) for group in self.groups], axis=0))

    def only(self, seeds: Sequence[int]) -> "Side":
        return Side([{seed: group[seed] for seed in seeds} for group in self.groups])

    def pretraining_C(self) -> Array:
        """Variance of the mean from pretraining seeds, with what they share with fine-tuning seeds."""
        means_RC = np.array([np.mean(list(group.values()), axis=0) for group in self.groups])
        return np.asarray(means_RC.var(axis=0, ddof=1) / len(means_RC))

    def table_RSC(self, seeds: Sequence[int]) -> Array:
        return np.array([[group[seed] for seed in seeds] for group in self.groups])

    def interaction_C(self, seeds: Sequence[int]) -> Array:
        """Mean square of the interaction of pretraining with fine-tuning seeds, over the number of the former."""
        x_RSC = self.table_RSC(seeds)
        rest_RSC = x_RSC - x_RSC.mean(1, keepdims=True) - x_RSC.mean(0, keepdims=True) + x_RSC.mean((0, 1), keepdims=True)
        return np.asarray((rest_RSC**2).sum((0, 1)) / ((len(self.groups) - 1) * (len(seeds) - 1)) / len(self.groups))


def side_of(cells: Sequence[Scores], metric: str, bootstrap: Bootstrap) -> Side:
    apart = len({cell.seed for cell in cells}) == len(cells)
    groups: dict[int, dict[int, Array]] = {}
    for cell in cells:
        groups.setdefault(0 if apart else cell.source_seed, {})[cell.seed] = bootstrap(cell, metric)
    return Side(list(groups.values()))


def _fine_tuning_C(sides: Sequence[Side], seeds: Sequence[int]) -> Array:
    """Variance of the (difference of) means from fine-tuning seeds that all hold, less what they do with one pretraining seed only."""
    signs = (1, -1)
    d_SC = np.sum([sign * side.table_RSC(seeds).mean(0) for sign, side in zip(signs, sides, strict=False)], axis=0)
    shared_C = np.sum([side.interaction_C(seeds) for side in sides if side.nested], axis=0)
    return np.asarray((d_SC.var(axis=0, ddof=1) - shared_C) / len(seeds))


def parts(sides: Sequence[Side], patients: int) -> Parts:
    """Variance of the difference of two sides' means; that of patients alone where a side has one unit.

    What a draw of patients adds to the variance over seeds is their interaction. It stands in the variance over seeds already, so it is
    taken off what the draws vary by. A variance as small as that of rounding is none.
    """
    means_2C = np.array([side.mean_C() for side in sides])
    tiny = (ROUNDING * float(np.abs(means_2C).max())) ** 2

    def seen(part: float) -> float:
        return part if part > tiny else 0.0

    of_patients = seen(float(np.var(means_2C[0, 1:] - means_2C[1, 1:], ddof=1)) * patients / max(1, patients - 1))
    if any(side.units < 2 for side in sides):
        return Parts(0.0, 0, of_patients, patients - 1)
    pretraining = [(side.pretraining_C(), len(side.groups) - 1) for side in sides if side.nested]
    both = sorted(sides[0].common & sides[1].common)
    together = [(sides, both)] if len(both) > 1 else [([side], sorted(side.common)) for side in sides]
    tuning = [(_fine_tuning_C(*each), len(each[1]) - 1) for each in together if len(each[1]) > 1]
    held = [(seen(float(part_C[0])), df) for part_C, df in pretraining + tuning]
    interaction = sum(max(0.0, float(part_C[1:].mean() - part_C[0])) for part_C, _ in pretraining + tuning)
    seeds = sum(part for part, _ in held)
    seeds_df = seeds**2 / sum(part**2 / df for part, df in held) if seeds > 0 else 0.0
    between = sum(part for part, _ in held[: len(pretraining)]) if pretraining else math.nan
    return Parts(seeds, seeds_df, seen(of_patients - interaction), patients - 1, between)
