"""The searches of a study: which trials are to run next, and the cells whose searches have answered.

    found = Searches(plan.settings(study, corpora, weights))
    run_cells(found.ready(), resources, report, told=found.told)       # trials and cells in one pool; more come as searches answer
    found.cells, found.open                                            # cells that are known; settings whose searches still ask

A setting with `cut: auto` searches its cut first, at the recipe's rate; then, as every setting of a study that tunes, its rate. Trials are
results in OUT/cells like any other, by their keys, and answers stand in OUT/analyses/<key>/search.json: a driver that starts again asks
only for what is missing. What guides a search with `similarity: auto` is one more result, of role `similarity`, the same for all searches
of a source on a task's data at a resolution. A trial whose training diverges counts as the worst of its search; one that fails otherwise
stops its search, and the cells behind it are listed as failed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from base import storage
from base.config import canonical_json, digest, parse
from base.errors import Diverged, WorkError
from cluster import plan
from cluster.plan import KEY_DIGITS, Setting
from cluster.standing import done, finished
from finetune.catalogue import STRATEGIES
from finetune.cell import CellConfig, kept_all
from finetune.search import (
    Answer,
    Outcome,
    Search,
    Trial,
    answer,
    asked,
    cut_search,
    most_trials,
    propose,
    rate_search,
)
from finetune.task import Task

FILE = "search.json"
MANY = 200  # cells that are looked for by one listing instead of one by one


@dataclass(eq=False)
class Chosen:
    """A setting and what its searches have chosen so far. `trials`: by key, those that were asked for and have no result yet."""

    setting: Setting
    steps: list[str]  # of "cut" and "rate", those without an answer
    strategy: dict[str, Any]
    task: Task
    results: dict[Trial, Outcome] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)  # keys of folders in OUT/analyses
    failed: str | None = None
    made: list[CellConfig] = field(default_factory=list)

    @property
    def searched(self) -> dict[str, Any] | None:
        """The strategy as the study has it, where a search chose for it."""
        return self.setting.strategy if self.strategy != self.setting.strategy else None

    def cells(self) -> list[CellConfig]:
        """One for each seed, once every search has answered."""
        if not self.made:
            seeds = self.setting.seeds
            self.made = [plan.cell(self.setting, seed, self.strategy, self.task, searched=self.searched) for seed in seeds]
        return self.made


def steps_of(setting: Setting) -> list[str]:
    """What is searched for a setting, in this order: its cut, its rate."""
    matrix = setting.study.cells
    cut = ["cut"] if asked(setting.strategy)[0] else []
    return cut + (["rate"] if matrix and matrix.tune and STRATEGIES[setting.strategy["name"]].trains_by else [])


def search_of(setting: Setting, step: str) -> Search:
    """The search of a step."""
    matrix, recipe = setting.study.cells, STRATEGIES[setting.strategy["name"]].trains_by
    assert matrix is not None
    assert recipe is not None
    epochs = getattr(setting.task, recipe).epochs
    if step == "rate":
        assert matrix.tune is not None
        return rate_search(matrix.tune, matrix.trial_seeds, epochs)
    way = asked(setting.strategy)[0]
    assert way is not None
    last = setting.weights.cut if setting.weights else None
    similarity = "random" if way.similarity == "auto" and setting.weights is None else way.similarity
    return cut_search(way.search, setting.architecture, matrix.trial_seeds, epochs, similarity, last)


class Searches:
    """All settings of a study, those in which nothing is searched included.

    Args:
        keep: answers are written to OUT; False for who only looks.
    """

    def __init__(self, settings: Iterable[Setting], keep: bool = True) -> None:
        self.keep = keep
        self.held: dict[str, Outcome] = {}  # trials by their keys
        self.looked_for: set[str] = set()  # trials whose result was asked for in storage
        self.waiting: dict[str, list[Chosen]] = {}  # who waits for a trial
        self.broken: dict[str, str] = {}  # trials that failed, and why
        self.kept = 0  # cells that stood when they became known
        self.blocks: dict[tuple[str, str, int], list[Chosen]] = {}  # by task, source and its seed, in the order of the study
        self._put(settings)

    # -- what is known

    @property
    def chosen(self) -> list[Chosen]:
        """Every setting."""
        return [one for block in self.blocks.values() for one in block]

    @property
    def cells(self) -> list[CellConfig]:
        """Cells whose searches have answered, or who have none, each once."""
        return _cells_of(self.chosen)

    @property
    def open(self) -> list[Chosen]:
        """Settings whose data and weights stand and whose searches have not answered."""
        return [one for one in self.chosen if one.steps and one.setting.stands]

    @property
    def foreseen(self) -> list[Chosen]:
        """Settings whose data or weights do not stand: their cells have no keys yet."""
        return [one for one in self.chosen if not one.setting.stands]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of plan.json: every cell; one whose search has not answered, or whose encoder is not made, has no key yet."""
        for one in self.chosen:
            recipe = STRATEGIES[one.strategy["name"]].trains_by
            known = not one.steps and one.setting.stands
            for seed, config in zip(one.setting.seeds, one.cells() if known else [None] * len(one.setting.seeds), strict=True):
                yield {
                    "key": config.key if config else "",
                    "architecture": one.setting.architecture,
                    "source": one.setting.source,
                    "source_seed": one.setting.weights.seed if one.setting.weights else seed,
                    "fraction": one.setting.fraction,
                    "resolution": one.setting.resolution,
                    "seed": seed,
                    "shuffle_labels": one.setting.shuffled,
                    "own_source": config.own_source if config else False,
                    "exposed_to": list(one.setting.exposed),
                    "strategy": one.strategy["name"],
                    "options": {name: value for name, value in one.strategy.items() if name != "name"},
                    "task": one.task.task,
                    "asked": {name: value for name, value in (one.searched or {}).items() if name != "name"},
                    "lr": getattr(one.task, recipe).lr if recipe else None,
                    "tuned": "rate" in steps_of(one.setting),
                    "searches": one.answers,
                }

    # -- running them

    def ready(self) -> list[CellConfig]:
        """What can run now and has no result: trials, then cells."""
        return self._ready(self.chosen)

    def fill(self, settings: Iterable[Setting]) -> list[CellConfig]:
        """Settings whose data and weights have come to stand, in the place of those that were foreseen; what became ready by it."""
        asked_for = set(self.waiting)
        return [config for config in self._ready(self._put(settings)) if config.key not in asked_for]

    def _put(self, settings: Iterable[Setting]) -> list[Chosen]:
        found: dict[tuple[str, str, int], list[Chosen]] = {}
        for setting in settings:
            seed = setting.weights.seed if setting.weights else 0
            found.setdefault((setting.task.task, setting.source, seed), []).append(self._begun(setting))
        self.blocks |= found
        put = [one for block in found.values() for one in block]
        for one in put:
            if one.setting.stands:
                self._advance(one)
        return put

    def _ready(self, chosen: Sequence[Chosen]) -> list[CellConfig]:
        asking = [one for one in chosen if one.steps and one.setting.stands]
        trials = {key: self._trial(one, trial) for one in asking for key, trial in one.trials.items()}
        return [*trials.values(), *self._missing_of(_cells_of(chosen))]

    def told(self, config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        """A cell or trial has ended; what became ready by it."""
        if config.role == "cell":
            return []
        if problem is None:
            self.held[config.key] = outcome(config)
        elif isinstance(problem, Diverged):
            self.held[config.key] = Outcome(math.nan)
        else:
            self.broken[config.key] = f"a trial of its search failed: {problem}"
        found: dict[str, CellConfig] = {}
        asked_for = set(self.waiting)
        for one in self.waiting.pop(config.key, []):
            self._advance(one)
            if one.steps:
                found |= {key: self._trial(one, trial) for key, trial in one.trials.items() if key not in asked_for}
            else:
                found |= {cell.key: cell for cell in self._missing_of(one.cells())}
        return list(found.values())

    def _missing_of(self, cells: Iterable[CellConfig]) -> list[CellConfig]:
        """Those without a result; the others are counted."""
        held = list(cells)
        stand = finished(held[0].out.rpartition("/")[0]) if len(held) > MANY else {config.key for config in held if done(config.out)}
        missing = [config for config in held if config.key not in stand or not kept_all(config)]
        self.kept += len(held) - len(missing)
        return missing

    def excused(self, key: str) -> bool:
        """True for a trial that diverged: that is a result of its search, not a failure of the study."""
        return key in self.held and math.isnan(self.held[key].value)

    # -- one setting

    def _begun(self, setting: Setting) -> Chosen:
        _, strategy = asked(setting.strategy)
        return Chosen(setting, steps_of(setting), strategy, setting.task)

    def _advance(self, one: Chosen) -> None:
        """Go on with the results that stand: answers, trials that are missing, or all searches done."""
        while one.steps and not one.failed:
            search = search_of(one.setting, one.steps[0])
            key = digest(self._asked(one, search))[:KEY_DIGITS]
            url = storage.join(one.setting.study.out, "analyses", key, FILE)
            held = parse(storage.read_json(url), Answer, url) if storage.exists(url) else None
            if held is None:
                one.trials = self._missing(one, search)
                if one.trials or one.failed:
                    for trial in one.trials:
                        if one not in self.waiting.setdefault(trial, []):
                            self.waiting[trial].append(one)
                    return
                try:
                    held = self._answer(one, search)
                except WorkError as error:
                    one.failed = str(error)
                    return
                if self.keep:
                    storage.put(url, canonical_json(held))
            one.answers.append(key)
            self._choose(one, held)

    def _missing(self, one: Chosen, search: Search) -> dict[str, Trial]:
        """The trials that the search asks for, by key; results that stand are taken in first."""
        while trials := propose(search, one.results):
            missing: dict[str, Trial] = {}
            for trial in trials:
                config = self._trial(one, trial)
                if config.key not in self.looked_for:  # once: what ends later is told
                    self.looked_for.add(config.key)
                    if done(config.out):
                        self.held[config.key] = outcome(config)
                if config.key in self.broken:
                    one.failed = self.broken[config.key]
                elif config.key in self.held:
                    one.results[trial] = self.held[config.key]
                else:
                    missing[config.key] = trial
            if missing or one.failed:
                return missing
        return {}

    def _trial(self, one: Chosen, trial: Trial) -> CellConfig:
        if trial.epochs == 0:
            # Of the source on the task's data alone, so that all of its searches there ask for the same.
            whole = replace(one.setting, strategy={"name": "full"}, fraction=1.0, shuffled=False)
            return plan.cell(whole, trial.seed, role="similarity")
        strategy = one.strategy if trial.cut is None else {**one.strategy, "cut": trial.cut}
        return plan.cell(one.setting, trial.seed, strategy, _with(one, lr=trial.lr, epochs=trial.epochs), "trial")

    def _choose(self, one: Chosen, held: Answer) -> None:
        one.results.clear()
        one.trials = {}
        if one.steps.pop(0) == "cut":
            one.strategy = {**one.strategy, "cut": held.choice}
        else:
            one.task = _with(one, lr=held.choice)

    def _asked(self, one: Chosen, search: Search) -> dict[str, Any]:
        """What an answer stands for: everything that its trials' keys hold but the seed, and the way of searching."""
        return {
            "setting": plan.identity(one.setting, 0, one.strategy, one.task),
            # What guides it is named only where something does, so that other answers keep their keys.
            "search": [search.kind, search.candidates, search.seeds, search.epochs, search.first]
            + ([search.similarity] if search.similarity else []),
        }

    def _answer(self, one: Chosen, search: Search) -> Answer:
        about = {
            "architecture": one.setting.architecture,
            "source": one.setting.source,
            "source_seed": one.setting.weights.seed if one.setting.weights else None,
            "strategy": one.strategy,
            "task": one.task.task,
            "dataset": one.task.dataset,
            "fraction": one.setting.fraction,
            "resolution": one.setting.resolution,
            "shuffle_labels": one.setting.shuffled,
        }
        return answer(search, one.results, one.task.metric).model_copy(update={"about": about})


def _cells_of(chosen: Iterable[Chosen]) -> list[CellConfig]:
    known = [one for one in chosen if not one.steps and one.setting.stands]
    return list({config.key: config for one in known for config in one.cells()}.values())


def outcome(config: CellConfig) -> Outcome:
    """What a finished trial reached."""
    held = storage.read_json(storage.join(config.out, "result.json"))
    if config.role == "similarity":
        return Outcome(math.nan, similarity={row["class"]: row["value"] for row in held["metrics"]})
    values = {row["metric"]: row["value"] for row in held["metrics"] if not row["class"] and row["value"] is not None}
    metric = config.task.metric
    return Outcome(values.get(metric, math.nan), values.get(f"{metric}_error", math.nan), held["params"], held["selection"]["epochs"])


def most(settings: Iterable[Setting]) -> tuple[int, int, int]:
    """How many searches, the trials that they take at most, and those of trying everything."""
    found = [search_of(setting, step) for setting in settings for step in steps_of(setting)]
    return len(found), sum(map(most_trials, found)), sum(len(search.candidates) * len(search.seeds) for search in found)


def _with(one: Chosen, **changes: Any) -> Task:
    """The task with keys of the recipe that this strategy trains by set otherwise."""
    given, recipe = {name: value for name, value in changes.items() if value is not None}, STRATEGIES[one.strategy["name"]].trains_by
    if not given or recipe is None:
        return one.task
    return one.task.model_copy(update={recipe: getattr(one.task, recipe).model_copy(update=given)})
