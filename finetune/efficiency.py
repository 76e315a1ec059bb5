"""What a network costs: parameters, multiply-accumulates, and time for one image and for 32.

    found = measure(transplant.module, (1, 224, 224))                         # Efficiency(params, macs, latency)
    before = measure(whole(transplant.module.encoder, task), (1, 224, 224))   # the same architecture, nothing truncated, narrowed or added

Parameters and operations are a network's own; latency is this machine's, with this number of threads, in evaluation mode.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from base.config import Strict
from encoders.build import Encoder, build
from finetune.network import Network
from finetune.task import Task
from finetune.transplant import assemble

BATCHES = (1, 32)
LEAST, SECONDS = 7, 0.5  # of each batch at least so many runs, and for so long


class Latency(Strict):
    """Milliseconds for a batch of that many images: median and quartiles of `runs`, after a warm-up."""

    batch: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int


class Efficiency(Strict):
    """Of the whole network, head included; macs: of one image."""

    params: int
    macs: int
    latency: tuple[Latency, ...]


def cost(module: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image of that shape (convolutions and matrix products)."""
    module.eval()
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(_images(module, 1, shape))
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2


def measure(module: nn.Module, shape: Sequence[int]) -> Efficiency:
    """Cost, and latency on the module's own device, for images u8 CHW of that shape, or volumes CSHW."""
    params, macs = cost(module, shape)
    return Efficiency(params=params, macs=macs, latency=tuple(_latency(module, batch, shape) for batch in BATCHES))


def whole(encoder: Encoder, task: Task) -> Network:
    """The network of strategy `full` of the encoder's architecture, with random weights: what a transplant is compared with."""
    plain = build(encoder.architecture, encoder.in_chans, encoder.mean, encoder.std, image_size=encoder.image_size)
    device = next(encoder.parameters()).device
    return assemble(plain, task, 0, linear=False).to(device)


@torch.inference_mode()
def _latency(module: nn.Module, batch: int, shape: Sequence[int]) -> Latency:
    from torch.utils.benchmark import Timer  # looks for compilers and says what it misses

    module.eval()
    scope = {"module": module, "x": _images(module, batch, shape)}
    timer = Timer("module(x)", globals=scope, num_threads=torch.get_num_threads())
    times: list[float] = []
    while len(times) < LEAST:
        times += timer.blocked_autorange(min_run_time=SECONDS).times  # warms up by itself
    q1, median, q3 = (float(value) for value in np.percentile(times, [25, 50, 75]) * 1e3)
    return Latency(batch=batch, median_ms=median, q1_ms=q1, q3_ms=q3, runs=len(times))


def _images(module: nn.Module, batch: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.full((batch, *shape), 127, dtype=torch.uint8, device=next(module.parameters()).device)
