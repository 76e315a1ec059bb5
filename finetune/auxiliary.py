"""Inception's auxiliary classifier: beside the network while it trains, absent everywhere else.

    auxiliary = attach(network, task, size, seed)        # None for other architectures, a frozen block, masks and volumes
    loss = loss_of(..., network(x)) + WEIGHT * loss_of(..., auxiliary())

Szegedy et al. 2015 (arXiv 1512.00567) read the last 17 x 17 map at 299 px; its loss counts 0.4, as TF-Slim has it. timm has it for whole
classifiers only: told to leave the classifier out, as encoders are, it leaves it out too, and with it `forward` would give two things. So
timm's own layers are fed by a hook, and start anew in every cell. Images under 299 px have a smaller map, for which the convolution of
5 x 5 becomes smaller, as in TF-Slim.
"""

import copy

import torch
from torch import Tensor, nn

from finetune.network import Network
from finetune.task import Task

WEIGHT = 0.4
READS, BEFORE = "Mixed_6e", "Mixed_7a"  # the block that is read, and the one after, without which it would be a second head


class Auxiliary(nn.Module):
    """Logits of what the block gave for the batch that went through the network last."""

    def __init__(self, network: Network, outputs: int, size: int) -> None:
        from timm.layers import trunc_normal_
        from timm.models.inception_v3 import ConvNormAct, InceptionAux

        super().__init__()
        self._seen: list[Tensor] = []
        shadow = copy.deepcopy(network.encoder).to("meta").eval()
        shadow.net.get_submodule(READS).register_forward_hook(self._see)
        shadow(torch.zeros(1, shadow.in_chans, size, size, device="meta"))
        width, side = self._seen.pop().shape[1:3]
        self.window = min(5, side)
        self.layers = InceptionAux(width, outputs)
        self.layers.conv1 = ConvNormAct(128, 768, kernel_size=min(5, (side - self.window) // 3 + 1))
        for module in self.layers.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=0.1 if isinstance(module, nn.Conv2d) else 0.001)
        network.encoder.net.get_submodule(READS).register_forward_hook(self._see)

    def _see(self, module: nn.Module, _: object, out: Tensor) -> None:
        if module.training or out.is_meta:
            self._seen[:] = [out]

    def forward(self) -> Tensor | None:
        """logits_BL; None where the block does not train yet, which is in evaluation mode till then."""
        if not self._seen:
            return None
        x = nn.functional.avg_pool2d(self._seen.pop(), self.window, stride=3)
        logits: Tensor = self.layers.fc(self.layers.conv1(self.layers.conv0(x)).mean((2, 3)))
        return logits


class Beside(nn.Module):
    """Both as one module, whose output is the network's: what several workers average the gradients of."""

    def __init__(self, network: Network, auxiliary: Auxiliary) -> None:
        super().__init__()
        self.network, self.auxiliary = network, auxiliary

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


def attach(network: Network, task: Task, size: int, seed: int) -> Auxiliary | None:
    """The auxiliary classifier of a network whose block trains, drawn from the seed alone; None where there is none."""
    encoder = network.encoder
    read = encoder.architecture == "inception_v3" and hasattr(encoder.net, BEFORE) and task.kind != "segmentation" and not task.volume
    if not read or not any(p.requires_grad for p in encoder.net.get_submodule(READS).parameters()):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Auxiliary(network, len(task.labels) - (task.kind == "ordinal"), size)
