"""Masked images: hide patches, predict their pixels. MAE (He et al. 2021, arXiv 2111.06377) and SimMIM (Xie et al. 2021, arXiv 2111.09886).

MAE, sections 3 and 4: the encoder computes a random quarter of the patches only; a narrow decoder gets those and mask tokens at the other
places. Over the masked patches n of an image, x the normalised pixels of a patch, mean and variance its own:

    loss = mean_n mean_p ( prediction_np - (x_np - mean_n) / sqrt(var_n + 1e-6) )^2

Official: AdamW with betas 0.9 and 0.95, lr 1.5e-4 * batch / 256 at batch 4096, weight decay 0.05, 40 epochs of warm-up, cosine, 800 (1600)
epochs, 75 % masked, crops of 20 to 100 % and flips and no more, decoder of 8 blocks of width 512 with 16 heads.

SimMIM, section 3: the encoder gets a learned token in place of masked patches; one linear layer predicts raw (normalised) pixels:

    loss = mean over the masked pixels of | prediction - x |

Official for ViT-B: 60 % masked in squares of 32 px, AdamW with lr 1e-4 * batch / 512 at batch 2048, a tenth of it from epoch 700 of 800 on,
10 epochs of warm-up, weight decay 0.05, clip 5, crops of 67 to 100 % and flips.

Parts: lightly's MaskedVisionTransformerDecoderTIMM (MAEDecoderTIMM is deprecated), patchify and normalize_mean_var.
Deviations: timm's ViT learns its positions, where MAE's are fixed sines and SimMIM's are relative biases; its initialisation is kept, for
weights may come from elsewhere. MAE's decoder sees kept tokens first. No drop path (SimMIM: 0.1).
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import Strict
from base.errors import RequestError
from encoders import vit
from pretrain import masking
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class MAEOptions(Strict):
    """`normalise_pixels`: predict each patch's pixels relative to the patch's own mean and deviation."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    normalise_pixels: bool = True
    decoder_dim: int = Field(default=512, gt=0, multiple_of=4)
    decoder_depth: int = Field(default=8, ge=1)
    decoder_heads: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "MAEOptions":
        masking.check_heads("decoder_heads", self.decoder_heads, self.decoder_dim)
        return self


class MAE(Method):
    """See the module's header. Legend: M kept patches, Q masked ones, P pixels of a patch."""

    views = ("one",)
    only = "vit"
    Options = MAEOptions

    def __init__(self, encoder: nn.Module, options: MAEOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        whole: Any = encoder
        self.side = whole.image_size // vit.PATCH
        self.kept = max(1, int(self.side**2 * (1 - options.mask_ratio)))
        pixels = vit.PATCH**2 * whole.in_chans
        self.decoder = masking.Predictor(
            self.width, self.side, options.decoder_dim, options.decoder_depth, options.decoder_heads, out=pixels
        )

    @classmethod
    def check(cls, options: MAEOptions, facts: Facts) -> None:
        """Some patches must be hidden and some not."""
        masking.check_side(facts)
        if facts.sizes and facts.sizes[0] < 2 * vit.PATCH:
            why = f"a view of {facts.sizes[0]} px is one patch: none is left to paint"
            raise RequestError(why, where="recipe: views.size", hint=f"views.size={2 * vit.PATCH}")

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW."""
        from lightly.models.utils import normalize_mean_var

        x = batch.views[0]
        order_BN = masking.draw(self.facts.seed, batch, lambda stream: stream.permutation(self.side**2))
        keep_BM, masked_BQ = order_BN[:, : self.kept], order_BN[:, self.kept :]
        tokens_BTD = self.encode(x, partial(vit.tokens, self.encoder), keep_BM)
        prediction_BQP = self.decoder(tokens_BTD, keep_BM, masked_BQ)
        with torch.autocast(x.device.type, enabled=False):
            target_BQP = vit.at(vit.patches(self.encoder, x), masked_BQ)
            if self.options.normalise_pixels:
                target_BQP = normalize_mean_var(target_BQP)
            loss = F.mse_loss(prediction_BQP.float(), target_BQP)
        return Output(loss, {"backbone": tokens_BTD[:, 0].detach().float()}, {})

    def chance_loss(self, global_batch: int) -> float | None:
        """The variance of a normalised patch, for who predicts its mean and no more; less where patches have no contrast at all."""
        return 1.0 if self.options.normalise_pixels else None


class SimMIMOptions(Strict):
    """`mask_side`: of the squares that are masked, pixels."""

    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    mask_side: int = Field(default=32, gt=0, multiple_of=vit.PATCH)


class SimMIM(Method):
    """See the module's header."""

    views = ("one",)
    only = "vit"
    Options = SimMIMOptions

    def __init__(self, encoder: nn.Module, options: SimMIMOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        whole: Any = encoder
        self.side = whole.image_size // vit.PATCH
        self.mask_token_D = nn.Parameter(torch.empty(self.width))
        nn.init.trunc_normal_(self.mask_token_D, std=0.02)
        self.head = nn.Linear(self.width, vit.PATCH**2 * whole.in_chans)

    @classmethod
    def check(cls, options: SimMIMOptions, facts: Facts) -> None:
        """The masked squares must tile the view, so that every image has equally many masked pixels."""
        masking.check_side(facts)
        if facts.sizes and facts.sizes[0] % options.mask_side:
            raise RequestError(
                f"squares of {options.mask_side} px do not tile a view of {facts.sizes[0]} px",
                where="recipe: options.mask_side",
                hint=f"options.mask_side={vit.PATCH}",
            )

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW."""
        x, unit, ratio = batch.views[0], self.options.mask_side // vit.PATCH, self.options.mask_ratio
        masked_BN = masking.draw(self.facts.seed, batch, lambda stream: masking.units(stream, self.side, unit, ratio))
        tokens_BTD = self.encode(x, self._masked_tokens, masked_BN)
        prediction_RP = self.head(tokens_BTD[:, 1:][masked_BN])
        with torch.autocast(x.device.type, enabled=False):
            loss = F.l1_loss(prediction_RP.float(), vit.patches(self.encoder, x)[masked_BN])
        return Output(loss, {"backbone": tokens_BTD[:, 0].detach().float()}, {})

    def _masked_tokens(self, x: Tensor, masked_BN: Tensor) -> Tensor:
        return vit.tokens(self.encoder, x, masked_BN=masked_BN, mask_token_D=self.mask_token_D)


METHODS = {"mae": MAE, "simmim": SimMIM}
