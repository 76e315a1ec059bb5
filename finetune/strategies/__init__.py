"""The strategies by name. Each is one file here: `Config` (its options) and `transplant(spec, weights, task, options, seed)`.

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
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant

STRATEGIES: dict[str, str] = {
    "full": "all weights from the source, all trained",
    "linear": "frozen encoder, a head linear in its features",
    "linear-aug": "frozen encoder, a linear head trained on augmented views by the task's recipe",
    "transfusion": "weights up to a cut, the rest random, all trained",
    "mean-var": "weights drawn from mean and variance of the source's tensors, all trained",
    "slim": "weights up to a cut, a narrower random network after it, all trained",
    "gabor": "synthetic Gabor filters first, the rest random, all trained",
    "lwft": "all weights, frozen up to a cut, the rest at a divided rate",
    "truncated": "weights up to a cut, the rest discarded, all trained",
    "fat": "weights up to a cut, the rest discarded, frozen, a linear head",
    "lp-ft": "the head on the frozen encoder first, then all trained",
    "gradual": "all weights, trained part by part from the top",
    "layer-decay": "all weights, at rates that fall towards the stem",
    "l2-sp": "all weights, all trained and held near the source",
    "lora": "frozen vision transformer with trained matrices of low rank in its attention",
    "knn": "frozen encoder, labels of the nearest training images",
}


class Strategy(Protocol):
    """A module of this package."""

    Config: type[Strict]

    # Refuses, before anything is loaded, what can be seen from names alone; only where a strategy has something to refuse.
    check: Callable[[str, Task, Strict], None]

    def transplant(self, spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Strict, seed: int) -> Transplant: ...


def get(name: str) -> Strategy:
    """The strategy's module. Raises RequestError with the nearest name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
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
    make = get(name)
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
