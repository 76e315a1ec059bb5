"""One pretraining or one cell as a study of its own, so that both take the one main job's path."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from base.config import Strict, apply, parse
from base.errors import RequestError
from base.paths import named, with_preset
from cluster.load import check_names, key_of, resolve_paths, resolve_tasks
from cluster.study import Data, Resources, Study
from finetune.search import Tune
from finetune.task import load_task

# Keys of the study that stands for a command, and how the command spells them.
ENTRY = r"(?:\[0\]|\.0)"
SPELLED = (
    (rf"\bpretrain(?:{ENTRY}|\.[a-z0-9._-]+?)\.(?=(?:architecture|data|recipe|seeds|settings|start_from)\b)", ""),
    (r": pretrain\[0\]", ""),
    (rf"\bcells\.sources{ENTRY}(?:\.(?:name|source))?", "source"),
    (rf"\bcells\.strategies(?:{ENTRY}(?:\.name)?)?", "strategy"),
    (r"\bcells\.task_settings\.(?:[^:]*?\.ya?ml(?:/\w+)?|[^.:]+)", "settings"),
    (rf"\bcells\.tasks{ENTRY}", "task"),
    (rf"\b(?:cells\.)?(?:trial_)?seeds{ENTRY}", "seed"),
    (rf"\bcells\.(architecture|fraction|resolution)s(?:{ENTRY})?(?:=\[(\w+)\])?", lambda m: m[1] + (f"={m[2]}" if m[2] else "")),
    (r"\bcells\.(?=tune\b)", ""),
)


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
    out: str | None = None
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
    one = parse(_with_data(settings, where, key_of(load_task(task).dataset)), OneCell, where)
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
    name = load_task(task).task + ("" if stem == task else f"-{preset}")
    study = _study(f"finetune-{name}", one, {"cells": matrix}, where)
    if one.architecture and one.source != "random":
        raise RequestError(f"'{one.source}' brings its own architecture", where=f"{where}: architecture", hint="leave it out")
    return study


def _with_data(settings: Sequence[str], where: str, dataset: str) -> dict[str, Any]:
    asked = apply({}, settings)
    if "data" not in asked:
        hint = f"data.{dataset}.raw=FOLDER, or data.{dataset}.shards=URL where it is packed already"
        raise RequestError("where are the images?", where=where, hint=hint + ("; allograft list datasets" if dataset == "DATASET" else ""))
    return asked


def _study(name: str, one: OnePretraining | OneCell, parts: dict[str, Any], where: str) -> Study:
    common = {
        "study": name,
        "out": one.out or f"runs/{name}",
        "tracking": one.tracking,
        "data": {dataset: entry.model_dump() for dataset, entry in one.data.items()},
        "resources": one.resources.model_dump(),
    }
    study = resolve_tasks(resolve_paths(parse({**common, **parts}, Study, where), Path.cwd()), where)
    check_names(study, where)
    return study


def spelled(text: str) -> str:
    """Keys of the study in a text, as `allograft pretrain` and `allograft finetune` take them."""
    for pattern, key in SPELLED:
        text = re.sub(pattern, key, text)
    return text


@contextmanager
def as_typed() -> Iterator[None]:
    """Requests refused inside name keys in the spelling of the command: who types it has no study file."""
    try:
        yield
    except RequestError as error:
        where, hint = (text and spelled(text) for text in (error.where, error.hint))
        raise RequestError(spelled(error.what), where=where, hint=hint) from error
