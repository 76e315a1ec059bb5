"""Losses, rates, early stopping and the phases of a cell's training, each by itself and on a few tiny images."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from finetune.data import NOT_JUDGED
from finetune.losses import bce_dice, class_weights, dice, loss_of
from finetune.task import LOSSES, Task, load_task

CHEST, VESSELS = load_task("phantom-chest"), load_task("phantom-vessels")
KINDS = [(kind, loss) for kind, losses in LOSSES.items() for loss in losses]
WEIGHTED = [(kind, loss, weights) for kind, loss in KINDS for weights in (["none"] if kind == "segmentation" else ["none", "balanced"])]


def task_of(kind: str, loss: str | None = None, class_weights: str = "none") -> Task:
    """phantom-chest (its labels taken for classes or grades where the kind says so) or phantom-vessels."""
    base = VESSELS if kind == "segmentation" else CHEST
    return load_task(base.task, {"kind": kind, "loss": loss, "class_weights": class_weights})


def answers(kind: str, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, target and known of n images; the last class is rare."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "segmentation":
        target = (torch.rand(n, 8, 8, generator=draw) > torch.linspace(0.2, 1, n).view(n, 1, 1)).float()
        return torch.randn(n, 8, 8, generator=draw), target, torch.ones(n, 1)
    if kind == "multilabel":
        target = (torch.rand(n, 3, generator=draw) < torch.tensor([0.5, 0.3, 0.1])).float()
    else:
        target = F.one_hot(torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=draw), 3).float()
    return torch.randn(n, 2 if kind == "ordinal" else 3, generator=draw), target, torch.ones(n, 3)


# -- losses


def test_the_loss_of_labels_is_the_mean_over_known_ones() -> None:
    logits, target = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    known = torch.tensor([[1.0, 0, 1]] * 4 + [[0, 0, 0]])
    by_hand = F.binary_cross_entropy_with_logits(logits[known > 0], target[known > 0])
    torch.testing.assert_close(loss_of(CHEST, logits, target, known), by_hand)
    assert loss_of(CHEST, logits, target, torch.zeros(5, 3)) == 0


@pytest.mark.parametrize(("kind", "loss", "weights"), WEIGHTED)
def test_does_not_repeat_a_loss_that_depends_on_which_images_share_a_batch(kind: str, loss: str, weights: str) -> None:
    """Reference 3.7-7: Dice over the flattened batch; torch's weighted cross-entropy, too, divides by the weights of the batch."""
    task = task_of(kind, loss, weights)
    logits, target, known = answers(kind, 12)
    weight = class_weights(task, target.numpy(), known.numpy())
    assert (weight is None) == (weights == "none")
    whole = loss_of(task, logits, target, known, weight)
    for size in (1, 3, 4):
        groups = [slice(start, start + size) for start in range(0, 12, size)]
        parts = torch.stack([loss_of(task, logits[at], target[at], known[at], weight) for at in groups])
        torch.testing.assert_close(parts.mean(), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss_of(task, logits[order], target[order], known[order], weight), whole)


@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_a_loss_is_near_zero_for_the_truth_and_large_for_its_opposite(kind: str, loss: str) -> None:
    task = task_of(kind, loss)
    _, target, known = answers(kind, 12)
    truth = target * 2 - 1
    if kind == "ordinal":
        truth = (target.argmax(1)[:, None] > torch.arange(2)).float() * 2 - 1
    assert loss_of(task, 30 * truth, target, known) < 1e-3
    assert loss_of(task, -30 * truth, target, known) > 0.9


@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_gradients_are_finite_even_where_the_network_is_sure(kind: str, loss: str) -> None:
    task = task_of(kind, loss)
    logits, target, known = answers(kind, 12)
    for scale in (0.0, 1.0, 1e4):
        x = (logits * scale).requires_grad_()
        loss_of(task, x, target, known).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_focal_is_that_of_lin_et_al() -> None:
    logits, target, known = answers("multilabel", 12)
    expected = sigmoid_focal_loss(logits, target, alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(loss_of(task_of("multilabel", "focal"), logits, target, known), expected)
    logits, target, known = answers("multiclass", 12)
    p = (logits.softmax(1) * target).sum(1)
    torch.testing.assert_close(loss_of(task_of("multiclass", "focal"), logits, target, known), (-((1 - p) ** 2) * p.log()).mean())


def test_cumulative_is_that_of_cao_et_al() -> None:
    """Grade 1 of 0..2: it is above threshold 0 and not above threshold 1."""
    logits = torch.tensor([[0.3, -0.7]])
    by_hand = -(torch.tensor(0.3).sigmoid().log() + (1 - torch.tensor(-0.7).sigmoid()).log())
    torch.testing.assert_close(loss_of(task_of("ordinal"), logits, torch.tensor([[0.0, 1, 0]]), torch.ones(1, 3)), by_hand)


def test_masks_lose_what_each_image_loses() -> None:
    logits, target, _ = answers("segmentation", 6)
    p = logits.sigmoid()
    each = torch.stack([1 - (2 * (p[i] * target[i]).sum() + 1) / (p[i].sum() + target[i].sum() + 1) for i in range(6)])
    torch.testing.assert_close(dice(logits, target), each)
    torch.testing.assert_close(loss_of(task_of("segmentation", "dice"), logits, target, torch.ones(6, 1)), each.mean())
    both = each.mean() + F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(loss_of(task_of("segmentation", "bce-dice"), logits, target, torch.ones(6, 1)), both)
    assert dice(torch.full((1, 8, 8), -40.0), torch.zeros(1, 8, 8)) == 0  # an empty mask, found empty


def test_losses_of_masks_leave_out_pixels_that_nobody_judged() -> None:
    logits, target, _ = answers("segmentation", 3)
    outside = target.clone()
    outside[:, :, 5:] = NOT_JUDGED
    torch.testing.assert_close(bce_dice(logits, outside), bce_dice(logits[:, :, :5], target[:, :, :5]))
    assert bce_dice(logits, torch.full_like(target, NOT_JUDGED)).isfinite().all()


# -- class weights


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=40).filter(lambda y: set(y) == {0, 1, 2}))
def test_balanced_weights_of_classes_are_scikit_learns(y: list[int]) -> None:
    target = np.eye(3, dtype=np.float32)[y]
    for kind in ("multiclass", "ordinal"):
        weights = class_weights(task_of(kind, None, "balanced"), target, np.ones_like(target))
        assert weights is not None
        np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=np.array(y)), rtol=1e-6)
        assert (weights[y].mean() - 1).abs() < 1e-5


def test_positive_weights_count_known_answers_only() -> None:
    target = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 0]], np.float32)
    known = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]], np.float32)
    task = task_of("multilabel", None, "balanced")
    weights = class_weights(task, target, known)
    assert weights is not None
    assert weights.tolist() == [2, 1, 1]  # 2 negatives to 1 positive; no negative; no positive
    logits = torch.randn(4, 3)
    of = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(target), pos_weight=weights, reduction="none")
    known_t = torch.from_numpy(known)
    torch.testing.assert_close(loss_of(task, logits, torch.from_numpy(target), known_t, weights), (of * known_t).sum() / 11)


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
def test_a_class_that_no_training_image_has_weighs_nothing(kind: str) -> None:
    task = task_of(kind, None, "balanced")
    target = torch.eye(3)[[0, 0, 0, 1]]
    weights = class_weights(task, target.numpy(), np.ones_like(target))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([4 / 9, 4 / 3, 0.0]))
    logits: Any = torch.randn(1, 2 if kind == "ordinal" else 3)
    assert loss_of(task, logits, torch.eye(3)[[2]], torch.ones(1, 3), weights) == 0
