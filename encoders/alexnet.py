"""AlexNet (Krizhevsky 2014, arXiv 1404.5997, as torchvision has it), registered in timm: its five convolutions, under torchvision's names.

    import encoders.alexnet
    net = timm.create_model("alexnet", num_classes=5, in_chans=1)

Features are the mean over positions of the last map. The two hidden layers of 4,096 units, nine tenths of torchvision's parameters, take
maps of 6 x 6 alone; they belong to its classifier and are left out, as everywhere.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from encoders.pooled import Pooled

__all__ = ["AlexNet"]


class AlexNet(Pooled):
    """The convolutions with a linear classifier."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        from torchvision.models import alexnet

        self.in_chans = in_chans
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"features.{at}"}
            for width, reduction, at in ((64, 4, 1), (192, 8, 4), (256, 16, 11))
        ]
        self.features = alexnet(num_classes=1).features
        if in_chans != 3:
            self.features[0] = nn.Conv2d(in_chans, 64, kernel_size=11, stride=4, padding=2)
        self.attach_head(256, num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(x)
        return out


default_cfgs = generate_default_cfgs(
    {
        "alexnet.untrained": {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "first_conv": "features.0",
            "classifier": "fc",
            "license": "none",
            "url": "",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    }
)


@register_model
def alexnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """The network, without weights."""
    net: nn.Module = build_model_with_cfg(AlexNet, "alexnet", pretrained, **options)
    return net
