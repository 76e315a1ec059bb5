"""l2-sp: everything trained, and held near the source: alpha/2 |w - w0|^2 over the encoder, beta/2 |w|^2 over the head.

Li, Grandvalet and Davoine 2018 (arXiv 1802.01483), equation 3: decay towards where the weights started in place of decay towards 0.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.seeds import seed_of
from finetune.network import Network
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, receive


class Config(Strict):
    """alpha, beta: the authors' choice among the decades from 1e-3 to 1 was made per task on validation."""

    alpha: float = Field(0.1, ge=0)
    beta: float = Field(0.01, ge=0)


class Penalty:
    """A callable: the penalty of the network's present weights, against those of the encoder when this was made."""

    def __init__(self, module: Network, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.encoder: list[nn.Parameter] = list(module.encoder.parameters())
        self.head: list[nn.Parameter] = list(module.head.parameters())
        self.start = [parameter.detach().clone() for parameter in self.encoder]

    def __call__(self) -> Tensor:
        """A float32 scalar with gradient."""
        self.start = [w0.to(w.device) for w, w0 in zip(self.encoder, self.start, strict=True)]  # the network moved after it was made
        moved = torch.stack([(w - w0).square().sum() for w, w0 in zip(self.encoder, self.start, strict=True)]).sum()
        size = torch.stack([w.square().sum() for w in self.head]).sum()
        return self.alpha / 2 * moved + self.beta / 2 * size


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """All weights from the source. Weight decay is off: the penalty is in its place."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    groups = [replace(group, decay=False) for group in groups_of(module)]
    return Transplant(module, groups, loaded, sha256, penalty=Penalty(module, options.alpha, options.beta))
