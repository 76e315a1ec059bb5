"""What is seen of a study from outside: Prometheus metrics on the exporter that Ray runs on every node, and the nodes' load.

    tell(cells_done=12, cells_running=4)                      # in the driver; METRICS says what there is
    tell({"run": "simclr-1a2b"}, pretrain_step=400)           # in a worker
    note_dashboard(out)                                       # in the driver, once: its address into OUT/nodes
    look(out)                                                 # a row for every node into OUT/nodes, which cluster.projection projects

Names as Prometheus has them begin with `ray_allograft_`; cluster/deploy/grafana.json draws them. Ray measures its nodes itself, so
nothing of ours runs there.
"""

import json
import sys
import time
import urllib.request
from functools import cache
from http.client import HTTPException
from typing import Any, NamedTuple

from base import storage

PREFIX = "allograft_"
PATIENCE_S = 3.0
MEGABYTE = 1e6


class Told(NamedTuple):
    """One metric. counts: it only grows, and a rate is drawn of it."""

    help: str
    labels: tuple[str, ...] = ()
    counts: bool = False


METRICS = {
    "cells_done": Told("cells of the study that this driver has seen done"),
    "cells_failed": Told("cells that have failed for good"),
    "cells_running": Told("cells that run"),
    "cells_waiting": Told("cells that wait for a worker"),
    "cells_retried": Told("cells that were tried more than once"),
    "cells_to_go_seconds": Told("seconds to go at the pace so far"),
    "worker_deaths": Told("workers of cells that died"),
    "cell_images": Told("images that cells have trained on", ("task", "strategy"), counts=True),
    "cell_seconds": Told("seconds that cells took", ("task", "strategy"), counts=True),
    "pretrain_step": Told("step of a pretraining", ("run",)),
    "pretrain_steps": Told("steps of a pretraining, in all", ("run",)),
    "pretrain_loss": Told("loss of a pretraining", ("run",)),
    "pretrain_images_per_second": Told("images a second of a pretraining", ("run",)),
    "pretrain_data_wait": Told("share of the time that a pretraining waits for images", ("run",)),
}
OF_ROW = {"step": "step", "steps": "steps", "loss": "loss", "img_per_s": "images_per_second", "data_wait": "data_wait"}

# Ray's own measurements of a node, under the names that MLflow gives system metrics; the number is what they are divided by.
NODE = {
    "ray_node_cpu_utilization": ("cpu_utilization_percentage", 1.0),
    "ray_node_mem_used": ("system_memory_usage_megabytes", MEGABYTE),
    "ray_node_disk_utilization_percentage": ("disk_usage_percentage", 1.0),
    "ray_node_network_receive_speed": ("network_receive_megabytes_per_second", MEGABYTE),
    "ray_node_network_send_speed": ("network_transmit_megabytes_per_second", MEGABYTE),
    "ray_node_disk_io_read_speed": ("disk_read_megabytes_per_second", MEGABYTE),
    "ray_node_gpus_utilization": ("gpu_{GpuIndex}_utilization_percentage", 1.0),
    "ray_node_gram_used": ("gpu_{GpuIndex}_memory_usage_megabytes", 1.0),
}


def tell(labels: dict[str, str] | None = None, **values: float) -> None:
    """Set metrics, or add to those that count; in any process of a Ray cluster."""
    for name, value in values.items():
        metric, counts = _metric(name), METRICS[name].counts
        if not counts:
            metric.set(value, labels)
        elif value > 0:
            metric.inc(value, labels)


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    told = METRICS[name]
    make = metrics.Counter if told.counts else metrics.Gauge
    return make(PREFIX + name, told.help, told.labels)


def tell_row(url: str, row: dict[str, Any]) -> None:
    """A row of a log whose run has this folder; those of cells are too many to be told apart."""
    *_, kind, run = url.rstrip("/").split("/")
    values = {f"pretrain_{name}": float(row[key]) for key, name in OF_ROW.items() if isinstance(row.get(key), int | float)}
    if kind == "pretrain" and values:
        tell({"run": run}, **values)


def note_dashboard(out: str) -> str:
    """The address of Ray's dashboard, empty where there is none; OUT/nodes/ray.json says it too. A cluster must be connected."""
    from ray._private import worker

    # ray.init tells it too, but complains of being called again, and begins a cluster of its own where one has just ended.
    url = worker._global_node.webui_url if worker._global_node else None
    address = f"http://{url}" if url else ""
    storage.put(storage.join(out, "nodes", "ray.json"), json.dumps({"dashboard": address}))
    return address


def exporters() -> dict[str, str]:
    """By host: where Ray's exporter answers. Of several nodes on one host the first."""
    import ray

    found: dict[str, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            found.setdefault(node["NodeManagerHostname"], f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    return found


def scrape(address: str) -> list[tuple[str, dict[str, str], float]]:
    """What an exporter says: name, labels and value of each sample.

    Raises OSError when it does not answer, HTTPException or ValueError when the answer is cut off or is something else.
    """
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(address, timeout=PATIENCE_S) as reply:
        text = reply.read().decode()
    return [(sample.name, sample.labels, sample.value) for family in text_string_to_metric_families(text) for sample in family.samples]


def load(samples: list[tuple[str, dict[str, str], float]]) -> dict[str, float]:
    """A node's load in MLflow's names."""
    return {NODE[name][0].format(**labels): value / NODE[name][1] for name, labels, value in samples if name in NODE}


def look(out: str) -> None:
    """Append a row for every node that answers to OUT/nodes/<host>.jsonl."""
    # Never the first to import Ray, which reads as it is imported what cluster.session sets before; another thread may be at it.
    connected = getattr(sys.modules.get("ray"), "is_initialized", None)
    if connected is None or not connected():
        return
    for host, exporter in exporters().items():
        try:
            row = load(scrape(exporter))
        except (OSError, HTTPException, ValueError):  # its agent starts after the node, and may be busy: the next round asks again
            continue
        url = storage.join(out, "nodes", f"{host}.jsonl")
        before = storage.read_bytes(url) if storage.exists(url) else b""
        storage.put(url, before + json.dumps({"time": round(time.time(), 3), **row}).encode() + b"\n")
