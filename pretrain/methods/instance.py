"""Methods that tell every image from all others by a bank with one row an image: InsDis (also called NPID) and PIRL.

InsDis (Wu et al. 2018, arXiv 1805.01978, equation 2 with a part of the images as negatives): v the projection of image i, m_j the bank's
row of image j, all of length 1, S a set of K other images:

    l(i) = -log( exp(v . m_i / t) / (exp(v . m_i / t) + sum_{j in S} exp(v . m_j / t)) ),   then m_i <- unit(a m_i + (1 - a) v)

PIRL (Misra and van der Maaten 2019, arXiv 1912.01991, equation 5): v comes from the whole image, g from nine patches of it in random order,
each projected, the nine concatenated and projected again; l is as above and the bank follows v:

    loss = w l(g, i) + (1 - w) l(v, i)

Official hyper-parameters, of the code that the published encoders come from (PyContrast): ResNet-50, a linear head to 128, t 0.07, K 65536,
a 0.5, w 0.5, SGD with lr 0.03, momentum 0.9 and weight decay 1e-4, batch 256, 200 epochs. InsDis sees one view; PIRL one and patches.

Memory: the bank holds N x 128 float32 on every rank, 656 MB for ImageNet's 1.28 M images, and lies in the checkpoint.
Parts: none of lightly; it has no bank by sample (its PIRL views slice before they resize, ours come from shards.draws).
Deviations: a softmax (InfoNCE) where the papers have noise-contrastive estimation, as in PyContrast. The K negatives are drawn once a step
and shared by the global batch (per image they would be 33 MB each); an image's own row among them does not count. On a corpus of at most K
images all others are negatives, which is equation 2 without an estimate. Biases and norms have no weight decay, where PyContrast decays
all parameters.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import Strict
from base.errors import RequestError
from base.seeds import seed_of
from engine.ahead import to_device
from pretrain.memory import Bank
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch

NEGATIVES = 65536
PATCHES = 9


class InsDisOptions(Strict):
    """negatives: left open, 65536 or all other images where there are fewer. bank_momentum: share of the old row that stays."""

    temperature: float = Field(default=0.07, ge=1e-3)
    output_dim: int = Field(default=128, gt=0)
    negatives: int | None = Field(default=None, ge=1)
    bank_momentum: float = Field(default=0.5, ge=0, lt=1)


class PIRLOptions(InsDisOptions):
    """patch_weight: of the patches' part of the loss."""

    patch_weight: float = Field(default=0.5, ge=0, le=1)


class PatchHead(nn.Module):
    """Nine patches' z_BPD -> p_Bd: each is projected (by one layer, or two with `hidden_dim`), then all nine together."""

    def __init__(self, width: int, output_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        one = nn.Linear(width, output_dim)
        self.each = one if hidden_dim is None else nn.Sequential(nn.Linear(width, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, output_dim))
        self.all = nn.Linear(PATCHES * output_dim, output_dim)

    def forward(self, z_BPD: Tensor) -> Tensor:
        """The order of the patches is random already, so the head cannot learn it."""
        p_Bd: Tensor = self.all(self.each(z_BPD).flatten(1))
        return p_Bd


def require_wholes(facts: Facts, wholes: int) -> None:
    """Raises RequestError unless the views are that many whole ones and nine patches."""
    if facts.sizes and len(facts.sizes) != wholes + PATCHES:
        found = len(facts.sizes) - PATCHES
        raise RequestError(
            f"{wholes} whole view(s) beside the patches are needed, the recipe makes {found}",
            where="recipe: views.crops",
            hint=f"views.crops=[{{count: {wholes}}}]",
        )


class InsDis(Method):
    """See the module's header."""

    views = ("one",)
    Options: ClassVar[type[InsDisOptions]] = InsDisOptions
    options: InsDisOptions

    def __init__(self, encoder: nn.Module, options: InsDisOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.head = nn.Linear(self.width, options.output_dim)
        self.bank = Bank(facts.samples, options.output_dim)
        self.negatives = options.negatives or self.scaled(options, facts)["negatives"]
        self.pending: list[tuple[Tensor, Tensor]] = []  # projections and ids of this update

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW."""
        z_BD = self.encode(batch.views[0])
        p_Bd: Tensor = self.head(z_BD)
        with torch.autocast(p_Bd.device.type, enabled=False):
            v_Bd, index_B = F.normalize(p_Bd.float(), dim=1), to_device(batch.index_B, p_Bd.device)
            loss, top1 = self.contrast(v_Bd, index_B)
        self.pending.append((v_Bd.detach(), index_B))
        return Output(loss, {"backbone": z_BD.detach().float()}, {"bank_top1": top1})

    def contrast(self, v_Bd: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Against this step's negatives."""
        negative_K = self.bank.negatives(self.negatives, seed_of("negatives", self.facts.seed, self.clock.step))
        return self.bank.contrast(v_Bd, index_B, negative_K, self.options.temperature)

    def on_step_end(self) -> None:
        """The bank moves."""
        for v_Bd, index_B in self.pending:
            self.bank.update(v_Bd, index_B, self.options.bank_momentum)
        self.pending.clear()

    def on_step_skipped(self) -> None:
        """The bank stays."""
        self.pending.clear()

    def chance_loss(self, global_batch: int) -> float | None:
        """log of the number of candidates."""
        return math.log(self.negatives + 1)

    @classmethod
    def check(cls, options: InsDisOptions, facts: Facts) -> None:
        """Raises RequestError for more negatives than there are other images."""
        most = facts.samples - 1
        if options.negatives is not None and options.negatives > most:
            raise RequestError(
                f"{options.negatives} negatives, and every image has only {most} others",
                where="recipe: options.negatives",
                hint=f"options.negatives={most}",
            )

    @classmethod
    def scaled(cls, options: InsDisOptions, facts: Facts) -> dict[str, int]:
        """The negatives, when left open."""
        return {"negatives": min(NEGATIVES, facts.samples - 1)} if options.negatives is None else {}


class PIRL(InsDis):
    """See the module's header."""

    views = ("jigsaw",)
    Options = PIRLOptions
    options: PIRLOptions

    def __init__(self, encoder: nn.Module, options: PIRLOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.patch_head = PatchHead(self.width, options.output_dim)

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW, then nine patches."""
        z_BD = self.encode(batch.views[0])
        patches_PBD = self.encode(torch.cat(batch.views[1:])).unflatten(0, (PATCHES, -1))
        p_Bd, g_Bd = self.head(z_BD), self.patch_head(patches_PBD.transpose(0, 1))
        index_B = to_device(batch.index_B, p_Bd.device)
        with torch.autocast(p_Bd.device.type, enabled=False):
            v_Bd, g_Bd = F.normalize(p_Bd.float(), dim=1), F.normalize(g_Bd.float(), dim=1)
            whole, top1 = self.contrast(v_Bd, index_B)
            of_patches, patch_top1 = self.contrast(g_Bd, index_B)
            weight = self.options.patch_weight
            loss = weight * of_patches + (1 - weight) * whole
        self.pending.append((v_Bd.detach(), index_B))
        features = {"backbone": z_BD.detach().float(), "projector_0": v_Bd.detach(), "projector_1": g_Bd.detach()}
        return Output(loss, features, {"bank_top1": top1, "patch_top1": patch_top1})

    @classmethod
    def check(cls, options: InsDisOptions, facts: Facts) -> None:
        """Raises RequestError as InsDis, and for other views than one and nine patches."""
        super().check(options, facts)
        require_wholes(facts, 1)


METHODS = {"insdis": InsDis, "pirl": PIRL}
