"""The main job: raw images to shards, shards to encoders, encoders to cells, cells to a registered champion and a report.

Every stage looks first at what stands in OUT, so running a study again computes only what is missing.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from base import storage
from base.config import to_yaml
from base.errors import RequestError, WorkError
from base.paths import is_url, revision, timestamp
from cluster import plan
from cluster.lock import DriverLock
from cluster.plan import Corpus, Weights
from cluster.progress import Progress, minutes
from cluster.projector import Projector
from cluster.study import Study
from cluster.tracking import Projection, require_server, tracking_uri
from finetune.cell import CellConfig


@dataclass(frozen=True)
class Summary:
    """What a run of a study did."""

    cells_kept: int
    cells_new: int
    failed: dict[str, str]
    restarts: int
    deaths: int
    versions: dict[str, str]
    champion: str | None
    report: str
    answer: str


def run(study: Study, progress: Progress | None = None) -> Summary:
    """Run a study to its end.

    Raises:
        RequestError: `out` belongs to another study or another driver, bad raw data, no cluster, no MLflow server.
        WorkError: a pretraining failed, or storage did.
    """
    progress = progress or Progress()
    uri = tracking_uri(study.out, study.tracking)
    require_server(uri)
    _claim(study)
    with DriverLock(study.out):
        storage.put(storage.join(study.out, "study.yaml"), to_yaml(study))
        events = Events(study.out)
        events.add("start", revision=revision())
        projector = Projector(study.out, study.study, uri)
        try:
            summary = _stages(study, progress, events, projector, uri)
        except BaseException as error:
            events.add("stop", error=f"{type(error).__name__}: {error}")
            raise
        events.add("end", failed=summary.failed)
    return summary


def _stages(study: Study, progress: Progress, events: "Events", projector: Projector, uri: str) -> Summary:
    from cluster.session import session

    corpora = standing_corpora(study)
    restarts = deaths = kept = new = 0
    failed: dict[str, str] = {}
    # A finished study needs no cluster: looking at storage is enough.
    complete = set(corpora) == set(study.data)
    weights, missing = standing_weights(study, corpora, uri) if complete else ({}, ["everything"])
    todo = [config for config in plan.cells(study, corpora, weights) if not _done(config.out)] if not missing else [None]
    if missing or todo:
        with session():
            progress.say("Ray is up")
            corpora = _pack(study, progress, events)
            weights, restarts = _pretrain(study, corpora, uri, progress, events)
            configs = list(plan.cells(study, corpora, weights))
            _write_plan(study.out, configs)
            kept, new, failed, deaths = _cells(study, configs, progress, events)
    else:
        configs = list(plan.cells(study, corpora, weights))
        _write_plan(study.out, configs)
        kept = len(configs)
        progress.say(f"all {kept} cells stand already")
    return _finish(study, projector, progress, kept=kept, new=new, failed=failed, restarts=restarts, deaths=deaths)


def _finish(study: Study, projector: Projector, progress: Progress, **counts: Any) -> Summary:
    from analysis.evidence import gather
    from analysis.report import report

    ok = not counts["failed"]
    projection, versions, champion, trouble = _registered(study, projector)
    evidence = gather(study.out)
    path, words = report(study.out, evidence), evidence.answer()
    progress.say("report written")
    if projection is not None:
        trouble = _tried(lambda: projection.close(ok, words), study.out, projection.uri) or trouble
    if trouble is not None:
        raise trouble
    return Summary(
        cells_kept=counts["kept"],
        cells_new=counts["new"],
        failed=counts["failed"],
        restarts=counts["restarts"],
        deaths=counts["deaths"],
        versions=versions,
        champion=champion,
        report=path,
        answer=words,
    )


def _registered(study: Study, projector: Projector) -> tuple[Projection | None, dict[str, str], str | None, WorkError | None]:
    """The last projection and the registry; an MLflow that is away is handed back as an error, since the report does not depend on it."""
    from cluster.registry import register

    try:
        projection = projector.finish()
    except WorkError as error:
        return None, {}, None, error
    made: list[tuple[dict[str, str], str | None]] = []
    trouble = _tried(lambda: made.append(register(projection, study)), study.out, projection.uri)
    versions, champion = made[0] if made else ({}, None)
    storage.put(storage.join(study.out, "tracking.json"), json.dumps(projection.runs, indent=1, sort_keys=True))
    return projection, versions, champion, trouble


def _tried(act: Callable[[], object], out: str, uri: str) -> WorkError | None:
    from mlflow.exceptions import MlflowException

    try:
        act()
    except MlflowException as error:
        return WorkError(f"MLflow could not be written: {error}", where=uri, hint=f"results and report are safe; allograft sync {out}")
    return None


def _claim(study: Study) -> None:
    """Refuse an `out` that holds another study, before anything is written there."""
    import yaml

    path = storage.join(study.out, "study.yaml")
    if storage.exists(path):
        held = yaml.safe_load(storage.read_bytes(path)).get("study")
        if held != study.study:
            raise RequestError(f"this folder holds the study '{held}', not '{study.study}'", where=study.out, hint="give another out=")
    elif not is_url(study.out):
        foreign = [name for name in storage.listing(study.out) if name not in {"shards", "driver.lock"}]
        if foreign:
            raise RequestError(f"not empty and not a study ({', '.join(foreign[:3])})", where=study.out, hint="give another out=")


def _done(url: str) -> bool:
    return storage.exists(storage.join(url, "result.json"))


def standing_corpora(study: Study) -> dict[str, Corpus]:
    """The datasets whose shards are complete already and were packed from the very raw files that the study names.

    Raises:
        RequestError: shards or raw files that the study names are not there, or the raw files are not as their card says.
    """
    from shards import manifest, pack
    from shards.card import load_card

    found = {}
    for name, entry in study.data.items():
        url = shards_url(study, name)
        if entry.shards and not storage.exists(storage.join(url, manifest.MANIFEST)):
            hint = f"allograft pack {name} RAW --out {url}"
            raise RequestError("no packed dataset here", where=f"data.{name}.shards = {url}", hint=hint)
        jobs = pack.plan(load_card(name), entry.raw) if entry.raw else []
        if storage.exists(storage.join(url, manifest.MANIFEST)):
            read = manifest.read(url)
            if entry.shards or read.raw_digest == jobs[0].origin.raw_digest:
                found[name] = Corpus(url, read)
    return found


def shards_url(study: Study, dataset: str) -> str:
    """Where a dataset's shards are, or will be."""
    return study.data[dataset].shards or storage.join(study.out, "shards", dataset)


def standing_weights(study: Study, corpora: dict[str, Corpus], uri: str) -> tuple[dict[str, list[Weights]], list[str]]:
    """The encoders that stand already, and the names of the runs that are missing."""
    from cluster.sources import read_weights

    made: dict[str, list[Weights]] = {}
    missing: list[str] = []
    for entry in study.pretrain:
        for seed in entry.seeds:
            start = _start(entry.start_from, seed, made, study, uri)
            if start is None and entry.start_from != "random":
                missing.append(entry.name)
                continue
            config = plan.pretrain_config(study, entry, seed, corpora, start)
            if not _done(config.out):
                missing.append(entry.name)
                continue
            made.setdefault(entry.name, []).append(read_weights(storage.join(config.out, "export"), seed))
    return _by_source(study, made, uri, missing), missing


def _start(source: str, seed: int, made: dict[str, list[Weights]], study: Study, uri: str) -> Weights | None:
    from cluster.sources import external

    if source == "random":
        return None
    if not source.startswith("pretrain:"):
        return external(source, study.out, uri)
    group = made.get(source.removeprefix("pretrain:"), [])
    # A chain follows its seed; a single earlier run serves all seeds.
    same = [found for found in group if found.seed == seed] or group[:1]
    return same[0] if same else None


def _by_source(study: Study, made: dict[str, list[Weights]], uri: str, missing: list[str]) -> dict[str, list[Weights]]:
    from cluster.sources import external

    found: dict[str, list[Weights]] = {}
    for source in study.cells.sources if study.cells else []:
        if source.source.startswith("pretrain:"):
            found[source.name] = made.get(source.source.removeprefix("pretrain:"), [])
        elif source.source != "random" and not missing:
            found[source.name] = [external(source.source, study.out, uri)]
    return found


def _pack(study: Study, progress: Progress, events: "Events") -> dict[str, Corpus]:
    from cluster.pack import pack_on_ray
    from shards import manifest
    from shards.card import load_card

    corpora: dict[str, Corpus] = {}
    for name, entry in study.data.items():
        if entry.raw is None:
            assert entry.shards is not None
            corpora[name] = Corpus(entry.shards, manifest.read(entry.shards))
            continue
        url = shards_url(study, name)
        began = time.monotonic()
        made = pack_on_ray(load_card(name), entry.raw, url, partial(_show_shards, progress, name))
        corpora[name] = Corpus(url, made)
        counts = ", ".join(f"{split} {count:,}" for split, count in made.counts.items())
        quarantined = f", {made.quarantined} quarantined (see {url}/quarantine.jsonl)" if made.quarantined else ""
        progress.say(f"pack {name}: {counts}{quarantined}, {minutes(time.monotonic() - began)}")
        events.add("packed", dataset=name, digest=made.digest, quarantined=made.quarantined)
    return corpora


def _write_plan(out: str, configs: list[CellConfig]) -> None:
    """OUT/plan.json: every cell that the study asks for, so that a report knows what is missing and what is no longer asked for."""
    axes = ("key", "architecture", "source", "source_seed", "fraction", "resolution", "seed", "shuffle_labels", "own_source")
    rows = [
        {**{name: getattr(config, name) for name in axes}, "strategy": config.strategy["name"], "task": config.task.task}
        for config in configs
    ]
    storage.put(storage.join(out, "plan.json"), json.dumps(rows, indent=1))


def _show_shards(progress: Progress, name: str, done: int, total: int) -> None:
    progress.line(f"pack {name}: {done}/{total} shards")


def _pretrain(
    study: Study, corpora: dict[str, Corpus], uri: str, progress: Progress, events: "Events"
) -> tuple[dict[str, list[Weights]], int]:
    from cluster.pretraining import pretrain_on_ray
    from cluster.sources import read_weights

    made: dict[str, list[Weights]] = {}
    restarts = 0
    for entry in study.pretrain:
        for seed in entry.seeds:
            start = _start(entry.start_from, seed, made, study, uri)
            config = plan.pretrain_config(study, entry, seed, corpora, start)
            label = f"pretrain {entry.name}" + (f" seed {seed}" if len(entry.seeds) > 1 else "")
            if _done(config.out):
                progress.say(f"{label}: stands already")
            else:
                began = time.monotonic()
                with progress.follow(storage.join(config.out, "metrics.jsonl"), label):
                    result = pretrain_on_ray(config, study.resources)
                restarts += result["restarts"]
                died = f", finished after {result['restarts']} restart(s) of its workers" if result["restarts"] else ""
                took = minutes(time.monotonic() - began)
                progress.say(f"{label}: {result['steps']} steps, {result['img_per_s']:.0f} img/s, {result['health']}, {took}{died}")
                events.add("pretrained", name=entry.name, seed=seed, key=config.key, restarts=result["restarts"])
            made.setdefault(entry.name, []).append(read_weights(storage.join(config.out, "export"), seed))
    return _by_source(study, made, uri, []), restarts


def _cells(study: Study, configs: list[CellConfig], progress: Progress, events: "Events") -> tuple[int, int, dict[str, str], int]:
    from cluster.fanout import Tally, run_cells

    todo = [config for config in configs if not _done(config.out)]
    asked = {config.key for config in configs}
    idle = [key for key in storage.listing(storage.join(study.out, "cells")) if key not in asked]
    progress.say(f"cells: {len(configs) - len(todo)} kept, {len(todo)} new, {len(idle)} no longer asked for")

    def show(tally: Tally) -> None:
        counts = f"{tally.done} done, {tally.running} running, {len(tally.failed)} failed, {tally.left} left"
        progress.line(f"cells: {counts}, to go {minutes(tally.eta_s)}", last=tally.done + len(tally.failed) == tally.total)

    tally = run_cells(todo, study.resources, show)
    names = {config.key: f"{config.task.task} {config.source} {config.strategy['name']} seed {config.seed}" for config in todo}
    failed = {f"{names[key]} ({key})": reason for key, reason in tally.failed.items()}
    for key, reason in tally.failed.items():
        events.add("cell failed", key=key, reason=reason)
    if tally.deaths:
        progress.say(f"cells: {tally.deaths} worker(s) died and were replaced")
    events.add("cells", done=tally.done, failed=len(failed), deaths=tally.deaths)
    return len(configs) - len(todo), tally.done, failed, tally.deaths


class Events:
    """OUT/events.jsonl: what the drivers of this study did, and when."""

    def __init__(self, out: str) -> None:
        self.url = storage.join(out, "events.jsonl")
        self.text = storage.read_bytes(self.url).decode() if storage.exists(self.url) else ""

    def add(self, event: str, **facts: Any) -> None:
        """Append one event; the file is small and written whole, since object stores cannot append."""
        self.text += json.dumps({"time": timestamp(), "event": event, **facts}) + "\n"
        storage.put(self.url, self.text)


def sync(out: str, tracking: str | None = None) -> int:
    """Rebuild MLflow from storage: runs, registry, champion.

    Returns:
        The number of finished runs in the view.

    Raises:
        RequestError: no study there.
    """
    import yaml

    from analysis.report import answer
    from base.config import parse
    from cluster.registry import register

    path = storage.join(out, "study.yaml")
    if not storage.exists(path):
        raise RequestError("no study here (no study.yaml)", where=out)
    # A folder may have been moved or copied since.
    study = parse(yaml.safe_load(storage.read_bytes(path)), Study, path).model_copy(update={"out": out})
    projection = Projection(out, study.study, tracking_uri(out, tracking or study.tracking))
    projection.update()
    register(projection, study)
    storage.put(storage.join(out, "tracking.json"), json.dumps(projection.runs, indent=1, sort_keys=True))
    projection.close(ok=True, words=answer(out))
    return len(projection.finished)


def require_done(summary: Summary) -> None:
    """Raise when cells are missing, each listed."""
    if summary.failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in summary.failed.items())
        raise WorkError(f"{len(summary.failed)} cell(s) failed:\n{lines}", hint="the same command again tries them again")
