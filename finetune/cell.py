"""The two files around a cell: its configuration (what is asked) and its result (what came out). Both are strict and versioned."""

from typing import Any, Literal

from pydantic import Field

from base import storage
from base.config import Strict
from finetune.task import Task

# Raised by whoever changes a cell's numbers; it is part of every cell's key, and a golden test of one cell forces it.
CELL_VERSION = 6


class CellConfig(Strict):
    """One cell, resolved: nothing in it is looked up later but shards and weights, and those are named by their digests.

    Args:
        source: the source's name in the study; with source_kind `random` the weights are drawn from (source, seed).
        encoder_dir, encoder_sha256: the exported encoder and the hash of its tensors, with source_kind `weights`.
        strategy: `name` and the strategy's options.
        fraction: share of the training images, by whole patients.
        workers: processes that train the cell together, each on its part of every batch, with as many threads each; its numbers do not
            depend on it beyond rounding.
        dtype: `bf16` computes networks under autocast; weights, losses and logits are fp32 in any case.
        own_source: the source has seen this dataset's labels.
        exposed_to: corpora in the source's past that may hold test images of this dataset, or other images of their patients.
        shuffle_labels: the control: targets permuted over the training and over the validation images, or studies where the task measures
            these, and the correlation with the true labels that is left by chance removed; the test split stays as it is.
        role: a `trial` of a search never opens the test split. `similarity` trains nothing and compares the source with random weights on
            validation (finetune.similarity), which guides a search.
        keep: `encoder` leaves the trained encoder, exported, in `encoder/` of `out`. No part of the key: it changes no number.
        out: where the result goes, a path or URL.
    """

    schema_: Literal[2] = Field(2, alias="schema")
    key: str
    architecture: str
    source: str
    source_kind: Literal["random", "weights"]
    source_seed: int = 0
    encoder_dir: str | None = None
    encoder_sha256: str | None = None
    strategy: dict[str, Any]
    task: Task
    shards: str
    manifest_digest: str
    fraction: float = Field(1.0, gt=0, le=1)
    resolution: int = Field(ge=16)
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = Field(1, gt=0)
    workers: int = Field(1, gt=0)
    own_source: bool = False
    exposed_to: list[str] = Field(default=[])
    shuffle_labels: bool = False
    role: Literal["cell", "trial", "similarity"] = "cell"
    keep: Literal["nothing", "encoder"] = "nothing"
    out: str
    cache_dir: str | None = None


def kept_all(config: CellConfig) -> bool:
    """Whether a cell that finished kept what is asked of it, which may have come later."""
    return config.keep == "nothing" or storage.exists(storage.join(config.out, "encoder", "allograft.json"))


class MetricRow(Strict):
    """One number. `class` is a label, or empty for a mean; `value` is null where it is not defined; the rest as finetune.measure says."""

    split: Literal["val", "test"]
    class_: str = Field(alias="class")
    metric: str
    unit: Literal["fraction", "px", "mm"]
    value: float | None
    n: int


class Selection(Strict):
    """The epoch that was kept (from 1) of those that ran, and the value of what chose it: the task's metric on validation, or `loss`, where
    the recipe says so or the metric is not defined. Epoch 0 of 0: nothing was trained (kNN, similarity)."""

    metric: str
    value: float | None
    epoch: int
    epochs: int


class Result(Strict):
    """result.json, written last: a cell is done when it stands.

    preset: of the task. metric: what it selects on. probe: what the probe chose before the rest was trained, where the strategy has one.
    params, macs: of the whole network, for one image. seconds: wall time.
    """

    schema_: Literal[2] = Field(2, alias="schema")
    key: str
    architecture: str
    source: str
    source_seed: int
    strategy: str
    options: dict[str, Any]
    task: str
    preset: str = "small"
    dataset: str
    fraction: float
    resolution: int
    seed: int
    own_source: bool
    exposed_to: list[str] = Field(default=[])
    shuffle_labels: bool = False
    metric: str
    metrics: list[MetricRow]
    selection: Selection
    probe: Selection | None = None
    train_images: int
    params: int
    macs: int
    seconds: float
    encoder_sha256: str
    transplanted_sha256: str
    manifest_digest: str
    cell_version: int
    floors: dict[str, float] = Field(default={})
    revision: str
    host: str
    device: str
    dtype: str = "fp32"
    role: Literal["cell", "trial", "similarity"]
