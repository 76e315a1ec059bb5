"""The connection to Ray: the cluster this driver is part of, or one started here for the study and ended with it.

with session():
    ...
"""

import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from base.errors import RequestError, WorkError

# Ray Train polls its workers every 2 s by default, which adds up at the start and the end of short runs, and waits long for what is lost:
# 60 s for room that a dead node has only in a stale view, 30 s for the survivors of a death to part, who wait for the dead.
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
# glibc hands every large tensor's pages back to the kernel and faults them in again at the next step; kept, a small network trains nearly
# twice as fast on a CPU (docs/log.md). Ray Train trains in a thread, whose own arena would not keep them: one arena for all.
# One thread by default: a worker sets its own number, and two pools of threads on the same cores only fight.
WORKER_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_ARENA_MAX": "1",
}
# What the driver's environment says about storage holds on every worker. Never a credential itself, which everyone at the dashboard would
# read: nodes have their own, and a cluster started here inherits them. Nor the secret: names are hashed while planning.
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "ALLOGRAFT_CACHE",
    "ALLOGRAFT_CACHE_GB",
    "ALLOGRAFT_REVISION",
)
CONNECT_S = 10.0


@contextmanager
def session() -> Iterator[None]:
    """Ray, connected. A cluster given by RAY_ADDRESS (as inside a Ray job) is joined and left; otherwise one is started on this machine.

    Raises:
        RequestError: no cluster at RAY_ADDRESS, or one of another version of Ray or Python.
        WorkError: none could be started here.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # A job submitted with --runtime-env-json may name variables that are forwarded here too; Ray refuses such doubles by default.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    import ray

    variables = {name: os.environ[name] for name in (*FORWARDED, *TRAIN_SETTINGS) if name in os.environ}
    runtime_env = {"env_vars": {**variables, **WORKER_SETTINGS, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime_env}
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _own_sigterm():
            if address and address != "local":
                _reach(address)
                ray.init(address="auto", **quiet)
            else:
                _start_here(quiet)
    except ConnectionError as error:
        raise RequestError(f"no Ray cluster at {address}", where="RAY_ADDRESS", hint="ray start --head, or unset RAY_ADDRESS") from error
    except RuntimeError as error:
        found = re.findall(r"(?:Ray|Python): (\S+)", str(error))
        if "Version mismatch" not in str(error) or len(found) != 4:
            raise
        what = "the cluster has Ray {} and Python {}, this command Ray {} and Python {}".format(*found)
        hint = f"the same on all nodes and here, from requirements.lock: ray=={ray.__version__}"
        raise RequestError(what, where=f"RAY_ADDRESS={address}", hint=hint) from error
    try:
        yield
    except (RequestError, WorkError):
        ray.shutdown()
        raise
    # What else ends a study, Ctrl-C for one, leaves threads of it behind. One that calls Ray after a shutdown ends the whole process on the
    # spot, before it has given its lock back or said why; so Ray ends with the process.
    ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM does what this process has set for it, if anything, while Ray starts and after. Ray sets a handler in Python, which ends the
    process without a word, and at last one in C++, which prints the stacks of its threads."""
    import ray

    held, set_by_ray = signal.getsignal(signal.SIGTERM), ray._private.utils.set_sigterm_handler
    if not callable(held):
        yield
        return
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
        signal.signal(signal.SIGTERM, held)
    finally:
        ray._private.utils.set_sigterm_handler = set_by_ray


def _reach(address: str) -> None:
    """Raises ConnectionError where nothing listens at HOST:PORT: Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def _start_here(settings: dict[str, Any]) -> None:
    """A cluster on this machine. Ray gives its node 30 s, which cannot be set and which a busy machine may exceed: it is tried twice."""
    import ray

    for _ in range(2):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise WorkError("Ray did not start within its 30 s, twice", hint="the machine is too busy: run the same command again")
