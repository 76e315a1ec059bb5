"""The main job: raw images to shards, shards to encoders, encoders to cells, cells to a registered champion and a report.

Every stage looks first at what stands in OUT, so running a study again computes only what is missing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from base import storage
from base.config import to_yaml
from base.errors import RequestError, WorkError
from base.paths import is_url, revision
from cluster import leakage, plan, stages
from cluster.claims import register_claims
from cluster.events import Events
from cluster.lock import DriverLock
from cluster.plan import Corpus
from cluster.progress import Progress
from cluster.projector import Projector
from cluster.searches import Searches
from cluster.standing import done, standing_corpora, standing_weights
from cluster.study import Study
from cluster.tracking import Projection, require_server, tracking_uri


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
    low: str  # what is under its floor, in words


def run(study: Study, progress: Progress | None = None) -> Summary:
    """Run a study to its end.

    Raises:
        RequestError: `out` belongs to another study or another driver, bad raw data, no cluster, no MLflow server.
        WorkError: a pretraining failed, or storage did.
    """
    progress = progress or Progress()
    uri = tracking_uri(study.out, study.tracking)
    require_server(uri)
    claim(study)
    corpora = standing_corpora(study)  # looks at the raw files too: what is wrong with them is found before anything is written
    with DriverLock(study.out):
        storage.put(storage.join(study.out, "study.yaml"), to_yaml(study))
        events = Events(study.out)
        events.add("start", revision=revision())
        register_claims(study, events)
        projector = Projector(study.out, study.study, uri)
        try:
            summary = _stages(study, corpora, progress, events, projector, uri)
        except BaseException as error:
            events.add("stop", error=f"{type(error).__name__}: {error}")
            raise
        events.add("end", failed=summary.failed)
    return summary


def _stages(study: Study, corpora: dict[str, Corpus], progress: Progress, events: Events, projector: Projector, uri: str) -> Summary:
    from cluster.fit import fits
    from cluster.session import session

    restarts = deaths = kept = new = 0
    failed: dict[str, str] = {}
    # A finished study needs no cluster: looking at storage is enough.
    complete = set(corpora) == set(study.data)
    checked = leakage.standing(study, corpora) if complete else None
    weights, missing = standing_weights(study, checked, uri) if checked is not None else ({}, ["everything"])
    searches = Searches(plan.settings(study, checked, weights)) if checked is not None and not missing else Searches([])
    if missing or searches.open or any(not done(config.out) for config in searches.cells):
        if complete:  # what is packed in this run is checked when it is
            fits(study, corpora)
        progress.say("starting Ray")
        with session():
            corpora = leakage.compare(study, stages.pack(study, progress, events), progress, events)
            weights, restarts = stages.pretrain(study, corpora, uri, progress, events)
            searches = Searches(plan.settings(study, corpora, weights))
            stages.write_plan(study.out, searches)
            kept, new, failed, deaths = stages.cells(study, searches, progress, events)
            stages.write_plan(study.out, searches)
    else:
        leakage.summarise(study, corpora)
        stages.write_plan(study.out, searches)
        kept = len(searches.cells)
        progress.say(f"all {kept} cells stand already")
    return _finish(study, projector, progress, kept=kept, new=new, failed=failed, restarts=restarts, deaths=deaths)


def _finish(study: Study, projector: Projector, progress: Progress, **counts: Any) -> Summary:
    from analysis.evidence import gather
    from analysis.report import floors, report, under_floor

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
        low=under_floor(evidence, floors(evidence)[0]),
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


def claim(study: Study) -> None:
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
