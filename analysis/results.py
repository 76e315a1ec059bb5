"""What a study has in its `out`: finished cells, those still missing, pretrainings, manifests; and results.csv.

frame = load_results(out); write_results(out); cells = finished(out); missing = absent(out, cells)

Storage is the truth: a cell is finished when its result.json stands in OUT/cells/<key>/. Everything here only reads files, so it works on a
study that is running, half failed, empty, or on another machine (`out` may be a URL).
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import yaml

from base import storage

COLUMNS = ["study", "key", "architecture", "source", "source_seed", "strategy", "options", "task", "dataset", "split", "fraction"]
COLUMNS += ["resolution", "seed", "class", "metric", "unit", "value", "n", "params", "macs", "seconds", "run_id"]
ORDER = ["architecture", "source", "source_seed", "strategy", "options", "task", "fraction", "resolution", "seed", "key"]
ORDER += ["split", "metric", "class"]
ITS_OWN = ("iou", "kappa_quadratic", "balanced_accuracy", "accuracy", "auprc_mean")  # headlines of tasks that select on them
PRIMARY = (*ITS_OWN, "dice", "auroc_within_mean", "auroc_mean")  # of all others the first that a cell reports
WORDS = {
    "dice": "Dice",
    "auroc": "AUROC",
    "auroc_mean": "AUROC",
    "auroc_within": "AUROC within stratum",
    "auroc_within_mean": "AUROC within stratum",
    "iou": "IoU",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "kappa_quadratic": "quadratic kappa",
    "auprc": "AUPRC",
    "auprc_mean": "AUPRC",
}


@dataclass(frozen=True)
class Cell:
    """One finished cell: its result.json and the address of its folder."""

    url: str
    result: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.result[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def key(self) -> str:
        return str(self.result["key"])

    @property
    def source(self) -> str:
        return plain(str(self.result["source"]))

    @property
    def source_seed(self) -> int:
        return int(self.result.get("source_seed") or 0)

    @property
    def own_source(self) -> bool:
        return bool(self.result.get("own_source"))

    @property
    def exposed_to(self) -> list[str]:
        """Corpora in the source's past that may hold test images of this cell's dataset."""
        return list(self.result.get("exposed_to") or [])

    @property
    def options(self) -> str:
        """Options of the strategy as canonical JSON. Shuffled labels are named here, so that no table mixes the control with the rest."""
        shuffled = {"shuffle_labels": True} if self.shuffled else {}
        return canonical({**(self.result.get("options") or {}), **shuffled})

    @property
    def shuffled(self) -> bool:
        """The control whose training labels were permuted."""
        return bool(self.result.get("shuffle_labels"))

    def value(self, metric: str, split: str = "test", label: str | None = None) -> float:
        """A metric of this cell; NaN when it is absent. `label` picks the class of a per-label metric."""
        for row in self.result.get("metrics", []):
            if row["metric"] == metric and row["split"] == split and (label is None or row.get("class") == label):
                return number(row.get("value"))
        return math.nan

    def primary(self) -> str | None:
        """The headline metric of the cell's task: that which it selects on, with Dice of masks and, of AUROC, that within strata where the
        card names strata."""
        return self._primary

    @cached_property
    def _primary(self) -> str | None:
        held = {
            row["metric"] for row in self.result.get("metrics", []) if row["split"] == "test" and math.isfinite(number(row.get("value")))
        }
        own = self.result.get("metric")
        return own if own in ITS_OWN and own in held else next((metric for metric in PRIMARY[len(ITS_OWN) :] if metric in held), None)

    def mask_class(self) -> str | None:
        """The class that a segmentation task outlines; None for all as one."""
        task = read_yaml(storage.join(self.url, "config.yaml")).get("task")
        return task.get("mask_class") if isinstance(task, dict) else None

    def group(self) -> tuple[Any, ...]:
        """What two cells must share for their sources to be compared."""
        held = self.result
        return held["architecture"], held["strategy"], self.options, held["task"], float(held["fraction"]), int(held["resolution"])


def plain(source: str) -> str:
    """A source as people say it: `pretrain:simclr` is simclr."""
    return source.removeprefix("pretrain:")


def number(value: object) -> float:
    """A JSON number; null and words such as "nan" become NaN."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else ""


def read_json(url: str) -> Any:
    """A JSON file, or None where there is none or it is not (yet) JSON."""
    try:
        return storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def read_yaml(url: str) -> dict[str, Any]:
    """A YAML mapping, or an empty one where there is none."""
    try:
        loaded = storage.read_yaml(url)
    except (FileNotFoundError, NotADirectoryError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read_study(out: str) -> dict[str, Any]:
    """The resolved study, or an empty mapping."""
    return read_yaml(storage.join(out, "study.yaml"))


def finished(out: str, held: Mapping[str, Any] | None = None) -> list[Cell]:
    """Finished cells of role `cell`, sorted by what they are. Search trials never open the test split and are left out.

    Where a search chose for a cell, its options are those that were asked for (`cut: auto`): its siblings may have got other ones.

    Args:
        held: results by key, as somebody read them before: these alone.
    """
    root, chosen = storage.join(out, "cells"), {row["key"]: row["asked"] for row in plan(out) if row.get("asked")}
    cells = []
    for name in storage.listing(root) if held is None else held:
        url = storage.join(root, name)
        result = read_json(storage.join(url, "result.json")) if held is None else held[name]
        if isinstance(result, dict) and result.get("role", "cell") == "cell":
            options = {**(result.get("options") or {}), **chosen.get(name, {})}
            cells.append(Cell(url, {**result, "options": options}))
    return sorted(cells, key=lambda cell: (str(cell.group()), cell.source, cell.source_seed, cell.seed, cell.key))


def load_results(out: str) -> pd.DataFrame:
    """Frame of all finished cells, one row a cell and metric, in the columns of results.csv, in a fixed order.

    Proportions are fractions (unit "fraction"); `seconds` is the cell's wall time; a metric that could not be computed is NaN.
    """
    study = str(read_study(out).get("study", ""))
    runs = read_json(storage.join(out, "tracking.json")) or {}
    rows = []
    for cell in finished(out):
        shared = {
            "study": study,
            **{
                name: cell.result.get(name)
                for name in ("key", "architecture", "strategy", "task", "dataset", "fraction", "resolution", "seed")
            },
            **{name: cell.result.get(name) for name in ("params", "macs", "seconds")},
            "source": cell.source,
            "source_seed": cell.source_seed,
            "options": cell.options,
            "run_id": runs.get(cell.key, "") if isinstance(runs, dict) else "",
        }
        for row in cell.result.get("metrics", []):
            own = {name: row.get(name) for name in ("split", "metric", "unit", "n")}
            rows.append({**shared, **own, "class": row.get("class") or "", "value": number(row.get("value"))})
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sort_values(ORDER, kind="stable", ignore_index=True) if len(frame) else frame


def write_results(out: str, cells: Sequence[Cell] | None = None) -> str:
    """Write OUT/report/results.csv, the rows of `load_results`, and return its address. A million rows take seconds: no frame is made.

    Args:
        cells: as `finished(out)` gave them, to save reading twice.
    """
    study, runs = str(read_study(out).get("study", "")), read_json(storage.join(out, "tracking.json")) or {}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    held = finished(out) if cells is None else cells
    for cell in sorted(held, key=lambda cell: tuple(getattr(cell, name) for name in ORDER[:-3])):
        r = cell.result
        head = [study, cell.key, r["architecture"], cell.source, cell.source_seed, r["strategy"], cell.options, r["task"], r.get("dataset")]
        tail = [r.get("params"), r.get("macs"), r.get("seconds"), runs.get(cell.key, "") if isinstance(runs, dict) else ""]
        rows = [(row.get("split"), row.get("metric"), row.get("class") or "", row) for row in r.get("metrics", [])]
        for split, metric, label, row in sorted(rows, key=lambda row: row[:3]):
            value = number(row.get("value"))
            own = [label, metric, row.get("unit"), value if math.isfinite(value) else None, row.get("n")]
            table.writerow([*head, split, r["fraction"], r["resolution"], r["seed"], *own, *tail])
    url = storage.join(out, "report", "results.csv")
    storage.put(url, text.getvalue())
    return url


def predictions(cell: Cell, split: str = "test") -> pd.DataFrame | None:
    """Rows of predictions.parquet of a split, in order of sample_id; None when the file is absent or holds none."""
    try:
        raw = storage.read_bytes(storage.join(cell.url, "predictions.parquet"))
    except FileNotFoundError:
        return None
    frame = pd.read_parquet(io.BytesIO(raw))
    frame = frame[frame["split"] == split].sort_values("sample_id", kind="stable", ignore_index=True)
    return frame if len(frame) else None


AXES = ("source", "strategy", "task", "fraction", "resolution", "seed")


def plan(out: str) -> list[dict[str, Any]]:
    """Rows of OUT/plan.json, controls included; none where no driver has planned yet."""
    return read_json(storage.join(out, "plan.json")) or []


def planned(out: str) -> set[str]:
    """Keys of the cells that the study asks for, as far as they are known yet."""
    return {row["key"] for row in plan(out)} - {""}


def expected(out: str) -> list[dict[str, Any]]:
    """Every cell that the study asks for, from OUT/plan.json, which the driver writes before the first cell runs; controls left out."""
    return [{**row, "source": plain(str(row["source"]))} for row in plan(out) if not row.get("shuffle_labels")]


def absent(out: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """Cells that the study asks for and that no result stands for, as {source, strategy, task, fraction, resolution, seed}."""
    held = {cell.key for cell in cells}
    return [{name: row[name] for name in AXES} for row in expected(out) if row["key"] not in held]


def failures(out: str) -> dict[str, str]:
    """Reasons by key, from the `failed` events of OUT/events.jsonl. A key that succeeded later is for the caller to leave out."""
    reasons = {}
    for row in storage.read_rows(storage.join(out, "events.jsonl")):
        if row.get("key") and "fail" in str(row.get("event", row.get("kind", ""))):
            reasons[str(row["key"])] = str(row.get("error") or row.get("what") or row.get("reason") or "no reason recorded")
    return reasons


@dataclass(frozen=True)
class Pretraining:
    """One pretraining as far as it got: `result` is None while it is not finished."""

    name: str
    key: str
    url: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None


def pretrainings(out: str) -> list[Pretraining]:
    """Every folder of OUT/pretrain, finished or not."""
    root = storage.join(out, "pretrain")
    found = []
    for folder in storage.listing(root):
        url = storage.join(root, folder)
        config, result = read_yaml(storage.join(url, "config.yaml")), read_json(storage.join(url, "result.json"))
        name = str((result or config).get("name") or folder.rsplit("-", 1)[0])
        found.append(
            Pretraining(name, folder.rsplit("-", 1)[-1], url, config, storage.read_rows(storage.join(url, "metrics.jsonl")), result)
        )
    return found


def shard_urls(out: str, cells: list[Cell]) -> dict[str, str]:
    """Address of the shards of each dataset: those packed by this study, and those that its cells read elsewhere."""
    root = storage.join(out, "shards")
    urls = {name: storage.join(root, name) for name in storage.listing(root) if storage.exists(storage.join(root, name, "manifest.json"))}
    for cell in cells:
        if cell.dataset not in urls:
            named = read_yaml(storage.join(cell.url, "config.yaml")).get("shards")
            if named:
                urls[cell.dataset] = str(named)
    return urls


def by(cells: Iterable[Cell], *names: str) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells grouped by attributes, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(getattr(cell, name) for name in names), []).append(cell)
    return groups


def mean_sd(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (ddof 1) and count of the finite values; NaN where undefined."""
    held = np.array([value for value in values if math.isfinite(value)], float)
    return (float(held.mean()) if len(held) else math.nan, float(held.std(ddof=1)) if len(held) > 1 else math.nan, len(held))
