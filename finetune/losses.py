"""Losses of the tasks, by the name that a task gives. None depends on how images are grouped into batches beyond a mean over them.

    weights = class_weights(task, train.target, train.known)          # None, or float L; of the cell's training images alone
    loss = loss_of(task, logits, target, known, weights)

Legend: B batch, N images, L labels, H W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine import ranks
from finetune.task import Task

GAMMA = 2.0  # of the focal loss: the value that Lin et al. found best


def class_weights(task: Task, target_NL: NDArray[np.float32], known_NL: NDArray[np.float32]) -> Tensor | None:
    """What `class_weights: balanced` gives the classes on these images; None where the task has none.

    Multilabel: weight of a label's positives, negatives / positives among the images where it is known; 1 where one of them is missing.
    Multiclass and ordinal: N / (L n_k), 1 on average over the images; 0 for a class of which there is no image: it cannot be learned, and
    in validation its images count for nothing.
    """
    if task.class_weights == "none":
        return None
    if task.kind == "multilabel":
        positives_L = (target_NL * known_NL).sum(0, dtype=np.float64)
        negatives_L = known_NL.sum(0, dtype=np.float64) - positives_L
        both_L = (positives_L > 0) & (negatives_L > 0)
        weights_L = np.where(both_L, negatives_L / np.where(both_L, positives_L, 1), 1)
    else:
        count_L = target_NL.sum(0, dtype=np.float64)
        weights_L = np.where(count_L > 0, len(target_NL) / (target_NL.shape[1] * np.maximum(count_L, 1)), 0)
    return torch.from_numpy(weights_L.astype(np.float32))


def loss_of(task: Task, logits: Tensor, target: Tensor, known: Tensor, weights: Tensor | None = None) -> Tensor:
    """The task's loss, in float32.

    Args:
        logits: BL, of an ordinal task B,L-1, or BHW for masks.
        target, known: float BL for labels; `target` float BHW for masks (`known` is not read).
        weights: float L, see `class_weights`.
    """
    logits, target, gamma = logits.float(), target.float(), GAMMA if task.loss == "focal" else 0.0
    if task.kind == "segmentation":
        return _OF_MASKS[task.loss](logits, target).mean()
    if task.kind == "multilabel":
        return _over_known(binary(logits, target, weights, gamma), known)
    losses_B = cumulative(logits, target) if task.kind == "ordinal" else exclusive(logits, target, gamma)
    return (losses_B if weights is None else losses_B * weights.to(logits.device)[target.argmax(1)]).mean()


# -- labels


def binary(logits_BL: Tensor, target_BL: Tensor, weights_L: Tensor | None, gamma: float) -> Tensor:
    """Binary cross-entropy of each answer, BL; with gamma > 0 the focal loss of Lin et al. (2017, arXiv 1708.02002, equation 4).

        (1 - p_t)^gamma (-log p_t),   p_t = p where y = 1, 1 - p where y = 0

    A weight multiplies what positives lose. The paper's alpha is such a weight, constant; here `class_weights` gives it or none does.
    """
    positive = None if weights_L is None else weights_L.to(logits_BL.device)
    losses_BL = F.binary_cross_entropy_with_logits(logits_BL, target_BL, pos_weight=positive, reduction="none")
    if not gamma:
        return losses_BL
    p_BL = logits_BL.sigmoid()
    return losses_BL * (p_BL + target_BL - 2 * p_BL * target_BL) ** gamma


def exclusive(logits_BL: Tensor, target_BL: Tensor, gamma: float) -> Tensor:
    """Cross-entropy of each image, B; with gamma > 0 focal: times (1 - p)^gamma for the probability p of its class."""
    losses_B = F.cross_entropy(logits_BL, target_BL.argmax(1), reduction="none")
    return losses_B * (1 - (-losses_B).exp()) ** gamma if gamma else losses_B


def cumulative(logits_BK: Tensor, target_BL: Tensor) -> Tensor:
    """Loss of each image, B, for ordered grades: sum over the K = L - 1 thresholds of the binary cross-entropy of "grade > k" (Cao,
    Mirjalili and Raschka 2020, arXiv 1901.07884, equation 4, importances 1)."""
    grade_B = target_BL.argmax(1)
    above_BK = (grade_B[:, None] > torch.arange(logits_BK.shape[1], device=grade_B.device)).float()
    return F.binary_cross_entropy_with_logits(logits_BK, above_BK, reduction="none").sum(1)


def _over_known(losses_BL: Tensor, known_BL: Tensor) -> Tensor:
    """Mean over the answers that are known in the batch of all ranks (see engine.losses); 0 (with a graph) when none is."""
    known_BL = known_BL.float()
    return (losses_BL * known_BL).sum() * ranks.world() / ranks.all_sum(known_BL.sum()).clamp_min(1.0)


# -- masks: targets above 1 are pixels that nobody judged (outside the field of view), and count for nothing


def bce(logits_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Binary cross-entropy of each image, B: the mean over its judged pixels."""
    judged = (target_BHW <= 1).flatten(1).float()
    losses = F.binary_cross_entropy_with_logits(logits_BHW.flatten(1), target_BHW.flatten(1) * judged, reduction="none")
    return (losses * judged).sum(1) / judged.sum(1).clamp_min(1.0)


def dice(logits_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Soft Dice loss of each image, B (Milletari et al. 2016, arXiv 1606.04797), with 1 added above and below, so that empty masks that are
    found empty lose nothing. Dice over the flattened batch, as often coded, depends on which images share a batch."""
    judged = (target_BHW <= 1).flatten(1).float()
    target = target_BHW.flatten(1) * judged
    p = logits_BHW.sigmoid().flatten(1) * judged
    return 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)


def bce_dice(logits_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """The sum of both, B."""
    return bce(logits_BHW, target_BHW) + dice(logits_BHW, target_BHW)


_OF_MASKS = {"bce": bce, "dice": dice, "bce-dice": bce_dice}
