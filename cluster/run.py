"""The main job: raw images to shards, shards to encoders, encoders to cells, cells to a registered champion and a report.

What waits for what is in cluster.nodes. Every piece of work looks first at what stands in OUT, so running a study again computes only what
is missing.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from analysis.results import damaged
from base import storage
from base.config import to_yaml
from base.errors import WorkError
from base.paths import is_url, revision
from cluster import leakage, observe, plan, stages
from cluster.cells import write_plan
from cluster.changes import changes, held
from cluster.claims import register_claims, register_family
from cluster.events import Events
from cluster.graph import NOT_TRIED
from cluster.lock import DriverLock
from cluster.mlflow_store import require_server, tracking_uri
from cluster.outs import FILE, refuse_other_out, study_at
from cluster.plan import Packed
from cluster.progress import Progress
from cluster.projection import Projection
from cluster.projector import Projector, mlflow_trouble
from cluster.searches import Searches
from cluster.standing import foreseen, standing_corpora, standing_sources, standing_weights
from cluster.study import Study
from pretrain.run import PretrainConfig
from shards.splitting import count


@dataclass(frozen=True)
class Summary:
    """What a run of a study did."""

    cells_kept: int
    cells_new: int
    cells_failed: int
    failed: dict[str, str]  # reasons, of cells and of everything else
    restarts: int
    deaths: int
    versions: dict[str, str]
    champion: str | None
    report: str
    answer: str


def run(study: Study, progress: Progress | None = None, *, typed: bool = False) -> Summary:
    """Run a study to its end. What can be refused before data are packed is refused before anything is written.

    Args:
        typed: it is that of a command without a study file, in whose spelling keys are named.

    Raises:
        RequestError: `out` belongs to another study or another driver, bad raw data, no MLflow server, no cluster or none that can run it.
        WorkError: storage failed. A pretraining or a cell that failed is in the summary.
    """
    progress = progress or Progress()
    refuse_other_out(study)
    uri = tracking_uri(study.out, study.tracking)
    require_server(uri)
    remove_damaged(study.out, progress)
    corpora = standing_corpora(study)
    complete = set(corpora) == set(study.data)
    checked = leakage.standing(study, corpora) if complete else None
    unknown = foreseen(study, {}, standing_sources(study)), ["everything"]
    weights, missing = unknown if checked is None else standing_weights(study, checked)
    searches = Searches(plan.settings(study, checked or {}, weights))
    stands = not (missing or searches.foreseen or searches.open or searches.ready())
    if not stands:
        if complete:  # what is packed in this run is checked when it is
            from cluster.fit import fits

            fits(study, corpora)
        stages.refuse_other_secrets(study)

    before = held(study.out)

    def work(events: Events, lock: DriverLock) -> dict[str, Any]:
        register_claims(study, events)
        register_family(study, searches.rows(), events)
        for line in changes(study, before, checked, searches, typed=typed):
            progress.say(line)
        return _standing(study, corpora, searches, progress, events) if stands else _made(study, uri, progress, events, lock)

    # A finished study needs no cluster: looking at storage is enough.
    return _drive(study, uri, progress, work, cluster=not stands, file=to_yaml(study))


def remove_damaged(out: str, progress: Progress) -> None:
    """Results that are no JSON are taken away, so that they are computed again.

    Only files can be cut in half: an object store's PUT is whole by itself, and asking for all of them would take its time.
    """
    for url in [] if is_url(out) else damaged(out):
        storage.remove(url)
        progress.say(f"{url} was damaged and is removed: computed again")


def go_on(study: Study, config: PretrainConfig, progress: Progress | None = None) -> Summary:
    """A pretraining that was begun, by its own configuration, to its end; of the study around it nothing else. See cluster.resume.

    Raises:
        RequestError: another driver works on this `out`, no MLflow server, no cluster or none that can run it.
        WorkError: the run failed, or storage did.
    """
    progress = progress or Progress()
    uri = tracking_uri(study.out, study.tracking)
    require_server(uri)

    def work(events: Events, lock: DriverLock) -> dict[str, Any]:
        _, restarts = stages.pretrain(study, config, f"pretrain {config.name}", progress, events)
        return {"kept": 0, "restarts": restarts}

    return _drive(study, uri, progress, work, cluster=True)


def _drive(
    study: Study,
    uri: str,
    progress: Progress,
    work: Callable[[Events, DriverLock], dict[str, Any]],
    *,
    cluster: bool,
    file: str | None = None,
) -> Summary:
    """The frame of all work: the lock, Ray where it needs a cluster, and once that is there what is written; then the report.

    Args:
        work: returns what `_finish` is told of it.
        file: what is to stand in OUT/study.yaml; None leaves it.
    """
    from cluster.doctor import require
    from cluster.session import session

    with DriverLock(study.out) as lock, ExitStack() as ray:
        if cluster:
            progress.say("starting Ray")
            ray.enter_context(session())
            require(study)
        if file is not None:  # first: a folder without it is taken for another's
            storage.put(storage.join(study.out, FILE), file)
        events = Events(study.out)
        events.add("start", revision=revision())
        projector = Projector(study.out, study.study, uri)
        try:
            if cluster:
                events.add("ray", dashboard=observe.note_dashboard(study.out))
            told = work(events, lock)
            ray.close()  # the report needs no cluster
            summary = _finish(study, projector, progress, **told)
        except BaseException as error:
            progress.close()
            if lock.lost:  # all that is there is the other driver's
                raise
            try:
                events.add("stop", error=f"{type(error).__name__}: {error}")
            finally:
                projector.stop("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        events.add("end", failed=summary.failed)
    return summary


def _standing(study: Study, corpora: dict[str, Packed], searches: Searches, progress: Progress, events: Events) -> dict[str, Any]:
    """Of a study all of whose work stands, what follows from it."""
    leakage.summarise(study, corpora)
    write_plan(study.out, searches)
    progress.say(f"all {searches.kept} cells stand already" if study.cells else "all of it stands already")
    if study.analyses:
        from cluster.analyses import run_analyses

        run_analyses(study, progress, events)
    return {"kept": searches.kept}


def _made(study: Study, uri: str, progress: Progress, events: Events, lock: DriverLock) -> dict[str, Any]:
    """What is missing, made on Ray."""
    from cluster.nodes import Making

    making = Making(study, uri, progress, events, lambda: lock.lost)
    making.run()
    made = making.fanned
    counts = {"kept": making.searches.kept, "new": made.new, "lost": len(made.failed), "restarts": making.restarts, "deaths": made.deaths}
    return {"failed": making.failed(), **counts}


def _finish(study: Study, projector: Projector, progress: Progress, failed: dict[str, str] | None = None, **counts: int) -> Summary:
    from analysis.evidence import gather
    from analysis.report import report

    projection, versions, champion, trouble = _registered(study, projector)
    evidence = gather(study.out)
    path, words = report(study.out, evidence), evidence.answer()
    progress.say("report written")
    if projection is not None:
        trouble = _tried(lambda: projection.close(not failed, words), study.out, projection.uri) or trouble
    if trouble is not None:
        raise trouble
    return Summary(
        cells_kept=counts["kept"],
        cells_new=counts.get("new", 0),
        cells_failed=counts.get("lost", 0),
        failed=failed or {},
        restarts=counts.get("restarts", 0),
        deaths=counts.get("deaths", 0),
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
    projection.write_runs()
    return projection, versions, champion, trouble


def _tried(act: Callable[[], object], out: str, uri: str) -> WorkError | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001, raised once the report is written
        return mlflow_trouble(error, out, uri)
    return None


def sync(out: str, tracking: str | None = None) -> tuple[int, str | None]:
    """Rebuild MLflow from storage: runs, registry, champion.

    Returns:
        The number of finished runs in the view, and the champion in words.

    Raises:
        RequestError: no study there, or a driver at work in it.
    """
    from analysis.evidence import gather
    from cluster.registry import register

    study = study_at(out)
    DriverLock(out).refuse()  # which brings its own runs into MLflow
    projection = Projection(out, study.study, tracking_uri(out, tracking or study.tracking))
    projection.update()
    _, champion = register(projection, study)
    projection.write_runs()
    with gather(out) as evidence:
        projection.close(ok=None, words=evidence.answer())
    return len(projection.finished), champion


def require_done(summary: Summary) -> None:
    """Raise when something is missing, each piece of work listed."""
    if summary.failed:
        failed = [name for name, reason in summary.failed.items() if not reason.startswith(NOT_TRIED)]
        rest = f", {len(summary.failed) - len(failed)} not tried" if len(failed) < len(summary.failed) else ""
        lines = "\n".join(f"  {name}: {re.sub(f'^({re.escape(name)}: )+', '', reason)}" for name, reason in summary.failed.items())
        raise WorkError(
            f"{count(len(failed), 'piece')} of work failed{rest}:\n{lines}", hint="with that mended, the same command does what is missing"
        )
