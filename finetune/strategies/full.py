"""full: every weight of the encoder from the source, a new head, everything trained (FTL of Peng et al., arXiv 2106.05152)."""

from collections.abc import Mapping

from torch import Tensor

from base.config import Strict
from base.seeds import seed_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, receive


class Config(Strict):
    """No options."""


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Strict, seed: int) -> Transplant:
    """Classification: pooled features and a linear layer. Segmentation: U-Net on the encoder's pyramid."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256)
