"""The strategies of finetune.catalogue. Each is one file here: `Config` (its options), `transplant(spec, weights, task, options, seed)`.

make, options = resolve({"name": "linear"})        # or just "linear"
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from base.config import Strict, parse
from base.errors import RequestError, unknown
from encoders.build import build
from encoders.volumes import inflate
from finetune.catalogue import STRATEGIES
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant


class Strategy(Protocol):
    """A module of this package."""

    Config: type[Strict]

    # Refuses, before anything is loaded, what can be seen from names alone; only where a strategy has something to refuse.
    check: Callable[[str, Task, Strict], None]

    def transplant(self, spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Strict, seed: int) -> Transplant: ...


def get(name: str, where: str | None = None) -> Strategy:
    """The strategy's module. Raises RequestError with the nearest name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES, where)
    return cast(Strategy, importlib.import_module(f"finetune.strategies.{name.replace('-', '_')}"))


def resolve(strategy: str | Mapping[str, Any], where: str = "strategy") -> tuple[Strategy, Strict]:
    """A strategy and its checked options, from a name or from a mapping of `name` and options.

    Raises:
        RequestError: no name, unknown strategy, unknown or bad option.
    """
    entry = {"name": strategy} if isinstance(strategy, str) else dict(strategy)
    if "name" not in entry:
        raise RequestError("a strategy needs a name", where=where, hint=f"known: {', '.join(STRATEGIES)}")
    name = str(entry.pop("name"))
    make = get(name, where)
    return make, parse(entry, make.Config, f"{where} {name}")


def check(strategy: str | Mapping[str, Any], architecture: str, task: Task, where: str = "strategy") -> None:
    """Whether the strategy can be had of this architecture on this task, told from their names before anything runs.

    `cut: auto` is passed over: a search puts cuts of the architecture in its place.

    Raises:
        RequestError: as `resolve`, and no such cut, a family that the strategy is not for, or a kind of task.
    """
    make, options = resolve(strategy, where)
    try:
        if task.volume:
            with torch.device("meta"):
                inflate(build(architecture, 1))
        if hasattr(make, "check") and getattr(options, "cut", None) != "auto":
            make.check(architecture, task, options)
    except RequestError as error:
        raise RequestError(error.what, where=where, hint=error.hint) from error
