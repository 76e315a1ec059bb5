"""slim: weights of the source up to and including a cut, and after it a narrower network from its own initialisation, everything trained.

Transfusion's hybrid (Raghu et al. 2019, arXiv 1902.07208), which Peng et al. (arXiv 2106.05152) compare as TF. A cut within a stage of a
ResNet (layer-wise slim) needs a projection at the first narrow block, as the sums of a stage have one width: it gets the one that timm
gives the first block of a stage. ResNets and CBR.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from encoders.build import Encoder, build
from encoders.cuts import Cut, cuts, family, find, is_cbr
from encoders.weights import sha256_of
from finetune.task import Task
from finetune.transplant import EncoderSpec, Transplant, assemble, copied, groups_of, place, places, receive, rest


class Config(Strict):
    """cut: the last that keeps its width. factor: channels after it are divided by this."""

    cut: str
    factor: int = Field(2, ge=2)


def check(architecture: str, task: Task, options: Config) -> None:
    """Raises RequestError: no such cut, nothing after it, a family without widths to choose, or channels that do not divide."""
    if family(architecture) not in ("resnet", "cbr", "cbr-valid"):
        raise RequestError(f"{architecture} has no widths to choose", hint="slim is for resnet* and cbr_*")
    points, last = cuts(architecture), find(architecture, options.cut)
    if last == len(points) - 1:
        raise RequestError(f"nothing comes after {points[-1].name} that could be narrower", hint="an earlier cut")
    _narrowed(architecture, _own_widths(architecture), points, last, options.factor)


def within_stage(architecture: str, cut: str) -> bool:
    """Whether a cut lies inside a stage, so that the stage is part wide, part narrow."""
    points, last = cuts(architecture), find(architecture, cut)
    return last < _end(points, points[last].name.partition(".")[0])


def transplant(spec: EncoderSpec, weights: Mapping[str, Tensor] | None, task: Task, options: Config, seed: int) -> Transplant:
    """What is narrow is drawn from the cell's seed alone.

    Raises:
        RequestError: no such cut, nothing after it, a family without widths to choose, or channels that do not divide.
    """
    check(spec.architecture, task, options)
    donor, loaded, _ = receive(spec, weights, seed)
    last = place(donor, options.cut)
    encoder = slimmed(spec, donor, last, options.factor, seed)
    loaded = copied(encoder, donor, loaded, [name for name, at in places(donor).items() if at <= last])
    module = assemble(encoder, task, seed_of("head", seed), linear=False)
    return Transplant(module, groups_of(module), loaded, sha256_of(encoder.net.state_dict()))


def slimmed(spec: EncoderSpec, donor: Encoder, last: int, factor: int, seed: int) -> Encoder:
    """The donor's architecture, narrow after the cut of that index, with its own initialisation throughout. Raises as `transplant`."""
    own = _widths(donor)
    if spec.cut is not None:
        raise RequestError("a truncated source has no slim form", hint="slim a whole one")
    encoder = rest(spec, seed, _narrowed(spec.architecture, own, donor.cuts, last, factor))
    cut = donor.cuts[last].name
    if within_stage(spec.architecture, cut):
        stage, _, block = cut.partition(".")
        _widen(encoder.net, donor.net, stage, int(block) + 1, seed)
    return encoder


def _narrowed(architecture: str, own: Mapping[str, int], points: Sequence[Cut], last: int, factor: int) -> tuple[int, ...]:
    """The widths of the stages, those that end after the cut of that index divided. Raises RequestError: they do not divide."""
    narrow = [width for stage, width in own.items() if _end(points, stage) > last]
    if any(width % factor for width in narrow):
        raise RequestError(f"factor: {narrow} channels of {architecture} do not divide by {factor}")
    return tuple(width // factor if _end(points, stage) > last else width for stage, width in own.items())


def _end(points: Sequence[Cut], stage: str) -> int:
    """Index of the stage's last cut."""
    return max(i for i, cut in enumerate(points) if cut.name.partition(".")[0] == stage)


@cache
def _own_widths(architecture: str) -> dict[str, int]:
    """Of the stages or layers as the architecture has them, told without weights."""
    with torch.device("meta"):
        return _widths(build(architecture, 1))


def _widths(donor: Encoder) -> dict[str, int]:
    """Of the stages of a ResNet, or the layers of a CBR."""
    if is_cbr(donor.architecture):
        return {cut.name: int(donor.net.get_parameter(f"{cut.name}.conv.weight").shape[0]) for cut in donor.cuts}
    stages: dict[str, Any] = {name: module for name, module in donor.net.named_children() if name.startswith("layer")}
    return {name: stages[name][-1].conv1.out_channels for name in stages}


def _widen(net: Any, donor: nn.Module, stage: str, first: int, seed: int) -> None:
    """Make the stage's blocks before number `first` as wide as the donor's, and that one the step to the narrow ones after it."""
    from timm.models.resnet import make_blocks

    blocks: Any = net.get_submodule(stage)
    theirs: Any = donor.get_submodule(stage)
    expansion = theirs[0].expansion
    planes, ins = blocks[-1].conv1.out_channels, theirs[0].conv1.out_channels * expansion
    stages, _ = make_blocks((type(theirs[0]),), (planes,), (2,), ins)  # one block alone it does not make
    for i in range(first):
        blocks[i] = copy.deepcopy(theirs[i])
    blocks[first] = stages[0][1][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("slim", seed))
        net.init_weights()
