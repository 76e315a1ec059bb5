"""`allograft analyze convergence`: how soon the cells of studies reach a threshold; tables and figures written, the main of it printed."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import pandas as pd

from analysis import convergence as speed
from analysis import plots, results
from analysis.correlation import correlation
from analysis.counted import counted
from analysis.evidence import floors_of
from analysis.floors import Floors
from base import storage
from base.errors import RequestError, in_a_line, unknown
from base.paths import absolute, safe_name
from cluster.leaf import Leaf
from cluster.outs import require_study
from cluster.sources import baseline
from encoders.cuts import find

SHOWN = 12  # rows of a table on the screen
TRANSFUSED = "transfusion cut="  # and the cut


def convergence(outs: Sequence[str], threshold: float | None, by: str, base: str | None, accuracy: str | None, out: str) -> None:
    """`allograft analyze convergence`. Raises RequestError where no study stands or no cell has a curve."""
    if by not in get_args(speed.By):
        raise unknown("unit", by, get_args(speed.By), "--by")
    cells, counts = [], []
    floors: dict[tuple[str, float], Floors] = {}
    for study in (require_study(absolute(place)) for place in outs):
        held = results.finished(study)
        cells += held
        counts += counted(study, held)
        floors |= floors_of(study, held, compute=False).values
    folder = absolute(out)
    leaf = Leaf(folder)
    if not of_cells(cells, threshold, cast(speed.By, by), base, leaf, floors):
        raise RequestError("no finished cell has a learning curve", where=", ".join(outs), hint=f"allograft run {outs[0]}/study.yaml")
    if accuracy is not None:
        ranks(counts, absolute(accuracy), leaf)
    print(folder)


def of_cells(
    cells: Sequence[results.Cell],
    threshold: float | None,
    by: speed.By,
    base: str | None,
    leaf: Leaf,
    floors: Mapping[tuple[str, float], Floors],
    most: int | None = None,
) -> int:
    """Tables and figures of these cells' learning curves, figures of the first `most` settings; how many curves there are.

    Args:
        base: the source that speed-ups are over; by default that of random weights.
        floors: by task and share of its labels, of test images; to a threshold that is not above them no speed-up is given.

    Raises:
        RequestError: `by` names what their rows do not count.
    """
    curves = speed.curves_of(cells, by)
    base = base or baseline(cells) or "random"
    if curves and base not in {curve.source for curve in curves}:
        leaf.notes.append(f"No learning curve of {base}, which speed-ups are over: none is given.")
        leaf.say(leaf.notes[-1])
    runs: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    heads = ("source", "strategy", by, "censored", f"times faster than {base}", "area", "best")
    groups: list[tuple[tuple[str, ...], str, list[speed.Curve]]] = []
    for setting in dict.fromkeys((*curve.group, curve.metric) for curve in curves):
        own = [curve for curve in curves if (*curve.group, curve.metric) == setting]
        apart = compared(own, base) if threshold is None else {"": own}
        groups += [(setting, strategy if len(apart) > 1 else "", held) for strategy, held in apart.items()]
    if most is not None and len(groups) > most:
        leaf.notes.append(f"Figures of the first {most} of {len(groups)} comparisons; the tables have all.")
    for number, (group, strategy, held) in enumerate(groups):
        drawn_too = most is None or number < most
        sides = [[curve for curve in held if curve.label == label] for label in dict.fromkeys(curve.label for curve in held)]
        level = speed.common_threshold(sides) if threshold is None else threshold
        rows = speed.reached(held, level, base, speed.untrained(group[-1], floors.get((group[0], float(group[2])), {})))
        runs += _runs(rows, group, level, by)
        summary += _summary(rows, group, level, by)
        title, name = ", ".join(filter(None, (_title(group), strategy))), safe_name(*filter(None, (*group, strategy)))
        what = f"{title}: {group[-1]} of {level:.4g} on validation"
        body = [_line(row) for row in rows]
        lines += [[title, f"{level:.4g}", *line] for line in body]
        text = "; ".join(
            f"{line[0]}, {line[1]}: {line[2]} {by}, {line[3]} censored, {line[4]} times as fast as {base}" for line in body[:SHOWN]
        )
        drawn = partial(plots.learning, held, level, group[-1], by, title)
        if drawn_too:
            leaf.draw(f"{name}-curves", what, f"Learning curves and the threshold. {text}", drawn, 6.4, 3.4 + 0.12 * len(rows))
        drawn = partial(plots.steps, rows, by, title)
        if drawn_too:
            leaf.draw(f"{name}-steps", what, f"How long every run took. {text}", drawn, 7.4, 1.3 + 0.34 * len(rows))
        leaf.say(what)
        leaf.show(body[:SHOWN], heads)
        for why in dict.fromkeys(row.why for row in rows if row.why):
            leaf.notes.append(f"No speed-up over {base}, {title}: the threshold of {level:.4g} is not above {why}.")
            leaf.say(leaf.notes[-1])
        if len(rows) > SHOWN:
            leaf.say(f"and {len(rows) - SHOWN} others")
        for source in dict.fromkeys(row.source for row in rows):
            chain = transfused(rows, source, group[1], base)
            if chain:
                steps += [{**_setting(group), "source": source, "by": by, **vars(depth)} for depth in chain]
                drawn = partial(plots.depths, chain, by, f"{source}, {title}")
                text = "; ".join(f"{depth.depth}: {depth.steps:g} {by}, {depth.gain:g} saved" for depth in chain)
                what = f"{title}: {source} by the depth that is transfused"
                if drawn_too:
                    leaf.draw(f"{name}-{safe_name(source)}-depths", what, text, drawn, 7.4, 3.0)
        leaf.say()
    if curves:
        leaf.table("runs.csv", f"{by} to the threshold, every run", runs)
        leaf.table("convergence.csv", f"{by} to the threshold", summary, lines, ("setting", "threshold", *heads))
    if steps:
        shown = [[str(row["source"]), str(row["depth"]), f"{row['steps']:g}", f"{row['gain']:g}", f"{row['share']:.0%}"] for row in steps]
        leaf.table("depths.csv", "what each transfused depth saves", steps, shown, ("source", "depth", by, "saved", "of all saved"))
    return len(curves)


def compared(curves: Sequence[speed.Curve], base: str) -> dict[str, list[speed.Curve]]:
    """The curves of one setting by what is held against each other, and so at one threshold: those of one strategy, and all of a
    transfusion chain, from none to all weights; beside a strategy that `base` lacks, or has alone, its runs trained whole."""
    found: dict[str, list[speed.Curve]] = {}
    for curve in curves:
        found.setdefault("full" if curve.strategy.startswith(TRANSFUSED) else curve.strategy, []).append(curve)
    whole = [curve for curve in curves if (curve.source, curve.strategy) == (base, "full")]
    alone = {name for name, held in found.items() if name != "full" and not {curve.source for curve in held} > {base}}
    return {name: [*whole, *held] if name in alone else held for name, held in found.items()}


def transfused(rows: Sequence[speed.Reached], source: str, architecture: str, base: str) -> list[speed.Depth]:
    """From random weights over each transfused cut to all weights; nothing where the source was not transfused at two cuts, or where the
    threshold says nothing of speed."""
    held = [row for row in rows if row.source == source and row.strategy.startswith(TRANSFUSED)]
    by_cut = {row.strategy.removeprefix(TRANSFUSED): row.median for row in held}
    if len(by_cut) < 2 or any(row.why for row in held):
        return []
    chain = [(cut, by_cut[cut]) for cut in sorted(by_cut, key=lambda cut: find(architecture, cut))]
    ends = {(row.source, row.strategy): row.median for row in rows}
    start = [("none", ends[base, "full"])] if (base, "full") in ends else []
    whole = [("all", ends[source, "full"])] if (source, "full") in ends else []
    names, steps = zip(*(start + chain + whole), strict=True)
    return speed.marginal(names, steps)


def _setting(group: Sequence[str]) -> dict[str, str]:
    return dict(zip(("task", "architecture", "fraction", "resolution", "metric"), group, strict=True))


def _title(group: Sequence[str]) -> str:
    return results.in_words(*group[:4])


def _runs(rows: Sequence[speed.Reached], group: Sequence[str], level: float, by: str) -> list[dict[str, Any]]:
    return [
        {
            **_setting(group),
            "threshold": level,
            "source": row.source,
            "strategy": row.strategy,
            "apart": row.apart,
            "source_seed": source_seed,
            "seed": seed,
            "by": by,
            "reached": math.isfinite(value),
            "at": value if math.isfinite(value) else None,
            "shown": speed.shown(value, row.ends[source_seed, seed]),
        }
        for row in rows
        for (source_seed, seed), value in row.steps.items()
    ]


def _summary(rows: Sequence[speed.Reached], group: Sequence[str], level: float, by: str) -> list[dict[str, Any]]:
    return [
        {
            **_setting(group),
            "threshold": level,
            "by": by,
            "source": row.source,
            "strategy": row.strategy,
            "apart": row.apart,
            "runs": len(row.steps),
            "censored": row.censored,
            "median": row.words(),
            "speedup": row.speedup.ratio,
            "speedup_sign": row.speedup.sign,
            "speedup_low": row.speedup.low,
            "speedup_high": row.speedup.high,
            "speedup_undefined": row.speedup.undefined,
            "why": row.why,
            "area": row.area,
            "best": row.best,
        }
        for row in rows
    ]


def _line(row: speed.Reached) -> list[str]:
    censored = f"{row.censored} of {len(row.steps)}"
    return [
        speed.marked(row.source, row.apart),
        row.strategy,
        row.words(),
        censored,
        row.speedup.words(),
        f"{row.area:.4f}",
        f"{row.best:.4f}",
    ]


def accuracies(table: str) -> pd.DataFrame:
    """A CSV of `source` and `accuracy`, of some also `architecture`: the accuracy of each source on what it was pretrained for. Rows
    without an accuracy are left out.

    Raises:
        RequestError: no such file, no table, other columns, or an accuracy that is not a number.
    """
    raw, hint = storage.read_or_none(table), "a CSV with the columns source, accuracy and, of several ones, architecture"
    if raw is None:
        raise RequestError("no such file", where=table, hint=hint)
    try:
        frame = pd.read_csv(io.BytesIO(raw))
        if not {"source", "accuracy"} <= set(frame.columns):
            raise RequestError("the columns source and accuracy are needed", where=table, hint=hint)
        frame["accuracy"] = pd.to_numeric(frame["accuracy"])
    except ValueError as error:
        raise RequestError(in_a_line(error), where=table, hint=hint) from error
    return frame[np.isfinite(frame["accuracy"])]


def mean_of_all(cells: Sequence[results.Cell], metric: str | None) -> float:
    """Mean over the seeds of a source; NaN where one of them has no number: those that did not diverge are a selection."""
    mean, _, n = results.mean_sd(cell.value(metric or "") for cell in cells)
    return mean if n == len(cells) else math.nan


def ranks(cells: Sequence[results.Cell], table: str, leaf: Leaf, most: int | None = None) -> None:
    """Does a source's own accuracy foretell the task's metric? Spearman over sources, in each setting; tables, figures of the first `most`.

    With a column `architecture` a point is a source in an architecture, and a setting holds all architectures (one corpus, several
    networks). Without it each architecture is a setting of its own. Controls are left out.

    Args:
        cells: those that sources may be ranked by (`analysis.counted`).

    Raises:
        RequestError: not a CSV of source and accuracy.
    """
    frame = accuracies(table)
    pooled = "architecture" in frame
    point, own = (("source", "architecture"), ()) if pooled else (("source",), ("architecture",))
    known = {tuple(map(str, name)): float(value) for *name, value in frame[[*point, "accuracy"]].itertuples(index=False, name=None)}
    named = [cell for cell in cells if not cell.shuffled]
    rows, listed = [], []
    for group, held in results.by(named, "task", "fraction", "resolution", "strategy", "options", *own).items():
        task, fraction, resolution, strategy, options, *network = group
        metric = results.headline(held)
        means = {name: mean_of_all(own, metric) for name, own in results.by(held, *point).items()}
        both = [(known[name], mean, " ".join(name)) for name, mean in means.items() if name in known and math.isfinite(mean)]
        if len(both) < 3:
            continue
        rank = correlation([x for x, _, _ in both], [y for _, y, _ in both])
        where = results.in_words(task, network[0] if network else "all architectures", fraction, resolution)
        title = f"{where}, {results.setting(strategy, options)}"
        chance = f"p {rank.p:.3f}" if math.isfinite(rank.p) else rank.why
        rows += [{"setting": title, "source": name, "accuracy": x, "metric": metric, "value": y} for x, y, name in both]
        listed.append([title, str(metric), rank.rho.words(2), chance.removeprefix("p "), str(rank.n)])
        if most is None or len(listed) <= most:
            drawn = partial(plots.ranked, both, f"{rank.rho.words(2)}, {chance}", str(metric), title)
            text = f"Spearman {rank.rho.words(2)}, {chance}, over {rank.n} sources"
            leaf.draw(f"accuracy-{len(listed)}", f"{title}: accuracy of the source against {metric}", text, drawn, 4.6, 3.2)
    if not listed:
        names = ", ".join(sorted(" ".join(name) for name in known))
        raise RequestError(
            "fewer than three sources of a setting stand in the table, own and exposed ones left out", where=table, hint=names
        )
    if most is not None and len(listed) > most:
        leaf.notes.append(f"Figures of the first {most} of {len(listed)} settings; the tables have all.")
    if without := sorted({" ".join(name) for name in results.by(named, *point) if name not in known}):
        leaf.notes.append(f"Without an accuracy, and so left out: {', '.join(without)}.")
    heads = ("setting", "metric", "Spearman", "p", "sources")
    leaf.table("accuracy.csv", "accuracy and result of every source", rows)
    made = [dict(zip(heads, line, strict=True)) for line in listed]
    leaf.table("correlation.csv", "accuracy of sources against the task's metric", made, listed, heads)
    leaf.show(listed, heads)
