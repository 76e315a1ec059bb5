"""Losses of the three kinds of tasks. None depends on how images are grouped into batches beyond a mean over them.

Legend: B batch, L labels, H W pixels.
"""

import torch.nn.functional as F
from torch import Tensor

from engine.losses import label_loss
from finetune.task import Task


def bce_dice(logits_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss (Milletari et al. 2016, arXiv 1606.04797), each per image, then the mean over images.

    Targets above 1 are pixels that nobody judged (outside the field of view): they count for nothing.
    Dice over the flattened batch, as often coded, makes the loss depend on which images share a batch.
    """
    judged = (target_BHW <= 1).flatten(1).float()
    t = target_BHW.flatten(1) * judged
    bce_B = (F.binary_cross_entropy_with_logits(logits_BHW.flatten(1), t, reduction="none") * judged).sum(1) / judged.sum(1).clamp(min=1)
    p = logits_BHW.sigmoid().flatten(1) * judged
    dice_B = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return (bce_B + dice_B).mean()


def loss_of(task: Task, logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """The task's loss. `target`, `known`: float BL for labels; `target` float BHW for masks (`known` is not read)."""
    if task.kind == "segmentation":
        return bce_dice(logits, target)
    if task.kind == "multiclass":
        return F.cross_entropy(logits, target.argmax(1))
    return label_loss(logits, target, known)
