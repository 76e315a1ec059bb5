"""Heads: what makes a task's logits of an encoder's features.

    logits_BL = PooledHead(encoder.num_features, 14)([z_BD], size)
    logits_BHW = UnetHead(encoder.pyramid_channels, encoder.in_chans)(maps, size)

Decoders are those of segmentation-models-pytorch, fed the maps that our own encoder gives. Its `Unet("tu-...")` is not used: it wraps the
timm network in a feature extractor with other key names, under which transplanted weights are not found.

Legend: B batch, C channels, D features, L labels, H W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_STD = 0.01  # of a classification head's weights at the start; the bias starts at 0 (the transfer benchmark's choice)
DECODER_CHANNELS = (256, 128, 64, 32, 16)  # segmentation-models-pytorch's default U-Net


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


class PooledHead(nn.Module):
    """One linear layer on pooled features: [z_BD] -> logits_BL."""

    def __init__(self, features: int, outputs: int, standardise: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Standardise(features)] if standardise else [])
        self.linear = nn.Linear(features, outputs)
        nn.init.normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        z = maps[0]
        for norm in self.norms:
            z = norm(z)
        return self.linear(z)


class PyramidHead(nn.Module):
    """Linear in the features: the sum over cut points of 1x1 convolutions, brought to full size. [maps] -> logits_BHW.

    The convolution comes first: it commutes with the bilinear interpolation and leaves one channel to enlarge.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Standardise(width) for width in channels)
        self.convs = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=index == 0) for index, width in enumerate(channels))
        for conv in self.convs:
            for parameter in conv.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=HEAD_STD)
                else:
                    nn.init.zeros_(parameter)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        parts = [
            F.interpolate(conv(norm(x)), size=size, mode="bilinear", align_corners=False)
            for norm, conv, x in zip(self.norms, self.convs, maps, strict=True)
        ]
        return torch.stack(parts).sum(0)[:, 0]


class UnetHead(nn.Module):
    """U-Net decoder and segmentation head of segmentation-models-pytorch. [maps, stem (/2) first] -> logits_BHW."""

    def __init__(self, channels: Sequence[int], in_chans: int) -> None:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base import initialization as init
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

        super().__init__()
        self.decoder = UnetDecoder(
            encoder_channels=(in_chans, *channels),
            decoder_channels=DECODER_CHANNELS[-len(channels) :],
            n_blocks=len(channels),
        )
        self.head = SegmentationHead(DECODER_CHANNELS[-1], 1, kernel_size=3)
        init.initialize_decoder(self.decoder)
        init.initialize_head(self.head)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        # The decoder takes the full size from a first entry whose values it never reads.
        full = maps[0].new_empty((1, 1, *size))
        return self.head(self.decoder([full, *maps]))[:, 0]


Head = PooledHead | PyramidHead | UnetHead
