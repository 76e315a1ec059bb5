"""Sections of the report on what cluster.analyses has computed: similarity, first filters, convergence, efficiency, transferability,
accuracy of the sources.

    for anchor, title, html in sections(evidence): ...

Figures are set in as the SVG that stands beside each analysis.json, tables as the columns that it lists. What was asked for and is not
there is said, with the reason where it failed.
"""

import re

from analysis.analyses import KINDS, Standing, standing
from analysis.evidence import Evidence
from analysis.tables import ROWS, cell, esc, table
from base import storage

TITLES = {
    "similarity": "Similarity of representations",
    "filters": "First-layer filters",
    "convergence": "Convergence",
    "efficiency": "Efficiency",
    "transferability": "Transferability",
    "accuracy": "Accuracy of the source",
}
METHOD = {
    "similarity": (
        "Layer by layer, how alike each source's encoder is to itself before and after training, mean over seeds; and, at the top"
        " layers, trained encoders of a source against those of random weights, beside random against random. Intervals there are 95 %,"
        " over runs on the same images, by leaving out one at a time, with Student's t; they take three runs of each kind. Every figure"
        " has its baseline: the same images in another order on one side (same spectrum), through the same truncation. Directions kept"
        " and dead channels are in the tables; where images are too few for CCA no number is given."
    ),
    "filters": (
        "Movement is the distance between a filter before and after training as a share of its length. The Gabor score is the share of a"
        " filter's variance that one Gabor function explains; the level that 95 % of Gaussian noise stays under stands beside it."
    ),
    "convergence": (
        "Steps until validation first stands at the threshold, by default the level that the typical run of every source reaches. Runs that"
        " ended below it are censored and shown as such; where half of a side is, its ratio is a bound. Intervals are bootstraps over runs."
        " A threshold that chance, a floor or an untrained network reaches gives no speed-up, and the reason is in its row."
    ),
    "efficiency": (
        "Parameters and multiply-accumulates are the network's own; latency is of the machine that made this analysis, median of repeated"
        " runs after a warm-up, in evaluation mode."
    ),
    "transferability": (
        "Guesses from the frozen features of each source on the task's labelled training images, nothing trained, and whether they order"
        " the sources as the results on test images do. Own-source and exposed cells are in no order. An order takes at least 3 sources;"
        " p is of Spearman's rho over all orders, it is uncorrected and declares nothing."
    ),
    "accuracy": (
        "Whether sources that are better at what they were pretrained for are better on the task: Spearman's rho between each source's"
        " accuracy, as OUT/accuracy.csv gives it, and its mean on test images, own-source and exposed cells left out, within one task,"
        " strategy, share of the labels and resolution, and one architecture unless the table names them. p is over all orders,"
        " uncorrected, and declares nothing."
    ),
}


def sections(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of every analysis that stands or was asked for."""
    held = {found.analysis.kind: found for found in standing(evidence.out)}
    asked = list(evidence.study.get("analyses") or [])
    failed = _failed(evidence.out)
    parts: list[tuple[str, str, str]] = []
    for kind in KINDS:
        if kind in held:
            parts.append((kind, TITLES[kind], _whole(evidence, held[kind])))
        elif kind in failed:
            parts.append((kind, TITLES[kind], f'<p class="bad">Could not be computed: {esc(failed[kind])}</p>'))
        elif kind in asked:
            parts.append((kind, TITLES[kind], "<p>Asked for, and not computed yet: it follows the last cell.</p>"))
    return parts


def _failed(out: str) -> dict[str, str]:
    """By kind why its last attempt failed, from OUT/events.jsonl."""
    found: dict[str, str] = {}
    for row in storage.read_rows(storage.join(out, "events.jsonl")):
        if row.get("event") == "analysis failed":
            found[str(row.get("kind"))] = str(row.get("reason"))
        elif row.get("event") == "analysed":
            found.pop(str(row.get("kind")), None)
    return found


def _number(text: str) -> int | None:
    """What `23,508,032` is sorted by; a browser reads a number up to its first comma."""
    return int(text.replace(",", "")) if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else None


def _whole(evidence: Evidence, found: Standing) -> str:
    held = found.analysis
    parts = []
    finished = len(evidence.cells)
    if held.cells != finished:
        parts.append(f'<p class="banner">Of {held.cells} cells; {finished} stand now. The next run of the study makes it anew.</p>')
    for drawn in held.figures:
        url = storage.join(found.url, f"{drawn.file}.svg")
        if not storage.exists(url):
            parts.append(f"<p>The figure {esc(drawn.file)} is no longer there.</p>")
            continue
        parts.append(f'<div class="wide">{storage.read_bytes(url).decode()}</div>')
    for listed in held.tables:
        if not listed.rows:
            continue
        cells = [[cell(esc(value), sort=_number(value)) for value in row[1:]] for row in listed.rows[:ROWS]]
        rows = ["".join([f'<th scope="row">{esc(row[0])}</th>', *rest]) for row, rest in zip(listed.rows, cells, strict=False)]
        inner = table(listed.heads, rows, esc(listed.title), cls="numbers")
        parts.append(inner if len(held.tables) < 6 else f"<details><summary>{esc(listed.title)}</summary>{inner}</details>")
    parts += [f"<p>{esc(note)}</p>" for note in held.notes]
    settings = ", ".join(f"{name} {value}" for name, value in held.settings.items())
    files = ", ".join(dict.fromkeys(listed.file for listed in held.tables[:6])) or "none"
    where = f"{held.made}, revision {held.revision}, {settings}; tables ({files}) and figures in {found.url}."
    return "".join(parts) + f'<p class="faint">{METHOD[held.kind]} Made {esc(where)}</p>'
