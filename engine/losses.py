"""Losses whose mean is over the global batch, whatever the number of processes.

DeepSpeed averages gradients over ranks, so a rank returns W times its part of the global loss: the average is then the global one.
Legend: B samples of this rank, L labels, W ranks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import ranks


def masked_bce(logits_BL: Tensor, target_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Binary cross-entropy over known labels: sum over ranks of mask * BCE, divided by the number of known labels of the global batch.

    A mean per rank would weigh a label known on a sparse rank more than the same label on a dense one, and would depend on W.

    Args:
        logits_BL: float scores before the sigmoid.
        target_BL: 0 or 1; anything finite where the mask is 0.
        mask_BL: 1 where the label is known, else 0.

    Returns:
        Scalar float32; 0 (with a graph) when no label of the global batch is known.
    """
    terms_BL = F.binary_cross_entropy_with_logits(logits_BL.float(), target_BL.float(), reduction="none") * mask_BL.float()
    known = ranks.all_sum(mask_BL.float().sum()).clamp_min(1.0)
    return terms_BL.sum() * ranks.world() / known


def entropy(rate_L: Tensor) -> Tensor:
    """Mean binary entropy (nats) of label rates: the loss of the best constant prediction."""
    p_L = rate_L.double().clamp(1e-7, 1 - 1e-7)
    return -(p_L * p_L.log() + (1 - p_L) * (1 - p_L).log()).mean().to(torch.float32)
