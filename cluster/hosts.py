"""What a host has: looked at by a task on each, for `cluster.doctor`. Values of credentials are never read, only where they come from.

facts = look(["/srv/out/.doctor-1f"], "10.0.0.2")      # here
hosts, silent = everywhere(paths)                      # on every node of the cluster that this driver has joined
"""

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from base import storage
from base.errors import AllograftError
from base.paths import is_url

PATIENCE_S = 90.0  # a host that is busy starts a process in seconds; one that says nothing for so long will not train either
NETWORK = ("NCCL_", "GLOO_", "TORCH_NCCL_", "FI_")
INFINIBAND = "/sys/class/infiniband"
PACKAGES = ("ray", "torch", "deepspeed", "timm", "webdataset")


@dataclass(frozen=True)
class Host:
    """Of one host. Bytes for sizes; `seen` by path: its content, or why it cannot be read; `skew_s`: its clock against the driver's."""

    host: str
    address: str
    versions: dict[str, str]
    shm: int
    memory: int
    free: dict[str, int]
    seen: dict[str, str]
    gpus: list[str]
    interfaces: dict[str, str]
    infiniband: list[str]
    environment: dict[str, str]
    credentials: str | None
    locked_memory: int
    resources: dict[str, float] = field(default_factory=dict)
    skew_s: float = 0.0
    skew_error_s: float = 0.0

    @property
    def name(self) -> str:
        """As users know it."""
        return f"{self.host} ({self.address})"


def look(paths: Sequence[str], address: str) -> Host:
    """The facts of the host that this runs on.

    Args:
        paths: files or folders to be looked for.
        address: by which Ray knows it.
    """
    import psutil

    cache = os.environ.get("ALLOGRAFT_CACHE", "")
    places = {"TMPDIR": tempfile.gettempdir(), "ALLOGRAFT_CACHE": cache if os.path.isdir(cache) else os.path.expanduser("~")}
    held = [(name, one.address) for name, all_ in psutil.net_if_addrs().items() for one in all_ if one.family == socket.AF_INET]
    return Host(
        host=socket.gethostname(),
        address=address,
        versions=versions(),
        shm=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        memory=psutil.virtual_memory().total,
        free={name: shutil.disk_usage(place).free for name, place in places.items()},
        seen={path: _seen(path) for path in paths},
        gpus=gpus(),
        interfaces=dict(held),
        infiniband=sorted(os.listdir(INFINIBAND)) if os.path.isdir(INFINIBAND) else [],
        environment={name: value for name, value in os.environ.items() if name.startswith(NETWORK)},
        credentials=_credentials() if any(path.startswith("s3://") for path in paths) else None,
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages whose versions must agree, without importing them; `none` for one that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def gpus() -> list[str]:
    """Names of the GPUs that the host's driver shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return shown.stdout.splitlines() if shown.returncode == 0 else []


def _seen(path: str) -> str:
    try:
        if not storage.exists(path):
            return "not there"
        return "a folder" if not is_url(path) and os.path.isdir(path) else storage.read_bytes(path).decode(errors="replace")[:100]
    except (AllograftError, OSError) as error:
        return str(error)


def _credentials() -> str | None:
    """Where boto3 finds who one is: `env`, `shared-credentials-file`, `iam-role` and so on; None where it finds nothing."""
    from botocore.session import get_session

    found = get_session().get_credentials()
    return str(found.method) if found else None


def everywhere(paths: Sequence[str]) -> tuple[list[Host], list[str]]:
    """Host of every living node of the cluster, and those that gave none, each with the reason."""
    import dataclasses

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    there = {node["NodeID"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive}
    ask, clock = ray.remote(num_cpus=0, max_retries=0)(look), ray.remote(num_cpus=0, max_retries=0)(_clock)
    asked = [ask.options(scheduling_strategy=there[node["NodeID"]]).remote(paths, node["NodeManagerAddress"]) for node in alive]
    ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_S)
    found, silent = [], []
    for node, reference in zip(alive, asked, strict=True):
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        try:
            facts = ray.get(reference, timeout=0.1)
            began = time.time()
            shown = ray.get(clock.options(scheduling_strategy=there[node["NodeID"]]).remote(), timeout=PATIENCE_S)
            took = time.time() - began
        except ray.exceptions.GetTimeoutError:
            silent.append(f"{name} has not answered in {PATIENCE_S:.0f} s")
            continue
        except ray.exceptions.RayError as error:
            silent.append(f"{name}: {str(error).strip().splitlines()[-1]}")
            continue
        skew = shown - began - took / 2
        found.append(dataclasses.replace(facts, resources=node["Resources"], skew_s=skew, skew_error_s=took / 2))
    return found, silent


def _clock() -> float:
    return time.time()
