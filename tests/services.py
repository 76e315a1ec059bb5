"""The services of docker/compose.yaml on loopback, started from packages: PostgreSQL, object store, MLflow server, Ray head, two workers.

with running(Path("/some/folder")) as services:
    subprocess.run([tool("ray"), "job", "submit", ...], env=services.environment)

The commands are compose.yaml's own; only hosts, ports and folders are put in their place. PostgreSQL is Debian's; without it MLflow keeps
its tables in SQLite. Ray gets temporary folders and ports of its own, so that it meets no other cluster of this machine, and only processes
started here are ended.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from base.paths import ROOT

COMPOSE = ROOT / "docker" / "compose.yaml"
DATABASE = "postgresql://mlflow@postgres/mlflow"
PATIENCE_S = 240.0
NODES = ("head", "worker-1", "worker-2")


@dataclass
class Services:
    """What runs, and how to reach it. `environment` is that of a node and of whoever submits; the servers have more."""

    folder: Path
    environment: dict[str, str]
    ports: dict[str, int]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ray_folder: str = ""

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def store(self) -> str:
        """The object store itself, also where nodes reach it through a proxy."""
        return f"http://127.0.0.1:{self.ports['store']}"

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


def postgres() -> Path | None:
    """The folder of Debian's PostgreSQL programs, the newest; None where none is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


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
def running(folder: Path, *, proxied: bool = False, **environment: str) -> Iterator[Services]:
    """Start the services, wait until each is healthy, end them with all they started.

    Args:
        proxied: nodes and server reach the object store through tests/faulty_s3.py.
        environment: more variables of the nodes.
    """
    # Sockets of Ray live below its folder, and their paths may not be longer than 107 characters.
    services = Services(folder, {}, {}, ray_folder=tempfile.mkdtemp(prefix="ray-"))
    names = ["store", "postgres", "mlflow", "proxy", "head", "dashboard", "client", *(f"{name}-agent" for name in NODES)]
    services.ports |= dict(zip(names, free_ports(len(names)), strict=True))
    services.environment |= {**_environment(services.ports), **environment}
    database = tempfile.mkdtemp(prefix="postgres-")
    try:
        _start(services, "store", {"9000": str(services.ports["store"])})
        if proxied:
            _start_proxy(services)
        start_node(services, "head", cpus=1)
        uri = _start_postgres(services, Path(database))
        services.wait("store", lambda: answers(f"{services.environment['AWS_ENDPOINT_URL']}/moto-api/"))
        _start(services, "bucket", {})
        assert services.running["bucket"].wait(60) == 0, services.log("bucket")
        start_mlflow(services, uri)
        services.wait("head", lambda: "Ray runtime started" in services.log("head"))
        for name in NODES[1:]:
            start_node(services, name, cpus=3)
        for name in NODES:
            services.wait(name, lambda name=name: node_answers(services, name))  # type: ignore[misc]
        services.wait("head", lambda: answers(f"{services.jobs}/api/gcs_healthz"))
        services.wait("mlflow", lambda: answers(f"{services.tracking}/health"))
        yield services
    finally:
        end(*(process.pid for process in services.running.values()))
        shutil.rmtree(services.ray_folder, ignore_errors=True)
        shutil.rmtree(database, ignore_errors=True)


def _start_proxy(services: Services) -> None:
    import faulty_s3

    services.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{services.ports['proxy']}"
    with open(services.folder / "proxy.log", "wb") as log:
        command = faulty_s3.proxied(services.ports["proxy"], services.store)
        services.running["proxy"] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def start_node(services: Services, name: str, cpus: int) -> None:
    """A Ray node: `head`, or a worker that joins it. Two nodes of one machine must not share a folder: each unpacks the job's working
    directory there, over the other's."""
    extra = ["--temp-dir", f"{services.ray_folder}/{name}", "--num-cpus", str(cpus), "--node-ip-address", "127.0.0.1"]
    extra += ["--dashboard-agent-listen-port", str(services.ports[f"{name}-agent"]), "--min-worker-port", "0", "--max-worker-port", "0"]
    if name == "head":
        extra += ["--dashboard-port", str(services.ports["dashboard"]), "--ray-client-server-port", str(services.ports["client"])]
        _start(services, name, {"6379": str(services.ports["head"])}, extra)
    else:
        _start(services, name, {"head:6379": services.ray}, extra, like="worker")


def node_answers(services: Services, name: str) -> bool:
    """What compose.yaml and KubeRay ask a node."""
    return answers(f"http://127.0.0.1:{services.ports[f'{name}-agent']}/api/local_raylet_healthz")


def start_mlflow(services: Services, uri: str) -> None:
    """The server with accounts, its tables at `uri`."""
    accounts = (COMPOSE.parent / "auth.ini").read_text()
    assert DATABASE in accounts
    (services.folder / "auth.ini").write_text(accounts.replace(DATABASE, uri))
    secret = {"MLFLOW_AUTH_ADMIN_PASSWORD": services.environment["MLFLOW_TRACKING_PASSWORD"], "PGPASSWORD": database_password(services)}
    secret |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": database_password(services), "MLFLOW_AUTH_CONFIG_PATH": str(services.folder / "auth.ini")}
    given = compose()["mlflow"]["environment"]
    assert isinstance(given, dict)
    assert set(secret) <= set(given)
    plain = {str(name): str(value) for name, value in given.items() if name not in {**secret, **services.environment}}
    _start(services, "mlflow", {"5000": str(services.ports["mlflow"]), DATABASE: uri}, environment={**plain, **secret})


def database_password(services: Services) -> str:
    """The database's, and the key of MLflow's sessions: the same when a server is started again."""
    return services.environment["RAY_AUTH_TOKEN"][::-1]


def _start_postgres(services: Services, folder: Path) -> str:
    """PostgreSQL with a password, and the address of its database; SQLite's where there is no PostgreSQL."""
    programs = postgres()
    if programs is None:
        return f"sqlite:///{services.folder}/mlflow.db"
    owner = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    given = compose()["postgres"]["environment"]
    assert isinstance(given, dict)
    (folder / "password").write_text(database_password(services))
    if owner:
        shutil.chown(folder, owner)
        shutil.chown(folder / "password", owner)
    made = [programs / "initdb", "--pgdata", folder / "data", "--username", given["POSTGRES_USER"], "--auth", "scram-sha-256", "--no-sync"]
    subprocess.run([*made, "--pwfile", folder / "password"], user=owner, cwd="/", check=True, capture_output=True)
    port = str(services.ports["postgres"])
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", port, "-k", str(folder), "-F"]
    with open(services.folder / "postgres.log", "wb") as log:
        services.running["postgres"] = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, user=owner, cwd="/", start_new_session=True
        )
    reach = ["--host", "127.0.0.1", "--port", port, "--username", given["POSTGRES_USER"]]
    services.wait("postgres", lambda: subprocess.run([programs / "pg_isready", *reach], capture_output=True).returncode == 0)
    environment = {**os.environ, "PGPASSWORD": database_password(services)}
    subprocess.run([programs / "createdb", *reach, given["POSTGRES_DB"]], env=environment, cwd="/", check=True, capture_output=True)
    return DATABASE.replace("@postgres/", f"@127.0.0.1:{port}/")


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


def _environment(ports: dict[str, int]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "MLFLOW_"))}
    given = {str(name): str(value) for name, value in compose()["head"]["environment"].items()}  # type: ignore[attr-defined]
    given |= {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['store']}",
        "AWS_ACCESS_KEY_ID": "allograft",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16),
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **given, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _start(
    services: Services,
    name: str,
    place: dict[str, str],
    extra: Sequence[str] = (),
    *,
    like: str | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    command = [str(word) for word in compose()[like or name]["command"]]  # type: ignore[attr-defined]
    if name == "store":
        command.insert(0, "moto_server")
    for was, now in {"0.0.0.0": "127.0.0.1", **place}.items():
        command = [word.replace(was, now) for word in command]
    with open(services.folder / f"{name}.log", "wb") as log:
        services.running[name] = subprocess.Popen(
            [tool(command[0]), *command[1:], *extra],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**services.environment, **(environment or {})},
            cwd=services.folder,
            start_new_session=True,
        )
