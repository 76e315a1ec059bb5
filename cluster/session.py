"""The connection to Ray: the cluster this driver is part of, or one started here for the study and ended with it.

with session(study.resources):
    ...
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from base.errors import RequestError

# Ray Train polls its workers every 2 s by default, which adds up at the start and the end of short runs; the preemption
# watcher is one more process importing torch, and only managed spot nodes need it.
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
# What the driver's environment says about storage and secrets holds on every worker.
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "ALLOGRAFT_SECRET_FILE",
)


@contextmanager
def session() -> Iterator[None]:
    """Ray, connected. A cluster given by RAY_ADDRESS (as inside a Ray job) is joined and left; otherwise one is started on this machine.

    Raises:
        RequestError: no cluster at RAY_ADDRESS.
    """
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    variables = {name: os.environ[name] for name in (*FORWARDED, *TRAIN_SETTINGS) if name in os.environ}
    # One thread by default: a worker sets its own number, and two pools of threads on the same cores only fight.
    runtime_env = {"env_vars": {**variables, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime_env}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address="auto" if address != "local" else "local", **quiet)
        else:
            ray.init(address="local", **quiet)
    except ConnectionError as error:
        raise RequestError(f"no Ray cluster at {address}", where="RAY_ADDRESS", hint="ray start --head, or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()
