"""Named cut points of every family that can be transplanted, from the stem to the last block.

    cuts("resnet50")[1]                     # Cut(name="layer1.0", module="layer1.0", reduction=4)
    pyramid_cuts("resnet50")[1]             # Cut(name="layer1.2", ...): the last of each resolution, what decoders are fed
    find("resnet50", "layer3")              # 13: a stage's name means its last block
    refuse an unknown name:                 family("vgg16") raises RequestError with the families

One list a family: the stem, then every residual, dense, inception or transformer block in forward order; within a family the lists differ
by depth alone. A cut is where feature maps are taken and where networks are cut; it is the output of a module of the timm network, so the
tensors that a decoder sees come from the very weights that were loaded. What timm declares itself, the ends of the stages, is the
cross-check at every build.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from base.errors import RequestError, nearest


class Cut(NamedTuple):
    """A place in the network: its name, the timm module whose output it is, and the input side divided by the map's side."""

    name: str
    module: str
    reduction: int


def _stages(stages: Sequence[str], depths: Sequence[int], reductions: Sequence[int]) -> list[Cut]:
    """The blocks of each stage, numbered from 0 after the stage's name, as timm names the modules."""
    return [
        Cut(f"{stage}.{i}", f"{stage}.{i}", reduction)
        for stage, depth, reduction in zip(stages, depths, reductions, strict=True)
        for i in range(depth)
    ]


def _resnet(depths: Sequence[int]) -> list[Cut]:
    # The stem's cut is its activation, before the max pooling: that is the /2 map which a U-Net's last skip needs.
    return [Cut("stem", "act1", 2), *_stages([f"layer{i}" for i in (1, 2, 3, 4)], depths, (4, 8, 16, 32))]


def _densenet(depths: Sequence[int]) -> list[Cut]:
    # The map at a dense layer is all that its block has gathered so far. The last layer's is taken after the closing norm, as timm does.
    found = [Cut("stem", "features.norm0", 2)]
    for block, (depth, reduction) in enumerate(zip(depths, (4, 8, 16, 32), strict=True), 1):
        names = [f"denseblock{block}.denselayer{i}" for i in range(1, depth + 1)]
        found += [Cut(name, f"features.{name}", reduction) for name in names]
        if block < len(depths):
            found.append(Cut(f"transition{block}", f"features.transition{block}", 2 * reduction))
    return [*found[:-1], found[-1]._replace(module="features.norm5")]


def _inception(_: Sequence[int]) -> list[Cut]:
    # Convolutions without padding: sides are a little less than the reductions say. The auxiliary classifier is no part of the encoder.
    plain = [("Conv2d_4a_3x3", 4), *((f"Mixed_5{c}", 8) for c in "bcd"), *((f"Mixed_6{c}", 16) for c in "abcde")]
    plain += [(f"Mixed_7{c}", 32) for c in "abc"]
    return [Cut("stem", "Conv2d_2b_3x3", 2), *(Cut(name, name, reduction) for name, reduction in plain)]


def _efficientnet(depths: Sequence[int]) -> list[Cut]:
    return [Cut("stem", "bn1", 2), *_stages([f"blocks.{i}" for i in range(7)], depths, (2, 4, 8, 16, 16, 32, 32))]


def _convnext(depths: Sequence[int]) -> list[Cut]:
    return [Cut("stem", "stem", 4), *_stages([f"stages.{i}.blocks" for i in range(4)], depths, (4, 8, 16, 32))]


def _swin(depths: Sequence[int]) -> list[Cut]:
    return [Cut("stem", "patch_embed", 4), *_stages([f"layers.{i}.blocks" for i in range(4)], depths, (4, 8, 16, 32))]


def _cbr(depths: Sequence[int]) -> list[Cut]:
    # Without padding sides are less than the reductions say.
    return [Cut(f"conv{i}", f"conv{i}", 2 ** min(i, 4)) for i in range(1, depths[0] + 1)]


def _vit(depths: Sequence[int]) -> list[Cut]:
    # Positions and class token are no modules; what comes after them last, and in these networks does nothing, gives what blocks are fed.
    return [Cut("stem", "norm_pre", 16), *(Cut(f"block{i + 1}", f"blocks.{i}", 16) for i in range(depths[0]))]


def _alexnet(_: Sequence[int]) -> list[Cut]:
    # After each activation, before the pooling if there is one; torchvision numbers its layers through.
    return [Cut(f"conv{i}", f"features.{at}", side) for i, (at, side) in enumerate(((1, 4), (4, 8), (7, 16), (9, 16), (11, 16)), 1)]


def _clip(depths: Sequence[int]) -> list[Cut]:
    # The closing module, which does nothing here, is where timm declares the last map.
    found = [Cut("stem", "stem.conv3", 2), *_stages([f"stages.{i}" for i in range(4)], depths, (4, 8, 16, 32))]
    return [*found[:-1], found[-1]._replace(module="final_conv")]


def _bit(depths: Sequence[int]) -> list[Cut]:
    # Norms come before convolutions: the map at a block is its bare sum.
    return [Cut("stem", "stem.conv", 2), *_stages([f"stages.{i}.blocks" for i in range(4)], depths, (4, 8, 16, 32))]


class Family(NamedTuple):
    """Architectures and their depths, what makes their lists of cuts of these, the smallest side of an image that they take, and the module
    of this room that registers them in timm, where they are not timm's own."""

    architectures: dict[str, tuple[int, ...]]
    cuts: Callable[[Sequence[int]], list[Cut]]
    smallest: int | dict[str, int] = 1
    module: str | None = None


FAMILIES: dict[str, Family] = {
    "resnet": Family(
        {
            "resnet10t": (1, 1, 1, 1),
            "resnet14t": (1, 1, 1, 1),
            "resnet18": (2, 2, 2, 2),
            "resnet18d": (2, 2, 2, 2),
            "resnet26": (2, 2, 2, 2),
            "resnet26d": (2, 2, 2, 2),
            "resnet26t": (2, 2, 2, 2),
            "resnet34": (3, 4, 6, 3),
            "resnet34d": (3, 4, 6, 3),
            "resnet50": (3, 4, 6, 3),
            "resnet50d": (3, 4, 6, 3),
            "resnet101": (3, 4, 23, 3),
            "resnet152": (3, 8, 36, 3),
            "test_resnet": (1, 1, 1, 1),
        },
        _resnet,
    ),
    "densenet": Family(
        {"densenet121": (6, 12, 24, 16), "densenet169": (6, 12, 32, 32), "densenet201": (6, 12, 48, 32)}, _densenet, smallest=29
    ),
    "inception": Family({"inception_v3": ()}, _inception, smallest=75),
    "efficientnet": Family({"efficientnet_b0": (1, 2, 2, 3, 3, 4, 1)}, _efficientnet),
    "convnext": Family(
        {"convnext_tiny": (3, 3, 9, 3), "convnext_small": (3, 3, 27, 3), "convnext_base": (3, 3, 27, 3)}, _convnext, smallest=32
    ),
    "swin": Family(
        {
            "swin_tiny_patch4_window7_224": (2, 2, 6, 2),
            "swin_small_patch4_window7_224": (2, 2, 18, 2),
            "swin_base_patch4_window7_224": (2, 2, 18, 2),
        },
        _swin,
        smallest=4,
    ),
    "cbr": Family(
        {"cbr_larget": (5,), "cbr_largew": (4,), "cbr_small": (4,), "cbr_tiny": (4,), "cbr_tiny_text": (4,)}, _cbr, module="encoders.cbr"
    ),
    "cbr-valid": Family(
        {"cbr_larget_valid": (5,), "cbr_largew_valid": (4,), "cbr_small_valid": (4,), "cbr_tiny_valid": (4,), "cbr_tiny_text_valid": (4,)},
        _cbr,
        smallest={
            "cbr_larget_valid": 217,
            "cbr_largew_valid": 121,
            "cbr_small_valid": 121,
            "cbr_tiny_valid": 91,
            "cbr_tiny_text_valid": 91,
        },
        module="encoders.cbr",
    ),
    "alexnet": Family({"alexnet": ()}, _alexnet, smallest=63, module="encoders.alexnet"),
    "clip": Family({"resnet50_clip_gap": (3, 4, 6, 3), "resnet101_clip_gap": (3, 4, 23, 3)}, _clip, smallest=32),
    "bit": Family({"resnetv2_50x1_bit": (3, 4, 6, 3), "resnetv2_50x3_bit": (3, 4, 6, 3)}, _bit),
    "vit": Family(
        {
            "vit_tiny_patch16_224": (12,),
            "vit_small_patch16_224": (12,),
            "vit_base_patch16_224": (12,),
            "vit_large_patch16_224": (24,),
            "test_vit": (6,),
        },
        _vit,
        smallest=16,
    ),
}


def architectures() -> list[str]:
    """Every architecture that can be built, in the families' order."""
    return [name for family in FAMILIES.values() for name in family.architectures]


def family(architecture: str) -> str:
    """The family's name.

    Raises:
        RequestError: not in any family; names the families and the nearest architecture.
    """
    for name, members in FAMILIES.items():
        if architecture in members.architectures:
            return name
    close = nearest(architecture, architectures())
    listed = "; ".join(f"{name}: {', '.join(members.architectures)}" for name, members in FAMILIES.items())
    raise RequestError(
        f"unknown architecture '{architecture}'",
        hint=(f"did you mean '{close}'? " if close else "") + f"families are {listed}",
    )


def is_vit(architecture: str) -> bool:
    """Whether images become tokens: patches of 16 px, and positions that belong to an image size."""
    return family(architecture) == "vit"


def is_cbr(architecture: str) -> bool:
    """Whether it is one of Transfusion's small networks."""
    return family(architecture).startswith("cbr")


def registered_by(architecture: str) -> str | None:
    """The module of this room after whose import timm knows the network; None where it does anyway."""
    return FAMILIES[family(architecture)].module


def smallest(architecture: str) -> int:
    """The smallest side in pixels of an image that the network takes."""
    least = FAMILIES[family(architecture)].smallest
    return least if isinstance(least, int) else least[architecture]


@cache
def cuts(architecture: str) -> tuple[Cut, ...]:
    """Cut points from the stem to the last block. Raises RequestError as `family` does."""
    members = FAMILIES[family(architecture)]
    return tuple(members.cuts(members.architectures[architecture]))


def find(architecture: str, name: str) -> int:
    """Where in `cuts` that name is; a stage (`layer3`, `denseblock2`) means its last block.

    Raises:
        RequestError: no such cut; all are listed.
    """
    points = cuts(architecture)
    found = [i for i, cut in enumerate(points) if cut.name == name or cut.name.startswith(f"{name}.")]
    if not found:
        # Another number is another place, not a misspelling of this one.
        known = dict.fromkeys(word for cut in points for word in (cut.name, cut.name.rpartition(".")[0]) if word)
        close = nearest(name, [word for word in known if re.findall(r"\d+", word) == re.findall(r"\d+", name)])
        listed = ", ".join(cut.name for cut in points)
        hint = (f"did you mean '{close}'? " if close else "") + f"from the stem to the last they are {listed}"
        raise RequestError(f"{architecture} has no cut '{name}'", hint=hint)
    return found[-1]


def brief(architecture: str) -> str:
    """The names of all cuts in a line: `stem layer1.0-2 layer2.0-3`."""
    runs: list[list[str]] = []
    for cut in cuts(architecture):
        stage = cut.name.rstrip("0123456789")
        if runs and stage != cut.name and runs[-1][0].rstrip("0123456789") == stage:
            runs[-1].append(cut.name.removeprefix(stage))
        else:
            runs.append([cut.name])
    return " ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def last_of_each(points: Sequence[Cut]) -> tuple[Cut, ...]:
    """The last cut of each resolution, finest first."""
    return tuple({cut.reduction: cut for cut in points}.values())


def pyramid_cuts(architecture: str, last: Cut | None = None) -> tuple[Cut, ...]:
    """The cuts whose maps decoders are fed: the last of each resolution, or every block of a vision transformer, which has but one.

    last: at which the network is truncated; where that is a vision transformer's stem, it is all that there is.
    """
    points = cuts(architecture)
    points = points[: None if last is None else points.index(last) + 1]
    return (points[1:] or points) if is_vit(architecture) else last_of_each(points)


def depths(architecture: str, net: Any) -> dict[str, int]:
    """Parameter name -> index of the cut that it belongs to, 0 for the stem's; parameters after the last cut belong to the last.

    net: whole, or truncated at any cut.
    """
    order = {name: position for position, (name, _) in enumerate(net.named_modules())}
    points = [point for point in cuts(architecture) if point.module in order]
    ends = [max(at for name, at in order.items() if f"{name}.".startswith(f"{point.module}.")) for point in points]
    found = {}
    for name, _ in net.named_parameters():
        at = order[name.rpartition(".")[0]]
        found[name] = next((i for i, end in enumerate(ends) if at <= end), len(points) - 1)
    return found
