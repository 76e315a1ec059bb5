"""Reading a study: its settings and preset applied, its paths made absolute, every name in it looked up before anything starts.

study = load_study("studies/demo.yaml", ["cells.seeds=[0]"])
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.claims import load_claim, settings_of
from base.config import apply, assign, load_tree, parse
from base.errors import RequestError, at, unknown
from base.paths import absolute, is_url, named, names, with_preset
from cluster.study import Cells, PretrainEntry, Study, as_in_study
from finetune.task import METRICS, Task, check_labels, load_task

if TYPE_CHECKING:
    from shards.card import Card


KINDS = {"pretrain", "timm", "zoo", "models", "run"}  # of sources that are not a path or URL
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")  # files that are taken for a source; which is a folder


def load_study(path: str, settings: Sequence[str] = (), *, job: bool = False) -> Study:
    """The study file with its settings applied, paths absolute against the caller's directory, every name in it checked.

    Args:
        path: see `study_file`.
        settings: `key=value` words.
        job: as if inside a Ray job, where relative paths are refused.

    Raises:
        RequestError: naming file and key, with the nearest right name.
    """
    path = study_file(path)
    tree = load_tree(path, settings)
    if tree.get("preset"):
        presets = tree.get("presets") or {}
        if tree["preset"] not in presets:
            raise unknown("preset", str(tree["preset"]), presets, where=f"{path}: preset")
        for key, value in presets[tree["preset"]].items():
            assign(tree, key, value)
        apply(tree, settings)  # what the user typed wins over the preset
    tree["claims"] = _claims(tree.get("claims"), path)
    with at(path):
        study = resolve_paths(parse(tree, Study, path), Path.cwd(), job=job)
    study = resolve_tasks(study, path)
    check_names(study, path)
    return study


def study_file(name: str) -> str:
    """The file that a word of the command line means: a path, the name of one in studies/, or of one here without its .yaml.

    Raises:
        RequestError: a folder, a file of another kind, or no such name.
    """
    if name.endswith((".yaml", ".yml")):
        return name
    if name in names("study"):
        return str(named("study", name))
    if os.path.isfile(f"{name}.yaml"):
        return f"{name}.yaml"
    if os.path.isdir(name):
        held = sorted(file for file in os.listdir(name) if file.endswith((".yaml", ".yml")))
        hint = f"in it: {', '.join(held)}" if held else "allograft init NAME writes one"
        raise RequestError("this is a folder, and a study is a YAML file", where=name, hint=hint)
    if os.path.exists(name):
        raise RequestError("this is no study: its name would end in .yaml", where=name)
    if "/" in name:
        raise RequestError("no such file", where=f"{name}.yaml")
    raise unknown("study", name, names("study"))


def _claims(entries: Any, where: str) -> Any:
    """Names of ready claims put out in full, so that OUT/study.yaml holds what each of them said."""
    if not isinstance(entries, list):
        return entries or []
    found = []
    for i, entry in enumerate(entries):
        with at(f"{where}: claims[{i}]"):
            found.append(load_claim(entry).model_dump(mode="json", by_alias=True) if isinstance(entry, str) else entry)
    return found


def resolve_paths(study: Study, base: Path, *, job: bool = False) -> Study:
    """Relative `out`, `raw`, `shards` and sources made absolute; inside a Ray job, whose directory is thrown away, they are refused."""
    inside_job = job or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ

    def resolve(value: str, key: str) -> str:
        if value.startswith("phantom:"):
            return value
        if inside_job and not is_url(value) and not os.path.isabs(value):
            raise RequestError(
                f"'{value}' is relative, and a Ray job's directory is thrown away", where=key, hint="give a URL or an absolute path"
            )
        return absolute(value, base)

    def source(value: str, key: str) -> str:
        return resolve(value, key) if _is_path(value) else value

    data = {
        name: entry.model_copy(
            update={
                "raw": resolve(entry.raw, f"data.{name}.raw") if entry.raw else None,
                "split_files": resolve(entry.split_files, f"data.{name}.split_files") if entry.split_files else None,
                "shards": resolve(entry.shards, f"data.{name}.shards") if entry.shards else None,
            }
        )
        for name, entry in study.data.items()
    }
    pretrain = [
        entry.model_copy(update={"start_from": source(entry.start_from, f"pretrain[{i}].start_from")})
        for i, entry in enumerate(study.pretrain)
    ]
    cells = study.cells
    if cells is not None:
        named_sources = [
            entry.model_copy(update={"source": source(entry.source, f"cells.sources[{i}]")}) for i, entry in enumerate(cells.sources)
        ]
        cells = cells.model_copy(update={"sources": named_sources})
    out = resolve(study.out, "out")
    if is_url(out) and study.tracking == "sqlite":
        raise RequestError("results go to a URL, so tracking must be a server", where="tracking", hint="tracking=http://HOST:5000")
    return study.model_copy(update={"out": out, "data": data, "pretrain": pretrain, "cells": cells})


def resolve_tasks(study: Study, where: str) -> Study:
    """Every spelling of a task made one: its entry of `cells.tasks` as key of what is given by task, its own name, which results have, in
    `champion.task` and the `where.task` of claims.

    A task is named by its own name or by its file, either with or without the preset that `cells.tasks` has it in.

    Raises:
        RequestError: naming file and key: no such task in the study, or one name for two.
    """
    cells = study.cells
    if cells is None:
        return study
    plain: dict[str, Task] = {}
    for i, entry in enumerate(cells.tasks):
        with at(f"{where}: cells.tasks[{i}]"):
            plain[entry] = load_task(entry)
            if other := next((one for one in plain if one != entry and plain[one].task == plain[entry].task), None):
                raise RequestError(f"two tasks are named '{plain[entry].task}': {other} and {entry}", hint="give one another task: NAME")
    spelled = {word: entry for entry, task in plain.items() for word in _spellings(entry, task)}

    def entry_of(word: str, key: str) -> str:
        if word not in spelled:
            held = ", ".join(entry if entry == task.task else f"{task.task} ({entry})" for entry, task in plain.items())
            raise RequestError(f"unknown task '{word}'", where=f"{where}: {key}", hint=f"cells.tasks has {held}")
        return spelled[word]

    by_task: dict[str, dict[str, Any]] = {}
    for axis in ("fractions", "resolutions", "task_settings"):
        values = getattr(cells, axis)
        if isinstance(values, dict):
            words: dict[str, str] = {}
            for word in values:
                entry = entry_of(word, f"cells.{axis}")
                if entry in words:
                    raise RequestError(f"{words[entry]} and {word} are one task", where=f"{where}: cells.{axis}")
                words[entry] = word
            by_task[axis] = {entry: values[word] for entry, word in words.items()}
    cells = cells.model_copy(update=by_task)
    tasks = _tasks(cells, where)
    champion = study.champion
    if champion is not None:
        champion = champion.model_copy(update={"task": tasks[entry_of(champion.task, "champion.task")].task})
    claims = []
    for claim in study.claims:
        if claim.where.task is not None:
            name = tasks[entry_of(claim.where.task, f"claims.{claim.name}.where.task")].task
            claim = claim.model_copy(update={"where": claim.where.model_copy(update={"task": name})})
        claims.append(claim)
    return study.model_copy(update={"cells": cells, "champion": champion, "claims": claims})


def _spellings(entry: str, task: Task) -> set[str]:
    return {word for name in (with_preset(entry)[0], task.task) for word in (name, f"{name}/{task.preset}")}


def _tasks(cells: Cells, where: str) -> dict[str, Task]:
    """The tasks of the matrix by their entries in `cells.tasks`, as its `task_settings` make them."""
    tasks: dict[str, Task] = {}
    for i, entry in enumerate(cells.tasks):
        with at(f"{where}: cells.tasks[{i}]"):
            tasks[entry] = load_task(entry)
        if own := cells.task_settings.get(entry):
            try:
                tasks[entry] = load_task(entry, own)
            except RequestError as error:  # names the task's file, in which nothing is wrong
                raise RequestError(error.what, where=f"{where}: cells.task_settings.{entry}", hint=error.hint) from error
    return tasks


def check_claims(study: Study, where: str) -> None:
    """Every claim is about cells of the matrix: both of its sides, in one setting at least.

    Raises:
        RequestError: naming the claim.
    """
    from cluster.claims import axes_of_matrix

    if not study.claims:
        return
    if study.cells is None:
        raise RequestError("claims are about cells, and there are none", where=f"{where}: claims")
    seen = [(None, axes) for axes, _ in axes_of_matrix(study)]
    for claim in study.claims:
        if not settings_of(claim, seen):
            sides = f"'{claim.comparison.a.words()}' and '{claim.comparison.b.words()}'"
            condition = f" where {claim.where.words()}" if claim.where.axes else ""
            raise RequestError(f"no setting of the matrix has both {sides}{condition}", where=f"{where}: claims.{claim.name}")


def check_names(study: Study, where: str) -> None:
    """Every card, recipe, task, strategy and source that the study, its tasks resolved, names must exist."""
    cards: dict[str, Card] = {}
    for name in study.data:
        with at(f"{where}: data.{name}"):
            cards[name] = study.card(name)
    earlier: dict[str, PretrainEntry] = {}
    for i, entry in enumerate(study.pretrain):
        with at(f"{where}: pretrain[{i}]"), as_in_study(entry):
            _check_run(study, entry, earlier, cards, f"{where}: pretrain[{i}]")
        earlier[entry.name] = entry
    if study.cells is None:
        return
    tasks = _tasks(study.cells, where)
    _check_sources(study, study.cells, earlier, where)
    _check_tasks(study, study.cells, tasks, cards, where)
    tested = {task.dataset for task in tasks.values()}
    for i, entry in enumerate(study.pretrain):
        for dataset, split in entry.data.items():
            if split == "test" and dataset in tested:
                key, hint = f"{where}: pretrain[{i}].data.{dataset}", f"pretrain.{i}.data.{dataset}=train"
                raise RequestError("pretraining on the test images of a task of this study", where=key, hint=hint)
    check_claims(study, where)
    if study.champion:
        kind = next(task.kind for task in tasks.values() if task.task == study.champion.task)
        if study.champion.metric not in METRICS[kind]:
            raise RequestError(f"'{study.champion.metric}' does not measure {study.champion.task}", where=f"{where}: champion.metric")


def _check_run(study: Study, entry: PretrainEntry, earlier: Mapping[str, PretrainEntry], cards: Mapping[str, "Card"], key: str) -> None:
    """A pretraining, with the runs that stand before it in the file."""
    from cluster.plan import pretrain_labels
    from encoders.cuts import family
    from engine.step import rank_batch
    from pretrain import methods
    from pretrain.economy import affordable
    from pretrain.recipe import load_recipe

    if entry.name in earlier:
        raise RequestError(f"two pretraining runs are named '{entry.name}'", where=key)
    with at(f"{key}.recipe"):
        named("recipe", entry.recipe)
    with at(f"{key}.architecture"):
        if entry.architecture:
            family(entry.architecture)
    _check_source(entry.start_from, earlier, f"{key}.start_from")  # before anything follows the chain, which might be a circle
    recipe = load_recipe(entry.recipe, entry.settings)
    # What needs no images is found before any are packed; how many there are, and their labels, is not known yet.
    labelled = methods.method_class(recipe.method).labelled
    facts = None if labelled else methods.Facts(entry.seeds[0], sys.maxsize, recipe.global_batch, tuple(recipe.views.sizes))
    methods.check(recipe.method, recipe.options, views=recipe.views, architecture=study.architecture_of(entry), facts=facts)
    for count in study.resources.pretrain_range:
        rank_batch(recipe.global_batch, count, recipe.accumulate)
    for dataset in entry.data:
        if own := next((name for name, held in study.data.items() if held.card == dataset), None):
            raise RequestError(f"'{dataset}' is a file", where=f"{key}.data", hint=f"write the name that its card has: {own}")
        if dataset not in study.data:
            raise unknown("dataset", dataset, study.data, where=f"{key}.data")
    if len(set(entry.seeds)) < len(entry.seeds):
        raise RequestError("a seed stands twice", where=f"{key}.seeds")
    _one_kind([*entry.data], cards, f"{key}.data", "one run for each")
    read = [cards[dataset] for dataset in [*entry.data, *(dataset for dataset, _ in study.replayed(entry))]]
    if not any(card.labels_found for card in read):
        pretrain_labels(entry, recipe.method, read, f"{key}.labels")
        if methods.method_class(recipe.method).labelled and not any(card.labels for card in read):
            raise RequestError(f"{recipe.method} needs labels, and the datasets' cards name none", where=f"{key}.data")
    start = study.architecture_of(before[-1]) if (before := study.before(entry)) else None
    if entry.architecture and start and entry.architecture != start:
        raise RequestError(
            f"weights of {start} do not fit {entry.architecture}", where=f"{key}.architecture", hint=f"architecture: {start}"
        )
    if entry.architecture is None and entry.start_from == "random":
        raise RequestError("a run that starts from random weights needs an architecture", where=key, hint="architecture: resnet18")
    if known := study.architecture_of(entry):
        affordable(recipe, known)
    if entry.replay is not None:
        _check_replay(study, entry, cards, f"{key}.replay")


def _check_sources(study: Study, cells: Cells, earlier: Mapping[str, PretrainEntry], where: str) -> None:
    """Sources and architectures of the matrix, and what names them."""
    from encoders.cuts import family

    for i, source in enumerate(cells.sources):
        _check_source(source.source, earlier, f"{where}: cells.sources[{i}]")
    for i, architecture in enumerate(cells.architectures):
        with at(f"{where}: cells.architectures[{i}]"):
            family(architecture)
    outside = any(not source.source.startswith("pretrain:") and source.source != "random" for source in cells.sources)
    if not cells.architectures and not study.pretrain and not outside:
        raise RequestError("random weights of which architecture?", where=f"{where}: cells.architectures", hint="architecture=resnet18")
    sources = [source.name for source in cells.sources]
    for name in cells.shuffled_labels:
        if name not in sources:
            raise unknown("source", name, sources, where=f"{where}: cells.shuffled_labels")


def _check_tasks(study: Study, cells: Cells, tasks: Mapping[str, Task], cards: Mapping[str, "Card"], where: str) -> None:
    """Strategies and tasks of the matrix, with each other and with cards and architectures."""
    from cluster.claims import Asked
    from finetune import keep
    from finetune.search import asked
    from finetune.strategies import check, resolve

    for i, strategy in enumerate(cells.strategies):
        resolve(asked(strategy, f"{where}: cells.strategies[{i}]")[1], f"{where}: cells.strategies[{i}]")
    wanted = Asked(study)
    for i, (name, task) in enumerate(tasks.items()):
        if task.dataset not in study.data:
            hint = f"data.{key_of(task.dataset)}.raw=PATH"
            raise RequestError(f"task '{name}' needs the dataset '{task.dataset}'", where=f"{where}: cells.tasks[{i}]", hint=hint)
        if study.data[task.dataset].raw and not cards[task.dataset].labels_found:  # else the packed images' own card is asked
            check_labels(task, cards[task.dataset], f"{where}: cells.tasks[{i}]: {named('task', name)}: labels")
        for j, strategy in enumerate(cells.strategies):
            for architecture in _architectures(study):
                if wanted.strategy(task.task, architecture, strategy):
                    check(asked(strategy)[1], architecture, task, f"{where}: cells.strategies[{j}]")
                    if cells.keep == "encoder":
                        keep.check_named(architecture, task, strategy, f"{where}: cells.strategies[{j}]")


def key_of(dataset: str) -> str:
    """What an entry of `data` begins with: the name of one of our cards, or the file of a user's own."""
    return dataset if dataset in names("card") else "CARD.yaml"


def _one_kind(datasets: Sequence[str], cards: Mapping[str, "Card"], where: str, hint: str | None = None) -> None:
    channels = {dataset: cards[dataset].channels for dataset in datasets}
    if len(set(channels.values())) > 1:
        raise RequestError(f"grey and colour corpora in one run: {channels}", where=where, hint=hint)


def _is_path(source: str) -> bool:
    return (
        source.partition(":")[0] not in KINDS
        and not is_url(source)
        and ("/" in source or source.startswith(".") or source.endswith(WEIGHTS))
    )


def _check_replay(study: Study, entry: PretrainEntry, cards: Mapping[str, "Card"], where: str) -> None:
    from pretrain import methods
    from pretrain.recipe import load_recipe

    if not study.before(entry):
        raise RequestError("there is nothing to replay: it starts from no run of this study", where=where, hint="start_from: pretrain:NAME")
    replayed = study.replayed(entry)
    if not replayed:
        raise RequestError("there is nothing to replay: the runs before it read the same data", where=where, hint="leave replay out")
    _one_kind([*entry.data, *(dataset for dataset, _ in replayed)], cards, where)
    method = load_recipe(entry.recipe, entry.settings).method
    if methods.method_class(method).exact_epochs:
        raise RequestError(f"{method} needs every sample once an epoch, and replay mixes by shares", where=where, hint="leave replay out")


def _architectures(study: Study) -> list[str]:
    """Of the cells' sources, as far as the study itself says them; weights from outside bring theirs."""
    assert study.cells is not None
    sources = [source.source for source in study.cells.sources]
    pretrained = [study.architecture_of(entry) for entry in study.pretrain if f"pretrain:{entry.name}" in sources]
    named = [*(study.cells.architectures if "random" in sources else ()), *pretrained]
    return list(dict.fromkeys(architecture for architecture in named if architecture is not None))


def _check_source(source: str, earlier: Mapping[str, PretrainEntry], where: str) -> None:
    kind, _, rest = source.partition(":")
    if kind == "pretrain" and rest not in earlier:
        raise unknown("pretraining run", rest, earlier, where=where)
    if kind == "zoo" and rest not in names("weights"):
        raise unknown("published weights", rest, names("weights"), where=where)
    if kind == "timm":
        from encoders.weights import timm_architecture

        with at(where):
            timm_architecture(rest)
    if source != "random" and kind not in KINDS and not is_url(source) and not _is_path(source):
        if os.path.exists(source):
            raise RequestError(f"unknown source '{source}'", where=where, hint=f"the file or folder of that name is ./{source}")
        raise unknown("source", source, ["random", *(f"pretrain:{name}" for name in earlier)], where=where)
