"""layer-decay: the learning rate falls from cut to cut towards the stem (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254).

The head has the recipe's rate, the last block `decay` times that, the block before it `decay` squared times, and so on. The closing norm
goes with the last block.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from base.config import Strict
from base.seeds import seed_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Group, Transplant, assemble, groups_of, receive


class Config(Strict):
    """decay: the ratio of the rates of one cut and the next. Per block: for deep networks nearer to 1."""

    decay: float = Field(0.75, gt=0, le=1)


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """All weights from the source, all trained."""
    encoder, loaded, sha256 = receive(spec, weights, seed)
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    count = len(encoder.cuts)
    groups = groups_of(module, lambda at: Group(f"encoder, {encoder.cuts[at].name}", [], options.decay ** (count - at)))
    return Transplant(module, groups, loaded, sha256)
