"""What a strategy makes of a source: a network with its parameter groups, and the hash of what was really put into it.

    make = strategies.get("full")
    transplant = make.transplant(spec, weights, task, make.Config(), seed)   # -> Transplant(module, groups, ...)

A strategy is one file: `Config` (its options, strict) and `transplant`. Groups are built here on the bare module, before any wrapper, so
that a learning rate meant for the encoder cannot land on a wrapper's only child.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from base.config import Strict
from encoders.build import Encoder, build
from encoders.weights import Loaded, State, load_into, sha256_of
from finetune.heads import Head, Network, PooledHead, PyramidHead, UnetHead
from finetune.task import Task


class EncoderSpec(Strict):
    """Which network, and how stored pixels become its input."""

    architecture: str
    in_chans: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None  # see encoders.build.Encoder


@dataclass
class Group:
    """Parameters that train alike: `lr_scale` times the recipe's rate, with or without its weight decay."""

    name: str
    params: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True


@dataclass
class Transplant:
    """The bare network, its groups, what was loaded, and the hash of the encoder's tensors right after loading."""

    module: Network
    groups: list[Group]
    loaded: Loaded | None
    sha256: str


def receive(spec: EncoderSpec, weights: Mapping[str, torch.Tensor] | None, seed: int) -> tuple[Encoder, Loaded | None, str]:
    """An encoder with the weights in it (its own random ones when None) and the sha256 of its tensors.

    Raises:
        WorkError: the weights do not fit.
    """
    encoder = build(spec.architecture, spec.in_chans, spec.mean, spec.std, seed, spec.image_size)
    loaded = None if weights is None else load_into(encoder.net, weights)
    return encoder, loaded, sha256_of(encoder.net.state_dict())


def assemble(encoder: Encoder, task: Task, seed: int, *, linear: bool) -> Network:
    """The encoder with the task's head, drawn from the seed alone. linear: frozen encoder, head linear in its features."""
    segments = task.kind == "segmentation"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head: Head
        if not segments:
            head = PooledHead(encoder.num_features, len(task.labels), standardise=linear)
        elif linear:
            head = PyramidHead(encoder.pyramid_channels)
        else:
            head = UnetHead(encoder.pyramid_channels, encoder.in_chans)
    return Network(encoder, head, pyramid=segments, frozen=linear)


def groups_of(module: Network) -> list[Group]:
    """Trainable parameters by part (encoder, head) and by decay: none on biases and norms, which have one dimension."""
    groups: list[Group] = []
    for name, part in (("encoder", module.encoder), ("head", module.head)):
        params = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for decay in (True, False):
            chosen = [parameter for parameter in params if (parameter.ndim > 1) == decay]
            if chosen:
                groups.append(Group(name if decay else f"{name}, no decay", chosen, decay=decay))
    return groups


__all__ = ["EncoderSpec", "Group", "State", "Transplant", "assemble", "groups_of", "receive"]
