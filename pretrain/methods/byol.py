"""BYOL and SimSiam: predict one view's projection from the other's, without negatives.

BYOL (Grill et al. 2020, arXiv 2006.07733): the projection z' is that of a target network, which follows the online one. Equation 2, with q
the prediction from the online network's projection z, for the views v and w of one image, both orders summed:

    loss = mean over images of ( |q_v/|q_v| - z'_w/|z'_w||^2 + |q_w/|q_w| - z'_v/|z'_v||^2 ) = 4 - 2 cos(q_v, z'_w) - 2 cos(q_w, z'_v)
    target = m * target + (1 - m) * online,   m = 1 - (1 - m_0) * (cos(pi * k / K) + 1) / 2

Official hyper-parameters (section 3.2 and 3.3, appendix B): ResNet-50, 1000 epochs, batch 4096, LARS with lr 0.2 * batch / 256 = 3.2,
weight decay 1.5e-6 without biases and batch norm, 10 epochs of warm-up, cosine decay, m_0 = 0.996, projector and predictor 4096-256.

SimSiam (Chen and He 2021, arXiv 2011.10566): no target network; the gradient stops at z. Equations 2 to 4:

    loss = -(cos(p_v, stop(z_w)) + cos(p_w, stop(z_v))) / 2

Official hyper-parameters (section 3): ResNet-50, 100 epochs, batch 512, SGD with lr 0.05 * batch / 256 = 0.1, momentum 0.9, weight decay
1e-4, cosine decay, projector 2048-2048-2048 with batch norm on its output too, predictor 512-2048, views of MoCo version 2.

Parts: lightly's projection and prediction heads and NegativeCosineSimilarity. Each view passes the networks alone, as in the official
codes, so that batch statistics are those of one kind of view.
Deviations: the predictor of SimSiam follows the schedule of the rate (constant in most of the paper's rows, worth 0.4 points in
its table 1), and weight decay leaves out biases and norms.
"""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from engine import ema
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class BYOLOptions(Strict):
    """`momentum` is that of the first step; it rises to 1 over the run."""

    momentum: float = Field(default=0.996, ge=0, le=1)
    hidden_dim: int = Field(default=4096, gt=0)
    output_dim: int = Field(default=256, gt=0)


class SimSiamOptions(Strict):
    """`hidden_dim` is the projector's, `predictor_dim` the predictor's bottleneck."""

    hidden_dim: int = Field(default=2048, gt=0)
    output_dim: int = Field(default=2048, gt=0)
    predictor_dim: int = Field(default=512, gt=0)


class _Predictive(Method):
    """What the two share: each view predicts the target of the other."""

    views = ("two",)
    head: nn.Module
    predictor: nn.Module

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW."""
        from lightly.loss import NegativeCosineSimilarity

        z_first_BD, z_second_BD = (self.encode(view) for view in batch.views)
        p_first_Bd, p_second_Bd = self.head(z_first_BD), self.head(z_second_BD)
        target_first_Bd, target_second_Bd = self.targets(batch.views, [p_first_Bd, p_second_Bd])
        q_first_Bd, q_second_Bd = self.predictor(p_first_Bd), self.predictor(p_second_Bd)
        apart = NegativeCosineSimilarity()
        with torch.autocast(q_first_Bd.device.type, enabled=False):
            mean = (apart(q_first_Bd.float(), target_second_Bd.float()) + apart(q_second_Bd.float(), target_first_Bd.float())) / 2
        features = {"backbone": z_first_BD, "projector_0": p_first_Bd, "projector_1": p_second_Bd}
        return Output(self.scale(mean), {name: value.detach().float() for name, value in features.items()}, {})

    def targets(self, views: list[Tensor], projections: list[Tensor]) -> list[Tensor]:
        """What is predicted, B,d for each view, without gradient."""
        raise NotImplementedError

    def scale(self, mean: Tensor) -> Tensor:
        """The paper's loss from the mean negative cosine."""
        return mean


class BYOL(_Predictive):
    """See the module's header."""

    Options = BYOLOptions

    def __init__(self, encoder: nn.Module, options: BYOLOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

        self.head = BYOLProjectionHead(self.width, options.hidden_dim, options.output_dim)
        self.predictor = BYOLPredictionHead(options.output_dim, options.hidden_dim, options.output_dim)
        self.add_teacher("target", nn.Sequential(self.encoder, self.head))

    @torch.no_grad()
    def targets(self, views: list[Tensor], projections: list[Tensor]) -> list[Tensor]:
        """Projections by the target network, whose batch norm is in training mode too and sees the whole batch."""
        encoder, head = self.teachers["target"].get_submodule("0"), self.teachers["target"].get_submodule("1")
        return [head(self.encode(view, encoder)) for view in views]

    def scale(self, mean: Tensor) -> Tensor:
        """Squared distances between unit vectors, both orders summed."""
        return 4 + 4 * mean

    def followed(self, teacher: str) -> nn.Module:
        """Encoder and projector; the predictor has no target."""
        return nn.Sequential(self.encoder, self.head)

    def on_step_end(self) -> None:
        """Moves the target network."""
        ema.follow(self.teachers["target"], self.followed("target"), self.clock.momentum(self.options.momentum))


class SimSiam(_Predictive):
    """See the module's header."""

    Options = SimSiamOptions

    def __init__(self, encoder: nn.Module, options: SimSiamOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead

        self.head = SimSiamProjectionHead(self.width, options.hidden_dim, options.output_dim)
        self.predictor = SimSiamPredictionHead(options.output_dim, options.predictor_dim, options.output_dim)

    def targets(self, views: list[Tensor], projections: list[Tensor]) -> list[Tensor]:
        """The network's own projections."""
        return [p_Bd.detach() for p_Bd in projections]


METHODS = {"byol": BYOL, "simsiam": SimSiam}
