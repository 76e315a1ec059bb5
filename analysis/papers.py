"""The study's numbers in the layouts of the three papers, as Markdown and LaTeX, to be laid beside theirs.

    for made in layouts(evidence): made.markdown(), made.latex()       # written to OUT/report/tables/<name>.md and .tex

transfusion-1: a row an architecture, a column a source, AUC % with deviation (Raghu et al. 2019, Table 1); transfusion-2: a column a label
(Table 2). truncated: a row a strategy under the paper's names, AUROC, AUPRC, parameters, MACs, time (Peng et al. 2023). benchmark: a row a
source, a column a task, percent, with stars of an independent two-sample t-test against one source (Hosseinzadeh Taher et al. 2021). These
stars are the paper's habit: uncorrected, blind to test patients, and no statement of ours. The statements stand in significance.csv.
Numbers of a source that was pretrained on these labels (†) or that may have seen these test images (‡), means that lack a cell which
failed or has no number (§), and means under a floor of their task (¶) are never bold and have no stars.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis import results, secondary
from analysis.analyses import standing
from analysis.evidence import Evidence
from analysis.results import Cell
from analysis.tables import esc
from base import storage
from base.paths import safe_name

STRATEGIES = {"full": "FTL", "slim": "TF", "lwft": "LWFT", "truncated": "TTL", "fat": "FAT"}  # as Peng et al. name them
SHOWN = 24  # tables in the page
AUCS = ("auroc_mean", "auroc_within_mean")


@dataclass(frozen=True)
class Layout:
    """A table: texts, and which of them are the best of their column (of equals all)."""

    name: str
    caption: str
    heads: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)

    def markdown(self) -> str:
        """GitHub's tables; the best in bold."""
        lines = ["| " + " | ".join(_plain(head) for head in self.heads) + " |", "|" + "---|" * len(self.heads)]
        for i, row in enumerate(self.rows):
            texts = [f"**{_plain(text)}**" if (i, j) in self.best else _plain(text) for j, text in enumerate(row)]
            lines.append("| " + " | ".join(texts) + " |")
        return f"{self.caption}\n\n" + "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A table environment for booktabs; the best in bold."""
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
        " takes the test patients as given and declares nothing here. Numbers with †, ‡, § or ¶ are never bold and have no stars."
    )
    return "".join(parts) + f'<p class="faint">{note}</p>' if parts else ""


# -- numbers as the papers print them


def percent(values: Sequence[float]) -> tuple[float, str]:
    """The mean in per cent and `96.41 ±0.05`; NaN and a dash where there is none."""
    mean, sd, n = results.mean_sd(values)
    if not n:
        return math.nan, "–"
    return mean, f"{100 * mean:.2f}" + (f" ±{100 * sd:.2f}" if n > 1 else "")


def _number(evidence: Evidence, cells: Sequence[Cell], metric: str, label: str | None = None) -> tuple[float, str]:
    """`percent` of cells; marked, and NaN in comparisons, where they are no evidence."""
    mean, text = percent([c.value(metric, label=label) for c in cells])
    mark = _apart(evidence, cells) + ("¶" if evidence.under_floor(cells) else "")
    return (math.nan if mark else mean), text + (f" {mark}" if mark else "")


def _apart(evidence: Evidence, cells: Sequence[Cell]) -> str:
    apart = {c.apart for c in cells}
    return ("†" if "own" in apart else "") + ("‡" if "exposed" in apart else "") + ("§" if evidence.lost(cells) else "")


def _runs(sides: Iterable[Sequence[Cell]]) -> str:
    """How many runs stand behind each number: `n = 3`, `n = 2 to 3`."""
    counts = sorted({sum(math.isfinite(cell.value(cell.primary() or "")) for cell in side) for side in sides if side})
    return f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else "n = 0"


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


def _bold(values: list[list[float]], first: int) -> set[tuple[int, int]]:
    """Places of the highest value of each column, columns counted from `first`."""
    found = set()
    for j in range(len(values[0]) if values else 0):
        column = [row[j] for row in values]
        held = [value for value in column if math.isfinite(value)]
        if len(held) > 1:
            found |= {(i, j + first) for i, value in enumerate(column) if value == max(held)}
    return found


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
        rows = [[str(model), *(text for _, text in line)] for (model,), line in zip(models, grid, strict=True)]
        place = f"{task}, {resolution} px{_share(float(fraction))}"
        name = safe_name(task, options, "" if fraction == 1 else f"{fraction:g}", resolution)
        pairs = results.by(held, "architecture", "source")
        over = f"mean and deviation over seeds, {_runs(pairs.values())}"
        caption = f"{place}: {unit} in per cent, {over}{_legend(rows)}"
        # Bold is along a row there: which beginning does an architecture better.
        best = {(i, j + 1) for i, line in enumerate(grid) for j in _highest([value for value, _ in line])}
        made.append(Layout(f"transfusion-1-{name}", caption, ["model", *sources], rows, best))
        labels = list(
            dict.fromkeys(row["class"] for c in held for row in c.result["metrics"] if row.get("class") and row["metric"] == "auroc")
        )
        if len(labels) > 1:
            lines = {
                pair: [_number(evidence, own, "auroc", label) for label in labels]
                for pair, own in sorted(pairs.items(), key=lambda item: (item[0][0], order.index(item[0][1])))
            }
            rows = [[f"{model}, {source}", *(text for _, text in line)] for (model, source), line in lines.items()]
            best = _bold([[value for value, _ in line] for line in lines.values()], 1)
            caption = f"{place}: AUROC in per cent by label, {over}{_legend(rows)}"
            made.append(Layout(f"transfusion-2-{name}", caption, ["model", *labels], rows, best))
    return made


def _highest(values: list[float]) -> list[int]:
    held = [value for value in values if math.isfinite(value)]
    return [i for i, value in enumerate(values) if len(held) > 1 and value == max(held)]


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
        rows, values = [], []
        for (strategy, _), own in strategies.items():
            scores = [_number(evidence, own, name) for name in (metric, "auprc_mean")]
            costs = [results.number(own[0].result.get(name)) for name in ("params", "macs")]
            ms = times.get(own[0].key, math.nan)
            label = STRATEGIES.get(str(strategy), str(strategy))
            shown = f"{label} ({own[0].setting})" if own[0].options else label
            rows.append([shown, *(text for _, text in scores), *(f"{costs[0] / 1e6:.2f}", f"{costs[1] / 1e9:.3g}"), _ms(ms)])
            values.append([*(value for value, _ in scores), *(-value for value in costs), -ms])
        heads = ["method", evidence.unit(metric, held[0].dataset), "AUPRC", "P (M)", "MACs (G)", "T (ms)"]
        place = f"{task}, {source}, {architecture}, {resolution} px{_share(float(fraction))}"
        caption = f"{place}: per cent, mean and deviation over seeds, {_runs(strategies.values())}; T is of one image{_legend(rows)}"
        name = safe_name("truncated", task, source, architecture, "" if fraction == 1 else f"{fraction:g}", resolution)
        made.append(Layout(name, caption, heads, rows, _bold(values, 1)))
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
        values: list[list[float]] = [[] for _ in sources]
        for (task, dataset, fraction, _), own in columns:
            metric = results.headline(own)
            if metric is None:
                continue
            heads.append(f"{task}{_share(float(fraction))}, {evidence.unit(metric, dataset)}")
            base = [c for c in own if c.source == against]
            for i, source in enumerate(sources):
                cells = [c for c in own if c.source == source]
                if any(c.own_source for c in cells):
                    rows[i].append("-")
                    values[i].append(math.nan)
                    continue
                mean, text = _number(evidence, cells, metric)
                tested = source != against and not _apart(evidence, [*cells, *base]) and not evidence.under_floor(cells)
                rows[i].append(text + (f" {mark}" if tested and (mark := stars(cells, base, metric)) else ""))
                values[i].append(mean)
        if len(heads) < 2 or len(sources) < 2:
            continue
        setting = results.setting(strategy, options)
        runs = _runs(results.by(held, "source", "task", "fraction", "resolution").values())
        starred = f"stars: two-sample t-test over seeds against {against}, uncorrected, test patients taken as given"
        caption = f"{architecture}, {setting}: per cent, mean and deviation over seeds, {runs}; {starred}{_legend(rows)}"
        made.append(Layout(safe_name("benchmark", architecture, setting), caption, heads, rows, _bold(values, 1)))
    return made


def stars(a: Sequence[Cell], b: Sequence[Cell], metric: str) -> str:
    """`n.s.` or the benchmark's stars of Student's test over seeds, as analysis.secondary makes it; nothing where it refuses."""
    sides = [{(c.source_seed, c.seed): value for c in side if math.isfinite(value := c.value(metric))} for side in (a, b)]
    one_S, two_S = (np.array(list(secondary.units(side)[0].values())) for side in sides)
    return str(secondary.unpaired(one_S, two_S).get("stars", ""))
