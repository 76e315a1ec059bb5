"""linear: the encoder frozen, batch-norm statistics included, and a head that is linear in its features.

Classification: one linear layer on pooled features. Segmentation: the sum over cut points of 1x1 convolutions, brought to full size.
Features are standardised with statistics of the training images and computed once, on the evaluation view.
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
    """A network whose only trainable part is its head; `Network.train()` leaves the encoder in evaluation mode."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder.requires_grad_(False), task, seed_of("head", seed), linear=True)
    return Transplant(module, groups_of(module), loaded, sha256, views="evaluation")
