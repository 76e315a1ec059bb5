"""CBR: the small plain networks of Transfusion (Raghu et al. 2019, arXiv 1902.07208), registered in timm.

    import encoders.cbr
    net = timm.create_model("cbr_small", num_classes=5, in_chans=1)

Layers of convolution (stride 1, without bias), batch norm, ReLU and max pooling (3 x 3, stride 2); then the mean over positions and one
linear layer. LargeT has a fifth layer that is not pooled.

Two things are not certain. The paper's text gives Tiny the widths 64 to 512, but its printed count of parameters, 1,076,480, is that of 32
to 256 (the printed counts of all four leave out the first convolution, batch norm and the biases): `cbr_tiny` is the one of the count,
smaller than Small as its name says, `cbr_tiny_text` the one of the text, which has 4.3 million. And padding is not stated: the plain names
pad so that sides only halve, those with `_valid` do not pad, as re-implementations in PyTorch, and refuse images that vanish on the way.

Pooling that pads takes one pixel at each side; TensorFlow's takes it where the side is even at the far end only. Weights start as
torchvision's and timm's ResNets do (He et al. 2015, fan out).
"""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from encoders.pooled import Pooled

__all__ = ["Cbr"]
POOLED = 4  # layers that end in a pooling


class CbrLayer(nn.Module):
    """Convolution, batch norm, ReLU, and the pooling if there is one."""

    def __init__(self, ins: int, outs: int, kernel: int, same: bool, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2 if same else 0, bias=False)
        self.bn = nn.BatchNorm2d(outs)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, padding=1 if same else 0) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.act(self.bn(self.conv(x))))
        return out


class Cbr(Pooled):
    """The layers with a linear classifier.

    Args:
        widths: channels of the layers.
    """

    def __init__(
        self, widths: Sequence[int], kernel: int, same: bool, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        self.in_chans, self.depth = in_chans, len(widths)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"conv{i}"}
            for i, width in enumerate(widths, 1)
            if i < POOLED or i == len(widths)
        ]
        self.feature_info[-1]["reduction"] = 2**POOLED
        for i, (ins, outs) in enumerate(zip([in_chans, *widths], widths, strict=False), 1):
            self.add_module(f"conv{i}", CbrLayer(ins, outs, kernel, same, pool=i <= POOLED))
        self.attach_head(widths[-1], num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"conv{i}")(x)
        return x


SHAPES: dict[str, dict[str, Any]] = {
    "cbr_larget": {"kernel": 7, "widths": (32, 64, 128, 256, 512)},
    "cbr_largew": {"kernel": 7, "widths": (64, 128, 256, 512)},
    "cbr_small": {"kernel": 7, "widths": (32, 64, 128, 256)},
    "cbr_tiny": {"kernel": 5, "widths": (32, 64, 128, 256)},
    "cbr_tiny_text": {"kernel": 5, "widths": (64, 128, 256, 512)},
}
ABOUT = {
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "first_conv": "conv1.conv",
    "classifier": "fc",
    "license": "none",
    "url": "",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
default_cfgs = generate_default_cfgs({f"{name}{padding}.untrained": ABOUT for name in SHAPES for padding in ("", "_valid")})


def _entry(name: str, same: bool) -> None:
    """Register one architecture under its name."""

    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        net: nn.Module = build_model_with_cfg(Cbr, make.__name__, pretrained, **{**SHAPES[name], "same": same, **options})
        return net

    make.__name__ = make.__qualname__ = name if same else f"{name}_valid"
    register_model(make)


for _name in SHAPES:
    _entry(_name, same=True)
    _entry(_name, same=False)
