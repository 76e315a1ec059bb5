"""truncated: the source up to a cut, the rest discarded, a head on the features there, everything trained.

TTL of Peng et al. (arXiv 2106.05152), block-wise (`cut: layer3`) or layer-wise (`cut: layer3.3`). Heads as theirs: linear in the mean over
positions (`pooled`) or in all positions (`flat`), whose size depends on the images'. Segmentation: the decoder gets the maps up to the cut.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from encoders.cuts import find
from encoders.truncate import Truncated, truncate
from encoders.weights import Loaded, sha256_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, groups_of, only, place, receive


class Config(Strict):
    """cut: the last that is kept; `auto` is for a study, whose search puts cuts in its place. head: of classification."""

    cut: str
    head: Literal["pooled", "flat"] = "pooled"


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: no such cut, or a flat head for masks."""
    find(architecture, options.cut)
    if options.head == "flat" and task.kind == "segmentation":
        raise RequestError("head: a segmentation task has no flat head", hint="head=pooled: the decoder gets maps in any case")


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """At the last cut nothing is cut off: with the pooled head it is `full`.

    Raises:
        RequestError: no such cut, or a flat head where there is none.
    """
    encoder, loaded = shortened(spec, weights, task, options, seed)
    sha256 = sha256_of(encoder.net.state_dict())
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256)


def shortened(
    spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int
) -> tuple[Truncated, Loaded | None]:
    """The source's encoder up to the cut, and what is left in it of what was loaded. Raises RequestError as `transplant`."""
    if options.cut == "auto":
        raise RequestError("cut: auto is searched for by a study", hint="allograft run STUDY.yaml, or name a cut")
    check(spec.architecture, task, options)
    if options.head == "flat" and spec.resolution is None:
        raise RequestError("head: a flat head needs the images' size", hint="resolution=64")
    encoder, loaded, _ = receive(spec, weights, seed)
    place(encoder, options.cut)
    small = truncate(encoder, options.cut, spec.resolution if options.head == "flat" else None)
    return small, only(loaded, small.net.state_dict())
