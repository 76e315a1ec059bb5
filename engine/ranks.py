"""The processes that train together: their number, sums over them, and DeepSpeed's quiet import.

    start()                      # joins nothing new when torch.distributed already runs; otherwise a group of one
    total = all_sum(count_1)     # the same on every rank

Everything here also works in a lone process without torch.distributed.
"""

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from base.errors import WorkError


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def device() -> torch.device:
    """Where this rank trains: its GPU when there is one, otherwise the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, without gradient; the argument is left alone."""
    out = values.detach().clone()
    if world() > 1:
        dist.all_reduce(out)
    return out


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_sum(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_sum(grads[0])  # every rank's loss depends on every rank's values


def summed(values: Tensor) -> Tensor:
    """`all_sum` with gradient: of the sum of all ranks' losses. All ranks must also run backward together."""
    return values if world() == 1 else cast(Tensor, _Summed.apply(values))


def all_gather(values_N: Tensor) -> Tensor:
    """Concatenation over ranks in rank order, without gradient. All ranks hold the same shape."""
    if world() == 1:
        return values_N.detach()
    parts = [torch.empty_like(values_N) for _ in range(world())]
    dist.all_gather(parts, values_N.detach().contiguous())
    return torch.cat(parts)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process takes itself for the only one: what is gone through without values must not wait for the others."""
    started, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = started


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


def share(value: Any) -> Any:
    """Rank 0's plain value (JSON-like) on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device() if dist.get_backend() == "nccl" else None)
    return box[0]


def share_buffers(module: torch.nn.Module) -> None:
    """Make every buffer equal to rank 0's. DeepSpeed broadcasts parameters only, never buffers."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def differing_buffers(module: torch.nn.Module) -> list[str]:
    """Names of the buffers that are not bit-identical on all ranks; the same list on every rank."""
    if world() == 1:
        return []
    named = [(name, buffer) for name, buffer in module.named_buffers() if buffer.numel()]
    apart = torch.zeros(len(named), device=device())
    for i, (_, buffer) in enumerate(named):
        reference = buffer.clone()
        dist.broadcast(reference, src=0)
        same = torch.equal(reference.nan_to_num(), buffer.nan_to_num()) if buffer.is_floating_point() else torch.equal(reference, buffer)
        apart[i] = float(not same)
    apart = all_sum(apart)
    return [name for (name, _), count in zip(named, apart.tolist(), strict=True) if count]


def start() -> None:
    """Make sure that torch.distributed and DeepSpeed's layer above it run. Does nothing the second time.

    A lone process gets a gloo (or NCCL) group of one over a file, so that no port and no environment variable is needed. What is started
    here is ended before the process is.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:  # torchrun
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        else:
            meeting = tempfile.mkdtemp(prefix="allograft-ranks-")
            atexit.register(shutil.rmtree, meeting, ignore_errors=True)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, init_method=f"file://{meeting}/store", rank=0, world_size=1)
        atexit.register(_end)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*", category=FutureWarning)
    # DeepSpeed refuses to start without it, though only launchers need it.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else rank()))
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _end() -> None:
    # A thread of gloo may still hold the tensors of the last collective. If it lets go of them while Python is ending, it asks for the
    # interpreter's lock, which ends the thread in the midst of C++: "terminate called without an active exception", exit code -6.
    if dist.is_initialized():
        dist.destroy_process_group()


def import_deepspeed() -> ModuleType:
    """DeepSpeed, imported without what costs start-up time and is never used here.

    * its autotuner imports mlflow when it finds it: seconds and a hundred MB in every worker, for nothing;
    * on a CPU its communication layer compiles a C++ kernel at first use (a minute): every compiled op is declared incompatible,
      which also skips probing compilers; torch's own optimizers and gloo need none of them;
    * it probes for accelerators and says so.
    """
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with _hidden("mlflow"):
            import deepspeed
    except ImportError as error:
        raise WorkError(f"DeepSpeed cannot be imported: {error}", hint="make setup") from error
    for handler in (log := logging.getLogger("DeepSpeed")).handlers:
        handler.setLevel(logging.ERROR)
    log.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    # None in sys.modules makes `import name` raise ImportError. Left alone if somebody has imported it: then it costs nothing more.
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
