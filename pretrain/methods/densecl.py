"""DenseCL: MoCo version 2 for whole images, and the same for every place of the last map (Wang et al. 2020, arXiv 2011.09157).

r_s is the dense query at place s of one view, t_s+ the dense key of the other view at the place whose features are most like those at s
(cosine of the encoder's own features), t_j the mean dense keys of earlier images, all of length 1 (equations 3 to 5 of the paper):

    loss = (1 - w) l(q, k+, queue) + w 1/S sum_s -log( exp(r_s . t_s+ / t) / (exp(r_s . t_s+ / t) + sum_j exp(r_s . t_j / t)) )

Official hyper-parameters: MoCo version 2's (t 0.2, K 65536 in both queues, m 0.999, batch 256, SGD, weight decay 1e-4, cosine), w 0.5, both
heads 2048-2048-128, the map of 7 x 7 as it is; lr 0.03 and 200 epochs on ImageNet, lr 0.3 and 800 epochs on COCO.

Parts: lightly's DenseCLProjectionHead for both heads, and select_most_similar for the correspondence.
Deviations: as moco.py.
"""

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.memory import Queue, info_nce
from pretrain.methods import Facts, Output
from pretrain.methods.moco import MoCoV2, MoCoV2Options

if TYPE_CHECKING:
    from shards.batches import Batch


class DenseCLOptions(MoCoV2Options):
    """dense_weight: of the places' part of the loss. `queue` is the length of each of the two."""

    dense_weight: float = Field(default=0.5, ge=0, le=1)


class DenseCL(MoCoV2):
    """See the module's header. Legend: S places of the last map."""

    only = "convolutions"
    Options = DenseCLOptions
    options: DenseCLOptions

    def __init__(self, encoder: nn.Module, options: DenseCLOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.dense_queue = Queue(len(self.queue.keys_Kd), options.output_dim)
        self.pending_dense: list[Tensor] = []

    def make_head(self) -> nn.Module:
        """One for whole images, one for places."""
        from lightly.models.modules.heads import DenseCLProjectionHead

        hidden = self.options.hidden_dim or self.width
        return nn.ModuleDict({name: DenseCLProjectionHead(self.width, hidden, self.options.output_dim) for name in ("whole", "places")})

    def followed(self, teacher: str) -> nn.Module:
        """Of the key encoder: the encoder and both heads."""
        return nn.ModuleDict({"encoder": self.encoder, "head": self.head})

    def compile_encoder(self) -> None:
        """The part up to the last map, which is no module."""
        net: Any = self.encoder.net
        net.forward_features = torch.compile(net.forward_features)

    def project(self, x: Tensor, network: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: u8 BCHW -> z_BD, its projection p_Bd, the map's features as rows z_BSD, and their projections p_BSd."""
        encoder, head = network["encoder"], network["head"]  # type: ignore[index]
        map_BDhw = self.encode(x, encoder.features)
        z_BD, z_BSD = encoder.pool(map_BDhw), map_BDhw.flatten(2).transpose(1, 2)
        return z_BD, head["whole"](z_BD), z_BSD, head["places"](z_BSD)

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW, the query's and the key's."""
        from lightly.models.utils import select_most_similar

        z_BD, p_Bd, z_BSD, p_BSd = self.project(batch.views[0], self.followed("key"))
        with torch.no_grad():
            _, key_Bd, key_z_BSD, key_BSd = self.project(batch.views[1], self.teachers["key"])
        with torch.autocast(p_Bd.device.type, enabled=False):
            q_Bd, k_Bd = F.normalize(p_Bd.float(), dim=1), F.normalize(key_Bd.float(), dim=1)
            whole, top1 = self.contrast(q_Bd, k_Bd)
            r_BSd, t_BSd = F.normalize(p_BSd.float(), dim=2), F.normalize(key_BSd.float(), dim=2)
            matched_BSd = select_most_similar(z_BSD.detach().float(), key_z_BSD.float(), t_BSd)
            positive_BS, negative_BSK = (r_BSd * matched_BSd).sum(dim=2), r_BSd @ self.dense_queue.keys_Kd.T
            of_places, place_top1 = info_nce(positive_BS.flatten(), negative_BSK.flatten(0, 1), self.options.temperature)
            weight = self.options.dense_weight
            loss = (1 - weight) * whole + weight * of_places
            self.pending.append(k_Bd)
            self.pending_dense.append(F.normalize(key_BSd.float().mean(dim=1), dim=1))
        features = {"backbone": z_BD.detach().float(), "projector_0": q_Bd.detach(), "projector_1": k_Bd}
        return Output(loss, features, {"queue_top1": top1, "place_top1": place_top1})

    def on_step_end(self) -> None:
        """Both queues take their keys, the key encoder moves."""
        super().on_step_end()
        for t_Bd in self.pending_dense:
            self.dense_queue.push(t_Bd)
        self.pending_dense.clear()

    def on_step_skipped(self) -> None:
        """Neither queue gets them."""
        super().on_step_skipped()
        self.pending_dense.clear()


METHODS = {"densecl": DenseCL}
