"""The projection of OUT into MLflow. Storage is the truth; this view can be rebuilt from it at any time.

Live view, replay after an outage and `allograft sync OUT` are one function, `project`, idempotent by the tag `allograft.key`.
"""

import json
import os
import threading
import time
from typing import Any

import yaml

from base import paths, storage
from base.errors import AllograftError, RequestError, WorkError
from base.paths import is_url

KEY_TAG = "allograft.key"
PERIOD_S = 15.0
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_TELEMETRY": "true"}


def tracking_uri(out: str, tracking: str) -> str:
    """The MLflow address of a study: its embedded SQLite store, or the server it names."""
    return f"sqlite:///{out}/mlflow.db" if tracking == "sqlite" else tracking


def connect(uri: str) -> Any:
    """An MLflow client of the store.

    Raises:
        RequestError: no server answers there.
    """
    # MLflow's defaults block for minutes when a server is away; nothing is lost here when a call fails, the next round repeats it.
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    import logging

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise RequestError(f"no MLflow server answers at {uri}", where="tracking", hint="mlflow server, or tracking=sqlite") from error
    return client


class Projection:
    """What of one OUT stands in MLflow already; `update` adds what is new."""

    def __init__(self, out: str, study: str, uri: str) -> None:
        self.out, self.study, self.uri = out, study, uri
        self.client = connect(uri)
        self.experiment = self._experiment()
        self.runs: dict[str, str] = {}
        self.finished: set[str] = set()
        self.rows: dict[str, int] = {}
        for run in self._existing():
            key = run.data.tags[KEY_TAG]
            self.runs[key] = run.info.run_id
            if run.info.status == "FINISHED":
                self.finished.add(key)
        self.parent = self._run(f"study:{study}", study, parent=None)

    def update(self) -> None:
        """Bring MLflow up to what storage holds now."""
        for kind in ("pretrain", "cells"):
            root = storage.join(self.out, kind)
            for name in storage.listing(root):
                self._project(kind, storage.join(root, name), name)

    def close(self, ok: bool) -> None:
        """End the study's parent run, with the report and the tables as its artifacts."""
        for name in ("study.yaml", "report/index.html", "report/results.csv"):
            url = storage.join(self.out, name)
            if storage.exists(url):
                self._artifact(self.parent, url, name)
        self.client.set_terminated(self.parent, "FINISHED" if ok else "FAILED")

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.study)
        if found is not None:
            return str(found.experiment_id)
        location = f"{self.out}/artifacts" if self.uri.startswith("sqlite:") else None
        return str(self.client.create_experiment(self.study, artifact_location=location))

    def _existing(self) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], max_results=1000, page_token=token)
            found += [run for run in page if KEY_TAG in run.data.tags]
            token = page.token
            if not token:
                return found

    def _run(self, key: str, name: str, parent: str | None, tags: dict[str, str] | None = None) -> str:
        if key not in self.runs:
            given = {KEY_TAG: key, "mlflow.runName": name, "allograft.study": self.study, **(tags or {})}
            if parent:
                given["mlflow.parentRunId"] = parent
            self.runs[key] = self.client.create_run(self.experiment, tags=given, run_name=name).info.run_id
        return self.runs[key]

    def _project(self, kind: str, url: str, folder: str) -> None:
        key = folder.rsplit("-", 1)[-1]
        if key in self.finished or not storage.exists(storage.join(url, "config.yaml")):
            return
        config = yaml.safe_load(storage.read_bytes(storage.join(url, "config.yaml")))
        done = storage.exists(storage.join(url, "result.json"))
        if kind == "pretrain":
            name, tags = f"{config['name']}-seed{config['seed']}", {"allograft.kind": "pretrain"}
        else:
            strategy = config["strategy"]["name"]
            name = f"{config['task']['task']} {config['source']} {strategy} seed{config['seed']}"
            tags = {"allograft.kind": "control" if config.get("shuffle_labels") else "cell"}
        run = self._run(key, name, self.parent, tags)
        self._metrics(run, key, url)
        if done:
            self._finish(kind, run, key, url, config, storage.read_json(storage.join(url, "result.json")))

    def _metrics(self, run: str, key: str, url: str) -> None:
        from mlflow.entities import Metric

        path = storage.join(url, "metrics.jsonl")
        if not storage.exists(path):
            return
        rows = [json.loads(line) for line in storage.read_bytes(path).splitlines()]
        fresh = rows[self.rows.get(key, 0) :]
        metrics = [
            # The row's own clock and step make a replay identical, and MLflow keeps identical points once.
            Metric(name, float(value), int(row.get("seconds", 0) * 1000), int(row.get("step", row.get("epoch", 0))))
            for row in fresh
            for name, value in row.items()
            if isinstance(value, int | float) and name not in {"step", "steps"} and value == value
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run, metrics=metrics[start : start + 1000])
        self.rows[key] = len(rows)

    def _finish(self, kind: str, run: str, key: str, url: str, config: dict[str, Any], result: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params = _flat(config)
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for row in result.get("metrics", []):
            label = f".{row['class']}" if row["class"] else ""
            if row["value"] is not None:
                numbers[f"{row['split']}_{row['metric']}{label}"] = row["value"]
        tags = {
            "allograft.encoder_sha256": result.get("encoder_sha256") or "",
            "mlflow.source.git.commit": result.get("revision", paths.revision()),
            "health": str(result.get("health", "")),
            "allograft.own_source": str(config.get("own_source", False)).lower(),
            "allograft.lineage": json.dumps(result.get("lineage", [])),
        }
        source_run = self._run_of_encoder(result.get("encoder_sha256")) if kind == "cells" else None
        if source_run:
            tags["allograft.encoder_run"] = source_run
        stamp = int(float(result.get("finished", 0)) * 1000)
        self.client.log_batch(
            run,
            metrics=[Metric(_name(name), float(value), stamp, 0) for name, value in numbers.items() if value == value],
            params=[Param(name, value) for name, value in params.items()],
            tags=[RunTag(name, value) for name, value in tags.items() if value],
        )
        self._datasets(run, kind, config)
        if kind == "pretrain":
            for file in storage.listing(storage.join(url, "export")):
                self._artifact(run, storage.join(url, "export", file), f"encoder/{file}")
        self._artifact(run, storage.join(url, "result.json"), "result.json")
        self.client.set_terminated(run, "FINISHED")
        self.finished.add(key)

    def _run_of_encoder(self, sha256: str | None) -> str | None:
        for name in storage.listing(storage.join(self.out, "pretrain")):
            path = storage.join(self.out, "pretrain", name, "result.json")
            if sha256 and storage.exists(path) and storage.read_json(path).get("encoder_sha256") == sha256:
                return self.runs.get(name.rsplit("-", 1)[-1])
        return None

    def _datasets(self, run: str, kind: str, config: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if kind == "pretrain":
            used = [(ref["dataset"], ref["digest"], ref["shards"], f"pretrain on {ref['split']}") for ref in config["data"]]
        else:
            used = [(config["task"]["dataset"], config["manifest_digest"], config["shards"], "fine-tuning")]
        self.client.log_inputs(
            run,
            datasets=[
                # MLflow allows 36 characters; the whole digest is among the run's parameters.
                DatasetInput(
                    Dataset(name=name, digest=digest[:36], source_type="webdataset", source=json.dumps({"url": url})),
                    [InputTag("mlflow.data.context", context)],
                )
                for name, digest, url, context in used
            ],
        )

    def _artifact(self, run: str, url: str, path: str) -> None:
        import tempfile

        folder, _, name = path.rpartition("/")
        if not is_url(url):
            self.client.log_artifact(run, url, folder or None)
            return
        with tempfile.TemporaryDirectory() as temporary:
            local = os.path.join(temporary, name)
            storage.get_file(url, local)
            self.client.log_artifact(run, local, folder or None)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[_name(f"{prefix}{name}")] = str(value)[:6000]
    return found


def _name(text: str) -> str:
    # MLflow's alphabet for names.
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in text)


class Projector:
    """One thread of the driver that projects OUT into MLflow every few seconds while the study runs.

    An MLflow that goes away in the middle costs nothing: the next round, or the last one, makes up for it.
    """

    def __init__(self, out: str, study: str, uri: str) -> None:
        self._stop = threading.Event()
        self._made = threading.Event()
        self._arguments = (out, study, uri)
        self._projection: Projection | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-projection", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._projection = Projection(*self._arguments)
        except BaseException as error:  # noqa: BLE001  handed to the driver's thread, which raises it
            self._failure = error
        finally:
            self._made.set()
        while self._projection and not self._stop.wait(PERIOD_S):
            self._failure = _attempt(self._projection)

    def finish(self, ok: bool) -> Projection:
        """A last, complete projection in the caller's thread.

        Raises:
            WorkError: MLflow could not be reached; everything is safe in OUT.
        """
        self._stop.set()
        self._thread.join()
        if self._projection is None:
            if isinstance(self._failure, AllograftError):
                raise self._failure
            raise WorkError(f"MLflow could not be opened: {self._failure}", where=self._arguments[2]) from self._failure
        for pause_s in (1, 3, None):
            failure = _attempt(self._projection)
            if failure is None:
                self._projection.close(ok)
                return self._projection
            if pause_s:
                time.sleep(pause_s)
        hint = f"results are safe; allograft sync {self._arguments[0]}"
        raise WorkError(f"MLflow could not be written: {failure}", where=self._arguments[2], hint=hint)


def _attempt(projection: Projection) -> BaseException | None:
    from mlflow.exceptions import MlflowException

    try:
        projection.update()
    except (MlflowException, OSError) as error:
        return error
    return None
