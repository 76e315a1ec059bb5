"""The main job: raw images to shards, shards to encoders, encoders to cells, cells to a registered champion and a report.

What waits for what is in cluster.nodes. Every piece of work looks first at what stands in OUT, so running a study again computes only what
is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from base import storage
from base.config import to_yaml
from base.errors import WorkError
from base.paths import revision
from cluster import leakage, observe, plan, stages
from cluster.cells import write_plan
from cluster.changes import changes, held
from cluster.claims import register_claims, register_family
from cluster.events import Events
from cluster.lock import DriverLock
from cluster.mlflow_store import require_server, tracking_uri
from cluster.outs import refuse_other_out, study_at
from cluster.plan import Packed
from cluster.progress import Progress
from cluster.projection import Projection
from cluster.projector import Projector, mlflow_trouble
from cluster.searches import Searches
from cluster.standing import foreseen, standing_corpora, standing_weights
from cluster.study import Study


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


def run(study: Study, progress: Progress | None = None) -> Summary:
    """Run a study to its end.

    Raises:
        RequestError: `out` belongs to another study or another driver, bad raw data, no MLflow server, no cluster or none that can run it.
        WorkError: storage failed. A pretraining or a cell that failed is in the summary.
    """
    progress = progress or Progress()
    uri = tracking_uri(study.out, study.tracking)
    require_server(uri)
    refuse_other_out(study)
    corpora = standing_corpora(study)  # looks at the raw files too: what is wrong with them is found before anything is written
    with DriverLock(study.out) as lock:
        before = held(study.out)
        storage.put(storage.join(study.out, "study.yaml"), to_yaml(study))
        events = Events(study.out)
        events.add("start", revision=revision())
        register_claims(study, events)
        projector = Projector(study.out, study.study, uri)
        try:
            summary = _stages(study, before, corpora, progress, events, projector, uri)
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


def _stages(
    study: Study,
    before: Study | None,
    corpora: dict[str, Packed],
    progress: Progress,
    events: Events,
    projector: Projector,
    uri: str,
) -> Summary:
    from cluster.doctor import require
    from cluster.fit import fits
    from cluster.nodes import Making
    from cluster.session import session

    # A finished study needs no cluster: looking at storage is enough.
    complete = set(corpora) == set(study.data)
    checked = leakage.standing(study, corpora) if complete else None
    weights, missing = standing_weights(study, checked) if checked is not None else (foreseen(study, {}, {}), ["everything"])
    searches = Searches(plan.settings(study, checked or {}, weights))
    register_family(study, searches.rows(), events)
    for line in changes(study, before, checked, searches):
        progress.say(line)
    if not (missing or searches.foreseen or searches.open or searches.ready()):
        leakage.summarise(study, corpora)
        write_plan(study.out, searches)
        progress.say(f"all {searches.kept} cells stand already")
        if study.analyses:
            from cluster.analyses import run_analyses

            run_analyses(study, progress, events)
        return _finish(study, projector, progress, kept=searches.kept)
    if complete:  # what is packed in this run is checked when it is
        fits(study, corpora)
    stages.refuse_other_secrets(study)
    progress.say("starting Ray")
    with session():
        require(study)
        events.add("ray", dashboard=observe.note_dashboard(study.out))
        making = Making(study, uri, progress, events)
        making.run()
    made, failed = making.fanned, making.failed()
    counts = {"kept": making.searches.kept, "new": made.new, "lost": len(made.failed), "restarts": making.restarts, "deaths": made.deaths}
    return _finish(study, projector, progress, failed=failed, **counts)


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
        RequestError: no study there.
    """
    from analysis.evidence import gather
    from cluster.registry import register

    study = study_at(out)
    projection = Projection(out, study.study, tracking_uri(out, tracking or study.tracking))
    projection.update()
    _, champion = register(projection, study)
    projection.write_runs()
    projection.close(ok=True, words=gather(out).answer())
    return len(projection.finished), champion


def require_done(summary: Summary) -> None:
    """Raise when something is missing, each piece of work listed."""
    if summary.failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in summary.failed.items())
        raise WorkError(
            f"{len(summary.failed)} piece(s) of work failed:\n{lines}", hint="with that mended, the same command does what is missing"
        )
