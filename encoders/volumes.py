"""Encoders of images inflated to encoders of volumes (Carreira and Zisserman 2017, arXiv 1705.07750), for slabs of CT.

    volumes = inflate(encoder)
    z_BD = volumes(x_u8_BCSHW)                     # S slices

Every convolution that looks around itself in the plane looks at DEPTH slices, too: its weights are repeated over them and divided by their
number. Slices beyond the first and the last are copies of these, not zeros, so a volume of equal slices has the features of the
image, at its ends as well; that is what makes the image's weights a meaningful start. Pooling and strides stay in the plane, as slabs are
thin; group norms and gates take their means over slices, too, and at the end features are averaged over slices and positions. Names of
tensors are the image encoder's; those of convolutions have one dimension more. All convolutional families, whole or truncated.

Legend: S slices, others as in encoders.build.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import RequestError
from encoders.build import Encoder, steps
from encoders.cuts import family
from encoders.truncate import Truncated

CANNOT = ("swin", "vit")
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
        padded = F.pad(x, (0, 0, 0, 0, around, around), mode="replicate") if around else x
        return self._conv_forward(padded, self.kernel(), self.bias)

    def kernel(self) -> Tensor:
        """What the volume is convolved with."""
        return self.weight


class SliceStdConv(SliceConv):
    """Big Transfer's convolution, whose kernels are standardised: over their slices, too, and then divided by the number of these."""

    def __init__(self, flat: Any) -> None:
        super().__init__(flat)
        # Weights were divided by the number of slices, so their variance by its square.
        self.eps: float = flat.eps / self.kernel_size[0] ** 2

    def kernel(self) -> Tensor:
        """What the volume is convolved with."""
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, training=True, eps=self.eps).reshape_as(self.weight) / self.kernel_size[0]


class SliceNorm(nn.BatchNorm3d):
    """A 2-D batch norm over slices, too, with the activation that timm puts into some."""

    def __init__(self, flat: nn.BatchNorm2d) -> None:
        super().__init__(flat.num_features, flat.eps, flat.momentum, device="meta")
        self.load_state_dict(flat.state_dict(), assign=True)
        self.act = getattr(flat, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class SliceLayerNorm(nn.LayerNorm):
    """A layer norm over the channels of maps of any number of axes."""

    def __init__(self, flat: nn.LayerNorm) -> None:
        super().__init__(flat.normalized_shape, flat.eps, device="meta")
        self.load_state_dict(flat.state_dict(), assign=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SliceBlock(nn.Module):
    """ConvNeXt's block, which timm writes for four axes."""

    def __init__(self, flat: Any) -> None:
        super().__init__()
        self.conv_dw, self.norm, self.mlp, self.gamma = flat.conv_dw, flat.norm, flat.mlp, flat.gamma
        self.shortcut, self.drop_path = flat.shortcut, flat.drop_path

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(self.norm(self.conv_dw(x).movedim(1, -1))) * self.gamma
        out: Tensor = self.drop_path(h.movedim(-1, 1)) + self.shortcut(x)
        return out


class SliceGate(nn.Module):
    """EfficientNet's gate: squeezed over slices and positions."""

    def __init__(self, flat: Any) -> None:
        super().__init__()
        self.conv_reduce, self.act1, self.conv_expand, self.gate = flat.conv_reduce, flat.act1, flat.conv_expand, flat.gate

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3, 4), keepdim=True)))))
        return out


def _in_plane(pool: Callable[..., Tensor], x: Tensor, *how: Any, **named: Any) -> Tensor:
    # Slices as channels: avg_pool3d refuses maps smaller than its window, where avg_pool2d pools what there is.
    return pool(x.flatten(1, 2), *how, **named).unflatten(1, x.shape[1:3])


class SlicePool(nn.Module):
    """A pooling of every slice by itself."""

    def __init__(self, flat: nn.Module) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        return _in_plane(self.flat, x)


def _avg_pool(x: Tensor, *how: Any, **named: Any) -> Tensor:
    return _in_plane(F.avg_pool2d, x, *how, **named)


def _max_pool(x: Tensor, *how: Any, **named: Any) -> Tensor:
    return _in_plane(F.max_pool2d, x, *how, **named)


POOLS: dict[Any, Any] = {F.avg_pool2d: _avg_pool, F.max_pool2d: _max_pool}  # of Inception's blocks


class _Shallow(torch.fx.Tracer):
    """Traces what a block itself does and leaves its layers whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pooled_in_plane(block: nn.Module) -> torch.fx.GraphModule:
    """A block with the same layers whose own pooling is of volumes."""
    graph = _Shallow().trace(block)
    for node in graph.nodes:
        if node.target in POOLS:
            node.target = POOLS[node.target]
    return torch.fx.GraphModule(block, graph, type(block).__name__)


class Inflated(Encoder):
    """An encoder of volumes u8 or float BCSHW. Maps are B,D,S,h,w."""

    def __init__(self, encoder: Encoder) -> None:
        net = copy.deepcopy(encoder.net)
        _inflate(net)
        trains = {name: parameter.requires_grad for name, parameter in encoder.net.named_parameters()}
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(trains[name])
        super().__init__(encoder.architecture, net, encoder.in_chans, encoder.mean, encoder.std, widths=encoder.widths)
        self.normalise = copy.deepcopy(encoder.normalise)
        self.num_features, self.smallest = encoder.num_features, encoder.smallest
        self.whole = not isinstance(encoder, Truncated) or encoder.whole
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
        return super().pool(features.mean(2)) if self.whole else features.mean((2, 3, 4))


def inflate(encoder: Encoder) -> Inflated:
    """A copy of the encoder, with its weights, for volumes.

    Raises:
        RequestError: flat features, or a family that is not inflated.
    """
    if family(encoder.architecture) in CANNOT:
        what = f"{encoder.architecture} is not inflated to volumes: it attends among the patches of one image"
        raise RequestError(what, hint="every convolutional network is")
    if isinstance(encoder, Truncated) and encoder.flat is not None:
        raise RequestError("flat features of volumes are not made", hint="truncate without flat")
    return Inflated(encoder)


def _inflate(module: nn.Module) -> None:
    from timm.layers import LayerNorm2d, StdConv2d
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.inception_v3 import InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

    for name, child in list(module.named_children()):
        if isinstance(child, StdConv2d):
            setattr(module, name, SliceStdConv(child))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, SliceConv(child))
        elif isinstance(child, nn.MaxPool2d | nn.AvgPool2d):
            setattr(module, name, SlicePool(child))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SliceNorm(child))
        elif isinstance(child, LayerNorm2d):
            setattr(module, name, SliceLayerNorm(child))
        else:
            if isinstance(child, ConvNeXtBlock):
                setattr(module, name, SliceBlock(child))
            elif isinstance(child, SqueezeExcite):
                setattr(module, name, SliceGate(child))
            elif isinstance(child, InceptionA | InceptionB | InceptionC | InceptionD | InceptionE):
                setattr(module, name, _pooled_in_plane(child))
            _inflate(module.get_submodule(name))


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type, return-value]
