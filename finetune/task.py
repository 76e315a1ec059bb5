"""Tasks: a dataset seen through labels, with a loss, a metric and a recipe. One YAML file each in `finetune/tasks/`.

    task = load_task("phantom-chest")                    # or a path ending in .yaml
    task = load_task("dxc14", ["recipe.epochs=3"])

The kind fixes loss and head: multilabel is binary cross-entropy over the known labels, multiclass is cross-entropy over labels of which
each image has one, segmentation is binary cross-entropy plus Dice per image against one class of the mask, or any of them.
"""

from typing import Literal

from pydantic import Field, model_validator

from base.config import Settings, Strict, load
from base.paths import named
from shards.card import Uncertain

Metric = Literal["auroc_mean", "auprc_mean", "auroc_within_mean", "dice"]


class Augmentation(Strict):
    """Training views, drawn for each sample and epoch. Evaluation sees the whole image, resized, and nothing else.

    crop_scale: share of the area that is kept. crop_ratio: width over height of the crop, relative to the image's own.
    brightness, contrast: half width of the factor's range around 1.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    flip: bool = True
    brightness: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)


class Recipe(Strict):
    """Training of all weights. The rate rises over `warmup` epochs and falls along half a cosine to 0 at the last epoch.

    patience: epochs without a better validation metric before training stops; the best epoch is kept in any case.
    """

    epochs: int = Field(gt=0)
    batch: int = Field(gt=1)
    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(1.0, ge=0)
    patience: int = Field(gt=0)
    views: Augmentation = Augmentation()


class LinearRecipe(Strict):
    """Training of a linear head on cached features: an epoch costs milliseconds, so it takes many."""

    epochs: int = Field(100, gt=0)
    batch: int = Field(64, gt=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warmup: float = Field(1.0, ge=0)
    patience: int = Field(20, gt=0)


class Task(Strict):
    """One task. `metric` is the one that validation selects on; `resolution` the default side in pixels.

    labels: of the card, or made by its views. uncertain: what labels that are -1 count as in training, where it is not the card's own
    policy; validation and test leave them out. mask_class: the class of the card's masks to outline; null for all of them as one.
    """

    schema_: Literal[2] = Field(alias="schema")
    task: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    dataset: str
    kind: Literal["multilabel", "multiclass", "segmentation"]
    labels: list[str] = Field(default=[])
    uncertain: Uncertain | None = None
    mask_class: str | None = None
    metric: Metric
    resolution: int = Field(ge=16)
    recipe: Recipe
    linear: LinearRecipe = LinearRecipe()

    @model_validator(mode="after")
    def _is_consistent(self) -> "Task":
        segments = self.kind == "segmentation"
        if segments and self.labels:
            raise ValueError("labels: a segmentation task has none, its target is the mask")
        if not segments and self.mask_class is not None:
            raise ValueError(f"mask_class: a {self.kind} task has no masks")
        if not segments and not self.labels:
            raise ValueError(f"labels: a {self.kind} task needs them")
        if self.kind == "multiclass" and len(self.labels) < 2:
            raise ValueError("labels: a multiclass task needs two at least")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a name stands twice")
        if segments != (self.metric == "dice"):
            raise ValueError(f"metric: '{self.metric}' does not measure a {self.kind} task")
        return self


def load_task(name: str, overrides: Settings = ()) -> Task:
    """The task of that name, or of that YAML file, with `key=value` settings (or dotted keys and values) applied.

    Raises:
        RequestError: unknown name (with the nearest right one), unknown key, bad value.
    """
    return load(named("task", name), Task, overrides)
