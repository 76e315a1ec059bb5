"""Whom a source serves worse: the metric by sex, age band, view, site and whatever else the shards say about their test images.

    for found in subgroups(evidence): found.attribute, found.groups, found.gap
    html = section(evidence)

Of each task one setting, that with the best mean on validation of a source and strategy: every source is shown with that strategy. A
difference between groups is taken over the labels that every shown group has both ways. Patients of whom an attribute is not known are
shown, and are no group that could be served worse. The worst and the best group are chosen by their values, so equal groups have a gap
too. A gap is marked where it is larger than 95 % of those that equal groups would show: patients are drawn, the same draw for all groups,
each group's draws are shifted to one level, and of every draw the gap between its best and its worst is taken. Patients that stand in
several groups are drawn together, and a small group varies as much as its size lets it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import results
from analysis.evidence import Evidence
from analysis.loaded import Images, scores
from analysis.replicates import Bootstrap, Scores, metric_B
from analysis.results import Cell
from analysis.tables import cell, esc, in_study, leading, num, table
from base import storage
from base.errors import AllograftError

LEAST = 20  # patients of a group that is shown
CLASSES = 3  # images of a label's rarer class that it needs in every group
VALUES = 12  # of an attribute; one with more is an identifier or a number that nobody cut into bands
REPLICATES = 2000
UNKNOWN = "not known"
SOURCES, RUNS, TASKS = 8, 6, 12  # shown at most: every one means reading its predictions
BANDS = (18, 40, 60, 80)


@dataclass(frozen=True)
class Group:
    """Patients and images of a group and its metric, mean over seeds; NaN where it is too small for one."""

    name: str
    patients: int
    images: int
    value: float


@dataclass(frozen=True)
class Subgroup:
    """One source on one task by one attribute. gap: of the best and the worst group that are known; chance: what 95 % of equal groups stay
    under; why: what of it has no number, and for what reason."""

    task: str
    source: str
    strategy: str
    attribute: str
    metric: str
    dataset: str
    runs: int
    labels: int
    groups: list[Group]
    gap: float
    chance: float
    why: str

    @property
    def clear(self) -> bool:
        """Whether equal groups would not show such a gap."""
        return self.gap > self.chance

    @property
    def worst(self) -> str:
        held = [group for group in self.groups if math.isfinite(group.value) and group.name != UNKNOWN]
        return min(held, key=lambda group: group.value).name if math.isfinite(self.gap) else "–"


def band(value: object) -> str:
    """An age as a band: `40-59`."""
    age = results.number(value)
    if not math.isfinite(age):
        return UNKNOWN
    at = int(np.searchsorted(BANDS, age, side="right"))
    names = [f"under {BANDS[0]}", *(f"{a}-{b - 1}" for a, b in itertools.pairwise(BANDS)), f"{BANDS[-1]} and over"]
    return names[at]


def known(evidence: Evidence, dataset: str) -> dict[str, dict[str, str]]:
    """By attribute the group of each test image, read from the shards; none where they are not readable or say nothing.

    Raises:
        AllograftError: the shards are damaged.
    """
    from shards.corpus import Corpus

    allowed = evidence.card(dataset).get("metadata") or []
    if not allowed or dataset not in evidence.shards or not storage.exists(storage.join(evidence.shards[dataset], "manifest.json")):
        return {}
    corpus = Corpus(evidence.shards[dataset], ("test",))
    metas = dict(zip(corpus.keys(), (record.meta for record in corpus.records()), strict=True))
    found: dict[str, dict[str, str]] = {}
    for name in allowed:
        if name == "age":
            found["age"] = {key: band(meta.get("age")) for key, meta in metas.items()}
            continue
        held = {key: UNKNOWN if meta.get(name) is None else str(meta[name]) for key, meta in metas.items()}
        if 1 < len(set(held.values())) <= VALUES:
            found[name] = held
    return {name: held for name, held in found.items() if len(set(held.values())) > 1}


def chosen(evidence: Evidence) -> dict[tuple[str, str], dict[str, list[Cell]]]:
    """By task and dataset, the cells of each source under the strategy and setting that lead on validation."""
    found = {}
    for (task, dataset), cells in list(results.by(evidence.cells, "task", "dataset").items())[:TASKS]:
        metric = results.headline(cells)
        if metric is None:
            continue
        ranked, held = leading(evidence, cells), results.in_groups(cells)
        best = ranked[0][1][0].group if ranked else next(iter(held))
        order = {source: i for i, source in enumerate(evidence.sources())}
        by_source = sorted(results.by(held[best], "source").items(), key=lambda item: order[item[0][0]])
        found[task, dataset] = {source: own for (source,), own in by_source[:SOURCES]}
    return found


def some_scores(cells: list[Cell]) -> list[Scores]:
    """Predictions of RUNS of one source's cells, of every pretraining as many as of the others."""
    images: dict[bytes, Images] = {}
    seeds = [own for _, own in sorted(results.by(cells, "source_seed").items())][:RUNS]
    held = (scores(c, images) for own in seeds for c in sorted(own, key=lambda c: c.seed)[: RUNS // len(seeds)])
    return [one for one in held if one is not None]


def subgroups(evidence: Evidence) -> list[Subgroup]:
    """All of them, by task, attribute and source."""
    found = []
    for (task, dataset), sources in chosen(evidence).items():
        attributes = known(evidence, dataset)
        if not attributes:
            continue
        metric = results.headline(c for own in sources.values() for c in own) or "auroc_mean"
        bootstrap = Bootstrap(REPLICATES)
        held = {source: some_scores(own) for source, own in sources.items()}
        for attribute, group_of in attributes.items():
            within = metric == "auroc_within_mean" and attribute == evidence.card(dataset).get("stratify_by")
            for source, cells in held.items():
                if cells and any(str(image) in group_of for image in cells[0].ids_N):
                    facts = (task, source, in_study(evidence, sources[source][0]), attribute, "auroc_mean" if within else metric, dataset)
                    found.append(by_group(facts, cells, group_of, bootstrap))
    return found


def by_group(
    facts: tuple[str, str, str, str, str, str], cells: list[Scores], group_of: Mapping[str, str], bootstrap: Bootstrap
) -> Subgroup:
    """The groups of one source's cells. facts: task, source, strategy, attribute, metric, dataset; group_of: a name by image."""
    metric, first = facts[4], cells[0]
    of_image = np.array([_group(group_of, image) for image in first.ids_N], object)
    names = sorted({str(name) for name in of_image if name is not None}, key=_order)
    masks = {name: of_image == name for name in names}
    patients = {name: len(np.unique(first.clusters_N[masks[name]])) for name in names}
    large = [name for name in names if patients[name] >= LEAST]
    labels = _labels(first, [masks[name] for name in large], first.strata if "within" in metric else [np.arange(len(first.ids_N))])
    values = dict.fromkeys(names, math.nan)
    drawn: dict[str, NDArray[np.float64]] = {}
    same = [one for one in cells if np.array_equal(one.ids_N, first.ids_N)]
    if labels is None or len(labels):
        weight_BN = bootstrap.draw(first, metric).weight_BN
        for name in large:
            parts = [_part(one, masks[name], labels) for one in same]
            ones = np.ones((1, int(masks[name].sum())))
            with np.errstate(invalid="ignore", divide="ignore"):
                values[name] = float(np.mean([metric_B(part, metric, ones)[0] for part in parts]))
                drawn[name] = np.mean([metric_B(part, metric, weight_BN[:, masks[name]]) for part in parts], axis=0)
    finite = [name for name in large if math.isfinite(values[name]) and name != UNKNOWN]
    gap = chance = math.nan
    why = f"fewer than two known groups of at least {LEAST} test patients have a number"
    if labels is not None and len(large) and not len(labels):
        why = f"no label has {CLASSES} test images with it and {CLASSES} without it in every group of at least {LEAST} test patients"
    elif undefined := [name for name in large if math.isnan(values[name])]:
        why = f"the metric has no value in {', '.join(undefined)}"
    elif len(finite) > 1:
        why = ""
    if len(finite) > 1:
        gap = max(values[name] for name in finite) - min(values[name] for name in finite)
        moved_BG = np.stack([drawn[name] - values[name] for name in finite], axis=1)
        moved_BG = moved_BG[np.isfinite(moved_BG).all(axis=1)]
        if len(moved_BG) > bootstrap.replicates // 2:
            chance = float(np.quantile(np.ptp(moved_BG, axis=1), 0.95))
        else:
            why = (
                f"no gap by chance: {len(moved_BG)} of {bootstrap.replicates} draws of patients leave each group both values of each label"
            )
    groups = [Group(name, patients[name], int(masks[name].sum()), values[name]) for name in names]
    return Subgroup(*facts, len(same), 0 if labels is None else len(labels), groups, gap, chance, why)


def _group(group_of: Mapping[str, str], image: str) -> str | None:
    return group_of.get(str(image))  # a study of several images has no group of its own


def _order(name: str) -> tuple[int, str]:
    return (0 if name.startswith("under") else 2 if name == UNKNOWN else 1, name)


def _labels(one: Scores, masks: list[NDArray[np.bool_]], strata: list[NDArray[np.int64]]) -> NDArray[np.int64] | None:
    """Columns of the labels that every group has both ways, in some stratum, too; None for masks and for decisions, which have no such
    columns."""
    if one.target_NL is None or one.decided_N is not None:
        return None
    kept = []
    for label in range(one.target_NL.shape[1]):
        targets = [np.where(mask, one.target_NL[:, label], np.nan) for mask in masks]
        if all(min((t == 1).sum(), (t == 0).sum()) >= CLASSES and any({0, 1} <= set(t[at]) for at in strata) for t in targets):
            kept.append(label)
    return np.array(kept, np.int64)


def _part(one: Scores, mask: NDArray[np.bool_], labels: NDArray[np.int64] | None) -> Scores:
    def cut(array: Any) -> Any:
        return None if array is None else array[mask]

    columns = slice(None) if labels is None else labels
    score, target = (None if a is None else a[mask][:, columns] for a in (one.score_NL, one.target_NL))
    rest = {name: cut(getattr(one, name)) for name in ("dice_N", "stratum_N", "iou_N", "true_N", "decided_N")}
    return dataclasses.replace(one, ids_N=one.ids_N[mask], patient_N=one.patient_N[mask], target_NL=target, score_NL=score, **rest)


def section(evidence: Evidence) -> str:
    """A table for each task and attribute, worst groups marked; empty where no shards say anything about their images."""
    try:
        found = subgroups(evidence)
    except (AllograftError, OSError) as error:
        return f'<p class="bad">What the shards say about their images could not be read: {esc(error)}</p>'
    parts = []
    blocks: dict[tuple[str, str], list[Subgroup]] = {}
    for one in found:
        blocks.setdefault((one.task, one.attribute), []).append(one)
    for (task, attribute), rows in blocks.items():
        if not any(math.isfinite(group.value) for one in rows for group in one.groups):
            sizes = ", ".join(f"{esc(group.name)} {group.patients} patients" for group in rows[0].groups)
            parts.append(f"<p>{esc(task)} by {esc(attribute)}: no number, since {esc(rows[0].why)} ({sizes}).</p>")
            continue
        names = [group.name for group in rows[0].groups]
        counts = {group.name: group.patients for group in rows[0].groups}
        reasons = any(one.why for one in rows)
        body = ["".join(_row(one, names) + ([cell(esc(one.why), cls="words")] if reasons else [])) for one in rows]
        heads = ["encoder", "strategy", "runs", *(f"{name} (n {counts[name]})" for name in names), "worst", "gap", "gap by chance"] + [
            "not given"
        ] * reasons
        over = f", over {rows[0].labels} labels" if rows[0].labels else ""
        caption = f"{esc(task)} by {esc(attribute)}: {esc(evidence.unit(rows[0].metric, rows[0].dataset))}{over}"
        parts.append(table(heads, body, caption, cls="numbers"))
    note = (
        f"Test images, mean over {RUNS} runs of an encoder at most, the setting that leads on validation; n counts patients, and groups of"
        f" fewer than {LEAST} have no number. Patients of whom it is not known are in no gap. Worst and best groups are chosen by their"
        " values, so equal groups have a gap too: 95 % of those stay under the gap by chance, and one above it is marked. Each row by"
        " itself, uncorrected for the number of rows."
    )
    return "".join(parts) + f'<p class="faint">{note}</p>' if parts else ""


def _row(one: Subgroup, names: list[str]) -> list[str]:
    values = {group.name: group.value for group in one.groups}
    parts = [f'<th scope="row">{esc(one.source)}</th>', cell(esc(one.strategy)), cell(str(one.runs), sort=one.runs)]
    for name in names:
        worst = one.clear and name == one.worst
        parts.append(cell(num(values.get(name, math.nan)), sort=values.get(name, math.nan), cls="bad" if worst else ""))
    gap = cell(num(one.gap), sort=one.gap, cls="bad" if one.clear else "")
    return [*parts, cell(esc(one.worst)), gap, cell(num(one.chance), sort=one.chance)]
