"""The projection of OUT into MLflow. Storage is the truth; this view can be rebuilt from it at any time.

projection = Projection(out, study, uri)
projection.update()                       # what is new; live view, replay after an outage and `allograft sync OUT` are this one call
projection.close(ok=True, words=answer)   # the report, and what encoders reached

Idempotent by the tag `allograft.key`.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from analysis.diary import RUNNING, Ending, endings, failures
from analysis.results import Cell, as_asked, planned, read_json, read_study
from base import storage
from base.paths import is_url
from cluster import facts, pages, showcase
from cluster.mlflow_store import connect

KEY_TAG = "allograft.key"
SHA_TAG = "allograft.encoder_sha256"
REASON_TAG = "allograft.reason"  # why a run ended early
LONGEST = 5000  # letters of a reason; MLflow takes 8,000
LARGEST = 1000  # entries that MLflow takes in a request
WRITERS = 8  # requests at a time, where a server takes them


class Projection:
    """What of one OUT stands in MLflow already; `update` adds what is new."""

    def __init__(self, out: str, study: str, uri: str) -> None:
        self.out, self.study, self.uri = out, study, uri
        self.client = connect(uri)
        self.experiment = self._experiment()
        self.runs: dict[str, str] = {}
        self.began: dict[str, int] = {}
        self.finished: set[str] = set()
        self.standing: dict[str, Ending] = {}  # of every run, as MLflow has it
        self.rows: dict[str, int] = {}  # that stand, by key or by file
        self.dashboard = b""
        self.encoders: dict[str, str] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.doubted = False
        self._recall()
        self.parent = self._run(f"study:{study}", study, parent=None)

    def update(self) -> None:
        """Bring MLflow up to what storage holds now."""
        if self.doubted:
            self._recall()
        self._nodes()
        self.pretrainings()
        root, failed = storage.join(self.out, "cells"), failures(self.out)
        missing = [key for key in storage.listing(root) if key not in self.finished]
        # A server and a store answer several at a time; SQLite has one writer.
        with ThreadPoolExecutor(1 if self.uri.startswith("sqlite:") else WRITERS) as pool:
            for _ in pool.map(lambda key: self._cell(storage.join(root, key), key, failed.get(key)), missing):
                pass

    def pretrainings(self) -> None:
        """The study's own run and those of its pretrainings, as the diary says that they stand."""
        ended, root = endings(self.out), storage.join(self.out, "pretrain")
        if ended.get("") == RUNNING:
            self._stand(self.parent, f"study:{self.study}", RUNNING)
        for name in storage.listing(root):
            key = name.rsplit("-", 1)[-1]
            self._pretraining(storage.join(root, name), key, ended.get(key, RUNNING))

    def close(self, ok: bool | None, words: str = "") -> None:
        """End the study's parent run, with the report and the tables as its artifacts and the answer as its description.

        Args:
            ok: whether nothing failed; None where nobody works on it any more. Where the diary says how the study ended, that counts.
        """
        self._describe(words)
        for name in ("study.yaml", "report/index.html", "report/results.csv", "report/significance.csv"):
            url = storage.join(self.out, name)
            if storage.exists(url):
                self._artifact(self.parent, url, name)
        showcase.show(self.client, self.out, self.parent, self.encoders, self.cells())
        told = endings(self.out).get("", RUNNING)
        unended = "KILLED" if ok is None else "FINISHED" if ok else "FAILED"
        self.end(unended if told == RUNNING else told.status)

    def end(self, status: str) -> None:
        """The study's run gets its status."""
        self.client.set_terminated(self.parent, status)

    def write_runs(self) -> None:
        """OUT/tracking.json: the run of each key, for the report's tables."""
        storage.put(storage.join(self.out, "tracking.json"), json.dumps(self.runs, indent=1, sort_keys=True))

    def cells(self) -> dict[str, dict[str, Any]]:
        """Results by key of the finished cells that the present plan asks for, each read once: on an object store each is a request."""
        asked, root = planned(self.out), storage.join(self.out, "cells")
        keys = [key for key in storage.listing(root) if key in self.finished and (key in asked or not asked)]
        missing = [key for key in keys if key not in self.results]
        with ThreadPoolExecutor(WRITERS) as pool:
            read = pool.map(lambda key: read_json(storage.join(root, key, "result.json")), missing)
            self.results.update({key: result for key, result in zip(missing, read, strict=True) if result})
        return as_asked(self.out, {key: self.results[key] for key in keys if key in self.results})

    def _describe(self, words: str) -> None:
        """What its cells reached, on the run of each encoder, and the pages on which runs are compared."""
        from mlflow.entities import Metric

        from cluster.sources import baseline

        # The same cells as in the report, and its word on exposed ones.
        held, exposed = list(self.cells().values()), str(read_study(self.out).get("exposed"))
        random = baseline(Cell(storage.join(self.out, "cells", result["key"]), result) for result in held)
        reached = {
            run: facts.downstream([result for result in held if result["encoder_sha256"] == sha256], held, random, exposed)
            for sha256, run in self.encoders.items()
        }
        for run, numbers in reached.items():
            # The count of cells is the step: a study that grew shows its newest means, a replay repeats what stands.
            self.client.log_batch(run, metrics=[Metric(name, value, 0, len(held)) for name, value in numbers.items()])
        note = pages.note(words, self.experiment, self.encoders.values())
        self.client.set_tag(self.parent, "mlflow.note.content", note)
        columns = pages.views(
            sorted({name for numbers in reached.values() for name in numbers if "/test_" in name}),
            sorted({name for result in held for name in facts.headline(result) if name.startswith("test_")}),
        )
        for name, value in {"mlflow.note.content": note, **columns}.items():
            self.client.set_experiment_tag(self.experiment, name, value)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.study)
        if found is not None:
            return str(found.experiment_id)
        location = f"{self.out}/artifacts" if self.uri.startswith("sqlite:") else None
        # Without the kind, the pages of MLflow 3 open for language models and not for training runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self.client.create_experiment(self.study, artifact_location=location, tags=tags))

    def _recall(self) -> None:
        """What stands in MLflow, for a server may have made a run whose answer never came."""
        for run in self._existing():
            key = run.data.tags[KEY_TAG]
            self.runs[key], self.began[key] = run.info.run_id, run.info.start_time
            self.standing[key] = Ending(run.info.status, run.data.tags.get(REASON_TAG, ""))
            if run.info.status == "FINISHED":
                self.finished.add(key)
                if run.data.tags.get("allograft.kind") == "pretrain" and SHA_TAG in run.data.tags:
                    self.encoders[run.data.tags[SHA_TAG]] = run.info.run_id
        self.doubted = False

    def _existing(self) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment], max_results=1000, page_token=token)
            found += [run for run in page if KEY_TAG in run.data.tags]
            token = page.token
            if not token:
                return found

    def _run(self, key: str, name: str, parent: str | None, tags: dict[str, str] | None = None, seconds: float = 0.0) -> str:
        from mlflow.exceptions import MlflowException

        if key not in self.runs:
            given = {KEY_TAG: key, "mlflow.runName": name, "allograft.study": self.study, **(tags or {})}
            if parent:
                given["mlflow.parentRunId"] = parent
            self.began[key] = int((time.time() - seconds) * 1000)
            try:
                run = self.client.create_run(self.experiment, start_time=self.began[key], tags=given, run_name=name)
            except MlflowException:
                self.doubted = True
                raise
            self.runs[key] = run.info.run_id
        return self.runs[key]

    def _pretraining(self, url: str, key: str, ending: Ending) -> None:
        """A pretraining as far as it got."""
        if key in self.finished or (raw := storage.read_or_none(storage.join(url, "config.yaml"))) is None:
            return
        config, result = storage.from_yaml(raw), read_json(storage.join(url, "result.json")) or {}
        told, rows = facts.pretraining(config, result), storage.read_rows(storage.join(url, "metrics.jsonl"))
        seconds = float(result.get("seconds") or max((row.get("seconds", 0) for row in rows), default=0))
        run = self._run(key, facts.name("pretrain", config), self.parent, {"allograft.kind": "pretrain"}, seconds)
        given = (told.params, told.tags) if result or key not in self.rows else ()
        self._log(run, _curves(rows[self.rows.get(key, 0) :]) + _values(told.metrics), *given)
        self.rows[key] = len(rows)
        if not result:
            self._stand(run, key, ending, seconds)
            return
        self.encoders[result["encoder_sha256"]] = run
        for file in storage.listing(storage.join(url, "export")):
            self._artifact(run, storage.join(url, "export", file), f"encoder/{file}")
        used = [(ref["dataset"], ref["digest"], ref["shards"], f"pretrain on {ref['split']}") for ref in config["data"]]
        self._end(run, key, url, used, result)

    def _cell(self, url: str, key: str, failed: str | None) -> None:
        """A cell, once it is done, or has failed and left its configuration: before that nothing stands in storage.

        Args:
            failed: why its last attempt did.
        """
        result = read_json(storage.join(url, "result.json")) or {}
        raw = storage.read_or_none(storage.join(url, "config.yaml")) if result or failed else None
        if raw is None:
            return
        config = storage.from_yaml(raw)
        told = facts.cell(config, result)
        tags = told.tags | {"allograft.kind": facts.kind("cells", config)}
        if result.get("encoder_sha256") in self.encoders:
            tags["allograft.encoder_run"] = self.encoders[result["encoder_sha256"]]
        known = key in self.runs
        run = self._run(key, facts.name("cells", config), self.parent, tags, float(result.get("seconds", 0)))
        if not result:
            if not known:
                self._log(run, [], told.params)
            self._stand(run, key, Ending("FAILED", str(failed)))
            return
        self.results[key] = result
        rows = storage.read_rows(storage.join(url, "metrics.jsonl"))
        self._log(run, _curves(rows) + _values(told.metrics), told.params, tags if known else {})
        self._end(run, key, url, [(config["task"]["dataset"], config["manifest_digest"], config["shards"], "fine-tuning")], result)

    def _log(
        self, run: str, metrics: list[Any], params: Mapping[str, str] = MappingProxyType({}), tags: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """In as few requests as MLflow allows: 1,000 entries in each, 100 of them parameters."""
        from mlflow.entities import Param, RunTag

        first = LARGEST - len(params) - len(tags)
        if metrics or params or tags:
            given = {"params": [Param(*item) for item in params.items()], "tags": [RunTag(*item) for item in tags.items()]}
            self.client.log_batch(run, metrics=metrics[:first], **given)
        for start in range(first, len(metrics), LARGEST):
            self.client.log_batch(run, metrics=metrics[start : start + LARGEST])

    def _end(self, run: str, key: str, url: str, used: list[tuple[str, str, str, str]], result: dict[str, Any]) -> None:
        self._datasets(run, used)
        for file in ("config.yaml", "result.json"):
            self._artifact(run, storage.join(url, file), file)
        self._stand(run, key, Ending("FINISHED"), float(result.get("seconds", 0)))
        self.finished.add(key)

    def _stand(self, run: str, key: str, ending: Ending, seconds: float = 0.0) -> None:
        """A run's status, and the reason where it ended early. seconds: of its work."""
        ending, held = ending._replace(why=ending.why[:LONGEST]), self.standing.get(key, RUNNING)
        if ending == held:
            return
        if ending.why != held.why:
            self.client.set_tag(run, REASON_TAG, ending.why)
        if ending.status == "RUNNING":
            self.client.update_run(run, ending.status)
        else:
            # The duration is that of the work, not of this view of it.
            self.client.set_terminated(run, ending.status, end_time=self.began[key] + int(seconds * 1000))
        self.standing[key] = ending

    def _nodes(self) -> None:
        """The load of every node, as MLflow names system metrics, on the study's run; and where Ray's dashboard is while it runs."""
        from mlflow.entities import Metric

        root = storage.join(self.out, "nodes")
        if (raw := storage.read_or_none(storage.join(root, "ray.json"))) is not None and raw != self.dashboard:
            self.dashboard, address = raw, json.loads(raw)["dashboard"]
            self.client.set_tag(self.parent, "allograft.ray_dashboard", address)
            self.client.set_tag(self.parent, "mlflow.note.content", f"Running on Ray: [{address}]({address})")
        for file in storage.listing(root):
            host, _, kind = file.rpartition(".")
            rows = storage.read_rows(storage.join(root, file)) if kind == "jsonl" else []
            new = list(enumerate(rows))[self.rows.get(file, 0) :]
            self._log(
                self.parent,
                [
                    Metric(f"system/{host}/{name}", value, int(row["time"] * 1000), step)
                    for step, row in new
                    for name, value in row.items()
                    if name != "time"
                ],
            )
            self.rows[file] = len(rows)

    def _datasets(self, run: str, used: list[tuple[str, str, str, str]]) -> None:
        """name, digest, URL and context of each."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

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


def _curves(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """The points of a log. Its own clock and step make a replay identical, and MLflow keeps identical points once."""
    from mlflow.entities import Metric

    return [
        Metric(name, value, int(row.get("seconds", 0) * 1000), int(row.get("step", row.get("epoch", 0))))
        for row in rows
        for name, value in facts.curves(row).items()
    ]


def _values(metrics: Mapping[str, float]) -> list[Any]:
    """What a run is judged by, one value each."""
    from mlflow.entities import Metric

    return [Metric(name, value, 0, 0) for name, value in metrics.items()]
