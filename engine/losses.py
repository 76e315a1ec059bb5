"""Losses whose mean is over the global batch, whatever the number of processes.

DeepSpeed averages gradients over ranks, so a rank returns W times its part of the global loss: the average is then the global one.
Legend: B samples of this rank, L labels, W ranks.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from engine import ranks


def label_loss(logits_BL: Tensor, target_BL: Tensor, mask_BL: Tensor, exclusive: Sequence[Sequence[int]] = ()) -> Tensor:
    """Mean over the answers that are known in the global batch: binary cross-entropy for a label, cross-entropy for a set of classes.

        loss = (sum_il m_il BCE(s_il, y_il) + sum_ig m_ig CE(s_ig, y_ig)) / (sum_il m_il + sum_ig m_ig)

    l: labels that stand alone, g: sets of labels of which exactly one holds; such a set counts as one answer. A mean per rank would weigh
    a label known on a sparse rank more than the same label on a dense one, and would depend on W.

    Args:
        logits_BL: float scores before the sigmoid or softmax.
        target_BL: 0 to 1; anything finite where the mask is 0.
        mask_BL: 1 where the label is known, else 0; a set is known where all of its labels are.
        exclusive: the sets, as positions of their labels; no label is in two.

    Returns:
        Scalar float32; 0 (with a graph) when nothing of the global batch is known.
    """
    logits_BL, target_BL, mask_BL = logits_BL.float(), target_BL.float(), mask_BL.float()
    grouped = {label for group in exclusive for label in group}
    alone = [label for label in range(logits_BL.shape[1]) if label not in grouped]
    terms_BA = F.binary_cross_entropy_with_logits(logits_BL[:, alone], target_BL[:, alone], reduction="none")
    total, known = (terms_BA * mask_BL[:, alone]).sum(), mask_BL[:, alone].sum()
    for group in map(list, exclusive):
        known_B = mask_BL[:, group].amin(dim=1)
        total = total - ((target_BL[:, group] * logits_BL[:, group].log_softmax(dim=1)).sum(dim=1) * known_B).sum()
        known = known + known_B.sum()
    return total * ranks.world() / ranks.all_sum(known).clamp_min(1.0)


def least_constant(rate_L: Tensor, known_L: Tensor, exclusive: Sequence[Sequence[int]] = ()) -> float:
    """`label_loss` of the best constant answer (nats): what a network scores that has learned nothing but frequencies.

    Args:
        rate_L: share of positives among the samples where a label is known.
        known_L: share of the samples where it is.
    """
    p_L, known_L = rate_L.double().clamp(1e-7, 1 - 1e-7), known_L.double()
    grouped = {label for group in exclusive for label in group}
    alone = [label for label in range(len(p_L)) if label not in grouped]
    p_A = p_L[alone]
    total = -((p_A * p_A.log() + (1 - p_A) * (1 - p_A).log()) * known_L[alone]).sum()
    known = known_L[alone].sum()
    for group in map(list, exclusive):
        total = total - (p_L[group] * p_L[group].log()).sum() * known_L[group].min()
        known = known + known_L[group].min()
    return float(total / known.clamp_min(1e-12))
