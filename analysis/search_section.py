"""What searches chose for the cells of a study, with the curves they saw, and whether rates were tuned at all.

    text = searches(evidence)        # HTML, empty where nothing was searched
    line = tuning(evidence)          # a sentence for the methods

Reads OUT/analyses/<key>/search.json of the answers that the present plan names.
"""

import math
from typing import Any

from analysis import figures, results
from analysis.convergence import chance
from analysis.evidence import Evidence
from analysis.tables import cell, esc, num, table
from base import storage

PANELS = 12
ALIKE = 1e-9
GUIDED = {
    "similarity": "guided by similarity to random weights",
    "flat": "evenly spread: similarity to random weights is much the same at every cut",
    "random": "evenly spread: the source is random weights",
}
RULE = (
    "Chosen on validation alone. A cut is the first, and so the smallest network, within one standard error of the best mean; a rate is"
    " that of the best mean, of equals the smaller. Bars are one standard error: over validation patients, and over trial seeds where there"
    " are several. Cost is in full trainings; the last column is what trying every candidate takes. Where all scored alike, or none above"
    " chance, validation has decided nothing: the choice is the rule's for ties, or noise."
)


def tuning(evidence: Evidence) -> str:
    """Whether every source and strategy had its rate chosen alike."""
    cells = evidence.study.get("cells") or {}
    tune = cells.get("tune")
    if not tune:
        return "Untuned: each task has one fixed rate, which may suit one source or strategy better than another."
    seeds = len(cells.get("trial_seeds") or [0])
    grid = f"{tune['trials']} of the rates {', '.join(f'{rate:g}' for rate in tune['lr'])}"
    return f"Tuned: for every source and strategy the rate was chosen on validation among the same {grid}, with {seeds} seed(s) each."


def searches(evidence: Evidence) -> str:
    """A row for each answer, and the curves of the first."""
    held = [found for key in _keys(evidence) if (found := results.read_json(storage.join(evidence.out, "analyses", key, "search.json")))]
    if not held:
        return ""
    heads = ["task", "encoder", "strategy", "searched", "chosen", "best mean", "validation", "error", "trials", "cost", "exhaustive"]
    rows = ["".join(_row(found)) for found in held]
    curves = [found for found in held if sum(point["mean"] is not None for point in found["curve"]) > 1]
    panels = "".join(_panel(f"search{i}", found, evidence) for i, found in enumerate(curves[:PANELS]))
    more = f'<p class="faint">Curves of the first {PANELS} of {len(curves)} searches.</p>' if len(curves) > PANELS else ""
    return table(heads, rows, cls="numbers") + f'<div class="panels">{panels}</div>{more}<p class="faint">{RULE}</p>'


def _keys(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(key for row in results.plan(evidence.out) for key in row.get("searches", ())))


def _name(at: object) -> str:
    return f"{at:g}" if isinstance(at, float) else str(at)


def _words(about: dict[str, Any]) -> str:
    options = [f"{name} {value}" for name, value in about["strategy"].items() if name != "name" and value != "auto"]
    shuffled = ["shuffled labels"] if about.get("shuffle_labels") else []
    return ", ".join([about["strategy"]["name"], *options, *shuffled])


def _undecided(found: dict[str, Any]) -> str:
    """Why validation chose nothing, or nothing."""
    means = [mean for point in found["curve"] if math.isfinite(mean := results.number(point["mean"]))]
    if len(means) > 1 and max(means) - min(means) < ALIKE:
        return "all alike"
    return "none above chance" if means and max(means) <= chance(found["metric"]) else ""


def _row(found: dict[str, Any]) -> list[str]:
    about, kind = found["about"], found["kind"]
    point = next(point for point in found["curve"] if point["at"] == found["choice"])
    mean, error = results.number(point["mean"]), results.number(point["error"])
    way = ", ".join(["rate"] if kind == "rates" else ["cut", kind, *([GUIDED[found["guided"]]] if found.get("guided") else [])])
    parts = [
        f'<th scope="row">{esc(about["task"])}</th>',
        cell(esc(results.plain(about["source"]))),
        cell(esc(_words(about))),
        cell(esc(way)),
    ]
    undecided = _undecided(found)
    mark = f' <span class="tag bad">{undecided}</span>' if undecided else ""
    parts += [cell(f"<b>{esc(_name(found['choice']))}</b>{mark}"), cell(esc(_name(found["best"])))]
    parts += [cell(num(mean), sort=mean), cell(num(error), sort=error)]
    return [*parts, *(cell(f"{found[name]:g}", sort=found[name]) for name in ("trials", "cost", "exhaustive"))]


def _panel(name: str, found: dict[str, Any], evidence: Evidence) -> str:
    about = found["about"]
    points = [
        (_name(point["at"]), float(point["mean"]), results.number(point["error"]), point["epochs"] is None)
        for point in found["curve"]
        if point["mean"] is not None and math.isfinite(point["mean"])
    ]
    title = f"{about['task']}, {results.plain(about['source'])}, {_words(about)}"
    label = f"validation {evidence.unit(found['metric'], about['dataset'])}"
    return figures.searched(name, title, points, _name(found["choice"]), _name(found["best"]), label)
