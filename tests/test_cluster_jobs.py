"""A study as a Ray job on the services of docker/compose.yaml: results on S3, tracked by a running MLflow server with accounts."""

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_study
import torch
import yaml
from services import NODES, Services, answers, compose, postgres, tool
from shared import OUT, Door, Studied, submitted

from base import storage
from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster.load import load_study
from cluster.run import run
from engine.context import LocalContext

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("as_user")]


def test_every_service_of_the_compose_file_is_healthy(services: Services) -> None:
    expected = set(compose()) - {"worker"} | set(NODES) | {"proxy"}
    assert set(services.running) == (expected if postgres() else expected - {"postgres"})
    deadline, nodes, shown = time.monotonic() + 90, 0, ""
    while nodes < 3 and time.monotonic() < deadline:  # a worker joins when it joins, and the status is some seconds old
        command = [tool("ray"), "status", "--address", services.ray]
        status = subprocess.run(command, env=services.environment, capture_output=True, text=True)
        assert status.returncode == 0, status.stderr
        shown = status.stdout
        nodes = sum(" node_" in line for line in shown.splitlines())
    assert nodes == 3, shown
    assert answers(f"{services.tracking}/health")
    assert storage.exists("s3://allograft")


def test_a_cluster_without_the_token_is_closed(services: Services) -> None:
    environment = {**services.environment, "RAY_AUTH_TOKEN": "0" * 64}
    command = [tool("ray"), "job", "list", "--address", services.jobs]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_the_job_succeeds(studied: Studied) -> None:
    assert studied.ended.returncode == 0, studied.ended.stdout[-3000:]
    assert "simclr against random on phantom-chest" in studied.ended.stdout
    assert "Traceback" not in studied.ended.stdout
    assert not storage.exists(f"{OUT}/driver.lock")
    assert storage.read_json(f"{OUT}/nodes/ray.json")["dashboard"].startswith("http://")


def test_a_bad_job_fails_with_one_line(services: Services, studied: Studied) -> None:
    bad = submitted(services, studied.path, "out=runs/tiny")
    assert bad.returncode != 0
    assert "exit code 2" in bad.stdout
    assert "'runs/tiny' is relative, and a Ray job's directory is thrown away" in bad.stdout
    assert "Traceback" not in bad.stdout


def _rows(out: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_bytes(f"{out}/report/results.csv").decode())))


def test_results_are_those_of_the_same_work_done_here_on_disk(studied: Studied, tmp_path: Path) -> None:
    """The pretraining and one cell on it as plain functions in this process: neither Ray nor S3 changes a bit."""
    import finetune.run
    import pretrain.run

    torch.set_num_threads(1)
    (name,) = storage.listing(f"{OUT}/pretrain")
    config = yaml.safe_load(storage.read_bytes(f"{OUT}/pretrain/{name}/config.yaml"))
    here = str(tmp_path / "pretrain")
    pretrained = pretrain.run.run(parse({**config, "out": here}, pretrain.run.PretrainConfig, "test"), LocalContext(dir=here))
    assert pretrained is not None
    assert pretrained["encoder_sha256"] == storage.read_json(f"{OUT}/pretrain/{name}/result.json")["encoder_sha256"]
    keys = storage.listing(f"{OUT}/cells")
    assert len(keys) == len({row["key"] for row in _rows(OUT)}) == 6
    results = [storage.read_json(f"{OUT}/cells/{key}/result.json") for key in keys]
    key = next(result["key"] for result in results if result["source"] == "simclr")
    config = yaml.safe_load(storage.read_bytes(f"{OUT}/cells/{key}/config.yaml"))
    config |= {"out": str(tmp_path / "cell"), "encoder_dir": f"{here}/export"}
    cell = finetune.run.run(parse(config, finetune.run.CellConfig, "test"), LocalContext(dir=config["out"]))
    assert cell["metrics"] == storage.read_json(f"{OUT}/cells/{key}/result.json")["metrics"]


def test_the_server_holds_one_finished_run_a_cell_and_the_champion(services: Services, studied: Studied) -> None:
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
    reached = pretrained.data.metrics["phantom-chest/linear/32 px/test_auroc_mean"]
    of_simclr = [row for row in _rows(OUT) if (row["source"], row["split"], row["metric"]) == ("simclr", "test", "auroc_mean")]
    assert reached == pytest.approx(sum(float(row["value"]) for row in of_simclr) / 3, abs=1e-9)
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == pretrained.info.run_id


def test_the_champion_is_pulled_from_the_server(services: Services, studied: Studied, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    command = [sys.executable, "-m", "cluster", "pull", "tiny@champion", str(folder), "--tracking", services.tracking]
    pulled = subprocess.run(command, env=services.environment, cwd=ROOT, capture_output=True, text=True)
    assert pulled.returncode == 0, pulled.stderr
    assert {"config.json", "model.safetensors", "golden.safetensors", "allograft.json", "README.md"} <= {p.name for p in folder.iterdir()}
    (name,) = storage.listing(f"{OUT}/pretrain")
    assert (folder / "model.safetensors").read_bytes() == storage.read_bytes(f"{OUT}/pretrain/{name}/export/model.safetensors")


def test_the_second_run_on_the_servers_starts_nothing(studied: Studied) -> None:
    import ray

    again = run(load_study(studied.path))
    assert (again.cells_kept, again.cells_new) == (6, 0)
    assert not ray.is_initialized()


def test_an_outage_of_the_server_costs_nothing(
    services: Services, studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import mlflow_store, projector

    here = str(tmp_path / "out")
    storage.get_dir(OUT, here)
    monkeypatch.setattr(projector, "PERIOD_S", 0.5)
    monkeypatch.setattr(projector, "LAST_PAUSES_S", (0.1,))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    door = Door(services.ports["mlflow"])
    uri = f"http://127.0.0.1:{door.port}"
    mlflow_store.require_server(uri)
    view = projector.Projector(here, "outage", uri)
    door.shut()
    with pytest.raises(WorkError, match="MLflow could not be written"):
        view.finish()
    with pytest.raises(RequestError, match="no MLflow server answers"):
        mlflow_store.require_server(uri)
    door.open = True
    whole = projector.Projector(here, "outage", uri).finish()
    whole.close(ok=True)
    runs = whole.client.search_runs([whole.experiment])
    keys = [found.data.tags["allograft.key"] for found in runs]
    assert len(keys) == len(set(keys)) == 6 + 2
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
