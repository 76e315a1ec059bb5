"""What a study has in its `out`: finished cells, those still missing, pretrainings, manifests.

cells = finished(out); missing = absent(out, cells)

Storage is the truth: a cell is finished when its result.json stands in OUT/cells/<key>/. Everything here only reads files, so it works on a
study that is running, half failed, empty, or on another machine (`out` may be a URL).
"""

import functools
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml

from analysis.diary import RUNNING, Ending, endings
from base import storage
from base.config import digest
from base.paths import is_url

if TYPE_CHECKING:
    import pandas as pd

AT_ONCE = 32  # files asked of an object store
RESULT = "result.json"
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


APART = {"own": "own source", "exposed": "exposed"}  # in a word or two; of a side with both kinds the greater counts


@dataclass(frozen=True)
class Cell:
    """One finished cell: its result.json, the address of its folder, and why it is evidence for nothing, as `apart` says."""

    url: str
    result: dict[str, Any]
    apart: str = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["result"][name]  # which is not there yet while a cell is unpickled
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def key(self) -> str:
        return str(self.result["key"])

    @cached_property
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

    @cached_property
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
        return self._values.get((metric, split, label), math.nan)

    @cached_property
    def _values(self) -> dict[tuple[str, str, str | None], float]:
        """By metric, split and class, and by no class the first of them."""
        found: dict[tuple[str, str, str | None], float] = {}
        for row in self.result.get("metrics", []):
            value = number(row.get("value"))
            for label in (row.get("class"), None):
                found.setdefault(_same((row["metric"], row["split"], label)), value)
        return found

    @cached_property
    def measured(self) -> frozenset[str | None]:
        """The classes that its metrics are of."""
        return frozenset(row.get("class") for row in self.result.get("metrics", []))

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

    @property
    def setting(self) -> str:
        return setting(self.strategy, self.options)

    @cached_property
    def group(self) -> tuple[Any, ...]:
        """What two cells must share for their sources to be compared."""
        held = self.result
        return held["architecture"], held["strategy"], self.options, held["task"], float(held["fraction"]), int(held["resolution"])


@functools.cache
def _same(key: tuple[str, str, str | None]) -> tuple[str, str, str | None]:
    """One object for equal keys: thousands of cells hold the same hundred."""
    return key


def headline(cells: Iterable[Cell]) -> str | None:
    """The headline metric of cells of one task; None where none of them has a number."""
    held = {cell.primary() for cell in cells}
    return next((metric for metric in PRIMARY if metric in held), None)


@functools.lru_cache
def setting(strategy: str, options: str) -> str:
    """A strategy with its options, as `canonical` has them, in words: `fat cut=layer3 head=pooled`."""
    held = json.loads(options) if options else {}
    return " ".join([strategy, *(f"{name}={value}" for name, value in held.items() if value is not None)])


def share(fraction: float) -> str:
    """`10 % of the labels`."""
    return f"{fraction * 100:g} % of the labels"


def in_words(task: object, architecture: object, fraction: float | str, resolution: object) -> str:
    """A setting as titles name it."""
    return f"{task}, {architecture}, {resolution} px" + (f", {share(float(fraction))}" if float(fraction) != 1 else "")


def apart(row: Mapping[str, Any], exposed: object) -> str:
    """Why a cell, by its result or its row of a plan, stays out of ranks and comparisons: its source has seen the labels of its dataset
    ("own") or, unless the study ranks those all the same, may have seen its test images ("exposed"); "" where neither.

    exposed: the study's setting of that name.
    """
    if row.get("own_source"):
        return "own"
    return "exposed" if row.get("exposed_to") and exposed != "ranked" else ""


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
    raw = storage.read_or_none(url)
    try:
        return None if raw is None else storage.parsed(raw)
    except ValueError:
        return None


def with_nulls(value: Any) -> str:
    """JSON with NaN as null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: clean(inner) for name, inner in item.items()}
        if isinstance(item, list):
            return [clean(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), indent=1) + "\n"


def read_yaml(url: str) -> dict[str, Any]:
    """A YAML mapping, or an empty one where there is none."""
    raw = storage.read_or_none(url)
    try:
        loaded = None if raw is None else storage.from_yaml(raw)
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def read_rows(url: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; no file, no rows."""
    raw = storage.read_or_none(url)
    return [] if raw is None else storage.rows(raw)


def read_study(out: str) -> dict[str, Any]:
    """The resolved study, or an empty mapping."""
    return read_yaml(storage.join(out, "study.yaml"))


def finished(out: str, held: Mapping[str, Any] | None = None) -> list[Cell]:
    """Finished cells of role `cell`, sorted by what they are. Search trials never open the test split and are left out.

    Args:
        held: results by key, as somebody read them before: these alone.
    """
    root = storage.join(out, "cells")
    there = {name: result for name, result in (_results(root) if held is None else held).items() if isinstance(result, dict)}
    asked, exposed = as_asked(out, there).items(), read_study(out).get("exposed")
    cells = [Cell(storage.join(root, name), one, apart(one, exposed)) for name, one in asked if one.get("role", "cell") == "cell"]
    return sorted(cells, key=lambda cell: (str(cell.group), cell.source, cell.source_seed, cell.seed, cell.key))


def as_asked(out: str, held: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by key. Where a search chose for a cell, its options are those that were asked for (`cut: auto`): its siblings may have got
    other ones. Of a similarity that was given for every cut there is its digest."""
    chosen = {row["key"]: {name: _brief(value) for name, value in row["asked"].items()} for row in plan(out) if row.get("asked")}
    return {key: {**result, "options": {**(result.get("options") or {}), **chosen.get(key, {})}} for key, result in held.items()}


def _brief(value: Any) -> Any:
    return f"given {digest(value)[:6]}" if isinstance(value, dict) else value


def _results(root: str) -> dict[str, Any]:
    """result.json by the name of its folder; None where it is not there."""
    names = storage.listing(root)
    return dict(zip(names, _read_all([storage.join(root, name, RESULT) for name in names]), strict=True))


def _read_all(urls: Sequence[str]) -> list[Any]:
    if not any(map(is_url, urls)):
        return list(map(read_json, urls))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read_json, urls))


def predictions(cell: Cell, split: str = "test") -> "pd.DataFrame | None":
    """Rows of predictions.parquet of a split, in order of sample_id, without maps of masks; None when the file is absent or has none."""
    from pyarrow.parquet import ParquetFile

    raw = storage.read_or_none(storage.join(cell.url, "predictions.parquet"))
    if raw is None:
        return None
    file = ParquetFile(io.BytesIO(raw))
    frame = file.read(columns=[name for name in file.schema_arrow.names if name != "probability_png"]).to_pandas()
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
    return without_controls(plan(out))


def without_controls(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a plan without the controls, sources as people say them."""
    return [{**row, "source": plain(str(row["source"]))} for row in rows if not row.get("shuffle_labels")]


def absent(out: str, cells: list[Cell]) -> list[dict[str, Any]]:
    """Cells that the study asks for and that no result stands for, as {source, strategy, task, fraction, resolution, seed}."""
    held = {cell.key for cell in cells}
    return [{name: row[name] for name in AXES} for row in expected(out) if row["key"] not in held]


def damaged(out: str, whole: Collection[str] = ()) -> list[str]:
    """Addresses of the result.json of cells and pretrainings that stand and are no JSON.

    Args:
        whole: names of folders that need not be looked at.
    """
    roots = [storage.join(out, "cells"), storage.join(out, "pretrain")]
    urls = [storage.join(root, name, RESULT) for root in roots for name in storage.holding(root, RESULT) if name not in whole]
    return [url for url, held in zip(urls, _read_all(urls), strict=True) if held is None]


@dataclass(frozen=True)
class Pretraining:
    """One pretraining as far as it got: `result` is None while it is not finished, `ending` says how it stands then."""

    name: str
    key: str
    url: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    ending: Ending = RUNNING


def pretrainings(out: str) -> list[Pretraining]:
    """Every folder of OUT/pretrain, finished or not."""
    root, ended = storage.join(out, "pretrain"), endings(out)
    found = []
    for folder in storage.listing(root):
        url, key = storage.join(root, folder), folder.rsplit("-", 1)[-1]
        config, result = read_yaml(storage.join(url, "config.yaml")), read_json(storage.join(url, RESULT))
        name = str((result or config).get("name") or folder.rsplit("-", 1)[0])
        rows = storage.read_rows(storage.join(url, "metrics.jsonl"))
        found.append(Pretraining(name, key, url, config, rows, result, ended.get(key, RUNNING)))
    return sorted(found, key=lambda run: (run.name, number(run.config.get("seed"))))


def shard_urls(out: str, cells: list[Cell]) -> dict[str, str]:
    """Address of the shards of each dataset: those packed by this study, and those that its cells read elsewhere."""
    root = storage.join(out, "shards")
    urls = {name: storage.join(root, name) for name in storage.listing(root) if storage.exists(storage.join(root, name, "manifest.json"))}
    for (dataset,), own in by(cells, "dataset").items():
        if dataset not in urls:
            named = read_yaml(storage.join(own[0].url, "config.yaml")).get("shards")
            if named:
                urls[dataset] = str(named)
    return urls


def by(cells: Iterable[Cell], *names: str) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells grouped by attributes, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(getattr(cell, name) for name in names), []).append(cell)
    return groups


def in_groups(cells: Iterable[Cell]) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells by what they must share to be compared, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def mean_sd(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (ddof 1) and count of the finite values; NaN where undefined."""
    held = [value for value in values if math.isfinite(value)]  # no array: they are few, and a report asks for thousands of means
    if not held:
        return math.nan, math.nan, 0
    mean = math.fsum(held) / len(held)
    squares = math.fsum((value - mean) ** 2 for value in held)
    return mean, math.sqrt(squares / (len(held) - 1)) if len(held) > 1 else math.nan, len(held)
