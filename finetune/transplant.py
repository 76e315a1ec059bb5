"""What a strategy makes of a source: a network with its parameter groups, and the hash of what was really put into it.

    make = strategies.get("full")
    transplant = make.transplant(spec, weights, task, make.Config(), seed)   # -> Transplant(module, groups, ...)
    verify(transplant, weights)                                              # what it says it copied is the source's, to the bit

A strategy is one file: `Config` (its options, strict) and `transplant`. Groups are built here on the bare module, before any wrapper, so
that a learning rate meant for the encoder cannot land on a wrapper's only child.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from base.config import Strict
from base.errors import RequestError, WorkError
from base.seeds import seed_of
from encoders.build import Encoder, build
from encoders.cuts import depths, find
from encoders.truncate import truncate
from encoders.volumes import inflate
from encoders.weights import Loaded, load_into, sha256_of
from finetune.heads import head_for
from finetune.network import Network
from finetune.task import Task


class EncoderSpec(Strict):
    """Which network, and how stored pixels become its input.

    image_size, widths: see encoders.build.Encoder. cut, flat: see encoders.truncate.Truncated, of sources that are truncated themselves.
    resolution: side of the cell's images, which flat features are of.
    """

    architecture: str
    in_chans: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    widths: tuple[int, ...] | None = None
    cut: str | None = None
    flat: int | None = None
    resolution: int | None = None


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

    loaded: which of the encoder's tensors are the source's; None where none is.
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


# -- encoders


def fresh(spec: EncoderSpec, seed: int, widths: tuple[int, ...] | None = None) -> Encoder:
    """The architecture's own initialisation, a function of spec and seed. widths: in place of the spec's."""
    encoder = build(spec.architecture, spec.in_chans, spec.mean, spec.std, seed, spec.image_size, widths or spec.widths)
    return encoder if spec.cut is None else truncate(encoder, spec.cut, spec.flat)


def receive(spec: EncoderSpec, weights: Mapping[str, torch.Tensor] | None, seed: int) -> tuple[Encoder, Loaded | None, str]:
    """An encoder with the weights in it (its own random ones when None) and the sha256 of its tensors.

    Raises:
        WorkError: the weights do not fit.
    """
    encoder = fresh(spec, seed)
    loaded = None if weights is None else load_into(encoder.net, weights)
    return encoder, loaded, sha256_of(encoder.net.state_dict())


def rest(spec: EncoderSpec, seed: int, widths: tuple[int, ...] | None = None) -> Encoder:
    """What strategies that copy a part only start the other parts from: no source, not even `random`, is drawn from this seed."""
    return fresh(spec, seed_of("rest", seed), widths)


def place(encoder: Encoder, cut: str) -> int:
    """Where that cut is in `encoder.cuts`; a stage's name means its last block.

    Raises:
        RequestError: no such cut, or one that a truncated encoder has no more.
    """
    at = find(encoder.architecture, cut)
    if at >= len(encoder.cuts):
        listed = ", ".join(point.name for point in encoder.cuts)
        raise RequestError(f"the source is a {encoder.architecture} truncated before '{cut}'", hint=f"its cuts are {listed}")
    return at


def places(encoder: Encoder) -> dict[str, int]:
    """Every tensor of the state dict -> index of the cut that it belongs to. Buffers are where their module's parameters are."""
    of_parameters = depths(encoder.architecture, encoder.net)
    of_modules = {name.rpartition(".")[0]: at for name, at in of_parameters.items()}
    return {name: of_modules[name.rpartition(".")[0]] for name in encoder.net.state_dict()}


def only(loaded: Loaded | None, names: Collection[str]) -> Loaded | None:
    """The report of what was loaded, less the tensors that are not among these."""
    if loaded is None:
        return None
    kept, missing, reshaped = (tuple(name for name in of if name in names) for of in (loaded.loaded, loaded.missing, loaded.reshaped))
    return replace(loaded, loaded=kept, missing=missing, reshaped=reshaped)


def copied(encoder: Encoder, donor: Encoder, loaded: Loaded | None, names: Collection[str]) -> Loaded | None:
    """Put the donor's tensors of these names into the encoder; returns the report of what was loaded, less all others."""
    state = donor.net.state_dict()
    encoder.net.load_state_dict({name: state[name] for name in names}, strict=False)
    return only(loaded, names)


def verify(transplant: Transplant, weights: Mapping[str, torch.Tensor]) -> None:
    """Prove, before the first step, that the tensors which were loaded as they are stand in the network bit for bit.

    Raises:
        WorkError: some do not.
    """
    loaded = transplant.loaded
    if loaded is None:
        return
    state = transplant.module.encoder.net.state_dict()
    apart = []
    for name in (name for name in loaded.loaded if name not in loaded.reshaped):
        here, there = state[name].cpu(), weights[loaded.prefix + name].to(state[name].dtype).cpu()
        if here.ndim > there.ndim:  # of volumes
            there = there.unsqueeze(2).expand_as(here) / here.shape[2]
        if not torch.equal(here, there):
            apart.append(name)
    if apart:
        raise WorkError(f"{len(apart)} transplanted tensors are not the source's: {', '.join(apart[:3])} ({loaded.table()})")


# -- networks


def shaped(encoder: Encoder, task: Task) -> Encoder:
    """The encoder for the task's inputs: a copy for volumes, where the task is of these.

    Raises:
        RequestError: a family that has none for volumes.
    """
    return inflate(encoder) if task.volume else encoder


def assemble(encoder: Encoder, task: Task, seed: int, *, linear: bool) -> Network:
    """The encoder, inflated where the task is of volumes, with the task's head, drawn from the seed alone.

    Args:
        linear: the head is linear in the features, which it standardises.
    """
    encoder = shaped(encoder, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = head_for(task, encoder, linear=linear)
    return Network(encoder, head, pyramid=task.kind == "segmentation")


def freeze(encoder: Encoder, until: int) -> Encoder:
    """No parameter up to and including the cut of that index trains; returns the encoder."""
    at = places(encoder)
    for name, parameter in encoder.net.named_parameters():
        parameter.requires_grad_(at[name] > until)
    return encoder


def groups_of(module: Network, of_cut: Callable[[int], Group] | None = None) -> list[Group]:
    """Trainable parameters by part (encoder, head) and by decay: none on biases and norms, which have one dimension.

    Args:
        of_cut: an empty group for each index of a cut, whose name and settings the parameters there get; one group `encoder` unless given.
    """
    at = places(module.encoder)
    named = [(of_cut(at[name]) if of_cut else Group("encoder", []), p) for name, p in module.encoder.net.named_parameters()]
    named += [(Group("head", []), p) for p in module.head.parameters()]
    groups: dict[str, Group] = {}
    for like, parameter in named:
        if parameter.requires_grad:
            decays = like.decay and parameter.ndim > 1
            name = like.name if decays or not like.decay else f"{like.name}, no decay"
            groups.setdefault(name, replace(like, name=name, params=[], decay=decays)).params.append(parameter)
    return list(groups.values())
