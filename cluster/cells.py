"""The cells of a study: settings come in as their data and weights do, trials and cells run on one pool, plan.json says what is asked for.

feed.waiting.put(settings); feed.waiting.put(None)        # from the nodes of what they need
fanned = CellStage(study, searches, feed, progress, events, check).run(reserved)
write_plan(study.out, searches)
"""

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.planned import Plan, PlannedCell
from analysis.results import plan
from base import storage
from base.config import canonical_json
from cluster.changes import SAME
from cluster.events import Events
from cluster.plan import Setting
from cluster.progress import Progress, minutes
from cluster.searches import Searches
from cluster.study import Study
from finetune.cell import CellConfig

if TYPE_CHECKING:
    from cluster.fanout import Tally

SHOWN = 4  # tasks and sources whose cells have become ready
PLAN_S = 30.0  # how often plan.json is written anew while cells run


@dataclass
class Feed:
    """Settings whose data and weights have come to stand, on their way to the pool of cells."""

    waiting: queue.SimpleQueue[list[Setting] | None] = field(default_factory=queue.SimpleQueue)  # None: no more will come
    closed: bool = False

    def take(self) -> list[Setting] | None:
        """What has come since; None once all has been taken."""
        found: list[Setting] = []
        while not self.closed and not self.waiting.empty():
            settings = self.waiting.get()
            self.closed = settings is None
            found += settings or []
        return None if self.closed and not found else found


@dataclass
class Fanned:
    """What became of the cells. failed: reasons by description."""

    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    deaths: int = 0


class CellStage:
    """The trials and cells that are missing, on one pool: those that can be computed do not wait for encoders that are still trained, nor
    for searches that still ask.

    check: raises where the study has ended meanwhile.
    """

    def __init__(self, study: Study, searches: Searches, feed: Feed, progress: Progress, events: Events, check: Callable[[], None]) -> None:
        self.study, self.searches, self.feed = study, searches, feed
        self.progress, self.events, self.check = progress, events, check
        self.made = Fanned()
        self._known: dict[str, CellConfig] = {}
        self._planned, self._planned_at = 0, -PLAN_S  # cells that plan.json was last written with, and when

    def run(self, reserved: Callable[[], Mapping[str, float]]) -> Fanned:
        """Until no cell is missing and no more settings will come.

        Args:
            reserved: what the pool has to leave of the cluster.
        """
        from cluster.fanout import run_cells

        tally = run_cells((), self.study.resources, self._show, self._told, self._more, reserved)
        self._conclude(tally)
        return self.made

    def _more(self) -> list[CellConfig] | None:
        self.check()
        settings = self.feed.take()
        if not settings:
            return None if settings is None else []
        kept, found = self.searches.kept, self._asked(self.searches.fill(settings))
        begun = sum(config.role == "cell" for config in found)
        asking = f", {len(self.searches.open)} searches to answer first" if self.searches.open else ""
        of = list(dict.fromkeys(f"{one.task.task} {one.source}" for one in settings))
        others = f" and {len(of) - SHOWN} more" if len(of) > SHOWN else ""
        self.progress.say(f"cells: {self.searches.kept - kept} kept, {begun} new{asking} ({', '.join(of[:SHOWN])}{others})")
        return found

    def _told(self, config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        self.made.new += problem is None and config.role == "cell"
        return self._asked(self.searches.told(config, problem))

    def _asked(self, found: list[CellConfig]) -> list[CellConfig]:
        self._known.update({config.key: config for config in found})
        return found

    def _show(self, tally: "Tally") -> None:
        self.check()
        if len(self._known) > self._planned and time.monotonic() - self._planned_at >= PLAN_S:
            write_plan(self.study.out, self.searches, ended=False)
            self._planned, self._planned_at = len(self._known), time.monotonic()
        if not tally.running:  # there are none yet, or they wait for a pretraining to end
            self.progress.gone("cells")
            return
        counts = f"{tally.done} done, {tally.running} running, {len(tally.failed)} failed, {tally.left} left, to go {minutes(tally.eta_s)}"
        waiting = sum(len(one.setting.seeds) for one in self.searches.foreseen)
        self.progress.line(f"cells: {counts}" + (f", and {waiting} that wait for data or encoders" if waiting else ""), of="cells")

    def _conclude(self, tally: "Tally") -> None:
        made, searches, add = self.made, self.searches, self.events.add
        reasons = {key: reason for key, reason in tally.failed.items() if not searches.excused(key)}
        made.failed = {f"{_words(self._known[key])} ({key})": reason for key, reason in reasons.items()}
        made.failed |= {f"{one.setting.words()} (cells without a {one.steps[0]})": str(one.failed) for one in searches.open}
        for key, reason in reasons.items():
            add("cell failed", key=key, reason=reason)
        for key, tried in tally.retried.items():
            add("cell tried again", key=key, reasons=tried)
        for one in searches.chosen:
            for key in one.answers:
                add("searched", key=key, setting=one.setting.words())
        if tally.deaths:
            self.progress.say(f"cells: {tally.deaths} worker(s) died and were replaced")
        made.deaths = tally.deaths
        self.progress.say(f"cells: {tally.done} done, {len(reasons)} failed")
        add("cells", done=tally.done, failed=len(made.failed), deaths=tally.deaths)


def _words(config: CellConfig) -> str:
    trial = f"{config.role} of " if config.role != "cell" else ""
    return f"{trial}{config.task.task} {config.source} {config.strategy['name']} seed {config.seed}"


def write_plan(out: str, searches: Searches, ended: bool = True) -> None:
    """OUT/plan.json: every cell that the study asks for, so that a report knows what is missing and what is no longer asked for.

    Args:
        ended: False while data or encoders may yet come to stand: a cell without a key then keeps the one that an earlier driver knew.
    """
    rows = list(searches.rows())
    if not ended:
        same = PlannedCell.model_fields.keys()  # another version may have written another format
        known = {_called(row): row for row in plan(out) if row["key"] and row.keys() == same}
        rows = [row if row["key"] else known.get(_called(row), row) for row in rows]
    storage.put(storage.join(out, "plan.json"), Plan.model_validate(rows).model_dump_json(indent=1))


def _called(row: Mapping[str, Any]) -> str:
    """What a cell is called before and after its searches have answered."""
    return canonical_json([row.get("asked") or row["options"], *(row[name] for name in SAME if name != "options")])
