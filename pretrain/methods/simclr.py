"""SimCLR: two views of an image attract, all other views of the global batch repel (Chen et al. 2020, arXiv 2002.05709).

Equation 1, for the views i and j of one image among the 2N views of a batch of N images, z the projections scaled to length 1:

    l(i, j) = -log( exp(z_i . z_j / t) / sum_{k != i} exp(z_i . z_k / t) ),  loss = mean over all 2N ordered pairs

Official hyper-parameters (section 2.2, appendix B.6): ResNet-50, batch 4096, LARS with lr 0.3 * batch / 256 = 4.8, weight decay 1e-6
without biases and batch norm, 10 epochs of linear warm-up, cosine decay, temperature 0.1, projector 2048-2048-128, 224 px, crops of 8 to
100 % of the area, colour jitter of strength 1, blur in half of the views; batch norm over all devices.

Version 2 (Chen et al. 2020, arXiv 2006.10029, section 3 and appendix C): a projector of three layers, batch 4096, 800 epochs, LARS with lr
6.4, weight decay 1e-4, 5 % of the steps warm-up; its gain is for large encoders and few labels. Deviations of version 2: no memory of
negatives (the paper's option, worth about 1 %), and the whole projector is thrown away, where the paper fine-tunes from its first layer.

Parts: lightly's NTXentLoss (gathers negatives with gradient; two processes equal one, tested) and SimCLRProjectionHead.
Deviations: none in the loss or head. Grey images have no hue or saturation to jitter. Both views go through the network in one pass, so
that their batch statistics are shared, as in the official code.
"""

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class SimCLROptions(Strict):
    """`hidden_dim` defaults to the width of the encoder's features, as in the paper."""

    temperature: float = Field(default=0.1, ge=1e-3)
    hidden_dim: int | None = Field(default=None, gt=0)
    output_dim: int = Field(default=128, gt=0)
    num_layers: int = Field(default=2, ge=2)


class SimCLRv2Options(SimCLROptions):
    """Three layers; `hidden_dim` as above."""

    num_layers: int = Field(default=3, ge=2)


class SimCLR(Method):
    """See the module's header."""

    views = ("two",)
    Options = SimCLROptions

    def __init__(self, encoder: nn.Module, options: SimCLROptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.head = SimCLRProjectionHead(self.width, options.hidden_dim or self.width, options.output_dim, num_layers=options.num_layers)
        self.loss = NTXentLoss(temperature=options.temperature, gather_distributed=True)

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW."""
        z_2BD = torch.cat(self.encode_views(batch.views))
        p_2Bd: Tensor = self.head(z_2BD)
        # exp(1 / t) and the sum over thousands of negatives need float32 whatever the network computes in.
        with torch.autocast(p_2Bd.device.type, enabled=False):
            first_Bd, second_Bd = p_2Bd.float().chunk(2)
            loss = self.loss(first_Bd, second_Bd)
        backbone_BD = z_2BD.detach().float().chunk(2)[0]
        return Output(loss, {"backbone": backbone_BD, "projector_0": first_Bd.detach(), "projector_1": second_Bd.detach()}, {})

    def chance_loss(self, global_batch: int) -> float | None:
        """log of the number of candidates: every other view of the global batch."""
        return math.log(2 * global_batch - 1)


class SimCLRv2(SimCLR):
    """The deeper head of version 2."""

    Options = SimCLRv2Options


METHODS = {"simclr": SimCLR, "simclr-v2": SimCLRv2}
