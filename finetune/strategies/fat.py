"""fat: the source up to a cut, frozen, batch-norm statistics included, and a linear head on the features there.

The frozen truncated encoders of Peng et al. (arXiv 2106.05152), but not their recipe, which is the study's own on augmented views (Adam,
rate 1e-4, batches of 64, the rate halved at plateaus): as in `linear` the head trains by the task's `linear` recipe on the evaluation
view, with standardised features that are computed once.
"""

from collections.abc import Mapping

from torch import Tensor

from base.seeds import seed_of
from encoders.weights import sha256_of
from finetune.strategies import truncated
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of

Config, check = truncated.Config, truncated.check


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: truncated.Config, seed: int) -> Transplant:
    """Raises RequestError as `truncated`."""
    encoder, loaded = truncated.shortened(spec, weights, task, options, seed)
    sha256 = sha256_of(encoder.net.state_dict())
    module = assemble(encoder.requires_grad_(False), task, seed_of("head", seed), linear=True)
    return Transplant(module, groups_of(module), loaded, sha256, views="evaluation")
