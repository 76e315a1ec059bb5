"""The stages of a study on Ray: pack, pretrain, cells. Each skips what stands, says what it does, and leaves an event."""

import json
import time
from functools import partial
from typing import TYPE_CHECKING

from base import storage
from cluster import plan, quarantine
from cluster.events import Events
from cluster.plan import Corpus, Weights
from cluster.progress import Progress, minutes
from cluster.searches import Searches
from cluster.standing import by_source, done, shards_url, start_of
from cluster.study import Study
from finetune.cell import CellConfig

if TYPE_CHECKING:
    from cluster.pack import Packing


def pack(study: Study, progress: Progress, events: Events) -> dict[str, Corpus]:
    """Every dataset of the study packed, or kept where its shards are those of the raw files.

    Raises:
        RequestError: the raw files are not as the card says, or shards of another secret stand; then none has been packed.
        WorkError: no usable image in a split, or storage failed.
    """
    from cluster.pack import pack_on_ray
    from shards import manifest
    from shards.card import load_card
    from shards.pack import refuse_another_secret

    for name, entry in study.data.items():
        if entry.raw is not None:
            refuse_another_secret(load_card(name), shards_url(study, name))
    corpora: dict[str, Corpus] = {}
    for name, entry in study.data.items():
        if entry.raw is None:
            assert entry.shards is not None
            corpora[name] = Corpus(entry.shards, manifest.read(entry.shards))
            continue
        url = shards_url(study, name)
        made, packing = pack_on_ray(load_card(name), entry.raw, url, partial(_show_packing, progress, name), entry.split_files)
        corpora[name] = Corpus(url, made)
        counts = ", ".join(f"{split} {count:,}" for split, count in made.counts.items())
        quarantined = f", {made.quarantined} quarantined (see {url}/quarantine.jsonl)" if made.quarantined else ""
        progress.say(f"pack {name}: {counts}{quarantined}; {packing.summary()}")
        events.add("packed", dataset=name, digest=made.digest, quarantined=made.quarantined)
    return corpora


def write_plan(out: str, searches: Searches) -> None:
    """OUT/plan.json: every cell that the study asks for, so that a report knows what is missing and what is no longer asked for."""
    storage.put(storage.join(out, "plan.json"), json.dumps(list(searches.rows()), indent=1))


def _show_packing(progress: Progress, name: str, so_far: "Packing") -> None:
    progress.line(f"pack {name}: {so_far.line()}")


def pretrain(
    study: Study, corpora: dict[str, Corpus], uri: str, progress: Progress, events: Events
) -> tuple[dict[str, list[Weights]], int]:
    """Every pretraining in its order, a chain after what it starts from.

    Returns:
        Weights by source of the cells, and how often workers were restarted.

    Raises:
        RequestError: a run does not fit its data; none has started.
        WorkError: a run failed for good; those before it stand.
    """
    from cluster.fit import fits
    from cluster.pretraining import pretrain_on_ray
    from cluster.sources import read_weights

    fits(study, corpora)
    made: dict[str, list[Weights]] = {}
    restarts = 0
    for entry in study.pretrain:
        for seed in entry.seeds:
            start = start_of(entry.start_from, seed, made, study, uri)
            config = plan.pretrain_config(study, entry, seed, corpora, start)
            label = f"pretrain {entry.name}" + (f" seed {seed}" if len(entry.seeds) > 1 else "")
            if done(config.out):
                progress.say(f"{label}: stands already")
            else:
                began = time.monotonic()
                if before := storage.listing(storage.join(config.out, "checkpoints")):
                    progress.say(f"{label}: goes on from step {int(before[-1].removeprefix('step-'))}")
                try:
                    with progress.follow(storage.join(config.out, "metrics.jsonl"), label):
                        result = pretrain_on_ray(config, study.resources)
                finally:  # a run that fails for too many damaged samples says most here
                    unread = [row for row in quarantine.merge(study.out) if config.out.endswith(f"/{row['pretraining']}")]
                    if unread:
                        progress.say(f"{label}: {len(unread)} samples could not be read (see {study.out}/{quarantine.FILE})")
                restarts += result["restarts"]
                died = f", finished after {result['restarts']} restart(s) of its workers" if result["restarts"] else ""
                took = minutes(time.monotonic() - began)
                progress.say(f"{label}: {result['steps']} steps, {result['img_per_s']:.0f} img/s, {result['health']}, {took}{died}")
                events.add("pretrained", name=entry.name, seed=seed, key=config.key, restarts=result["restarts"])
            made.setdefault(entry.name, []).append(read_weights(storage.join(config.out, "export"), seed))
    return by_source(study, made, uri, []), restarts


def cells(study: Study, searches: Searches, progress: Progress, events: Events) -> tuple[int, int, dict[str, str], int]:
    """The trials and cells that are missing, on one pool: cells whose searches have answered do not wait for those that still ask.

    Returns:
        How many cells were kept, how many are new, reasons of those that failed by their description, deaths of workers.
    """
    from cluster.fanout import Tally, run_cells

    todo = searches.ready()
    known = {config.key: config for config in todo}
    idle = set(storage.listing(storage.join(study.out, "cells"))) - {config.key for config in searches.cells}
    asking = f", {len(searches.open)} searches to answer first" if searches.open else ""
    other = "trials or no longer asked for" if searches.searching else "no longer asked for"
    progress.say(f"cells: {searches.kept} kept, {sum(config.role == 'cell' for config in todo)} new, {len(idle)} {other}{asking}")
    new = 0

    def show(tally: Tally) -> None:
        counts = f"{tally.done} done, {tally.running} running, {len(tally.failed)} failed, {tally.left} left"
        progress.line(f"cells: {counts}, to go {minutes(tally.eta_s)}", last=tally.done + len(tally.failed) == tally.total)

    def told(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        nonlocal new
        new += problem is None and config.role == "cell"
        more = searches.told(config, problem)
        known.update({found.key: found for found in more})
        return more

    tally = run_cells(todo, study.resources, show, told)
    reasons = {key: reason for key, reason in tally.failed.items() if not searches.excused(key)}
    failed = {f"{_words(known[key])} ({key})": reason for key, reason in reasons.items()}
    failed |= {f"{one.setting.words()} (cells without a {one.steps[0]})": str(one.failed) for one in searches.open}
    for key, reason in reasons.items():
        events.add("cell failed", key=key, reason=reason)
    for one in searches.chosen:
        for key in one.answers:
            events.add("searched", key=key, setting=one.setting.words())
    if tally.deaths:
        progress.say(f"cells: {tally.deaths} worker(s) died and were replaced")
    events.add("cells", done=tally.done, failed=len(failed), deaths=tally.deaths)
    return searches.kept, new, failed, tally.deaths


def _words(config: CellConfig) -> str:
    trial = "trial of " if config.role == "trial" else ""
    return f"{trial}{config.task.task} {config.source} {config.strategy['name']} seed {config.seed}"
