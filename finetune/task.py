"""Tasks: a dataset seen through labels, with a loss, a metric and a recipe. One YAML file each in `finetune/tasks/`.

    task = load_task("phantom-chest")                    # preset small; or a path ending in .yaml
    task = load_task("dxc14/paper", ["recipe.epochs=3"])

A file holds the facts of a task and its presets: `smoke` shows that it runs and claims nothing, `small` is what a laptop does in minutes,
`paper` is the recipe of the study that the task comes from. The kind fixes the head, and which losses and metrics fit (LOSSES, METRICS).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from base.config import Settings, Strict, apply, load_tree, parse
from base.errors import RequestError, nearest, unknown
from base.paths import named, with_preset
from shards.card import Card, Uncertain, load_card
from shards.draws import Share

Kind = Literal["multilabel", "multiclass", "ordinal", "segmentation"]
Preset = Literal["smoke", "small", "paper"]
Normalisation = Literal["neutral", "imagenet", "chestx-ray", "none"]
Loss = Literal["bce", "focal", "ce", "cumulative", "dice", "bce-dice"]
Metric = Literal[
    "auroc_mean", "auprc_mean", "auroc_within_mean", "dice", "iou", "accuracy", "balanced_accuracy", "kappa_quadratic"
]  # fmt: skip

RANKED: tuple[Metric, ...] = ("auroc_mean", "auprc_mean", "auroc_within_mean")
DECIDED: tuple[Metric, ...] = ("accuracy", "balanced_accuracy", "kappa_quadratic")
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "multilabel": RANKED,
    "multiclass": RANKED + DECIDED,
    "ordinal": RANKED + DECIDED,
    "segmentation": ("dice", "iou"),
}
LOSSES: dict[Kind, tuple[Loss, ...]] = {  # the first is what a task has that says nothing
    "multilabel": ("bce", "focal"),
    "multiclass": ("ce", "focal"),
    "ordinal": ("cumulative",),
    "segmentation": ("bce-dice", "dice", "bce"),
}


class Augmentation(Strict):
    """Training views, drawn for each sample and epoch; validation and test never see one. The mask moves with its image.

    crop_scale: share of the area that is kept. crop_ratio: width over height of the crop, relative to the image's own.
    resized_crop_p: share of the views that are cropped at all; the others show the whole image.
    flip: mirrored left and right with probability 1/2.
    rotate: degrees to either side at most, uniform; what comes in at the corners is black and, in a mask, background.
    brightness, contrast: half width of the factor's range around 1.
    gamma: half width of the range of log2 of the exponent. Where brightness or contrast is given too, a view gets the one or the other.
    light_p: share of the views whose brightness, contrast or gamma is changed at all.
    distort_p: share of the views that are bent, by an elastic, a grid or an optical distortion, each as likely.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    resized_crop_p: Share = 1.0
    flip: bool = True
    rotate: float = Field(0.0, ge=0, le=180)
    brightness: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)
    gamma: float = Field(0.0, ge=0, le=3)
    light_p: Share = 1.0
    distort_p: Share = 0.0

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "Augmentation":
        for key, (low, high), top in (("crop_scale", self.crop_scale, 1), ("crop_ratio", self.crop_ratio, 10)):
            if not 0 < low <= high <= top:
                raise ValueError(f"{key} must be 0 < low <= high <= {top}, got {low:g}, {high:g}")
        return self


class Plateau(Strict):
    """The rate times `factor` after more than `patience` epochs without a better loss (by 0.01 %); training ends under `stop_below`."""

    patience: int = Field(5, ge=0)
    factor: float = Field(0.5, gt=0, lt=1)
    stop_below: float = Field(1e-6, ge=0)


class Training(Strict):
    """How weights are trained. The rate rises over `warmup` epochs, then follows the schedule: half a cosine to 0 at the last epoch, steps
    down at plateaus, or none.

    select: what chooses the best epoch, which is kept: the task's metric, or the loss, both of validation.
    patience: epochs without a better one before training stops.
    """

    epochs: int = Field(gt=0)
    batch: int = Field(gt=1)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)  # of sgd
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    plateau: Plateau = Plateau()
    warmup: float = Field(1.0, ge=0)
    patience: int = Field(10, gt=0)
    select: Literal["metric", "loss"] = "metric"


class Recipe(Training):
    """Training of an encoder with its head, on augmented views."""

    views: Augmentation = Augmentation()


class LinearRecipe(Training):
    """Training of a linear head on cached features: an epoch costs milliseconds, so it takes many."""

    epochs: int = Field(100, gt=0)
    batch: int = Field(64, gt=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    patience: int = Field(20, gt=0)


class Aggregate(Strict):
    """Predictions of slices made into predictions of studies, at evaluation: those of one value of `by` (`patient`, or a column of the
    card's metadata) by their mean, their maximum, or noisy-or, 1 - product of (1 - p)."""

    by: str
    how: Literal["mean", "max", "noisy-or"]


class Facts(Strict):
    """What a task is, whatever the preset. `metric` is the one that validation selects on.

    labels: of the card, or made by its views; of kind `ordinal` they are the grades in order. evaluate: those of them that are measured,
        where it is not all. uncertain: what labels that are -1 count as in training, where it is not the card's own policy; validation and
        test leave them out.
    mask_class: the class of the card's masks to outline; null for all of them as one.
    loss: by default the first that LOSSES names for the kind. class_weights: `balanced` gives a class the weight N / (K n_k), a label of
        several the positive weight negatives / positives, both counted on the training images of the cell.
    decoder: of a segmentation. aggregate: null measures images.
    evaluation: what validation and test see: `whole` the image resized to the resolution; `center-crop` the image resized to 256/224 of it
        and the centre kept; `ten-crop` that for validation, and for test the mean of the probabilities over centre, corners and mirror
        images.
    normalise: mean and standard deviation by which pixels become input, for every source alike: see encoders.build.NORMALISATIONS; null for
        each source's own, which its weights were trained with (random ones: neutral).
    pad: images are made square with that colour before they are resized; null squeezes them.
    volume: the encoder is given slices as a third axis, B windows slices H W, where the card has slabs; otherwise they are channels.
    """

    schema_: Literal[3] = Field(alias="schema")
    task: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    dataset: str
    kind: Kind
    labels: list[str] = Field(default=[], validate_default=True)
    evaluate: list[str] = Field(default=[])
    uncertain: Uncertain | None = None
    mask_class: str | None = None
    metric: Metric
    loss: Loss
    class_weights: Literal["none", "balanced"] = "none"
    decoder: Literal["unet", "unetplusplus", "upernet"] = "unet"
    aggregate: Aggregate | None = None
    evaluation: Literal["whole", "center-crop", "ten-crop"] = "whole"
    pad: Literal["black", "white"] | None = None
    volume: bool = False
    normalise: Normalisation | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_loss(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("loss") is not None:
            return data
        # Any where the kind is wrong, which is told itself: no loss would be missing then.
        fitting = [losses[0] for kind, losses in LOSSES.items() if kind == data.get("kind")]
        return {**data, "loss": fitting[0] if fitting else "bce"}

    # Checks of single fields, not of the whole, so that what they find is told together with keys that are missing elsewhere in the file.
    @field_validator("dataset")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if value.endswith((".yaml", ".yml")):
            name = f": {load_card(value).dataset}" if Path(value).is_file() else ""
            raise ValueError(f"'{value}' is a file, write the name that its card has{name}")
        return value

    @field_validator("labels", "evaluate", "mask_class", "metric", "loss", "class_weights", "decoder", "aggregate", "evaluation", "volume")
    @classmethod
    def _fits_the_kind(cls, value: Any, info: ValidationInfo) -> Any:
        wrong = _misfit(str(info.field_name), value, info.data) if "kind" in info.data else None
        if wrong:
            raise ValueError(wrong)
        return value

    @property
    def measured(self) -> list[str]:
        """The labels that are evaluated, in the order of `labels`."""
        return [label for label in self.labels if label in self.evaluate] if self.evaluate else self.labels


def _misfit(key: str, value: Any, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a fact beside those that stand before it, the kind among them."""
    kind: Kind = facts["kind"]
    segments, this = kind == "segmentation", f"{'an' if kind == 'ordinal' else 'a'} {kind} task"
    wrong = None
    if key == "labels":
        if segments:
            wrong = f"{this} has none, its target is the mask" if value else None
        elif not value:
            wrong = f"{this} needs them"
        elif kind != "multilabel" and len(value) < 2:
            wrong = f"{this} needs two at least"
        elif len(set(value)) != len(value):
            wrong = "a name stands twice"
    elif key == "evaluate":
        stray = [label for label in value if label not in facts.get("labels", value)]
        wrong = f"{', '.join(stray)} is not among labels" if stray else None
    elif key == "metric" and value not in METRICS[kind]:
        wrong = f"'{value}' does not measure {this}, {' or '.join(METRICS[kind])} does"
    elif key == "loss" and value not in LOSSES[kind]:
        wrong = f"'{value}' does not fit {this}, {' or '.join(LOSSES[kind])} does"
    elif key == "mask_class" and not segments and value is not None:
        wrong = f"{this} has no masks"
    elif key == "decoder" and not segments and value != "unet":
        wrong = f"{this} has none"
    elif key in ("class_weights", "aggregate", "evaluation", "volume") and segments and value != Facts.model_fields[key].default:
        wrong = f"not for {this}"
    return wrong


Side = Annotated[int, Field(ge=16, le=4096)]


class Variant(Strict):
    """A preset: resolution (side in pixels) and recipes, and those of the facts that it has otherwise."""

    resolution: Side
    recipe: Recipe
    linear: LinearRecipe = LinearRecipe()
    loss: Loss | None = None
    class_weights: Literal["none", "balanced"] | None = None
    decoder: Literal["unet", "unetplusplus", "upernet"] | None = None
    evaluation: Literal["whole", "center-crop", "ten-crop"] | None = None
    uncertain: Uncertain | None = None
    normalise: Normalisation | None = None


class TaskFile(Facts):
    """A YAML file of `finetune/tasks/`, or one of a user's own, who may leave presets out. source: of the recipe in preset `paper`."""

    source: str = ""
    presets: dict[Preset, Variant] = Field(min_length=1)


class Task(Facts):
    """A task in one of its presets, as a cell has it. `resolution` is the default side in pixels."""

    preset: Preset = "small"
    resolution: Side
    recipe: Recipe
    linear: LinearRecipe = LinearRecipe()


def load_task(name: str, overrides: Settings = ()) -> Task:
    """The task of that name, or of that YAML file, with `key=value` settings (or dotted keys and values) applied to what its preset gives.

    Args:
        name: `dxc14` (preset small), `dxc14/paper`, `mine.yaml`, `mine.yaml/smoke`.
    Raises:
        RequestError: unknown name or preset (with the nearest right one), unknown key, bad value.
    """
    stem, preset = with_preset(name)
    path = named("task", stem)
    tree = load_tree(path)
    presets = parse(tree, TaskFile, str(path)).presets
    if preset not in presets:
        raise unknown("preset", preset, presets, where=str(path))
    facts = {key: value for key, value in tree.items() if key in Facts.model_fields or key == "schema"}
    return parse(apply({**facts, "preset": preset, **tree["presets"][preset]}, overrides), Task, str(path))


def check_labels(task: Task, card: Card, where: str) -> None:
    """Raises RequestError: a label of the task that the card neither has nor makes by its views."""
    known = [*card.labels, *card.derived]
    for label in task.labels:
        if label not in known:
            close = nearest(label, known)
            hint = (f"did you mean '{close}'? " if close else "") + f"known: {', '.join(known) or 'none'}"
            raise RequestError(f"{card.dataset} has no label '{label}'", where=where, hint=hint)
