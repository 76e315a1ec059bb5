"""I-JEPA: predict the representation of blocks of an image from one large block of it (Assran et al. 2023, arXiv 2301.08243).

Section 3. A target network (a moving average of the encoder) sees the whole image; its tokens s, each scaled to mean 0 and variance 1 over
the features, are the targets. The encoder sees the context only, and a predictor gets its tokens and mask tokens at the places of one of
four target blocks. Over the blocks b, their patches n and features d:

    loss = mean_bnd smooth_l1( predictor(encoder(context), places of b)_bnd - s_bnd )

Blocks: four targets of 15 to 20 % of the image with aspect 0.75 to 1.5, a square context of 85 to 100 % without what the targets cover.
Official (ViT-H/14, 300 epochs): batch 2048, AdamW, lr 1e-3 after 40 epochs of warm-up, cosine to 1e-6, weight decay 0.04 to 0.4, momentum
of the target 0.996 to 1 linearly, predictor of 12 blocks of width 384, crops of 30 to 100 % and nothing else. The paper's section 3 says
L2, its official code has the smooth L1 that is used here.

Parts: lightly's decoder (IJEPAPredictorTIMM has no place for a class token); masks and predictor in pretrain/masking.py.
Deviations: sizes of blocks are drawn once a step, as in the official code, but from (seed, step) for all ranks, and a target's aspect by
itself and even in its logarithm, where the official code has one draw for scale and aspect. The official code cuts all
contexts of a rank's batch to the shortest, keeping the upper rows; here each image keeps a random `context` share of the grid's patches,
25 %, which is what that cut leaves on average at its 128 images (24 % in a simulation), and targets are drawn again where less is free. The
class token of timm's ViT, which the paper's has not, is seen by the encoder and given to the predictor, because transplants pool by it.
Initialisation of the predictor as MAE's.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from base.config import Strict, check_range
from base.errors import WorkError
from base.seeds import rng
from encoders import vit
from engine import ema
from pretrain import masking
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch

Shape = tuple[int, int]
MOST_TRIES = 1000  # one in some hundred images needs a second


class IJEPAOptions(Strict):
    """Shares are of the image's patches; `momentum` is that of the first step."""

    targets: int = Field(default=4, ge=1)
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    context: float = Field(default=0.25, gt=0, le=0.5)
    predictor_dim: int = Field(default=384, gt=0, multiple_of=4)
    predictor_depth: int = Field(default=12, ge=1)
    predictor_heads: int = Field(default=12, ge=1)
    momentum: float = Field(default=0.996, gt=0, le=1)

    @model_validator(mode="after")
    def _blocks_and_heads_can_be(self) -> "IJEPAOptions":
        check_range("target_scale", self.target_scale)
        check_range("target_aspect", self.target_aspect, 10.0)
        check_range("context_scale", self.context_scale)
        masking.check_heads("predictor_heads", self.predictor_heads, self.predictor_dim)
        return self


class IJEPA(Method):
    """See the module's header. Legend: K targets an image, M patches of the context, Q of a target."""

    views = ("one",)
    only = "vit"
    Options = IJEPAOptions

    def __init__(self, encoder: nn.Module, options: IJEPAOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        whole: Any = encoder
        self.side = whole.image_size // vit.PATCH
        dim, depth, heads = options.predictor_dim, options.predictor_depth, options.predictor_heads
        self.predictor = masking.Predictor(self.width, self.side, dim, depth, heads, out=self.width)
        self.add_teacher("target", encoder)

    @classmethod
    def check(cls, options: IJEPAOptions, facts: Facts) -> None:
        masking.check_side(facts)

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW."""
        x, K = batch.views[0], self.options.targets
        target, context, kept = self.shapes()
        split = target[0] * target[1] * K
        drawn_BR = masking.draw(self.facts.seed, batch, lambda stream: self.indices(stream, target, context, kept))
        query_KBQ, keep_BM = torch.stack(drawn_BR[:, :split].chunk(K, dim=1)), drawn_BR[:, split:]
        tokens_BTD = self.encode(x, partial(vit.tokens, self.encoder), keep_BM)
        query_RQ = query_KBQ.flatten(0, 1)
        prediction_RQD = self.predictor(tokens_BTD.repeat(K, 1, 1), keep_BM.repeat(K, 1), query_RQ)
        with torch.no_grad():
            target_BND = self.encode(x, partial(vit.tokens, self.teachers["target"]))[:, 1:].float()
        with torch.autocast(x.device.type, enabled=False):
            target_BND = F.layer_norm(target_BND, target_BND.shape[-1:])
            loss = F.smooth_l1_loss(prediction_RQD.float(), vit.at(target_BND.repeat(K, 1, 1), query_RQ))
        return Output(loss, {"backbone": tokens_BTD[:, 0].detach().float()}, {})

    def shapes(self) -> tuple[Shape, Shape, int]:
        """Of this step: height and width of the targets, of the context, and how many patches of the context are kept."""
        stream, count = rng("mask shapes", self.facts.seed, self.clock.step), self.side**2
        aspect = math.exp(stream.uniform(*np.log(self.options.target_aspect)))
        target = masking.shape_of(stream.uniform(*self.options.target_scale) * count, aspect, self.side)
        context = masking.shape_of(stream.uniform(*self.options.context_scale) * count, 1.0, self.side)
        return target, context, max(1, round(self.options.context * count))

    def indices(self, stream: masking.Stream, target: Shape, context: Shape, kept: int) -> np.ndarray:
        """Of one image: patches of the targets one after the other, then the kept ones of the context."""
        grid = np.arange(self.side**2).reshape(self.side, self.side)
        for _ in range(MOST_TRIES):
            places = [(shape, masking.place(stream, self.side, *shape)) for shape in [target] * self.options.targets + [context]]
            *hidden, seen = [grid[top : top + h, left : left + w].ravel() for (h, w), (top, left) in places]
            free = np.setdiff1d(seen, np.concatenate(hidden))
            if len(free) >= kept:
                return np.concatenate([*hidden, stream.permutation(free)[:kept]])
        raise WorkError(
            f"the targets leave fewer than {kept} of {self.side**2} patches for the context", where="ijepa", hint="lower options.context"
        )

    def followed(self, teacher: str) -> nn.Module:
        """The encoder alone."""
        return self.encoder

    def on_step_end(self) -> None:
        """The target network follows."""
        momentum = self.options.momentum + (1 - self.options.momentum) * self.clock.progress
        ema.follow(self.teachers["target"], self.followed("target"), momentum)


METHODS = {"ijepa": IJEPA}
