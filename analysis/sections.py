"""Sections of the report as HTML text: curves, health of the pretrainings, controls, data cards, environment, what is missing.

Each takes the Evidence and returns HTML, or an empty string where there is nothing to say.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from analysis import figures, results
from analysis.convergence import CHANCE
from analysis.evidence import Evidence
from analysis.findings import Finding
from analysis.loaded import scores
from analysis.results import Cell
from analysis.tables import ROWS, cell, esc, num, over_seeds, short, table
from base import paths, storage
from base.config import digest

PANELS = 12  # learning-curve figures in a page; more would not be read
DRAWN = 40  # differences of a figure
LINES = 8  # sources of a figure: there are seven colours


def colours(evidence: Evidence) -> dict[str, int]:
    """The number of each source's colour, the same in every figure."""
    return {source: i for i, source in enumerate(evidence.sources())}


def forests(evidence: Evidence) -> str:
    """One figure for each metric that has differences; a claim about a comparison that is also a gain or a control stands for it."""
    by_metric: dict[str, dict[object, list[Finding]]] = {}
    for i, f in enumerate(evidence.findings):
        same = f.compared if math.isfinite(f.comparison.estimate) else i
        by_metric.setdefault(evidence.unit(f.metric, f.dataset), {}).setdefault(same, []).append(f)
    known = {unit: held for unit, held in by_metric.items() if any(isinstance(same, tuple) for same in held)}
    parts, more = [], 0
    for i, (unit, held) in enumerate(known.items()):
        rows = [(_forest_label(evidence, group[0]), group[0], any(f.kind == "control" for f in group)) for group in held.values()]
        parts.append(figures.forest(f"forest{i}", rows[:DRAWN], unit))
        more += len(rows[DRAWN:])
    note = "Filled marks are declared after Holm's correction; squares are A/A controls, where any difference is chance."
    note += f" The first {DRAWN} of each metric; {more} more are in significance.csv." if more else ""
    return f'<div class="wide">{"".join(parts)}</div>' + (f'<p class="faint">{note}</p>' if parts else "")


def _forest_label(evidence: Evidence, f: Finding) -> str:
    where = f.entry.where() if f.entry is not None else f.words(evidence)
    return f"{f.a} − {f.b}, {where}"


def curves(evidence: Evidence) -> str:
    """Validation metric by epoch for each task and setting, and the metric against the share of labels where that varies."""
    parts, order = [], colours(evidence)
    groups = results.in_groups(evidence.cells)
    for i, (group, every) in enumerate(list(groups.items())[:PANELS]):
        held = _leading(evidence, every)
        series: dict[str, tuple[int, list[list[float]]]] = {}
        label = ""
        for c in held:
            rows = storage.read_rows(storage.join(c.url, "metrics.jsonl"))
            name = next((n for row in rows for n in row if n == f"val_{(c.result.get('selection') or {}).get('metric')}"), "")
            name = name or next((n for row in rows for n in row if n.startswith("val_") and n != "val_loss"), "val_loss")
            curve = [value for row in rows if math.isfinite(value := results.number(row.get(name)))]
            if curve:
                series.setdefault(c.source, (order[c.source], []))[1].append(curve)
                label = evidence.unit(name.removeprefix("val_"), c.dataset)
        if series:
            architecture, strategy, options, task, fraction, resolution = group
            words = [task, results.setting(strategy, options)] + ([f"{fraction * 100:g} %"] if len(evidence.varied["fraction"]) > 1 else [])
            words += [f"{resolution} px"] if len(evidence.varied["resolution"]) > 1 else []
            words += [architecture] if len(evidence.varied["architecture"]) > 1 else []
            parts.append(figures.learning(f"learn{i}", ", ".join(words), series, f"validation {label}"))
    many = f" Of {len(order)} encoders the first and those that lead on validation." if len(order) > LINES else ""
    more = f"The first {PANELS} of {len(groups)} settings." if len(groups) > PANELS else ""
    shares = _by_fraction(evidence, order)
    note = "Lines are means over n runs for as long as all of them train, bands their range, thin lines runs that trained on. " + (
        "Against the share of the labels, bars are one standard deviation over seeds, of several pretrainings over their means. "
        if shares
        else ""
    )
    return f'<div class="panels">{"".join(parts + shares)}</div><p class="faint">{note}{more}{many}</p>' if parts else ""


def _leading(evidence: Evidence, cells: list[results.Cell]) -> list[results.Cell]:
    """Cells of one setting: those of the study's first source and of as many that do best on validation as a figure can tell apart."""
    held, metric = results.by(cells, "source"), results.headline(cells)
    means = {source: results.mean_sd(c.value(metric or "", "val") for c in own)[0] for (source,), own in held.items()}
    known = [source for source in evidence.sources() if source in means]
    best = sorted(known[1:], key=lambda source: -means[source] if math.isfinite(means[source]) else math.inf)[: LINES - 1]
    return [c for c in cells if c.source in {*known[:1], *best}]


def _by_fraction(evidence: Evidence, order: dict[str, int]) -> list[str]:
    if len(evidence.varied["fraction"]) < 2:
        return []
    parts: list[str] = []
    panels = results.by(evidence.cells, "task", "dataset", "strategy", "options", "architecture", "resolution")
    for i, ((task, dataset, *_), held) in enumerate(panels.items()):
        metric = held[0].primary()
        if metric is None or len({c.fraction for c in held}) < 2:
            continue
        series: dict[str, tuple[int, list[tuple[float, float, float]]]] = {}
        for (source, fraction), cells in results.by(held, "source", "fraction").items():
            mean, sd, _, units = over_seeds(cells, metric)
            if units:
                series.setdefault(source, (order[source], []))[1].append((float(fraction), mean, sd))
        # Shares vary, or there were no figure: the last of the words is the share.
        title = ", ".join(dict.fromkeys([task, held[0].setting, *evidence.where(held[0])[:-1]]))
        if len(parts) == PANELS:
            return [*parts, f'<p class="faint">The first {PANELS} settings with several shares.</p>']
        parts.append(figures.fractions(f"frac{i}", title, series, f"test {evidence.unit(metric, dataset)}"))
    return parts


def health(evidence: Evidence) -> str:
    """A row for each pretraining with its verdict, and its curves."""
    if not evidence.pretrainings:
        return "<p>This study pretrains nothing.</p>" if evidence.study else ""
    rows = []
    for run in evidence.pretrainings:
        held = run.result or {}
        verdict = str(held.get("health", "")) or _ended(run)
        said = next((str(row["why"]) for row in reversed(run.rows) if row.get("event") == "health" and row.get("why")), "")
        good = "good" if verdict == "healthy" else "bad" if held or run.ending.status == "FAILED" else ""
        recipe = run.config.get("recipe")
        method = held.get("method") or (recipe.get("method") if isinstance(recipe, dict) else recipe) or "–"
        data = ", ".join(str(entry.get("dataset", "")) for entry in run.config.get("data") or [])
        parts = [f'<th scope="row">{esc(run.name)}</th>', cell(esc(method if isinstance(method, str) else method.get("name", "–")))]
        parts += [
            cell(esc(run.config.get("start_from_name") or "random")),
            cell(esc(data)),
            cell(esc(held.get("seed", run.config.get("seed", "–")))),
        ]
        parts += [cell(f'<span class="tag {good}">{esc(verdict)}</span> {esc(said)}'), cell(esc(held.get("steps", "–")))]
        rate = results.number(held.get("img_per_s"))
        parts += [cell(num(rate, 0), sort=rate), cell(short(results.number(held.get("seconds")))), cell(esc(held.get("restarts", "–")))]
        parts.append(cell(f"<code>{esc(str(held.get('encoder_sha256', '–'))[:12])}</code>"))
        rows.append("".join(parts))
    heads = ["pretraining", "method", "start from", "data", "seed", "health", "steps", "images/s", "seconds", "restarts", "encoder sha256"]
    wanted = (
        ("loss", "loss"),
        ("std_ratio", "spread (1 = isotropic)"),
        ("rankme", "effective rank"),
        ("contrastive_top1", "right view found"),
    )
    panels = []
    for name, label in wanted:
        series = {}
        for i, run in enumerate(evidence.pretrainings):
            points = [(results.number(row.get("step")), results.number(row.get(name))) for row in run.rows]
            points = [point for point in points if all(math.isfinite(value) for value in point)]
            if len(points) > 1:
                series[run.name if run.name not in series else f"{run.name} {run.key[:4]}"] = (i, points)
        if series:
            panels.append(figures.traces(f"pre-{name}", label, series, label))
    return table(heads, rows, cls="numbers") + _forgotten(evidence) + _unread(evidence) + f'<div class="panels">{"".join(panels)}</div>'


def _ended(run: results.Pretraining) -> str:
    """How far a run without a result came, and why no further."""
    step = max((int(row["step"]) for row in run.rows if "step" in row), default=0)
    words = {"FAILED": f"failed at step {step}", "KILLED": f"stopped at step {step}"}
    return ": ".join([words.get(run.ending.status, f"not finished, at step {step}"), *filter(None, [run.ending.why])])


def _forgotten(evidence: Evidence) -> str:
    """What runs that continue others knew of the earlier corpora before their first step and after their last one."""
    rows = []
    for run in evidence.pretrainings:
        held = {(probe["dataset"], probe["when"]): probe for probe in (run.result or {}).get("source_probes", [])}
        own = _own_data(run.config)
        for dataset in dict.fromkeys(dataset for dataset, _ in held if dataset not in own):
            parts = [f'<th scope="row">{esc(run.name)}</th>', cell(esc(run.config.get("seed", "–"))), cell(esc(dataset))]
            replay = results.number(run.config.get("replay"))
            parts.append(cell(f"{replay:.0%}" if math.isfinite(replay) else "none", sort=replay))
            for name in ("linear_auroc", "knn_auroc"):
                before, after = (results.number(held.get((dataset, when), {}).get(name)) for when in ("before", "after"))
                parts += [cell(num(value), sort=value) for value in (before, after, after - before)]
            rows.append("".join(parts))
    if not rows:
        return ""
    probes = [f"{probe}, {when}" for probe in ("linear AUROC", "kNN AUROC") for when in ("before", "after", "change")]
    note = "At most 1,000 training images of each earlier corpus, by probes on frozen features; a fall, of one run and without an interval,"
    note += " may be what was forgotten."
    shown = table(["pretraining", "seed", "earlier corpus", "replay", *probes], rows, cls="numbers")
    return f'<h3>What was kept of earlier corpora</h3>{shown}<p class="faint">{note}</p>'


def _own_data(config: Mapping[str, Any]) -> set[str]:
    """Datasets of a run itself, no earlier corpora: what it replays of those follows in its data, with the share `replay` in all."""
    held, left = set(), 1 - float(config.get("replay") or 0)
    for entry in config.get("data") or []:
        if config.get("replay") and left < 1e-6:
            break
        held.add(str(entry["dataset"]))
        left -= float(entry.get("weight", 1))
    return held


def _unread(evidence: Evidence) -> str:
    """Samples that a pretraining could not read, from OUT/quarantine.jsonl."""
    held = storage.read_rows(storage.join(evidence.out, "quarantine.jsonl"))
    if not held:
        return ""
    counts = Counter(str(row["pretraining"]).rpartition("-")[0] for row in held)
    said = ", ".join(f"{n} in {esc(name)}" for name, n in counts.items())
    rows = ["".join(cell(esc(row[name])) for name in ("pretraining", "sample", "reason")) for row in held[:ROWS]]
    shown = table(["pretraining", "sample", "reason"], rows)
    return (
        f'<p class="bad">Samples that could not be read, each replaced by the next of its lane: {said}.</p>'
        f"<details><summary>Which, and why</summary>{shown}</details>"
    )


def _shuffled(evidence: Evidence, cells: list[Cell]) -> str:
    """What one setting reached with shuffled labels, over the test patients; red where that is more than chance."""
    metric, one = results.headline(cells) or "auroc_mean", cells[0]
    mean, _, n = results.mean_sd(c.value(metric) for c in cells)
    held = [known for c in cells if (known := scores(c)) is not None]
    low = math.nan
    if held and metric.startswith("auroc"):
        values_C = np.mean([evidence.comparisons.bootstrap(known, metric) for known in held], axis=0)
        low = float(np.quantile(values_C[1:], 0.025)) if len(values_C) > 1 else math.nan
    where = [one.strategy, *(part for part in evidence.where(one) if part != one.setting)]
    said = f"Shuffled labels, {one.task}, {one.source}, {', '.join(where)}"
    said += f": {num(mean)} {evidence.unit(metric, one.dataset)} (n {n})"
    if low > CHANCE:
        return f'<li class="bad">{esc(said)}, more than chance over the test patients: something else than the labels gives them away.</li>'
    return f"<li>{esc(said)}.</li>"


def controls(evidence: Evidence) -> str:
    """Floors and what they mean for this study, A/A, shuffled labels."""
    lines = []
    for task in dict.fromkeys(task for task, _ in evidence.floors.values):
        meta = evidence.floors.confounded(task)
        dataset = next((c.dataset for c in evidence.cells if c.task == task), "")
        stratum = evidence.card(dataset).get("stratify_by")
        if math.isfinite(meta):
            lines.append(
                f'<li class="bad">{esc(task)} is confounded: a predictor that sees only <code>{esc(stratum)}</code> scores a plain mean'
                f" AUROC of {num(meta)}. The headline is therefore AUROC within {esc(stratum)}, and plain AUROC is printed beside it.</li>"
            )
    twins = [f for f in evidence.findings if f.kind == "control"]
    lines += [
        f'<li class="{"bad" if f.declared else ""}">{esc(f.sentence(evidence))} (A/A: the same source under two names).</li>' for f in twins
    ]
    if not twins and len(evidence.sources()) > 1:
        lines.append("<li>No A/A control: no source stands in this study under two names.</li>")
    for cells in results.in_groups(evidence.controls).values():
        lines += [_shuffled(evidence, own) for own in results.by(cells, "source").values()]
    if not evidence.controls:
        lines.append("<li>No cell with shuffled labels in this study.</li>")
    lines += [f"<li>{esc(note)}</li>" for note in evidence.floors.notes]
    if any(fraction < 1 for fraction in evidence.varied["fraction"]):
        lines.append(
            "<li>Floors are fitted on the same share of the training labels as the cells beside them, on subsets of their own.</li>"
        )
    return f'<ul class="plain">{"".join(lines)}</ul>'


def data(evidence: Evidence) -> str:
    """A card for each dataset."""
    parts = []
    for name, manifest in evidence.manifests.items():
        if not manifest:
            continue
        card = manifest.get("card") or {}
        counts, patients = manifest.get("counts") or {}, manifest.get("patients") or {}
        rows = [
            ("licence", card.get("licence", "–")),
            ("images", ", ".join(f"{split} {n}" for split, n in counts.items())),
            ("patients", ", ".join(f"{split} {n}" for split, n in patients.items())),
            ("split by", manifest.get("split_rule", "–")),
            ("quarantined", manifest.get("quarantined", 0)),
            ("left out by the card or split files", manifest.get("left_out", 0)),
            (
                "layout",
                f"{manifest.get('layout', '–')}" + (f", {sum(counts.values())} of {manifest['of']} images" if manifest.get("of") else ""),
            ),
            ("strata", card.get("stratify_by") or "none named"),
            ("version", f"<code>{esc(digest(manifest)[:16])}</code>"),
            ("citation", card.get("citation", "–")),
        ]
        lines = "".join(f"<dt>{key}</dt><dd>{value if key == 'version' else esc(value)}</dd>" for key, value in rows)
        positives = manifest.get("positives") or {}
        labels = list(dict.fromkeys(label for split in positives.values() for label in split))
        body = [
            "".join(
                [
                    f'<th scope="row">{esc(label)}</th>',
                    *(cell(esc(positives[s].get(label, 0)), sort=positives[s].get(label, 0)) for s in positives),
                ]
            )
            for label in labels
        ]
        inner = (
            f"<details><summary>Positives by label</summary>{table(['label', *positives], body, cls='numbers')}</details>" if body else ""
        )
        parts.append(f'<article class="card"><h3>{esc(name)}</h3><p>{esc(card.get("title", ""))}</p><dl>{lines}</dl>{inner}</article>')
    return f'<div class="cards">{"".join(parts)}</div>' if parts else "<p>No packed dataset yet.</p>"


def missing(evidence: Evidence) -> str:
    """Damaged, failed and unfinished cells, as far as anything is recorded."""
    parts = []
    if evidence.damaged:
        what = "<code>allograft run</code> removes it and computes it again; in an object store remove it first"
        rows = [f'<th scope="row"><code>{esc(file)}</code></th>{cell(what)}' for file in evidence.damaged[:ROWS]]
        parts.append(table(["result that cannot be read", "what to do"], rows))
    if evidence.failed:
        rows = [
            "".join([f'<th scope="row"><code>{esc(key)}</code></th>', cell(esc(why))]) for key, why in list(evidence.failed.items())[:ROWS]
        ]
        parts.append(table(["failed cell", "reason"], rows))
    if evidence.earlier:
        parts.append(
            f"<p>{evidence.earlier} finished cells are no longer asked for: they stand in results.csv and nowhere on this page.</p>"
        )
    if evidence.missing:
        counted = Counter((c["source"], c["strategy"], c["task"]) for c in evidence.missing)
        rows = ["".join(cell(esc(value)) for value in key) + cell(str(n), sort=n) for key, n in counted.items()]
        parts.append(
            f"<p>{len(evidence.missing)} of {evidence.asked} cells have no result. The same command computes only what is missing.</p>"
        )
        parts.append(table(["encoder", "strategy", "task", "cells without a result"], rows[:ROWS]))
    return "".join(parts)


def environment(evidence: Evidence) -> str:
    """Where the numbers were computed, and the commands that compute them again."""
    cells = [c.result for c in evidence.cells + evidence.controls]
    runs = [run.result for run in evidence.pretrainings if run.result]
    facts = []
    for name, word in (("revision", "revision"), ("host", "hosts"), ("device", "devices"), ("cell_version", "cell version")):
        told = []
        for what, held in (("cells", cells), ("pretrainings", runs)):
            counts = Counter(str(result[name]) for result in held if result.get(name) is not None)
            told += [f"{value} ({n} {what})" for value, n in counts.most_common(8)]
        facts.append((word, ", ".join(told) or "–"))
    from importlib import metadata

    named = ("torch", "timm", "lightly", "deepspeed", "ray", "webdataset", "mlflow")
    facts.append(("packages of this report", ", ".join(f"{name} {_version(metadata, name)}" for name in named)))
    facts.append(("report made", f"{paths.timestamp()}, revision {paths.revision()}"))
    lines = "".join(f"<dt>{esc(word)}</dt><dd>{esc(value)}</dd>" for word, value in facts)
    revision = next((str(result["revision"]) for result in cells + runs if result.get("revision")), paths.revision())
    clean = revision.removesuffix("-dirty")
    again = "allograft run study.yaml      # the study below; only missing cells are computed"
    commands = f"git checkout {clean} && make setup\n{again}\nallograft report {evidence.out}"
    dirty = '<p class="bad">The revision ends in -dirty: the files differed from any commit.</p>' if revision.endswith("-dirty") else ""
    study = esc(yaml.safe_dump(json.loads(json.dumps(evidence.study, default=str)), sort_keys=False, width=110)) if evidence.study else ""
    shown = f"<details><summary>study.yaml, resolved</summary><pre>{study}</pre></details>" if study else ""
    return f"<dl>{lines}</dl>{dirty}<h3>Compute these numbers again</h3><pre>{esc(commands)}</pre>{shown}"


def _version(metadata: Any, name: str) -> str:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return "absent"
