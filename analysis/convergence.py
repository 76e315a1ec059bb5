"""How fast training gets there: steps to a threshold, speed-up over random weights, area under the learning curve, what each depth adds.

    curves = curves_of(finished(out))                         # one a cell: Curve(group, label, seed, at_T, value_T)
    level = common_threshold(sides)                           # what the typical run of each of those compared reaches
    rows = reached(curves, level)                             # a row a label: median, each run, ">end" where a run never got there
    speedup(at_random, at_source, ends_random, ends_source)   # ratio of medians with a bootstrap interval over runs
    marginal(depths, steps)                                   # what each further transfused block saves

A run that ends below the threshold is censored: it took longer than it ran itself, and nothing here gives it a number. A median lies
between what it would be if every censored run had got there just after its own end, and if none ever had; where the two differ it is told
as bounds, and so is the ratio (">", "<", with "=" where the bound may be the value), never as a number that looks measured. Of a threshold
that takes no training (chance, a trivial predictor, where the runs of the base begin) no ratio is given: it would be noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis import results
from analysis.floors import Floors
from analysis.study_floors import WORDS, bar
from base import storage
from base.errors import RequestError
from base.seeds import rng

Array = NDArray[np.float64]
By = Literal["epochs", "steps", "seconds"]
REPLICATES = 2000
FEWEST = 3  # runs a side, under which no interval is given
CHANCE = 0.5  # AUROC of any predictor that knows nothing


@dataclass(frozen=True)
class Curve:
    """A run's validation metric where it was evaluated: `at_T` rising, in epochs, steps or seconds. group: what runs must share to be
    compared; label: what is compared (source, and strategy where it has options); apart: "own source" or "exposed" of a run that is
    evidence for nothing."""

    group: tuple[str, ...]
    source: str
    strategy: str
    seed: int
    metric: str
    at_T: Array
    value_T: Array
    source_seed: int = 0
    apart: str = ""

    @property
    def run(self) -> tuple[int, int]:
        """Of its source and strategy: pretraining seed, fine-tuning seed."""
        return self.source_seed, self.seed

    @property
    def label(self) -> str:
        return f"{marked(self.source, self.apart)}, {self.strategy}"

    @property
    def end(self) -> float:
        return float(self.at_T[-1])


def marked(source: str, apart: str) -> str:
    """`sup (own source)`."""
    return f"{source} ({apart})" if apart else source


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
        apart = results.APART.get(cell.apart, "")
        places, values = np.array([at[i] for i, _ in held]), np.array([value for _, value in held])
        curves.append(Curve(tuple(task), cell.source, strategy, int(cell.seed), metric, places, values, cell.source_seed, apart))
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


def common_threshold(sides: Iterable[Sequence[Curve]]) -> float:
    """The lowest, over the sides that are compared, of the median best value: a level that the typical run of each reaches.

    Raises:
        RequestError: no curve.
    """
    best = [float(np.quantile([curve.value_T.max() for curve in side], 0.5, method="lower")) for side in sides if side]
    if not best:
        raise RequestError("no finished cell has a learning curve")
    return min(best)


def chance(metric: str) -> float:
    """What a predictor that knows nothing scores; NaN where that depends on the data."""
    return CHANCE if metric.startswith("auroc") else 0.0 if metric.startswith("kappa") else math.nan


def untrained(metric: str, floors: Floors) -> list[tuple[float, str]]:
    """What takes no training and how much it scores; NaN where that is not known."""
    value, name = bar(floors, metric)
    return [(chance(metric), "chance"), (value, f"a floor of test images ({WORDS.get(name, name)})")]


@dataclass(frozen=True)
class Median:
    """The upper median of runs, some of them censored: no less than `low` (more than it with `above`), no more than `high`."""

    low: float
    high: float
    above: bool

    @property
    def value(self) -> float:
        """The median where it is known; infinite where only bounds are."""
        return self.high if self.low == self.high else math.inf

    def words(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        bound = f"{'>' if self.above else '>='}{self.low:g}"
        return bound if math.isinf(self.high) else f"{bound}, <={self.high:g}"


def median(steps_S: Sequence[float], ends_S: Sequence[float]) -> Median:
    """Of runs whose steps are infinite where they never got there, and which ended at `ends_S`."""
    # Censored runs stand after those that got there where they ended.
    low, above = sorted((min(steps, end), math.isinf(steps)) for steps, end in zip(steps_S, ends_S, strict=True))[len(steps_S) // 2]
    return Median(low, sorted(steps_S)[len(steps_S) // 2], above)


@dataclass(frozen=True)
class Speedup:
    """How many times fewer steps: the ratio of medians and its interval.

    ratio: infinite (with ">") over a median of 0 steps, NaN where it is 0 over 0 or not even a bound is known. sign: "" where the ratio is
    known; ">", ">=", "<" or "<=" where `ratio` is a bound. undefined: the share of the interval's draws that may be 0 over 0, left out.
    """

    ratio: float
    low: float
    high: float
    sign: str = ""
    undefined: float = 0.0

    def words(self) -> str:
        if math.isnan(self.ratio):
            return "-"
        shown = "unbounded" if math.isinf(self.ratio) else f"{self.sign}{self.ratio:.2f}"
        if not math.isfinite(self.low):
            return shown
        high = "more" if math.isinf(self.high) else f"{self.high:.2f}"
        left_out = f"; {self.undefined:.0%} of draws 0/0" if self.undefined else ""
        return f"{shown} [{self.low:.2f}, {high}{left_out}]"


def speedup(
    base_S: Sequence[float],
    steps_S: Sequence[float],
    base_ends: float | Sequence[float],
    ends: float | Sequence[float],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Speedup:
    """Steps of random weights over steps of a source, medians over runs; infinite ones are censored at their own ends, or at one for all.

    The interval is of bootstrap percentiles over the runs of both sides. A replicate whose ratio is known by bounds only counts as the
    lower for one end and as the upper for the other. None (NaN) for fewer than three runs a side, or where the ratio is not known at all.
    """
    nan = math.nan
    if not len(base_S) or not len(steps_S):
        return Speedup(nan, nan, nan)
    base_ends_S, ends_S = np.broadcast_to(base_ends, len(base_S)).tolist(), np.broadcast_to(ends, len(steps_S)).tolist()
    ratio, sign = _ratio(median(base_S, base_ends_S), median(steps_S, ends_S))
    if min(len(base_S), len(steps_S)) < FEWEST or math.isnan(ratio):
        return Speedup(ratio, nan, nan, sign)
    draw = rng("speed-up", len(base_S), len(steps_S), seed)
    (a_low, a_high), (b_low, b_high) = (
        _medians(np.asarray(steps, float), np.asarray(ends, float), replicates, draw)
        for steps, ends in ((base_S, base_ends_S), (steps_S, ends_S))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        least, most = a_low / b_high, a_high / b_low
    defined = ~(np.isnan(least) | np.isnan(most))
    # Not interpolated: a value between a number and infinity is no number.
    low, high = np.quantile(least[defined], 0.025, method="lower"), np.quantile(most[defined], 0.975, method="higher")
    return Speedup(ratio, float(low), float(high), sign, float(1 - defined.mean()))


def _medians(steps_S: Array, ends_S: Array, replicates: int, draw: np.random.Generator) -> tuple[Array, Array]:
    """Lower and upper bounds of the upper medians of resampled runs, one a replicate."""
    n = len(steps_S)
    at_RS = draw.integers(0, n, (replicates, n))
    low, high = (np.sort(bound_S[at_RS], axis=1)[:, n // 2] for bound_S in (np.minimum(steps_S, ends_S), steps_S))
    return low, high


def _ratio(base: Median, own: Median) -> tuple[float, str]:
    """Of two medians, as far as it is known."""
    if (base.low == 0 and own.high == 0) or (base.high == 0 and own.low == 0):
        return math.nan, ""
    low = base.low / own.high if own.high else math.inf
    high = base.high / own.low if own.low else math.inf
    if low == high:
        return low, ">" if math.isinf(low) else ""
    if low > 0:
        return low, ">" if base.above else ">="
    if math.isfinite(high):
        return high, "<" if own.above else "<="
    return math.nan, ""


@dataclass(frozen=True)
class Reached:
    """One source and strategy in one setting: steps of each run by its pretraining and fine-tuning seed (infinite: censored) and where it
    ended, their median, and how many times as many random weights took; why: of a speed-up that is not given; apart: as of its curves."""

    group: tuple[str, ...]
    source: str
    strategy: str
    steps: dict[tuple[int, int], float]
    ends: dict[tuple[int, int], float]
    known: Median
    area: float
    speedup: Speedup
    best: float
    why: str = ""
    apart: str = ""

    @property
    def label(self) -> str:
        return f"{marked(self.source, self.apart)}, {self.strategy}"

    @property
    def median(self) -> float:
        """Infinite where only bounds are known."""
        return self.known.value

    def words(self) -> str:
        """The median, as a bound where it is censored."""
        return self.known.words()

    @property
    def censored(self) -> int:
        return sum(map(math.isinf, self.steps.values()))


def shown(steps: float, end: float) -> str:
    """Steps, or `>end` for a run that never got there."""
    return f">{end:g}" if math.isinf(steps) else f"{steps:g}"


def reached(curves: Sequence[Curve], threshold: float, base: str = "random", untrained: Sequence[tuple[float, str]] = ()) -> list[Reached]:
    """A row for each source and strategy of one setting, against the runs of `base` with the same strategy.

    A strategy that random weights were not given (a depth of transfusion, say) is held against random weights trained whole (`full`).
    No speed-up is given to a threshold that is not above all that takes no training, `untrained` with its names (NaN: not known), and not
    above the median first value of those runs.

    Raises:
        RequestError: curves of several settings or metrics, which one threshold does not fit.
    """
    if len({(curve.group, curve.metric) for curve in curves}) > 1:
        raise RequestError("one threshold is for one task, architecture, fraction and resolution")
    horizon = max(curve.end for curve in curves)
    sides: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        sides.setdefault((curve.source, curve.strategy), []).append(curve)
    steps = {name: {c.run: first_reach(c.at_T, c.value_T, threshold) for c in held} for name, held in sides.items()}
    ends = {name: {c.run: c.end for c in held} for name, held in sides.items()}
    rows = []
    for (source, strategy), held in sides.items():
        name = (source, strategy)
        against = next((other for other in ((base, strategy), (base, "full")) if other in sides), None)
        ratio, why = Speedup(math.nan, math.nan, math.nan), ""
        if against and against != name:
            first = float(np.quantile([c.value_T[0] for c in sides[against]], 0.5, method="lower"))
            begins = (first, f"the first evaluation of {', '.join(against)}")
            why = next((f"{words}, {value:.4g}" for value, words in (*untrained, begins) if threshold <= value), "")
        if against and against != name and not why:
            base_S, steps_S, base_ends_S, ends_S = (list(held[side].values()) for held in (steps, ends) for side in (against, name))
            ratio = speedup(base_S, steps_S, base_ends_S, ends_S)
        areas = [area(c.at_T, c.value_T, horizon) for c in held]
        best = float(np.mean([c.value_T.max() for c in held]))
        known = median(list(steps[name].values()), list(ends[name].values()))
        numbers = (known, float(np.mean(areas)), ratio, best)
        rows.append(Reached(held[0].group, source, strategy, steps[name], ends[name], *numbers, why, held[0].apart))
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
