"""A recipe: everything about a pretraining but the data and the architecture. One YAML file a method and preset in `pretrain/recipes/`.

    recipe = load_recipe("simclr/small", {"epochs": 50, "optimizer.lr": 0.3})

Presets: `smoke` shows that it runs and claims nothing, `demo` and `small` are sized for two cores, `paper` holds the official values.
The global batch and the rate belong to the study: they are the same for any number of workers.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from base.config import Strict, load_tree, parse
from base.paths import named
from engine.config import EngineConfig, OptimizerConfig
from shards.views import ViewsConfig


class Recipe(Strict):
    """`options` are the method's own (its file in `pretrain/methods/`)."""

    schema_: Literal[1] = Field(1, alias="schema")
    method: str
    options: dict[str, Any] = Field(default={})
    views: ViewsConfig
    global_batch: int = Field(ge=2)
    virtual_batch: int | None = Field(default=None, ge=1)  # images that the encoder holds in memory at once; gradients stay exact
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(default=None, ge=1)  # stop earlier, after this many updates
    optimizer: OptimizerConfig
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    accumulate: int = Field(default=1, ge=1)  # micro-batches to an update; losses and batch norm then see a micro-batch, not the batch
    activation_checkpointing: bool = False  # compute the encoder's activations twice rather than keep them
    compile: bool = False  # the encoder by torch.compile
    log_every_steps: int = Field(default=20, ge=1)
    checkpoint_every_steps: int = Field(default=200, ge=0)  # 0: none, then a killed run starts again
    keep_checkpoints: int = Field(default=2, ge=1)  # the newest; the one with the best kNN probe stays too
    stop_when_collapsed: bool = True

    @model_validator(mode="after")
    def _engine_agrees(self) -> "Recipe":
        self.engine()
        if self.global_batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide global_batch {self.global_batch}")
        if self.global_batch == self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} leaves micro-batches of one image, which no other can be told from")
        return self

    def engine(self) -> EngineConfig:
        """The part that the engine reads."""
        return EngineConfig(optimizer=self.optimizer, precision=self.precision, zero_stage=self.zero_stage, accumulate=self.accumulate)

    def steps(self, epoch_steps: int) -> int:
        """Updates of the whole run, with so many in an epoch."""
        total = max(1, math.ceil(self.epochs * epoch_steps))
        return total if self.max_steps is None else min(total, self.max_steps)


def load_recipe(name: str, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name (`simclr/small`) or by the path of a YAML file, with settings by dotted key.

    Raises:
        RequestError: unknown recipe or key (with the nearest right one), or a value out of range.
    """
    path = named("recipe", name)
    return parse(load_tree(path, settings or {}), Recipe, f"recipe {name}")
