"""What each rank takes of a step for itself, so that a slow one has a name.

    pace = Pace()
    with pace.measured(logged): ...             # a whole step, its data included; on all ranks
    row |= pace.read()                          # {"rank_s": [0.21, 0.20, 0.35], "slowest_rank": 2}

A step ends on all ranks at once: one that is late makes the others wait for it in the next sum over ranks. A rank's own time is the step's
without what it spent inside of collectives. Only logged steps are measured: on a GPU the device is waited for before and after each.
"""

import functools
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from engine import ranks

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "reduce_scatter_tensor", "all_to_all_single")
SLOW = 1.5  # times the median of the other ranks
LEAST_S = 0.05  # by which it is slower: less is noise
IN_A_ROW = 3


class Pace:
    """Own seconds of each rank. One process is never slow."""

    def __init__(self) -> None:
        self._own = 0.0
        self._slow: dict[int, int] = {}
        self._hosts: list[str] = []

    @contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Inside is one step."""
        if not wanted or ranks.world() == 1:
            yield
            return
        waited = [0.0]
        calls = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, call in calls.items():
            setattr(dist, name, _timed(call, waited))
        start = time.perf_counter()
        try:
            yield
        finally:
            for name, call in calls.items():
                setattr(dist, name, call)
            _settle()
            self._own = time.perf_counter() - start - waited[0]

    def read(self) -> dict[str, Any]:
        """Of the newest step that was measured, the same on all ranks, which all call it; nothing for one process."""
        if ranks.world() == 1:
            return {}
        own = ranks.all_gather(torch.tensor([self._own], dtype=torch.float64, device=ranks.device())).tolist()
        return {"rank_s": [round(value, 4) for value in own], "slowest_rank": max(range(len(own)), key=own.__getitem__)}

    def stragglers(self, rank_s: list[float]) -> list[dict[str, Any]]:
        """Ranks that have now been slower than the others in `IN_A_ROW` readings in a row, each said once until it recovers."""
        if not self._hosts:
            self._hosts = _hosts()
        found = []
        for rank, own in enumerate(rank_s):
            usual = statistics.median(rank_s[:rank] + rank_s[rank + 1 :])
            self._slow[rank] = self._slow.get(rank, 0) + 1 if own > max(SLOW * usual, usual + LEAST_S) else 0
            if self._slow[rank] == IN_A_ROW:
                found.append({"rank": rank, "host": self._hosts[rank], "own_s": own, "others_s": usual})
        return found


def words(row: dict[str, Any]) -> str:
    """One of `stragglers`, with its step, as a sentence."""
    where = f"rank {row['rank']} on {row['host']} at step {row['step']}"
    return f"{where} took {row['own_s']:.2f} s a step for itself, the others {row['others_s']:.2f} s"


def _timed(call: Callable[..., Any], waited: list[float]) -> Callable[..., Any]:
    @functools.wraps(call)
    def inner(*args: Any, **kwargs: Any) -> Any:
        _settle()
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            _settle()
            waited[0] += time.perf_counter() - start

    return inner


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _hosts() -> list[str]:
    names: list[Any] = [None] * ranks.world()
    dist.all_gather_object(names, socket.gethostname())
    return [str(name) for name in names]
