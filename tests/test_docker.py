"""Where no container engine runs: the Dockerfile's install steps in a fresh folder, and what compose.yaml says.

The services of compose.yaml are started, from packages, for test_cluster_jobs and others: tests/shared.py.
"""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from services import COMPOSE, compose

from base.paths import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
PYTHON = re.findall(r"--python (\d\S+) .venv", DOCKERFILE.read_text())[0]


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
    steps = [rest for word, rest in instructions() if word == "RUN" and ".venv" in rest and rest.startswith("uv ")]
    assert len(steps) == 3
    uv = f"{shlex.quote(sys.executable)} -m uv "
    for step in steps:
        # This Python instead of the image's; and its --no-cache keeps the image small, where here it would fetch gigabytes again.
        step = re.sub(r"^uv ", uv, step).replace("--no-cache ", "").replace(f"--python {PYTHON}", f"--python {shlex.quote(sys.executable)}")
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


def test_the_dockerfile_installs_only_what_the_lock_names_on_pinned_bases() -> None:
    sync = [rest for word, rest in instructions() if word == "RUN" and "pip sync" in rest]
    assert len(sync) == 1
    assert "--require-hashes" in sync[0]
    assert sync[0].endswith("requirements.lock")
    bases = [rest for word, rest in instructions() if word == "FROM"]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    toolkit = re.match(r"nvidia/cuda:(\d+\.\d+)\.\d+-runtime-ubuntu\d+\.\d+$", bases[-1])
    assert toolkit, bases
    assert locked("nvidia-cuda-runtime").startswith(f"{toolkit.group(1)}.")  # a driver that runs the base runs the wheels
    assert PYTHON.startswith("3.11.")


def test_a_login_shell_finds_the_commands() -> None:
    """KubeRay and `ray up` start Ray from one, and Debian's and Ubuntu's set PATH anew."""
    (profile,) = [rest for word, rest in instructions() if word == "RUN" and "/etc/profile.d/" in rest]
    path = next(re.findall(r"PATH=([^:]+):", rest)[0] for word, rest in instructions() if word == "ENV" and "PATH=" in rest)
    printed = subprocess.run(["bash", "-c", profile.partition(" >")[0]], capture_output=True, text=True, check=True).stdout.strip()
    found = subprocess.run(["bash", "-c", f"PATH=/usr/bin; {printed}; echo $PATH"], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{path}:/usr/bin"
    started = (ROOT / "cluster" / "deploy" / "aws.yaml").read_text()
    assert started.count(f"export PATH={path}:$PATH") == 2


def test_the_dockerfile_keeps_hadolints_rules() -> None:
    """Those of its rules that concern this file, by their numbers; there is no hadolint here."""
    text, steps = DOCKERFILE.read_text(), instructions()
    runs = [rest for word, rest in steps if word == "RUN"]
    stages = [rest.split(" AS ")[1] for word, rest in steps if word == "FROM" and " AS " in rest]
    assert {word for word, _ in steps} <= {"FROM", "SHELL", "RUN", "COPY", "USER", "WORKDIR", "ARG", "ENV", "HEALTHCHECK", "CMD"}  # DL3020
    assert all(":" in rest and ":latest" not in rest for word, rest in steps if word == "FROM")  # DL3006, DL3007
    assert [rest for word, rest in steps if word == "USER"][-1] not in ("root", "0")  # DL3002
    assert all(rest.startswith("/") for word, rest in steps if word == "WORKDIR")  # DL3000
    assert not any(re.search(r"(^|&& )(cd|sudo|ssh|top|apt) ", run) for run in runs)  # DL3003, DL3004, DL3001, DL3027
    for run in runs:
        if "apt-get install" in run:
            assert "apt-get update &&" in run
            assert {"--yes", "--no-install-recommends"} <= set(run.split())  # DL3014, DL3015
            assert run.endswith("rm -rf /var/lib/apt/lists/*")  # DL3009
            assert "hadolint ignore=DL3008\nRUN apt-get" in text
        if re.search(r"\bpip (install|sync)", run):
            assert "--no-cache" in run  # DL3042
    assert all(stage in stages for word, rest in steps if word == "COPY" for stage in re.findall(r"--from=(\S+)", rest))  # DL3022
    assert all(rest.startswith("[") for word, rest in steps if word in ("CMD", "SHELL"))  # DL3025
    assert "pipefail" in next(rest for word, rest in steps if word == "SHELL")  # DL4006
    assert [word for word, _ in steps].count("CMD") == [word for word, _ in steps].count("HEALTHCHECK") == 1  # DL4003, DL3012
    for run in runs:
        assert subprocess.run(["bash", "-n", "-c", run]).returncode == 0


def test_the_image_has_what_ray_and_its_launchers_call() -> None:
    packages = next(rest for word, rest in instructions() if word == "RUN" and "apt-get install" in rest).split()
    assert {"rsync", "wget", "git", "g++", "ca-certificates"} <= set(packages)
    user = next(rest for word, rest in instructions() if word == "RUN" and "useradd" in rest)
    assert re.search(r"userdel --remove ubuntu && useradd .*--uid 1000", user)  # Ubuntu's base has that number already
    manifest = (ROOT / "cluster" / "deploy" / "rayjob.yaml").read_text()
    assert "fsGroup: 1000" in manifest


def test_compose_has_its_services_and_publishes_them_on_loopback_only() -> None:
    services = compose()
    assert set(services) == {"postgres", "store", "bucket", "mlflow", "head", "worker"}
    ports = [str(port) for service in services.values() for port in service.get("ports", [])]  # type: ignore[attr-defined]
    assert ports
    assert all(port.startswith("${ALLOGRAFT_BIND:-127.0.0.1}:") for port in ports)
    assert services["store"]["image"] == f"motoserver/moto:{_dev_locked('moto')}"
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", str(services["postgres"]["image"]))
    for name in ("bucket", "mlflow", "head", "worker"):
        environment = services[name]["environment"]
        assert isinstance(environment, dict)
        assert environment["RAY_AUTH_MODE"] == "token"
        assert "${RAY_AUTH_TOKEN:?" in environment["RAY_AUTH_TOKEN"]


def test_compose_is_what_the_specification_allows() -> None:
    """As far as these files go: `docker compose config` cannot run here."""
    tree = yaml.safe_load(COMPOSE.read_text())
    assert set(tree) == {"x-node", "services", "volumes"}
    keys = {"image", "build", "command", "environment", "ports", "volumes", "depends_on", "healthcheck", "restart", "shm_size", "deploy"}
    for name, service in tree["services"].items():
        assert set(service) <= keys, name
        assert service["restart"] in ("unless-stopped", "on-failure")
        waits = service.get("depends_on", [])
        assert set(waits) <= set(tree["services"])
        for other, condition in waits.items() if isinstance(waits, dict) else ():
            assert set(condition) == {"condition"}
            if condition["condition"] == "service_healthy":
                assert "test" in tree["services"][other]["healthcheck"]
            else:
                assert condition == {"condition": "service_completed_successfully"}
                assert tree["services"][other]["restart"] == "on-failure"
        health = service.get("healthcheck", {"disable": True})
        assert set(health) <= {"test", "interval", "timeout", "retries", "start_period", "disable"}
        assert health.get("disable") or health["test"][0] == "CMD"
        volumes = [str(volume).partition(":")[0] for volume in service.get("volumes", [])]
        assert set(volumes) <= set(tree["volumes"])
    assert {name for name, service in tree["services"].items() if "test" in service.get("healthcheck", {})} == {
        *("postgres", "mlflow", "head", "worker")
    }


def test_no_secret_has_a_value_in_compose_and_all_are_in_its_recipe() -> None:
    text = COMPOSE.read_text()
    recipe = set(re.findall(r"for name in (.*?);", text)[0].split())
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == recipe
    for service in compose().values():
        environment = service.get("environment", {})
        assert isinstance(environment, dict)
        for name, value in environment.items():
            if re.search("SECRET|TOKEN|PASSWORD", name):
                assert re.fullmatch(r"\$\{\w+:\?set it to a long random text\}", str(value)), name
        assert not re.search(r"://[^/@]*:[^/@]*@", str(service.get("command")))  # no password in an address


def test_the_server_asks_for_a_login() -> None:
    server = compose()["mlflow"]
    words, environment = server["command"], server["environment"]
    assert isinstance(words, list)
    assert isinstance(environment, dict)
    assert words[words.index("--app-name") + 1] == "basic-auth"
    assert words[words.index("--backend-store-uri") + 1].startswith("postgresql://")
    assert words[words.index("--artifacts-destination") + 1].startswith("s3://")
    accounts = configparser.ConfigParser()
    accounts.read(ROOT / "docker" / Path(environment["MLFLOW_AUTH_CONFIG_PATH"]).name)
    assert environment["MLFLOW_AUTH_CONFIG_PATH"] == "/opt/allograft/docker/auth.ini"
    assert accounts["mlflow"]["database_uri"] == words[words.index("--backend-store-uri") + 1]
    assert accounts["mlflow"]["default_permission"] in ("READ", "NO_PERMISSIONS")
    assert "admin_password" not in accounts["mlflow"]


def _dev_locked(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    assert found, package
    return found.group(1)
