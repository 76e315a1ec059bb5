"""Where no container engine runs: the Dockerfile's install steps in a fresh folder, and what compose.yaml says.

The services of compose.yaml are started, from packages, by test_cluster_jobs.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from services import compose

from base.paths import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines())]


def locked(package: str) -> str:
    """The version of a package in requirements.lock."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found, package
    return found.group(1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's tracked files, as COPY brings them, with the RUN steps of the image executed there."""
    folder = tmp_path_factory.mktemp("image")
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    files = [name for name in tracked.split("\0") if name and (ROOT / name).exists()]
    copy = ["cp", "--parents", "-t", str(folder), *files]
    subprocess.run(copy, cwd=ROOT, check=True)
    steps = [rest for word, rest in instructions() if word == "RUN" and ".venv" in rest]
    assert len(steps) == 3
    for step in steps:
        # The image has one Python; and its --no-cache keeps the image small, where here it would fetch gigabytes again.
        step = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", step).replace("--no-cache-dir ", "").replace("--no-cache ", "")
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", step], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stderr[-2000:]}"
    return folder


@pytest.mark.timeout(600)
def test_the_image_has_a_working_command_and_what_its_services_need(installed: Path) -> None:
    python = str(installed / ".venv/bin/python")
    said = subprocess.run([str(installed / ".venv/bin/allograft"), "--help"], capture_output=True, text=True, cwd="/")
    assert said.returncode == 0, said.stderr
    assert "pretrain" in said.stdout
    needed = ["ray", "mlflow", "boto3", "s3fs", "deepspeed", "torch"]
    code = f"import base, sys; from importlib.util import find_spec; print(base.__file__); sys.exit(not all(map(find_spec, {needed})))"
    found = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd="/")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(installed / "base/__init__.py")
    listed = subprocess.run([str(installed / ".venv/bin/allograft"), "list", "datasets"], capture_output=True, text=True, cwd="/")
    assert "phantom-chest" in listed.stdout, listed.stderr
    for service in compose().values():
        command = service.get("command")
        if isinstance(command, list) and not str(command[0]).startswith("-"):
            assert (installed / ".venv/bin" / str(command[0])).exists()


def test_the_dockerfile_installs_only_what_the_lock_names() -> None:
    sync = [rest for word, rest in instructions() if word == "RUN" and "pip sync" in rest]
    assert len(sync) == 1
    assert "--require-hashes" in sync[0]
    assert sync[0].endswith("requirements.lock")
    assert next(rest for word, rest in instructions() if word == "FROM").startswith("python:3.11")
    assert [rest for word, rest in instructions() if word == "USER"][-1] == "allograft"


def test_compose_has_its_services_and_publishes_them_on_loopback_only() -> None:
    services = compose()
    assert set(services) == {"store", "bucket", "mlflow", "head", "worker"}
    ports = [str(port) for service in services.values() for port in service.get("ports", [])]  # type: ignore[attr-defined]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["store"]["image"] == f"motoserver/moto:{_dev_locked('moto')}"
    for name, service in services.items():
        if name != "store":
            environment = service["environment"]
            assert isinstance(environment, dict)
            assert environment["RAY_AUTH_MODE"] == "token"
            assert "${RAY_AUTH_TOKEN:?" in environment["RAY_AUTH_TOKEN"]


def _dev_locked(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    assert found, package
    return found.group(1)
