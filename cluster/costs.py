"""`allograft analyze efficiency`: parameters, operations and latency of every network that a study's cells trained."""

from collections.abc import Sequence
from typing import Any

import yaml

from analysis.results import finished
from base import storage
from base.config import parse
from base.errors import RequestError
from base.paths import absolute
from cluster.compare import put_table
from cluster.screen import table

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


def efficiency(outs: Sequence[str], threads: int, out: str) -> None:
    """Networks that differ in nothing but weights are measured once, with random ones.

    Raises:
        RequestError: no finished cell.
    """
    import torch

    from finetune import data
    from finetune.cell import CellConfig
    from finetune.efficiency import Efficiency, measure, whole
    from finetune.run import plant

    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    wholes: dict[tuple[Any, ...], Efficiency] = {}
    seen: set[tuple[Any, ...]] = set()
    for url in map(absolute, outs):
        for cell in finished(url):
            held = storage.join(cell.url, "config.yaml")
            config = parse(yaml.safe_load(storage.read_bytes(held)), CellConfig, held)
            place = (config.task.task, config.resolution, config.architecture)
            if (*place, str(config.strategy)) in seen:
                continue
            seen.add((*place, str(config.strategy)))
            corpus = data.describe(config.shards, config.manifest_digest, config.cache_dir)
            plain = config.model_copy(update={"source_kind": "random", "encoder_dir": None, "encoder_sha256": None})
            channels = data.channels(corpus, config.task)
            module = plant(plain, channels)[0].module
            arrays = data.load(config.shards, config.manifest_digest, "val", config.resolution, config.task, config.cache_dir)
            shape = data.as_input(arrays.image[:1], arrays.slices).shape[1:]
            found = measure(module, shape)
            if place not in wholes:
                wholes[place] = measure(whole(module.encoder, config.task), shape)
            rows.append(_row(config, found, wholes[place]))
    if not rows:
        raise RequestError("no finished cell", where=", ".join(outs), hint="allograft run STUDY.yaml")
    put_table(rows, storage.join(absolute(out), "efficiency.csv"))
    table([_line(row) for row in rows], HEADER)
    print(f"{len(rows)} networks with {threads} thread(s); all numbers: {storage.join(absolute(out), 'efficiency.csv')}")


def _row(config: Any, found: Any, before: Any) -> dict[str, Any]:
    row = {"task": config.task.task, "resolution": config.resolution, "architecture": config.architecture}
    row |= {"strategy": config.strategy["name"]}
    row |= {"options": ", ".join(f"{key} {value}" for key, value in config.strategy.items() if key != "name")}
    for prefix, cost in (("", found), ("whole_", before)):
        row |= {f"{prefix}params": cost.params, f"{prefix}macs": cost.macs}
        for latency in cost.latency:
            for name in ("median_ms", "q1_ms", "q3_ms", "runs"):
                row[f"{prefix}batch_{latency.batch}_{name}"] = getattr(latency, name)
    return row


def _line(row: dict[str, Any]) -> list[str]:
    shares = (
        row["params"] / row["whole_params"],
        row["macs"] / row["whole_macs"],
        row["batch_32_median_ms"] / row["whole_batch_32_median_ms"],
    )
    facts = [row["task"], str(row["resolution"]), row["architecture"], row["strategy"], row["options"]]
    numbers = [f"{row['params']:,}", f"{row['macs'] / 1e9:.3g} G", *(f"{row[f'batch_{batch}_median_ms']:.1f}" for batch in (1, 32))]
    return [*facts, *numbers, "{:.0%} params, {:.0%} MACs, {:.0%} time".format(*shares)]
