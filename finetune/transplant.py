"""What a strategy makes of a source: a network with its parameter groups, and the hash of what was really put into it.

    make = strategies.get("full")
    transplant = make.transplant(spec, weights, task, make.Config(), seed)   # -> Transplant(module, groups, ...)

A strategy is one file: `Config` (its options, strict) and `transplant`. Groups are built here on the bare module, before any wrapper, so
that a learning rate meant for the encoder cannot land on a wrapper's only child.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from base.config import Strict
from encoders.build import Encoder, build
from encoders.weights import Loaded, State, load_into, sha256_of
from finetune.heads import Head, PooledHead, PyramidHead, UnetHead
from finetune.network import Network
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
    """Parameters that train alike: `lr_scale` times the recipe's rate, with or without its weight decay.

    start: the share of the epochs after which they begin to train; until then they are frozen.
    """

    name: str
    params: list[nn.Parameter]
    lr_scale: float = 1.0
    decay: bool = True
    start: float = 0.0


@dataclass
class Transplant:
    """The bare network, its groups, what was loaded, and the hash of the encoder's tensors right after loading.

    views: what trains: augmented views by the task's `recipe`, or the evaluation view by its `linear` recipe, where the features of a
        frozen encoder are computed once and kept.
    probe: before all else the head is trained alone on kept features, by the task's `linear` recipe.
    penalty: a scalar added to the loss of every step of training, or None.
    """

    module: Network
    groups: list[Group]
    loaded: Loaded | None
    sha256: str
    views: Literal["augmented", "evaluation"] = "augmented"
    probe: bool = False
    penalty: Callable[[], torch.Tensor] | None = None


def receive(spec: EncoderSpec, weights: Mapping[str, torch.Tensor] | None, seed: int) -> tuple[Encoder, Loaded | None, str]:
    """An encoder with the weights in it (its own random ones when None) and the sha256 of its tensors.

    Raises:
        WorkError: the weights do not fit.
    """
    encoder = build(spec.architecture, spec.in_chans, spec.mean, spec.std, seed, spec.image_size)
    loaded = None if weights is None else load_into(encoder.net, weights)
    return encoder, loaded, sha256_of(encoder.net.state_dict())


def assemble(encoder: Encoder, task: Task, seed: int, *, linear: bool) -> Network:
    """The encoder with the task's head, drawn from the seed alone. linear: the head is linear in the features, which it standardises."""
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
    return Network(encoder, head, pyramid=segments)


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
