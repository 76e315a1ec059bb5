"""Heads: what makes a task's logits of an encoder's features.

    head = head_for(task, encoder, linear=False)        # drawn from torch's global generator
    logits_BL = head([z_BD], size)                      # labels; of an ordinal task L-1 cumulative logits
    logits_BHW = head(maps, size)                       # masks, with maps = encoder.pyramid(pad(x, head.stride)) and size that of x

Volumes need no heads of their own: an encoder of volumes (encoders.volumes) pools over slices, too, and gives the same z_BD.

Decoders are those of segmentation-models-pytorch, fed the maps that our own encoder gives. Its `Unet("tu-...")` is not used: it wraps the
timm network in a feature extractor with other key names, under which transplanted weights are not found.

Legend: B batch, C channels, D features, L labels, H W pixels; /r: a map whose side is the image's divided by r.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.build import Encoder
from encoders.cuts import is_vit
from finetune.task import Task

HEAD_STD = 0.01  # of a classification head's weights at the start; the bias starts at 0 (the transfer benchmark's choice)
DECODER_CHANNELS = (256, 128, 64, 32, 16)  # segmentation-models-pytorch's default U-Net
UPERNET_CHANNELS = 256  # and UPerNet


class Standardise(nn.Module):
    """Per channel (x - mean) / std with statistics that `fit` takes from training features; the identity before. BD or BCHW."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, total: Tensor, squares: Tensor, count: int) -> None:
        """Sums over `count` values of each channel. A channel that never moves keeps scale 1."""
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance)))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Cumulative(nn.Module):
    """Proportional odds (McCullagh 1980; on network features CORAL, Cao et al. 2020, arXiv 1901.07884): z_BD -> logits_BK.

    logit k is that of P(grade > k), k = 0..L-2, and equals w z - theta_k with one direction w for all. Thresholds rise by construction
    (theta_k = theta_0 + the sum of softplus(gap)), so that the probabilities of grades, which are differences, are never negative. They
    start where all grades are equally likely at z = 0.
    """

    def __init__(self, features: int, grades: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.normal_(self.linear.weight, std=HEAD_STD)
        theta = torch.logit(torch.arange(1, grades) / grades)
        self.lowest = nn.Parameter(theta[:1].clone())
        self.gaps = nn.Parameter(theta.diff().expm1().log())  # the inverse of softplus

    def forward(self, z: Tensor) -> Tensor:
        rise = torch.cat([torch.zeros_like(self.lowest), F.softplus(self.gaps).cumsum(0)])
        return self.linear(z) - (self.lowest + rise)


class PooledHead(nn.Module):
    """One linear layer on pooled features: [z_BD] -> logits_BL, or, of grades, L-1 cumulative logits."""

    def __init__(self, features: int, labels: int, standardise: bool = False, ordinal: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Standardise(features)] if standardise else [])
        self.linear: nn.Module
        if ordinal:
            self.linear = Cumulative(features, labels)
        else:
            self.linear = nn.Linear(features, labels)
            nn.init.normal_(self.linear.weight, std=HEAD_STD)
            nn.init.zeros_(self.linear.bias)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        # Logits in bf16 would be a few hundred values, and thresholds ties.
        with nullcontext() if maps[0].is_meta else torch.autocast(maps[0].device.type, enabled=False):  # meta has no autocast
            z = maps[0].float()
            for norm in self.norms:
                z = norm(z)
            logits: Tensor = self.linear(z)
        return logits


def pad(x: Tensor, stride: int) -> Tensor:
    """Images with their last rows and columns repeated up to the next multiple of `stride`: BCHW -> BCH'W', of any dtype.

    Strided layers drop or add a part of a cell at the end of other sides; maps of several resolutions then lie apart by up to a cell.
    """
    for axis in (-2, -1):
        side = x.shape[axis]
        if side % stride:
            index = torch.arange(math.ceil(side / stride) * stride, device=x.device).clamp(max=side - 1)
            x = x.index_select(axis, index)
    return x


def canvas_of(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The size of a padded image."""
    height, width = (math.ceil(side / stride) * stride for side in size)
    return height, width


class PyramidHead(nn.Module):
    """Linear in the features: the sum over cut points of 1x1 convolutions, brought to full size. [maps] -> logits_BHW.

    The convolution comes first: it commutes with the bilinear interpolation and leaves one channel to enlarge.
    Maps are those of images that `pad` brought to the next multiple of `stride`; the mask is cut to `size`.
    """

    def __init__(self, channels: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.norms = nn.ModuleList(Standardise(width) for width in channels)
        self.convs = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=index == 0) for index, width in enumerate(channels))
        for conv in self.convs:
            for parameter in conv.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=HEAD_STD)
                else:
                    nn.init.zeros_(parameter)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        canvas = canvas_of(size, self.stride)
        parts = [
            F.interpolate(conv(norm(x)), size=canvas, mode="bilinear", align_corners=False)
            for norm, conv, x in zip(self.norms, self.convs, maps, strict=True)
        ]
        return torch.stack(parts).sum(0)[:, 0, : size[0], : size[1]]


class TokenNeck(nn.Module):
    """Maps /4, /8, /16, /32 of a vision transformer's, which are all /16. [maps of the blocks] -> [4 maps].

    The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527): two transposed convolutions, one, none, max pooling; the width
    is halved with every doubling of the side. Each level reads a block of its own, evenly spaced and ending with the last, as is usual
    where decoders have skips (SETR, Zheng et al. 2021, arXiv 2012.15840); ViTDet reads the last block for all.
    """

    reductions = (4, 8, 16, 32)

    def __init__(self, channels: Sequence[int]) -> None:
        from timm.layers import LayerNorm2d

        super().__init__()
        self.blocks = [math.ceil(len(channels) * (level + 1) / 4) - 1 for level in range(4)]
        a, b, c, d = (channels[block] for block in self.blocks)
        self.channels = (a // 4, b // 2, c, d)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(a, a // 2, 2, 2), LayerNorm2d(a // 2), nn.GELU(), nn.ConvTranspose2d(a // 2, a // 4, 2, 2)
                ),
                nn.ConvTranspose2d(b, b // 2, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[block]) for level, block in zip(self.levels, self.blocks, strict=True)]


Decoder = Literal["unet", "unetplusplus", "upernet"]


class DecoderHead(nn.Module):
    """Decoder and segmentation head of segmentation-models-pytorch. [maps, finest first] -> logits_BHW.

    unet: Ronneberger et al. 2015; one block for every halving of the side. Where the encoder has no map of a resolution (/2 of ConvNeXt,
        Swin and transformers), the block there has no skip.
    unetplusplus: Zhou et al. 2018, arXiv 1807.10165; likewise. With one map alone there is nothing to nest, and it is the U-Net.
    upernet: Xiao et al. 2018, arXiv 1807.10221; reads the maps from /4 on, as published, or the last of an encoder that has none so
        coarse. Its mask is made at the finest of these and enlarged.

    Maps are those of images that `pad` brought to the next multiple of `stride`, and the mask is cut to `size`. Maps of convolutions
    without padding are smaller than resolutions say; they are stretched to these.

    Args:
        channels, reductions: of the encoder's maps.
        tokens: these are of one resolution, a vision transformer's.
    """

    def __init__(
        self, decoder: Decoder, channels: Sequence[int], reductions: Sequence[int], in_chans: int, *, tokens: bool = False
    ) -> None:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base import initialization as init
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        super().__init__()
        self.neck = TokenNeck(channels) if tokens else None
        if self.neck is not None:
            channels, reductions = self.neck.channels, self.neck.reductions
        self.reductions, self.stride = tuple(reductions), max(reductions)
        widths = dict(zip(reductions, channels, strict=True))
        levels = [2**i for i in range(1, int(math.log2(self.stride)) + 1)]
        if decoder == "upernet":
            levels = [level for level in levels if level >= 4] or levels
            self.decoder: nn.Module = UPerNetDecoder((in_chans, 0, *(widths[level] for level in levels)))
            self.unread, last = 2, UPERNET_CHANNELS
        else:
            kind = UnetPlusPlusDecoder if decoder == "unetplusplus" and len(levels) > 1 else UnetDecoder
            of_blocks = DECODER_CHANNELS[-len(levels) :]
            self.decoder = kind((in_chans, *(widths.get(level, 0) for level in levels)), of_blocks, len(levels))
            self.unread, last = 1, of_blocks[-1]
        self.levels = tuple(levels)
        self.head = SegmentationHead(last, 1, kernel_size=3)
        init.initialize_decoder(self.decoder)
        init.initialize_head(self.head)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        canvas = canvas_of(size, self.stride)
        held = dict(zip(self.reductions, self.neck(maps) if self.neck else maps, strict=True))
        none = maps[0].new_empty((len(maps[0]), 0, 1, 1))
        fed = [_stretched(held.get(level, none), (canvas[0] // level, canvas[1] // level)) for level in self.levels]
        # The decoders look up the full size in entries whose values they never read: U-Net in the first, UPerNet passes over two.
        full = maps[0].new_empty((1, 1, *canvas))
        logits = _stretched(self.head(self.decoder([full] * self.unread + fed)), canvas)
        return logits[:, 0, : size[0], : size[1]]


def _stretched(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False) if x.shape[1] else x.expand(-1, -1, *size)


def head_for(task: Task, encoder: Encoder, *, linear: bool) -> "Head":
    """The head that the task's kind and decoder ask for, drawn from torch's global generator.

    Args:
        linear: it is linear in the features, which it standardises; masks then need no decoder.
    """
    if task.kind != "segmentation":
        return PooledHead(encoder.num_features, len(task.labels), standardise=linear, ordinal=task.kind == "ordinal")
    if linear:
        return PyramidHead(encoder.pyramid_channels, max(encoder.pyramid_reductions))
    tokens = is_vit(encoder.architecture)
    return DecoderHead(task.decoder, encoder.pyramid_channels, encoder.pyramid_reductions, encoder.in_chans, tokens=tokens)


Head = PooledHead | PyramidHead | DecoderHead
