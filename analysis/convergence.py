"""How fast training gets there: steps to a threshold, speed-up over random weights, area under the learning curve, what each depth adds.

    curves = curves_of(finished(out))                         # one a cell: Curve(group, label, seed, at_T, value_T)
    level = common_threshold(curves)                          # what the typical run of every source reaches
    rows = reached(curves, level)                             # a row a label: median, each run, ">max" where a run never got there
    speedup(at_random, at_source, end_random, end_source)     # ratio of medians with a bootstrap interval over runs
    marginal(depths, steps)                                   # what each further transfused block saves

A run that ends below the threshold is censored: it took longer than it ran, and nothing here gives it a number. Medians order it last;
where half of a side's runs are censored its median is, and the ratio is then a bound (">" or "<") or nothing, never a number that looks
measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis import results
from base import storage
from base.errors import RequestError
from base.seeds import rng

Array = NDArray[np.float64]
By = Literal["epochs", "steps", "seconds"]
REPLICATES = 2000
FEWEST = 3  # runs a side, under which no interval is given


@dataclass(frozen=True)
class Curve:
    """A run's validation metric where it was evaluated: `at_T` rising, in epochs, steps or seconds. group: what runs must share to be
    compared; label: what is compared (source, and strategy where it has options)."""

    group: tuple[str, ...]
    source: str
    strategy: str
    seed: int
    metric: str
    at_T: Array
    value_T: Array

    @property
    def label(self) -> str:
        return f"{self.source}, {self.strategy}"

    @property
    def end(self) -> float:
        return float(self.at_T[-1])


def curves_of(cells: Iterable[results.Cell], by: By = "epochs") -> list[Curve]:
    """The learning curves of finished cells whose rows hold the metric that they are selected by; controls left out.

    Raises:
        RequestError: `by` names what their rows do not count.
    """
    curves = []
    for cell in cells:
        if cell.shuffled:
            continue
        rows = storage.read_rows(storage.join(cell.url, "metrics.jsonl"))
        metric = str((cell.result.get("selection") or {}).get("metric", ""))
        name = f"val_{metric}"
        held = [(i, results.number(row.get(name))) for i, row in enumerate(rows)]
        held = [(i, value) for i, value in held if math.isfinite(value)]
        if not held or metric == "loss":
            continue
        at = _places(rows, by, cell.url)
        task = [str(cell.task), str(cell.architecture), f"{float(cell.fraction):g}", str(cell.resolution)]
        options = cell.result.get("options") or {}
        strategy = " ".join([str(cell.strategy), *(f"{key}={value}" for key, value in sorted(options.items()))])
        places, values = np.array([at[i] for i, _ in held]), np.array([value for _, value in held])
        curves.append(Curve(tuple(task), cell.source, strategy, int(cell.seed), metric, places, values))
    return curves


def _places(rows: Sequence[Mapping[str, object]], by: By, where: str) -> list[float]:
    if by == "seconds":
        return np.cumsum([results.number(row.get("seconds", 0)) for row in rows]).tolist()
    name = "epoch" if by == "epochs" else "step"
    if any(name not in row for row in rows):
        raise RequestError(f"the rows of this run do not count {by}", where=where, hint="--by epochs")
    return [results.number(row[name]) for row in rows]


def first_reach(at_T: Array, value_T: Array, threshold: float) -> float:
    """Where the metric first stands at the threshold or above; infinite where it never does (censored at the last evaluation)."""
    reached = np.flatnonzero(value_T >= threshold)
    return float(at_T[reached[0]]) if len(reached) else math.inf


def area(at_T: Array, value_T: Array, horizon: float) -> float:
    """Mean of the best value so far from the first evaluation to the horizon: the area under that curve over its width.

    A run that stopped earlier holds its best, as its weights do. Right-continuous steps: the metric is known where it was evaluated.
    """
    inside = at_T <= horizon
    at, best = at_T[inside], np.maximum.accumulate(value_T[inside])
    if not len(at):
        return math.nan
    width = horizon - at[0]
    return float((np.diff(np.append(at, horizon)) * best).sum() / width) if width > 0 else float(best[-1])


def common_threshold(curves: Sequence[Curve]) -> float:
    """The lowest, over what is compared, of the median best value: a level that the typical run of every one reaches.

    Raises:
        RequestError: no curve.
    """
    if not curves:
        raise RequestError("no finished cell has a learning curve")
    best: dict[str, list[float]] = {}
    for curve in curves:
        best.setdefault(curve.label, []).append(float(curve.value_T.max()))
    return min(float(np.quantile(values, 0.5, method="lower")) for values in best.values())


@dataclass(frozen=True)
class Speedup:
    """How many times fewer steps: the ratio of medians, its interval, and `sign` ">" or "<" where it is a bound only ("" else)."""

    ratio: float
    low: float
    high: float
    sign: str = ""

    def words(self) -> str:
        if not math.isfinite(self.ratio):
            return "-"
        known = math.isfinite(self.low) or math.isfinite(self.high)
        bound = "more" if math.isinf(self.high) else f"{self.high:.2f}"
        return f"{self.sign}{self.ratio:.2f}" + (f" [{self.low:.2f}, {bound}]" if known else "")


def speedup(
    base_S: Sequence[float], steps_S: Sequence[float], base_end: float, end: float, replicates: int = REPLICATES, seed: int = 0
) -> Speedup:
    """Steps of random weights over steps of a source, medians over runs; infinite ones are censored at `base_end` and `end`.

    The interval is of bootstrap percentiles over the runs of both sides. A replicate whose median is censored is known by a bound only,
    and counts as that for one end and as anything for the other. None (NaN) for fewer than three runs a side.
    """
    base, own = np.asarray(base_S, float), np.asarray(steps_S, float)
    nan = math.nan
    if not len(base) or not len(own):
        return Speedup(nan, nan, nan)
    ratio, sign = _bound(_median(base), _median(own), base_end, end)
    if min(len(base), len(own)) < FEWEST or not math.isfinite(ratio):
        return Speedup(ratio, nan, nan, sign)
    draw = rng("speed-up", len(base), len(own), seed)
    a, b = (np.array([_median(x[draw.integers(0, len(x), len(x))]) for _ in range(replicates)]) for x in (base, own))
    lost_a, lost_b = np.isinf(a), np.isinf(b)
    # Of a censored median only a bound is known: each end of the interval takes what is worst for it.
    least = np.where(lost_b, 0.0, np.where(lost_a, base_end, a) / b)
    most = np.where(lost_a, math.inf, a / np.where(lost_b, end, b))
    # Not interpolated: a value between a number and infinity is no number.
    low, high = np.quantile(least, 0.025, method="lower"), np.quantile(most, 0.975, method="higher")
    return Speedup(ratio, float(low), float(high), sign)


def _median(values: Array) -> float:
    """The upper median: exact in steps, and infinite where half of the runs are censored."""
    return float(np.quantile(values, 0.5, method="higher"))


def _bound(base: float, own: float, base_end: float, end: float) -> tuple[float, str]:
    if math.isinf(base) and math.isinf(own):
        return math.nan, ""
    if math.isinf(base):
        return base_end / own if own else math.nan, ">"
    if math.isinf(own):
        return base / end, "<"
    return base / own if own else math.nan, ""


@dataclass(frozen=True)
class Reached:
    """One source and strategy in one setting: median steps (infinite: censored), those of each run by seed, and how many times as many
    random weights took."""

    group: tuple[str, ...]
    source: str
    strategy: str
    steps: dict[int, float]
    end: float
    median: float
    area: float
    speedup: Speedup
    best: float

    def words(self) -> str:
        """The median, as a bound where it is censored."""
        return shown(self.median, self.end)

    @property
    def censored(self) -> int:
        return sum(map(math.isinf, self.steps.values()))


def shown(steps: float, end: float) -> str:
    """Steps, or `>end` for a run that never got there."""
    return f">{end:g}" if math.isinf(steps) else f"{steps:g}"


def reached(curves: Sequence[Curve], threshold: float, base: str = "random") -> list[Reached]:
    """A row for each source and strategy of one setting, against the runs of `base` with the same strategy.

    A strategy that random weights were not given (a depth of transfusion, say) is held against random weights trained whole (`full`).

    Raises:
        RequestError: curves of several settings or metrics, which one threshold does not fit.
    """
    if len({(curve.group, curve.metric) for curve in curves}) > 1:
        raise RequestError("one threshold is for one task, architecture, fraction and resolution")
    horizon = max(curve.end for curve in curves)
    sides: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        sides.setdefault((curve.source, curve.strategy), []).append(curve)
    steps = {name: {c.seed: first_reach(c.at_T, c.value_T, threshold) for c in held} for name, held in sides.items()}
    ends = {name: max(c.end for c in held) for name, held in sides.items()}
    rows = []
    for (source, strategy), held in sides.items():
        name = (source, strategy)
        against = next((other for other in ((base, strategy), (base, "full")) if other in sides), None)
        ratio = Speedup(math.nan, math.nan, math.nan)
        if against and against != name:
            ratio = speedup(list(steps[against].values()), list(steps[name].values()), ends[against], ends[name])
        areas = [area(c.at_T, c.value_T, horizon) for c in held]
        best = float(np.mean([c.value_T.max() for c in held]))
        median = _median(np.array(list(steps[name].values())))
        rows.append(Reached(held[0].group, source, strategy, steps[name], ends[name], median, float(np.mean(areas)), ratio, best))
    return rows


@dataclass(frozen=True)
class Depth:
    """One depth of transfusion: its median steps, and what it saves over the depth before, in steps and as a share of all that is saved."""

    depth: str
    steps: float
    gain: float
    share: float


def marginal(depths: Sequence[str], steps: Sequence[float]) -> list[Depth]:
    """What each further block brings, from none to all; NaN beside a censored median. Source: Raghu et al. 2019, section 5."""
    rows, whole = [], steps[0] - steps[-1] if all(map(math.isfinite, (steps[0], steps[-1]))) else math.nan
    for i, (depth, value) in enumerate(zip(depths, steps, strict=True)):
        known = i > 0 and math.isfinite(value) and math.isfinite(steps[i - 1])
        gain = steps[i - 1] - value if known else math.nan
        rows.append(Depth(depth, value, gain, gain / whole if whole else math.nan))
    return rows
