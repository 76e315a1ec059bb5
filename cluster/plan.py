"""A study made into work: pretraining configurations and cells with their keys. Pure functions; nothing is started here.

A key needs what lies before it (manifest digests, the encoder's hash), so the plan is made stage by stage as those appear.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from analysis.exposure import Seen, exposed_to
from base.config import digest
from base.errors import RequestError, unknown
from base.storage import join
from cluster.claims import Asked
from cluster.study import PretrainEntry, Study
from finetune.cell import CELL_VERSION, CellConfig
from finetune.task import Task, check_labels, load_task
from pretrain.recipe import load_recipe
from pretrain.run import PRETRAIN_VERSION, DataRef, PretrainConfig, without_name
from shards.card import Card
from shards.manifest import Manifest
from shards.views import VIEWS_VERSION

KEY_DIGITS = 16
# Of a label with one value: how the split's images are called, and what follows.
ONE_CLASS = {
    "train": ("training", "a cell can only learn to say so"),
    "val": ("validation", "by that nothing is chosen"),
    "test": ("test", "of that there is no AUROC"),
}


@dataclass(frozen=True)
class Packed:
    """A packed dataset: where its shards are, its manifest, and by split the ids that pretraining leaves out."""

    url: str
    manifest: Manifest
    without: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of its manifest, which every cell's key holds."""
        return self.manifest.digest


@dataclass(frozen=True)
class Weights:
    """A source resolved to a folder with an exported encoder."""

    url: str
    sha256: str
    architecture: str
    seed: int = 0
    labelled: tuple[str, ...] = ()
    data: tuple[dict[str, Any], ...] = ()  # what they have seen, as in allograft.json
    cut: str | None = None  # where the encoder is truncated itself

    @property
    def stand(self) -> bool:
        """False for those that a pretraining has yet to make, or a download to bring: then architecture may be empty, too."""
        return bool(self.sha256)


def pretrain_config(study: Study, entry: PretrainEntry, seed: int, corpora: Mapping[str, Packed], start: Weights | None) -> PretrainConfig:
    """The configuration of one pretraining run. `start` is where it starts from, None for random weights."""
    recipe = load_recipe(entry.recipe, entry.settings)
    architecture = entry.architecture or (start.architecture if start else None)
    if architecture is None:
        raise RequestError("no architecture", where=f"pretrain.{entry.name}")
    data = pretrain_data(study, entry, corpora)
    in_chans = corpora[data[0].dataset].manifest.card.channels
    labels = pretrain_labels(entry, recipe.method, [corpora[ref.dataset].manifest.card for ref in data], f"pretrain.{entry.name}.labels")
    labelled = {name: (name, split) for name, split in study.earlier(entry) if _can_be_probed(corpora[name], in_chans)}
    config = PretrainConfig(
        name=entry.name,
        key="",
        recipe=recipe,
        architecture=architecture,
        in_chans=in_chans,
        data=data,
        start_from=start.url if start else None,
        start_from_sha256=start.sha256 if start else None,
        start_from_name=entry.start_from if start else None,
        replay=entry.replay,
        labels=labels,
        earlier=_refs(corpora, labelled.values(), None),
        seed=seed,
        out="",
        threads=study.resources.threads,
        workers=study.resources.loader_workers,
    )
    key = pretrain_key(config)
    return config.model_copy(update={"key": key, "out": join(study.out, "pretrain", f"{entry.name}-{key}")})


def pretrain_key(config: PretrainConfig) -> str:
    """Of what the run computes, by this version of pretraining."""
    identity = {
        "name": config.name,
        "recipe": config.recipe.model_dump(mode="json", by_alias=True),
        "architecture": config.architecture,
        # What is left out, and labels, are named only where something is, so that other runs keep their keys.
        "data": [ref.model_dump(exclude={"shards"} if ref.without else {"shards", "without"}) for ref in config.data],
        "start_from_sha256": config.start_from_sha256,
        "seed": config.seed,
        "threads": config.threads,
        "version": PRETRAIN_VERSION,
    } | ({"labels": config.labels} if config.labels else {})
    return digest(identity)[:KEY_DIGITS]


def pretrain_data(study: Study, entry: PretrainEntry, corpora: Mapping[str, Packed]) -> list[DataRef]:
    """What a run reads: its own data, then what it replays of the runs before it."""
    own = _refs(corpora, entry.data.items(), None if entry.replay is None else 1 - entry.replay)
    return own + _refs(corpora, study.replayed(entry), entry.replay)


def pretrain_labels(entry: PretrainEntry, method: str, cards: Sequence[Card], where: str) -> list[str] | None:
    """The labels that a run is limited to, in the order of the cards; None where it is not.

    Raises:
        RequestError: labels or a view that no card has, or a method that reads none.
    """
    from pretrain import methods

    if entry.labels is None:
        return None
    if not methods.method_class(method).labelled:
        raise RequestError(f"{method} reads no labels", where=where, hint="leave labels out")
    wanted = entry.labels
    if isinstance(wanted, str):
        views = {name: view for card in cards for name, view in card.views.items() if isinstance(view, list)}
        if wanted not in views:
            raise unknown("view of labels", wanted, views, where)
        wanted = views[wanted]
    known = list(dict.fromkeys(label for card in cards for label in card.labels))
    for label in wanted:
        if label not in known:
            raise unknown("label", label, known, where)
    return [label for label in known if label in wanted]


def _refs(corpora: Mapping[str, Packed], splits: Iterable[tuple[str, str]], share: float | None) -> list[DataRef]:
    """Splits of datasets as a run reads them; where they have a share of its samples, each by its size."""
    found = [(corpora[name], name, split) for name, split in splits]
    sizes = [corpus.manifest.counts[split] - len(corpus.without.get(split, ())) for corpus, _, split in found]
    return [
        DataRef(
            dataset=name,
            shards=corpus.url,
            split=split,
            digest=corpus.digest,
            weight=1.0 if share is None else share * size / sum(sizes),
            without=list(corpus.without.get(split, ())),
        )
        for (corpus, name, split), size in zip(found, sizes, strict=True)
    ]


def _can_be_probed(corpus: Packed, in_chans: int) -> bool:
    return bool(corpus.manifest.card.labels) and corpus.manifest.card.channels == in_chans


def compared_corpora(study: Study, corpora: Mapping[str, Packed]) -> set[Seen]:
    """What the pretraining runs of this study read: held against every task's test images before they started."""
    read = {(name, split) for entry in study.pretrain for name, split in entry.data.items() if name in corpora}
    return {(name, split, corpora[name].digest, without_name(corpora[name].without.get(split, ()))) for name, split in read}


@dataclass(frozen=True)
class Setting:
    """What cells share that differ in their seed alone; searches choose for all of them at once. `strategy` is as the study has it.

    corpus: None while the dataset is not packed.
    """

    study: Study
    source: str
    architecture: str
    weights: Weights | None
    strategy: dict[str, Any]
    task: Task
    corpus: Packed | None
    fraction: float
    resolution: int
    shuffled: bool
    exposed: tuple[str, ...]

    @property
    def stands(self) -> bool:
        """Whether its cells can be computed: data and weights are there."""
        return self.corpus is not None and bool(self.architecture) and (self.weights is None or self.weights.stand)

    @property
    def packed(self) -> Packed:
        """The dataset, of a setting that stands."""
        assert self.corpus is not None
        return self.corpus

    @property
    def seeds(self) -> list[int]:
        """Of its cells."""
        assert self.study.cells is not None
        return self.study.cells.seeds

    def words(self) -> str:
        """As short as a line of the terminal needs it."""
        return f"{self.task.task} {self.source} {self.strategy['name']}" + (" shuffled labels" if self.shuffled else "")


def architectures(study: Study, weights: Mapping[str, Sequence[Weights]]) -> list[str]:
    """Of random weights: those that the study names, else those of its other sources; an empty one while these are not known.

    Raises:
        RequestError: there are none.
    """
    assert study.cells is not None
    found = study.cells.architectures or list(dict.fromkeys(one.architecture for group in weights.values() for one in group))
    if not found:
        raise RequestError("no architecture for random weights", where="cells.architectures", hint="cells.architectures=[resnet18]")
    return [name for name in found if name] or found


def settings(
    study: Study, corpora: Mapping[str, Packed], weights: Mapping[str, Sequence[Weights]], only: tuple[str, str] | None = None
) -> Iterator[Setting]:
    """Every setting of the matrix, in a fixed order.

    Args:
        corpora: by dataset; one that is left out is not packed yet.
        weights: by source name; a source with several pretraining seeds has several. `random` sources have none.
        only: of this task and this source, as the study spells them.

    Raises:
        RequestError: a strategy that cannot be had of a source's architecture, a side that it does not take, or a label that the packed
            images do not have.
    """
    from finetune import keep
    from finetune.search import asked
    from finetune.strategies import check

    matrix = study.cells
    if matrix is None:
        return
    compared, drawn, wanted = compared_corpora(study, corpora), architectures(study, weights), Asked(study)
    for task_name in matrix.tasks:
        if only and only[0] != task_name:
            continue
        task = load_task(task_name, matrix.task_settings.get(task_name, {}))
        corpus = corpora.get(task.dataset)
        if corpus:
            where = f"cells.tasks: {task_name}: labels"
            check_labels(task, corpus.manifest.card, where)
            if not only:  # else the study is under way, and what one task lacks is the failure of its cells
                _refuse_unknown(task, corpus, where)
        fractions, resolutions = matrix.of_task("fractions", task_name), matrix.of_task("resolutions", task_name)
        for source in matrix.sources:
            if only and only[1] != source.name:
                continue
            group: list[tuple[str, Weights | None]]
            if source.source == "random":
                group = [(architecture, None) for architecture in drawn]
            else:
                group = [(found.architecture, found) for found in weights[source.name]]
            shuffles = [False, True] if source.name in matrix.shuffled_labels else [False]
            axes = itertools.product(group, matrix.strategies, fractions, resolutions, shuffles)
            for architecture, strategy in itertools.product(filter(None, dict(group)), matrix.strategies):
                if wanted.strategy(task.task, architecture, strategy):
                    where = f"cells.strategies[{matrix.strategies.index(strategy)}]"
                    check(asked(strategy)[1], architecture, task, where)
                    if matrix.keep == "encoder":
                        keep.check_named(architecture, task, strategy, where)
            exposed = {
                id(found): tuple(exposed_to(found.data, task.dataset, corpus.digest, compared)) if found and corpus else ()
                for _, found in group
            }
            for (architecture, found), strategy, fraction, resolution, shuffled in axes:
                seen = exposed[id(found)]
                one = Setting(study, source.name, architecture, found, strategy, task, corpus, fraction, resolution, shuffled, seen)
                if wanted.setting(one):
                    _refuse_side(one)
                    yield one


def one_class(study: Study, dataset: str, corpus: Packed) -> Iterator[str]:
    """A line for each task of a packed dataset and split of which a label is the same in all images, as far as the manifest counts them."""
    matrix = study.cells
    tasks = [load_task(entry, matrix.task_settings.get(entry, {})) for entry in matrix.tasks] if matrix else []
    for task, (split, (name, effect)) in itertools.product((task for task in tasks if task.dataset == dataset), ONE_CLASS.items()):
        counted, images = corpus.manifest.positives.get(split, {}), corpus.manifest.counts.get(split, 0)
        labels = {label: counted[label] for label in task.labels if label in counted} if images else {}
        found = [(word, [label for label, n in labels.items() if n == all_of]) for word, all_of in (("no", 0), ("every", images))]
        if said := [f"{word} {name} image is labelled {', '.join(of)}" for word, of in found if of]:
            yield f"{task.task}: {'; '.join(said)}: {effect}"


def _refuse_unknown(task: Task, corpus: Packed, where: str) -> None:
    """Raises RequestError: a label that is known for none of the packed images to train on."""
    card, positives = corpus.manifest.card, corpus.manifest.positives.get("train", {})
    for label in task.labels:
        # Where the manifest counts a positive the label is known; only else is it looked for in the images' own records.
        if not any(positives.get(of) for of in card.derived.get(label, [label])) and not _is_known(task, corpus, label):
            raise RequestError(f"'{label}' is known for none of the training images of {task.dataset}", where=where, hint="leave it out")


def _is_known(task: Task, corpus: Packed, label: str) -> bool:
    from shards.corpus import Corpus
    from shards.labels import Targets

    resolve = Targets(corpus.manifest.card, [label], task.uncertain, training=True)
    images = Corpus(corpus.url, ("train",))
    samples = (images.read(i, image=False, seg=False) for i in range(len(images)))
    return any(resolve([sample.labels], [sample.key])[1].any() for sample in samples)


def _refuse_side(one: Setting) -> None:
    from encoders.build import PATCHES
    from encoders.cuts import family, smallest
    from finetune.catalogue import STRATEGIES

    if not one.architecture:  # of weights that were not fetched yet
        return
    least, patch = smallest(one.architecture), PATCHES.get(family(one.architecture), 1)
    where = f"cells of {one.task.task}, {one.strategy['name']}: resolution"
    # What is cut off may take less.
    if one.resolution < least and not STRATEGIES[one.strategy["name"]].ends and not (one.weights and one.weights.cut):
        what = f"{one.architecture} takes images of at least {least} px, not of {one.resolution}"
        raise RequestError(what, where=where)
    if one.resolution % patch and one.task.kind != "segmentation":  # whose images are padded
        what = f"{one.architecture} takes sides that are multiples of {patch} px, not {one.resolution}"
        raise RequestError(what, where=where, hint=f"take {max(1, one.resolution // patch) * patch} px")


def identity(setting: Setting, seed: int, strategy: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What the key of a cell is made of. The strategy with all of its options, so that another default is another cell."""
    from finetune.strategies import resolve

    found, options = setting.weights, resolve(strategy)[1].model_dump(mode="json")
    return {
        "cell": {
            "architecture": setting.architecture,
            "source": setting.source,
            "source_seed": found.seed if found else seed,
            "strategy": {"name": strategy["name"], **options},
            "task": task.task,
            "fraction": setting.fraction,
            "resolution": setting.resolution,
            "seed": seed,
            "shuffle_labels": setting.shuffled,
        },
        # Named only where they are asked for, so that other cells keep their keys.
        "task": task.model_dump(mode="json", by_alias=True, exclude={n for n in ("mask_class", "normalise") if getattr(task, n) is None}),
        "encoder_sha256": found.sha256 if found else None,
        "manifests": [setting.packed.digest],
        "dtype": setting.study.resources.cell_dtype,
        "threads": setting.study.resources.threads,
        "version": [CELL_VERSION, VIEWS_VERSION],
    }


def cell(
    setting: Setting,
    seed: int,
    strategy: dict[str, Any] | None = None,
    task: Task | None = None,
    role: Literal["cell", "trial", "similarity"] = "cell",
    searched: Mapping[str, Any] | None = None,
) -> CellConfig:
    """One cell of a setting.

    Args:
        strategy, task: with what a search chose or tries put in; the setting's own by default.
        searched: the strategy as it was asked for, where a search chose for it. Part of the key, so that such a cell is not taken for one
            that was asked for by the cut itself.
    """
    strategy, task = strategy or setting.strategy, task or setting.task
    made = (
        identity(setting, seed, strategy, task) | ({"role": role} if role != "cell" else {}) | ({"searched": searched} if searched else {})
    )
    key, found = digest(made)[:KEY_DIGITS], setting.weights
    return CellConfig(
        key=key,
        architecture=setting.architecture,
        source=setting.source,
        source_kind="weights" if found else "random",
        source_seed=found.seed if found else seed,
        encoder_dir=found.url if found else None,
        encoder_sha256=found.sha256 if found else None,
        strategy=strategy,
        task=task,
        shards=setting.packed.url,
        manifest_digest=setting.packed.digest,
        fraction=setting.fraction,
        resolution=setting.resolution,
        seed=seed,
        shuffle_labels=setting.shuffled,
        dtype=setting.study.resources.cell_dtype,
        keep=setting.study.cells.keep if setting.study.cells and role == "cell" else "nothing",
        threads=setting.study.resources.threads,
        own_source=bool(found and task.dataset in found.labelled),
        exposed_to=list(setting.exposed),
        role=role,
        out=join(setting.study.out, "cells", key),
    )
