"""Barlow Twins and VICReg: the dimensions of two views' embeddings agree view by view and say different things.

Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230), equations 1 and 2, z normalised per dimension over the global batch of N images:

    c_ij = mean over images of z_i z'_j,     loss = sum_i (1 - c_ii)^2 + lambda * sum_i sum_{j != i} c_ij^2

Official hyper-parameters (section 2.2): ResNet-50, 1000 epochs, batch 2048, LARS with lr 0.2 * batch / 256 = 1.6 for weights and
0.0048 * batch / 256 for biases and norms, weight decay 1.5e-6, 10 epochs of warm-up, cosine decay to a thousandth, lambda 5e-3, projector
8192-8192-8192 without biases, views of BYOL.

VICReg (Bardes et al. 2022, arXiv 2105.04906), equations 1 to 6, S the covariance of one view's z over the global batch, D dimensions:

    loss = 25 * mean |z - z'|^2 / D + 25 * mean_views v + 1 * sum_views c
    v = mean_j max(0, 1 - sqrt(S_jj + 1e-4)),     c = sum_{i != j} S_ij^2 / D

(the paper sums v over the views; its code, which made the numbers, takes the mean). Official hyper-parameters (section 4.2, appendix C):
ResNet-50, 1000 epochs, batch 2048, LARS with lr 0.2 * batch / 256 = 1.6, weight decay 1e-6, 10 epochs of warm-up, cosine decay to a
thousandth, expander 8192-8192-8192, both views blurred with probability 0.5 and solarised with 0.1.

Parts: lightly's ProjectionHead and VICRegLoss (gathers with gradient; two processes equal one, tested). Barlow Twins' loss is written here:
lightly's normalises over each rank's part, so that its loss and gradient depend on the number of ranks.
Deviations: one rate for all parameters of Barlow Twins. Each view passes the networks alone, as in the official codes.
"""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from engine import ranks
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class BarlowTwinsOptions(Strict):
    """`redundancy` is the paper's lambda."""

    redundancy: float = Field(default=5e-3, gt=0)
    hidden_dim: int = Field(default=8192, gt=0)
    output_dim: int = Field(default=8192, gt=0)


class VICRegOptions(Strict):
    """Weights of the three terms, and the expander."""

    invariance: float = Field(default=25.0, gt=0)
    variance: float = Field(default=25.0, gt=0)
    covariance: float = Field(default=1.0, gt=0)
    hidden_dim: int = Field(default=8192, gt=0)
    output_dim: int = Field(default=8192, gt=0)


class _Decorrelating(Method):
    """What the two share: a projector of three layers and a loss of both views' projections."""

    views = ("two",)

    def __init__(self, encoder: nn.Module, options: BarlowTwinsOptions | VICRegOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.models.modules.heads import ProjectionHead

        hidden, out = options.hidden_dim, options.output_dim
        blocks = [(width, hidden, nn.BatchNorm1d(hidden), nn.ReLU()) for width in (self.width, hidden)]
        self.head = ProjectionHead([*blocks, (hidden, out, None, None, False)])

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW."""
        z_first_BD, z_second_BD = (self.encode(view) for view in batch.views)
        p_first_Bd, p_second_Bd = self.head(z_first_BD), self.head(z_second_BD)
        # A covariance is a difference of large sums: float32.
        with torch.autocast(p_first_Bd.device.type, enabled=False):
            loss = self.compare(p_first_Bd.float(), p_second_Bd.float())
        features = {"backbone": z_first_BD, "projector_0": p_first_Bd, "projector_1": p_second_Bd}
        return Output(loss, {name: value.detach().float() for name, value in features.items()}, {})

    def compare(self, p_first_Bd: Tensor, p_second_Bd: Tensor) -> Tensor:
        """The loss of this rank, float32."""
        raise NotImplementedError


class BarlowTwins(_Decorrelating):
    """See the module's header."""

    Options = BarlowTwinsOptions

    def __init__(self, encoder: nn.Module, options: BarlowTwinsOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        # As every batch norm it becomes one over the global batch (engine.norm), gradients included.
        self.norm = nn.BatchNorm1d(options.output_dim, affine=False)

    def compare(self, p_first_Bd: Tensor, p_second_Bd: Tensor) -> Tensor:
        """Of the correlations over the global batch: every rank has the whole loss."""
        here_dd = self.norm(p_first_Bd).T @ self.norm(p_second_Bd)
        c_dd = ranks.summed(here_dd) / (len(p_first_Bd) * ranks.world())
        diagonal_d = c_dd.diagonal()
        redundant = c_dd.square().sum() - diagonal_d.square().sum()
        return (1 - diagonal_d).square().sum() + self.options.redundancy * redundant


class VICReg(_Decorrelating):
    """See the module's header."""

    Options = VICRegOptions

    def __init__(self, encoder: nn.Module, options: VICRegOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.loss import VICRegLoss

        self.loss = VICRegLoss(options.invariance, options.variance, options.covariance, gather_distributed=True)

    def compare(self, p_first_Bd: Tensor, p_second_Bd: Tensor) -> Tensor:
        """Agreement over this rank's images, variance and covariance over the global batch."""
        loss: Tensor = self.loss(p_first_Bd, p_second_Bd)
        return loss


METHODS = {"barlow-twins": BarlowTwins, "vicreg": VICReg}
