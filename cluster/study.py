"""A study: pretraining runs, the matrix of cells, the analyses, as one checked YAML file.

`cluster.load.load_study` reads one and looks up every name in it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from analysis.claims import Claim
from base.config import Strict, canonical_json
from base.errors import RequestError, at
from base.paths import with_preset
from finetune.search import Tune
from finetune.task import Metric, load_task
from shards.card import Card, load_card

Fraction = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=16, le=4096)]
Workers = Annotated[int, Field(ge=1)]
Analysis = Literal["similarity", "filters", "convergence", "efficiency", "transferability", "accuracy"]


class DataEntry(Strict):
    """Where a dataset is: raw files to be packed (`phantom:N[@SEED]` for generated ones), or shards that stand already."""

    raw: str | None = None
    shards: str | None = None
    split_files: str | None = Field(None, description="lists of your own that replace the card's split: see allograft pack --split-files")
    card: str | None = Field(None, description="the file of a card of your own; filled in where the entry's key is that file")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.raw is None) == (self.shards is None):
            raise ValueError("give exactly one of raw and shards")
        if self.split_files is not None and self.raw is None:
            raise ValueError("split_files go with raw: shards are split already")
        return self


def _by_name(data: dict[str, DataEntry]) -> dict[str, DataEntry]:
    """Every dataset by its card's name, as pretrainings, tasks, shards and results have it; a key that is a file stays as `card`."""
    found: dict[str, DataEntry] = {}
    for key, entry in data.items():
        file = key if key.endswith((".yaml", ".yml")) else None
        if file and entry.card:
            raise ValueError(f"{key}: the key names the card already, leave card: {entry.card} out")
        with at(f"data.{key}"):
            name = load_card(file).dataset if file else key
        if name in found:
            raise ValueError(f"two entries are the dataset '{name}': {found[name].card or name} and {key}")
        found[name] = entry.model_copy(update={"card": file}) if file else entry
    return found


Data = Annotated[dict[str, DataEntry], Field(min_length=1), AfterValidator(_by_name)]


class PretrainEntry(Strict):
    """One pretraining run for each seed; its name is a source for later entries and for cells."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    recipe: str
    data: dict[str, Literal["train", "val", "test"]]
    architecture: str | None = Field(None, description="a timm name; taken from start_from when left out")
    start_from: str = "random"
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    replay: float | None = Field(None, gt=0, lt=1, description="share of the samples that come from the data of the runs before it")
    labels: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="of a supervised run: the labels that it learns, or a view of the dataset's card that names them; default: all"
    )
    settings: dict[str, Any] = Field({}, description="keys of the recipe that this run sets otherwise")


@contextmanager
def as_in_study(entry: PretrainEntry) -> Iterator[None]:
    """Requests refused inside hint at keys of the recipe, `options.queue=64`; outside, as the study sets them."""
    from pretrain.recipe import Recipe

    try:
        yield
    except RequestError as error:
        keys = rf"(?<![\w.])(?=(?:{'|'.join(Recipe.model_fields)})(?:\.\w+)*=)"
        hint = error.hint and re.sub(keys, f"pretrain.{entry.name}.settings.", error.hint)
        raise RequestError(error.what, where=error.where, hint=hint) from error


class SourceEntry(Strict):
    """A source under a name of one's own: `{name: random-b, source: random}` is the A/A control."""

    name: str
    source: str


class Cells(Strict):
    """The matrix. Fractions and resolutions are lists, or lists by task."""

    sources: list[SourceEntry] = Field(min_length=1)
    strategies: list[dict[str, Any]] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    architectures: list[str] = Field([], description="for sources without one of their own; default: those of the pretraining runs")
    fractions: list[Fraction] | dict[str, list[Fraction]] = Field([1.0])
    resolutions: list[Pixels] | dict[str, list[Pixels]] = Field({}, description="default: the task's own")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    task_settings: dict[str, dict[str, Any]] = Field({}, description="by task: keys of its file that this study sets otherwise")
    tune: Tune | None = Field(None, description="rates to choose from, by validation; without it the study is untuned: one rate for all")
    trial_seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="seeds of the trials of every search")
    keep: Literal["nothing", "encoder"] = Field(
        "nothing", description="encoder: leave every cell's trained encoder in its folder, exported"
    )
    shuffled_labels: list[str] = Field([], description="control: sources whose cells are repeated with permuted training labels")
    asked_by: Literal["matrix", "claims"] = Field("matrix", description="claims: only those cells of the matrix that a claim compares")

    @model_validator(mode="after")
    def _once(self) -> Self:
        values: dict[str, list[Any]] = {
            "seeds": self.seeds,
            "trial_seeds": self.trial_seeds,
            "sources": [source.name for source in self.sources],
        }
        values |= {"tasks": [with_preset(task)[0] for task in self.tasks]}  # one task in two presets would be one name for two things
        values |= {"strategies": [canonical_json(strategy) for strategy in self.strategies]}
        for axis in ("fractions", "resolutions"):
            held = getattr(self, axis)
            values |= {f"{axis}.{task}": items for task, items in held.items()} if isinstance(held, dict) else {axis: held}
        for name, items in values.items():
            twice = sorted({str(item) for item in items if list(items).count(item) > 1})
            if twice:
                raise ValueError(f"{name}: {', '.join(twice)} stands twice")
        return self

    @field_validator("sources", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        short = lambda text: text.partition(":")[2] if text.startswith("pretrain:") else text  # noqa: E731
        if not isinstance(value, list):
            return value
        return [{"name": short(item), "source": item} if isinstance(item, str) else item for item in value]

    @field_validator("strategies", mode="before")
    @classmethod
    def _optioned(cls, value: Any) -> Any:
        return [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    def of_task(self, axis: Literal["fractions", "resolutions"], task: str) -> list[Any]:
        """The values of an axis for a task."""
        values = getattr(self, axis)
        if isinstance(values, list):
            return list(values)
        return list(values.get(task, [1.0] if axis == "fractions" else [load_task(task, self.task_settings.get(task, {})).resolution]))


class Champion(Strict):
    """The rule by which one registered encoder gets the alias `champion`: best mean on validation."""

    task: str
    metric: Metric = "auroc_mean"


class Resources(Strict):
    """What a piece of work is given. Threads and dtype are part of a cell's key (they change its numbers), counts of workers are not."""

    pretrain_workers: Workers | Annotated[list[Workers], Field(min_length=2, max_length=2)] = Field(
        2, description="of each run: a number, or [fewest, most], between which a run follows the room that the cluster has"
    )
    gpus_per_pretrain_worker: float = Field(0, ge=0)
    cell_workers: int | None = Field(None, ge=1, description="default: as many as the cluster's processors or GPUs hold")
    cell_ranks: int = Field(1, ge=1, description="processes that train one cell together, on one node, each with `threads` and its GPU")
    gpus_per_cell: Annotated[float, Field(ge=0)] | Literal["measured"] = Field(
        0.0, description="share of a GPU of each process of a cell; measured: as many cells on a GPU as its memory holds"
    )
    loader_workers: int = Field(0, ge=0, description="processes that read and augment beside each pretraining worker; 0: it does so itself")
    threads: int = Field(1, ge=1, description="intra-operation threads of every worker")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="in which cells compute; auto: bf16 where they hold a GPU, else fp32; weights, losses and logits are fp32",
    )

    @property
    def cell_dtype(self) -> Literal["fp32", "bf16"]:
        """`dtype` as it stands in the keys of cells."""
        if self.dtype == "auto":
            return "bf16" if self.gpus_per_cell else "fp32"
        return self.dtype

    @property
    def pretrain_range(self) -> tuple[int, int]:
        """Fewest and most workers of a pretraining."""
        held = self.pretrain_workers
        return (held[0], held[1]) if isinstance(held, list) else (held, held)

    @model_validator(mode="after")
    def _fewest_first(self) -> Self:
        if self.pretrain_range[0] > self.pretrain_range[1]:
            raise ValueError(f"pretrain_workers: {self.pretrain_range[0]} is more than {self.pretrain_range[1]}")
        return self

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.cell_ranks > 1 and (self.gpus_per_cell == "measured" or 0 < self.gpus_per_cell < 1):
            raise ValueError(f"cell_ranks={self.cell_ranks} with gpus_per_cell={self.gpus_per_cell}: each process wants a GPU of its own")
        return self


class Study(Strict):
    """The file that `allograft run` takes."""

    schema_: Literal[1] = Field(1, alias="schema")
    study: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    out: str
    tracking: str = Field("sqlite", pattern=r"^(sqlite|https?://.+)$", description="sqlite, or the address of an MLflow server")
    data: Data
    pretrain: list[PretrainEntry] = Field([])
    cells: Cells | None = None
    champion: Champion | None = None
    claims: list[Claim] = Field([], description="the family of comparisons, fixed before the run; as names: those of studies/claims")
    analyses: list[Analysis] = Field([], description="what is computed of the trained encoders after the cells, for the report")
    leakage: Literal["stop", "exclude"] = Field(
        "stop", description="pretraining images that match test images: stop, or train without them"
    )
    exposed: Literal["apart", "ranked"] = Field("apart", description="cells whose source has seen test images: left out of ranks, or not")
    resources: Resources = Resources()
    presets: dict[str, dict[str, Any]] = Field({}, description="named sets of settings; `preset=NAME` applies one")
    preset: str | None = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        listed: dict[str, list[str]] = {"claims": [claim.name for claim in self.claims], "analyses": [*self.analyses]}
        for key, names in listed.items():
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{key}: {', '.join(twice)} stands twice")
        if self.cells and self.cells.asked_by == "claims" and not self.claims:
            raise ValueError("cells.asked_by: claims, and there are none")
        return self

    def card(self, dataset: str) -> Card:
        """The card of a dataset.

        Raises:
            RequestError: there is none, it is wrong, or it names another dataset.
        """
        file = self.data[dataset].card or dataset
        found = load_card(file)
        if found.dataset != dataset:
            raise RequestError(f"this card names the dataset '{found.dataset}', not '{dataset}'", where=file)
        return found

    def before(self, entry: PretrainEntry) -> list[PretrainEntry]:
        """The runs of this study that lead to this one, oldest first."""
        name = entry.start_from.removeprefix("pretrain:") if entry.start_from.startswith("pretrain:") else None
        found = [run for run in self.pretrain if run.name == name]
        return [*self.before(found[0]), found[0]] if found else []

    def first(self, entry: PretrainEntry) -> PretrainEntry:
        """The run that its chain begins with."""
        return [*self.before(entry), entry][0]

    def earlier(self, entry: PretrainEntry) -> list[tuple[str, str]]:
        """The datasets and splits that those runs read, each once."""
        return list(dict.fromkeys(item for run in self.before(entry) for item in run.data.items()))

    def replayed(self, entry: PretrainEntry) -> list[tuple[str, str]]:
        """Those of them that this run replays: its own data are there already."""
        return [item for item in self.earlier(entry) if item not in entry.data.items()] if entry.replay else []

    def architecture_of(self, entry: PretrainEntry) -> str | None:
        """The run's architecture or that of the runs before it; None where weights from outside say it."""
        return next((run.architecture for run in (entry, *reversed(self.before(entry))) if run.architecture), None)
