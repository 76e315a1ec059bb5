"""lwft: nothing trains up to and including a cut, batch norm included; after it at a divided rate, and the head at the recipe's.

Layer-wise fine-tuning as Peng et al. compare it (arXiv 2106.05152), block-wise (`cut: layer2`) or layer-wise (`cut: layer2.1`). In their
code the rate was not divided under a wrapper, frozen batch norm went on drifting, and no cut meant that everything was frozen.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from base.config import Strict
from base.seeds import seed_of
from encoders.cuts import find
from finetune.task import Task
from finetune.transplant import EncoderSpec, Group, Transplant, assemble, freeze, groups_of, place, receive


class Config(Strict):
    """cut: the last that is frozen; null freezes nothing. base_lr_div: the encoder's rate is the recipe's divided by this."""

    cut: str | None = None
    base_lr_div: float = Field(10.0, ge=1)


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: no such cut."""
    if options.cut is not None:
        find(architecture, options.cut)


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """All weights from the source.

    Raises:
        RequestError: no such cut.
    """
    encoder, loaded, sha256 = receive(spec, weights, seed)
    if options.cut is not None:
        freeze(encoder, place(encoder, options.cut))
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    groups = groups_of(module, lambda _: Group("encoder", [], 1 / options.base_lr_div))
    return Transplant(module, groups, loaded, sha256)
