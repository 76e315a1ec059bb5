"""Sections of the report around the declared findings: the ledger of claims, average ranks, and the secondary tests of earlier studies.

    html = claims(evidence); html = ranked(evidence); html = secondary_tests(evidence)

None of the last two declares anything: ranks leave out seeds and patients, secondary tests each leave out one of the two.
"""

import functools
import math
from typing import Any

import pandas as pd

from analysis import figures, results
from analysis.evidence import Evidence
from analysis.findings import APART, Finding
from analysis.ledger import LOW, so_far
from analysis.loaded import Loaded
from analysis.ranks import ranks
from analysis.results import Cell
from analysis.secondary import secondary
from analysis.tables import cell, esc, num, pvalue, table
from base import storage

TESTED = 60  # findings whose secondary tests are made: each reads the predictions of two sides
TESTS = (
    ("p_paired", "paired t"),
    ("p_welch", "Welch t"),
    ("p_student", "Student t"),
    ("p_wilcoxon", "Wilcoxon"),
    ("p_delong", "DeLong"),
)


def claims(evidence: Evidence) -> str:
    """Every claim of the study with its verdict; empty for a study without claims."""
    if not evidence.ledger and not evidence.withdrawn:
        return ""
    rows = []
    for entry in evidence.ledger:
        mark = {"holds": "good", "fails": "bad"}.get(entry.verdict, "")
        late = ' <span class="tag">direction only</span>' if entry.direction_only else ""
        late += ' <span class="tag bad">added after the results</span>' if entry.late else ""
        late += f' <span class="tag">{so_far(entry.missing)}</span>' if entry.missing else ""
        late += f' <span class="tag bad">{LOW}</span>' if entry.low else ""
        c = entry.comparison
        parts = [f'<th scope="row">{esc(entry.claim.name)}</th>', cell(esc(entry.claim.sentence), cls="words")]
        parts += [cell(f'<span class="tag {mark}">{entry.verdict}</span>{late}'), cell(esc(entry.where()))]
        parts += [cell(esc(entry.effect()), sort=c.estimate), cell(esc(f"{entry.claim.expect} by {entry.claim.margin:g}"))]
        parts += [cell(esc(pvalue(entry.adjusted)), sort=entry.adjusted), cell(esc(entry.about)), cell(esc(entry.why), cls="words")]
        parts += [cell(esc(c.basis)), cell(str(c.units), sort=c.units), cell(str(c.patients), sort=c.patients)]
        rows.append("".join([*parts, cell(esc(entry.needs() or "–"))]))
    heads = ["claim", "sentence", "verdict", "on", "difference, 95 %", "expected", "p after Holm", "of", "why", "interval over", "seeds"]
    heads += ["patients", "would settle it"]
    gone = f'<p class="bad">Withdrawn after they were registered: {esc(", ".join(evidence.withdrawn))}.</p>' if evidence.withdrawn else ""
    note = (
        f"{_when(evidence)} Holds: the difference goes the claim's way after Holm's correction over the claims, in direction only where"
        " its interval holds differences under the margin; fails: its own 95 % interval rules out what it says, uncorrected; underpowered:"
        " neither; not comparable: a side's source has seen the labels or may have seen the test images, a cell of it failed, or its curves"
        " say nothing of speed, which no number of seeds mends. Intervals are 95 %, of claims of equivalence 90 % where it is"
        " said. An interval over seeds alone says nothing of other patients. Claims about encoders speak of these weights alone."
    )
    return (table(heads, rows) if rows else "") + gone + f'<p class="faint">{note}</p>'


def _when(evidence: Evidence) -> str:
    """When the claims were written."""
    late = {entry.claim.name: entry.late for entry in evidence.ledger}
    if not any(late.values()):
        return "Written into the study file before their results stood."
    if all(late.values()):
        return "Added to the study file when their results stood."
    return f"Written into the study file before their results stood, but for {esc(', '.join(name for name in late if late[name]))}."


def settings_by_source(evidence: Evidence) -> pd.DataFrame:
    """The headline metric, mean over seeds on test images: a row a setting, a column a source. Own-source and exposed cells are missing,
    and means that lack a cell; a source that stands here under two names has one column."""
    rows: dict[str, dict[str, float]] = {}
    named = [source for source in evidence.sources() if source not in _twins(evidence)]
    for group, held in results.in_groups(c for c in evidence.cells if not c.apart).items():
        metric = results.headline(held)
        if metric is not None:
            sides = {source: own for (source,), own in results.by(held, "source").items() if not evidence.lost(own)}
            means = {source: results.mean_sd(c.value(metric) for c in own)[0] for source, own in sides.items()}
            rows[" ".join(map(str, group))] = means
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=named if rows else [])


def _twins(evidence: Evidence) -> list[str]:
    """Second names of sources (A/A)."""
    return list(dict.fromkeys(pair.b[0].source for pair in evidence.pairs.pairs if pair.kind == "control"))


def ranked(evidence: Evidence) -> str:
    """Average ranks with a critical-difference diagram; empty with fewer than two sources or settings."""
    frame = settings_by_source(evidence)
    if frame.shape[1] < 2 or len(frame) < 2:
        return ""
    found = ranks(frame)
    if not found.average:
        return f"<p>No ranks: {esc(found.why)}.</p>"
    drawn = figures.critical("ranks", found.average, found.settings, found.critical_difference, found.cliques)
    rows = ["".join([f'<th scope="row">{esc(name)}</th>', cell(num(rank, 2), sort=rank)]) for name, rank in found.average.items()]
    how = "exact over all orders of the sources" if found.exact else "asymptotic, all orders being too many to count"
    said = f"Friedman {found.statistic:.2f}, p {pvalue(found.p)}, {how}" if math.isfinite(found.p) else found.why
    twins = "".join(f"; {name} has no rank of its own, being the baseline under another name (A/A)" for name in _twins(evidence))
    note = (
        f"{found.settings} settings that every source has, {found.dropped} left out where one lacks a cell, is own source or"
        f" exposed{esc(twins)}; {esc(said)}. Sources under one bar are nearer than Nemenyi's critical difference (Demsar 2006). Tasks of"
        " one dataset and strategies of one task are not independent settings, and seeds and patients do not enter: nothing is declared"
        " from ranks."
    )
    return f'<div class="wide">{drawn}</div>{table(["encoder", "average rank"], rows, cls="numbers")}<p class="faint">{note}</p>'


def _sides(evidence: Evidence) -> functools.partial[list[Cell]]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for one in evidence.cells:
        groups.setdefault((one.source, *one.group), []).append(one)
    return functools.partial(_side, groups)


def _side(groups: dict[tuple[Any, ...], list[Cell]], finding: Finding, source: str) -> list[Cell]:
    held = (finding.architecture, finding.strategy, finding.options, finding.task, finding.fraction, finding.resolution)
    return groups.get((source, *held), [])


def secondary_tests(evidence: Evidence) -> str:
    """A row a comparison of the primary table with the tests that earlier studies print; also written to report/secondary.csv."""
    compared = [f for f in evidence.findings if f.kind != "claim" and math.isfinite(f.comparison.estimate)]
    side, family = _sides(evidence), max(1, evidence.family)
    load, rows, listed = Loaded(), [], []
    for f in compared[:TESTED]:
        a, b = ([held for one in side(f, name) if (held := load(one)) is not None] for name in (f.a, f.b))
        found = secondary(a, b, f.metric, family=family)
        if f.kind in APART or any(evidence.under_floor(side(f, name)) for name in (f.a, f.b)):
            found.pop("stars", None)
        listed.append({"a": f.a, "b": f.b, "on": f.words(evidence), "metric": f.metric, **found})
        parts = [f'<th scope="row">{esc(f.a)} − {esc(f.b)}</th>', cell(esc(f.words(evidence)), cls="words")]
        for name, _ in TESTS:
            value = found.get(name, math.nan)
            if isinstance(value, str):
                parts.append(cell('<span class="faint">refused</span>', sort="2", title=value))
            else:
                parts.append(cell(esc(pvalue(value)), sort=value))
        for name in ("cohen_d", "hedges_g"):
            value = found.get(name, math.nan)
            parts.append(cell(num(value, 2) if isinstance(value, float) else "–", sort=value))
        rows.append("".join([*parts, cell(esc(found.get("stars", "–")))]))
    if not rows:
        return ""
    storage.put(storage.join(evidence.out, "report", "secondary.csv"), pd.DataFrame(listed).to_csv(index=False, lineterminator="\n"))
    refused: dict[str, str] = {}
    for row in listed:
        for name, word in TESTS:
            if isinstance(row.get(name), str):
                refused.setdefault(f"{word}: {str(row[name]).removeprefix('refused: ')}", "")
    heads = ["comparison", "on", *(f"p, {word}" for _, word in TESTS), "Cohen's d", "Hedges' g", "stars"]
    more = f" The first {TESTED} of {len(compared)} comparisons." if len(compared) > TESTED else ""
    reasons = "".join(f"<li>{esc(reason)}</li>" for reason in refused)
    why = f"<details><summary>Why tests were refused</summary><ul>{reasons}</ul></details>" if reasons else ""
    note = (
        "Uncorrected, and nothing is declared from them: tests over seeds take the test patients as given, DeLong takes the trained"
        " networks as given. Stars are the benchmark's own (t-test over seeds); own and exposed sources, and those under a floor, have"
        f" none, nor has what is held against them.{more}"
    )
    return table(heads, rows, cls="numbers") + why + f'<p class="faint">{note}</p>'
