"""One pretraining or one cell as a study of its own, so that both take the one main job's path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from base.config import Strict, apply, parse
from base.errors import RequestError
from base.paths import named, with_preset
from cluster.load import check_names, key_of, resolve_paths
from cluster.study import Data, Resources, Study
from finetune.search import Tune
from finetune.task import load_task


class OnePretraining(Strict):
    """Settings of `allograft pretrain`."""

    data: Data
    split: str = "train"
    out: str = "runs/pretrain"
    architecture: str | None = None
    start_from: str = "random"
    seed: int = 0
    settings: dict[str, Any] = Field({})
    resources: Resources = Resources()
    tracking: str = "sqlite"


class OneCell(Strict):
    """Settings of `allograft finetune`."""

    data: Data
    out: str = "runs/finetune"
    source: str = "random"
    architecture: str | None = None
    strategy: dict[str, Any] | str = "full"
    fraction: float = 1.0
    resolution: int | None = None
    seed: int = 0
    tune: Tune | None = None
    settings: dict[str, Any] = Field({})
    resources: Resources = Resources()
    tracking: str = "sqlite"


def pretrain_study(recipe: str, settings: Sequence[str]) -> Study:
    """A study with one pretraining and no cells."""
    named("recipe", recipe)  # a name that is not there is refused by itself
    where = f"allograft pretrain {recipe}"
    one = parse(_with_data(settings, where, "DATASET"), OnePretraining, where)
    name = recipe.removesuffix(".yaml").replace("/", "-")
    entry = {
        "name": name,
        "recipe": recipe,
        "data": dict.fromkeys(one.data, one.split),
        "architecture": one.architecture,
        "start_from": one.start_from,
        "seeds": [one.seed],
        "settings": one.settings,
    }
    return _study(f"pretrain-{name}", one, {"pretrain": [entry]}, where)


def finetune_study(task: str, settings: Sequence[str]) -> Study:
    """A study with one cell."""
    where = f"allograft finetune {task}"
    one = parse(_with_data(settings, where, load_task(task).dataset), OneCell, where)
    matrix = {
        "sources": [{"name": one.source.rstrip("/").rsplit("/", 1)[-1], "source": one.source}],
        "strategies": [one.strategy],
        "tasks": [task],
        "architectures": [one.architecture] if one.architecture else [],
        "fractions": [one.fraction],
        "resolutions": {} if one.resolution is None else [one.resolution],
        "seeds": [one.seed],
        "tune": one.tune,
        "trial_seeds": [one.seed],
        "task_settings": {task: one.settings} if one.settings else {},
    }
    stem, preset = with_preset(task)
    name = Path(stem).stem + ("" if stem == task else f"-{preset}")
    study = _study(f"finetune-{name}", one, {"cells": matrix}, where)
    if one.architecture and one.source != "random":
        raise RequestError(f"'{one.source}' brings its own architecture", where=f"{where}: architecture", hint="leave it out")
    return study


def _with_data(settings: Sequence[str], where: str, dataset: str) -> dict[str, Any]:
    asked = apply({}, settings)
    if "data" not in asked:
        hint = f"data.{key_of(dataset)}.raw=FOLDER, or data.{key_of(dataset)}.shards=URL where it is packed already"
        raise RequestError("where are the images?", where=where, hint=hint + ("; allograft list datasets" if dataset == "DATASET" else ""))
    return asked


def _study(name: str, one: OnePretraining | OneCell, parts: dict[str, Any], where: str) -> Study:
    common = {
        "study": name,
        "out": one.out,
        "tracking": one.tracking,
        "data": {dataset: entry.model_dump() for dataset, entry in one.data.items()},
        "resources": one.resources.model_dump(),
    }
    study = resolve_paths(parse({**common, **parts}, Study, where), Path.cwd())
    check_names(study, where)
    return study
