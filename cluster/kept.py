"""`allograft analyze similarity OUT`: the cells of a study that kept their trained encoder, before and after training.

A cell's encoder before training is made again from its configuration, which decides every weight of it; after training it is the export
that stands in OUT/cells/<key>/encoder.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from analysis import layers, plots, results
from analysis.activations import Probe
from analysis.layers import Across, Names
from base import storage
from base.errors import RequestError
from base.paths import safe_name
from cluster.compare import located, opened, placed, rows_of, write
from cluster.leaf import Leaf
from cluster.outs import require_study
from cluster.sources import baseline, cell_config
from encoders.build import Encoder
from encoders.export import read_export
from finetune.run import plant
from shards.splitting import count


@dataclass(frozen=True)
class Kept:
    """A cell's encoder at both ends of its training."""

    cell: results.Cell
    before: Encoder
    after: Encoder

    @property
    def name(self) -> str:
        return f"{self.cell.source} {self.cell.seed}" + (f" of {self.cell.source_seed}" if self.cell.source_seed != self.cell.seed else "")


def kept(cells: Sequence[results.Cell], channels: int) -> list[Kept]:
    """Those of the cells that kept their encoder, opened."""
    found = []
    for cell in cells:
        folder = storage.join(cell.url, "encoder")
        if cell.shuffled or not storage.exists(storage.join(folder, "allograft.json")):
            continue
        info = read_export(located(folder), verify=False)
        before = placed(plant(cell_config(cell.url), channels)[0].module.encoder)
        found.append(Kept(cell, before, opened(folder, info, info, channels)))
    return found


def of_study(out: str, shards: str, split: str, images: int, size: int | None, measure: str, how: dict[str, Any], leaf: Leaf) -> None:
    """Fig. 2 to 4 of Transfusion, for each task, architecture, strategy, fraction and resolution that kept encoders.

    Raises:
        RequestError: no study, or none of its cells kept its encoder.
    """
    require_study(out, "two encoders: allograft analyze similarity A B; one study: its out")
    if not of_cells(results.finished(out), shards, split, images, size, measure, how, leaf):
        hint = "a study keeps them with cells.keep=encoder; two encoders are compared by: allograft analyze similarity A B --data SHARDS"
        raise RequestError("no cell of this study kept its trained encoder (cells/KEY/encoder)", where=out, hint=hint)


def of_cells(
    cells: Sequence[results.Cell],
    shards: str,
    split: str,
    images: int,
    size: int | None,
    measure: str,
    how: dict[str, Any],
    leaf: Leaf,
) -> int:
    """The same of these cells; how many settings had kept encoders."""
    probes: dict[int, Probe] = {}
    seen = 0
    for group, held in results.by(cells, "task", "architecture", "strategy", "options", "fraction", "resolution").items():
        side = size or int(group[-1])
        if side not in probes:
            probes[side] = Probe(shards, split=split, images=images, size=side)
        probe = probes[side]
        runs = kept(held, probe.channels)
        if not runs:
            continue
        seen += 1
        title = ", ".join(str(part) for part in group[:4] if part)
        leaf.say(f"{'' if seen == 1 else chr(10)}{title}: {len(runs)} runs")
        _figures(runs, probe, measure, how, leaf.under(safe_name(*group)), title)
    return seen


def _figures(runs: Sequence[Kept], probe: Probe, measure: str, how: dict[str, Any], leaf: Leaf, title: str) -> None:
    ends = {run.name: run.after for run in runs}
    starts = {f"{run.name} before": run.before for run in runs}
    moved = layers.across(ends | starts, [(f"{name} before", name) for name in ends], probe, **how)
    sources = list(dict.fromkeys(run.cell.source for run in runs))
    by_source = {source: [(f"{run.name} before", run.name) for run in runs if run.cell.source == source] for source in sources}
    means: dict[Names, list[layers.Similarity]] = {
        (source, f"{source} trained"): [layers.averaged(one) for one in zip(*(moved.pairs[pair] for pair in pairs), strict=True)]
        for source, pairs in by_source.items()
    }
    write(Across(moved.cuts, means, moved.images, moved.sha256), probe, measure, leaf, title)
    leaf.table("runs.csv", f"{title}: every run, before and after training", rows_of(moved, probe))
    pairs = list(itertools.combinations(ends, 2))
    if not pairs:
        return
    highest, first = layers.top(list(ends.values())), moved.cuts[0]
    after = layers.across(ends, pairs, probe, list(dict.fromkeys([first, *highest])), **how)
    leaf.table("pairs.csv", f"{title}: every two trained runs", rows_of(after, probe))
    values = {
        pair: sum(one.values[measure] for cut, one in zip(after.cuts, held, strict=True) if cut in highest) / len(highest)
        for pair, held in after.pairs.items()
    }
    names = {source: [run.name for run in runs if run.cell.source == source] for source in sources}
    listed = []
    base = baseline(run.cell for run in runs)
    for source in sources:
        if base is None or source == base or len(names[base]) < 2:
            continue
        found = layers.against_random(names[source], names[base], values)
        rows = {f"{source} and {base}": found.pretrained_random, f"{base} and {base}": found.random_random, "difference": found.difference}
        said = [(what, one.words()) for what, one in rows.items()]
        listed += said
        unit = f"{measure} at {' and '.join(highest)}"
        counted = f"{count(len(names[source]), 'run')} of {source} and {len(names[base])} of {base}"
        few = min(len(names[source]), len(names[base])) < layers.FEWEST
        over = f"an interval takes {layers.FEWEST} runs of each" if few else "95 % intervals over runs: what further runs would show"
        text = f"Mean {unit} of {counted}; {over}. " + "; ".join(f"{what}: {numbers}" for what, numbers in said)
        drawn = partial(plots.intervals, rows, unit, title)
        leaf.draw(f"top-{safe_name(source)}", f"{title}: top layers, {source} against {base}", text, drawn, 6.0, 2.2)
        if few:
            leaf.notes.append(f"{title}: {counted} kept their encoder, and {over}.")
            leaf.say(leaf.notes[-1])
    if len(runs) >= 3:
        before = layers.across(starts, [(f"{a} before", f"{b} before") for a, b in pairs], probe, [first], **how)
        at_start = {(a, b): before.pairs[f"{a} before", f"{b} before"][0].values[measure] for a, b in pairs}
        at_end = {pair: held[0].values[measure] for pair, held in after.pairs.items()}
        try:
            line = layers.start_against_end(at_start, at_end, list(ends))
        except RequestError as error:
            listed.append((f"R squared of {first}", str(error)))
            leaf.notes.append(f"{title}: no R squared of {first}: {error.args[0]}")
        else:
            words = f"{line.r_squared.words(2)} over {len(line.pairs)} pairs" + (
                f", {line.same} of one beginning left out" if line.same else ""
            )
            drawn = partial(plots.pairs, line, f"{measure} at {first}", title)
            what = f"{title}: {first} at the start and at the end"
            leaf.draw("start-against-end", what, f"R squared {words}", drawn, 4.2, 3.6)
            listed.append((f"R squared of {first} at the start and at the end", words))
    if listed:
        leaf.say()
        leaf.show(listed)
