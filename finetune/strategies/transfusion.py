"""transfusion: weights of the source up to and including a cut, the architecture's own initialisation after it, everything trained.

Weight transfusion of Raghu et al. 2019 (arXiv 1902.07208). Batch norm, statistics included, goes with its block.
"""

from collections.abc import Mapping

from torch import Tensor

from base.config import Strict
from base.seeds import seed_of
from encoders.cuts import find
from encoders.weights import sha256_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, copied, groups_of, place, places, receive, rest


class Config(Strict):
    """cut: a name of encoders.cuts; a stage's means its last block."""

    cut: str


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: no such cut."""
    find(architecture, options.cut)


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """What is not copied is drawn from the cell's seed alone.

    Raises:
        RequestError: no such cut.
    """
    donor, loaded, _ = receive(spec, weights, seed)
    last = place(donor, options.cut)
    encoder = rest(spec, seed)
    loaded = copied(encoder, donor, loaded, [name for name, at in places(donor).items() if at <= last])
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256_of(encoder.net.state_dict()))
