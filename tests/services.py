"""The services of docker/compose.yaml on loopback, started from packages: object store, MLflow server, Ray head and one worker.

with running(Path("/some/folder")) as services:
    subprocess.run([tool("ray"), "job", "submit", ...], env=services.environment)

The commands are compose.yaml's own; only hosts, ports and folders are put in their place. Ray gets a temporary folder and ports of its
own, so that it meets no other cluster of this machine, and only processes started here are ended.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from base.paths import ROOT

COMPOSE = ROOT / "docker" / "compose.yaml"
PATIENCE_S = 240.0


@dataclass
class Services:
    """What runs, and how to reach it."""

    folder: Path
    environment: dict[str, str]
    ports: dict[str, int]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def jobs(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def ray(self) -> str:
        return f"127.0.0.1:{self.ports['head']}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, name: str, healthy: Callable[[], bool]) -> None:
        """Until the service is healthy; AssertionError with the end of its log when it ends or takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not healthy():
            ended = self.running[name].poll() is not None
            assert not ended, f"{name} ended:\n{self.log(name)[-2000:]}"
            assert time.monotonic() < deadline, f"{name} is not healthy:\n{self.log(name)[-2000:]}"
            time.sleep(0.3)


def tool(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).parent / name)


def compose() -> dict[str, dict[str, object]]:
    """The services of compose.yaml, anchors resolved."""
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def answers(url: str) -> bool:
    """True when the address answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@contextmanager
def running(folder: Path) -> Iterator[Services]:
    """Start the services, wait until each is healthy, end them with all they started."""
    names = ["store", "mlflow", "head", "dashboard", "client", "head_agent", "worker_agent"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # Sockets of Ray live below its folder, and their paths may not be longer than 107 characters. Two nodes of one machine must not
    # share it: each unpacks the job's working directory there, over the other's.
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    services = Services(folder, _environment(ports), ports)
    node = ["--node-ip-address", "127.0.0.1"]
    try:
        _start(services, "store", {"9000": str(ports["store"])})
        extra = ["--temp-dir", f"{ray_folder}/head", "--dashboard-port", str(ports["dashboard"])]
        extra += ["--ray-client-server-port", str(ports["client"]), *node, *_ray_ports(ports["head_agent"])]
        _start(services, "head", {"6379": str(ports["head"])}, extra)
        services.wait("store", lambda: answers(f"http://127.0.0.1:{ports['store']}/moto-api/"))
        _start(services, "bucket", {})
        assert services.running["bucket"].wait(60) == 0, services.log("bucket")
        _start(services, "mlflow", {"5000": str(ports["mlflow"]), "sqlite:////home/allograft": f"sqlite:///{folder}"})
        services.wait("head", lambda: "Ray runtime started" in services.log("head"))
        extra = ["--temp-dir", f"{ray_folder}/worker", "--num-cpus", "4", *node, *_ray_ports(ports["worker_agent"])]
        _start(services, "worker", {"head:6379": services.ray}, extra)
        services.wait("head", lambda: answers(f"{services.jobs}/api/gcs_healthz"))
        services.wait("worker", lambda: "Ray runtime started" in services.log("worker"))
        services.wait("mlflow", lambda: answers(f"{services.tracking}/health"))
        yield services
    finally:
        end(*(process.pid for process in services.running.values()))
        shutil.rmtree(ray_folder, ignore_errors=True)


@contextmanager
def ray_head(folder: Path, **environment: str) -> Iterator[Services]:
    """The head of compose.yaml alone, with four slots for work; more variables of its environment by name."""
    names = ["store", "head", "dashboard", "client", "head_agent"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    services = Services(folder, {**_environment(ports), **environment, "RAY_LOGS": f"{ray_folder}/session_latest/logs"}, ports)
    extra = ["--temp-dir", ray_folder, "--dashboard-port", str(ports["dashboard"]), "--ray-client-server-port", str(ports["client"])]
    extra += ["--num-cpus", "4", "--node-ip-address", "127.0.0.1", *_ray_ports(ports["head_agent"])]
    try:
        _start(services, "head", {"6379": str(ports["head"])}, extra)
        services.wait("head", lambda: "Ray runtime started" in services.log("head"))
        services.wait("head", lambda: answers(f"{services.jobs}/api/gcs_healthz"))
        yield services
    finally:
        end(*(process.pid for process in services.running.values()))
        shutil.rmtree(ray_folder, ignore_errors=True)


def end(*pids: int) -> None:
    """End processes started here and all that they started. Nothing of theirs outlives the test, so there is nothing to end in order."""
    family: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            family += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, timeout=5)


def _ray_ports(agent: int) -> list[str]:
    return ["--dashboard-agent-listen-port", str(agent), "--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats"]


def _environment(ports: dict[str, int]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "MLFLOW_"))}
    given = {str(name): str(value) for name, value in compose()["head"]["environment"].items()}  # type: ignore[attr-defined]
    given |= {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['store']}",
        "AWS_ACCESS_KEY_ID": "allograft",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **given, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _start(services: Services, name: str, place: dict[str, str], extra: list[str] | None = None) -> None:
    command = [str(word) for word in compose()[name]["command"]]  # type: ignore[attr-defined]
    if name == "store":
        command.insert(0, "moto_server")
    for was, now in {"0.0.0.0": "127.0.0.1", **place}.items():
        command = [word.replace(was, now) for word in command]
    with open(services.folder / f"{name}.log", "wb") as log:
        services.running[name] = subprocess.Popen(
            [tool(command[0]), *command[1:], *(extra or [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=services.environment,
            cwd=services.folder,
            start_new_session=True,
        )
