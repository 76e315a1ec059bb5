"""results.csv: every metric of every finished cell of a study, a row each, in a fixed order.

url = write_results(out)
"""

import functools
import math
from collections.abc import Iterable, Sequence

from analysis.results import Cell, finished, number, read_json, read_study
from base import storage

COLUMNS = ["study", "key", "architecture", "source", "source_seed", "strategy", "options", "task", "dataset", "split", "fraction"]
COLUMNS += ["resolution", "seed", "class", "metric", "unit", "value", "n", "params", "macs", "seconds", "run_id", "apart"]
ORDER = ("architecture", "source", "source_seed", "strategy", "options", "task", "fraction", "resolution", "seed", "key")


def write_results(out: str, cells: Sequence[Cell] | None = None) -> str:
    """Write OUT/report/results.csv and return its address: one row a finished cell and metric, in a fixed order.

    Proportions are fractions (unit "fraction"); `seconds` is the cell's wall time; a metric that could not be computed is empty.
    `apart` says why a cell is evidence for nothing: "own" (its source has seen these labels), "exposed" (maybe these test images), or "".

    Args:
        cells: as `finished(out)` gave them, to save reading twice.
    """
    study, runs = str(read_study(out).get("study", "")), read_json(storage.join(out, "tracking.json")) or {}
    lines = [",".join(COLUMNS)]
    held = finished(out) if cells is None else cells
    for cell in sorted(held, key=lambda cell: tuple(getattr(cell, name) for name in ORDER)):
        r = cell.result
        named = [study, cell.key, r["architecture"], cell.source, cell.source_seed, r["strategy"], cell.options, r["task"]]
        run = runs.get(cell.key, "") if isinstance(runs, dict) else ""
        head, tail = _line([*named, r.get("dataset")]), _line([r.get("params"), r.get("macs"), r.get("seconds"), run, cell.apart])
        at = _line([r["fraction"], r["resolution"], r["seed"]])
        rows = r.get("metrics", [])
        asked = tuple((row["split"], row["metric"], row.get("class") or "", row.get("unit") or "") for row in rows)
        for place, split, measured in _places(asked):
            value, n = number(rows[place].get("value")), rows[place].get("n")
            shown = repr(value) if math.isfinite(value) else ""
            lines.append(f"{head},{split},{at},{measured},{shown},{'' if n is None else n},{tail}")
    url = storage.join(out, "report", "results.csv")
    storage.put(url, "\n".join(lines) + "\n")
    return url


def _line(values: Iterable[object]) -> str:
    return ",".join("" if value is None else _field(str(value)) for value in values)


@functools.lru_cache
def _places(rows: tuple[tuple[str, str, str, str], ...]) -> list[tuple[int, str, str]]:
    """Of rows (split, metric, class, unit) in the file's order: place, split, and the fields class, metric, unit. The same for thousands of
    cells."""
    ordered = sorted(range(len(rows)), key=lambda place: rows[place][:3])
    return [(place, rows[place][0], f"{_field(rows[place][2])},{rows[place][1]},{rows[place][3]}") for place in ordered]


@functools.lru_cache
def _field(text: str) -> str:
    """A text as a field of CSV, quoted where it must be (RFC 4180)."""
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in ',"\r\n') else text
