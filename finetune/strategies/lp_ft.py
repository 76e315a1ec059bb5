"""lp-ft: first the head on the frozen encoder's features, then everything from there (Kumar et al. 2022, arXiv 2202.10054).

A head that starts at random sends gradients into the encoder that bend features which were right; one that fits already does not.
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
    """Classification: `linear`'s head, whose standardisation keeps the statistics of the probe. Segmentation: the decoder."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder, task, seed_of("head", seed), linear=task.kind != "segmentation")
    return Transplant(module, groups_of(module), loaded, sha256, probe=True)
