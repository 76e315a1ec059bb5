"""Floors of a study's tasks, computed from the shards once and kept in OUT/analyses, and which of its results are under them.

held = of_study(evidence); held.of("phantom-chest", 1.0); held.standing(cells, "auroc_mean").under; held.below, held.known; held.warning()

Under a floor is what a trivial predictor beats by more than the noise; what is no higher than a floor, and not shown to be under it, is not
above it. Neither says that nothing was learned: a floor is a mean over labels, and one label may be told and another not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from scipy import stats

from analysis import results, secondary
from analysis.floors import Floors, average, of_shards
from analysis.results import Cell
from base import storage
from base.config import digest
from base.errors import AllograftError

if TYPE_CHECKING:
    from analysis.evidence import Evidence

VERSION = 6
ALPHA = 0.05  # of the one-sided test of a mean against a floor
WORDS = {
    "pixels": "pixel logistic regression, 32 px",
    "metadata": "metadata only, no image",
    "record": "age, sex, view and what else is written beside the image, no image",
    "mean_mask": "mean training mask",
    "shuffled": "shuffled labels",
}
OF_IMAGES = ("pixels", "mean_mask", "shuffled")  # floors that images or chance set; the others look at no image
CONFOUNDED = 0.6  # plain AUROC is called confounded where metadata alone, without the image, scores more


RULE = (
    "Under a floor: a trivial predictor does better on these test images by more than both vary (one-sided Welch test at 5 %, uncorrected,"
    " of the runs against the floor's fits on other subsets of the labels, against two or more runs with shuffled labels, or against a"
    " single fit as it is). Not above a floor: the mean is no higher, and that much is not shown, as of one seed. Neither says that"
    " nothing was learned."
)


class Standing(NamedTuple):
    """Where one setting's mean stands. values: of each predictor that it is not above. under: those that are clearly better."""

    values: dict[str, float]
    under: list[str]

    @property
    def words(self) -> str:
        """`under floor 0.687 (pixels)`, `not above floor 0.687 (pixels)`, or nothing."""
        names = self.under or list(self.values)
        if not names:
            return ""
        value = max(self.values[name] for name in names)
        return f"{'under' if self.under else 'not above'} floor {value:.3f} ({', '.join(names).replace('_', ' ')})"


@dataclass
class StudyFloors:
    """fits: by task and share of its labels, one a subset of the training labels. notes: on those that are not known, and on the marks."""

    evidence: "Evidence"
    fits: dict[tuple[str, float], list[Floors]]
    notes: list[str]
    _told: dict[tuple[str, ...], Standing] = field(default_factory=dict, init=False)

    @cached_property
    def values(self) -> dict[tuple[str, float], Floors]:
        """Means over the fits."""
        return {where: average(held) for where, held in self.fits.items()}

    def of(self, task: str, fraction: float) -> Floors:
        return self.values.get((task, float(fraction)), {})

    def under(self, cells: Sequence[Cell]) -> Floors:
        """Of one setting's cells, also what the same setting reached with shuffled labels."""
        floors, metric = self.of(cells[0].task, cells[0].fraction), results.headline(cells)
        twins = self._shuffled.get(_setting(cells[0]))
        return floors | {"shuffled": {metric: results.mean_sd(_runs(twins, metric))[0]}} if twins and metric else floors

    def standing(self, cells: Sequence[Cell], metric: str) -> Standing:
        """Of one setting's cells: the predictors that their mean on test images is not above, and those that it is clearly under."""
        asked = (metric, *(cell.key for cell in cells))  # by findings, tables and the papers' layouts alike
        if asked not in self._told:
            self._told[asked] = self._judged(cells, metric)
        return self._told[asked]

    def _judged(self, cells: Sequence[Cell], metric: str) -> Standing:
        reached = _runs(cells, metric)
        mean, _, _ = results.mean_sd(reached)
        floors = {name: results.number(values.get(metric)) for name, values in self.under(cells).items()}
        values = {name: floor for name, floor in floors.items() if mean <= floor}
        if not values:
            return Standing({}, [])
        fits = self.fits.get((cells[0].task, float(cells[0].fraction)), [])
        against = {name: [results.number(fit.get(name, {}).get(metric)) for fit in fits] for name in values}
        if "shuffled" in values:
            runs = _runs(self._shuffled[_setting(cells[0])], metric)
            against["shuffled"] = runs if len(runs) > 1 else []  # one run is a draw, not a predictor that is what it is
        return Standing(values, [name for name in values if clearly_under(reached, against[name])])

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
    def _standings(self) -> list[Standing]:
        """Of each mean over seeds of a task's headline metric for which a floor is known."""
        found = []
        for cells in results.by(self.evidence.cells, "task").values():
            metric = results.headline(cells)
            for group in results.by(cells, "source", "architecture", "strategy", "options", "fraction", "resolution", "dataset").values():
                there = metric and any(math.isfinite(c.value(metric)) for c in group)
                if metric and there and math.isfinite(bar(self.under(group), metric)[0]):
                    found.append(self.standing(group, metric))
        return found

    @property
    def below(self) -> list[list[str]]:
        """Of each mean that is under a floor, the predictors that are clearly better."""
        return [standing.under for standing in self._standings if standing.under]

    @property
    def known(self) -> int:
        """Of how many means a floor is known."""
        return len(self._standings)

    def warning(self) -> str:
        """What must be known before any number is believed, in words; empty where every result is above its floors."""
        low = sum(bool(standing.values and not standing.under) for standing in self._standings)
        if not self.below:
            return f"{low} of {self.known} results are not above a floor, and not clearly under it" if low else ""
        image = sum(any(name in OF_IMAGES for name in names) for names in self.below)
        beside = sum(any(name not in OF_IMAGES for name in names) for names in self.below)
        than = {
            "a pixel logistic regression, a mean mask or shuffled labels": image,
            "what is written beside the image, with no image looked at": beside,
        }
        said = [f"{n} {'does' if n == 1 else 'do'} worse than {what}" for what, n in than.items() if n]
        said += [f"{low} more {'is' if low == 1 else 'are'} not above one, and not clearly under it"] if low else []
        return f"{len(self.below)} of {self.known} results are under a floor: {'; '.join(said)}"


def _setting(cell: Cell) -> str:
    """All but the seeds, the same of a control with shuffled labels."""
    held = [cell.task, cell.source, cell.architecture, cell.strategy, cell.result.get("options"), cell.fraction, cell.resolution]
    return results.canonical(held)


def bar(floors: Floors, metric: str) -> tuple[float, str]:
    """The highest floor of a metric and which predictor set it; NaN where there is none."""
    held = [(results.number(values.get(metric)), name) for name, values in floors.items()]
    return max(((value, name) for value, name in held if math.isfinite(value)), default=(math.nan, ""))


def _numbers(fit: Mapping[str, Mapping[str, object]]) -> Floors:
    """A fit as it was before it was written down: a file has nulls for NaN."""
    return {name: {metric: results.number(value) for metric, value in values.items()} for name, values in fit.items()}


def _runs(cells: Sequence[Cell], metric: str) -> list[float]:
    """A number a seed; a mean a pretraining where each has several, which are not independent."""
    values = {(c.source_seed, c.seed): value for c in cells if math.isfinite(value := c.value(metric))}
    return list(secondary.units(values)[0].values())


def clearly_under(reached: Sequence[float], floor: Sequence[float]) -> bool:
    """Whether the mean of runs is under that of a floor's fits by more than both vary: one-sided Welch test at ALPHA, the test images as
    given. A single fit is taken as exact; a single run shows nothing."""
    (mean, sd, n), (level, spread, fits) = results.mean_sd(reached), results.mean_sd(floor)
    if n < 2 or not fits:
        return False
    beside = (level, spread, fits) if fits > 1 else (level, 0.0, 2)  # of no variance, which leaves the runs' own degrees of freedom
    return bool(stats.ttest_ind_from_stats(mean, sd, n, *beside, equal_var=False, alternative="less").pvalue < ALPHA)


def of_study(evidence: "Evidence", compute: bool = True) -> StudyFloors:
    """Those of every task whose shards are readable; computed where they do not stand in OUT/analyses, or left out."""
    found: dict[tuple[str, float], list[Floors]] = {}
    notes = []
    for (task, dataset), cells in results.by(evidence.cells, "task", "dataset").items():
        manifest = evidence.manifests.get(dataset)
        kind = "segmentation" if any(c.primary() in ("dice", "iou") for c in cells) else "classification"
        of_each = [own[0] for own in results.by(cells, "measured").values()]  # thousands measure the same
        labels = list(dict.fromkeys(row["class"] for c in of_each for row in c.result.get("metrics", []) if row.get("class")))
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
            held = {**asked, "values": [{"fraction": fraction, "fits": fits} for fraction, fits in made.items()]}
            storage.put(url, results.with_nulls(held))
        found |= {(task, float(row["fraction"])): [_numbers(fit) for fit in row["fits"]] for row in held["values"]}
    return StudyFloors(evidence, found, [*notes, RULE] if found else notes)
