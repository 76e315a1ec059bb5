"""A folder that an analysis fills: tables as CSV, figures as PNG and SVG, and a list of them for analysis.json.

leaf = Leaf(folder)                              # its words go to the screen
leaf.table("runs.csv", "every run", rows); leaf.draw("layers", "SVCCA by layer", text, draw, 7, 3.2)
leaf = Leaf(folder, say=None)                    # a node of a study: silent
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import figures, plots
from analysis.analyses import Drawn, Listed
from base import storage
from base.paths import safe_name
from cluster.screen import table


class Leaf:
    """Writes into `url`. Attributes: figures, tables, notes: what has been written, as analysis.json lists it."""

    def __init__(self, url: str, say: Callable[[str], None] | None = print) -> None:
        self.url, self._say = url, say
        self.figures: list[Drawn] = []
        self.tables: list[Listed] = []
        self.notes: list[str] = []
        self._under = ""

    def under(self, folder: str) -> "Leaf":
        """The same list, with files in a folder of this one."""
        made = Leaf(self.url, self._say)
        made.figures, made.tables, made.notes = self.figures, self.tables, self.notes
        made._under = f"{self._under}{folder}/"
        return made

    def say(self, text: str = "") -> None:
        """A line on the screen."""
        if self._say is not None:
            self._say(text)

    def show(self, rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> None:
        """A table on the screen."""
        if self._say is not None:
            table(rows, heads)

    def table(
        self,
        file: str,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        shown: Sequence[Sequence[str]] = (),
        heads: Sequence[str] = (),
    ) -> None:
        """A CSV file. shown, heads: its main columns as text, for the page."""
        storage.put(storage.join(self.url, self._under + file), pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
        self.tables.append(Listed(file=self._under + file, title=title, heads=list(heads), rows=[list(map(str, row)) for row in shown]))

    def draw(self, file: str, title: str, text: str, draw: plots.Draw, width: float, height: float) -> None:
        """A figure of width x height inches, as PNG and as SVG."""
        place = self._under + file
        storage.put(storage.join(self.url, f"{place}.png"), plots.png(draw, width, height))
        named = safe_name(place.replace("/", "-"))
        storage.put(storage.join(self.url, f"{place}.svg"), figures.alone(figures.svg(named, title, text, width, height, draw)))
        self.figures.append(Drawn(file=place, title=title, text=text))
