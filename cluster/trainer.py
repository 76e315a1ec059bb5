"""Ray Train's trainer with three rules of ours, and without Ray Data; its placement, polling and restarts are as they come.

* A run may die as often as it likes while it gets further: only deaths without a new checkpoint in between are counted (`Patience`).
* An elastic run takes as many workers as there is room for, of the numbers that divide its micro-batches (`Divisors`).
* A worker that is told to go (SIGTERM, a node that drains) says so to the training, which saves and is placed elsewhere (`notice`).

The classes stand on Ray's internal ones, which is why Ray is pinned: tests/test_cluster_doctor.py and test_cluster_hosts.py run them.
"""

import os
import signal
import socket
import threading
from typing import Any

from ray._private.state import state
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.exceptions import ControllerError

from base.errors import AllograftError
from engine.checkpoint import newest_step

MAX_FAILURES = 3
_terminated = threading.Event()


class Noticed(Exception):
    """The training has saved and stopped, since a node of its own is about to go."""


class Final(Exception):
    """An error of the work itself, which another attempt would meet again."""


class Trainer(TorchTrainer):
    """TorchTrainer, given the two policies below, without Ray Data."""

    def __init__(self, *args: Any, checkpoints: str, micro_batch: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._micro_batch = checkpoints, micro_batch

    def _create_default_callbacks(self) -> list[Any]:
        # Its manager is one more process for every group of workers, with seconds of imports beside theirs, for datasets that are not ours.
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = Patience(self._checkpoints)
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = Divisors(self.scaling_config, self._micro_batch)
        return super()._initialize_and_run_controller(**given)


class Patience(FailurePolicy):
    """Restart after every death, but after `MAX_FAILURES` restarts in a row that led to no new checkpoint.

    A node that was taken away, and waiting for room, cost nothing. A worker group that cannot even start counts as a death.
    """

    def __init__(self, checkpoints: str) -> None:
        super().__init__(FailureConfig())
        self.checkpoints = checkpoints
        self.deaths, self.step = 0, newest_step(checkpoints)

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """RETRY or RAISE."""
        if isinstance(training_failed_error, ControllerError):
            cause = training_failed_error.controller_failure
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY
            if not isinstance(cause, WorkerGroupStartupFailedError):
                return FailureDecision.RAISE
        elif failure(training_failed_error, Final):
            return FailureDecision.RAISE
        elif _is_preemption_failure(training_failed_error) or failure(training_failed_error, Noticed):
            return FailureDecision.RETRY
        try:
            step = newest_step(self.checkpoints)
        except AllograftError:  # a store that is away says nothing of progress
            step = self.step
        if step > self.step:
            self.deaths, self.step = 0, step
        self.deaths += 1
        return FailureDecision.RETRY if self.deaths <= MAX_FAILURES else FailureDecision.RAISE


def failure(error: Any, kind: type[Exception]) -> Exception | None:
    """The first of the workers' errors that is of that kind."""
    return next((one for one in getattr(error, "worker_failures", {}).values() if isinstance(one, kind)), None)


class Divisors(ElasticScalingPolicy):
    """Ray's elastic policy, without nodes that drain, rounded down to a number of workers that divides the global batch, or each of the
    micro-batches that it is cut into.
    """

    def __init__(self, scaling_config: Any, micro_batch: int) -> None:
        super().__init__(scaling_config)
        self.micro_batch = micro_batch

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray counts a node that drains and places nothing on it: a run would wait for its room until it is gone.
        draining = state.get_draining_nodes()
        staying = {node: held for node, held in reserved_resources.items() if node not in draining}
        return divisor(self.micro_batch, super()._count_possible_workers(staying))


def divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 0 for 0."""
    return next((count for count in range(min(most, number), 0, -1) if number % count == 0), 0)


class Prepare(WorkerCallback):
    """What a worker does in its main thread, before torch's processes meet."""

    def after_init_train_context(self) -> None:
        """Listen to SIGTERM; meet the others on the network on which Ray's nodes meet."""
        _terminated.clear()
        signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
        name = interface()
        if name is not None:
            # gloo takes the address of the host's name, which is often 127.0.1.1; NCCL takes the first interface it finds.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface() -> str | None:
    """The network interface that has the address by which Ray knows this node; None for loopback."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    names = [name for name, held in psutil.net_if_addrs().items() for one in held if one.address == address]
    return next((name for name in names if not address.startswith("127.")), None)


def notice() -> str | None:
    """Why this worker, or another of its run, is about to be taken away; None while nothing is known."""
    if _terminated.is_set():
        return f"SIGTERM on {socket.gethostname()}"
    told = get_train_context().preemption_context.preemption_info
    return f"ranks {told.preempted_ranks} are on a node that drains" if told is not None else None
