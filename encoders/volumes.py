"""Encoders of images inflated to encoders of volumes (Carreira and Zisserman 2017, arXiv 1705.07750), for slabs of CT.

    volumes = inflate(encoder)
    z_BD = volumes(x_u8_BCSHW)                     # S slices

Every convolution that looks around itself in the plane looks at DEPTH slices, too: its weights are repeated over them and divided by their
number. Slices beyond the first and the last are copies of these, not zeros, so a volume of equal slices has the features of the
image, at its ends as well; that is what makes the image's weights a meaningful start. Pooling and strides stay in the plane, as slabs are
thin; at the end features are averaged over slices and positions. Names of tensors are the image encoder's; those of convolutions have one
dimension more. ResNets, DenseNets and CBR, whole or truncated.

Legend: S slices, others as in encoders.build.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import RequestError
from encoders.build import HEADS, Encoder, steps
from encoders.cuts import FAMILIES, family
from encoders.truncate import Truncated

CAN = ("resnet", "densenet", "cbr", "cbr-valid")
DEPTH = 3


class SliceConv(nn.Conv3d):
    """A 2-D convolution's weights over some slices; the slices at the ends are repeated outward."""

    def __init__(self, flat: nn.Conv2d) -> None:
        kernel, stride, padding, dilation = (_pair(part) for part in (flat.kernel_size, flat.stride, flat.padding, flat.dilation))
        slices = DEPTH if max(kernel) > 1 else 1
        super().__init__(
            flat.in_channels,
            flat.out_channels,
            (slices, *kernel),
            stride=(1, *stride),
            padding=(0, *padding),
            dilation=(1, *dilation),
            groups=flat.groups,
            bias=flat.bias is not None,
            device="meta",
        )
        self.weight = nn.Parameter(flat.weight.detach().unsqueeze(2).repeat(1, 1, slices, 1, 1) / slices)
        self.bias = None if flat.bias is None else nn.Parameter(flat.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        around = self.kernel_size[0] // 2
        return super().forward(F.pad(x, (0, 0, 0, 0, around, around), mode="replicate") if around else x)


class SliceNorm(nn.BatchNorm3d):
    """A 2-D batch norm over slices, too, with the activation that timm puts into some."""

    def __init__(self, flat: nn.BatchNorm2d) -> None:
        super().__init__(flat.num_features, flat.eps, flat.momentum, device="meta")
        self.load_state_dict(flat.state_dict(), assign=True)
        self.act = getattr(flat, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class Inflated(Encoder):
    """An encoder of volumes u8 or float BCSHW. Maps are B,D,S,h,w."""

    def __init__(self, encoder: Encoder) -> None:
        net = copy.deepcopy(encoder.net)
        for name in HEADS:
            if hasattr(net, name):
                delattr(net, name)
        _inflate(net)
        trains = {name: parameter.requires_grad for name, parameter in encoder.net.named_parameters()}
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(trains[name])
        super().__init__(encoder.architecture, net, encoder.in_chans, encoder.mean, encoder.std, widths=encoder.widths)
        self.normalise = copy.deepcopy(encoder.normalise)
        self.num_features, self.smallest = encoder.num_features, encoder.smallest
        self.cuts, self.pyramid_cuts = encoder.cuts, encoder.pyramid_cuts
        self.pyramid_channels, self.pyramid_reductions = encoder.pyramid_channels, encoder.pyramid_reductions
        self.train(encoder.training)

    def prepare(self, x: Tensor) -> Tensor:
        """x: u8 or float BCSHW -> float BCSHW."""
        if x.ndim != 5:
            raise RequestError(
                f"an inflated {self.architecture} takes volumes: batch, channels, slices, height, width, not {list(x.shape)}"
            )
        super().prepare(x[:1, :, 0])
        return self.normalise(x.flatten(2, 3)).unflatten(2, x.shape[2:4])

    def forward(self, x: Tensor) -> Tensor:
        """x: u8 or float BCSHW -> z_BD."""
        return self.pool(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """x: u8 or float BCSHW -> the last map B,D,S,h,w."""
        h = self.prepare(x)
        for _, module in steps(self.net):
            h = module(h)
        return h

    def pool(self, features: Tensor) -> Tensor:
        """`features` -> z_BD."""
        return features.mean((2, 3, 4))


def inflate(encoder: Encoder) -> Inflated:
    """A copy of the encoder, with its weights, for volumes.

    Raises:
        RequestError: flat features, or a family that is not inflated.
    """
    if family(encoder.architecture) not in CAN:
        known = ", ".join(name for each in CAN for name in FAMILIES[each].architectures)
        raise RequestError(f"{encoder.architecture} is not inflated to volumes", hint=f"these are: {known}")
    if isinstance(encoder, Truncated) and encoder.flat is not None:
        raise RequestError("flat features of volumes are not made", hint="truncate without flat")
    return Inflated(encoder)


def _inflate(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, SliceConv(child))
        elif isinstance(child, nn.MaxPool2d):
            kernel, stride, padding = (_pair(part) for part in (child.kernel_size, child.stride, child.padding))
            setattr(module, name, nn.MaxPool3d((1, *kernel), (1, *stride), (0, *padding), ceil_mode=child.ceil_mode))
        elif isinstance(child, nn.AvgPool2d):
            kernel, stride, padding = (_pair(part) for part in (child.kernel_size, child.stride, child.padding))
            of_slices = nn.AvgPool3d((1, *kernel), (1, *stride), (0, *padding), child.ceil_mode, child.count_include_pad)
            setattr(module, name, of_slices)
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SliceNorm(child))
        else:
            _inflate(child)


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type, return-value]
