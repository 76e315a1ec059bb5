"""Momentum contrast: a query finds its key among a queue of earlier keys, which an encoder makes that follows slowly (MoCo, InfoMin).

MoCo (He et al. 2019, arXiv 1911.05722, equation 1), q the query of one view, k+ the key of the other, k_j those of the queue, of length 1:

    loss = -log( exp(q . k+ / t) / (exp(q . k+ / t) + sum_{j=1..K} exp(q . k_j / t)) ),   key encoder <- m key encoder + (1 - m) encoder

Version 2 (Chen et al. 2020, arXiv 2003.04297): a head of two layers, blur, cosine, t 0.2. InfoMin (Tian et al. 2020, arXiv 2005.10243):
version 2 with stronger views and a second query g from nine patches of the image in random order (PIRL's), loss = (1 - w) l(q) + w l(g).

Official hyper-parameters: ResNet-50, 224 px, batch 256, SGD with lr 0.03, momentum 0.9, weight decay 1e-4, K 65536, m 0.999, d 128.
Version 1: linear head, t 0.07, 200 epochs. Version 2: head 2048-2048-128, 800 epochs. InfoMin (PyContrast): as version 2, t 0.15, w 0.5.

Parts: lightly's MoCoProjectionHead; its queue is in no checkpoint, so ours is pretrain.memory's. The loss stays one-sided: keys of both
views in the queue would crowd it.
Deviations: no ShuffleBN. The paper normalises over parts of the batch and shuffles the keys' parts, so that a query and its key share no
statistics that would give the key away among the queue's. Here both sides normalise over the global batch, so that the number of ranks
changes nothing; what they share tells less the larger the batch, but it is not nothing (the authors: facebookresearch/moco, issue 46).
`queue_top1` also rises because the keys in the queue are of older encoders; `contrastive_top1`, within the batch, is not fooled by either.
A queue that is left open is shorter than 65536 on small corpora. Biases and norms have no weight decay, where the official codes decay all
parameters.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import Strict
from engine import ema
from pretrain.memory import Queue, check_queue, info_nce, queue_length
from pretrain.methods import Facts, Method, Output
from pretrain.methods.instance import PATCHES, PatchHead, require_wholes

if TYPE_CHECKING:
    from shards.batches import Batch


class MoCoOptions(Strict):
    """queue: keys; left open, 65536 or what fits a quarter of the corpus (pretrain.memory.queue_length). momentum: of the key encoder."""

    temperature: float = Field(default=0.07, ge=1e-3)
    output_dim: int = Field(default=128, gt=0)
    queue: int | None = Field(default=None, ge=1)
    momentum: float = Field(default=0.999, ge=0, lt=1)


class MoCoV2Options(MoCoOptions):
    """`hidden_dim` defaults to the width of the encoder's features, as in the official code."""

    temperature: float = Field(default=0.2, ge=1e-3)
    hidden_dim: int | None = Field(default=None, gt=0)


class InfoMinOptions(MoCoV2Options):
    """patch_weight: of the patches' part of the loss."""

    temperature: float = Field(default=0.15, ge=1e-3)
    patch_weight: float = Field(default=0.5, ge=0, le=1)


class MoCo(Method):
    """Version 1; see the module's header. Subclasses add queries or losses to `first`."""

    views = ("two",)
    official_queue = 65536
    Options: ClassVar[type[MoCoOptions]] = MoCoOptions
    options: MoCoOptions

    def __init__(self, encoder: nn.Module, options: MoCoOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.head = self.make_head()
        self.queue = Queue(options.queue or queue_length(self.official_queue, facts), options.output_dim)
        self.add_teacher("key", self.followed("key"))
        self.pending: list[Tensor] = []  # keys of this update

    def make_head(self) -> nn.Module:
        """Linear in version 1."""
        return nn.Linear(self.width, self.options.output_dim)

    def followed(self, teacher: str) -> nn.Module:
        """Of the key encoder: the encoder and the head."""
        return nn.Sequential(self.encoder, self.head)

    @torch.no_grad()
    def key(self, x: Tensor) -> Tensor:
        """x: u8 BCHW -> k_Bd, unit, float32."""
        return F.normalize(self.encode(x, self.teachers["key"]).float(), dim=1)

    def contrast(self, q_Bd: Tensor, k_Bd: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and top-1 of queries against their keys and the queue."""
        return info_nce((q_Bd * k_Bd).sum(dim=1), q_Bd @ self.queue.keys_Kd.T, self.options.temperature)

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW, the query's and the key's."""
        return self.first(batch)[0]

    def first(self, batch: "Batch") -> tuple[Output, Tensor]:
        """MoCo's own output, and the query q_Bd for losses beside it."""
        z_BD = self.encode(batch.views[0])
        p_Bd, k_Bd = self.head(z_BD), self.key(batch.views[1])
        with torch.autocast(p_Bd.device.type, enabled=False):
            q_Bd = F.normalize(p_Bd.float(), dim=1)
            loss, top1 = self.contrast(q_Bd, k_Bd)
        self.pending.append(k_Bd)
        features = {"backbone": z_BD.detach().float(), "projector_0": q_Bd.detach(), "projector_1": k_Bd}
        return Output(loss, features, {"queue_top1": top1}), q_Bd

    def on_step_end(self) -> None:
        """The queue takes the keys, the key encoder moves."""
        for k_Bd in self.pending:
            self.queue.push(k_Bd)
        self.pending.clear()
        ema.follow(self.teachers["key"], self.followed("key"), self.options.momentum)

    def on_step_skipped(self) -> None:
        """The queue does not get them."""
        self.pending.clear()

    def chance_loss(self, global_batch: int) -> float | None:
        """log of the number of candidates: the key and the queue."""
        return math.log(len(self.queue.keys_Kd) + 1)

    @classmethod
    def check(cls, options: MoCoOptions, facts: Facts) -> None:
        """Raises RequestError for a queue that the global batch does not divide."""
        check_queue(options.queue, facts)

    @classmethod
    def scaled(cls, options: MoCoOptions, facts: Facts) -> dict[str, int]:
        """The queue, when left open."""
        return {"queue": queue_length(cls.official_queue, facts)} if options.queue is None else {}


class MoCoV2(MoCo):
    """The head of version 2."""

    Options = MoCoV2Options
    options: MoCoV2Options

    def make_head(self) -> nn.Module:
        """Two layers."""
        from lightly.models.modules.heads import MoCoProjectionHead

        head: nn.Module = MoCoProjectionHead(self.width, self.options.hidden_dim or self.width, self.options.output_dim)
        return head


class InfoMin(MoCoV2):
    """Version 2 with a second query from patches."""

    views = ("jigsaw",)
    Options = InfoMinOptions
    options: InfoMinOptions

    def __init__(self, encoder: nn.Module, options: InfoMinOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.patch_head = PatchHead(self.width, options.output_dim, options.hidden_dim or self.width)

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW as in MoCo, then nine patches."""
        whole, _ = self.first(batch)
        patches_PBD = self.encode(torch.cat(batch.views[2:])).unflatten(0, (PATCHES, -1))
        p_Bd = self.patch_head(patches_PBD.transpose(0, 1))
        with torch.autocast(p_Bd.device.type, enabled=False):
            of_patches, top1 = self.contrast(F.normalize(p_Bd.float(), dim=1), whole.features["projector_1"])
        weight = self.options.patch_weight
        return Output((1 - weight) * whole.loss + weight * of_patches, whole.features, whole.logs | {"patch_top1": top1})

    @classmethod
    def check(cls, options: MoCoOptions, facts: Facts) -> None:
        """Raises RequestError as MoCo, and for other views than two and nine patches."""
        super().check(options, facts)
        require_wholes(facts, 2)


METHODS = {"moco-v1": MoCo, "moco-v2": MoCoV2, "infomin": InfoMin}
