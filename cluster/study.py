"""A study: pretraining runs, the matrix of cells, the analyses, as one checked YAML file.

study = load_study("studies/demo.yaml", ["cells.seeds=[0]"])
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from base.config import Strict, apply, assign, load_tree, parse
from base.errors import RequestError, unknown
from base.paths import absolute, is_url, named, names
from finetune.task import load_task

SPLITS = ("train", "val", "test")


class DataEntry(Strict):
    """Where a dataset is: raw files to be packed (`phantom:N[@SEED]` for generated ones), or shards that stand already."""

    raw: str | None = None
    shards: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.raw is None) == (self.shards is None):
            raise ValueError("give exactly one of raw and shards")
        return self


class PretrainEntry(Strict):
    """One pretraining run for each seed; its name is a source for later entries and for cells."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    recipe: str
    data: dict[str, Literal["train", "val", "test"]]
    architecture: str | None = Field(None, description="a timm name; taken from start_from when left out")
    start_from: str = "random"
    seeds: list[int] = Field([0], min_length=1)
    settings: dict[str, Any] = Field({}, description="keys of the recipe that this run sets otherwise")


class SourceEntry(Strict):
    """A source under a name of one's own: `{name: random-b, source: random}` is the A/A control."""

    name: str
    source: str


class Cells(Strict):
    """The matrix. Fractions and resolutions are lists, or lists by task."""

    sources: list[SourceEntry] = Field(min_length=1)
    strategies: list[dict[str, Any]] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    architectures: list[str] = Field([], description="for sources without one of their own; default: those of the pretraining runs")
    fractions: list[float] | dict[str, list[float]] = Field([1.0])
    resolutions: list[int] | dict[str, list[int]] = Field({}, description="default: the task's own")
    seeds: list[int] = Field([0], min_length=1)
    task_settings: dict[str, dict[str, Any]] = Field({}, description="by task: keys of its file that this study sets otherwise")
    shuffled_labels: list[str] = Field([], description="control: sources whose cells are repeated with permuted training labels")

    @field_validator("sources", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        short = lambda text: text.partition(":")[2] if text.startswith("pretrain:") else text  # noqa: E731
        return [{"name": short(item), "source": item} if isinstance(item, str) else item for item in value or []]

    @field_validator("strategies", mode="before")
    @classmethod
    def _optioned(cls, value: Any) -> Any:
        return [{"name": item} if isinstance(item, str) else item for item in value or []]

    def of_task(self, axis: Literal["fractions", "resolutions"], task: str) -> list[Any]:
        """The values of an axis for a task."""
        values = getattr(self, axis)
        if isinstance(values, list):
            return list(values)
        return list(values.get(task, [1.0] if axis == "fractions" else [load_task(task).resolution]))


class Champion(Strict):
    """The rule by which one registered encoder gets the alias `champion`: best mean on validation."""

    task: str
    metric: str = "auroc_mean"


class Resources(Strict):
    """What a piece of work is given. Threads are part of a cell's key (they change the last bits), counts of workers are not."""

    pretrain_workers: int = Field(2, ge=1)
    gpus_per_pretrain_worker: float = Field(0, ge=0)
    cell_workers: int | None = Field(None, ge=1, description="default: as many as the cluster's processors or GPUs hold")
    gpus_per_cell: float = Field(0, ge=0)
    threads: int = Field(1, ge=1, description="intra-operation threads of every worker")


class Study(Strict):
    """The file that `allograft run` takes."""

    schema_: Literal[1] = Field(1, alias="schema")
    study: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    out: str
    tracking: str = "sqlite"
    data: dict[str, DataEntry] = Field(min_length=1)
    pretrain: list[PretrainEntry] = Field([])
    cells: Cells | None = None
    champion: Champion | None = None
    resources: Resources = Resources()
    presets: dict[str, dict[str, Any]] = Field({}, description="named sets of settings; `preset=NAME` applies one")
    preset: str | None = None


def load_study(path: str, settings: Sequence[str] = ()) -> Study:
    """The study file with its settings applied, paths absolute against the caller's directory, every name in it checked.

    Raises:
        RequestError: naming file and key, with the nearest right name.
    """
    if "/" not in path and not path.endswith((".yaml", ".yml")):
        if path not in names("study"):
            raise unknown("study", path, names("study"))
        path = str(named("study", path))
    tree = load_tree(path, settings)
    if tree.get("preset"):
        presets = tree.get("presets") or {}
        if tree["preset"] not in presets:
            raise unknown("preset", str(tree["preset"]), presets, where=f"{path}: preset")
        for key, value in presets[tree["preset"]].items():
            assign(tree, key, value)
        apply(tree, settings)  # what the user typed wins over the preset
    study = resolve_paths(parse(tree, Study, path), Path.cwd())
    check_names(study, path)
    return study


def resolve_paths(study: Study, base: Path) -> Study:
    """Relative `out`, `raw` and `shards` made absolute; inside a Ray job, whose directory is a throw-away copy, they are refused."""
    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ

    def resolve(value: str, key: str) -> str:
        if value.startswith("phantom:"):
            return value
        if inside_job and not is_url(value) and not os.path.isabs(value):
            raise RequestError(
                f"'{value}' is relative, and a Ray job's directory is thrown away", where=key, hint="give a URL or an absolute path"
            )
        return absolute(value, base)

    data = {
        name: entry.model_copy(
            update={
                "raw": resolve(entry.raw, f"data.{name}.raw") if entry.raw else None,
                "shards": resolve(entry.shards, f"data.{name}.shards") if entry.shards else None,
            }
        )
        for name, entry in study.data.items()
    }
    out = resolve(study.out, "out")
    if is_url(out) and study.tracking == "sqlite":
        raise RequestError("results go to a URL, so tracking must be a server", where="tracking", hint="tracking=http://HOST:5000")
    return study.model_copy(update={"out": out, "data": data})


def check_names(study: Study, where: str) -> None:
    """Every card, recipe, task, strategy and source that the study names must exist."""
    from finetune.strategies import resolve
    from pretrain.recipe import load_recipe
    from shards.card import load_card

    cards = {name: load_card(name) for name in study.data}
    earlier: dict[str, PretrainEntry] = {}
    for i, entry in enumerate(study.pretrain):
        key = f"{where}: pretrain[{i}]"
        if entry.name in earlier:
            raise RequestError(f"two pretraining runs are named '{entry.name}'", where=key)
        load_recipe(entry.recipe, entry.settings)
        for dataset in entry.data:
            if dataset not in study.data:
                raise unknown("dataset", dataset, study.data, where=f"{key}.data")
        _check_source(entry.start_from, earlier, f"{key}.start_from")
        if entry.architecture is None and entry.start_from == "random":
            raise RequestError("a run that starts from random weights needs an architecture", where=key, hint="architecture: resnet18")
        earlier[entry.name] = entry
    if study.cells is None:
        return
    for i, source in enumerate(study.cells.sources):
        _check_source(source.source, earlier, f"{where}: cells.sources[{i}]")
    sources = [source.name for source in study.cells.sources]
    if len(set(sources)) < len(sources):
        raise RequestError("two sources have the same name", where=f"{where}: cells.sources")
    for i, strategy in enumerate(study.cells.strategies):
        resolve(strategy, f"{where}: cells.strategies[{i}]")
    for i, task in enumerate(study.cells.tasks):
        found = load_task(task, study.cells.task_settings.get(task, {}))
        if found.dataset not in cards:
            hint = f"data.{found.dataset}.raw=PATH"
            raise RequestError(f"task '{task}' needs the dataset '{found.dataset}'", where=f"{where}: cells.tasks[{i}]", hint=hint)
        for axis in ("fractions", "resolutions"):
            values = getattr(study.cells, axis)
            for name in values if isinstance(values, dict) else ():
                if name not in study.cells.tasks:
                    raise unknown("task", name, study.cells.tasks, where=f"{where}: cells.{axis}")
    for name in study.cells.shuffled_labels:
        if name not in sources:
            raise unknown("source", name, sources, where=f"{where}: cells.shuffled_labels")
    if study.champion and study.champion.task not in study.cells.tasks:
        raise unknown("task", study.champion.task, study.cells.tasks, where=f"{where}: champion.task")


def _check_source(source: str, earlier: dict[str, PretrainEntry], where: str) -> None:
    kind, _, rest = source.partition(":")
    if kind == "pretrain" and rest not in earlier:
        raise unknown("pretraining run", rest, earlier, where=where)
    if source == "random" or kind in {"pretrain", "timm", "models", "run"} or is_url(source):
        return
    if not ("/" in source or source.startswith(".")):
        raise unknown("source", source, ["random", *(f"pretrain:{name}" for name in earlier)], where=where)
