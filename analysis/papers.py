"""The study's numbers in the layouts of the three papers, as Markdown and LaTeX, to be laid beside theirs.

    for made in layouts(evidence): made.markdown(), made.latex()       # written to OUT/report/tables/<name>.md and .tex

transfusion-1: a row an architecture, a column a source, AUC % with deviation (Raghu et al. 2019, Table 1); transfusion-2: a column a label
(Table 2). truncated: a row a strategy under the paper's names, AUROC, AUPRC, parameters, MACs, time (Peng et al. 2023). benchmark: a row a
source, a column a task, percent, with stars of an independent two-sample t-test against one source (Hosseinzadeh Taher et al. 2021). These
stars are the paper's habit: uncorrected, blind to test patients, and no statement of ours. The statements stand in significance.csv. Bold
is the highest mean of its column, of Transfusion's Table 1 of its row, where the same test tells it from the next highest.
Numbers of a source that was pretrained on these labels (†) or that may have seen these test images (‡), means that lack a cell which
failed or has no number (§), and means under a floor of their task (¶) are never bold and have no stars, nor has what is held against them.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from analysis import results, secondary
from analysis.analyses import standing
from analysis.evidence import Evidence
from analysis.results import Cell
from analysis.tables import Spread, esc, num, over_seeds
from base import storage
from base.paths import safe_name

STRATEGIES = {"full": "FTL", "slim": "TF", "lwft": "LWFT", "truncated": "TTL", "fat": "FAT"}  # as Peng et al. name them
SHOWN = 24  # tables in the page
AUCS = ("auroc_mean", "auroc_within_mean")


@dataclass(frozen=True)
class Layout:
    """A table: texts, and which of them are bold."""

    name: str
    caption: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)

    def markdown(self) -> str:
        """As one of GitHub's tables."""
        lines = ["| " + " | ".join(_plain(head) for head in self.heads) + " |", "|" + "---|" * len(self.heads)]
        for i, row in enumerate(self.rows):
            texts = [f"**{_plain(text)}**" if (i, j) in self.best else _plain(text) for j, text in enumerate(row)]
            lines.append("| " + " | ".join(texts) + " |")
        return f"{self.caption}\n\n" + "\n".join(lines) + "\n"

    def latex(self) -> str:
        """As a table environment for booktabs."""
        lines = [" & ".join(map(_tex, self.heads)) + r" \\"]
        body = []
        for i, row in enumerate(self.rows):
            texts = [rf"\textbf{{{_tex(text)}}}" if (i, j) in self.best else _tex(text) for j, text in enumerate(row)]
            body.append(" & ".join(texts) + r" \\")
        columns = "l" + "c" * (len(self.heads) - 1)
        head = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{_tex(self.caption)}}}"]
        rules = [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *lines,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join([*head, *rules]) + "\n"


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")


def _tex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "†": r"$\dagger$",
        "‡": r"$\ddagger$",
        "§": r"\S{}",
        "¶": r"\P{}",
        "–": "--",
        "→": r"$\to$",
        "×": r"$\times$",
    }
    special |= {letter: "\\" + letter for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)


def layouts(evidence: Evidence) -> list[Layout]:
    """Those that the study has numbers for."""
    if not evidence.cells:
        return []
    return [*_transfusion(evidence), *_truncated(evidence), *_benchmark(evidence)]


def section(evidence: Evidence) -> str:
    """The tables as text to copy; also written to OUT/report/tables/<name>.md and .tex."""
    parts = []
    for at, one in enumerate(layouts(evidence)):
        texts = {"md": one.markdown(), "tex": one.latex()}
        for extension, text in texts.items():
            storage.put(storage.join(evidence.out, "report", "tables", f"{one.name}.{extension}"), text)
        if at < SHOWN:
            both = "".join(f"<pre>{esc(text)}</pre>" for text in texts.values())
            parts.append(f"<details><summary>{esc(one.name)}: {esc(one.caption)}</summary>{both}</details>")
    note = (
        "Also in report/tables, as .md and .tex. Stars are those of the benchmark's own layout: a t-test over seeds, uncorrected, which"
        " takes the test patients as given and declares nothing here. Bold is what the same test tells from the next highest. Numbers"
        " with †, ‡, § or ¶ are never bold and have no stars, nor has what is held against them; each table says what its marks mean."
    )
    return "".join(parts) + f'<p class="faint">{note}</p>' if parts else ""


# -- numbers as the papers print them


class Number(NamedTuple):
    """Of one setting: what the table prints, and its mean over seeds, which takes no part in comparisons where it is marked."""

    text: str
    spread: Spread
    marked: bool


def _number(evidence: Evidence, cells: Sequence[Cell], metric: str, label: str | None = None) -> Number:
    """In per cent, `96.41 ±0.05`; a dash where there is none."""
    spread = over_seeds(cells, metric, label)
    text = f"{100 * spread.mean:.2f}" if spread.units else "–"
    text += f" ±{100 * spread.sd:.2f}" if len(spread.units) > 1 else ""
    mark = _apart(evidence, cells) + ("¶" if evidence.under_floor(cells) else "")
    return Number(text + (f" {mark}" if mark else ""), spread, bool(mark))


def _apart(evidence: Evidence, cells: Sequence[Cell]) -> str:
    apart = {c.apart for c in cells}
    return ("†" if "own" in apart else "") + ("‡" if "exposed" in apart else "") + ("§" if evidence.lost(cells) else "")


def _runs(sides: Iterable[tuple[object, Sequence[Cell]]]) -> str:
    """How many runs stand behind the numbers of each row or column by its name: `n = 3`, `n = 3 (random), 3 × 2 (simclr)`."""
    counts: dict[str, list[str]] = {}
    for name, cells in sides:
        if cells:
            counts.setdefault(over_seeds(cells, results.headline(cells) or "").n, []).append(str(name))
    said = [f"{n} ({', '.join(dict.fromkeys(names))})" if len(counts) > 1 else n for n, names in counts.items()]
    nested = ", where n is a × b of a pretrainings' means, each over b fine-tuning seeds" if any("×" in n for n in counts) else ""
    return f"n = {', '.join(said) or 0}{nested}"


def _legend(rows: Sequence[Sequence[str]]) -> str:
    """What the marks of a table mean, of those that it has."""
    text = " ".join(itertools.chain.from_iterable(rows))
    said = [
        ("†", "pretrained on these labels"),
        ("‡", "may have seen these test images"),
        ("§", "without cells that failed or have no number"),
        ("¶", "of a setting whose mean is under a floor"),
    ]
    return "".join(f"; {mark} {words}" for mark, words in said if mark in text)


def _bold(line: Sequence[Number]) -> list[int]:
    """The place of the highest mean where the benchmark's test tells it from the next highest; none elsewhere."""
    order = sorted((i for i, one in enumerate(line) if one.spread.units and not one.marked), key=lambda i: -line[i].spread.mean)
    return order[:1] if len(order) > 1 and _starred(line[order[0]].spread, line[order[1]].spread) not in ("", "n.s.") else []


def _said(best: set[tuple[int, int]], of: str = "column") -> str:
    """What bold means, in a table that has any."""
    text = f"; bold: the highest mean of its {of}, p < 0.05 against the next highest (two-sample t-test over seeds, uncorrected)"
    return text if best else ""


def _confounded(evidence: Evidence, task: str, dataset: str, metric: str) -> str:
    """What must be known of a number over all strata where the stratum alone tells the labels."""
    alone = evidence.floors.confounded(task)
    if "within" in metric or not math.isfinite(alone):
        return ""
    word = next((f"plain {word} of " for name, word in (("auprc", "AUPRC"), ("auroc", "AUROC")) if metric.startswith(name)), "")
    return f"; {word}{task} is confounded: {evidence.card(dataset).get('stratify_by')} alone reaches a mean AUROC of {num(alone)}"


def _share(fraction: float) -> str:
    return "" if fraction == 1 else f", {fraction:.3g} of the labels"


def _transfusion(evidence: Evidence) -> list[Layout]:
    made = []
    order = evidence.sources()
    for (task, strategy, options, fraction, resolution), held in results.by(
        evidence.cells, "task", "strategy", "options", "fraction", "resolution"
    ).items():
        metric = held[0].primary()
        if metric not in AUCS or strategy != "full":
            continue
        sources = [source for source in order if any(cell.source == source for cell in held)]
        unit, models = evidence.unit(metric, held[0].dataset), results.by(held, "architecture")
        grid = [[_number(evidence, [c for c in own if c.source == source], metric) for source in sources] for own in models.values()]
        rows = [[str(model), *(one.text for one in line)] for (model,), line in zip(models, grid, strict=True)]
        dataset = str(held[0].dataset)
        place = f"{task}, {resolution} px{_share(float(fraction))}"
        name = safe_name(task, options, "" if fraction == 1 else f"{fraction:g}", resolution)
        pairs = results.by(held, "architecture", "source")
        over = f"mean and deviation over seeds, {_runs((source, own) for (_, source), own in pairs.items())}"
        best = {(i, j + 1) for i, line in enumerate(grid) for j in _bold(line)}
        caption = f"{place}: {unit} in per cent, {over}{_confounded(evidence, task, dataset, metric)}{_legend(rows)}{_said(best, 'row')}"
        made.append(Layout(f"transfusion-1-{name}", caption, ["model", *sources], rows, best))
        labels = list(
            dict.fromkeys(row["class"] for c in held for row in c.result["metrics"] if row.get("class") and row["metric"] == "auroc")
        )
        if len(labels) > 1:
            lines = {
                pair: [_number(evidence, own, "auroc", label) for label in labels]
                for pair, own in sorted(pairs.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
            }
            rows = [[f"{model}, {source}", *(one.text for one in line)] for (model, source), line in lines.items()]
            best = {(i, j) for j, column in enumerate(zip(*lines.values(), strict=True), 1) for i in _bold(column)}
            confounded = _confounded(evidence, task, dataset, "auroc")
            caption = f"{place}: AUROC in per cent by label, {over}{confounded}{_legend(rows)}{_said(best)}"
            made.append(Layout(f"transfusion-2-{name}", caption, ["model", *labels], rows, best))
    return made


def _truncated(evidence: Evidence) -> list[Layout]:
    made = []
    times = _times(evidence)
    for (task, source, architecture, fraction, resolution), held in results.by(
        evidence.cells, "task", "source", "architecture", "fraction", "resolution"
    ).items():
        strategies = results.by(held, "strategy", "options")
        metric = held[0].primary()
        if len(strategies) < 2 or metric not in AUCS:
            continue
        rows, grid = [], []
        for (strategy, _), own in strategies.items():
            grid.append([_number(evidence, own, name) for name in (metric, "auprc_mean")])
            costs = [results.number(own[0].result.get(name)) for name in ("params", "macs")]
            label = STRATEGIES.get(str(strategy), str(strategy))
            shown = f"{label} ({own[0].setting})" if own[0].options else label
            texts = (*(one.text for one in grid[-1]), f"{costs[0] / 1e6:.2f}", f"{costs[1] / 1e9:.3g}")
            rows.append([shown, *texts, _ms(times.get(own[0].key, math.nan))])
        dataset = str(held[0].dataset)
        heads = ["method", evidence.unit(metric, dataset), "AUPRC", "P (M)", "MACs (G)", "T (ms)"]
        place = f"{task}, {source}, {architecture}, {resolution} px{_share(float(fraction))}"
        runs = _runs((row[0], own) for row, own in zip(rows, strategies.values(), strict=True))
        best = {(i, j) for j, column in enumerate(zip(*grid, strict=True), 1) for i in _bold(column)}
        confounded = _confounded(evidence, task, dataset, metric) or _confounded(evidence, task, dataset, "auprc_mean")
        caption = f"{place}: per cent, mean and deviation over seeds, {runs}; T is of one image{confounded}{_legend(rows)}{_said(best)}"
        name = safe_name("truncated", task, source, architecture, "" if fraction == 1 else f"{fraction:g}", resolution)
        made.append(Layout(name, caption, heads, rows, best))
    return made


def _ms(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _times(evidence: Evidence) -> dict[str, float]:
    """Milliseconds for one image by cell, from the analysis of efficiency; none where it was not made."""
    found = next((one for one in standing(evidence.out) if one.analysis.kind == "efficiency"), None)
    if found is None:
        return {}
    text = storage.read_bytes(storage.join(found.url, "efficiency.csv")).decode()
    rows = csv.DictReader(io.StringIO(text))
    return {key: results.number(row.get("batch_1_median_ms")) for row in rows for key in (row.get("keys") or "").split()}


def _benchmark(evidence: Evidence) -> list[Layout]:
    made = []
    order = evidence.sources()
    against = next((s for s in order if "imagenet" in s.lower() and "-" not in s), None) or order[0]
    for (architecture, strategy, options), held in results.by(evidence.cells, "architecture", "strategy", "options").items():
        columns = list(results.by(held, "task", "dataset", "fraction", "resolution").items())
        sources = [source for source in order if any(cell.source == source for cell in held)]
        heads, rows = ["pretraining"], [[source] for source in sources]
        best: set[tuple[int, int]] = set()
        confounded: dict[str, None] = {}
        for (task, dataset, fraction, _), own in columns:
            metric = results.headline(own)
            if metric is None:
                continue
            heads.append(f"{task}{_share(float(fraction))}, {evidence.unit(metric, dataset)}")
            confounded[_confounded(evidence, task, dataset, metric)] = None
            line = [_number(evidence, [c for c in own if c.source == source], metric) for source in sources]
            best |= {(i, len(heads) - 1) for i in _bold(line)}
            base = line[sources.index(against)] if against in sources else None
            for row, one in zip(rows, line, strict=True):
                tested = base is not None and one is not base and not one.marked and not base.marked
                mark = _starred(one.spread, base.spread) if tested and base else ""
                row.append(one.text + (f" {mark}" if mark else ""))
        if len(heads) < 2 or len(sources) < 2:
            continue
        setting = results.setting(strategy, options)
        sides = results.by(held, "source", "task", "fraction", "resolution")
        runs = _runs((source, own) for (source, *_), own in sides.items())
        starred = f"stars: two-sample t-test over seeds against {against}, uncorrected, test patients taken as given"
        caption = f"{architecture}, {setting}: per cent, mean and deviation over seeds, {runs}; {starred}"
        caption += f"{''.join(confounded)}{_legend(rows)}{_said(best)}"
        made.append(Layout(safe_name("benchmark", architecture, setting), caption, heads, rows, best))
    return made


def _starred(a: Spread, b: Spread) -> str:
    """`n.s.` or the benchmark's stars of Student's test over seeds, as analysis.secondary makes it; nothing where it refuses."""
    return str(secondary.unpaired(np.array(a.units), np.array(b.units)).get("stars", ""))
