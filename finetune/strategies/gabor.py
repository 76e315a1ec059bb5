"""gabor: a first convolution of synthetic Gabor filters, everything else the architecture's own initialisation, everything trained.

Raghu et al. 2019 (arXiv 1902.07208), who do not say how theirs are made. These: eight orientations in equal steps, each even and odd
(phases 0 and 90 degrees), at as many frequencies as the layer has room for, in an envelope of about one octave; each of mean 0, and of the
standard deviation that the source's first convolution has as a whole. Every input channel gets the same filter.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from encoders.build import Encoder, build
from encoders.weights import sha256_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, receive, rest

ORIENTATIONS, PHASES = 8, 2
HIGHEST = 0.35  # cycles a pixel: little of an octave around it is beyond what a grid of pixels can hold
OCTAVE = 0.56  # standard deviation of the envelope in wavelengths
SMALLEST = 4  # pixels: in 3 x 3 eight orientations are not told apart


class Config(Strict):
    """No options."""


def check(architecture: str, task: Task, options: Strict) -> None:
    """Raises RequestError: the first convolution is too small or has too few filters."""
    with torch.device("meta"):
        count, _, side, _ = _first(build(architecture, 1))[1].shape
    if count < ORIENTATIONS * PHASES or side < SMALLEST:
        what = f"{architecture} begins with {count} filters of {side} px, too small for Gabor filters"
        hint = f"{SMALLEST} px at least have resnet18 to resnet152, densenet*, cbr_*, convnext_*, swin_*, vit_*, alexnet"
        raise RequestError(what, hint=hint)


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Strict, seed: int) -> Transplant:
    """Of the source nothing is left but the scale of its first convolution.

    Raises:
        RequestError: the first convolution is too small or has too few filters.
    """
    check(spec.architecture, task, options)
    donor, _, _ = receive(spec, weights, seed)
    encoder = rest(spec, seed)
    name, first = _first(encoder)
    scale = float(donor.net.state_dict()[name].double().std(correction=0))
    with torch.no_grad():
        first.copy_((bank(first.shape[0], first.shape[-1]) * scale)[:, None].expand_as(first))
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), None, sha256_of(encoder.net.state_dict()))


def _first(encoder: Encoder) -> tuple[str, nn.Parameter]:
    return next((name, parameter) for name, parameter in encoder.net.named_parameters() if parameter.ndim == 4)


def bank(filters: int, side: int) -> Tensor:
    """Gabor filters f32 N,side,side of mean 0 and standard deviation 1; the first 16 have all orientations in both phases."""
    steps = max(math.ceil(filters / (ORIENTATIONS * PHASES)) - 1, 1)
    lowest = max(1.25 / side, 0.1)
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) - (side - 1) / 2] * 2, indexing="ij")
    found = []
    for i in range(filters):
        angle = math.pi * (i % ORIENTATIONS) / ORIENTATIONS
        phase = math.pi / 2 * (i // ORIENTATIONS % PHASES)
        frequency = HIGHEST * (lowest / HIGHEST) ** (i // (ORIENTATIONS * PHASES) / steps)
        along = x * math.cos(angle) + y * math.sin(angle)
        envelope = torch.exp(-(x.square() + y.square()) / (2 * (OCTAVE / frequency) ** 2))
        wave = envelope * torch.cos(2 * math.pi * frequency * along + phase)
        wave -= wave.mean()
        found.append(wave / wave.std(correction=0))
    return torch.stack(found).float()
