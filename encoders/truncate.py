"""The network up to a cut, with its features at that cut: an encoder like any other, under the same names of tensors.

    small = truncate(encoder, "layer3.3")             # TruncatedTL's layer 12 of ResNet-50: 6,308,928 parameters
    z_BD = small(x_u8_BCHW)                           # mean over positions at the cut
    flat = truncate(encoder, "layer2", flat=96)       # all positions, for images of 96 px

What follows the cut is gone, not skipped. Pooling without weights between a cut and the next belongs to the cut, as in TruncatedTL (its
layer 1 of a ResNet is stem and max pooling); decoders get the map before that pooling. A vision transformer's features are the mean of its
patches' tokens, not the class token, which gathers an image's content in the last blocks only. At the last cut nothing is cut off, and
pooled features are those of the whole network (its closing norm, EfficientNet's last convolution, a class token).
"""

import bisect
import copy

import torch
from torch import Tensor, nn

from base.errors import RequestError
from encoders.build import Encoder, build, channels_first, end, steps
from encoders.cuts import Cut, find, pyramid_cuts


class Truncated(Encoder):
    """An encoder whose `net` holds the tensors up to a cut.

    Attributes:
        cut: its name.
        flat: the side of the images that flat features are of; None where features are means.
        whole: nothing was cut off.
    """

    def __init__(self, encoder: Encoder, cut: Cut, flat: int | None) -> None:
        net = copy.deepcopy(encoder.net)
        last = cut == encoder.cuts[-1]
        if not last:
            _prune(net, _kept(net, cut))
        super().__init__(encoder.architecture, net, encoder.in_chans, encoder.mean, encoder.std, encoder.image_size, encoder.widths)
        self.normalise = copy.deepcopy(encoder.normalise)  # where the encoder is
        self.cut, self.flat = cut.name, flat
        self.whole: bool = last and (not isinstance(encoder, Truncated) or encoder.whole)
        self.cuts = encoder.cuts[: encoder.cuts.index(cut) + 1]
        self.pyramid_cuts = pyramid_cuts(self.architecture, cut)
        self.pyramid_reductions = tuple(point.reduction for point in self.pyramid_cuts)
        # What else changes is asked of a copy that computes shapes alone.
        shadow = copy.deepcopy(self).to("meta").eval()
        self.smallest = 1 + bisect.bisect(range(1, encoder.smallest), 0, key=lambda side: _takes(shadow, side))
        x = torch.zeros(1, self.in_chans, *[flat or self.image_size or max(64, encoder.smallest)] * 2, device="meta")
        self.pyramid_channels = tuple(m.shape[1] for m in shadow.pyramid(x))
        self.num_features = shadow(x).shape[1]
        self.train(encoder.training)

    def prepare(self, x: Tensor) -> Tensor:
        """As of every encoder; flat features are of images of one size."""
        if self.flat is not None and x.shape[-2:] != (self.flat, self.flat):
            raise RequestError(f"flat features of {self.flat} px were asked for, this image is {x.shape[-2]} x {x.shape[-1]}")
        return super().prepare(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> z_BD."""
        return self.pool(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """x: u8 or float BCHW -> the map at the cut, pooled where pooling follows."""
        if self.whole:
            return super().features(x)
        if self.image_size:
            return self.pyramid(x)[-1]
        h = self.prepare(x)
        for _, module in steps(self.net):
            h = module(h)
        return channels_first(self.net, h)

    def pool(self, features: Tensor) -> Tensor:
        """`features` -> z_BD."""
        if self.flat is not None:
            return features.flatten(1)
        return super().pool(features) if self.whole else features.mean((2, 3))


def _takes(shadow: Truncated, side: int) -> bool:
    try:
        h = torch.zeros(1, shadow.in_chans, side, side, device="meta")
        for _, module in steps(shadow.net):
            h = module(h)
    except (RuntimeError, AssertionError):
        return False
    return True


def truncate(encoder: Encoder, cut: str, flat: int | None = None) -> Truncated:
    """A copy of the encoder up to the cut; a stage's name means its last block.

    Args:
        flat: features are the whole map, of images of that side, instead of its mean.

    Raises:
        RequestError: no such cut; all are listed.
    """
    return Truncated(encoder, encoder.cuts[find(encoder.architecture, cut)], flat)


def rebuilt(encoder: Encoder) -> Encoder:
    """The same network anew from the encoder's facts, with weights of its own."""
    fresh = build(encoder.architecture, encoder.in_chans, encoder.mean, encoder.std, image_size=encoder.image_size, widths=encoder.widths)
    return truncate(fresh, encoder.cut, encoder.flat) if isinstance(encoder, Truncated) else fresh


def _kept(net: nn.Module, cut: Cut) -> set[str]:
    """Modules that stay: the steps up to the cut, and those without weights between it and the next."""
    chain = steps(net)
    at = end(chain, cut)
    name, step = chain[at]
    if cut.module.startswith(f"{name}."):  # within a dense block: its layers up to the cut
        inside = [f"{name}.{layer}" for layer, _ in step.named_children()]
        within = inside[: inside.index(cut.module) + 1]
        if within != inside:
            return {*(kept for kept, _ in chain[:at]), *within}
    after = at + 1
    while after < len(chain) and not any(True for _ in chain[after][1].parameters()):
        after += 1
    return {kept for kept, _ in chain[:after]}


def _prune(module: nn.Module, kept: set[str], prefix: str = "") -> None:
    for name, child in list(module.named_children()):
        path = prefix + name
        if path in kept:
            continue
        if any(other.startswith(f"{path}.") for other in kept):
            _prune(child, kept, f"{path}.")
        else:
            delattr(module, name)
