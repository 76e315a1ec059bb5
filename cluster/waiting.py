"""The line of cells that wait: trials before cells, since others wait for their answers, and the longest first.

    line = Line(cost=estimated)
    line.add(configs)
    waiting = line.next()
    line.again(waiting, "its worker died (SIGKILL)", guilty=True)     # False: it has had its attempts

Knows nothing of Ray: the fan-out takes from it, and so does the simulation of benchmarks/scale.py.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from finetune.cell import CellConfig

ATTEMPTS = 3  # of a cell whose worker dies under it
LOSSES = 10  # of a cell under which nodes die, or that storage lets down: that is no fault of the cell, and yet it must end


@dataclass(order=True)
class Waiting:
    """A cell in the line. reasons: why it was tried again, an entry for each attempt before this one."""

    turn: tuple[int, int, float, int]
    config: CellConfig = field(compare=False)
    cost: float = field(compare=False)
    attempts: int = field(default=0, compare=False)
    losses: int = field(default=0, compare=False)
    let_down: float = field(default=-math.inf, compare=False)  # when storage did so last
    alone: bool = field(default=False, compare=False)  # it wants a GPU for itself, whatever was measured
    reasons: list[str] = field(default_factory=list, compare=False)


class Line:
    """Cells by their turn. cost: what a cell takes, in any unit."""

    def __init__(self, cost: Callable[[CellConfig], float]) -> None:
        self._cost = cost
        self._heap: list[Waiting] = []
        self._resting: list[tuple[float, Waiting]] = []
        self._arrived = 0

    def __len__(self) -> int:
        """How many can go now."""
        return len(self._heap)

    @property
    def resting(self) -> int:
        """How many are to be tried again later."""
        return len(self._resting)

    def add(self, configs: Iterable[CellConfig]) -> list[Waiting]:
        """They wait from now on."""
        added = []
        for config in configs:
            cost = self._cost(config)
            added.append(Waiting((0, config.role == "cell", -cost, self._arrived), config, cost))
            heapq.heappush(self._heap, added[-1])
            self._arrived += 1
        return added

    @property
    def first(self) -> Waiting:
        """Whose turn it is; it stays."""
        return self._heap[0]

    def next(self) -> Waiting:
        """Whose turn it is; it leaves."""
        return heapq.heappop(self._heap)

    def again(self, waiting: Waiting, reason: str, *, guilty: bool, counts: bool = True, until: float = 0.0) -> bool:
        """Back into the line for another attempt; False when it has had all of them.

        Args:
            guilty: it may have killed its worker, so it goes behind those that have not; otherwise it keeps its turn.
            counts: as one of its attempts.
            until: it rests until then, by the clock of `wake`.
        """
        waiting.reasons.append(reason)
        waiting.attempts += guilty
        waiting.losses += counts and not guilty
        if waiting.attempts >= ATTEMPTS or waiting.losses >= LOSSES:
            return False
        waiting.turn = (waiting.attempts, *waiting.turn[1:])
        if until:
            self._resting.append((until, waiting))
        else:
            heapq.heappush(self._heap, waiting)
        return True

    def wake(self, now: float) -> None:
        """Those that have rested wait again."""
        for waiting in [waiting for until, waiting in self._resting if until <= now]:
            heapq.heappush(self._heap, waiting)
        self._resting = [(until, waiting) for until, waiting in self._resting if until > now]
