"""allograft submit, to a real Ray head on loopback: exit codes, Ctrl-C, stop, what is packed, and that no credential travels."""

import dataclasses
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from services import Services, free_ports
from shared import OUT, Door, Studied, logs

from base import storage
from base.errors import RequestError
from base.paths import ROOT
from cluster import submit

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
CELL = {**tiny_study.SMALLER["cells"], "sources": ["random"], "architectures": ["test_resnet"]}
STUDY = {**tiny_study.SMALLER, "pretrain": [], "cells": CELL}
DIVERGES = {**STUDY, "cells": {**CELL, "task_settings": {"phantom-chest": {"linear.epochs": 3, "linear.lr": 1e30}}}}
LONG = {**tiny_study.SMALLER["pretrain"][0], "settings": {"max_steps": None, "epochs": 4000}}
# Of the services' nodes and of whoever submits. None of their values may be readable where Ray or Allograft write.
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HUB_TOKEN", "RAY_AUTH_TOKEN")


def study(folder: Path, tree: dict[str, Any], **changes: object) -> str:
    folder.mkdir()
    return tiny_study.write(folder, tree, **changes)


class Submission:
    """A running `allograft submit`: its output is read as it comes."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "submit", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A test runner in the background ignores SIGINT, and its children would.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def until(self, text: str) -> str:
        deadline = time.monotonic() + 240
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)
        return self.said

    def ended(self) -> tuple[int, str]:
        code = self.process.wait(300)
        self._reader.join()
        return code, self.said

    @property
    def job(self) -> str:
        return self.until("job allograft-").partition("job ")[2].split()[0]


@dataclasses.dataclass
class Ended:
    """What became of four jobs, and where they wrote. The good one finds the work of Ray's own command done. `cut` followed the stopped one
    over a connection that was cut once."""

    good: tuple[int, str]
    failing: tuple[int, str]
    wrong: tuple[int, str]
    left: tuple[int, str]
    status: str
    stopped: tuple[int, str]
    followed: tuple[int, str]
    cut: tuple[int, str]
    folder: Path


@pytest.fixture(scope="module")
def ended(services: Services, studied: Studied, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("studies")
    there = ["--address", services.jobs]
    elsewhere = folder / "wrong" / "out"
    # What stands there already is neither packed nor made a database for once more.
    standing = {"data": {"phantom-chest": {"shards": f"{OUT}/shards/phantom-chest"}}, "tracking": services.tracking}
    files = {
        "good": studied.path,
        "failing": study(folder / "failing", DIVERGES, study="failing", **standing),
        "wrong": study(folder / "wrong", STUDY),
        "left": study(folder / "left", {**tiny_study.SMALLER, "pretrain": [LONG]}, study="left", **standing),
    }
    elsewhere.mkdir()
    (elsewhere / "study.yaml").write_text("study: another")
    running = {name: Submission(services.environment, path, *there) for name, path in files.items()}
    left = running["left"]
    left.until("leakage phantom-chest train")
    left.process.send_signal(signal.SIGINT)
    was_left = left.ended()
    status = _job(services, left.job)["status"]
    door = Door(services.ports["dashboard"])
    cut = Submission(services.environment, "--follow", left.job, "--address", f"http://127.0.0.1:{door.port}")
    cut.until("starting Ray")
    door.shut()
    time.sleep(2)
    door.open = True
    stopped = Submission(services.environment, "--stop", left.job, *there).ended()
    followed = Submission(services.environment, "--follow", left.job, *there).ended()
    found = {name: submission.ended() for name, submission in running.items() if name != "left"}
    return Ended(**found, left=was_left, status=status, stopped=stopped, followed=followed, cut=cut.ended(), folder=folder)


def _api(services: Services, path: str) -> str:
    token = {"Authorization": f"Bearer {services.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{services.jobs}{path}", headers=token)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return str(reply.read().decode())


def _job(services: Services, name: str) -> dict[str, Any]:
    return dict(json.loads(_api(services, f"/api/jobs/{name}")))


def test_a_good_job_ends_with_0_and_its_log_was_shown(ended: Ended) -> None:
    code, said = ended.good
    assert code == 0, said
    assert "cells     6 kept, 0 new, 0 failed" in said
    assert "WebSocket" not in said


def test_a_failing_job_ends_with_1(ended: Ended) -> None:
    code, said = ended.failing
    assert code == 1, said
    assert "1 failed" in said


def test_a_wrong_request_ends_with_2_as_its_driver_did(ended: Ended) -> None:
    code, said = ended.wrong
    assert code == 2, said
    assert "this folder holds the study 'another', not 'tiny'" in said
    assert "Traceback" not in said


def test_ctrl_c_leaves_the_job_running_and_says_what_to_type(ended: Ended) -> None:
    code, said = ended.left
    assert code == 130
    assert ended.status == "RUNNING"
    assert "the job goes on" in said
    job = said.partition("job ")[2].split()[0]
    assert f"allograft submit --follow {job}" in said
    assert f"allograft submit --stop {job}" in said


def test_a_stopped_job_gave_its_lock_back_and_counts_as_failed(ended: Ended) -> None:
    assert ended.stopped[0] == 0, ended.stopped[1]
    assert "STOPPED" in ended.stopped[1]
    assert not (ended.folder / "left/out/driver.lock").exists()
    code, said = ended.followed
    assert code == 1
    assert "stopped; the same command goes on from here" in said
    assert "was stopped" in said


def test_a_connection_that_breaks_is_made_again_and_no_line_comes_twice(ended: Ended) -> None:
    code, said = ended.cut
    assert code == 1
    assert said == ended.followed[1]


@pytest.mark.parametrize(
    ("status", "driver", "code", "says"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 1, 1, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 137, 1, "exit code 137"),
        ("FAILED", -9, 1, "exit code -9"),
    ]
    + [("FAILED", None, 1, "no such image"), ("STOPPED", None, 1, "was stopped")],
)
def test_how_a_job_ended(status: str, driver: int | None, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.job_submission import JobDetails, JobType

    message = None if driver == 0 else "no such image"
    info = JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="allograft run demo", message=message, driver_exit_code=driver)
    assert submit._ending("job-1", info) == code
    said = capsys.readouterr().err
    assert says in said
    assert bool(said) == bool(says)


def test_no_credential_is_in_what_ray_tells_or_in_any_log_or_result(as_user: Services, ended: Ended, tmp_path: Path) -> None:
    services = as_user
    jobs = json.loads(_api(services, "/api/jobs/"))
    names = [job["submission_id"] for job in jobs]
    assert len(names) >= 4
    paths = ["/api/jobs/", "/nodes?view=summary", "/logical/actors", "/api/v0/actors?detail=true", "/api/v0/workers?detail=true"]
    paths += ["/api/v0/runtime_envs?detail=true", "/api/v0/tasks?detail=true", *(f"/api/jobs/{name}" for name in names)]
    texts = {path: _api(services, path) for path in [*paths, *(f"/api/jobs/{name}/logs" for name in names)]}
    storage.get_dir(OUT, tmp_path / "study")
    files = logs(services) + [path for place in (tmp_path, ended.folder) for path in place.rglob("*") if path.is_file()]
    held = {str(path): path.read_bytes().decode(errors="replace") for path in files} | texts
    # What is looked through does hold the variables that go to the driver and those that the driver hands on.
    assert "ALLOGRAFT_REVISION" in texts["/api/jobs/"]
    assert any("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S" in text for text in held.values())
    for name in SECRETS:
        assert not [where for where, text in held.items() if services.environment[name] in text], name


def test_a_job_that_is_not_there_is_named_with_the_nearest(services: Services, ended: Ended) -> None:
    code, said = Submission(services.environment, "--follow", "allograft-tiny-00000000", "--address", services.jobs).ended()
    assert code == 2
    assert "unknown job 'allograft-tiny-00000000'" in said
    assert "allograft-tiny-" in said.partition("(")[2]


def test_detached_comes_back_at_once(services: Services, ended: Ended) -> None:
    wrong = str(ended.folder / "wrong/study.yaml")
    submission = Submission(services.environment, wrong, "--detach", "--address", services.jobs)
    code, said = submission.ended()
    assert code == 0, said
    assert f"--follow {submission.job}" in said
    assert Submission(services.environment, "--follow", submission.job, "--address", services.jobs).ended()[0] == 2


@pytest.mark.parametrize(("token", "says"), [("0" * 64, "Invalid authentication token"), (None, "find an authentication token")])
def test_without_the_right_token_nothing_is_sent(services: Services, token: str | None, says: str, tmp_path: Path) -> None:
    environment = {**services.environment, "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_TOKEN")
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    code, said = Submission(environment, tiny_study.write(tmp_path, STUDY), "--address", services.jobs).ended()
    assert code == 2, said
    assert says in said
    assert "export RAY_AUTH_TOKEN" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("setting", ["out=runs/tiny", "data.phantom-chest.raw=images"])
def test_relative_paths(tmp_path: Path, setting: str) -> None:
    with pytest.raises(RequestError, match="is relative, and a Ray job's directory is thrown away"):
        submit.submit(tiny_study.write(tmp_path, STUDY), [setting], "http://127.0.0.1:9")


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(RequestError, match="no cluster answers"):
        submit.submit(tiny_study.write(tmp_path, STUDY), [], f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://"])
def test_what_is_no_dashboards_address(address: str) -> None:
    with pytest.raises(RequestError, match="not the address of a dashboard"):
        submit.connect(address)


def test_other_versions_and_other_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    here = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    replies: dict[str, Any] = {}

    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(replies.get(self.path, {})).encode()
            self.send_response(200 if self.path in replies else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RequestError, match="not Ray's dashboard"):
            submit.connect(address)
        for versions, says in [
            ({"rayVersion": "2.48.0", "pythonVersion": here}, f"the cluster has Ray 2.48.0, this command {ray.__version__}"),
            ({"rayVersion": ray.__version__, "pythonVersion": "3.9.18"}, "the cluster has Python 3.9.18"),
        ]:
            replies |= {"/api/version": {"ray_version": versions["rayVersion"]}, "/api/v0/cluster_metadata": {"data": versions}}
            with pytest.raises(RequestError, match=says):
                submit.connect(address)
        replies["/api/v0/cluster_metadata"] = {"data": {"rayVersion": ray.__version__, "pythonVersion": here}}
        submit.connect(address)
        server.shutdown()


@pytest.mark.parametrize("tracking", ["https://me:hunter2pass@mlflow.example", "https://mlflow.example/?X-Amz-Signature=abc"])
def test_an_address_with_a_credential_in_it(tmp_path: Path, tracking: str) -> None:
    with pytest.raises(RequestError, match="an address with a credential in it"):
        submit.submit(tiny_study.write(tmp_path, STUDY), [f"tracking={tracking}"], "http://127.0.0.1:9")


def test_the_value_of_a_secret_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "correct-horse")
    monkeypatch.setenv("ALLOGRAFT_SECRET_FILE", "/run/secrets/names")
    submit.refuse_secrets({"study.yaml": "out: /run/secrets/names"})
    with pytest.raises(RequestError, match=r"study.yaml: holds the value of \$SOME_PASSWORD"):
        submit.refuse_secrets({"settings": "allograft run", "study.yaml": "out: s3://correct-horse/x"})


@pytest.mark.parametrize("words", [[], ["demo", "--follow", "job"], ["--follow", "a", "--stop", "b"]])
def test_one_thing_at_a_time(words: list[str]) -> None:
    code, said = Submission({**os.environ}, *words, "--address", "http://127.0.0.1:9").ended()
    assert code == 2
    assert "one of STUDY, --follow JOB and --stop JOB" in said


def test_the_package_is_code_and_yaml_and_a_study_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "tasks" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text((ROOT / "finetune/tasks/phantom-chest.yaml").read_text())
    path = tiny_study.write(tmp_path, STUDY)
    name = submit.pack(tmp_path / "package", path, ["tasks/mine.yaml/paper", "phantom:120"])
    package = tmp_path / "package"
    assert name == "submitted/study.yaml"
    assert yaml.safe_load((package / name).read_text())["study"] == "tiny"
    assert (package / "tasks/mine.yaml").read_text() == mine.read_text()
    names = {path.name for path in package.iterdir()}
    assert names == {*submit.SENT, "submitted", "tasks"}
    assert not list(package.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in package.rglob("*")) < 10e6
    # It works as what it is meant for: the first place on the path of a driver that starts there.
    code = "from base.paths import ROOT; from cluster.load import load_study; print(ROOT, load_study('demo').study)"
    done = subprocess.run([sys.executable, "-c", code], cwd=package, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True)
    assert done.stdout.decode().split() == [str(package), "demo"], done.stderr.decode()


@pytest.mark.parametrize("file", ["../mine.yaml", "/tmp/mine.yaml", "datasets/nih-cxr14.yaml"])
def test_a_file_that_cannot_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    here = tmp_path / "here"
    (here / "datasets").mkdir(parents=True)
    monkeypatch.chdir(here)
    if file.startswith("/tmp"):
        file = str(tmp_path / "mine.yaml")
    Path(file).write_text("a: 1")
    with pytest.raises(RequestError, match=r"cannot go with the job|another file of this name"):
        submit.pack(tmp_path / "package", "demo", [file])
