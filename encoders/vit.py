"""What masked pretraining needs of a vision transformer in an Encoder: the forward of some patches, or with some masked; patches of pixels.

    all_BTD = tokens(encoder, x)                                          # encoder.features(x)
    few_BTD = tokens(encoder, x, keep_BM)                                 # those patches only: T = 1 + M
    all_BTD = tokens(encoder, x, masked_BN=masked, mask_token_D=token)    # a learned token in place of masked patches
    pixels_BNP = patches(encoder, x)                                      # what there is to predict

Positions are added before patches are dropped and after they are masked, so a token always knows where it is. Mask tokens belong to the
method: the encoder's state dict stays timm's. lightly's MaskedVisionTransformerTIMM is not used: it initialises the network again, which
would throw the weights of `start_from` away, and owns a mask token.

Legend: B images, C channels, N patches (row by row), M of them, T tokens (class token first), D features, P = 16 * 16 * C pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

PATCH = 16  # pixels; of every family in encoders.cuts


def tokens(
    encoder: nn.Module, x: Tensor, keep_BM: Tensor | None = None, *, masked_BN: Tensor | None = None, mask_token_D: Tensor | None = None
) -> Tensor:
    """x: u8 or float BCHW -> tokens_BTD after the last norm.

    Args:
        keep_BM: int64, the patches that are computed; all unless given.
        masked_BN: bool, the patches whose embedding is mask_token_D.
    """
    from timm.models import checkpoint_seq

    whole: Any = encoder
    net = whole.net
    h = net.patch_embed(whole.normalise(x))  # B,rows,columns,D
    if masked_BN is not None and mask_token_D is not None:
        h = torch.where(masked_BN.view(*h.shape[:3], 1), mask_token_D.to(h.dtype), h)
    h = net._pos_embed(h)  # interpolated where the side is not the one that positions are for
    if keep_BM is not None:
        h = torch.cat([h[:, :1], at(h[:, 1:], keep_BM)], dim=1)
    h = net.norm_pre(h)
    out: Tensor = net.norm(checkpoint_seq(net.blocks, h) if net.grad_checkpointing else net.blocks(h))
    return out


def patches(encoder: nn.Module, x: Tensor) -> Tensor:
    """x: u8 or float BCHW -> pixels_BNP float32 as the encoder's first layer gets them, normalised."""
    from lightly.models.utils import patchify

    whole: Any = encoder
    pixels_BNP: Tensor = patchify(whole.normalise(x), PATCH)
    return pixels_BNP


def at(values_BND: Tensor, index_BM: Tensor) -> Tensor:
    """values_BMD: of each image those at its indices."""
    return values_BND.gather(1, index_BM[:, :, None].expand(-1, -1, values_BND.shape[2]))
