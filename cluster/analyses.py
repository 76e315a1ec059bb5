"""The analyses of a study: figures and tables of its trained encoders and of its cells, once each, for the report to show.

    run_analyses(study, progress, events)            # what study.analyses names; between the cells and the report
    analyse(out, "similarity", say)                  # one of them, for any study that stands: allograft analyze study OUT

Each is a folder OUT/analyses/<kind>-<key>, analysis.json last. The key is of the finished cells and of the settings, so an analysis that
stands is not computed again, and a study that grew gets a new one. What cannot be shown is said in its notes.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis import filters as kernels
from analysis import plots, results
from analysis import transferability as guess
from analysis.analyses import FILE, Analysis, folder
from analysis.correlation import correlation
from analysis.counted import counted
from analysis.evidence import floors_of
from analysis.results import Cell
from base import storage
from base.config import digest
from base.errors import AllograftError, RequestError, in_a_line, unknown
from base.paths import absolute, revision, safe_name, timestamp
from base.seeds import seed_of
from cluster import compare, convergence, costs, kept
from cluster.events import Events
from cluster.leaf import Leaf
from cluster.outs import require_study
from cluster.sources import cell_config
from cluster.study import Study

VERSION = 5  # raised by whoever changes what an analysis computes or draws
GROUPS = 12  # settings that are drawn, and of similarity computed; tables of the others are whole
IMAGES = {"cpu": 500, "cuda": 2000}  # of a probe
ROWS = 2000  # training images that transferability is guessed from
MEASURE = "svcca"
ACCURACY = "accuracy.csv"  # in OUT: source, accuracy and, of several ones, architecture
NOTHING = "No cell of this study kept its trained encoder: similarity before and after training takes cells.keep: encoder."


def run_analyses(study: Study, progress: Any, events: Events) -> None:
    """Those that the study names and that do not stand. One that fails is an event, which the report shows, and stops no other."""
    for kind in study.analyses:
        try:
            key = analyse(study.out, kind)
        except Exception as error:  # noqa: BLE001, a figure that cannot be drawn may not cost the report of all cells
            reason = str(error) if isinstance(error, AllograftError) else in_a_line(error)
            progress.say(f"analysis {kind}: failed, {reason}")
            events.add("analysis failed", kind=kind, reason=reason)
            continue
        progress.say(f"analysis {kind}: {'stands already' if key is None else 'computed'}")
        if key is not None:
            events.add("analysed", kind=kind, key=key)


def of_study(out: str, kinds: Sequence[str], accuracy: str | None = None) -> None:
    """`allograft analyze study`; a table of accuracies is kept as OUT/accuracy.csv, where later runs find it.

    Raises:
        RequestError: no study stands, there is no such analysis, or no such table.
    """
    url = absolute(out)
    for kind in kinds:
        if kind not in NODES:
            raise unknown("analysis", kind, NODES, "--what")
    require_study(url)
    if accuracy is not None:
        convergence.accuracies(absolute(accuracy))
        storage.put(storage.join(url, ACCURACY), storage.read_bytes(absolute(accuracy)))
        kinds = [*kinds, *({"accuracy"} - set(kinds))]
    events = Events(url)
    for kind in kinds:
        key = analyse(url, kind, None)
        print(f"{kind}: {'stands already' if key is None else folder(url, kind, key)}")
        if key is not None:
            events.add("analysed", kind=kind, key=key)
    print(f"allograft report {url}")


def analyse(out: str, kind: str, say: Callable[[str], None] | None = None) -> str | None:
    """One analysis of what has finished; its key, or None where it stands already.

    Raises:
        RequestError: no finished cell.
        WorkError: shards or weights are not those of the cells.
    """
    planned = results.planned(out)
    cells = [cell for cell in results.finished(out) if not cell.shuffled and (cell.key in planned or not planned)]
    if not cells:
        raise RequestError("no finished cell to analyse", where=out)
    settings: dict[str, str | int | float] = {"version": VERSION}
    if kind == "similarity":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings |= {"measure": MEASURE, "images": IMAGES[device], "split": "val", "energy": "s2", "spatial": "fold"}
    if kind == "transferability":
        settings |= {"most images": ROWS}
    if kind == "accuracy":
        table = convergence.accuracies(storage.join(out, ACCURACY))
        settings |= {"table": digest(table.to_csv(index=False))[:16]}
    key = digest({"kind": kind, "cells": sorted(cell.key for cell in cells), "settings": settings})[:16]
    place = folder(out, kind, key)
    if storage.exists(storage.join(place, FILE)):
        return None
    with tempfile.TemporaryDirectory(prefix=f"{kind}-") as local:
        leaf = Leaf(local, say)
        NODES[kind](out, cells, settings, leaf)
        made = Analysis.model_validate({"kind": kind, "key": key, "made": timestamp(), "revision": revision(), "cells": len(cells)})
        whole = made.model_copy(update={"settings": settings, "figures": leaf.figures, "tables": leaf.tables, "notes": leaf.notes})
        storage.put(storage.join(local, FILE), whole.model_dump_json(by_alias=True, indent=1) + "\n")
        storage.put_dir(local, place, last=(FILE,))
    return key


# -- encoders


def _similarity(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    shards, seen = results.shard_urls(out, list(cells)), 0
    settings_seen = list(results.by(cells, "task", "architecture", "strategy", "options", "fraction", "resolution"))
    within = set(settings_seen[:GROUPS])
    if len(settings_seen) > GROUPS:
        leaf.notes.append(f"The first {GROUPS} of {len(settings_seen)} settings.")
    for (dataset,), held in results.by(cells, "dataset").items():
        chosen = [c for c in held if (c.task, c.architecture, c.strategy, c.options, c.fraction, c.resolution) in within]
        how = {"spatial": settings["spatial"], "energy": settings["energy"]}
        try:
            seen += kept.of_cells(chosen, shards[dataset], settings["split"], settings["images"], None, settings["measure"], how, leaf)
        except RequestError as error:  # volumes, a split of one image: nothing that a study could do otherwise
            leaf.notes.append(f"{dataset}: {error.what}")
    if not seen:
        leaf.notes.append(NOTHING)


def _filters(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    """Of every source the first cell that kept its encoder, before above after; of sources that kept none their own filters."""
    from encoders.export import read_export
    from finetune.run import plant

    heads, rows = ("encoder", "filters", "Gabor score", "after", "movement", "cosine"), []
    sources = results.by(cells, "task", "architecture", "source")
    for (task, architecture, source), held in list(sources.items())[: 2 * GROUPS]:
        ends = next((cell for cell in held if storage.exists(storage.join(cell.url, "encoder", "allograft.json"))), None)
        config, channels = _config(ends or held[0])
        whole = config if ends else config.model_copy(update={"strategy": {"name": "full"}})
        name = f"{source}, {task}, {architecture}"
        try:
            found = [kernels.first_filters(plant(whole, channels)[0].module.encoder)]
        except RequestError as error:  # a transformer of tokens, a network of volumes
            leaf.notes.append(f"{name}: {error.what}")
            continue
        if ends:
            place = compare.located(storage.join(ends.url, "encoder"))
            info = read_export(place, verify=False)
            found.append(kernels.first_filters(compare.opened(place, info, info, channels).net))
        numbers = compare.draw_filters(found, [name, "after training"][: len(found)], leaf.under(safe_name(name)))
        blank = [numbers[0], numbers[1], *(numbers[2:] if len(numbers) == 5 else ["-", *numbers[2:]])]
        rows.append([name, *blank, *["-"] * (5 - len(blank))])
    if len(sources) > 2 * GROUPS:
        leaf.notes.append(f"The first {2 * GROUPS} of {len(sources)} sources by task and architecture.")
    leaf.table("summary.csv", "first-layer filters", [dict(zip(heads, row, strict=True)) for row in rows], rows, heads)
    if not any(row[4] != "-" for row in rows):
        leaf.notes.append("No cell kept its trained encoder (cells.keep: encoder), so only the filters before training are shown.")


def _config(cell: Cell) -> tuple[Any, int]:
    """The cell's configuration, and the channels that its encoder is given."""
    from finetune import data

    config = cell_config(cell.url)
    return config, data.channels(data.describe(config.shards, config.manifest_digest, config.cache_dir), config.task)


# -- cells


def _convergence(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    floors = floors_of(out, cells, compute=True).values
    try:
        count = convergence.of_cells(cells, None, "steps", None, leaf, floors, most=GROUPS)
    except RequestError:  # cells of an earlier version do not count steps
        count = convergence.of_cells(cells, None, "epochs", None, leaf, floors, most=GROUPS)
        leaf.notes.append("In epochs: some cells were trained by a version that did not write down steps.")
    if not count:
        leaf.notes.append("No finished cell has a learning curve: nothing was trained epoch by epoch, or the metric was not defined.")


def _efficiency(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    rows = costs.networks(cells, torch.get_num_threads())
    leaf.table("efficiency.csv", "what every trained network costs", rows, [costs.line_of(row) for row in rows], costs.HEADER)
    of_cell = {key: row for row in rows for key in row["keys"].split()}
    groups = list(results.by(cells, "task", "architecture", "fraction", "resolution").items())
    for (task, architecture, fraction, resolution), held in groups[:GROUPS]:
        metric = held[0].primary()
        points: list[plots.Point] = []
        for (source, strategy, options), own in results.by(held, "source", "strategy", "options").items():
            mean, sd, n = results.mean_sd(cell.value(metric) for cell in own) if metric else (math.nan, math.nan, 0)
            row = of_cell[own[0].key]
            if n:
                label = results.setting(strategy, options)
                points.append(plots.Point(source, label, row["params"], row["batch_32_median_ms"] / 32, mean, sd))
        if metric is None or not points:
            continue
        title = results.in_words(task, architecture, fraction, resolution)
        text = "; ".join(f"{p.source}, {p.strategy}: {p.value:.3f} with {p.params:,} parameters and {p.ms:.2f} ms" for p in points)
        unit = results.WORDS.get(metric, metric)
        what = f"{title}: {unit} against parameters and against milliseconds an image in batches of 32"
        leaf.draw(safe_name(title), what, text, partial(plots.efficiency, points, f"test {unit}", title), 7.4, 3.4)
    if len(groups) > GROUPS:
        leaf.notes.append(f"Figures of the first {GROUPS} of {len(groups)} settings; the table has all.")


def _transferability(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    """LogME, H-score and N-LEEP of each source's frozen features on the task's training images, and whether they foretold the results."""
    names = ("LogME", "H-score", "N-LEEP", "probe of its pretraining")
    heads = ("setting", "source", "images", "features", *names)
    ranked_heads = ("setting", "strategy", "guess", "Spearman", "p", "weighted Kendall", "sources")
    probes = _probes(out)
    rows: list[dict[str, Any]] = []
    ranked: list[list[str]] = []
    groups = results.by(cells, "task", "architecture", "fraction", "resolution")
    counts = {cell.key for cell in counted(out, cells)}
    for (task, architecture, fraction, resolution), held in groups.items():
        setting = results.in_words(task, architecture, fraction, resolution)
        guesses: dict[str, dict[str, float]] = {}
        notes: list[str] = []
        for (source,), own in results.by(held, "source").items():
            try:
                z_ND, target = _embedded(own[0])
                classes = 2 if target.ndim == 2 else len(np.unique(target))
                clusters = guess.soft_clusters(z_ND, 5 * classes)
                found = {"LogME": guess.logme(z_ND, target), "N-LEEP": guess.leep(clusters, target)}
            except RequestError as error:
                notes.append(error.what)
                continue
            try:
                found["H-score"] = guess.h_score(z_ND, target)
            except RequestError as error:
                notes.append(error.what)
            guesses[source] = {name: found.get(name, math.nan) for name in names}
            guesses[source]["probe of its pretraining"] = probes.get(source, math.nan)
            sizes = {"images": len(z_ND), "features": z_ND.shape[1]}
            rows.append({"setting": setting, "source": source, **sizes, **guesses[source]})
        leaf.notes += [f"{setting}: {note}" for note in dict.fromkeys(notes)]
        for (strategy, options), tried in results.by([c for c in held if c.key in counts], "strategy", "options").items():
            metric = results.headline(tried)
            reached = {source: convergence.mean_of_all(own, metric) for (source,), own in results.by(tried, "source").items()}
            both = [source for source in reached if source in guesses]
            for name in names:
                if not any(math.isfinite(guesses[source][name]) for source in both):
                    continue
                sides = [guesses[s][name] for s in both], [reached[s] for s in both]
                rank = correlation(*sides)
                p = f"{rank.p:.3f}" if math.isfinite(rank.p) else rank.why
                numbers = [rank.rho.words(2), p, f"{rank.tau:.2f}"] if math.isfinite(rank.tau) else [rank.why, "-", "-"]
                ranked.append([setting, results.setting(strategy, options), name, *numbers, str(rank.n)])
    shown = [
        [*(str(row[name]) for name in heads[:4]), *(f"{row[name]:.4f}" if math.isfinite(row[name]) else "-" for name in names)]
        for row in rows
    ]
    leaf.table("transferability.csv", "guesses from frozen features, nothing trained", rows, shown, heads)
    made = [dict(zip(ranked_heads, line, strict=True)) for line in ranked]
    leaf.table("correlation.csv", "did the guesses order the sources as the results do", made, ranked, ranked_heads)


def _embedded(cell: Cell) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Pooled features of the cell's labelled training images, f64 N D, by its source as it came; a class a row, or labels N L.

    Raises:
        RequestError: masks, which have no class an image.
    """
    from finetune.evaluate import Evaluator
    from finetune.features import chunks
    from finetune.run import plant

    config, channels = _config(cell)
    if config.task.kind == "segmentation":
        raise RequestError("guesses are of labels, and this task has masks")
    config = config.model_copy(update={"strategy": {"name": "linear"}})
    evaluator = Evaluator(config, plant(config, channels)[0])
    arrays = evaluator.arrays("train")
    order = sorted(range(len(arrays)), key=lambda i: seed_of("transferability", arrays.ids[i]))[:ROWS]
    index = np.array(sorted(order), np.int64)
    evaluator.train(False)
    parts = []
    for chunk in chunks(len(index), evaluator.chunk):
        maps = evaluator.maps("train", index[chunk])
        parts.append(maps[0].double().flatten(2).mean(2) if maps[0].ndim > 2 else maps[0].double())
    z_ND = torch.cat(parts).cpu().numpy()
    target, known = arrays.target[index], arrays.known[index]
    if config.task.kind == "multilabel":
        return z_ND, np.where(known > 0, target, np.nan)
    return z_ND, target.argmax(1)


def _probes(out: str) -> dict[str, float]:
    """The last linear probe (AUROC) of each pretraining of this study, the mean over its seeds."""
    found: dict[str, list[float]] = {}
    for run in results.pretrainings(out):
        held = [value for row in run.rows if math.isfinite(value := results.number(row.get("linear_auroc")))]
        if run.result and held:
            found.setdefault(run.name, []).append(held[-1])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _accuracy(out: str, cells: Sequence[Cell], settings: dict[str, Any], leaf: Leaf) -> None:
    convergence.ranks(counted(out, cells), storage.join(out, ACCURACY), leaf, most=GROUPS)


NODES: dict[str, Callable[[str, Sequence[Cell], dict[str, Any], Leaf], None]] = {
    "similarity": _similarity,
    "filters": _filters,
    "convergence": _convergence,
    "efficiency": _efficiency,
    "transferability": _transferability,
    "accuracy": _accuracy,
}
