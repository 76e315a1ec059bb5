"""Comparisons of a study, each made once: what was computed before is kept, and what is new is shared out over the machine's processors.

    held = Comparisons(out, bootstrap); held.begin(pairs); result = held.of(cells_a, cells_b, "auroc_mean"); held.write()

OUT/report/comparisons.json, by a key of both sides' cells, the metric with its values, the bootstrap's draws, and the code that computes
it: a comparison whose cells, numbers or code changed is computed again. Only those that were asked for are written back, and of these only
comparisons that could be made from the predictions of every cell: what could not be read today may be there tomorrow.
"""

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

from pydantic import RootModel, ValidationError

from analysis.loaded import Loaded
from analysis.replicates import Bootstrap
from analysis.results import Cell
from analysis.statistics import Comparison, compare
from base import storage
from base.config import digest
from base.errors import WorkError

CODE = ("statistics", "components", "replicates", "loaded")  # modules that decide a comparison
FEW = 400  # cells under which other processes take longer to start than the comparisons
MOST = 8  # processes, each of which holds some hundred megabytes

Pair = tuple[Sequence[Cell], Sequence[Cell], str]  # both sides, and the metric


class Kept(RootModel[dict[str, Comparison]]):
    """OUT/report/comparisons.json."""


@cache
def code() -> str:
    """The version of what computes a comparison."""
    folder = Path(__file__).parent
    return digest([(folder / f"{name}.py").read_text() for name in CODE])


class Comparisons:
    """Those of one study. computed: how many were not there."""

    def __init__(self, out: str, bootstrap: Bootstrap) -> None:
        self.url, self.bootstrap = storage.join(out, "report", "comparisons.json"), bootstrap
        self._held = _standing(self.url)
        self._asked: dict[str, Comparison] = {}
        self._whole: set[str] = set()  # keys of those that may be kept
        self._coming: dict[str, tuple[Future[list[tuple[Comparison, bool]]], int]] = {}  # and its place in a job
        self._load = Loaded()
        self._pool: ProcessPoolExecutor | None = None
        self.computed = 0

    @property
    def fresh(self) -> bool:
        """Nothing is kept from an earlier report."""
        return not self._held

    def ready(self, cells: int) -> None:
        """Start the other processes before the cells are known, where so many will be compared for the first time: they import for as long
        as it takes to read these."""
        processes = min(os.cpu_count() or 1, MOST)
        if self._pool is None and processes > 1 and cells >= FEW:
            settings = (self.bootstrap.replicates, self.bootstrap.seed)
            # Not forked: the process that writes a report may have threads of Ray and of storage clients.
            self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, settings)
            for _ in range(processes):  # each starts with a call of its own
                self._pool.submit(os.getpid)

    def begin(self, pairs: Iterable[Pair]) -> None:
        """Where those that are new are many, have them made by other processes while this one goes on; `of` waits for what it gives."""
        new = {key: pair for pair in pairs if (key := self._key(*pair)) not in self._held}
        self.ready(len({cell.key for a, b, _ in new.values() for cell in (*a, *b)}))
        if self._pool is None:
            return  # `of` does it
        groups: dict[tuple[str, str], list[str]] = {}
        for key, (a, _, _) in new.items():
            groups.setdefault((str(a[0].task), str(a[0].group)), []).append(key)  # of one task together: they share the draws
        keys = [groups[group] for group in sorted(groups)]
        jobs = [[([_bare(cell) for cell in a], [_bare(cell) for cell in b], m) for a, b, m in map(new.__getitem__, held)] for held in keys]
        for held, job in zip(keys, jobs, strict=True):
            try:
                made = self._pool.submit(_in_worker, job)
            except BrokenProcessPool as error:
                raise self._ended() from error
            self._coming |= {key: (made, place) for place, key in enumerate(held)}

    def end(self) -> None:
        """Nothing more is asked for: what is not made yet will not be."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def of(self, a: Sequence[Cell], b: Sequence[Cell], metric: str) -> Comparison:
        """`compare` of the two sides' predictions, which are read only where it was not made before."""
        key = self._key(a, b, metric)
        if key in self._held and key not in self._asked:
            self._asked[key] = self._held[key]
            self._whole.add(key)
        elif key not in self._asked:
            self._keep(key, *(self._made(key) or computed((a, b, metric), self.bootstrap, self._load)))
        return self._asked[key]

    def _made(self, key: str) -> tuple[Comparison, bool] | None:
        made, place = self._coming.pop(key, (None, 0))
        try:
            return None if made is None else made.result()[place]
        except BrokenProcessPool as error:
            raise self._ended() from error

    def _ended(self) -> WorkError:
        why = "a process that made comparisons was ended from outside, perhaps for want of memory"
        return WorkError(why, where=self.url, hint="the same command again, with less beside it")

    def write(self) -> None:
        """What was asked for and is whole, and no more."""
        held = Kept({key: found for key, found in self._asked.items() if key in self._whole})
        storage.put(self.url, held.model_dump_json() + "\n")

    def _key(self, a: Sequence[Cell], b: Sequence[Cell], metric: str) -> str:
        sides = [[[cell.key, repr(cell.value(metric))] for cell in _in_order(side)] for side in (a, b)]
        return digest([code(), metric, self.bootstrap.replicates, self.bootstrap.seed, sides])[:24]

    def _keep(self, key: str, found: Comparison, whole: bool) -> None:
        self._asked[key] = found
        self._whole |= {key} if whole else set()
        self.computed += 1


def _standing(url: str) -> dict[str, Comparison]:
    """What was kept; nothing of a file that is damaged or that another version wrote: all of it is computed again."""
    raw = storage.read_or_none(url)
    try:
        return {} if raw is None else Kept.model_validate_json(raw).root
    except ValidationError:
        return {}


def _in_order(side: Sequence[Cell]) -> list[Cell]:
    """The same cells are the same side."""
    return sorted(side, key=lambda cell: cell.key)


def computed(pair: Pair, bootstrap: Bootstrap, load: Loaded) -> tuple[Comparison, bool]:
    """The comparison, and whether the predictions of every cell were there."""
    *sides, metric = pair
    one, two = ([held for cell in _in_order(side) if (held := load(cell)) is not None] for side in sides)
    found = compare(one, two, metric, bootstrap=bootstrap)
    return found, [len(one), len(two)] == [len(side) for side in sides] and found.basis != "not comparable"


def _bare(cell: Cell) -> Cell:
    """A cell with no more than its predictions are read by: its metrics are most of it, and a process is sent thousands."""
    names = {name: cell.result.get(name) for name in ("key", "seed", "source_seed")}
    return Cell(cell.url, {**names, "metrics": [{"class": label, "metric": "", "split": ""} for label in cell.measured]})


_worker: list[tuple[Bootstrap, Loaded]] = []  # of a process of the pool, what its groups share


def _begin(replicates: int, seed: int) -> None:
    _worker.append((Bootstrap(replicates, seed), Loaded()))


def _in_worker(pairs: Sequence[Pair]) -> list[tuple[Comparison, bool]]:
    bootstrap, load = _worker[0]
    bootstrap.forget()
    return [computed(pair, bootstrap, load) for pair in pairs]
