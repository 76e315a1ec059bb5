"""lora: a vision transformer's weights frozen, and in every attention two matrices of low rank that train beside them.

Hu et al. 2021 (arXiv 2106.09685): W x becomes W x + alpha / rank * up (down x), on the projections to queries, keys and values, and on the
one out of the attention. `up` starts at 0, so the network starts as the source. `merge(encoder.net)` makes plain weights of it.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from encoders.cuts import FAMILIES, is_vit
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, receive

PROJECTIONS = ("attn.qkv", "attn.proj")


class Config(Strict):
    """rank: of the matrices. alpha: their product is multiplied by alpha / rank."""

    rank: int = Field(8, gt=0)
    alpha: float = Field(16.0, gt=0)


class Adapted(nn.Linear):
    """A frozen linear layer, under the names of its tensors, with `down` and `up` beside it."""

    def __init__(self, plain: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = alpha / rank
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, plain.in_features), a=5**0.5))  # the authors' start
        self.up = nn.Parameter(torch.zeros(plain.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> nn.Linear:
        """One plain layer that does the same."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter((self.weight + self.scale * self.up @ self.down).detach())
        plain.bias = self.bias
        return plain


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: not a vision transformer."""
    if not is_vit(architecture):
        known = ", ".join(FAMILIES["vit"].architectures)
        raise RequestError(f"lora adapts the attention of vision transformers, {architecture} is none", hint=f"these are: {known}")


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """All weights from the source; only the added matrices and the head train.

    Raises:
        RequestError: not a vision transformer.
    """
    check(spec.architecture, task, options)
    encoder, loaded, sha256 = receive(spec, weights, seed)
    encoder.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("lora", seed))
        for name, module in list(encoder.net.named_modules()):
            if name.endswith(PROJECTIONS) and isinstance(module, nn.Linear):
                _put(encoder.net, name, Adapted(module, options.rank, options.alpha))
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256)


def merge(net: nn.Module) -> nn.Module:
    """A copy of the network with plain layers in place of adapted ones: timm's own, with timm's names of tensors."""
    plain = copy.deepcopy(net)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Adapted):
            _put(plain, name, module.merged())
    return plain


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)
