"""A cluster of the services of docker/compose.yaml: a study as a Ray job, results on S3, tracked by a running MLflow server."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_study
from services import Services, answers, compose, running, tool

from base import storage
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster.load import load_study
from cluster.run import run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
OUT = "s3://allograft/tiny"


@dataclass
class Jobs:
    """What became of the submitted jobs."""

    good: subprocess.CompletedProcess[str]
    bad: subprocess.CompletedProcess[str]
    local: str


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    before = dict(os.environ)
    with running(tmp_path_factory.mktemp("services")) as found:
        os.environ.update({**found.environment, "RAY_ADDRESS": found.ray})
        yield found
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def jobs(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """At once: the study as a job with everything on servers, the same from here with everything on disk, and a job that must fail."""
    folder = tmp_path_factory.mktemp("study")
    path = tiny_study.write(folder, tiny_study.SMALLER)
    good = _submit(services, path, f"out={OUT}", f"tracking={services.tracking}")
    bad = _submit(services, path, "out=runs/tiny")
    # Not in this process: Ray reads the token once, and another test file may have started a cluster of its own here before.
    here = [sys.executable, "-m", "cluster", "run", str(path)]
    subprocess.run(here, env={**services.environment, "RAY_ADDRESS": services.ray}, cwd=ROOT, check=True, timeout=500)
    return Jobs(_ended(good), _ended(bad), str(folder / "out"))


def _submit(services: Services, *words: str) -> subprocess.Popen[str]:
    # The revision, which the packed directory does not know; and a variable that the driver hands on as well.
    variables = {"ALLOGRAFT_REVISION": "as-submitted", "AWS_DEFAULT_REGION": services.environment["AWS_DEFAULT_REGION"]}
    command = [tool("ray"), "job", "submit", "--address", services.jobs, "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", "allograft", "run", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=services.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def _ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    text, _ = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, text, "")


def _rows(out: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{out}/report/results.csv").decode())))
    return [{name: value for name, value in row.items() if name not in {"run_id", "seconds"}} for row in rows]


def test_every_service_of_the_compose_file_is_healthy(services: Services) -> None:
    assert set(compose()) == set(services.running) == {"store", "bucket", "mlflow", "head", "worker"}
    deadline, nodes, shown = time.monotonic() + 90, 0, ""
    while nodes < 2 and time.monotonic() < deadline:  # the worker joins when it joins, and the status is some seconds old
        command = [tool("ray"), "status", "--address", services.ray]
        status = subprocess.run(command, env=services.environment, capture_output=True, text=True)
        assert status.returncode == 0, status.stderr
        shown = status.stdout
        nodes = sum(" node_" in line for line in shown.splitlines())
    assert nodes == 2, shown
    assert answers(f"{services.tracking}/health")
    assert storage.exists("s3://allograft")


def test_a_cluster_without_the_token_is_closed(services: Services) -> None:
    environment = {**services.environment, "RAY_AUTH_TOKEN": "0" * 64}
    command = [tool("ray"), "job", "list", "--address", services.jobs]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_the_job_succeeds_and_the_bad_one_fails_with_one_line(jobs: Jobs) -> None:
    assert jobs.good.returncode == 0, jobs.good.stdout[-3000:]
    assert "simclr against random on phantom-chest" in jobs.good.stdout
    assert jobs.bad.returncode != 0
    assert "exit code 2" in jobs.bad.stdout
    assert "'runs/tiny' is relative, and a Ray job's directory is thrown away" in jobs.bad.stdout
    assert "Traceback" not in jobs.good.stdout + jobs.bad.stdout


def test_rows_are_those_of_the_run_on_disk(jobs: Jobs) -> None:
    assert len({row["key"] for row in _rows(OUT)}) == 2
    assert _rows(OUT) == _rows(jobs.local)
    assert not storage.exists(f"{OUT}/driver.lock")


def test_the_server_holds_one_finished_run_a_cell_and_the_champion(services: Services, jobs: Jobs) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=services.tracking, registry_uri=services.tracking)
    experiment = client.get_experiment_by_name("tiny")
    assert "side by side" in experiment.tags["mlflow.note.content"]
    assert "metrics.`test_auroc_mean`" in experiment.tags["mlflow.sharedViewState.cells"]
    runs = client.search_runs([experiment.experiment_id])
    assert {found.info.status for found in runs} == {"FINISHED"}
    cells = [found.data.tags["allograft.key"] for found in runs if found.data.tags.get("allograft.kind") == "cell"]
    assert sorted(cells) == storage.listing(f"{OUT}/cells")
    assert len(runs) == len(cells) + 2
    (pretrained,) = [found for found in runs if found.data.tags.get("allograft.kind") == "pretrain"]
    assert {found.data.tags["mlflow.source.git.commit"] for found in runs if found.data.tags.get("allograft.kind")} == {"as-submitted"}
    reached = pretrained.data.metrics["phantom-chest/linear/test_auroc_mean"]
    (row,) = [row for row in _rows(OUT) if (row["source"], row["split"], row["metric"]) == ("simclr", "test", "auroc_mean")]
    assert reached == pytest.approx(float(row["value"]), abs=1e-9)
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == pretrained.info.run_id


def test_the_champion_is_pulled_from_the_server(services: Services, jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    command = [sys.executable, "-m", "cluster", "pull", "tiny@champion", str(folder), "--tracking", services.tracking]
    pulled = subprocess.run(command, env=services.environment, cwd=ROOT, capture_output=True, text=True)
    assert pulled.returncode == 0, pulled.stderr
    assert {"config.json", "model.safetensors", "golden.safetensors", "allograft.json", "README.md"} <= {p.name for p in folder.iterdir()}
    (name,) = storage.listing(f"{jobs.local}/pretrain")
    assert (folder / "model.safetensors").read_bytes() == Path(f"{jobs.local}/pretrain/{name}/export/model.safetensors").read_bytes()


def test_the_second_run_on_the_servers_starts_nothing(services: Services, jobs: Jobs, tmp_path: Path) -> None:
    import ray

    path = tiny_study.write(tmp_path, tiny_study.SMALLER)
    again = run(load_study(path, [f"out={OUT}", f"tracking={services.tracking}"]))
    assert (again.cells_kept, again.cells_new) == (2, 0)
    assert not ray.is_initialized()


class Door:
    """A way to a server that can be shut: forwards TCP connections of its own port."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = True
        self.held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        """Refuse what comes and cut what is open."""
        self.open = False
        for end in self.held:
            end.close()

    def _accept(self) -> None:
        while True:
            inner, _ = self.listener.accept()
            if not self.open:
                inner.close()
                continue
            outer = socket.create_connection(("127.0.0.1", self.target))
            self.held += [inner, outer]
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_an_outage_of_the_server_costs_nothing(services: Services, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import projector, tracking

    monkeypatch.setattr(projector, "PERIOD_S", 0.5)
    monkeypatch.setattr(projector, "LAST_PAUSES_S", (0.1,))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    door = Door(services.ports["mlflow"])
    uri = f"http://127.0.0.1:{door.port}"
    tracking.require_server(uri)
    view = projector.Projector(jobs.local, "outage", uri)
    door.shut()
    with pytest.raises(WorkError, match="MLflow could not be written"):
        view.finish()
    with pytest.raises(RequestError, match="no MLflow server answers"):
        tracking.require_server(uri)
    door.open = True
    whole = projector.Projector(jobs.local, "outage", uri).finish()
    whole.close(ok=True)
    runs = whole.client.search_runs([whole.experiment])
    keys = [found.data.tags["allograft.key"] for found in runs]
    assert len(keys) == len(set(keys)) == 4
    assert {found.info.status for found in runs} == {"FINISHED"}


def test_a_study_is_not_begun_without_its_server(services: Services, tmp_path: Path) -> None:
    path = tiny_study.write(tmp_path, tiny_study.SMALLER)
    with pytest.raises(RequestError, match="no MLflow server answers"):
        run(load_study(path, ["out=s3://allograft/never", "tracking=http://127.0.0.1:9"]))
    with pytest.raises(WorkError, match="make the bucket first"):
        run(load_study(path, ["out=s3://nobody/made/it", f"tracking={services.tracking}"]))
    assert not storage.exists("s3://allograft/never")


def test_the_lock_is_exclusive_on_the_store(services: Services) -> None:
    assert storage.create("s3://allograft/lock", json.dumps({"owner": "one"}))
    assert not storage.create("s3://allograft/lock", json.dumps({"owner": "two"}))
    assert storage.read_json("s3://allograft/lock") == {"owner": "one"}
