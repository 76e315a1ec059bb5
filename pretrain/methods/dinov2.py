"""DINOv2: DINO on the class token, iBOT on masked patches, KoLeo for spread (Oquab et al. 2023, arXiv 2304.07193), for vision transformers.

Section 4. Student and teacher as in DINO (dino.py), a head of each of the two kinds; the student's global views have blocks of patches
masked, the teacher's have not. SK is Sinkhorn-Knopp over the global batch: three times, each prototype is scaled to equal mass and then
each sample to 1 (Caron et al. 2020, arXiv 2006.09882). z are the student's class tokens of one global view, scaled to length 1:

    dino  = mean over pairs of views t != s of  - sum_K SK(g_t / T_t) log softmax(g_s / T_s)
    ibot  = mean over the global views of the mean over their masked patches of the same sum (Zhou et al. 2021, arXiv 2111.07832)
    koleo = - mean_i log( min_{j != i} |z_i - z_j| + 1e-8 ), added up over the two global views (Sablayrolles et al. 2018, arXiv 1806.03198)
    loss  = dino + ibot + 0.1 koleo

Official (ViT-L/14 on ImageNet-22k): batch 3072, 500 times 1250 steps, AdamW, lr 2e-4 * sqrt(batch / 1024), 80 times 1250 steps of warm-up,
weight decay 0.04 to 0.2, clip 3, momentum 0.994 to 1, K 131072, half of the global views masked by 10 to 50 %, crops of 32 to 100 % and
eight local ones of 5 to 32 %.

Parts: the layers of lightly's ProjectionHead. Its IBOTPatchLoss centres by a mean and its KoLeoLoss looks for neighbours on one rank only.
Deviations: KoLeo's neighbours are sought in the global batch (in the official code on a GPU), so that the number of ranks changes nothing.
An image's share of masked patches is drawn, where the official code spreads shares evenly over a batch. Both heads have one bottleneck
width (official: 384 and 256). No drop path, no layer scale, patches of 16 px, one rate for the patch embedding as for the rest; and as
dino.py.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import check_range
from encoders import vit
from engine import ema, ranks
from pretrain import masking
from pretrain.clusters import check_count, sinkhorn
from pretrain.methods import Facts, Method, Output
from pretrain.methods.dino import DINOHead, DINOOptions, check_crops, frozen, teacher_temperature

if TYPE_CHECKING:
    from shards.batches import Batch


ITERATIONS = 3  # of Sinkhorn, as in the official code


class DINOv2Options(DINOOptions):
    """`mask_p`: probability that a global view is masked at all; `mask_ratio`: smallest and largest share of its patches."""

    prototypes: int = Field(default=131072, ge=2)
    bottleneck_dim: int = Field(default=384, gt=0)
    momentum: float = Field(default=0.994, gt=0, le=1)
    mask_p: float = Field(default=0.5, ge=0, le=1)
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    koleo: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _shares_are_a_range(self) -> "DINOv2Options":
        check_range("mask_ratio", self.mask_ratio)
        return self


class DINOv2(Method):
    """See the module's header. Legend: G = 2B global views, K prototypes, N patches, R masked patches of all G."""

    views = ("multi",)
    only = "vit"
    Options = DINOv2Options

    def __init__(self, encoder: nn.Module, options: DINOv2Options, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.head, self.patch_head = DINOHead(self.width, options), DINOHead(self.width, options)
        self.mask_token_D = nn.Parameter(torch.zeros(self.width))
        self.add_teacher("teacher", self.followed("teacher"))

    @classmethod
    def check(cls, options: DINOv2Options, facts: Facts) -> None:
        """Raises RequestError as DINO, and for views that are not whole patches."""
        masking.check_side(facts)
        check_crops(facts)
        check_count(options.prototypes, facts.samples)

    def followed(self, teacher: str) -> nn.Module:
        """The student: encoder and heads."""
        return nn.ModuleDict({"encoder": self.encoder, "head": self.head, "patch_head": self.patch_head})

    def forward(self, batch: "Batch") -> Output:
        """views: u8 BCHW, the two global ones first."""
        still, temperature = frozen(self.options, self.clock), teacher_temperature(self.options, self.clock)
        global_GCHW = torch.cat(batch.views[:2])
        masked_GN = masking.draw(self.facts.seed, batch, lambda stream: self.masks(stream, batch.views[0].shape[-1] // vit.PATCH))
        masked_GN = masked_GN.transpose(0, 1).flatten(0, 1)

        tokens_GTD = self.encode(global_GCHW, self._masked_tokens, masked_GN)
        class_BD = [*tokens_GTD[:, 0].chunk(2), *self.encode_views(batch.views[2:])]
        unit_Vd, logits_VK = self.head(torch.cat(class_BD), frozen=still)
        _, patch_RK = self.patch_head(tokens_GTD[:, 1:][masked_GN], frozen=still)
        with torch.no_grad():
            target_GK, target_RK = self.targets(global_GCHW, masked_GN, temperature)

        with torch.autocast(logits_VK.device.type, enabled=False):
            log_VK = F.log_softmax(logits_VK / self.options.student_temperature, dim=1)
            dino = pairs(torch.stack(target_GK.chunk(2)), torch.stack(log_VK.chunk(len(class_BD))))
            terms_R = -(target_RK * F.log_softmax(patch_RK / self.options.student_temperature, dim=1)).sum(dim=1)
            weight_GN = (1 / masked_GN.sum(dim=1, keepdim=True).clamp_min(1)).expand_as(masked_GN)
            ibot = (terms_R * weight_GN[masked_GN]).sum() / len(masked_GN)
            spread = koleo(class_BD[0].float()) + koleo(class_BD[1].float())
            loss = dino + ibot + self.options.koleo * spread
        first_Bd, second_Bd = unit_Vd.detach().chunk(len(class_BD))[:2]
        features = {"backbone": class_BD[0].detach().float(), "projector_0": first_Bd, "projector_1": second_Bd}
        logs = {"dino": dino.detach(), "ibot": ibot.detach(), "koleo": spread.detach()}
        return Output(loss, features | {"prototypes": target_GK.chunk(2)[0]}, logs)

    def masks(self, stream: masking.Stream, side: int) -> np.ndarray:
        """masked_2N of an image's two global views."""
        masks = []
        for _ in range(2):
            share = stream.uniform(*self.options.mask_ratio) if stream.random() < self.options.mask_p else 0.0
            masks.append(masking.blocks(stream, side, max(1, round(share * side**2)) if share else 0))
        return np.stack(masks)

    def targets(self, global_GCHW: Tensor, masked_GN: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's target_GK for the views and target_RK for their masked patches; it sees whole views."""
        teacher = self.teachers["teacher"]
        encoder = teacher.get_submodule("encoder")
        tokens_GTD = self.encode(global_GCHW, lambda x: vit.tokens(encoder, x))
        _, logits_GK = teacher.get_submodule("head")(tokens_GTD[:, 0])
        _, logits_RK = teacher.get_submodule("patch_head")(tokens_GTD[:, 1:][masked_GN])
        return sinkhorn(logits_GK, temperature, ITERATIONS), sinkhorn(logits_RK, temperature, ITERATIONS)

    def _masked_tokens(self, x: Tensor, masked_BN: Tensor) -> Tensor:
        return vit.tokens(self.encoder, x, masked_BN=masked_BN, mask_token_D=self.mask_token_D)

    def on_step_end(self) -> None:
        """The teacher follows."""
        ema.follow(self.teachers["teacher"], self.followed("teacher"), self.clock.momentum(self.options.momentum))

    def chance_loss(self, global_batch: int) -> float | None:
        """Entropy of K equal prototypes, for whole views and for the share of them that is masked; KoLeo's part has no such value."""
        return (1 + self.options.mask_p) * math.log(self.options.prototypes)


def pairs(target_TBK: Tensor, log_VBK: Tensor) -> Tensor:
    """Mean cross-entropy over images and pairs of a target and another view; targets are of the first views."""
    terms_TV = -torch.einsum("tbk,vbk->tv", target_TBK, log_VBK) / target_TBK.shape[1]
    other_TV = 1 - torch.eye(*terms_TV.shape, device=terms_TV.device)
    return (terms_TV * other_TV).sum() / other_TV.sum()


def koleo(z_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest other sample of the global batch. Its mean over ranks is the global one, gradients too."""
    from lightly.utils.dist import gather

    unit_BD = F.normalize(z_BD, dim=1)
    unit_ND = torch.cat(gather(unit_BD)) if ranks.world() > 1 else unit_BD
    with torch.no_grad():
        cosine_BN = unit_BD @ unit_ND.T
        own_B = torch.arange(len(unit_BD), device=z_BD.device)
        cosine_BN[own_B, own_B + ranks.rank() * len(unit_BD)] = -2
        nearest_B = cosine_BN.argmax(dim=1)
    return -(F.pairwise_distance(unit_BD, unit_ND[nearest_B], eps=1e-8) + 1e-8).log().mean()


METHODS = {"dinov2": DINOv2}
