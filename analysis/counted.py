"""Which cells are evidence, those that other cells of their setting failed beside left out: a selection is none.

counted(out, cells); counts(result, study.exposed); failed_beside(rows, failed)
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from analysis import results
from analysis.diary import failures
from analysis.results import Cell
from base import storage


def setting_of(row: Mapping[str, Any]) -> list[Any]:
    """What two rows of a plan must share for their sources to be compared, the architecture first.

    Of a search the strategy as it was asked for: sources whose cuts it chose otherwise are compared all the same.
    """
    return [*(row[name] for name in ("architecture", "strategy", "task", "fraction", "resolution")), row.get("asked") or row.get("options")]


def failed_beside(rows: Sequence[Mapping[str, Any]], failed: Collection[str]) -> dict[str, int]:
    """By the key of a cell how many cells of its source in its setting failed, where any did."""
    groups: dict[str, list[str]] = {}
    for row in rows if failed else ():
        groups.setdefault(results.canonical([*setting_of(row), row["source"]]), []).append(row["key"])
    return {key: lost for keys in groups.values() if (lost := sum(key in failed for key in keys)) for key in keys}


def losses(out: str) -> dict[str, int]:
    """`failed_beside` of the cells whose last attempt failed."""
    done = storage.holding(storage.join(out, "cells"), "result.json")
    return failed_beside(results.expected(out), failures(out).keys() - set(done))


def counts(result: Mapping[str, Any], exposed: str) -> bool:
    """Whether a result is that of a cell, of true labels, and not apart. exposed: the study's setting of that name."""
    return result.get("role", "cell") == "cell" and not result.get("shuffle_labels") and not results.apart(result, exposed)


def counted(out: str, cells: Iterable[Cell]) -> list[Cell]:
    """Cells that sources may be ranked by: none that is apart or of a setting that lost another of its source."""
    beside = losses(out)
    return [cell for cell in cells if not cell.apart and cell.key not in beside]
