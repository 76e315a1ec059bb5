"""What several test files need and is expensive to start: the services of compose.yaml, and a study that ran on them as a Ray job; a bare
Ray for tests that are not about how it starts.

conftest.py hands these fixtures out and keeps the files that use the services in one process.
"""

import dataclasses
import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from services import Services, end, running, tool

from base.paths import ROOT

# A pretraining long enough to be disturbed, and six cells.
TREE: dict[str, Any] = {
    **tiny_study.SMALLER,
    "pretrain": [{**tiny_study.SIMCLR, "settings": {"epochs": 20, "max_steps": 40, "checkpoint_every_steps": 5}}],
    "cells": {**tiny_study.SMALLER["cells"], "seeds": [0, 1, 2]},
}
OUT = "s3://allograft/tiny"


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The services; two credentials more than they ask for are planted on the nodes, where a study could leave them lying about."""
    planted = {name: f"planted-{secrets.token_hex(12)}" for name in ("AWS_SESSION_TOKEN", "HUB_TOKEN")}
    with running(tmp_path_factory.mktemp("services"), proxied=True, **planted) as found:
        yield found


@pytest.fixture
def as_user(services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """This process is somebody's shell: addresses and credentials of the services in its environment."""
    import s3fs

    for name, value in {**services.environment, "RAY_ADDRESS": services.ray, "AWS_ENDPOINT_URL": services.store}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they are kept by their arguments, which do not name the address
    yield services
    s3fs.S3FileSystem.clear_instance_cache()


@dataclasses.dataclass
class Studied:
    """A study on the services: its file, where its results are, and how its job ended."""

    path: str
    out: str
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def studied(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """By Ray's own command, with everything on servers."""
    path = tiny_study.write(tmp_path_factory.mktemp("study"), TREE, out=OUT, tracking=services.tracking)
    return Studied(path, OUT, submitted(services, path))


def submitted(services: Services, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, to its end."""
    # The revision, which the packed directory does not know; and a variable that the driver hands on as well.
    variables = {"ALLOGRAFT_REVISION": "as-submitted", "AWS_DEFAULT_REGION": services.environment["AWS_DEFAULT_REGION"]}
    command = [tool("ray"), "job", "submit", "--address", services.jobs, "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps({"env_vars": variables}), "--", "allograft", "run", *words]
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=ROOT, env=services.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, timeout=400)


# A Ray of four processors and one GPU, which is one in name only, until nobody listens any more. No dashboard: that is ten processes of
# imports.
HEAD = """
import sys, ray
from cluster.session import _start_here
often, quiet = {"metrics_report_interval_ms": 500}, {"log_to_driver": False, "logging_level": "ERROR"}  # nobody reads the pipe later
_start_here({**quiet, "num_cpus": 4, "num_gpus": 1, "include_dashboard": False, "_temp_dir": sys.argv[1], "_system_config": often})
print("ADDRESS", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """The address of that Ray."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)  # as ray.init does, which here another process calls
    place = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, and their paths may have 107 characters
    process = subprocess.Popen([sys.executable, "-c", HEAD, place], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next((line for line in process.stdout if line.startswith("ADDRESS ")), "")
        assert said, "Ray did not start"
        yield said.split()[1]
    finally:
        end(process.pid)
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def on_head(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of this process run on that Ray."""
    monkeypatch.setenv("RAY_ADDRESS", head)


def logs(services: Services) -> list[Path]:
    """Every file that Ray's nodes and the services have written, but for the store's log of the addresses that it is asked for: those that
    MLflow signs for a download hold the session's token, as S3 has it."""
    places = [services.folder, *(path.resolve() for path in Path(services.ray_folder).glob("*/session_latest/logs"))]
    return [path for place in places for path in place.rglob("*") if path.is_file() and path.name != "store.log"]


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
        for side in self.held:
            side.close()

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
