"""`allograft plan`: what a study would do, what stands, what is missing. Starts nothing and writes nothing."""

import sys

from base import storage
from base.errors import RequestError
from cluster import leakage, plan
from cluster.fit import fit
from cluster.plan import Corpus
from cluster.progress import minutes
from cluster.run import claim
from cluster.screen import table
from cluster.searches import Searches, most
from cluster.standing import done, standing_corpora, standing_weights
from cluster.study import Study
from cluster.tracking import tracking_uri
from finetune.search import Tune

WRONG = "cannot start, see below"
UNTUNED = "untuned: one fixed rate a task, which may suit one source better than another (cells.tune: {lr: [...], trials: n})"


def outlook(study: Study) -> bool:
    """Print the plan, and on the error stream what keeps it from starting, a line each.

    Returns:
        False when the study could not start, or would stop: raw data is missing, or pretraining would see test images.
    """
    claim(study)
    corpora: dict[str, Corpus] = {}
    problems: dict[str, str] = {}
    for name, entry in study.data.items():
        try:
            corpora |= standing_corpora(study.model_copy(update={"data": {name: entry}}))
        except RequestError as error:
            problems[name] = str(error)
    rows: list[tuple[str, str]] = []
    for name, entry in study.data.items():
        if name in corpora:
            counts = ", ".join(f"{split} {count:,}" for split, count in corpora[name].manifest.counts.items())
            rows.append((f"pack {name}", f"stands: {counts}"))
        else:
            rows.append((f"pack {name}", WRONG if name in problems else f"to do, from {entry.raw}"))
    complete = set(corpora) == set(study.data)
    uri = tracking_uri(study.out, study.tracking)
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
    weights, missing = standing_weights(study, checked, uri) if complete else ({}, [])
    for what, state, found in leakage.foretold(study, corpora):
        stops = found and study.leakage == "stop"
        if stops:
            problems.setdefault("leakage", what)
        rows.append((f"leakage {what}", f"{state}; the study would stop" if stops else state))
    for run in study.pretrain:
        todo = missing.count(run.name) if complete else len(run.seeds)
        state = f"{todo} of {len(run.seeds)} to do" if todo else "stands"
        node = f"pretrain {run.name}"
        rows.append((node, WRONG if node in problems else f"{state}  ({run.recipe} from {run.start_from})"))
    if study.cells:
        if complete and not missing:
            searches = Searches(plan.settings(study, checked, weights), keep=False)
            asked_for, configs = list(searches.rows()), searches.cells
            standing = [config for config in configs if done(config.out)]
            exposed = sum(bool(row["exposed_to"]) for row in asked_for)
            apart = f", {exposed} exposed to test images by their source's past ({study.exposed})" if exposed else ""
            if searches.searching:
                asked, trials, every = most(one.setting for one in searches.chosen)
                answered = sum(len(one.answers) for one in searches.chosen)
                answers = f"{asked}, of which {answered} have answered; at most {trials} trials, {every} to try everything"
                rows.append(("searches", answers))
            rows.append(("cells", f"{len(asked_for)}, of which {len(standing)} stand{apart}"))
            seconds = [storage.read_json(storage.join(config.out, "result.json"))["seconds"] for config in standing]
            if seconds and len(standing) < len(asked_for):
                left = sum(seconds) / len(seconds) * (len(asked_for) - len(standing))
                rows.append(("", f"{minutes(left)} of one worker to go, by the {len(seconds)} that stand"))
        else:
            rows.append(("cells", str(_count(study))))
            if any(strategy.get("cut") == "auto" for strategy in study.cells.strategies):
                rows.append(("searches", "counted once data and weights stand"))
        rows.append(("", UNTUNED if study.cells.tune is None else _tuned(study.cells.tune, study.cells.trial_seeds)))
    table(rows, ("node", "state"))
    for node, what in problems.items():
        print(f"cannot start: {what if node.startswith('pretrain') else f'{node}: {what}'}", file=sys.stderr)
    return not problems


def _tuned(tune: Tune, seeds: list[int]) -> str:
    return f"tuned: {tune.trials} rates x {len(seeds)} trial seeds for every source and strategy, chosen on validation"


def _count(study: Study) -> int:
    """Cells by the axes alone, before any weights exist."""
    assert study.cells is not None
    matrix, runs = study.cells, {entry.name: entry for entry in study.pretrain}
    own = {entry.architecture for entry in study.pretrain if entry.architecture}
    total = 0
    for source in matrix.sources:
        if source.source == "random":
            encoders = len(matrix.architectures or own)
        else:
            entry = runs.get(source.source.removeprefix("pretrain:"))
            encoders = len(entry.seeds) if entry else 1
        repeats = 2 if source.name in matrix.shuffled_labels else 1
        for task in matrix.tasks:
            axes = len(matrix.of_task("fractions", task)) * len(matrix.of_task("resolutions", task))
            total += encoders * repeats * axes * len(matrix.strategies) * len(matrix.seeds)
    return total
