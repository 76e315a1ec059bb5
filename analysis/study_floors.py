"""Floors of a study's tasks, computed from the shards once and kept in OUT/analyses, and which of its results are under them.

held = of_study(evidence); held.of("phantom-chest", 1.0); held.below, held.known; held.warning()
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from analysis import results
from analysis.floors import Floors, of_shards
from analysis.results import Cell
from base import storage
from base.config import digest
from base.errors import AllograftError

if TYPE_CHECKING:
    from analysis.evidence import Evidence

VERSION = 5
WORDS = {
    "pixels": "pixel logistic regression, 32 px",
    "metadata": "metadata only, no image",
    "record": "age, sex, view and what else is written beside the image, no image",
    "mean_mask": "mean training mask",
    "shuffled": "shuffled labels",
}
OF_IMAGES = (
    "pixels",
    "mean_mask",
    "shuffled",
)  # floors under which nothing was learned; the others say that a network saw no more than its record
CONFOUNDED = 0.6  # plain AUROC is called confounded where metadata alone, without the image, scores more


@dataclass
class StudyFloors:
    """values: by task and share of its labels. notes: on those that are not known."""

    evidence: "Evidence"
    values: dict[tuple[str, float], Floors]
    notes: list[str]

    def of(self, task: str, fraction: float) -> Floors:
        return self.values.get((task, float(fraction)), {})

    def under(self, cells: Sequence[Cell]) -> Floors:
        """Of one setting's cells, also what the same setting reached with shuffled labels."""
        floors, metric = self.of(cells[0].task, cells[0].fraction), results.headline(cells)
        twins = self._shuffled.get(_setting(cells[0]))
        return floors | {"shuffled": {metric: results.mean_sd(c.value(metric) for c in twins)[0]}} if twins and metric else floors

    @cached_property
    def _shuffled(self) -> dict[str, list[Cell]]:
        found: dict[str, list[Cell]] = {}
        for cell in self.evidence.controls:
            found.setdefault(_setting(cell), []).append(cell)
        return found

    def confounded(self, task: str) -> float:
        """What metadata alone score on a task, as plain AUROC, where that is more than CONFOUNDED; else NaN."""
        scores = [results.number(held.get("metadata", {}).get("auroc_mean")) for (of, _), held in self.values.items() if of == task]
        return max((score for score in scores if score > CONFOUNDED), default=math.nan)

    @cached_property
    def _means(self) -> list[list[str]]:
        """Of each mean over seeds of a task's headline metric for which a floor is known, the predictors that do better."""
        found = []
        for cells in results.by(self.evidence.cells, "task").values():
            metric = results.headline(cells)
            for group in results.by(cells, "source", "architecture", "strategy", "options", "fraction", "resolution", "dataset").values():
                mean, _, n = results.mean_sd(c.value(metric) for c in group) if metric else (math.nan, math.nan, 0)
                floors = self.under(group)
                if metric and n and math.isfinite(bar(floors, metric)[0]):
                    found.append(not_reached(floors, metric, mean))
        return found

    @property
    def below(self) -> list[list[str]]:
        """Of each mean that is under a floor, the predictors that do better."""
        return [names for names in self._means if names]

    @property
    def known(self) -> int:
        """Of how many means a floor is known."""
        return len(self._means)

    def warning(self) -> str:
        """What must be known before any number is believed, in words; empty where nothing is under its floor."""
        if not self.below:
            return ""
        image = sum(any(name in OF_IMAGES for name in names) for names in self.below)
        beside = sum(any(name not in OF_IMAGES for name in names) for names in self.below)
        than = {
            "a pixel logistic regression, a mean mask or shuffled labels, which shows nothing learned": image,
            "what is written beside the image, with no image looked at": beside,
        }
        said = [f"{n} {'is' if n == 1 else 'are'} no better than {what}" for what, n in than.items() if n]
        return f"{len(self.below)} of {self.known} results are under a floor: {'; '.join(said)}"


def _setting(cell: Cell) -> str:
    """All but the seeds, the same of a control with shuffled labels."""
    held = [cell.task, cell.source, cell.architecture, cell.strategy, cell.result.get("options"), cell.fraction, cell.resolution]
    return results.canonical(held)


def bar(floors: Floors, metric: str) -> tuple[float, str]:
    """The highest floor of a metric and which predictor set it; NaN where there is none."""
    held = [(results.number(values.get(metric)), name) for name, values in floors.items()]
    return max(((value, name) for value, name in held if math.isfinite(value)), default=(math.nan, ""))


def not_reached(floors: Floors, metric: str, mean: float) -> list[str]:
    """The predictors that do better than a mean."""
    return [name for name, values in floors.items() if mean < results.number(values.get(metric))]


def of_study(evidence: "Evidence", compute: bool = True) -> StudyFloors:
    """Those of every task whose shards are readable; computed where they do not stand in OUT/analyses, or left out."""
    found: dict[tuple[str, float], Floors] = {}
    notes = []
    for (task, dataset), cells in results.by(evidence.cells, "task", "dataset").items():
        manifest = evidence.manifests.get(dataset)
        kind = "segmentation" if any(c.primary() in ("dice", "iou") for c in cells) else "classification"
        labels = list(dict.fromkeys(row["class"] for c in cells for row in c.result.get("metrics", []) if row.get("class")))
        shares = sorted({float(c.fraction) for c in cells})
        if not manifest:
            notes.append(f"Floors of {task} are not known: its shards are not readable from here.")
            continue
        asked = {"floors": VERSION, "kind": kind, "labels": labels, "fractions": shares, "manifest": digest(manifest)}
        mask_class = cells[0].mask_class() if kind == "segmentation" else None
        asked |= {"mask_class": mask_class} if mask_class else {}
        url = storage.join(evidence.out, "analyses", digest(asked)[:16], "floors.json")
        held = results.read_json(url)
        if held is None and not compute:
            continue
        if held is None:
            try:
                strata = evidence.card(dataset).get("stratify_by")
                made = of_shards(evidence.shards[dataset], kind, labels, strata, shares, mask_class=mask_class)
            except (AllograftError, OSError, ValueError) as error:
                notes.append(f"Floors of {task} could not be computed: {str(error)[:200]}")
                continue
            held = {**asked, "values": [{"fraction": fraction, "floors": values} for fraction, values in made.items()]}
            storage.put(url, results.with_nulls(held))
        found |= {(task, float(row["fraction"])): row["floors"] for row in held["values"]}
    return StudyFloors(evidence, found, notes)
