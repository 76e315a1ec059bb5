"""Tables of the report as HTML text: the matrix of encoder x task beside its floors, comparisons, cells.

Each function takes the Evidence and returns HTML; `table` is the one place where markup of tables is written.
"""

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from analysis import results, secondary
from analysis.evidence import Evidence
from analysis.findings import Finding, brief
from analysis.ledger import LOW, signed
from analysis.results import Cell
from analysis.study_floors import WORDS, Standing, bar

LEADING = (
    "Leading on validation; test images decided nothing. Certainty is over the source named, not over the runner-up, whose interval is"
    " uncorrected and declares nothing."
)
ROWS = 2000  # cells listed in the page; results.csv has all


def esc(value: object) -> str:
    return html.escape(str(value), quote=True)


def num(value: float, places: int = 3) -> str:
    return f"{value:z.{places}f}" if math.isfinite(value) else "–"


def pvalue(p: float) -> str:
    """Four decimals, and never 0."""
    return "< 0.0001" if p < 1e-4 else num(p, 4)


def cell(text: str, *, sort: float | str | None = None, cls: str = "", style: str = "", title: str = "") -> str:
    """One <td>; `text` is HTML already."""
    extra = "".join(
        f' {name}="{esc(value)}"'
        for name, value in (("data-v", sort), ("class", cls), ("style", style), ("title", title))
        if value not in ("", None)
    )
    return f"<td{extra}>{text}</td>"


def table(heads: Sequence[str], rows: Iterable[str], caption: str = "", foot: Iterable[str] = (), cls: str = "") -> str:
    """A sortable table in a frame that scrolls by itself on a narrow screen. `rows` and `foot` hold the <td>s of each row."""
    head = "".join(f'<th scope="col"><button type="button">{esc(name)}</button></th>' for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    tail = "".join(f"<tr>{row}</tr>" for row in foot)
    named = f"<caption>{caption}</caption>" if caption else ""
    under = f"<tfoot>{tail}</tfoot>" if tail else ""
    inner = f"{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{under}"
    return f'<div class="scroll" tabindex="0"><table class="sortable {cls}">{inner}</table></div>'


class Spread(NamedTuple):
    """Of one setting's runs: mean, standard deviation (ddof 1), how many in words (`3`, `3 × 2`: pretrainings by fine-tuning seeds), and
    the values that both are of."""

    mean: float
    sd: float
    n: str
    units: list[float]


def over_seeds(cells: Iterable[Cell], metric: str, label: str | None = None) -> Spread:
    """Over the means of pretrainings that were fine-tuned with several seeds each, else over runs: the units of every test over seeds."""
    values = {(c.source_seed, c.seed): value for c in cells if math.isfinite(value := c.value(metric, label=label))}
    held, several = secondary.units(values)
    mean, sd, n = results.mean_sd(held.values())
    counts = set(Counter(source for source, _ in values).values())
    words = str(n) if not several else f"{n} × {counts.pop()}" if len(counts) == 1 else f"{n} pretrainings, {len(values)} runs"
    return Spread(mean, sd, words, list(held.values()))


def leading(evidence: Evidence, cells: Sequence[Cell]) -> list[tuple[float, list[Cell]]]:
    """Of one task the mean of its headline metric on validation and the cells of each setting, best first: who leads on a page. Settings
    that are apart or lack a cell do not compete."""
    metric, found = results.headline(cells) or "", []
    competing = [c for c in cells if not c.apart]
    for own in results.by(competing, "source", "architecture", "strategy", "options", "fraction", "resolution").values():
        mean, _, n = results.mean_sd(c.value(metric, "val") for c in own)
        if n and not evidence.lost(own):
            found.append((mean, own))
    return sorted(found, key=lambda entry: (-entry[0], entry[1][0].source, str(entry[1][0].group)))


def columns(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(task, dataset, metric) of the matrix: the headline of each task and, where that is within strata, plain AUROC beside it."""
    found: list[tuple[str, str, str]] = []
    for (task, dataset), cells in results.by(evidence.cells, "task", "dataset").items():
        metric = results.headline(cells)
        if metric:
            found.append((task, dataset, metric))
        if metric == "auroc_within_mean":
            found.append((task, dataset, "auroc_mean"))
    return found


def matrix(evidence: Evidence) -> str:
    """Encoder x task on the test split: mean, standard deviation over seeds, n; floors below, red when the mean is under its floor.

    Shares of the labels and resolutions are rows where a task has several, and stand in the heads where each task has its own.
    """
    shown, tasks = columns(evidence), results.by(evidence.cells, "task")
    within = [name for name in ("fraction", "resolution") if any(len({getattr(c, name) for c in held}) > 1 for held in tasks.values())]
    groups = results.by(evidence.cells, "source", "architecture", "strategy", "options", *within)
    order = {source: i for i, source in enumerate(evidence.sources())}
    keys = sorted(groups, key=lambda key: (str(key[2]), str(key[3]), *map(float, key[4:]), str(key[1]), order[key[0]]))
    held = {(key, *where): cells for key in keys for where, cells in results.by(groups[key], "task", "dataset").items()}
    means = {
        column: {
            key: mean
            for key in keys
            if math.isfinite(mean := results.mean_sd(c.value(column[2]) for c in held.get((key, *column[:2]), []))[0])
        }
        for column in shown
    }
    declared: dict[tuple[object, ...], list[Finding]] = {}
    for f in evidence.findings:
        if f.kind in ("gain", "chain") and f.declared:
            declared.setdefault((f.a, *_setting(f)), []).append(f)
    varied = [("architecture", 1)] if len(evidence.varied["architecture"]) > 1 else []
    varied += [(name, at) for at, name in enumerate(within, 4)]
    rows = []
    for key in keys:
        parts = [f'<th scope="row">{esc(key[0])}</th>', cell(esc(results.setting(key[2], key[3])))]
        parts += [cell(f"{key[at] * 100:g} %" if name == "fraction" else esc(key[at]), sort=key[at]) for name, at in varied]
        for column in shown:
            if key in means[column]:
                least, most = min(means[column].values()), max(means[column].values())
                shade = (means[column][key] - least) / (most - least) if most > least else 0.5
                parts.append(_mean(evidence, held[(key, *column[:2])], column[2], shade, declared))
            else:
                parts.append(cell('<span class="faint">–</span>', sort="-1"))
        rows.append("".join(parts))
    foot = []
    floors = evidence.floors.values
    for share in sorted({fraction for _, fraction in floors}):
        for name in dict.fromkeys(name for (_, fraction), found in floors.items() if fraction == share for name in found):
            labels = f", {results.share(share)}" if share < 1 or len(evidence.varied["fraction"]) > 1 else ""
            parts = [f'<th scope="row" colspan="{2 + len(varied)}">floor: {esc(WORDS.get(name, name))}{labels}</th>']
            parts += [cell(num(results.number(floors.get((task, share), {}).get(name, {}).get(metric)))) for task, _, metric in shown]
            foot.append("".join(parts))
    heads = ["encoder", "strategy"] + [name for name, _ in varied]
    for task, dataset, metric in shown:
        mark = (
            ", confounded"
            if metric == "auroc_mean" and math.isfinite(evidence.floors.confounded(task))
            else ", plain"
            if metric == "auroc_mean" and (task, dataset, "auroc_within_mean") in shown
            else ""
        )
        one = tasks[(task,)][0]
        its_own = [results.share(float(one.fraction))] if "fraction" not in within and len(evidence.varied["fraction"]) > 1 else []
        its_own += [f"{one.resolution} px"] if "resolution" not in within and len(evidence.varied["resolution"]) > 1 else []
        heads.append(f"{', '.join([task, *its_own])}: {evidence.unit(metric, dataset)}{mark}")
    said = "Test split: mean, standard deviation over seeds, number of seeds. Darker is better in its column. "
    if any("×" in over_seeds(own, results.headline(own) or "").n for own in held.values()):
        said += "Of n a × b, a pretrainings with b fine-tuning seeds each, the deviation is of the pretrainings' means. "
    said += 'What is declared: <a href="#claims">claims</a>.' if evidence.ledger else "▲ ▼: declared after correction."
    return table(heads, rows, said, foot, "matrix")


def _mean(evidence: Evidence, cells: list[Cell], metric: str, shade: float, declared: dict[tuple[object, ...], list[Finding]]) -> str:
    """One <td> of the matrix: the mean of one setting's cells, with what must be known of it."""
    mean, sd, n, units = over_seeds(cells, metric)
    first = cells[0]
    own, corpora = any(c.own_source for c in cells), sorted({name for c in cells for name in c.exposed_to})
    (under, which), standing = bar(evidence.floors.under(cells), metric), evidence.floors.standing(cells, metric)
    spread = f'± {num(sd)}</span> <span class="n">n {n}' if len(units) > 1 else "one seed"
    marks = '<span class="tag own">own source</span>' if own else ""
    marks += f'<span class="tag own">exposed to {esc(", ".join(corpora))}</span>' if corpora else ""
    marks += f'<span class="tag bad">{lost} failed or without a number</span>' if (lost := evidence.lost(cells)) else ""
    marks += _low(standing)
    setting = (first.architecture, first.strategy, first.options, first.task, float(first.fraction), int(first.resolution), metric)
    for found in declared.get((first.source, *setting), []):
        better = found.comparison.estimate > 0
        marks += f'<span class="tag {"good" if better else "bad"}">{"▲ above" if better else "▼ below"} {esc(found.b)}</span>'
    why = f"{num(mean, 4)}, sd {num(sd, 4)}, n = {n}" + (f"; floor {num(under)} ({WORDS.get(which, which)})" if which else "")
    text = f'<b>{num(mean)}</b> <span class="sd">{spread}</span>' + (f"<br>{marks}" if marks else "")
    return cell(text, sort=mean, cls="heat bad" if standing.under else "heat", style=f"--h:{shade:.2f}", title=why)


def _low(standing: Standing) -> str:
    """The tag of a mean that is not above its floor, red where it is under it."""
    return f'<span class="tag {"bad" if standing.under else ""}">{esc(standing.words)}</span>' if standing.words else ""


def _setting(f: Finding) -> tuple[object, ...]:
    return f.architecture, f.strategy, f.options, f.task, f.fraction, f.resolution, f.metric


def winners(evidence: Evidence) -> str:
    """For each task the source and strategy that lead on validation: what they reach on test images, over what they are declared, by how
    much they lead on test images before the next on validation, and the cost. Empty for a study of one source, in which none leads."""
    if len(evidence.sources()) < 2:
        return ""
    rows = []
    for (task, dataset), cells in results.by(evidence.cells, "task", "dataset").items():
        metric = results.headline(cells)
        if metric is None:
            continue
        ranked = leading(evidence, cells)
        if not ranked:
            continue
        own = ranked[0][1]
        source, (architecture, strategy, options, _, fraction, resolution) = own[0].source, own[0].group
        mean, sd, n, _ = over_seeds(own, metric)
        said = [
            f
            for f in evidence.findings
            if f.a == source and _setting(f) == (architecture, strategy, options, task, float(fraction), int(resolution), metric)
        ]
        against = next((f for f in said if f.kind in ("gain", "chain", "control")), None)
        sure = "no comparison" if against is None else f"{brief(against.comparison)} against {against.b}"
        low = _low(evidence.floors.standing(own, metric))
        mark = "good" if against is not None and against.mark == "good" and not low else ""
        verdict = "not declared"
        if evidence.ledger:
            verdict = '<a href="#claims">see claims</a>'
        elif against is not None and against.declared and against.kind != "control":
            verdict = f"declared {'over' if against.comparison.estimate > 0 else 'under'} {esc(against.b)}"
        second = "none"
        if len(ranked) > 1:
            other = ranked[1][1]
            found = evidence.compared(own, other, metric)
            second = f"{brief(found)} over {other[0].source}, {in_study(evidence, other[0])}"
        setting = own[0].setting + (f", {results.share(float(fraction))}" if float(fraction) < 1 else "")
        seconds = results.mean_sd(results.number(c.result.get("seconds")) for c in own)[0]
        parts = [f'<th scope="row">{esc(task)}</th>', cell(f"<b>{esc(source)}</b>"), cell(esc(setting)), cell(esc(architecture))]
        reached = f"{num(mean)} {esc(evidence.unit(metric, dataset))}" + (f"<br>{low}" if low else "")
        parts.append(cell(reached, sort=mean, title=f"sd {num(sd, 4)}, n {n}"))
        parts += [cell(esc(sure)), cell(f'<span class="tag {mark}">{verdict}</span>'), cell(esc(second), cls="words")]
        parts += [cell(short(results.number(own[0].result.get(name))), sort=own[0].result.get(name)) for name in ("params", "macs")]
        rows.append("".join([*parts, cell(short(seconds), sort=seconds), cell(str(len(ranked)), sort=len(ranked))]))
    heads = ["task", "encoder", "strategy", "architecture", "test", "difference, 95 %", "certainty", "runner-up, 95 %"]
    heads += ["parameters", "MACs"]
    return table([*heads, "seconds a cell", "tried"], rows, LEADING, cls="numbers") if rows else ""


def findings(evidence: Evidence) -> str:
    """All comparisons with raw intervals and Holm-adjusted p."""
    words = {"gain": "gain", "chain": "chain", "control": "A/A control", **results.APART}
    rows = []
    compared = [f for f in evidence.findings if f.kind != "claim"]
    for f in compared[:ROWS]:
        c = f.comparison
        interval = (
            f"[{num(c.low)}, {num(c.high)}]" if math.isfinite(c.low) else ("unbounded" if c.basis != "not comparable" else esc(c.why))
        )
        verdict = (
            "flagged"
            if f.declared and f.kind == "control"
            else "declared"
            if f.declared
            else "no difference shown"
            if not c.excludes_zero
            else "not declared"
        )
        verdict = (
            "–"
            if c.basis == "not comparable"
            else "not ranked"
            if f.kind == "own"
            else "one seed: patients only"
            if c.basis == "patients only"
            else verdict
        )
        mark = {"declared": "good", "flagged": "bad"}.get(verdict, "")
        parts = [
            f'<th scope="row">{esc(f.a)} − {esc(f.b)}</th>',
            cell(esc(f.words(evidence)), cls="words"),
            cell(esc(evidence.unit(f.metric, f.dataset))),
        ]
        parts += [cell(signed(c.estimate) if math.isfinite(c.estimate) else "–", sort=c.estimate), cell(interval, sort=c.low)]
        parts += [
            cell(esc(pvalue(c.p)), sort=c.p),
            cell(esc(pvalue(f.adjusted)), sort=f.adjusted),
            cell(
                f'<span class="tag {mark}">{verdict}</span>'
                + (' <span class="tag bad">added after the results</span>' if f.late else "")
                + (f' <span class="tag bad">{LOW}</span>' if f.low else "")
            ),
        ]
        parts += [cell(num(f.detectable), sort=f.detectable), cell(str(c.units), sort=c.units), cell(str(c.patients), sort=c.patients)]
        parts += [cell(words[f.kind]), cell(esc(f.about)), cell(str(c.redrawn), sort=c.redrawn)]
        rows.append("".join(parts))
    heads = ["comparison", "on", "metric", "difference", "95 % interval", "p", "p after Holm", "verdict", "detectable", "seeds", "patients"]
    more = f"<p>The first {ROWS} of {len(compared)}; significance.csv has all.</p>" if len(compared) > ROWS else ""
    gone = f"Registered once and planned no longer, each with p = 1 in its family: {'; '.join(evidence.dropped)}."
    more += f'<p class="bad">{esc(gone)}</p>' if evidence.dropped else ""
    return table([*heads, "kind", "claim about", "redrawn"], rows, cls="numbers") + more


def in_study(evidence: Evidence, one: Cell) -> str:
    """The strategy, and what else of its setting varies in this study."""
    return ", ".join(dict.fromkeys([one.setting, *evidence.where(one)]))


def classes(evidence: Evidence) -> str:
    """Per label: AUROC plain and within strata, AUPRC, mean over seeds and strategies kept apart."""
    blocks = []
    for (task, dataset), cells in results.by(evidence.cells, "task", "dataset").items():
        labels = list(
            dict.fromkeys(row["class"] for c in cells for row in c.result.get("metrics", []) if row.get("class") and row["split"] == "test")
        )
        metrics = [m for m in ("auroc_within", "auroc", "auprc") if any(math.isfinite(c.value(m)) for c in cells)]
        if not labels or not metrics:
            continue
        positives = ((evidence.manifests.get(dataset) or {}).get("positives") or {}).get("test") or {}
        rows = []
        for group in results.by(cells, "source", "strategy", "options", "architecture", "fraction", "resolution").values():
            for label in labels:
                parts = [
                    f'<th scope="row">{esc(group[0].source)}</th>',
                    cell(esc(in_study(evidence, group[0]))),
                    cell(esc(label)),
                    cell(esc(positives.get(label, "–"))),
                ]
                for metric in metrics:
                    mean, sd, _, units = over_seeds(group, metric, label)
                    shown = f"{num(mean)} <span class='sd'>± {num(sd)}</span>" if len(units) > 1 else num(mean)
                    parts.append(cell(shown, sort=mean))
                rows.append("".join(parts))
        heads = ["encoder", "strategy", "label", "test positives"] + [evidence.unit(m, dataset) for m in metrics]
        blocks.append(f"<details><summary>{esc(task)}: every label</summary>{table(heads, rows[:ROWS], cls='numbers')}</details>")
    return "".join(blocks)


VARIED = {"architecture": "architecture", "source_seed": "pretraining seed"}  # columns of all cells where they have several


def cells(evidence: Evidence) -> str:
    """Every finished cell with its key, the number that it was selected by, and its cost."""
    every = evidence.cells + evidence.controls
    varied = {name: of for name, of in VARIED.items() if len({getattr(c, name) for c in every}) > 1}
    rows = [_cell_row(evidence, c, list(varied)) for c in every[:ROWS]]
    heads = [
        "key",
        "encoder",
        "strategy",
        *varied.values(),
        "task",
        "labels",
        "px",
        "seed",
        "test",
        "validation",
        "best epoch",
        "parameters",
        "MACs",
        "seconds",
    ]
    more = f"<p>The first {ROWS} of {len(evidence.cells)}; results.csv has all.</p>" if len(evidence.cells) > ROWS else ""
    return table(heads, rows, cls="numbers") + more


def _cell_row(evidence: Evidence, c: Cell, varied: Sequence[str]) -> str:
    metric = c.primary() or ""
    chosen: dict[str, Any] = c.result.get("selection") or {}
    value, best = results.number(chosen.get("value")), results.number(chosen.get("epoch"))
    parts = [
        f'<th scope="row"><code>{esc(c.key)}</code></th>',
        cell(esc(c.source)),
        cell(esc(c.setting)),
        *(cell(esc(getattr(c, name))) for name in varied),
        cell(esc(c.task)),
    ]
    parts += [cell(f"{float(c.fraction) * 100:g} %", sort=float(c.fraction)), cell(esc(c.resolution)), cell(esc(c.seed))]
    text = f"{num(c.value(metric))} {esc(evidence.unit(metric, c.dataset))}" if metric else '<span class="tag bad">no number</span>'
    parts += [
        cell(text, sort=c.value(metric)),
        cell(f"{num(value)} {esc(chosen.get('metric', ''))}", sort=value),
        cell(num(best, 0), sort=best),
    ]
    for name in ("params", "macs", "seconds"):
        amount = results.number(c.result.get(name))
        parts.append(cell(short(amount), sort=amount))
    return "".join(parts)


def short(value: float) -> str:
    """1.2 M, 3.4 G, 56."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f} {unit}"
    return num(value, 0)
