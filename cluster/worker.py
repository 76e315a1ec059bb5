"""A warm process of the fan-out: it imports torch and timm once, then computes cells one after the other.

The ranks of a team are such processes on one node; see cluster.pool for how they are placed.
"""

import errno
import os
import socket
from contextlib import suppress
from typing import NamedTuple

from base.config import parse
from base.errors import AllograftError, WorkError
from cluster.context import WorkerContext
from finetune.cell import CellConfig

CONTEXT_BYTES = 700 * 2**20  # of a process's CUDA context and libraries, which its allocator does not count
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.EREMOTEIO, errno.EIO)


class Room(NamedTuple):
    """Where a worker is. gpu_bytes: of its GPU's memory, 0 without one."""

    node: str
    gpu_bytes: int


class Spent(NamedTuple):
    """What a cell took. gpu_bytes: of GPU memory at its peak, the process's own included; images: seen in training."""

    gpu_bytes: int
    images: int
    seconds: float


class StorageDown(WorkError):
    """Storage let a cell down, which is no fault of the cell: it may be tried again."""


class CellWorker:
    """A warm process: imports torch and timm once, then computes cells one after the other."""

    def __init__(self) -> None:
        import finetune.run  # noqa: F401  the import is the warming

    def meeting(self) -> tuple[str, int]:
        """Where the ranks of a team meet: this node's address and a port that is free."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), int(free.getsockname()[1])

    def start(self, rank: int, world: int, meeting: tuple[str, int] | None) -> Room:
        """Join the team; returns where it is."""
        import ray
        import torch

        self.rank, self.world = rank, world
        if meeting is not None:
            where = {"MASTER_ADDR": meeting[0], "MASTER_PORT": str(meeting[1]), "WORLD_SIZE": str(world), "RANK": str(rank)}
            os.environ.update(where | {"LOCAL_RANK": "0" if torch.cuda.is_available() else str(rank)})  # Ray shows each process its own GPU
            from engine import ranks

            ranks.start()
        total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        return Room(ray.get_runtime_context().get_node_id(), total)

    def run(self, config_json: str) -> Spent:
        """Compute one cell, or this rank's part of it.

        Raises:
            StorageDown: storage did not answer, or has no space left.
        """
        import json

        import torch

        from finetune import run

        config = parse(json.loads(config_json), CellConfig, "cell configuration")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run.run(config, WorkerContext(rank=self.rank, world_size=self.world, dir=config.out))
        except Exception as error:
            with suppress(RuntimeError):  # where CUDA broke this does, too, and the first error is the one to tell
                _peak_bytes()
            if isinstance(error, AllograftError | OSError) and of_storage(error):
                raise StorageDown(str(error)) from None
            raise
        return Spent(_peak_bytes(), result["train_images"] * result["selection"]["epochs"], result["seconds"])


def _peak_bytes() -> int:
    """GPU memory that the cell took at its peak; what its allocator holds goes back to those beside it."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    return peak + CONTEXT_BYTES


def of_storage(error: BaseException) -> bool:
    """Whether an error comes from a store that did not answer, or from a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.partition(".")[0] in ("botocore", "aiohttp"):
            return True
        if isinstance(cause, OSError) and (isinstance(cause, TimeoutError | ConnectionError) or cause.errno in STORAGE):
            return True
        cause = cause.__cause__
    return False


def of_cuda(error: BaseException) -> bool:
    """Whether a process can no longer use its GPU: after an error of CUDA that is no lack of memory, all that it asks of it fails."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("CUDA error", "cuDNN error", "CUDNN_STATUS"))
