"""Encoders: timm networks without a classifier, whose first layer takes stored pixels.

    encoder = build("resnet18", in_chans=1, mean=(0.5,), std=(0.25,), seed=0)
    z_BD = encoder(x_u8_BCHW)                   # pooled features
    maps = encoder.pyramid(x_u8_BCHW)           # one map a cut point, stem (/2) first

uint8 becomes float and is normalised here and nowhere else. The normalisation is not part of the weights: `encoder.net` is the plain
timm network, and its state dict is what is trained, exported and transplanted.

Legend: B batch, C input channels, H W pixels, D pooled features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encoders.cuts import Cut, cuts, is_vit

# Stored pixels of no particular dataset: centred, and spread to about unit variance. Sources that know better bring their own.
NEUTRAL_MEAN, NEUTRAL_STD = 0.5, 0.25
VIT_SIDE = 224


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
        num_features: D.
        pyramid_channels, pyramid_reductions: of the maps that `pyramid` gives, stem first.
    """

    def __init__(
        self, architecture: str, net: nn.Module, in_chans: int, mean: Sequence[float], std: Sequence[float], image_size: int | None = None
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.architecture, self.in_chans = architecture, in_chans
        self.mean, self.std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
        self.normalise = Normalise(self.mean, self.std)
        self.net = net
        self.num_features = int(net.num_features)  # type: ignore[arg-type]
        self.cuts: tuple[Cut, ...] = cuts(architecture)
        self.pyramid_channels = tuple(int(info["num_chs"]) for info in net.feature_info)  # type: ignore[union-attr]
        self.pyramid_reductions = tuple(cut.reduction for cut in self.cuts)

    def forward(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> z_BD, globally averaged, or a vision transformer's class token."""
        return self.net(self.normalise(x))

    def features(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> the last map B,D,h,w, or tokens B,T,D with the class token first. `pool` of it is `forward`'s."""
        return self.net.forward_features(self.normalise(x))  # type: ignore[operator]

    def pool(self, features: Tensor) -> Tensor:
        """`features` -> z_BD."""
        return self.net.forward_head(features)  # type: ignore[operator]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """x: u8 or float BCHW -> feature maps at the cut points, stem (/2) first, taken from this very network's modules."""
        h = self.normalise(x)
        if self.image_size:
            of_blocks: list[Tensor] = self.net.forward_intermediates(h, norm=False, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]
            return of_blocks
        maps: list[Tensor] = []
        wanted = {cut.module for cut in self.cuts}
        for name, module in self.net.named_children():
            if name == "global_pool":
                break
            h = module(h)
            if name in wanted:
                maps.append(h)
        return maps


def neutral(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for an encoder that starts from nothing."""
    return (NEUTRAL_MEAN,) * in_chans, (NEUTRAL_STD,) * in_chans


def build(
    architecture: str,
    in_chans: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Encoder:
    """A freshly initialised encoder: timm's own initialisation, a function of the seed alone; the global generator is left as it was.

    Args:
        mean, std: per channel, of pixels scaled to 0..1; `neutral` when not given.
        image_size: side in pixels that a vision transformer's positions are for, 224 unless given; convolutions take any.

    Raises:
        RequestError: unknown architecture.
    """
    import timm

    points = cuts(architecture)
    default_mean, default_std = neutral(in_chans)
    size = (image_size or VIT_SIDE) if is_vit(architecture) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args(in_chans, size))
    _check(architecture, net, points)
    return Encoder(architecture, net, in_chans, default_mean if mean is None else mean, default_std if std is None else std, size)


def model_args(in_chans: int, image_size: int | None) -> dict[str, Any]:
    """What timm is told beside the architecture's name, here and in exports."""
    # Sides other than image_size (small crops, evaluation) have their positions interpolated.
    return {"in_chans": in_chans} | ({"img_size": image_size, "dynamic_img_size": True} if image_size else {})


def _check(architecture: str, net: nn.Module, points: tuple[Cut, ...]) -> None:
    """The family's list must describe this network: same modules and reductions as timm declares, one map a cut."""
    declared: Any = net.feature_info
    for point, info in zip(points, declared, strict=True):
        if point.module != info["module"] or point.reduction != info["reduction"]:
            raise AssertionError(f"{architecture}: cut {point} but timm declares {info}")
