"""The main job on a real Ray cluster with a real MLflow store, on phantoms so small that it takes about a minute."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny_study

from base import storage
from base.errors import RequestError
from cluster.load import load_study
from cluster.lock import DriverLock
from cluster.mlflow_store import connect, tracking_uri
from cluster.run import Summary, run, sync
from cluster.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def make(folder: Path, **changes: object) -> Study:
    return load_study(tiny_study.write(folder, tiny_study.STUDY, **changes))


def kill_one_trainer_in_the_middle(out: str, killed: list[int]) -> None:
    """SIGKILL one training process of this study as soon as the first pretraining has logged a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not killed:
        logged = [name for name in storage.listing(f"{out}/pretrain") if storage.exists(f"{out}/pretrain/{name}/metrics.jsonl")]
        workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(_title(child))]
        if logged and workers:
            os.kill(workers[-1].pid, signal.SIGKILL)
            killed.append(workers[-1].pid)
        time.sleep(0.2)


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Summary, list[int]]:
    study = make(tmp_path_factory.mktemp("tiny"))
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_trainer_in_the_middle, args=(study.out, killed), daemon=True)
    killer.start()
    summary = run(study)
    killer.join(1)
    return study, summary, killed


def test_a_killed_trainer_is_survived_and_said(finished: tuple[Study, Summary, list[int]]) -> None:
    _, summary, killed = finished
    assert killed
    assert summary.restarts >= 1
    assert not summary.failed
    assert summary.cells_new == 6


def test_out_holds_what_the_design_says(finished: tuple[Study, Summary, list[int]]) -> None:
    study, summary, _ = finished
    assert {"study.yaml", "events.jsonl", "mlflow.db", "shards", "pretrain", "cells", "report", "plan.json"} <= set(
        storage.listing(study.out)
    )
    assert not storage.exists(f"{study.out}/driver.lock")
    assert storage.exists(summary.report)
    assert storage.read_json(f"{study.out}/nodes/ray.json")["dashboard"].startswith("http://")
    for key in storage.listing(f"{study.out}/cells"):
        assert {"config.yaml", "metrics.jsonl", "predictions.parquet", "result.json"} <= set(storage.listing(f"{study.out}/cells/{key}"))


def test_the_transplant_is_the_encoder_that_was_exported(finished: tuple[Study, Summary, list[int]]) -> None:
    study, _, _ = finished
    exported = {}
    for name in storage.listing(f"{study.out}/pretrain"):
        result = storage.read_json(f"{study.out}/pretrain/{name}/result.json")
        exported[result["name"]] = result["encoder_sha256"]
    seen = set()
    for key in storage.listing(f"{study.out}/cells"):
        result = storage.read_json(f"{study.out}/cells/{key}/result.json")
        if result["source"] in exported:
            assert result["transplanted_sha256"] == exported[result["source"]]
            seen.add(result["source"])
        assert result["own_source"] == (result["source"] == "chain")
    assert seen == set(exported)


def test_mlflow_holds_one_finished_run_a_cell_and_the_champion(finished: tuple[Study, Summary, list[int]]) -> None:
    study, _, _ = finished
    check_store(study)


def check_store(study: Study) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{study.out}/mlflow.db", registry_uri=f"sqlite:///{study.out}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    keys = [found.data.tags["allograft.key"] for found in runs]
    assert len(keys) == len(set(keys)) == 6 + 2 + 1
    assert {found.info.status for found in runs} == {"FINISHED"}
    cells = [found for found in runs if found.data.tags.get("allograft.kind") == "cell"]
    assert sorted(found.data.tags["allograft.key"] for found in cells) == storage.listing(f"{study.out}/cells")
    assert all("test_auroc_mean" in found.data.metrics for found in cells)
    assert all(found.inputs.dataset_inputs for found in cells)
    assert {found.data.tags["mlflow.parentRunId"] for found in cells} == {
        found.info.run_id for found in runs if found.data.tags["allograft.key"] == "study:tiny"
    }
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.tags["allograft.source"] == "simclr"  # the chain has seen the task's labels: own_source cannot win
    assert len(client.search_model_versions("name='tiny'")) == 2


def test_mlflow_is_rebuilt_from_storage_also_of_a_moved_study(finished: tuple[Study, Summary, list[int]], tmp_path: Path) -> None:
    study, _, _ = finished
    out = str(tmp_path / "moved")
    shutil.copytree(study.out, out, ignore=shutil.ignore_patterns("mlflow.db", "artifacts"))
    assert sync(out) == (6 + 2, "simclr")
    moved = study.model_copy(update={"out": out})
    check_store(moved)
    sync(out)
    check_store(moved)
    # The diary of a driver that was killed has no end: nobody works on it, and nothing says that it finished.
    diary = Path(out, "events.jsonl")
    diary.write_text("".join(line + "\n" for line in diary.read_text().splitlines() if json.loads(line)["event"] != "end"))
    sync(out)
    client = connect(tracking_uri(out, moved.tracking))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`allograft.key` = 'study:tiny'")
    assert parent.info.status == "KILLED"
    with DriverLock(out), pytest.raises(RequestError, match="another driver"):
        sync(out)


def test_the_second_run_starts_nothing(finished: tuple[Study, Summary, list[int]]) -> None:
    study, first, _ = finished
    import ray

    before = {key: os.stat(f"{study.out}/cells/{key}/result.json").st_mtime_ns for key in storage.listing(f"{study.out}/cells")}
    again = run(study)
    assert not ray.is_initialized()
    assert (again.cells_kept, again.cells_new) == (6, 0)
    assert again.answer == first.answer
    assert before == {key: os.stat(f"{study.out}/cells/{key}/result.json").st_mtime_ns for key in before}


def test_another_study_is_refused(finished: tuple[Study, Summary, list[int]], tmp_path: Path) -> None:
    study, _, _ = finished
    with pytest.raises(RequestError, match="holds the study 'tiny'"):
        run(make(tmp_path, study="other", out=study.out))


def test_a_consumer_needs_timm_and_nothing_of_ours(finished: tuple[Study, Summary, list[int]], tmp_path: Path) -> None:
    study, _, _ = finished
    folder = tmp_path / "encoder"
    command = [sys.executable, "-m", "cluster", "pull", "tiny@champion", str(folder), "--tracking", study.out]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import sys, json, torch, timm\n"
        "from safetensors.torch import load_file\n"
        "torch.set_num_threads(1)\n"
        f"golden = load_file('{folder}/golden.safetensors')\n"
        f"encoder = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        "with torch.inference_mode(): same = torch.equal(encoder(golden['preprocessed']), golden['features'])\n"
        "rooms = {'base', 'shards', 'encoders', 'engine', 'finetune', 'pretrain', 'cluster'}\n"
        "print(json.dumps([same, sorted(rooms & set(sys.modules))]))"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(out.stdout.splitlines()[-1]) == [True, []]
