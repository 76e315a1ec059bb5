"""mean-var: weights drawn anew from the mean and variance of the source's tensors: its scale without its features.

Mean Var initialisation of Raghu et al. 2019 (arXiv 1902.07208): every weight of a convolution or linear layer is drawn independently from
N(mean, variance) of its tensor. What the paper does with all other parameters is not known. Here:

* biases of convolutions and linear layers, positions, tokens and layer scales start as the architecture's own;
* norms (batch norm, or layer or group norm where a family has that) by `batch_norm`: `default` as the architecture's own, `copy` the
  source's, running statistics included, `meanvar` weight and bias drawn like any tensor. Running statistics are never drawn: a variance
  could come out negative.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from base.config import Strict
from base.seeds import rng, seed_of
from encoders.build import Encoder
from encoders.cuts import find
from encoders.weights import sha256_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, copied, groups_of, place, places, receive, rest

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Config(Strict):
    """subset: cuts whose tensors are drawn, a stage's name for all of its blocks; all others are the architecture's own initialisation.

    after: up to and including this cut the source is copied whole, as in `transfusion`.
    """

    subset: Literal["all"] | list[str] = "all"
    after: str | None = None
    batch_norm: Literal["default", "copy", "meanvar"] = "default"


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: no such cut."""
    for name in ([] if options.subset == "all" else options.subset) + ([options.after] if options.after else []):
        find(architecture, name)


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """Everything trains. A tensor's draw depends on its name and the seed, not on which others are drawn.

    Raises:
        RequestError: no such cut.
    """
    donor, loaded, _ = receive(spec, weights, seed)
    at = places(donor)
    prefix = -1 if options.after is None else place(donor, options.after)
    subset = _subset(donor, options.subset)
    copy, draw = [], []
    for name in at:
        path, _, kind = name.rpartition(".")
        layer = donor.net.get_submodule(path)
        norm = options.batch_norm if isinstance(layer, NORMS) else None
        if at[name] <= prefix or (at[name] in subset and norm == "copy"):
            copy.append(name)
        elif at[name] in subset and (isinstance(layer, nn.Conv2d | nn.Linear) or norm == "meanvar"):
            draw += [name] if kind == "weight" or (norm and kind == "bias") else []
    encoder = rest(spec, seed)
    loaded = copied(encoder, donor, loaded, copy)
    state = donor.net.state_dict()
    encoder.net.load_state_dict({name: _drawn(state[name], seed, name) for name in draw}, strict=False)
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256_of(encoder.net.state_dict()))


def _subset(donor: Encoder, names: Literal["all"] | list[str]) -> set[int]:
    if names == "all":
        return set(range(len(donor.cuts)))
    found: set[int] = set()
    for name in names:
        place(donor, name)
        found |= {i for i, cut in enumerate(donor.cuts) if cut.name == name or cut.name.startswith(f"{name}.")}
    return found


def _drawn(source: Tensor, seed: int, name: str) -> Tensor:
    values = source.double().numpy()
    return torch.from_numpy(rng("mean-var", seed, name).normal(values.mean(), values.std(), values.shape)).float()
