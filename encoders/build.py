"""Encoders: timm networks without a classifier, whose first layer takes stored pixels.

    encoder = build("resnet18", in_chans=1, mean=(0.5,), std=(0.25,), seed=0)
    z_BD = encoder(x_u8_BCHW)                   # pooled features
    maps = encoder.pyramid(x_u8_BCHW)           # one map a resolution, finest first
    hybrid = build("resnet50", 3, widths=(64, 128, 256, 256))       # stages of other widths: Transfusion's slim networks

uint8 becomes float and is normalised here and nowhere else. The normalisation is not part of the weights: `encoder.net` is the plain
timm network, and its state dict is what is trained, exported and transplanted.

Legend: B batch, C input channels, H W pixels, D pooled features.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import RequestError
from encoders.cuts import Cut, cuts, family, is_cbr, is_vit, pyramid_cuts, registered_by, smallest

# Mean and standard deviation of pixels scaled to 0..1. neutral: of no particular dataset, centred and spread to about unit variance.
# chestx-ray: as the benchmark of transfer learning normalises radiographs (Hosseinzadeh Taher et al., arXiv 2108.05930).
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "neutral": ((0.5,), (0.25,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "chestx-ray": ((0.5056,), (0.252,)),
    "none": ((0.0,), (1.0,)),
}
VIT_SIDE = 224
# A side of what a family cuts images into. CLIP's towers halve maps in two ways that differ where a side is odd.
PATCHES = {"vit": 16, "swin": 4, "clip": 32}
HEADS = ("global_pool", "fc_norm", "head")  # the first module of timm's networks that comes after the last map


class Normalise(nn.Module):
    """u8 BCHW -> float (x / 255 - mean) / std. Float input is taken as already scaled to 0..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float().div(255.0) if x.dtype == torch.uint8 else x
        return (scaled - self.mean) / self.std


class Encoder(nn.Module):
    """A timm network without classifier, its normalisation, and its feature maps at the cut points.

    Attributes:
        net: the timm network (`num_classes=0`); its state dict is the encoder's weights.
        image_size: side that a vision transformer's positions are for (other sides are interpolated); None for convolutions.
        widths: of the stages, where they are not the architecture's own.
        smallest: side in pixels under which images are refused. patch: what their sides must be multiples of.
        num_features: D.
        cuts: all of them, from the stem to the last block.
        pyramid_channels, pyramid_reductions: of the maps that `pyramid` gives, finest first.
    """

    def __init__(
        self,
        architecture: str,
        net: nn.Module,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.widths = image_size, widths
        self.smallest, self.patch = smallest(architecture), PATCHES.get(family(architecture), 1)
        self.architecture, self.in_chans = architecture, in_chans
        self.mean, self.std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
        self.normalise = Normalise(self.mean, self.std)
        self.net = net
        self.num_features = int(net.num_features)  # type: ignore[arg-type]
        self.cuts: tuple[Cut, ...] = cuts(architecture)
        self.pyramid_channels = tuple(int(info["num_chs"]) for info in net.feature_info)  # type: ignore[union-attr]
        self.pyramid_cuts: tuple[Cut, ...] = pyramid_cuts(architecture)
        self.pyramid_reductions = tuple(cut.reduction for cut in self.pyramid_cuts)

    def prepare(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> what the network takes.

        Raises:
            RequestError: an image smaller than the network takes, or not of whole patches.
        """
        given = f"{x.shape[-2]} x {x.shape[-1]}"
        if min(x.shape[-2:]) < self.smallest:
            raise RequestError(f"{self.architecture} takes images of at least {self.smallest} px, not of {given}")
        if any(side % self.patch for side in x.shape[-2:]):
            near = f"{x.shape[-1] // self.patch * self.patch} px"
            raise RequestError(f"{self.architecture} takes sides that are multiples of {self.patch} px, not {given}", hint=f"take {near}")
        return self.normalise(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> z_BD, globally averaged, or a vision transformer's class token."""
        return self.net(self.prepare(x))

    def features(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> the last map B,D,h,w, or tokens B,T,D with the class token first. `pool` of it is `forward`'s."""
        return channels_first(self.net, self.net.forward_features(self.prepare(x)))  # type: ignore[operator]

    def pool(self, features: Tensor) -> Tensor:
        """`features` -> z_BD."""
        return self.net.forward_head(features.permute(0, 2, 3, 1) if _channels_last(self.net) else features)  # type: ignore[operator]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """x: u8 or float BCHW -> feature maps at the last cut of each resolution, finest first, from this very network's modules.

        A vision transformer's are those of all its blocks, without class token.
        """
        h = self.prepare(x)
        if self.image_size:
            return token_maps(self.net, h)[-len(self.pyramid_cuts) :]
        chain = steps(self.net)
        ends = [end(chain, cut) for cut in self.pyramid_cuts]
        maps: list[Tensor] = []
        for i, (_, module) in enumerate(chain[: ends[-1] + 1]):
            h = module(h)
            if i in ends:
                maps.append(channels_first(self.net, h))
        return maps


def token_maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    """x: prepared BCHW -> the maps B,D,h,w of a vision transformer at its cuts, from the stem on, without class token."""
    vit: Any = net
    patches = vit.patch_embed(x)  # B,h,w,D
    found = [vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))]
    for block in getattr(vit, "blocks", ()):  # none where the network was truncated at its stem
        found.append(block(found[-1]))
    return [h[:, vit.num_prefix_tokens :].unflatten(1, patches.shape[1:3]).permute(0, 3, 1, 2).contiguous() for h in found]


def steps(net: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The network as a chain of modules by name, each taking what the one before gave, up to the last map: blocks, not stages."""
    from timm.models.convnext import ConvNeXtStage
    from timm.models.resnetv2 import ResNetStage
    from timm.models.swin_transformer import SwinTransformerStage

    found: list[tuple[str, nn.Module]] = []
    for name, module in net.named_children():
        if not prefix and name in HEADS:
            break
        whole = not isinstance(module, nn.Sequential | ConvNeXtStage | ResNetStage | SwinTransformerStage)
        found += [(prefix + name, module)] if whole else steps(module, f"{prefix}{name}.")
    return found


def end(chain: list[tuple[str, nn.Module]], cut: Cut) -> int:
    """Which of the steps completes the cut's map: its module, the last part of that, or the dense block that the module is in."""
    module = f"{cut.module}."
    return max(i for i, (name, _) in enumerate(chain) if f"{name}.".startswith(module) or module.startswith(f"{name}."))


def _channels_last(net: nn.Module) -> bool:
    return getattr(net, "output_fmt", "NCHW") == "NHWC"  # Swin's


def channels_first(net: nn.Module, h: Tensor) -> Tensor:
    """The map as B,C,h,w whatever the network computes in."""
    return h.permute(0, 3, 1, 2).contiguous() if _channels_last(net) else h


def in_channels(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for images of that many channels.

    Where the number differs they are equal in every channel, or an adapted first convolution would not see what the source's saw.
    """
    if channels == len(mean):
        return tuple(mean), tuple(std)
    return (math.fsum(mean) / len(mean),) * channels, (math.fsum(std) / len(std),) * channels


def build(
    architecture: str,
    in_chans: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    image_size: int | None = None,
    widths: Sequence[int] | None = None,
) -> Encoder:
    """A freshly initialised encoder: timm's own initialisation, a function of the seed alone; the global generator is left as it was.

    Args:
        mean, std: per channel, of pixels scaled to 0..1; the neutral ones when not given.
        image_size: side in pixels that a vision transformer's positions are for, 224 unless given; other networks take any.
        widths: of the stages of a ResNet, before the blocks' own expansion, or of the layers of a CBR; the architecture's own unless given.

    Raises:
        RequestError: unknown architecture, or widths for one that has none to choose.
    """
    import timm

    default_mean, default_std = in_channels(*NORMALISATIONS["neutral"], in_chans)
    size = (image_size or VIT_SIDE) if is_vit(architecture) else None
    chosen = None if widths is None else tuple(widths)
    if (module := registered_by(architecture)) is not None:
        importlib.import_module(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args(architecture, in_chans, size, chosen))
    _check(architecture, net)
    return Encoder(architecture, net, in_chans, default_mean if mean is None else mean, default_std if std is None else std, size, chosen)


def model_args(architecture: str, in_chans: int, image_size: int | None, widths: tuple[int, ...] | None) -> dict[str, Any]:
    """What timm is told beside the architecture's name, here and in exports.

    Raises:
        RequestError: widths for an architecture that has none to choose.
    """
    args: dict[str, Any] = {"in_chans": in_chans}
    if image_size:
        # Sides other than image_size (small crops, evaluation) have their positions interpolated.
        args |= {"img_size": image_size, "dynamic_img_size": True}
    if family(architecture) == "swin":
        args |= {"dynamic_img_size": True}
    if widths is not None:
        name = {"resnet": "channels", "cbr": "widths", "cbr-valid": "widths"}.get(family(architecture))
        expected = len(cuts(architecture)) if is_cbr(architecture) else 4
        if name is None or len(widths) != expected:
            raise RequestError(f"{architecture} with widths {list(widths)}", hint="a ResNet takes four, a CBR one for each of its layers")
        args[name] = list(widths)
    return args


def _check(architecture: str, net: nn.Module) -> None:
    """The family's list must describe this network: the last cuts of each resolution are the ends of the stages that timm declares."""
    declared: Any = net.feature_info
    for point, info in zip(pyramid_cuts(architecture), declared, strict=True):
        if not f"{point.module}.".startswith(f"{info['module']}.") or point.reduction != info["reduction"]:
            raise AssertionError(f"{architecture}: cut {point} but timm declares {info}")
