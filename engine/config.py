"""Settings of the training step. Imports no torch, so that a plan can read recipes in no time."""

from typing import Literal

from pydantic import Field, model_validator

from base.config import Strict
from engine.schedules import Shape


class OptimizerConfig(Strict):
    """The optimiser and its rate. `lr` is for the global batch; nothing rescales it."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd and lars
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    schedule: Shape = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)  # share of lr at the last step
    clip: float | None = Field(default=None, gt=0)  # largest norm of the whole gradient

    @model_validator(mode="after")
    def _lars_needs_decay(self) -> "OptimizerConfig":
        if self.name == "lars" and self.weight_decay == 0:
            raise ValueError("lars needs a weight_decay above 0, for instance 1e-6: without one the update is that of plain sgd")
        return self


class EngineConfig(Strict):
    """How a step is computed. bf16 is autocast over float32 parameters and buffers."""

    optimizer: OptimizerConfig
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0

    @model_validator(mode="after")
    def _norms_need_whole_tensors(self) -> "EngineConfig":
        if self.optimizer.name == "lars" and self.zero_stage > 0:
            raise ValueError("lars needs zero_stage 0: above it, norms are taken over flat partitions and the update is silently wrong")
        return self
