"""The report of a study: one HTML file that opens without a server or a network, with the answer first.

url = report(out)         OUT/report/index.html, results.csv, significance.csv, tables/*.md and *.tex, figures/*.svg

Works on storage alone (`out` may be a URL), for a study that is empty, running, or partly failed.
"""

import re
from pathlib import Path
from string import Template

from analysis import (
    analysis_sections,
    calibration,
    figures,
    leakage_section,
    papers,
    results,
    samples,
    search_section,
    sections,
    statistics_sections,
    subgroups,
    tables,
)
from analysis.evidence import Evidence, gather
from analysis.findings import significance
from analysis.results_csv import write_results
from analysis.tables import esc, in_study, num, short
from base import storage


def report(out: str, evidence: Evidence | None = None) -> str:
    """Write OUT/report/index.html, results.csv, significance.csv, tables in the papers' layouts, and the page's figures one by one.

    Returns the address of the page.

    Args:
        out: the study's folder or URL. evidence: as `gather(out)` gave it, to save reading twice.

    Raises:
        WorkError: the storage cannot be written.
    """
    with evidence or gather(out) as held:
        return _write(held)


def _write(evidence: Evidence) -> str:
    out = evidence.out
    write_results(out, evidence.finished)
    for name in ("tables", "figures", "secondary.csv"):  # those of an earlier report
        storage.remove(storage.join(out, "report", name))
    url, text = storage.join(out, "report", "index.html"), page(evidence)
    storage.put(storage.join(out, "report", "significance.csv"), significance(evidence).to_csv(index=False, lineterminator="\n"))
    evidence.comparisons.write()
    storage.put(url, text)
    for name, drawn in drawings(text).items():
        storage.put(storage.join(out, "report", "figures", f"{name}.svg"), drawn)
    return url


def drawings(text: str) -> dict[str, str]:
    """The figures of a page by their names, each a file of its own."""
    found = re.finditer(r'<svg role="img" aria-labelledby="(\S+)-t .*?</svg>', text, flags=re.S)
    return {one[1]: figures.alone(one[0]) for one in found}


def best_on_validation(evidence: Evidence) -> str:
    """Who leads on validation on the task of the study's champion, as everywhere on the page; and the metric that chooses the champion,
    where that is another."""
    rule = evidence.study.get("champion") or {}
    competing = [c for c in evidence.cells if c.task == rule.get("task")]
    ranked, metric = tables.leading(evidence, competing), results.headline(competing)
    if not ranked or metric is None:
        return ""
    mean, own = ranked[0]
    n, unit = len({(c.source_seed, c.seed) for c in own}), evidence.unit(metric, own[0].dataset)
    lead = f"Best on validation ({own[0].task}, {unit}): <b>{esc(own[0].source)}</b>, {esc(in_study(evidence, own[0]))}"
    lead += f", {num(mean)} over {n} seed{'s' if n > 1 else ''}."
    chosen = evidence.unit(str(rule.get("metric")), own[0].dataset)
    return lead + (f" The champion in MLflow is chosen by {esc(chosen)}." if rule.get("metric") != metric else "")


def _tiles(evidence: Evidence) -> str:
    sick = [run.name for run in evidence.pretrainings if run.result and run.result.get("health") not in ("healthy", "too short", None)]
    unfinished = [run for run in evidence.pretrainings if not run.result]
    failed = sum(run.ending.status == "FAILED" for run in unfinished)
    counts = {"failed": failed, "not finished": len(unfinished) - failed, "not healthy": len(sick)}
    state = f"{len(evidence.pretrainings) - len(unfinished)} finished" + "".join(f", {n} {word}" for word, n in counts.items() if n)
    spent = sum(results.number(c.result.get("seconds") or 0) for c in evidence.cells + evidence.controls)
    spent += sum(results.number((run.result or {}).get("seconds") or 0) for run in evidence.pretrainings)
    floors = evidence.floors
    shown = [
        ("cells", f"{len(evidence.cells)} of {evidence.asked}", "bad" if evidence.failed or evidence.numberless else ""),
        *([("without a number", f"{len(evidence.numberless)} of {len(evidence.cells)}", "bad")] if evidence.numberless else []),
        ("encoders", str(len(evidence.sources())), ""),
        ("tasks", str(len({c.task for c in evidence.cells})), ""),
        ("seeds", str(len({c.seed for c in evidence.cells})), ""),
        ("pretraining" if len(evidence.pretrainings) == 1 else "pretrainings", state, "bad" if sick or failed else ""),
        *([("under a floor", f"{len(floors.below)} of {floors.known}", "bad")] if floors.below else []),
        (
            "compute of cells and pretrainings",
            f"{spent / 3600:.1f} h" if spent > 5400 else f"{spent / 60:.0f} min" if spent > 90 else f"{short(spent)} s",
            "",
        ),
    ]
    return "".join(
        f'<div class="tile {cls}"><b>{esc(value)}</b><span>{esc(name.removesuffix("s") if value == "1" else name)}</span></div>'
        for name, value, cls in shown
    )


def _headline(evidence: Evidence) -> str:
    """The answer, one sentence a line: the same words as `evidence.answer()`."""
    lines = evidence.headlines()
    if not evidence.cells or not lines:
        return esc(evidence.answer())
    low = evidence.floors.warning()
    warning = f'<span class="bad">{esc(low)}. </span>' if low else ""
    lead = evidence.lead()
    spans = [f'<span class="{mark}">{esc(sentence)} </span>' for mark, sentence in lines]
    return warning + (f"<span>{esc(lead)}</span>" if lead else "") + "".join(spans)


def _scope(evidence: Evidence) -> str:
    """What the sentences may be taken to claim."""
    abouts = sorted({f.about for f in evidence.findings if f.kind in ("claim", "gain", "chain")})
    if not abouts:
        return ""
    rest = ", not about pretraining methods: that needs at least 3 pretraining seeds" if "methods" not in abouts else ""
    narrow = any(f.entry is not None and f.entry.claim.expect == "equivalent" for f in evidence.findings)
    others = {"control": "A/A controls", "own": "own sources", "exposed": "exposed sources"}
    left_out = [words for kind, words in others.items() if any(f.kind == kind for f in evidence.findings)]
    named = "Each sentence" + (f" but those of {' and '.join(left_out)}" if left_out else "")
    named += " says whether it is about" if len(abouts) > 1 else " is about"
    levels = "Intervals are 95 %" + (", of claims of equivalence 90 %" if narrow else "")
    return f"{named} {' or '.join(abouts)}{rest}. {levels}."


METHOD = (
    "Differences are of means over pretraining seeds of means over fine-tuning seeds, on the same test images. Of an interval patients"
    " are drawn, and what seeds add is computed in closed form, unbiased (after the Multi-Bootstrap, Sellam et al. 2022); with one seed"
    " it holds patients alone. Its quantiles are Student's. Statements are declared after Holm's correction over the family that was"
    " registered before the run, what was withdrawn since included; the intervals printed are uncorrected. No difference shown means that"
    " the interval includes 0, not that the encoders are equal: its width says how much was ruled out. Detectable is the smallest true"
    " difference found in 80 % of repetitions of this study at the 5 % level, before correction, and with one seed there is none."
    " Redrawn counts bootstrap replicates in which a label lost a class."
)


def page(evidence: Evidence) -> str:
    """The whole page as text."""
    lead = best_on_validation(evidence)
    tasks = list(dict.fromkeys(c.task for c in evidence.cells))
    pictures = "".join(f"<h3>{esc(task)}</h3>{samples.gallery(evidence, task)}" for task in tasks)
    gaps = sections.missing(evidence)
    # What needs no comparison is drawn while other processes still make these.
    curves, subgrouped, calibrated = sections.curves(evidence), subgroups.section(evidence), calibration.section(evidence)
    analysed, printed = analysis_sections.sections(evidence), papers.section(evidence)
    found = [f for f in evidence.findings if f.kind != "claim"]
    body = [
        ("missing", "Missing and failed", gaps),
        ("winners", "Which wins where, and at what cost", tables.winners(evidence)),
        ("claims", "Claims", statistics_sections.claims(evidence)),
        (
            "matrix",
            "Encoder × task",
            tables.matrix(evidence) + (f"<p>{lead}</p>" if lead else "") + tables.classes(evidence) if tasks else "",
        ),
        (
            "differences",
            "Differences",
            sections.forests(evidence) + tables.findings(evidence) + f'<p class="faint">{METHOD} {search_section.tuning(evidence)}</p>'
            if found or evidence.dropped
            else "",
        ),
        ("ranks", "Average ranks", statistics_sections.ranked(evidence)),
        ("secondary", "Secondary tests", statistics_sections.secondary_tests(evidence)),
        ("searches", "Searches: cuts and rates", search_section.searches(evidence)),
        ("controls", "Controls", sections.controls(evidence) if tasks else ""),
        ("curves", "Learning curves", curves),
        *analysed,
        ("subgroups", "Subgroups", subgrouped),
        ("calibration", "Calibration", calibrated),
        ("images", "Sample images", pictures),
        ("pretraining", "Health of the pretrainings", sections.health(evidence)),
        ("leakage", "Leakage", leakage_section.leakage(evidence)),
        ("data", "Data", sections.data(evidence)),
        ("papers", "Tables as in the papers", printed),
        ("cells", "All cells", tables.cells(evidence) if tasks else ""),
        ("environment", "Environment and reproduction", sections.environment(evidence)),
    ]
    shown = [(key, title, text) for key, title, text in body if text]
    nav = "".join(f'<a href="#{key}">{esc(title)}</a>' for key, title, _ in shown)
    main = "".join(f'<section id="{key}"><h2>{esc(title)}</h2>{text}</section>' for key, title, text in shown)
    template = Template((Path(__file__).parent / "report.html").read_text())
    name = str(evidence.study.get("study") or "study")
    state = f"Running or incomplete: {len(evidence.missing)} of {evidence.asked} cells have no result yet. " if evidence.missing else ""
    if evidence.numberless:
        count = f"{len(evidence.numberless)} of {len(evidence.cells)} finished cells have no number on test images"
        state += f"{count}: what is compared with them is not declared."
    return template.substitute(
        title=esc(name),
        answer=esc(evidence.answer()),
        state=f'<p class="banner">{esc(state.strip())}</p>' if state else "",
        headline=_headline(evidence),
        scope=esc(_scope(evidence)),
        tiles=_tiles(evidence),
        nav=nav,
        main=main,
    )
