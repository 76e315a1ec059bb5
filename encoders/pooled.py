"""The end that the networks registered in timm here share: the mean over positions of the last map, and one linear layer.

class Net(Pooled): ...                            # gives `forward_features`, and calls `attach_head` when its layers are made
"""

from torch import Tensor, nn


class Pooled(nn.Module):
    """By timm's conventions: `forward_features` gives the last map, f32 BCHW, `forward_head` pools and classifies it."""

    def attach_head(self, width: int, num_classes: int, global_pool: str) -> None:
        """Pooling and classifier of `width` features, each left out where it is empty or 0. Last of all, so that weights are drawn in the
        order of the layers."""
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, width, width
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if global_pool else nn.Identity()
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.global_pool(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
