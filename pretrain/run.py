"""One pretraining: a plain function of a configuration and a Context. Works in one process, under torchrun, or under Ray Train.

    result = run(config, LocalContext(dir=config.out))      # None when it was asked to stop; the same call goes on where it stopped

    <out>/config.yaml  metrics.jsonl  checkpoints/step-<n>/...  export/ (timm folder)  result.json (last)

A run with a result is not run again. A run with a committed checkpoint resumes from the newest one, bit for bit on a CPU at the same
number of workers. To continue from other weights is a new run: `start_from`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from base.config import Strict, digest
from engine.context import Context
from pretrain.health import Health
from pretrain.recipe import Recipe
from shards.order import ORDER_VERSION
from shards.views import VIEWS_VERSION

# Part of every key: raise the first number when a change alters what a run computes; views' pixels and samples' order have their own.
PRETRAIN_VERSION = f"5.{VIEWS_VERSION}.{ORDER_VERSION}"


# What a configuration holds beside what a run computes.
PLACES = {"key", "out", "cache_dir", "start_from", "start_from_name", "earlier", "workers"}


class DataRef(Strict):
    """A split of a packed dataset. Weights of 1 mean: every sample once an epoch; others are shares of the mixture.

    without: ids of samples that are left out, because they are test images of a task.
    """

    dataset: str
    shards: str
    split: str = "train"
    digest: str
    weight: float = Field(default=1.0, gt=0)
    without: list[int] = Field(default=[])


def without_name(without: Sequence[int]) -> str:
    """16 hex for the ids that are left out, as lineages name them; empty for none."""
    return digest(sorted(without))[:16] if without else ""


class PretrainConfig(Strict):
    """A pretraining run, resolved: nothing in it is looked up again but the shards and the weights it names."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    key: str
    recipe: Recipe
    architecture: str
    in_chans: int = Field(ge=1)
    data: list[DataRef] = Field(min_length=1)
    start_from: str | None = None  # folder of an exported encoder
    start_from_sha256: str | None = None
    start_from_name: str | None = None
    replay: float | None = Field(default=None, gt=0, lt=1)  # share of the samples that come from corpora of earlier runs; in the weights
    labels: list[str] | None = None  # of a labelled method: those of the corpora that it learns; all by default
    earlier: list[DataRef] = Field(default=[])  # labelled corpora of the runs before this one: what it may forget
    seed: int = 0
    out: str
    cache_dir: str | None = None
    threads: int = Field(default=0, ge=0)  # 0: as torch finds it
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _weights_are_named(self) -> "PretrainConfig":
        if (self.start_from is None) != (self.start_from_sha256 is None):
            raise ValueError("start_from and start_from_sha256 come together")
        return self


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys, dotted, in which two configurations as plain data differ: those that a run's key hangs on."""
    flat = [_flat({name: value for name, value in config.items() if name not in PLACES}) for config in (one, other)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    return [name for name in names if not name.endswith(".shards")]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = {name: held for key, item in items for name, held in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}
    return below or {prefix: value}


class Step(Strict):
    """One run of an encoder's lineage. `labelled`: the datasets whose labels it read. `sha256`: of the encoder it exported.

    key, seed and steps: of runs, not of published weights, which have file_sha256, the hash of the file that they came in.
    labels: those it was limited to; empty where it learned all of its datasets.
    replay: share of the samples that came from the corpora of earlier runs; then `shares` says what each dataset and split gave.
    """

    name: str
    key: str | None = None
    method: str
    datasets: list[str]
    labelled: list[str]
    labels: list[str] = Field(default=[])
    seed: int | None = None
    steps: int | None = None
    file_sha256: str | None = None
    replay: float | None = None
    shares: dict[str, float] = Field(default={})
    sha256: str | None = None


class SourceProbe(Strict):
    """What the encoder knew of an earlier corpus, by probes of its labels (pretrain.source_probes). None: too few labels are known."""

    dataset: str
    when: Literal["before", "after"]
    linear_auroc: float | None
    knn_auroc: float | None


class Result(Strict):
    """result.json of a run. `labelled`: datasets whose labels any step of the lineage has read. `images` counts repeats."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    key: str
    method: str
    architecture: str
    encoder_sha256: str
    start_from: str | None
    start_from_sha256: str | None
    seed: int
    lineage: list[Step]
    labelled: list[str]
    steps: int
    epochs: float
    images: int
    image_size: int
    img_per_s: float
    seconds: float
    health: Health
    why: str
    source_probes: list[SourceProbe] = Field(default=[])
    stragglers: list[str] = Field(default=[])  # ranks that made the others wait, with their hosts
    restarts: int
    workers: int
    device: str
    revision: str


def run(config: PretrainConfig, ctx: Context) -> dict[str, Any] | None:
    """Train, export, and write the result. Every rank calls it.

    Returns:
        The content of result.json on every rank, or None after `ctx.should_stop()` (a checkpoint was written).

    Raises:
        RequestError: shards that are not those of the configuration, a batch that does not divide, an unknown method or option.
        WorkError: the loss is not finite, the storage fails.
    """
    from pretrain.loop import Run

    return Run(config, ctx).finish()
