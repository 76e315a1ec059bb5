"""Two studies beside each other: what was set otherwise, which results they share, and where these differ.

    url = compare_studies(out, other)        # OUT/report/compare-<other's name>.html

Cells are matched by task, architecture, source, strategy, options, fraction and resolution; differences are other minus first, by the
primary analysis (analysis.statistics.compare), which pairs fine-tuning seeds and draws patients where both were tested on the same images.
Nothing is declared: no family of these comparisons was fixed before either study ran. Differences whose interval holds seeds and patients
are counted above and below 0; those of one seed, of an own source or of an exposed one are shown and not counted. Works on storage alone.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from analysis import results
from analysis.evidence import Evidence, gather
from analysis.figures import svg
from analysis.findings import brief
from analysis.ledger import signed
from analysis.loaded import scores
from analysis.replicates import Bootstrap
from analysis.results import Cell
from analysis.statistics import Comparison, compare, not_comparable
from analysis.tables import ROWS, cell, esc, num, over_seeds, pvalue, table
from base import storage
from base.config import digest

Key = tuple[str, Any, str, str, str, float, int]  # task, architecture, source, strategy, options, fraction, resolution
IGNORED = ("out", "tracking", "resources")  # of a study: where and how fast, not what


def compare_studies(out: str, other: str, bootstrap: Bootstrap | None = None) -> str:
    """Write OUT/report/compare-<study>.html; returns its address.

    Raises:
        WorkError: the storage cannot be written.
    """
    with gather(out, bootstrap) as a, gather(other, bootstrap) as b:
        name = str(b.study.get("study") or "study")
        url = storage.join(out, "report", f"compare-{name}.html")
        storage.put(url, page(a, b, bootstrap))
        return url


def settings(tree: Any) -> Any:
    """A study's tree with lists of named entries by their names, and without nulls and what is empty."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        named = {str(item["name"]): settings({key: value for key, value in item.items() if key != "name"}) or "there" for item in tree}
        tree = named if len(named) == len(tree) else tree
    if not isinstance(tree, dict):
        return tree
    held = {str(key): settings(value) for key, value in tree.items()}
    return {key: value for key, value in held.items() if value is not None and value not in ({}, [])}


def changed(a: Evidence, b: Evidence) -> list[tuple[str, str, str]]:
    """(key, value of the first, value of the other) of what the two study files set otherwise, keys with dots between and values as JSON;
    what one of them has alone, such as a claim, is one row."""
    one, two = (settings({key: value for key, value in e.study.items() if key not in IGNORED}) for e in (a, b))
    return _changed(one, two, "")


def _changed(one: Any, two: Any, key: str) -> list[tuple[str, str, str]]:
    if "." not in key:  # a section of the file: what stands in it is told one by one, also where the other study has none
        one, two = ({} if side is None and isinstance(other, dict) else side for side, other in ((one, two), (two, one)))
    if isinstance(one, dict) and isinstance(two, dict):
        names = dict.fromkeys([*one, *two])
        return [row for name in names for row in _changed(one.get(name), two.get(name), f"{key}.{name}" if key else name)]
    shown = ["–" if value is None else json.dumps(value, default=str) for value in (one, two)]
    return [(key, shown[0], shown[1])] if one != two else []


def _by_key(cells: list[Cell]) -> dict[Key, list[Cell]]:
    names = ("task", "architecture", "source", "strategy", "options", "fraction", "resolution")
    return {(t, a, s, g, o, float(f), int(r)): held for (t, a, s, g, o, f, r), held in results.by(cells, *names).items()}


def _difference(a: list[Cell], b: list[Cell], metric: str, bootstrap: Bootstrap) -> Comparison:
    """Other minus first. Where cells have the same keys they are the same results: nothing is left to compare."""
    if {c.key for c in a} == {c.key for c in b}:
        return not_comparable("the same cells")
    one, two = ([s for c in side if (s := scores(c)) is not None] for side in (a, b))
    if not one or not two:
        return not_comparable("predictions were not kept")
    return compare(two, one, metric, bootstrap=bootstrap)


def _apart(a: Evidence, b: Evidence, one: list[Cell], two: list[Cell]) -> str:
    """A tag where the source has seen these labels or may have seen these test images, which makes a cell evidence for nothing."""
    apart = max(c.apart for c in (*one, *two))
    return f' <span class="tag own">{results.APART[apart]}</span>' if apart else ""


def page(a: Evidence, b: Evidence, bootstrap: Bootstrap | None = None) -> str:
    """The page as text."""
    bootstrap = bootstrap or Bootstrap()
    names = [str(e.study.get("study") or "study") for e in (a, b)]
    titles = names if names[0] != names[1] else [f"{names[0]} ({e.out.rstrip('/').rpartition('/')[2]})" for e in (a, b)]
    held = _by_key(a.cells), _by_key(b.cells)
    both = [key for key in held[0] if key in held[1]]
    rows, points = [], []
    same = worse = better = single = apart = 0
    for key in both[:ROWS]:
        one, two = held[0][key], held[1][key]
        metric = results.headline([*one, *two])
        if metric is None:
            continue
        values = [over_seeds(side, metric) for side in (one, two)]
        found = _difference(one, two, metric, bootstrap)
        found = replace(found, pretraining_seeds=min(found.pretraining_seeds, a.independent(one), b.independent(two)))
        paired = math.isfinite(found.estimate)
        tag = _apart(a, b, one, two)
        same += found.why == "the same cells"
        apart += paired and bool(tag)
        single += paired and not tag and found.basis != "seeds and patients"
        if found.basis == "seeds and patients" and not tag:
            better, worse = better + (found.low > 0), worse + (found.high < 0)
        points.append((values[0][0], values[1][0]))
        parts = [f'<th scope="row">{esc(key[0])}</th>', cell(esc(key[2]) + tag), cell(esc(results.setting(key[3], key[4])))]
        parts += [cell(esc(key[1]))]
        parts += [cell(f"{key[5] * 100:g} %", sort=key[5]), cell(str(key[6]), sort=key[6])]
        parts += [cell(f'{num(mean)} <span class="sd">± {num(sd)}, n {n}</span>', sort=mean) for mean, sd, n, _ in values]
        # Of the seeds that both have, where only they can be paired: not of the means beside it.
        difference = found.estimate if paired else values[1][0] - values[0][0]
        over = f" over {found.units} common seeds" if paired and 0 < found.units < max(len(spread.units) for spread in values) else ""
        told = f"{signed(difference)} {esc(a.unit(metric, one[0].dataset))}{over}" if math.isfinite(difference) else "–"
        parts.append(cell(told, sort=difference))
        interval = f"[{num(found.low)}, {num(found.high)}]" if math.isfinite(found.low) else esc(found.why or found.basis)
        parts += [cell(interval, sort=found.low), cell(esc(pvalue(found.p)), sort=found.p)]
        rows.append("".join([*parts, cell(found.basis if paired else "–"), cell(esc(found.about) if paired else "–")]))
    heads = ["task", "encoder", "strategy", "architecture", "labels", "px", *titles, "difference", "95 % interval", "p, uncorrected"]
    heads += ["interval over", "about"]
    body = [
        ("settings", "What was set otherwise", _settings(a, b, titles)),
        ("data", "Data", _data(a, b, titles)),
        ("results", "Results that both have", _scatter(points, titles) + table(heads, rows, cls="numbers") if rows else ""),
        ("statements", "Statements", _statements(a, b, titles)),
        ("alone", "Results that one has alone", _alone(held, titles)),
    ]
    parted = [(key, title, text) for key, title, text in body if text]
    shown = f", of which the first {ROWS} are compared" if len(both) > ROWS else ""
    reasons = [(single, "of one seed (patients only)"), (apart, "of an own or exposed source")]
    left_out = "; not counted: " + ", ".join(f"{n} {why}" for n, why in reasons if n) if single or apart else ""
    answer = (
        f"{len(both)} settings stand in both studies{shown}, {same} of them with the very same cells; of the others {better} have an"
        f" interval over seeds and patients above 0 for {titles[1]} and {worse} below{left_out}. Nothing is declared:"
        " no family of these comparisons was fixed before the studies ran."
    )
    return Template((Path(__file__).parent / "report.html").read_text()).substitute(
        title=esc(" and ".join(titles)),
        answer=esc(answer),
        headline=esc(answer),
        scope=esc("Differences are the second study minus the first. Intervals are 95 %, uncorrected."),
        state="".join(
            f'<p class="banner">{esc(title)} is running or incomplete: {len(e.missing)} of {e.asked} cells have no result yet.</p>'
            for e, title in zip((a, b), titles, strict=True)
            if e.missing
        ),
        tiles="".join(
            f'<div class="tile"><b>{len(e.cells)} of {e.asked}</b><span>cells, {esc(title)}</span></div>'
            for e, title in zip((a, b), titles, strict=True)
        ),
        nav="".join(f'<a href="#{key}">{esc(title)}</a>' for key, title, _ in parted),
        main="".join(f'<section id="{key}"><h2>{esc(title)}</h2>{text}</section>' for key, title, text in parted),
    )


def _scatter(points: list[tuple[float, float]], titles: list[str]) -> str:
    finite = [point for point in points if all(map(math.isfinite, point))]
    if len(finite) < 2:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        low, high = min(min(p) for p in finite), max(max(p) for p in finite)
        axes.axline((low, low), slope=1, color="C6", linewidth=0.8, linestyle=":")
        axes.plot([p[0] for p in finite], [p[1] for p in finite], "C0o", markersize=4, alpha=0.7)
        pad = 0.05 * (high - low) or 0.01
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(low - pad, high + pad)
        axes.set_xlabel(titles[0])
        axes.set_ylabel(titles[1])

    above = sum(y > x for x, y in finite)
    text = f"Mean test metric of {len(finite)} settings in both studies; {above} are higher in {titles[1]}"
    return svg("both", f"{titles[0]} against {titles[1]}", text, 4.2, 4.0, draw)


def _settings(a: Evidence, b: Evidence, titles: list[str]) -> str:
    found = changed(a, b)
    if not found:
        return "<p>The two study files say the same.</p>"
    rows = ["".join([f'<th scope="row"><code>{esc(key)}</code></th>', cell(esc(one)), cell(esc(two))]) for key, one, two in found[:ROWS]]
    return table(["key", *titles], rows)


def _data(a: Evidence, b: Evidence, titles: list[str]) -> str:
    rows = []
    for name in dict.fromkeys([*a.manifests, *b.manifests]):
        one, two = a.manifests.get(name), b.manifests.get(name)
        versions = [digest(manifest)[:16] if manifest else "–" for manifest in (one, two)]
        verdict = (
            "the same"
            if versions[0] == versions[1]
            else '<span class="tag bad">other images or labels</span>'
            if one and two
            else "one alone"
        )
        rows.append("".join([f'<th scope="row">{esc(name)}</th>', *(cell(f"<code>{v}</code>") for v in versions), cell(verdict)]))
    return table(["dataset", *(f"version in {title}" for title in titles), "verdict"], rows) if rows else ""


def _statements(a: Evidence, b: Evidence, titles: list[str]) -> str:
    """What is declared in one of the studies and not, or the other way round, in the other; and claims that they judge differently."""
    found: list[dict[tuple[str, str], tuple[str, str]]] = []  # (comparison, on): verdict, words
    for e in (a, b):
        held = {}
        for f in e.findings:
            if f.kind in ("gain", "chain", "control"):
                mark = f.mark if f.declared else "not declared"
                place = f"{f.task}, {f.setting}, {f.architecture}, {f.fraction * 100:g} %, {f.resolution} px"
                held[f"{f.a} − {f.b}", place] = mark, f"{brief(f.comparison)}, {mark}"
        for entry in e.ledger:
            late = ", added after the results" if entry.late else ""
            margin = f"{entry.claim.expect} by {entry.claim.margin:g}"
            held[f'claim {entry.claim.name}: "{entry.claim.sentence}"', entry.where()] = (
                f"{entry.verdict}, {margin}{late}",
                f"{entry.effect()}, {entry.verdict} ({margin}){late}",
            )
        found.append(held)
    rows = []
    for key in dict.fromkeys([*found[0], *found[1]]):
        pair = [side.get(key, ("–", "–")) for side in found]
        if pair[0][0] != pair[1][0]:
            rows.append("".join([f'<th scope="row">{esc(key[0])}</th>', cell(esc(key[1])), *(cell(esc(words)) for _, words in pair)]))
    same = "<p>No verdict differs. What neither declares may differ all the same: see the results.</p>"
    more = f"<p>The first {ROWS} of {len(rows)}.</p>" if len(rows) > ROWS else ""
    return table(["comparison or claim", "on", *titles], rows[:ROWS], cls="numbers") + more if rows else same


def _alone(held: tuple[dict[Key, list[Cell]], dict[Key, list[Cell]]], titles: list[str]) -> str:
    rows = []
    for title, own, others in ((titles[0], held[0], held[1]), (titles[1], held[1], held[0])):
        for key in [key for key in own if key not in others]:
            parts = [cell(esc(title)), cell(esc(key[0])), cell(esc(key[2])), cell(esc(results.setting(key[3], key[4]))), cell(esc(key[1]))]
            rows.append("".join([*parts, cell(f"{key[5] * 100:g} %", sort=key[5]), cell(str(key[6])), cell(str(len(own[key])))]))
    more = f"<p>The first {ROWS} of {len(rows)}.</p>" if len(rows) > ROWS else ""
    heads = ["study", "task", "encoder", "strategy", "architecture", "labels", "px", "cells"]
    return table(heads, rows[:ROWS]) + more if rows else ""
