"""What to try next, and what was found: rates and cuts chosen on validation by ask and tell, over plain data.

    search = cut_search("two-stage", "resnet50", seeds=(0,))            # or rate_search(tune, seeds)
    while trials := propose(search, results):                           # results: {Trial: Outcome}, empty at first
        results |= {trial: outcome_of(trial) for trial in trials}       # in any order, any of them first
    found = answer(search, results, "auroc_mean")                       # found.choice: a cut or a rate

Both are functions of the results alone: what a search asks for next does not depend on the order in which results came in, so one that
was cut off goes on from the results that stand. A trial scores validation and never opens the test split.

Every source and strategy gets the same rates and the same number of trials. The best rate is that of the highest mean over the trials'
seeds; of equals the smaller, which is the further from diverging on the next seed. The best cut is the first, and so the smallest
network, whose mean is within one standard error of the highest mean (Breiman et al. 1984, Classification and Regression Trees, 3.4.3).

    two-stage     Peng et al., arXiv 2106.05152: the ends of the stages, then every cut between the neighbours of the one chosen
    halving       Jamieson and Talwalkar, AISTATS 2016: few epochs for many cuts, twice the epochs for the better half, and so on
    random        half of the cuts, drawn from the architecture and the seeds alone: the baseline of Bergstra and Bengio, JMLR 2012
    exhaustive    every cut: the yardstick

The standard error has two parts. Which patients happened to be in validation: a jackknife over 20 groups of them, with the network as it
is; all seeds score the same patients, so more seeds do not shrink it. And which seed: the variance between seeds divided by their number,
left out where there is one. Seeds alone would not do: two or three say next to nothing about their own spread.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from base.config import Strict, canonical_json, parse
from base.errors import RequestError, WorkError
from base.seeds import rng
from encoders.cuts import Cut, cuts, find, last_of_each
from finetune.catalogue import STRATEGIES

FLAT = 0.05  # a similarity that varies by less over the depth says nothing of where features begin
CutSearch = Literal["two-stage", "halving", "random", "exhaustive"]


class Tune(Strict):
    """Rates to choose from, and how many of them are tried. All sources and strategies get the same ones."""

    lr: list[float] = Field(min_length=1)
    trials: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Tune":
        if any(not 0 < rate < math.inf for rate in self.lr) or len(set(self.lr)) < len(self.lr):
            raise ValueError("lr: rates are positive, each once")
        if self.trials > len(self.lr):
            raise ValueError(f"trials: {self.trials} of {len(self.lr)} rates cannot be drawn")
        return self


@dataclass(frozen=True)
class Trial:
    """One training. None: what the strategy or the recipe says. epochs 0: no training, but the source compared with random weights."""

    cut: str | None = None
    lr: float | None = None
    seed: int = 0
    epochs: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a trial reached on validation: its metric (NaN: training diverged, or validation cannot define the metric), that number's
    standard error over patients (NaN: not known), the parameters of its network, and the epochs it trained (None: it diverged).

    similarity: by cut, of a trial of no epochs, which has nothing else.
    """

    value: float
    error: float = math.nan
    params: int = 0
    epochs: int | None = None
    similarity: Mapping[str, float] | None = None


Results = Mapping[Trial, Outcome]


@dataclass(frozen=True)
class Search:
    """What is searched. `candidates`: rates from the smallest, or names of cuts from the stem on.

    ends: positions of the stages' last cuts. epochs: of the recipe, a full training; halving divides them. first: positions of the
    cuts that halving begins with, or that were drawn. similarity: what guides halving, a number a candidate; auto: the result of a trial
    of no epochs, in the light of which `first` is chosen anew; random: auto of a source that is random weights itself.
    """

    kind: Literal["rates", "two-stage", "halving", "random", "exhaustive"]
    candidates: tuple[float | str, ...]
    seeds: tuple[int, ...]
    ends: tuple[int, ...] = ()
    epochs: int = 1
    first: tuple[int, ...] = ()
    similarity: tuple[float, ...] | Literal["auto", "random"] | None = None


class Point(Strict):
    """One candidate as it was judged: mean and standard error over the trials of its longest training; null where one of them diverged."""

    at: str | float
    mean: float | None
    error: float | None
    epochs: int | None = None
    params: int = 0


class Answer(Strict):
    """search.json: the choice and how it came about.

    trials: trainings that were asked for, of `exhaustive` that trying every candidate would have taken. cost: the epochs that they
    trained, in full trainings; one that diverged counts with those that it was asked for. similarity: what halving was to be guided by,
    by cut. guided: what came of it, null where it was not asked for. `similarity`: it began around the cut where that falls; evenly
    spread it began where similarity is much the same everywhere (`flat`) or the source is random weights (`random`). about: what the
    search was for, in the words of a cell's configuration.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    kind: Literal["rates", "two-stage", "halving", "random", "exhaustive"]
    choice: str | float
    best: str | float
    metric: str
    seeds: list[int]
    curve: list[Point]
    trials: int
    exhaustive: int
    cost: float
    similarity: dict[str, float] | None = None
    guided: Literal["similarity", "flat", "random"] | None = None
    about: dict[str, Any] = Field({})


# -- what is searched


def rate_search(tune: Tune, seeds: Sequence[int], epochs: int = 1) -> Search:
    """The rates drawn from the grid without replacement, from the grid alone: the same for all. epochs: of the recipe."""
    grid = sorted(tune.lr)
    drawn = sorted(rng("rates", canonical_json(grid), tune.trials).permutation(len(grid))[: tune.trials])
    return Search("rates", tuple(grid[i] for i in drawn), tuple(seeds), epochs=epochs)


def cut_search(
    kind: CutSearch,
    architecture: str,
    seeds: Sequence[int],
    epochs: int = 1,
    similarity: Mapping[str, float] | Literal["auto", "random"] | None = None,
    last: str | None = None,
) -> Search:
    """A search over the cuts of an architecture, or over those that a truncated source still has.

    Args:
        epochs: of the recipe; halving divides them.
        similarity: of halving, by cut, how like the source's features are to those of random weights on the target's images (linear
            CKA, 1: alike). Where it falls, features begin that only the source has; halving begins with the cuts around that place.
            Without it they are spread evenly. Given for cuts that a truncated source has no more, it is passed over there. auto: the
            first trial finds out; random: nothing is to be found out, since the source is random weights.
        last: the cut at which the source is truncated.

    Raises:
        RequestError: a cut without a number, or a number without a cut.
    """
    points = cuts(architecture)[: None if last is None else find(architecture, last) + 1]
    names = [cut.name for cut in points]
    known = {cut.name for cut in cuts(architecture)}
    guide: tuple[float, ...] | Literal["auto", "random"] | None
    if isinstance(similarity, Mapping):
        if wrong := ", ".join(sorted((set(similarity) - known) | (set(names) - set(similarity)))):
            what = f"similarity is given by cut, for every cut of {architecture} (not so: {wrong})"
            raise RequestError(what, where="strategy.similarity")
        guide = tuple(similarity[name] for name in names)
    else:
        guide = similarity
    first: tuple[int, ...] = ()
    if kind == "halving":
        first = _first(guide) if isinstance(guide, tuple) else _spread(len(names))
    elif kind == "random":
        drawn = rng("cuts", architecture, *seeds).permutation(len(names))[: math.ceil(len(names) / 2)]
        first = tuple(sorted(int(i) for i in drawn))
    return Search(kind, tuple(names), tuple(seeds), _ends(points), epochs, first, guide)


class Way(Strict):
    """How the cut of a strategy is searched: what stands beside `cut: auto`. similarity: see `cut_search`."""

    search: CutSearch = "two-stage"
    similarity: dict[str, float] | Literal["auto"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Way":
        if self.similarity is not None and self.search != "halving":
            raise ValueError("similarity: only search: halving begins by it")
        return self


def asked(strategy: Mapping[str, Any], where: str = "strategy") -> tuple[Way | None, dict[str, Any]]:
    """How the cut of a strategy is searched (None: it is not), and the strategy without that: `cut` is `auto` still.

    Raises:
        RequestError: a way of searching that does not exist or searches nothing, or a strategy that does not end at its cut.
    """
    of_search = {name: strategy[name] for name in Way.model_fields if name in strategy}
    rest = {name: value for name, value in strategy.items() if name not in of_search}
    if strategy.get("cut") != "auto":
        if of_search:
            raise RequestError(f"{' and '.join(of_search)} goes with cut: auto", where=where, hint="cut=auto")
        return None, rest
    searched = [name for name, about in STRATEGIES.items() if about.ends]
    if strategy.get("name") not in searched:
        what = f"the cut of {strategy.get('name')} is not searched for"
        raise RequestError(what, where=where, hint=f"cut: auto is for {', '.join(searched)}")
    return parse(of_search, Way, where), rest


def _ends(points: Sequence[Cut]) -> tuple[int, ...]:
    """The last cut of each resolution, the stem's apart; of a network with one resolution the ends of its four quarters."""
    ends = [points.index(cut) for cut in last_of_each(points)]
    if len(ends) == 1:
        blocks = len(points) - 1  # beside the stem
        ends = sorted({round((i + 1) * blocks / 4) for i in range(4)})
    return tuple(ends[1:] if ends[0] == 0 and len(ends) > 1 else ends)


def _rungs(count: int) -> list[int]:
    """How many candidates are left after each halving, down to two, so that the last comparison is between full trainings."""
    sizes = [count]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _begins_with(count: int) -> int:
    """The most candidates whose halving takes fewer trials than trying every one of `count`; all of one or two."""
    return max((n for n in range(1, count) if sum(_rungs(n)) < count), default=count) if count > 2 else count


def _spread(count: int) -> tuple[int, ...]:
    """Positions spread evenly from the first to the last."""
    return tuple(sorted({round(x) for x in np.linspace(0, count - 1, _begins_with(count))}))


def _first(similarity: Sequence[float]) -> tuple[int, ...]:
    """The positions nearest to the first at which the similarity is under the middle of its range, of two as near the earlier; spread
    evenly where it is much the same everywhere."""
    if _flat(similarity):
        return _spread(len(similarity))
    middle = (max(similarity) + min(similarity)) / 2
    knee = next((i for i, value in enumerate(similarity) if value < middle), len(similarity) - 1)
    near = sorted(range(len(similarity)), key=lambda i: (abs(i - knee), i))
    return tuple(sorted(near[: _begins_with(len(similarity))]))


def _flat(similarity: Sequence[float]) -> bool:
    return max(similarity) - min(similarity) < FLAT


# -- ask and tell


def propose(search: Search, results: Results) -> list[Trial]:
    """The trials without a result that the search needs before it can go on; none when it has its answer."""
    for stage in _stages(search, results):
        if missing := [trial for trial in stage if trial not in results]:
            return missing
    return []


def answer(search: Search, results: Results, metric: str = "") -> Answer:
    """The choice of a search that proposes nothing more.

    Raises:
        WorkError: every candidate diverged, or the metric is not defined on validation.
    """
    asked_for = list(dict.fromkeys(trial for stage in _stages(search, results) for trial in stage if trial.epochs != 0))
    last: dict[float | str, int | None] = {}
    for trial in asked_for:
        last[_candidate(trial)] = trial.epochs
    points = {at: _point(search, results, at, epochs) for at, epochs in last.items()}
    compared = {at: point for at, point in points.items() if point.epochs is None and point.mean is not None}
    if not compared and any(results[trial].epochs is not None for trial in asked_for):
        what = f"{metric or 'the metric'} is not defined on validation, and trials are compared by nothing else"
        raise WorkError(what, where="search", hint="choose another metric of the task, or without cut: auto and tune")
    if not compared:
        raise WorkError(f"no trial has a finite validation metric, {len(asked_for)} were run", where="search", hint="try smaller rates")
    numbers = _similarity(search, results)
    guided = "random" if search.similarity == "random" else None if numbers is None else "flat" if _flat(numbers) else "similarity"
    order = [at for at in search.candidates if at in compared]
    choice = _ranked(order, compared)[0] if search.kind != "rates" else max(order, key=lambda at: _mean(compared[at]))
    trained = [next(n for n in (results[trial].epochs, trial.epochs, search.epochs) if n is not None) for trial in asked_for]
    return Answer(
        kind=search.kind,
        choice=choice,
        best=max(order, key=lambda at: _mean(compared[at])),
        metric=metric,
        seeds=list(search.seeds),
        curve=[points[at] for at in search.candidates if at in points],
        trials=len(asked_for),
        exhaustive=len(search.candidates) * len(search.seeds),
        cost=round(sum(trained) / search.epochs, 6),
        similarity=None if numbers is None else {str(at): number for at, number in zip(search.candidates, numbers, strict=True)},
        guided=guided,
    )


def most_trials(search: Search) -> int:
    """The trials that the search takes at most: trainings, without the pass that compares the source with random weights."""
    if search.kind == "halving":
        return sum(_rungs(len(search.first))) * len(search.seeds)
    if search.kind == "two-stage":
        gaps = [*search.ends, len(search.candidates)]
        inner = [high - low - 1 for low, high in zip([-1, *search.ends], gaps, strict=True)]
        return (len(search.ends) + max(a + b for a, b in itertools.pairwise(inner))) * len(search.seeds)
    return len(search.first or search.candidates) * len(search.seeds)


def _candidate(trial: Trial) -> float | str:
    found = trial.cut if trial.lr is None else trial.lr
    assert found is not None
    return found


def _trials(search: Search, positions: Sequence[int], epochs: int | None = None) -> list[Trial]:
    rates = search.kind == "rates"
    names = [search.candidates[i] for i in positions]
    return [Trial(None if rates else str(name), float(name) if rates else None, seed, epochs) for name in names for seed in search.seeds]


def _stages(search: Search, results: Results) -> Iterator[list[Trial]]:
    """What is asked for together. A stage may be drawn only when the one before it has all its results."""
    if search.kind == "two-stage":
        yield _trials(search, search.ends)
        chosen = _chosen(search, results, search.ends)
        at = search.ends.index(chosen[0])
        low = search.ends[at - 1] if at else -1
        high = search.ends[at + 1] if at + 1 < len(search.ends) else len(search.candidates)
        yield _trials(search, [i for i in range(low + 1, high) if i not in search.ends])
    elif search.kind == "halving":
        sizes, left = _rungs(len(search.first)), search.first
        if search.similarity == "auto":
            yield [_comparison(search)]
            numbers = _similarity(search, results)
            assert numbers is not None
            left = _first(numbers)
        for rung, size in enumerate(sizes):
            share = 2 ** (len(sizes) - 1 - rung)
            budget = math.ceil(search.epochs / share)
            epochs = budget if budget < search.epochs else None
            left = tuple(sorted(left[:size]))
            yield _trials(search, left, epochs)
            left = tuple(_by_mean(search, results, left, epochs))
    else:
        yield _trials(search, search.first or range(len(search.candidates)))


def _comparison(search: Search) -> Trial:
    """The trial of no epochs, in which the source is compared with random weights."""
    return Trial(seed=search.seeds[0], epochs=0)


def _similarity(search: Search, results: Results) -> tuple[float, ...] | None:
    """What guides the search, by candidate: given, or found out by its first trial."""
    if search.similarity == "auto":
        found = results[_comparison(search)].similarity
        assert found is not None
        return tuple(found[str(at)] for at in search.candidates)
    return None if search.similarity == "random" else search.similarity


def _chosen(search: Search, results: Results, positions: Sequence[int]) -> list[int]:
    """The positions, best first; those of trainings that diverged last."""
    points = {at: _point(search, results, search.candidates[at], None) for at in positions}
    held = _ranked([at for at in positions if points[at].mean is not None], points)
    return held + [at for at in positions if at not in held]


def _by_mean(search: Search, results: Results, positions: Sequence[int], epochs: int | None) -> list[int]:
    """The positions by their means, of equals the smaller network first; those of trainings that diverged last.

    Not by the one-error rule, which is for the answer: after few epochs errors are wide, and the smallest would survive, not the better.
    """
    means = {at: _point(search, results, search.candidates[at], epochs).mean for at in positions}
    return sorted(positions, key=lambda at: math.inf if (mean := means[at]) is None else -mean)


def _ranked(order: Sequence[Any], points: Mapping[Any, Point]) -> list[Any]:
    """Candidates, of which each is smaller than the next, best first: those within one standard error of the best by size, the rest by
    their means."""
    if not order:
        return []
    best = max((points[at] for at in order), key=_mean)
    bar = _mean(best) - (best.error or 0.0)
    within = [at for at in order if _mean(points[at]) >= bar]
    return within + sorted((at for at in order if at not in within), key=lambda at: -_mean(points[at]))


def _mean(point: Point) -> float:
    assert point.mean is not None
    return point.mean


def _point(search: Search, results: Results, at: float | str, epochs: int | None) -> Point:
    held = [results[trial] for trial in _trials(search, [search.candidates.index(at)], epochs)]
    params = max(outcome.params for outcome in held)
    if any(math.isnan(outcome.value) for outcome in held):
        return Point(at=at, mean=None, error=None, epochs=epochs, params=params)
    patients = [outcome.error**2 for outcome in held if not math.isnan(outcome.error)]
    seeds = variance([outcome.value for outcome in held]) / len(held) if len(held) > 1 else 0.0
    error = math.sqrt(fmean(patients) + seeds) if patients else None
    return Point(at=at, mean=fmean(outcome.value for outcome in held), error=error, epochs=epochs, params=params)
