"""Settings of the training step. Imports no torch, so that a plan can read recipes in no time."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from base.config import Strict
from engine.schedules import Shape

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    """The optimiser and its rate. `lr` is for the global batch; nothing rescales it."""

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_end: float | None = Field(default=None, ge=0)  # reached along a cosine at the last step, as in DINO
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd and lars
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # adamw and lamb
    layer_decay: float | None = Field(default=None, gt=0, le=1)  # factor of the rate from a cut of the encoder to the one before
    schedule: Shape = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)  # share of lr at the last step
    milestones: tuple[float, ...] = ()  # step: shares of the run after which the rate is multiplied by gamma
    gamma: float = Field(default=0.1, gt=0, lt=1)  # step and plateau
    patience: int = Field(default=5, ge=1)  # plateau: epochs whose mean training loss is no better, before the rate is multiplied by gamma
    clip: float | None = Field(default=None, gt=0)  # largest norm of the whole gradient

    @model_validator(mode="after")
    def _lars_needs_decay(self) -> "OptimizerConfig":
        if self.name == "lars" and self.weight_decay == 0:
            raise ValueError("lars needs a weight_decay above 0, for instance 1e-6: without one the update is that of plain sgd")
        return self

    @model_validator(mode="after")
    def _decay_moves_where_there_is_one(self) -> "OptimizerConfig":
        if self.weight_decay_end is not None and self.weight_decay == 0:
            raise ValueError("weight_decay_end moves a weight_decay above 0, for instance weight_decay: 0.04")
        if self.name in ("lars", "lamb") and self.weight_decay_end == 0:
            raise ValueError(
                f"{self.name} needs a weight_decay_end above 0, for instance 1e-6: at 0 the steps lose the scaling to each tensor's norm"
            )
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> "OptimizerConfig":
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule step and milestones come together, for instance milestones: [0.6, 0.8]")
        if any(not 0 < share < 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones are shares of the run between 0 and 1, in order")
        return self


class EngineConfig(Strict):
    """How a step is computed. bf16 is autocast over float32 parameters and buffers."""

    optimizer: OptimizerConfig
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    accumulate: int = Field(default=1, ge=1)  # micro-batches whose gradients are averaged into one update

    @model_validator(mode="after")
    def _norms_need_whole_tensors(self) -> "EngineConfig":
        if self.optimizer.name in ("lars", "lamb") and self.zero_stage > 0:
            raise ValueError(
                f"{self.optimizer.name} needs zero_stage 0: above it, norms are taken over flat partitions and the update is silently wrong"
            )
        return self
