"""Leakage at the level of a study: every pretraining corpus held against the test images of every task, before anything is trained.

Checks are kept by the digests of both sides under OUT/analyses/<key>/leakage.json, so a study that grows compares only what is new;
OUT/leakage.json sums them up for the report. With `leakage: stop` a finding ends the study; with `exclude` the pretraining images that
match are left out of training. A dataset's own training images are held against its test images too: that is a fault of the data, which
every encoder shares, so the report lists it and nothing stops.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.compared import Check, Match, Row, Summary
from analysis.exposure import overlap_notes
from analysis.leakage import by_index, by_pixels, check_key, conclude, patients_in_two_splits, prepare
from base import storage
from base.config import canonical_json, parse
from base.errors import RequestError
from cluster.events import Events
from cluster.plan import Packed
from cluster.progress import Progress, minutes
from cluster.ray_tasks import run_tasks
from cluster.study import Study
from finetune.task import load_task
from shards import corpus as packed

SHOWN = 20  # pairs in an error
SUMMARY = "leakage.json"


Pair = tuple[str, str, str]  # corpus, its split, dataset of a task


def pairs(study: Study) -> list[Pair]:
    """What pretraining reads against the test images of every task, each once."""
    read = dict.fromkeys((dataset, split) for entry in study.pretrain for dataset, split in entry.data.items())
    return [(dataset, split, test) for dataset, split in read for test in _tested(study)]


def own_pairs(study: Study) -> list[Pair]:
    """The training images of every task against its test images."""
    return [(dataset, "train", dataset) for dataset in _tested(study)]


def _tested(study: Study) -> list[str]:
    tasks = study.cells.tasks if study.cells else []
    settings = study.cells.task_settings if study.cells else {}
    return list(dict.fromkeys(load_task(task, settings.get(task, {})).dataset for task in tasks))


def standing(study: Study, corpora: Mapping[str, Packed]) -> dict[str, Packed] | None:
    """The corpora as they will be trained on, where every comparison stands in OUT already; None where one is missing.

    Raises:
        RequestError: there is a finding, and the study does not exclude what matches.
    """
    if any(check is None for check in _standing(study, corpora, own_pairs(study))):
        return None
    checks = _standing(study, corpora, pairs(study))
    return None if any(check is None for check in checks) else _concluded(study, corpora, [check for check in checks if check])


def _standing(study: Study, corpora: Mapping[str, Packed], asked: Sequence[Pair]) -> list[Check | None]:
    found: list[Check | None] = []
    for dataset, split, test in asked:
        url = _url(study, corpora, dataset, split, test)
        found.append(parse(storage.read_json(url), Check, url) if storage.exists(url) else None)
    return found


def _url(study: Study, corpora: Mapping[str, Packed], dataset: str, split: str, test: str) -> str:
    key = check_key(corpora[dataset].manifest, split, corpora[test].manifest)
    return storage.join(study.out, "analyses", key, "leakage.json")


def by_corpus(study: Study) -> dict[tuple[str, str], list[str]]:
    """The test sets that each dataset and split is held against."""
    found: dict[tuple[str, str], list[str]] = {}
    for dataset, split, test in dict.fromkeys([*pairs(study), *own_pairs(study)]):
        found.setdefault((dataset, split), []).append(test)
    return found


def compare_one(
    study: Study,
    corpora: Mapping[str, Packed],
    corpus: tuple[str, str],
    ready: Callable[[str], Any],
    progress: Progress,
    events: Events,
    room: Callable[[], float] | None = None,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Make the comparisons of a dataset and split that are missing, on Ray, a task for each shard.

    Args:
        ready: gives the test images of a dataset as `prepared` does; asked again it gives the same.
        room: how many tasks may run at a time, see cluster.ray_tasks.
        look: raises where the study has ended meanwhile.

    Raises:
        RequestError: there is a finding, and the study does not exclude what matches.
    """
    import ray

    (dataset, split), began = corpus, time.monotonic()
    asked = [(dataset, split, test) for test in by_corpus(study)[corpus]]
    against = [test for (_, _, test), check in zip(asked, _standing(study, corpora, asked), strict=True) if check is None]
    if against:
        look()
        look_there, tests = ray.remote(num_cpus=1)(_by_pixels), [ready(test) for test in against]
        images = packed.Corpus(corpora[dataset].url, (split,))
        parts: dict[int, Any] = {}
        for ended in run_tasks(lambda at: look_there.remote(images.url, split, at, *tests), len(images.shards), room):
            look()
            parts |= ended
            shards = f"{len(parts)}/{len(images.shards)} shards"
            progress.line(f"leakage {dataset} {split}: {shards} compared with {', '.join(against)}", of=f"leakage {dataset} {split}")
        for number, test in enumerate(against):
            other = packed.Corpus(corpora[test].url, ("test",))
            check = conclude(images, other, by_index(images, other), [parts[at][number] for at in range(len(parts))])
            storage.put(_url(study, corpora, dataset, split, test), canonical_json(check))
            events.add("compared", corpus=dataset, split=split, test=test, leaked=len(check.leaked))
    took = minutes(time.monotonic() - began)
    checks = [check for check in _standing(study, corpora, [pair for pair in asked if pair in pairs(study)]) if check]
    if against and checks:
        leaked = sum(len(check.leaked) for check in checks)
        progress.say(f"leakage {dataset} {split}: compared with {len(checks)} test sets, {leaked} images match, {took}")
    for pair in [pair for pair in asked if pair in own_pairs(study)]:
        (own,) = _standing(study, corpora, [pair])
        if own and own.leaked:
            found = f"{len(own.leaked)} training images of {own.test.dataset} match its own test images"
            progress.say(f"leakage: {found}; {_url(study, corpora, *pair)} names them")
    _concluded(study, corpora, checks)


def prepared(corpus: Packed) -> Any:
    """A reference to the test images of a dataset, made ready for comparison by a task of Ray's."""
    import ray

    return ray.remote(num_cpus=1)(prepare).remote(corpus.url)


def trained_on(study: Study, corpora: Mapping[str, Packed], names: Collection[str] | None = None) -> dict[str, Packed]:
    """The corpora, or those of these names, without the images that the comparisons which stand found.

    Raises:
        RequestError: there is a finding, and the study does not exclude what matches.
    """
    found = {name: corpora[name] for name in (corpora if names is None else names)}
    asked = [pair for pair in pairs(study) if pair[0] in found and pair[2] in corpora]
    checks = [check for check in _standing(study, corpora, asked) if check]
    return {name: corpus for name, corpus in _concluded(study, corpora, checks).items() if name in found}


def _by_pixels(url: str, split: str, shard: int, *tests: Any) -> Any:
    # Ray resolves references among the arguments themselves, not inside a list.
    return by_pixels(url, split, shard, tests)


def refuse_shared_patients(corpora: Mapping[str, Packed]) -> None:
    """Raises RequestError where a packed dataset has a patient in two splits."""
    for name, corpus in corpora.items():
        shared = patients_in_two_splits(corpus.url, list(corpus.manifest.counts))
        if shared:
            raise RequestError(f"{shared} patients of '{name}' stand in two splits", where=corpus.url, hint="pack the dataset again")


def _concluded(study: Study, corpora: Mapping[str, Packed], checks: Sequence[Check]) -> dict[str, Packed]:
    """Refuse findings, or leave out what matches."""
    if study.leakage == "stop":
        _refuse(study, corpora, checks)
        return dict(corpora)
    left_out: dict[str, dict[str, set[int]]] = {}
    for check in checks:
        left_out.setdefault(check.corpus.dataset, {}).setdefault(check.corpus.split, set()).update(check.leaked)
    found = dict(corpora)
    for name, splits in left_out.items():
        for split, ids in splits.items():
            if len(ids) == corpora[name].manifest.counts[split]:
                raise RequestError(f"every image of {name} {split} matches a test image", where=f"pretrain: data.{name}")
        found[name] = replace(corpora[name], without={split: tuple(sorted(ids)) for split, ids in splits.items() if ids})
    return found


def summarise(study: Study, corpora: Mapping[str, Packed]) -> None:
    """OUT/leakage.json: what was compared and found, and what the study does with it. Nothing is written where nothing is compared."""
    there = [[pair for pair in asked if pair[0] in corpora and pair[2] in corpora] for asked in (pairs(study), own_pairs(study))]
    checks, own = (_rows(study, corpora, asked) for asked in there)
    if checks or own:
        whole = Summary(setting=study.leakage, checks=checks, own=own)
        storage.put(storage.join(study.out, SUMMARY), whole.model_dump_json(by_alias=True, indent=1))


def _rows(study: Study, corpora: Mapping[str, Packed], asked: Sequence[Pair]) -> list[Row]:
    return [
        Row(
            corpus=check.corpus,
            test=check.test,
            key=check_key(corpora[check.corpus.dataset].manifest, check.corpus.split, corpora[check.test.dataset].manifest),
            patients=check.patients,
            same_patient=check.count("patient"),
            same_pixels=check.count("file", "pixels"),
            near_duplicate=check.count("near-duplicate"),
            follow_up=len({match.corpus_id for match in check.matches if match.kind == "near-duplicate" and match.same_patient}),
            leaked=len(check.leaked),
            known=overlap_notes(check.corpus.dataset, check.test.dataset),
        )
        for check in _standing(study, corpora, asked)
        if check
    ]


def _refuse(study: Study, corpora: Mapping[str, Packed], checks: Sequence[Check]) -> None:
    lines = []
    for check in checks:
        of, place = f"{check.corpus.dataset} {check.corpus.split}", f"the test images of {check.test.dataset}"
        lines += [f"  {of} and {place}: {note}" for note in overlap_notes(check.corpus.dataset, check.test.dataset)]
        if check.leaked:
            file = _url(study, corpora, check.corpus.dataset, check.corpus.split, check.test.dataset)
            lines.append(f"  {len(check.leaked)} images of {of} match {place}; all of them in {file}")
            lines += [f"    {words(match)}" for match in check.matches[:SHOWN]]
    if lines:
        hint = "leakage=exclude leaves the pretraining images that match out, and the report says so"
        raise RequestError("pretraining has seen, or would see, test images:\n" + "\n".join(lines) + "\n ", where="leakage", hint=hint)


def words(match: Match) -> str:
    """`near-duplicate, correlation 0.98, inverted: siim-acr-12.. and nih-cxr14-34..`."""
    parts = [match.kind] + ([f"correlation {match.correlation:.2f}"] if match.correlation is not None else [])
    parts += (["inverted"] if match.inverted else []) + (["of one patient"] if match.same_patient and match.kind != "patient" else [])
    return f"{', '.join(parts)}: {match.corpus} and {match.test}"


def foretold(study: Study, corpora: Mapping[str, Packed]) -> list[tuple[str, str, bool]]:
    """What a plan can say without decoding an image: (which comparison, what is known, whether it would stop the study)."""
    rows = []
    for (dataset, split, test), check in zip(pairs(study), _standing_or_none(study, corpora), strict=True):
        known, state = overlap_notes(dataset, test), "images are compared when it runs"
        leaked = 0
        if check is not None:
            leaked, state = len(check.leaked), f"compared: {len(check.leaked)} images match"
        elif {dataset, test} <= set(corpora):
            one, other = packed.Corpus(corpora[dataset].url, (split,)), packed.Corpus(corpora[test].url, ("test",))
            leaked = len({match.corpus_id for match in by_index(one, other)})
            state = f"{leaked} images of the same patients or with the same bytes; {state}"
        rows.append((f"{dataset} {split} against the test images of {test}", "; ".join([*known, state]), bool(known or leaked)))
    return rows


def _standing_or_none(study: Study, corpora: Mapping[str, Packed]) -> list[Check | None]:
    return _standing(study, corpora, pairs(study)) if set(corpora) == set(study.data) else [None] * len(pairs(study))
