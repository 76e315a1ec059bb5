"""The pieces of work of a study: pack a dataset, pretrain a run, compute cells. Each skips what stands, says what it does, leaves an event.

They are put together in cluster.nodes. All run on Ray, and several at a time, each in a thread of the driver.
"""

import json
import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.results import plan
from base import storage
from base.config import canonical_json
from cluster import quarantine
from cluster.changes import SAME
from cluster.events import Events
from cluster.plan import Corpus, Setting, Weights
from cluster.progress import Progress, minutes
from cluster.searches import Searches
from cluster.standing import done, shards_url
from cluster.study import PretrainEntry, Study
from finetune.cell import CellConfig
from pretrain.run import PretrainConfig

if TYPE_CHECKING:
    from cluster.fanout import Tally
    from cluster.pack import Packing

SHOWN = 4  # tasks and sources whose cells have become ready
PLAN_S = 30.0  # how often plan.json is written anew while cells run
Processors = Callable[[], float]  # that a stage may use at a time
StillOn = Callable[[], None]  # raises where the study has ended meanwhile


def refuse_other_secrets(study: Study) -> None:
    """Raises RequestError where shards of another secret stand for any dataset: before one of them is packed."""
    from shards.card import load_card
    from shards.pack import refuse_another_secret

    for name, entry in study.data.items():
        if entry.raw is not None:
            refuse_another_secret(load_card(name), shards_url(study, name))


def pack(study: Study, name: str, progress: Progress, events: Events, room: Processors, check: StillOn) -> Corpus:
    """A dataset packed, or kept where its shards are those of the raw files.

    Raises:
        RequestError: the raw files are not as the card says, shards of another secret stand, or a patient has images in two splits.
        WorkError: no usable image in a split, or storage failed.
    """
    from cluster.leakage import refuse_shared_patients
    from cluster.pack import pack_on_ray
    from shards import manifest
    from shards.card import load_card

    entry, url = study.data[name], shards_url(study, name)
    if entry.raw is None:
        corpus = Corpus(url, manifest.read(url))
    else:

        def show(so_far: "Packing") -> None:
            check()
            progress.line(f"pack {name}: {so_far.line()}", of=f"pack {name}")

        made, packing = pack_on_ray(load_card(name), entry.raw, url, show, entry.split_files, room)
        corpus = Corpus(url, made)
        counts = ", ".join(f"{split} {count:,}" for split, count in made.counts.items())
        quarantined = f", {made.quarantined} quarantined (see {url}/quarantine.jsonl)" if made.quarantined else ""
        progress.say(f"pack {name}: {counts}{quarantined}; {packing.summary()}")
        events.add("packed", dataset=name, digest=made.digest, quarantined=made.quarantined)
    refuse_shared_patients({name: corpus})
    return corpus


def pretrain_label(entry: PretrainEntry, seed: int) -> str:
    """What a run is called on the screen, and as a node."""
    return f"pretrain {entry.name}" + (f" seed {seed}" if len(entry.seeds) > 1 else "")


def pretrain(study: Study, config: PretrainConfig, label: str, progress: Progress, events: Events) -> tuple[Weights, int]:
    """A run to its end, or as far as it stands; returns its encoder, and how often its workers were restarted.

    Raises:
        WorkError: it failed for good.
    """
    from cluster.pretraining import pretrain_on_ray
    from cluster.sources import read_weights
    from engine.checkpoint import newest_step

    restarts = 0
    if done(config.out):
        progress.say(f"{label}: stands already")
    else:
        began = time.monotonic()
        if step := newest_step(storage.join(config.out, "checkpoints")):
            progress.say(f"{label}: goes on from step {step}")
        try:
            with progress.follow(storage.join(config.out, "metrics.jsonl"), label):
                result = pretrain_on_ray(config, study.resources)
        finally:  # a run that fails for too many damaged samples says most here
            unread = [row for row in quarantine.merge(study.out) if config.out.endswith(f"/{row['pretraining']}")]
            if unread:
                progress.say(f"{label}: {len(unread)} samples could not be read (see {study.out}/{quarantine.FILE})")
        restarts = result["restarts"]
        died = f", finished after {restarts} restart(s) of its workers" if restarts else ""
        took = minutes(time.monotonic() - began)
        progress.say(f"{label}: {result['steps']} steps, {result['img_per_s']:.0f} img/s, {result['health']}, {took}{died}")
        for slow in result["stragglers"]:
            progress.say(f"{label}: {slow}")
        events.add("pretrained", name=config.name, seed=config.seed, key=config.key, restarts=restarts)
    return read_weights(storage.join(config.out, "export"), config.seed), restarts


@dataclass
class Feed:
    """Settings whose data and weights have come to stand, on their way to the pool of cells."""

    waiting: queue.SimpleQueue[list[Setting] | None] = field(default_factory=queue.SimpleQueue)  # None: no more will come
    closed: bool = False

    def take(self) -> list[Setting] | None:
        """What has come since; None once all has been taken."""
        found: list[Setting] = []
        while not self.closed and not self.waiting.empty():
            settings = self.waiting.get()
            self.closed = settings is None
            found += settings or []
        return None if self.closed and not found else found


@dataclass
class Fanned:
    """What became of the cells. failed: reasons by description."""

    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    deaths: int = 0


def cells(
    study: Study,
    searches: Searches,
    feed: Feed,
    progress: Progress,
    events: Events,
    reserved: Callable[[], Mapping[str, float]],
    check: StillOn,
) -> Fanned:
    """The trials and cells that are missing, on one pool: those that can be computed do not wait for encoders that are still trained, nor
    for searches that still ask.

    Args:
        reserved: what the pool has to leave of the cluster.
    """
    from cluster.fanout import run_cells

    known: dict[str, CellConfig] = {}
    made = Fanned()
    planned_at, planned = -PLAN_S, 0  # cells that plan.json was last written with

    def more() -> list[CellConfig] | None:
        check()
        settings = feed.take()
        if settings is None:
            return None
        if not settings:
            return []
        kept, found = searches.kept, searches.fill(settings)
        known.update({config.key: config for config in found})
        begun = sum(config.role == "cell" for config in found)
        asking = f", {len(searches.open)} searches to answer first" if searches.open else ""
        of = list(dict.fromkeys(f"{one.task.task} {one.source}" for one in settings))
        others = f" and {len(of) - SHOWN} more" if len(of) > SHOWN else ""
        progress.say(f"cells: {searches.kept - kept} kept, {begun} new{asking} ({', '.join(of[:SHOWN])}{others})")
        return found

    def show(tally: "Tally") -> None:
        nonlocal planned_at, planned
        check()
        if len(known) > planned and time.monotonic() - planned_at >= PLAN_S:
            write_plan(study.out, searches, ended=False)
            planned_at, planned = time.monotonic(), len(known)
        if not tally.running:  # there are none yet, or they wait for a pretraining to end
            progress.gone("cells")
            return
        counts = f"{tally.done} done, {tally.running} running, {len(tally.failed)} failed, {tally.left} left"
        progress.line(f"cells: {counts}, to go {minutes(tally.eta_s)}", of="cells")

    def told(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        made.new += problem is None and config.role == "cell"
        found = searches.told(config, problem)
        known.update({config.key: config for config in found})
        return found

    tally = run_cells((), study.resources, show, told, more, reserved)
    reasons = {key: reason for key, reason in tally.failed.items() if not searches.excused(key)}
    made.failed = {f"{_words(known[key])} ({key})": reason for key, reason in reasons.items()}
    made.failed |= {f"{one.setting.words()} (cells without a {one.steps[0]})": str(one.failed) for one in searches.open}
    for key, reason in reasons.items():
        events.add("cell failed", key=key, reason=reason)
    for key, tried in tally.retried.items():
        events.add("cell tried again", key=key, reasons=tried)
    for one in searches.chosen:
        for key in one.answers:
            events.add("searched", key=key, setting=one.setting.words())
    if tally.deaths:
        progress.say(f"cells: {tally.deaths} worker(s) died and were replaced")
    made.deaths = tally.deaths
    progress.say(f"cells: {tally.done} done, {len(reasons)} failed")
    events.add("cells", done=tally.done, failed=len(made.failed), deaths=tally.deaths)
    return made


def _words(config: CellConfig) -> str:
    trial = "trial of " if config.role == "trial" else ""
    return f"{trial}{config.task.task} {config.source} {config.strategy['name']} seed {config.seed}"


def write_plan(out: str, searches: Searches, ended: bool = True) -> None:
    """OUT/plan.json: every cell that the study asks for, so that a report knows what is missing and what is no longer asked for.

    Args:
        ended: False while data or encoders may yet come to stand: a cell without a key then keeps the one that an earlier driver knew.
    """
    rows = list(searches.rows())
    if not ended:
        known = {_called(row): row for row in plan(out) if row["key"]}
        rows = [row if row["key"] else known.get(_called(row), row) for row in rows]
    storage.put(storage.join(out, "plan.json"), json.dumps(rows, indent=1))


def _called(row: Mapping[str, Any]) -> str:
    """What a cell is called before and after its searches have answered."""
    return canonical_json([row.get("asked") or row["options"], *(row[name] for name in SAME if name != "options")])
