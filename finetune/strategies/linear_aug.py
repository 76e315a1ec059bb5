"""linear-aug: the encoder frozen, batch-norm statistics included, and a linear head trained on augmented views by the task's own recipe.

Feature extraction as Peng et al. train it (arXiv 2106.05152), to compare with their numbers. `linear` sees the evaluation view only,
standardises features and computes them once: the probe to compare encoders by, at a small part of the cost.
"""

from collections.abc import Mapping

from torch import Tensor

from base.config import Strict
from base.seeds import seed_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, receive


class Config(Strict):
    """No options."""


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Strict, seed: int) -> Transplant:
    """The network of `linear`, whose standardisation stays the identity."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder.requires_grad_(False), task, seed_of("head", seed), linear=True)
    return Transplant(module, groups_of(module), loaded, sha256)
