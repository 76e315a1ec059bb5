"""The strategies by name. Each is one file here: `Config` (its options) and `transplant(spec, weights, task, options, seed)`.

make, options = resolve({"name": "linear"})        # or just "linear"
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from base.config import Strict, parse
from base.errors import RequestError, unknown
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant

STRATEGIES: dict[str, str] = {
    "full": "all weights from the source, all trained",
    "linear": "frozen encoder, a head linear in its features",
}


class Strategy(Protocol):
    """A module of this package."""

    Config: type[Strict]

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
