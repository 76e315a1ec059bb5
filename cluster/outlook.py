"""`allograft plan`: what a study would do and take, what stands, what is missing, what it could find. Starts nothing and writes nothing."""

import math
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from analysis.claims import settings_of
from analysis.power import power
from analysis.results import pretrainings as begun
from base import storage
from base.errors import RequestError
from base.paths import is_url
from cluster import leakage, plan
from cluster.changes import changes, held
from cluster.claims import axes_of_matrix
from cluster.estimate import Estimate, Run, Seen, Speeds, cell_bytes, devices
from cluster.fit import fit
from cluster.outs import refuse_other_out
from cluster.plan import Packed, Weights
from cluster.progress import minutes
from cluster.screen import table
from cluster.searches import Chosen, Searches, most
from cluster.standing import architecture_of_run, finished, foreseen, outside_sources, standing_sources, standing_weights
from cluster.study import Study
from engine import gpus
from engine.gpus import Gpu
from finetune.cell import CellConfig
from finetune.search import Tune, most_trials
from pretrain.recipe import load_recipe

WRONG = "cannot start, see above"
UNTUNED = "untuned: one fixed rate a task, which may suit one source better than another (cells.tune: {lr: [...], trials: n})"
UNTOLD = "not all of it can be told yet"
Row = tuple[str, str]


@dataclass
class Total:
    """What all that is left to do takes: hours of a GPU, or of a processor, and bytes. partly: some of it cannot be told yet."""

    hours: float = 0.0
    bytes: float = 0.0
    partly: bool = False
    measured: list[bool] = field(default_factory=list)

    def add(self, what: Estimate, count: float, devices: float) -> float:
        """Hours of so many pieces of work."""
        hours = what.seconds / 3600 * count * devices
        self.hours += hours
        self.measured.append(what.basis.startswith("measured"))
        return hours


def outlook(study: Study, *, rate: float | None = None, gpu: str = "h100-sxm", wanted: float | None = None) -> bool:
    """Print on the error stream what keeps the study from starting, a line each, then the plan.

    Args:
        rate: price of an hour of a GPU, or of a processor where the study uses no GPU.
        gpu: what estimates by operations are for.
        wanted: a difference that the study should be able to declare.

    Returns:
        False when the study could not start, or would stop: data are missing, a run would be refused, or see test images.
    """
    refuse_other_out(study)
    device, total = gpus.get(gpu), Total()
    problems: dict[str, str] = {}
    corpora, seen = _data(study, problems)
    complete = set(corpora) == set(study.data)
    try:
        leakage.refuse_shared_patients(corpora)
        checked = (leakage.standing(study, corpora) if complete else None) or corpora
    except RequestError as error:
        problems["leakage"], checked = str(error), corpora
    for run in study.pretrain if complete else ():
        try:
            fit(study, run, checked)
        except RequestError as error:
            problems[f"pretrain {run.name}"] = str(error)
    everything = [run.name for run in study.pretrain for _ in run.seeds]
    sources = standing_sources(study)
    weights, missing = standing_weights(study, checked) if complete else (foreseen(study, {}, sources), everything)
    searches = Searches(plan.settings(study, checked if complete else {}, weights), keep=False)
    rows = [("", line) for line in changes(study, held(study.out), checked if complete else None, searches)]
    rows += _of_data(study, corpora, seen, problems, total)
    for what, state, found in leakage.foretold(study, corpora):
        stops = found and study.leakage == "stop"
        if stops:
            problems.setdefault("leakage", what)
        rows.append((f"leakage {what}", f"{state}; the study would stop" if stops else state))
    rows += _of_sources(study, sources)
    rows += _of_runs(study, seen, missing, sources, problems, device, total)
    if study.cells:
        rows += _of_cells(study, searches, seen, device, total)
    rows += _of_power(study, searches, seen, wanted)
    rows += _licences(study, seen, sources)
    rows += _in_all(study, total, rate)
    for node, what in problems.items():
        print(f"cannot start: {what if node.startswith('pretrain') else f'{node}: {what}'}", file=sys.stderr, flush=True)
    table(rows, ("node", "state"))
    return not problems


# -- data and weights


def _data(study: Study, problems: dict[str, str]) -> tuple[dict[str, Packed], dict[str, Seen]]:
    """Datasets that are packed, and what is known of all whose raw files are as they should be."""
    from cluster.standing import jobs_of, standing_corpus

    corpora: dict[str, Packed] = {}
    seen: dict[str, Seen] = {}
    for name in study.data:
        try:
            jobs = jobs_of(study, name)
            corpus = standing_corpus(study, name, jobs)
        except RequestError as error:
            problems[name] = str(error)
            continue
        if corpus:
            corpora[name], seen[name] = corpus, Seen.packed(corpus.manifest)
        else:
            seen[name] = Seen.planned(jobs)
    return corpora, seen


def _of_data(
    study: Study, corpora: Mapping[str, Packed], seen: Mapping[str, Seen], problems: Mapping[str, str], total: Total
) -> Iterator[Row]:
    for name, entry in study.data.items():
        counts = ", ".join(f"{split} {count:,}" for split, count in seen[name].images.items()) if name in seen else ""
        if name in corpora:
            yield f"pack {name}", f"stands: {counts}"
            yield from (("", line) for line in plan.one_class(study, name, corpora[name]))
        elif name in problems:
            total.partly = True
            yield f"pack {name}", WRONG
        else:
            total.bytes += seen[name].to_pack
            yield f"pack {name}", f"to do, from {entry.raw}: {counts}; at most {_size(seen[name].to_pack)}"


def _of_sources(study: Study, standing: Mapping[str, Weights]) -> Iterator[Row]:
    for source in outside_sources(study):
        here = standing.get(source)
        yield f"source {source}", f"here: {here.architecture}" if here else "not here: fetched when the study runs"


def _licences(study: Study, seen: Mapping[str, Seen], standing: Mapping[str, Weights]) -> Iterator[Row]:
    from encoders.published import load_zoo

    for name, one in seen.items():
        yield f"licence {name}", one.card.licence
    for source in outside_sources(study):
        kind, _, name = source.partition(":")
        if kind == "zoo":
            licence = load_zoo(name).licence
        elif source in standing:
            licence = storage.read_json(storage.join(standing[source].url, "allograft.json"))["licence"]
        else:
            licence = "not known before it is fetched"
        yield f"licence {source}", licence


# -- pretrainings


def _of_runs(
    study: Study,
    seen: Mapping[str, Seen],
    missing: Sequence[str],
    sources: Mapping[str, Weights],
    problems: dict[str, str],
    gpu: Gpu,
    total: Total,
) -> Iterator[Row]:
    done = begun(study.out)
    for entry in study.pretrain:
        node, todo = f"pretrain {entry.name}", missing.count(entry.name)
        state = f"{todo} of {len(entry.seeds)} to do" if todo else "stands"
        if node in problems:
            total.partly = True
            yield node, WRONG
            continue
        architecture = architecture_of_run(study, entry, sources)
        known = architecture and all(name in seen for name in entry.data)
        if todo and known and architecture:
            images = sum(seen[name].images.get(split, 0) for name, split in entry.data.items())
            if entry.replay is not None:  # so many batches that its own data are gone through once, as in pretrain.loop
                batch = load_recipe(entry.recipe, entry.settings).global_batch
                images = math.ceil(images / (1 - entry.replay) / batch) * batch
            channels = seen[next(iter(entry.data))].card.channels
            try:
                run = Run.of(study, entry, architecture, images, channels)
            except RequestError as error:
                problems[node], total.partly = f"{node}: {error}", True
                yield node, WRONG
                continue
            one = run.estimate(study.resources, gpu, done)
            unit, held, _ = devices(study.resources)
            hours = total.add(one, todo, held)
            total.bytes += run.bytes * todo
            state += f", {run.explained.steps:,} steps, {_hours(hours, unit)} {one.basis}, {_size(run.bytes * todo)}"
        elif todo:
            total.partly = True
        labels = entry.labels if isinstance(entry.labels, str) else f"{len(entry.labels)} labels" if entry.labels else ""
        yield node, f"{state}  ({entry.recipe} from {entry.start_from}{labels and f', {labels}'})"


# -- cells


def _of_cells(study: Study, searches: Searches, seen: Mapping[str, Seen], gpu: Gpu, total: Total) -> Iterator[Row]:
    assert study.cells is not None
    matrix, standing = study.cells, finished(storage.join(study.out, "cells"))
    speeds = Speeds(study.resources, gpu)
    rows = list(searches.rows())
    stand = sum(row["key"] in standing for row in rows)
    if stand < len(rows):
        speeds.learn((config for config in searches.cells if config.key in standing), seen)
    by_task: dict[str, list[Chosen]] = defaultdict(list)
    for one in searches.chosen:
        by_task[one.task.task].append(one)
    exposed = sum(bool(row["exposed_to"]) for row in rows)
    apart = f", {exposed} exposed to test images by their source's past ({study.exposed})" if exposed else ""
    if any(one.steps or one.answers for one in searches.chosen) or _cut_searched(study):
        if searches.foreseen:
            yield "searches", "counted once data and weights stand"
        else:
            asked, trials, every = most(one.setting for one in searches.chosen)
            answered = sum(len(one.answers) for one in searches.chosen)
            yield "searches", f"{asked}, of which {answered} have answered; at most {trials} trials, {every} to try everything"
    yield "cells", f"{len(rows):,}, of which {stand:,} stand{apart}"
    unit, _, each = devices(study.resources)
    for task, chosen in by_task.items():
        hours, todo, bases, partly = 0.0, 0, set(), False
        for one in chosen:
            dataset = one.task.dataset
            missing = sum(config.key not in standing for config in one.cells()) if _known(one) else len(one.setting.seeds)
            todo += missing
            if not missing:
                continue
            if dataset not in seen or not one.setting.architecture:
                partly = total.partly = True
                continue
            like = _like(one)
            estimate = speeds.of(like, seen[dataset])
            hours += total.add(estimate, missing + _trials(one), each)
            bases.add(estimate.basis)
            total.bytes += missing * cell_bytes(
                like, seen[dataset], _parameters(one.setting.architecture) if matrix.keep == "encoder" else 0
            )
        if todo:
            told = [f"{_hours(hours, unit)} {'; '.join(sorted(bases))}"] if bases else []
            yield f"cells of {task}", ", ".join([f"{todo:,} to do", *told, *([UNTOLD] if partly else [])])
    yield "", UNTUNED if matrix.tune is None else _tuned(matrix.tune, matrix.trial_seeds)


def _known(one: Chosen) -> bool:
    return not one.steps and one.setting.stands


def _cut_searched(study: Study) -> bool:
    return any(strategy.get("cut") == "auto" for strategy in study.cells.strategies) if study.cells else False


def _trials(one: Chosen) -> int:
    """Trials that the searches of a setting take at most, where they can be told."""
    from cluster.searches import search_of

    return sum(most_trials(search_of(one.setting, step)) for step in one.steps) if one.setting.stands else 0


def _like(one: Chosen) -> CellConfig:
    """A cell of the setting as far as an estimate asks: its data and weights may not be there yet."""
    if _known(one):
        return one.cells()[0]
    study = one.setting.study
    return CellConfig.model_construct(
        key="",
        source=one.setting.source,
        source_kind="weights" if one.setting.weights else "random",
        shards="",
        manifest_digest="",
        out="",
        architecture=one.setting.architecture,
        strategy=one.strategy,
        task=one.task,
        fraction=one.setting.fraction,
        resolution=one.setting.resolution,
        dtype=study.resources.cell_dtype,
        keep=study.cells.keep if study.cells else "nothing",
        role="cell",
    )


@cache
def _parameters(architecture: str) -> int:
    import torch

    from encoders.build import build

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(architecture, 3).net.parameters())


def _tuned(tune: Tune, seeds: list[int]) -> str:
    return f"tuned: {tune.trials} rates x {len(seeds)} trial seeds for every source and strategy, chosen on validation"


# -- what it could find


def _of_power(study: Study, searches: Searches, seen: Mapping[str, Seen], wanted: float | None) -> Iterator[Row]:
    """For each task the smallest difference of two sources that would be declared, over all comparisons of the study."""
    matrix = study.cells
    if matrix is None or len(matrix.sources) < 2:
        return
    # The side of a comparison that has fewer decides: what comes from outside is one checkpoint, random weights are drawn with every seed.
    checkpoints = {f"pretrain:{entry.name}": len(entry.seeds) for entry in study.pretrain}
    pretraining_seeds = min((checkpoints.get(one.source, 1) for one in matrix.sources if one.source != "random"), default=1)
    pretraining_seeds = (
        min(pretraining_seeds, len(matrix.seeds)) if any(one.source == "random" for one in matrix.sources) else pretraining_seeds
    )
    family = comparisons(study, searches)
    if not family:
        yield "power", "nothing is declared: every comparison has a source that the task's own images or labels have taught"
        return
    for task in dict.fromkeys(one.task.task for one in searches.chosen):
        about = next(one.task for one in searches.chosen if one.task.task == task)
        if about.dataset not in seen:
            continue
        known = seen[about.dataset]
        prevalence = [known.positive[label] for label in about.measured if label in known.positive]
        found = power(
            about.metric,
            patients=known.patients.get("test", 0),
            prevalence=prevalence or None,
            seeds=len(matrix.seeds),
            pretraining_seeds=pretraining_seeds,
            family=family,
            wanted=wanted,
        )
        least = f"differences of {found.detectable:.3f} {about.metric} and more" if found.detectable < 1 else "no difference"
        needed = ""
        if wanted is not None:
            seeds = "pretraining seeds" if pretraining_seeds > 1 else "seeds"
            needed = f"; {wanted:g} takes {found.seeds_needed} {seeds}" if found.seeds_needed else f"; no number of seeds finds {wanted:g}"
        yield f"power {task}", f"declares {least} among {family} comparisons{needed}"
        yield "", found.assumptions


def comparisons(study: Study, searches: Searches) -> int:
    """How many the report corrects for: the settings of the study's claims; without claims, the comparisons of the plan that may be
    declared (analysis.family), or all of it where one seed a side declares none."""
    if study.claims:
        seen = [(held, held) for held, _ in axes_of_matrix(study)]
        return max(1, sum(len(settings_of(claim, seen)) for claim in study.claims))
    from analysis.family import planned_family
    from analysis.results import without_controls

    datasets = {one.task.task: one.task.dataset for one in searches.chosen}
    learned = {source.name: _labels_read(study, source.source) for source in (study.cells.sources if study.cells else [])}
    rows = [row | {"own_source": row["own_source"] or datasets[row["task"]] in learned[row["source"]]} for row in searches.rows()]
    planned = planned_family(study.model_dump(mode="json", by_alias=True), without_controls(rows)).values()
    kinds = [held.kind for held in planned if held.several] or [held.kind for held in planned]
    return sum(kind != "control" for kind in kinds) or len(kinds)  # which a study of twins alone has


def _labels_read(study: Study, source: str) -> set[str]:
    """Datasets whose labels the pretrainings of the study that lead to a source read, finished or not."""
    from pretrain.methods import method_class

    runs = [run for entry in study.pretrain if source == f"pretrain:{entry.name}" for run in (*study.before(entry), entry)]
    labelled = [run for run in runs if method_class(load_recipe(run.recipe, run.settings).method).labelled]
    return {name for run in labelled for name, _ in (*run.data.items(), *study.replayed(run))}


# -- in all


def _in_all(study: Study, total: Total, rate: float | None) -> Iterator[Row]:
    unit = devices(study.resources)[0]
    price = "" if rate is None else f", {total.hours * rate:,.2f} at {rate:g} an hour"
    least = "at least " if total.partly else ""
    if total.hours:
        yield "in all", f"{least}{_hours(total.hours, unit)}{price}, without packing, starts, analyses and report"
    else:
        yield "in all", UNTOLD if total.partly else "nothing to compute" + price
    more = f"{least}{_size(total.bytes)} more" if total.bytes or not total.partly else UNTOLD
    yield "storage", f"{more} in {study.out}" + ("" if is_url(study.out) else f", {_size(_free(study.out))} free there")


def _free(out: str) -> int:
    while not os.path.exists(out):
        out = os.path.dirname(out)
    return shutil.disk_usage(out).free


def _hours(hours: float, unit: str) -> str:
    return f"{hours:,.1f} {unit} hours" if hours >= 1 else f"{minutes(hours * 3600)} of a {unit}"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
