"""`allograft analyze efficiency`: parameters, operations and latency of every network that a study's cells trained."""

from collections.abc import Sequence
from typing import Any

from analysis.results import Cell, finished
from base import storage
from base.config import canonical_json
from base.errors import RequestError
from base.paths import absolute
from cluster.leaf import Leaf
from cluster.sources import cell_config

HEADER = (
    "task",
    "px",
    "architecture",
    "strategy",
    "options",
    "parameters",
    "MACs",
    "ms, batch 1",
    "ms, batch 32",
    "of the whole network's",
)
SOURCE = ("cut", "flat", "widths")  # of an export: what a source may have left


def efficiency(outs: Sequence[str], threads: int, out: str) -> None:
    """Networks that differ in nothing but weights are measured once, with those of the first; of a source that is truncated or slim
    itself the network is what it has left.

    Raises:
        RequestError: no finished cell, or a source's encoder is no longer there.
    """
    rows = networks([cell for url in map(absolute, outs) for cell in finished(url)], threads)
    if not rows:
        raise RequestError("no finished cell", where=", ".join(outs), hint="allograft run STUDY.yaml")
    leaf, lines = Leaf(absolute(out)), [line_of(row) for row in rows]
    leaf.table("efficiency.csv", "what every trained network costs", rows, lines, HEADER)
    leaf.show(lines, HEADER)
    print(f"{len(rows)} networks with {threads} thread(s); all numbers: {storage.join(leaf.url, 'efficiency.csv')}")


def networks(cells: Sequence[Cell], threads: int) -> list[dict[str, Any]]:
    """A row for each network that the cells trained; its `keys` are those of its cells, with blanks between."""
    import torch

    from encoders.export import read_export
    from encoders.local import local_encoder
    from finetune import data
    from finetune.efficiency import Efficiency, measure, whole
    from finetune.run import plant

    torch.set_num_threads(threads)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    wholes: dict[tuple[Any, ...], Efficiency] = {}
    for cell in cells:
        config = cell_config(cell.url)
        place = (config.task.task, config.task.preset, config.resolution, config.architecture)
        left: dict[str, Any] = dict.fromkeys(SOURCE)
        if config.encoder_dir:
            info = read_export(local_encoder(config.encoder_dir, config.encoder_sha256), verify=False)
            left = {key: getattr(info, key) for key in SOURCE}
        network = (*place, canonical_json(config.strategy), canonical_json(left))
        if network in rows:
            rows[network]["keys"] += f" {cell.key}"
            continue
        corpus = data.describe(config.shards, config.manifest_digest, config.cache_dir)
        channels = data.channels(corpus, config.task)
        module = plant(config, channels)[0].module
        arrays = data.load(config.shards, config.manifest_digest, "val", config.resolution, config.task, config.cache_dir)
        shape = data.as_input(arrays.image[:1], arrays.slices).shape[1:]
        found = measure(module, shape)
        if place not in wholes:
            wholes[place] = measure(whole(module.encoder, config.task), shape)
        rows[network] = _row(config, left, found, wholes[place]) | {"keys": cell.key}
    return list(rows.values())


def _row(config: Any, source: dict[str, Any], found: Any, before: Any) -> dict[str, Any]:
    row = {"task": config.task.task, "preset": config.task.preset, "resolution": config.resolution, "architecture": config.architecture}
    row |= {"strategy": config.strategy["name"]}
    row |= {"options": ", ".join(f"{key} {value}" for key, value in config.strategy.items() if key != "name")}
    row |= {f"source_{key}": "" if value is None else str(value) for key, value in source.items()}
    for prefix, cost in (("", found), ("whole_", before)):
        row |= {f"{prefix}params": cost.params, f"{prefix}macs": cost.macs}
        for latency in cost.latency:
            for name in ("median_ms", "q1_ms", "q3_ms", "runs"):
                row[f"{prefix}batch_{latency.batch}_{name}"] = getattr(latency, name)
    return row


def line_of(row: dict[str, Any]) -> list[str]:
    shares = (
        row["params"] / row["whole_params"],
        row["macs"] / row["whole_macs"],
        row["batch_32_median_ms"] / row["whole_batch_32_median_ms"],
    )
    of_source = [f"source {key} {row[f'source_{key}']}" for key in SOURCE if row[f"source_{key}"]]
    options = ", ".join(filter(None, [row["options"], *of_source]))
    facts = [row["task"], str(row["resolution"]), row["architecture"], row["strategy"], options]
    numbers = [f"{row['params']:,}", f"{row['macs'] / 1e9:.3g} G", *(f"{row[f'batch_{batch}_median_ms']:.1f}" for batch in (1, 32))]
    return [*facts, *numbers, "{:.0%} params, {:.0%} MACs, {:.0%} time".format(*shares)]
