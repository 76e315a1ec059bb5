"""DINO: self-distillation without labels (Caron et al. 2021, arXiv 2104.14294), for any encoder.

Section 3.1. g_s is the student's and g_t the teacher's output over K prototypes, c the centre; every view s of an image goes through the
student, the two global ones t through the teacher:

    P_t = softmax((g_t(t) - c) / T_t),   P_s = softmax(g_s(s) / T_s),   loss = mean over the pairs t != s of  - sum_K P_t log P_s
    c <- 0.9 c + 0.1 mean over the teacher's outputs of the global batch,   teacher <- m teacher + (1 - m) student

Head: three layers of 2048, 2048 and 256 with GELU, output scaled to length 1, times K prototypes of length 1.
Official (the code's vanilla run, ViT-S/16, 100 epochs on 8 GPUs): K 65536, batch 512, AdamW, lr 0.0005 * batch / 256, 10 epochs of
warm-up, cosine to 1e-6, weight decay 0.04 to 0.4 along a cosine, clip 3, T_s 0.1, T_t 0.04, m 0.996 to 1 along a cosine, prototypes of
length 1 and frozen in the first epoch, two crops of 224 px and 40 to 100 %, eight of 96 px and 5 to 40 %. The paper's longer runs (300 and
800 epochs, batch 1024) raise T_t from 0.04 to 0.07 over the first 30 epochs and let the prototypes' length train.

Parts: lightly's DINOLoss (with the centre: a persistent buffer, the mean over all ranks) and the layers of its ProjectionHead.
DINOProjectionHead is not used: torch's weight norm keeps a tensor that cannot be copied to make a teacher. Heads narrower than 2048
start with larger weights, which keep a layer's gain.
Deviations: T_t grows with each step and not each epoch. Prototypes keep length 1 always. Frozen prototypes still shrink by weight decay,
which their direction does not feel. Clipping is by the norm of all gradients together, there of each tensor's own. No drop path. Output and
softmax are float32 also in bf16.
"""

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import Strict
from base.errors import RequestError
from engine import ema
from pretrain.clusters import check_count
from pretrain.methods import Clock, Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class DINOOptions(Strict):
    """`momentum` is that of the first step; epochs are those of the corpus and may be fractions."""

    prototypes: int = Field(default=65536, ge=2)
    hidden_dim: int = Field(default=2048, gt=0)
    bottleneck_dim: int = Field(default=256, gt=0)
    student_temperature: float = Field(default=0.1, ge=0.02)
    teacher_temperature: float = Field(default=0.07, ge=0.02)
    teacher_temperature_start: float = Field(default=0.04, ge=0.02)
    teacher_warmup_epochs: float = Field(default=30, ge=0)
    momentum: float = Field(default=0.996, gt=0, le=1)
    freeze_epochs: float = Field(default=1, ge=0)


class DINOHead(nn.Module):
    """Features -> projections of length 1, and their cosines with the prototypes."""

    def __init__(self, width: int, options: DINOOptions) -> None:
        super().__init__()
        from lightly.models.modules.heads import ProjectionHead

        hidden, out = options.hidden_dim, options.bottleneck_dim
        self.project = ProjectionHead([(width, hidden, None, nn.GELU()), (hidden, hidden, None, nn.GELU()), (hidden, out, None, None)])
        for layer in self.project.layers:
            if isinstance(layer, nn.Linear):
                # The official 0.02, at the official width: a narrow head's outputs would be so small that its biases drown them.
                nn.init.trunc_normal_(layer.weight, std=0.02 * (2048 / hidden) ** 0.5)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(out, options.prototypes, bias=False)

    def forward(self, z_BD: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """p_Bd and logits_BK, float32; with `frozen` the prototypes get no gradient."""
        p_Bd = self.project(z_BD)
        with torch.autocast(p_Bd.device.type, enabled=False):
            unit_Bd = F.normalize(p_Bd.float(), dim=1)
            weight_Kd = F.normalize(self.prototypes.weight, dim=1)
            return unit_Bd, F.linear(unit_Bd, weight_Kd.detach() if frozen else weight_Kd)


class DINO(Method):
    """See the module's header. Legend: V views, the first two global; K prototypes, d width of the bottleneck."""

    views = ("multi",)
    Options = DINOOptions

    def __init__(self, encoder: nn.Module, options: DINOOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.loss import DINOLoss

        self.head = DINOHead(self.width, options)
        self.loss = DINOLoss(options.prototypes, student_temp=options.student_temperature)
        self.add_teacher("teacher", self.followed("teacher"))

    @classmethod
    def check(cls, options: DINOOptions, facts: Facts) -> None:
        """Raises RequestError for views without two global ones first, and for more prototypes than samples."""
        check_crops(facts)
        check_count(options.prototypes, facts.samples)

    def followed(self, teacher: str) -> nn.Module:
        """The student: encoder and head."""
        return nn.ModuleDict({"encoder": self.encoder, "head": self.head})

    def forward(self, batch: "Batch") -> Output:
        """views: u8 BCHW, the two global ones first."""
        teacher = self.teachers["teacher"]
        views_BD = self.encode_views(batch.views)
        unit_Rd, logits_RK = self.head(torch.cat(views_BD), frozen=frozen(self.options, self.clock))
        with torch.no_grad():
            global_BD = self.encode_views(batch.views[:2], teacher.get_submodule("encoder"))
            _, teacher_2BK = teacher.get_submodule("head")(torch.cat(global_BD))
        temperature = teacher_temperature(self.options, self.clock)
        with torch.autocast(logits_RK.device.type, enabled=False):
            prototypes_BK = F.softmax((teacher_2BK.chunk(2)[0] - self.loss.center[0]) / temperature, dim=1)
            loss = self.loss(list(teacher_2BK.chunk(2)), list(logits_RK.chunk(len(views_BD))), teacher_temp=temperature)
        first_Bd, second_Bd = unit_Rd.detach().chunk(len(views_BD))[:2]
        features = {"backbone": views_BD[0].detach().float(), "projector_0": first_Bd, "projector_1": second_Bd}
        return Output(loss, features | {"prototypes": prototypes_BK}, {})

    def moved_by_forward(self) -> list[Tensor]:
        """The centre."""
        return [self.loss.center]

    def on_step_end(self) -> None:
        """The teacher follows."""
        ema.follow(self.teachers["teacher"], self.followed("teacher"), self.clock.momentum(self.options.momentum))

    def chance_loss(self, global_batch: int) -> float | None:
        """Entropy of K equal prototypes."""
        return math.log(self.options.prototypes)


def check_crops(facts: Facts) -> None:
    """Two global views are needed first.

    Raises:
        RequestError: the first two views differ in size, or there is one only.
    """
    if facts.sizes and (len(facts.sizes) < 2 or facts.sizes[0] != facts.sizes[1]):
        raise RequestError(
            f"the first two views must be global ones of the same size, these are of {', '.join(map(str, facts.sizes))} px",
            where="recipe: views.crops",
            hint="views.crops=[{count: 2, crop_scale: [0.4, 1.0]}, {count: 6, size: 96, crop_scale: [0.05, 0.4]}]",
        )


def frozen(options: DINOOptions, clock: Clock) -> bool:
    """Whether the prototypes stand still: they would run ahead of features that mean nothing yet."""
    return clock.step < options.freeze_epochs * clock.epoch_steps


def teacher_temperature(options: DINOOptions, clock: Clock) -> float:
    """From its start to its end, linearly in the step."""
    warmup = options.teacher_warmup_epochs * clock.epoch_steps
    share = min(1.0, clock.step / warmup) if warmup else 1.0
    return options.teacher_temperature_start + (options.teacher_temperature - options.teacher_temperature_start) * share


METHODS = {"dino": DINO}
