"""Which patches of an image are hidden, and the small transformer that predicts them from the others.

Every draw comes from (seed, epoch, sample id), on the CPU: `draw(seed, batch, one)` calls `one(stream)` for each image of the batch. So
masks do not depend on the number of ranks, and a resumed run draws the same. Counts are equal for all images of a step, or exact for each.

Legend: B images, N patches of a square grid, M of them kept, Q of them asked for, d width of the predictor.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from base.errors import RequestError
from base.seeds import rng
from encoders.vit import PATCH, at
from engine.ahead import to_device
from pretrain.methods import Facts

if TYPE_CHECKING:
    from shards.batches import Batch

Stream = np.random.Generator
ASPECT, LEAST_BLOCK = (0.3, 1 / 0.3), 4  # height / width and patches of a block


def draw(seed: int, batch: "Batch", one: Callable[[Stream], np.ndarray]) -> Tensor:
    """What `one` gives for each image of the batch, stacked, on the device of the views."""
    keys = zip(batch.epoch_B.tolist(), batch.index_B.tolist(), strict=True)
    drawn = np.stack([one(rng("mask", seed, epoch, index)) for epoch, index in keys])
    return to_device(torch.from_numpy(drawn), batch.views[0].device)


def check_side(facts: Facts) -> None:
    """Views must be whole patches.

    Raises:
        RequestError: the first view's side is not a multiple of 16 pixels.
    """
    if facts.sizes and facts.sizes[0] % PATCH:
        near = max(PATCH, facts.sizes[0] // PATCH * PATCH)
        raise RequestError(
            f"a side of {facts.sizes[0]} px is not a multiple of the patch, {PATCH} px",
            where="recipe: views.size",
            hint=f"views.size={near}",
        )


def check_heads(name: str, heads: int, width: int) -> None:
    """Raises ValueError for heads that do not divide the width."""
    if width % heads:
        raise ValueError(f"{name} {heads} do not divide the width {width}")


def units(stream: Stream, side: int, unit: int, ratio: float) -> np.ndarray:
    """masked_N bool: squares of unit x unit patches, ceil(ratio * their number) of them. The grid is side x side patches."""
    squares = side // unit
    masked = np.zeros(squares**2, dtype=bool)
    masked[stream.permutation(squares**2)[: math.ceil(ratio * squares**2)]] = True
    return masked.reshape(squares, squares).repeat(unit, axis=0).repeat(unit, axis=1).ravel()


def blocks(stream: Stream, side: int, count: int) -> np.ndarray:
    """masked_N bool: rectangles of at least four patches, one over the other, until exactly `count` patches are masked."""
    masked = np.zeros((side, side), dtype=bool)
    while (left := count - int(masked.sum())) > 0:
        height, width = shape_of(stream.uniform(min(LEAST_BLOCK, left), left), math.exp(stream.uniform(*np.log(ASPECT))), side)
        top, start = place(stream, side, height, width)
        fresh = np.zeros_like(masked)
        fresh[top : top + height, start : start + width] = True
        masked.flat[np.flatnonzero(fresh & ~masked)[:left]] = True
    return masked.ravel()


def shape_of(area: float, aspect: float, side: int) -> tuple[int, int]:
    """Height and width in whole patches of a rectangle with about that area and height / width, not larger than the grid."""
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(height, 1), side), min(max(width, 1), side)


def place(stream: Stream, side: int, height: int, width: int) -> tuple[int, int]:
    """Top and left, uniform over all places where the rectangle fits."""
    return int(stream.integers(side - height + 1)), int(stream.integers(side - width + 1))


class Predictor(nn.Module):
    """A narrow transformer: tokens of the kept patches and mask tokens at the asked ones, each with its fixed sine-cosine position.

    The class token goes in too, without position: that is what trains it. lightly's decoder has the blocks, positions and mask token. A
    transformer does not know the order of its tokens, so kept ones come first here, where the official MAE sorts them back.
    """

    def __init__(self, width: int, side: int, dim: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from lightly.models.modules.masked_vision_transformer_timm import init_weights

        self.embed = nn.Linear(width, dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches=side**2, embed_dim=dim, depth=depth, num_heads=heads)
        self.predict = nn.Linear(dim, out)
        self.embed.apply(init_weights)
        self.predict.apply(init_weights)

    def forward(self, tokens_BTD: Tensor, keep_BM: Tensor, query_BQ: Tensor) -> Tensor:
        """tokens_BTD: class token, then the kept patches -> prediction_BQP."""
        B, Q = query_BQ.shape
        place_BND = self.decoder.pos_embed.expand(B, -1, -1)  # the class token's is zero
        known_BTd = self.embed(tokens_BTD) + torch.cat([place_BND[:, :1], at(place_BND[:, 1:], keep_BM)], dim=1)
        asked_BQd = self.decoder.mask_token + at(place_BND[:, 1:], query_BQ)
        h = self.decoder.decode(torch.cat([known_BTd, asked_BQd.to(known_BTd.dtype)], dim=1))
        prediction_BQP: Tensor = self.predict(h[:, -Q:])
        return prediction_BQP
