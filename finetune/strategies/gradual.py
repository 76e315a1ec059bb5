"""gradual: the head first, then the encoder part by part from the top (gradual unfreezing, Howard and Ruder 2018, arXiv 1801.06146).

With 4 stages the epochs have five equal parts: in the first the head trains alone, in the last everything does.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from encoders.cuts import cuts
from finetune.task import Task
from finetune.transplant import EncoderSpec, Group, Transplant, assemble, groups_of, receive


class Config(Strict):
    """stages: parts of the encoder, of equally many cuts each, the lower ones first with one more; ResNet-18 has its stages at 4."""

    stages: int = Field(4, ge=1)


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: more stages than cuts."""
    _fits(options.stages, len(cuts(architecture)))


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """All weights from the source. A group's `start` is the share of the epochs that it waits.

    Raises:
        RequestError: more stages than cuts.
    """
    encoder, loaded, sha256 = receive(spec, weights, seed)
    count = len(encoder.cuts)
    _fits(options.stages, count)  # a truncated source has fewer
    module = assemble(encoder, task, seed_of("head", seed), linear=False)

    def of_cut(at: int) -> Group:
        size, longer = divmod(count, options.stages)
        stage = at // (size + 1) if at < longer * (size + 1) else (at - longer) // size
        return Group(f"encoder, stage {stage + 1}", [], start=(options.stages - stage) / (options.stages + 1))

    return Transplant(module, groups_of(module, of_cut), loaded, sha256)


def _fits(stages: int, count: int) -> None:
    if stages > count:
        raise RequestError(f"{stages} stages of an encoder with {count} cuts", hint=f"stages={count}")
