"""Comparisons that were computed before: a report of a large study computes only those that are new.

    held = Comparisons(out, bootstrap); result = held.of(cells_a, cells_b, "auroc_mean", load); held.write()

OUT/report/comparisons.json, by a key of both sides' cells, the metric with its values, the bootstrap's draws, and the code that computes
it: a comparison whose cells, numbers or code changed is computed again. Only those that were asked for are written back, and of these only
comparisons that could be made from the predictions of every cell: what could not be read today may be there tomorrow.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from analysis import results
from analysis.results import Cell
from analysis.statistics import Bootstrap, Comparison, Scores, compare
from base import storage
from base.config import digest

CODE = ("statistics", "components", "replicates")  # modules that decide a comparison


@cache
def code() -> str:
    """The version of what computes a comparison."""
    folder = Path(__file__).parent
    return digest([(folder / f"{name}.py").read_text() for name in CODE])


class Comparisons:
    """Those of one study. computed: how many were not there."""

    def __init__(self, out: str, bootstrap: Bootstrap) -> None:
        self.url, self.bootstrap = storage.join(out, "report", "comparisons.json"), bootstrap
        self._held = results.read_json(self.url) or {}
        self._asked: dict[str, Comparison] = {}
        self._whole: set[str] = set()  # keys of those that may be kept
        self.computed = 0

    def of(self, a: Sequence[Cell], b: Sequence[Cell], metric: str, load: Callable[[Cell], Scores | None]) -> Comparison:
        """`compare` of the two sides' predictions, which are read only where it was not made before."""
        a, b = (sorted(side, key=lambda cell: cell.key) for side in (a, b))  # the same cells are the same side
        sides = [[[cell.key, repr(cell.value(metric))] for cell in side] for side in (a, b)]
        key = digest([code(), metric, self.bootstrap.replicates, self.bootstrap.seed, sides])[:24]
        if key not in self._asked:
            if key in self._held:
                row = self._held[key]
                self._asked[key] = Comparison(**{**row, "per_seed": tuple(row["per_seed"])})
                self._whole.add(key)
            else:
                one, two = ([found for cell in side if (found := load(cell)) is not None] for side in (a, b))
                self._asked[key] = compare(one, two, metric, bootstrap=self.bootstrap)
                self.computed += 1
                if len(one) == len(a) and len(two) == len(b) and self._asked[key].basis != "not comparable":
                    self._whole.add(key)
        return self._asked[key]

    def write(self) -> None:
        """What was asked for and is whole, and no more."""
        held = {key: dataclasses.asdict(found) for key, found in self._asked.items() if key in self._whole}
        storage.put(self.url, json.dumps(held) + "\n")
