"""The fan-out: thousands of cells on a pool of warm workers, each of which imports torch once.

    tally = run_cells(configs, resources, report, told, more)

Ray keeps nothing that matters: a cell is done when its result.json stands in storage. A cell that raises is recorded and the others go on.
A worker that dies is replaced and its cell tried again, behind those that killed nobody; after three deaths the cell has failed. A node
that dies, or a store that does not answer, is no fault of the cell: it keeps its turn, and is tried more often, while a store answers no
cell as often as it takes.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from base.config import canonical_json
from base.errors import WorkError
from cluster import observe
from cluster.effort import estimated
from cluster.pool import Event, Pool, Team
from cluster.study import Resources
from cluster.waiting import Line, Waiting
from cluster.worker import StorageDown
from finetune.cell import CellConfig

LOOK_S = 0.5  # how often others are asked for cells, and for what they hold back
ROOM_S = 5.0  # how often the cluster is asked for its size
LONGEST_REST_S = 30.0  # before a cell that storage let down is tried again
OUTAGE_S = 3600.0  # of a store, for which cells wait: workers that wait cost money, and what never ends must be told
STARTS = 5  # workers that may die in a row before any has started


@dataclass
class Tally:
    """Counts for the progress line, and what went wrong. retried: why a cell was tried again, by its key, a reason an attempt."""

    total: int
    done: int = 0
    running: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    retried: dict[str, list[str]] = field(default_factory=dict)
    deaths: int = 0
    started: float = field(default_factory=time.monotonic)
    cost: float = 0.0  # of all cells, by their estimate
    cost_ended: float = 0.0

    @property
    def left(self) -> int:
        return self.total - self.done - len(self.failed) - self.running

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the pace so far, by what cells were estimated to take; None before the first has ended."""
        if not self.cost_ended:
            return None
        return (time.monotonic() - self.started) / self.cost_ended * (self.cost - self.cost_ended)


def run_cells(
    configs: Sequence[CellConfig],
    resources: Resources,
    report: Callable[[Tally], None],
    told: Callable[[CellConfig, Exception | None], Sequence[CellConfig]] | None = None,
    more: Callable[[], Sequence[CellConfig] | None] | None = None,
    reserved: Callable[[], Mapping[str, float]] = dict,
) -> Tally:
    """Compute the cells; returns when every one is done or has failed, those that were added meanwhile included.

    Args:
        report: called whenever something has changed, and twice a second.
        told: called with each cell that ended, and with its error where it failed; returns cells that became ready by it.
        more: asked twice a second for cells that became ready otherwise; None says that no more will come.
        reserved: what others hold back now, {"CPU": ..., "GPU": ...}: workers beyond what is left rest, and their place is given back.

    Raises:
        WorkError: no worker can be started.
    """
    fanout = Fanout(resources, report, told)
    fanout.add(configs)
    if fanout.line or more is not None:
        try:
            fanout.work(more, reserved)
        finally:
            fanout.pool.close()
    return fanout.tally


class Fanout:
    """The state of one fan-out: who waits, who runs where, what cells were seen to need."""

    def __init__(self, resources: Resources, report: Callable[[Tally], None], told: Any) -> None:
        self.tally = Tally(total=0)
        self.line = Line(cost=estimated)
        self.pool = Pool(resources)
        self._report, self._told = report, told
        self._running: dict[Team, Waiting] = {}
        self._gpu_bytes: dict[tuple[Any, ...], int] = {}
        self._unstarted = 0
        self._succeeded = time.monotonic()  # when a cell last did
        self._down: float | None = None  # since when storage has let cells down and none has succeeded

    def add(self, configs: Sequence[CellConfig]) -> None:
        """Cells that are to run, too."""
        for waiting in self.line.add(configs):
            self.tally.total += 1
            self.tally.cost += _finite(waiting.cost)

    def work(self, more: Callable[[], Sequence[CellConfig] | None] | None, reserved: Callable[[], Mapping[str, float]]) -> None:
        """Until nothing waits, rests, runs or is to come."""
        size, measured_at, asked_at = 0, -ROOM_S, -LOOK_S
        held: Mapping[str, float] = {}
        while True:
            now = time.monotonic()
            if more is not None and now - asked_at >= LOOK_S:
                asked_at, found = now, more()
                if found is None:
                    more = None
                self.add(found or ())
            if (wanted := reserved()) != held or now - measured_at >= ROOM_S:
                held, measured_at = dict(wanted), now
                size = self.pool.size(held)
            self.line.wake(now)
            self._assign(size)
            self.tally.running = len(self._running)
            self._show()
            if not (self.line or self.line.resting or self._running or more):
                return
            for event in self.pool.events(LOOK_S):
                self._on(event)

    def _show(self) -> None:
        tally = self.tally
        self._report(tally)
        observe.tell(
            cells_done=tally.done,
            cells_failed=len(tally.failed),
            cells_running=tally.running,
            cells_waiting=tally.left,
            cells_retried=len(tally.retried),
            cells_to_go_seconds=tally.eta_s or 0.0,
            worker_deaths=tally.deaths,
        )

    def _assign(self, size: int) -> None:
        self.pool.shrink(size)  # first: a worker that is always given the next cell would never make room
        while self.line and (team := self.pool.choose(self._needs(self.line.first))) is not None:
            needs, waiting = self._needs(self.line.first), self.line.next()
            self._running[team] = waiting
            config = waiting.config.model_copy(update={"workers": self.pool.resources.cell_ranks})
            self.pool.give(team, canonical_json(config), needs)
        self.pool.provide(len(self.line), self._needs(self.line.first) if self.line else 0.0, size)

    def _on(self, event: Event) -> None:
        if event.started:
            self._unstarted = 0
            return
        waiting = self._running.pop(event.team, None)
        if waiting is None:
            self._unstarted += event.guilty
            if self._unstarted >= STARTS:
                raise WorkError(f"no worker can be started: {event.lost}", hint="allograft doctor")
            return
        config = waiting.config
        if event.spent is not None:
            self._gpu_bytes[kind(config)] = max(event.spent.gpu_bytes, self._gpu_bytes.get(kind(config), 0))
            self.tally.done += 1
            self._succeeded, self._down = time.monotonic(), None
            labels = {"task": config.task.task, "strategy": str(config.strategy["name"])}
            observe.tell(labels, cell_images=event.spent.images, cell_seconds=event.spent.seconds)
            self._ended(waiting, None)
        elif event.lost is not None:
            self.tally.deaths += 1
            problem = WorkError(_in_words([*waiting.reasons, event.lost]))
            self._again(problem, waiting, event.lost, guilty=event.guilty)
        elif isinstance(event.error, StorageDown):
            now, rest_s = time.monotonic(), min(LONGEST_REST_S, 2.0 ** min(10, len(waiting.reasons)))
            # While it lets every cell down, storage is away; a cell that it lets down though others succeed has a reason of its own.
            self._down = self._down or now
            counts = waiting.let_down < self._succeeded or now - self._down > OUTAGE_S
            waiting.let_down = now
            self._again(event.error, waiting, str(event.error), counts=counts, until=now + rest_s)
        elif _out_of_memory(event.error) and self.pool.beside(event.team):
            waiting.alone = True
            self._again(event.error, waiting, "no memory was left on the GPU that it shared with others")
        else:
            self._failed(waiting, event.error)

    def _again(self, problem: Any, waiting: Waiting, reason: str, *, guilty: bool = False, counts: bool = True, until: float = 0.0) -> None:
        """Another attempt, unless it has had all of them."""
        if not self.line.again(waiting, reason, guilty=guilty, counts=counts, until=until):
            self._failed(waiting, problem)
        else:
            self.tally.retried[waiting.config.key] = waiting.reasons

    def _failed(self, waiting: Waiting, problem: Any) -> None:
        self.tally.failed[waiting.config.key] = str(problem)
        self._ended(waiting, problem)

    def _ended(self, waiting: Waiting, problem: Exception | None) -> None:
        self.tally.cost_ended += _finite(waiting.cost)
        self.add(self._told(waiting.config, problem) if self._told else ())

    def _needs(self, waiting: Waiting) -> float:
        """Bytes of GPU memory: what cells of its kind took at most, or all of them where none has run."""
        return math.inf if waiting.alone else self._gpu_bytes.get(kind(waiting.config), math.inf)


def kind(config: CellConfig) -> tuple[Any, ...]:
    """What cells share that take the same memory."""
    batch = config.task.recipe.batch
    return config.architecture, canonical_json(config.strategy), config.task.task, config.resolution, config.dtype, batch


def _finite(cost: float) -> float:
    return cost if math.isfinite(cost) else 0.0


def _out_of_memory(error: BaseException | None) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _in_words(reasons: Sequence[str]) -> str:
    """What became of the attempts of a cell, equal ones once."""
    counted = Counter(reasons)
    return "; ".join(f"{reason} ({count} times)" if count > 1 else reason for reason, count in counted.items())
