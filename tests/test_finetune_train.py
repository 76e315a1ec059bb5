"""Losses, rates, early stopping and the phases of a cell's training, each by itself and on a few tiny images."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cell
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms.functional import ten_crop

from base.errors import RequestError, WorkError
from base.seeds import seed_of
from encoders.build import build
from encoders.volumes import inflate
from encoders.weights import sha256_of
from finetune import data, features
from finetune.auxiliary import attach
from finetune.cell import CellConfig
from finetune.evaluate import over_views
from finetune.heads import PooledHead
from finetune.losses import bce_dice, class_weights, dice, loss_of
from finetune.network import Network
from finetune.optimize import Best, Rate, optimizer_of, set_rates
from finetune.predict import probabilities
from finetune.run import plant
from finetune.task import LOSSES, Kind, Recipe, Task, load_task
from finetune.train import Trainer
from finetune.transplant import Group, Transplant
from shards.card import NOT_JUDGED

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


# -- optimisers, rates, stopping


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"epochs": 10, "batch": 4, "lr": 0.1, "patience": 3, "warmup": 0} | fields)


def trace(rate: Rate, losses: list[float], epoch_steps: int) -> list[float]:
    """The rate of each step of as many epochs as there are losses."""
    found = []
    for epoch, loss in enumerate(losses):
        found += [rate.at(epoch * epoch_steps + step) for step in range(epoch_steps)]
        rate.observe(loss)
    return found


@pytest.mark.parametrize("warmup", [0, 1, 2.5])
def test_the_cosine_is_the_closed_form(warmup: float) -> None:
    found = trace(Rate(recipe(warmup=warmup), 4), [1.0] * 10, 4)
    w = round(warmup * 4)
    rise = [0.1 * (step + 1) / w for step in range(w)]
    fall = [0.05 * (1 + math.cos(math.pi * (step - w) / (39 - w))) for step in range(w, 40)]
    assert found == pytest.approx(rise + fall)
    if not w:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        scheduler, torchs = CosineAnnealingLR(optimizer, T_max=39), []
        for _ in range(40):
            torchs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert found == pytest.approx(torchs, abs=1e-9)


def test_does_not_repeat_a_cosine_that_takes_the_loss_for_the_epoch() -> None:
    """Reference 3.7-1: `lr_scheduler.step(val_loss)` on a schedule over epochs, which then never advances."""
    falling, rising = (trace(Rate(recipe(), 4), losses, 4) for losses in ([0.1] * 10, [float(i) for i in range(10)]))
    assert falling == rising
    assert falling[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(falling))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2) | st.just(math.nan), min_size=1, max_size=30), st.integers(0, 4), st.sampled_from([0.1, 0.5]))
def test_the_plateau_is_torchs(losses: list[float], patience: int, factor: float) -> None:
    given_recipe = recipe(epochs=30, schedule="plateau", plateau={"patience": patience, "factor": factor})
    found = trace(Rate(given_recipe, 2), losses, 2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler, torchs = ReduceLROnPlateau(optimizer, factor=factor, patience=patience), []
    for loss in losses:
        torchs += [optimizer.param_groups[0]["lr"]] * 2
        scheduler.step(loss)
    assert found == torchs


def test_the_plateau_by_hand_and_its_end() -> None:
    """TruncatedTL: 1e-4, halved after 5 epochs without a better loss, ended under 1e-6: seven halvings."""
    rate = Rate(recipe(epochs=100, lr=1e-4, schedule="plateau"), 1)
    rate.observe(1.0)
    for halvings in range(7):
        assert not rate.spent
        for _ in range(6):  # torch's patience: so many bad epochs change nothing, the next does
            assert rate.at(50) == pytest.approx(1e-4 / 2**halvings)
            rate.observe(1.0)
    assert rate.spent
    assert rate.at(50) == pytest.approx(1e-4 / 128)


def test_a_constant_rate_is_constant_after_warm_up() -> None:
    assert trace(Rate(recipe(schedule="constant", warmup=1), 4), [1.0] * 3, 4) == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 9)


def test_the_best_epoch_is_the_first_of_equals_and_nan_never_is() -> None:
    best = Best(patience=2)
    scores = [0.1, math.nan, 0.3, 0.3, 0.2]
    assert [best.observe(epoch, score) for epoch, score in enumerate(scores, 1)] == [True, False, True, False, False]
    assert (best.epoch, best.score) == (3, 0.3)
    assert [best.waited(epoch) for epoch in (3, 4, 5)] == [False, False, True]
    best.begins(5)  # more weights train from epoch 5 on
    assert [best.waited(epoch) for epoch in (5, 6)] == [False, True]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimisers_are_torchs_and_groups_have_their_own_rate_and_decay(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=draw)
    ours, theirs = ([torch.nn.Parameter(start.clone()) for _ in range(3)] for _ in range(2))
    groups = [Group("encoder", [ours[0]], lr_scale=0.1), Group("head", [ours[1]]), Group("head, no decay", [ours[2]], decay=False)]
    optimizer = optimizer_of(recipe(optimizer=name, momentum=0.8, weight_decay=0.3), groups)
    kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    extra = {"momentum": 0.8} if name == "sgd" else {}
    expected = [kind([p], lr=lr, weight_decay=decay, **extra) for p, lr, decay in zip(theirs, (0.02, 0.2, 0.2), (0.3, 0.3, 0), strict=True)]
    for _ in range(3):
        set_rates(optimizer, groups, 0.2)
        gradient = torch.randn(3, 2, generator=draw)
        for parameter in (*ours, *theirs):
            parameter.grad = gradient.clone()
        for each in (optimizer, *expected):
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# -- cells


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_cell.corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def cell(shards: dict[str, str], tmp_path: Path) -> Callable[..., CellConfig]:
    return lambda *args, **fields: tiny_cell.config(shards, tmp_path, *args, **fields)


Make = Callable[..., CellConfig]
TASKS = {
    "multilabel": ("phantom-chest", {}),
    "multiclass": ("phantom-chest", {"kind": "multiclass", **tiny_cell.CLASSES}),
    "ordinal": ("phantom-chest", {"kind": "ordinal", **tiny_cell.CLASSES}),
    "segmentation": ("phantom-vessels", {}),
}
STRATEGIES = ["full", "linear", "linear-aug", "lp-ft", "gradual", "l2-sp", "knn"]


@pytest.mark.parametrize(("kind", "loss"), KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_and_loss_trains_under_every_way_of_training(cell: Make, tmp_path: Path, strategy: str, kind: str, loss: str) -> None:
    if strategy == "knn" and kind == "segmentation":
        return
    task, of_kind = TASKS[kind]
    weights = {} if kind == "segmentation" else {"class_weights": "balanced"}
    config = cell(task, {**of_kind, "loss": loss, **weights, "linear.epochs": 2}, strategy={"name": strategy})
    trainer, selection, rows = tiny_cell.trained(config, tmp_path)
    assert [row["epoch"] for row in rows] == ([0] if strategy == "knn" else list(range(1, selection.epochs + 1)))
    arrays, logits = trainer.arrays("val"), trainer.logits("val")
    of = [torch.from_numpy(x) for x in (logits, arrays.target, arrays.known)]
    chosen = next(row for row in rows if row["epoch"] == selection.epoch)
    assert float(loss_of(config.task, of[0], of[1], of[2], trainer._weights)) == pytest.approx(chosen["val_loss"], rel=1e-5)


def epoch_losses(shards: dict[str, str], folder: Path, changed: dict[str, Any]) -> list[tuple[float, float]]:
    config = tiny_cell.config(shards, folder, settings={"recipe.patience": 9, **changed}, fraction=0.3)
    return [(row["train_loss"], row["val_loss"]) for row in tiny_cell.trained(config, folder)[2]]


@pytest.fixture(scope="module")
def unchanged(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], list[tuple[float, float]]]:
    """The same cell without that option, but with those that it needs to say anything."""
    folder, known = tmp_path_factory.mktemp("unchanged"), dict[str, list[tuple[float, float]]]()

    def of(needed: dict[str, Any]) -> list[tuple[float, float]]:
        if str(needed) not in known:
            known[str(needed)] = epoch_losses(shards, folder, needed)
        return known[str(needed)]

    return of


SGD, PLATEAU = {"recipe.optimizer": "sgd"}, {"recipe.schedule": "plateau", "recipe.epochs": 4, "recipe.lr": 0.3}
OPTIONS: list[tuple[str, Any, dict[str, Any]]] = [  # setting, value, what it needs to say anything
    ("recipe.epochs", 3, {}),
    ("recipe.batch", 8, {}),
    ("recipe.lr", 2e-3, {}),
    ("recipe.weight_decay", 0.5, {}),
    ("recipe.optimizer", "adam", {}),
    ("recipe.optimizer", "sgd", {}),
    ("recipe.momentum", 0.1, SGD),
    ("recipe.schedule", "constant", {}),
    ("recipe.schedule", "plateau", {"recipe.epochs": 3}),
    ("recipe.plateau.patience", 0, PLATEAU),
    ("recipe.plateau.factor", 0.01, {**PLATEAU, "recipe.plateau.patience": 0}),
    ("recipe.warmup", 0, {}),
    ("recipe.views.flip", False, {}),
    ("recipe.views.crop_scale", [0.3, 0.5], {}),
    ("class_weights", "balanced", {}),
    ("loss", "focal", {}),
]


@pytest.mark.parametrize(("setting", "value", "needed"), OPTIONS, ids=[f"{name}={value}" for name, value, _ in OPTIONS])
def test_does_not_repeat_options_that_are_parsed_and_ignored(
    shards: dict[str, str],
    tmp_path: Path,
    unchanged: Callable[[dict[str, Any]], list[tuple[float, float]]],
    setting: str,
    value: object,
    needed: dict[str, Any],
) -> None:
    """Reference 3.7-4: optimizer, schedule and augmentation were options of a script that always did the same."""
    assert epoch_losses(shards, tmp_path, {**needed, setting: value}) != unchanged(needed)


def test_the_same_recipe_gives_the_same_losses(
    shards: dict[str, str], tmp_path: Path, unchanged: Callable[[dict[str, Any]], list[tuple[float, float]]]
) -> None:
    assert epoch_losses(shards, tmp_path, {}) == unchanged({})


@pytest.mark.parametrize(("select", "epochs"), [("metric", 8), ("loss", 6)])
def test_does_not_repeat_a_worse_epoch_that_overwrites_the_best(cell: Make, tmp_path: Path, select: str, epochs: int) -> None:
    """Reference 3.7-5. A rate this high makes later epochs worse; the weights in place are those of the best by what the recipe says."""
    changed = {"recipe.epochs": epochs, "recipe.patience": 8, "recipe.lr": 0.03, "recipe.schedule": "constant", "recipe.select": select}
    trainer, selection, rows = tiny_cell.trained(cell(settings=changed), tmp_path)
    scores = [row["val_auroc_mean"] if select == "metric" else -row["val_loss"] for row in rows]
    assert selection.epochs == epochs
    assert selection.epoch == 1 + int(np.argmax(scores)) < epochs
    assert selection.metric == ("auroc_mean" if select == "metric" else "loss")
    assert selection.value == (max(scores) if select == "metric" else -max(scores))
    again = trainer._validate()
    assert again == {key: rows[selection.epoch - 1][key] for key in again}


@pytest.mark.parametrize("select", ["metric", "loss"])
def test_patience_counts_epochs_without_a_better_one_by_what_selects(cell: Make, tmp_path: Path, select: str) -> None:
    changed = {"recipe.epochs": 30, "recipe.patience": 2, "recipe.lr": 0.03, "recipe.select": select}
    _, selection, rows = tiny_cell.trained(cell(settings=changed), tmp_path)
    assert len(rows) == selection.epochs == selection.epoch + 2 < 30


def test_a_cell_follows_the_plateau_of_its_validation_losses_and_ends_with_it(cell: Make, tmp_path: Path) -> None:
    plateau = {"recipe.plateau": {"patience": 0, "factor": 0.1, "stop_below": 0.03}}
    changed = {"recipe.epochs": 40, "recipe.patience": 40, "recipe.lr": 0.1, "recipe.warmup": 0, "recipe.schedule": "plateau", **plateau}
    _, selection, rows = tiny_cell.trained(cell(settings=changed, fraction=0.3), tmp_path)
    rate = Rate(cell(settings=changed).task.recipe, 1)
    assert [row["lr"] for row in rows] == trace(rate, [row["val_loss"] for row in rows], 1)
    assert selection.epochs < 40
    assert rate.spent


def test_does_not_repeat_a_plateau_that_is_over_before_the_encoder_trains(cell: Make, tmp_path: Path) -> None:
    """The rate is the recipe's again where groups begin, and spent only once all have. It is so low here that no epoch before is better."""
    plateau = {"recipe.plateau": {"patience": 0, "factor": 0.1, "stop_below": 5e-7}, "recipe.schedule": "plateau", "recipe.lr": 1e-6}
    config = cell(settings={"recipe.epochs": 8, "recipe.patience": 40, "recipe.warmup": 0, **plateau}, fraction=0.3)
    _, _, rows = tiny_cell.trained(config, tmp_path, change=starting(0.5))
    assert [row["lr"] for row in rows][:5] == pytest.approx([1e-6, 1e-6, 1e-7, 1e-8, 1e-6])


@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("strategy", ["full", "knn"])
def test_whether_the_loss_selects_depends_on_the_targets_alone(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, label: int
) -> None:
    """Kappa of a truth of one class is 0, or not defined where the decisions are all of that class, too."""
    changed_load(monkeypatch, lambda arrays: arrays.take(np.flatnonzero(arrays.target[:, label])) if arrays.split == "val" else arrays)
    config = cell(settings={"kind": "ordinal", "metric": "kappa_quadratic", **tiny_cell.CLASSES}, strategy={"name": strategy})
    _, selection, rows = tiny_cell.trained(config, tmp_path)
    assert selection.metric == "loss"
    assert selection.value == min(row["val_loss"] for row in rows)


def test_does_not_repeat_random_views_of_validation_images(cell: Make, tmp_path: Path) -> None:
    """Reference 3.7-7: early stopping on augmented validation images is stopping by chance."""
    wild = {"recipe.views": {"crop_scale": [0.2, 0.4], "flip": True, "brightness": 0.5, "contrast": 0.5}}
    for task in ("phantom-chest", "phantom-vessels"):
        trainer, *_ = tiny_cell.trained(cell(task, wild, fraction=0.3), tmp_path)
        tame, *_ = tiny_cell.trained(cell(task, fraction=0.3), tmp_path)
        for split in ("val", "test"):
            np.testing.assert_array_equal(trainer.arrays(split).image, tame.arrays(split).image)
            np.testing.assert_array_equal(trainer.arrays(split).target, tame.arrays(split).target)
            np.testing.assert_array_equal(trainer.logits(split), trainer.logits(split))


def test_does_not_repeat_smoothed_labels_outside_training(cell: Make, tmp_path: Path) -> None:
    """Reference 3.7-8."""
    trainer, *_ = tiny_cell.trained(cell(settings={"uncertain": {"smoothed": [0.6, 0.9]}}), tmp_path)
    train = trainer.arrays("train")
    assert ((train.target > 0.5) & (train.target < 1)).any()
    for split in ("val", "test"):
        assert set(np.unique(trainer.arrays(split).target)) == {0, 1}


# -- ways of training


def starting(share: float) -> Callable[[Transplant], Transplant]:
    """Encoder groups that wait for this share of the epochs."""
    return lambda made: dataclasses.replace(
        made, groups=[dataclasses.replace(group, start=share if group.name.startswith("encoder") else 0.0) for group in made.groups]
    )


def test_a_group_is_frozen_bit_for_bit_until_its_share_of_the_epochs(cell: Make, tmp_path: Path) -> None:
    """Its batch-norm statistics and its weights, which a decay or a momentum would move though no gradient comes."""
    for optimizer in ("adamw", "sgd"):
        states: list[str] = []
        changed = {"recipe.epochs": 4, "recipe.optimizer": optimizer, "recipe.weight_decay": 0.1, "recipe.patience": 1, "recipe.lr": 0.01}
        config = cell(settings=changed, fraction=0.5)
        before = sha256_of(plant(config, 1)[0].module.encoder.state_dict())

        def watched(made: Transplant, states: list[str] = states) -> Transplant:
            made.module.encoder.register_forward_pre_hook(lambda module, _: states.append(sha256_of(module.state_dict())))
            return starting(0.5)(made)

        _, selection, _ = tiny_cell.trained(config, tmp_path, change=watched)
        runs = len(states) // selection.epochs  # of the encoder, in an epoch and its validation
        assert set(states[: 2 * runs + 1]) == {before}
        assert states[-1] != before
        assert selection.epochs >= 3  # patience of one epoch does not end what has not begun


def test_in_the_last_epoch_everything_trains_however_few_there_are(cell: Make, tmp_path: Path) -> None:
    config = cell(settings={"recipe.epochs": 1}, strategy={"name": "gradual"})
    before = plant(config, 1)[0].module.encoder.state_dict()
    trainer, *_ = tiny_cell.trained(config, tmp_path)
    after = trainer.module.encoder.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_the_probe_comes_first_and_its_best_head_is_where_the_rest_starts(cell: Make, tmp_path: Path, task: str) -> None:
    still = {
        "recipe.epochs": 1,
        "recipe.optimizer": "sgd",
        "recipe.lr": 1e-12,
        "linear.epochs": 6,
        "linear.lr": 0.03,
        "linear.select": "loss",
    }
    trainer, _, _ = tiny_cell.trained(cell(task, still, strategy={"name": "lp-ft"}), tmp_path)
    probe = trainer.probe
    assert probe is not None
    rows = tiny_cell.rows(tmp_path / "log" / "probe.jsonl")
    assert probe.value == min(row["val_loss"] for row in rows)
    assert trainer.evaluator._features == {}
    if task == "phantom-chest":  # its head is that of `linear`, and so is all that the probe does
        _, selection, linear = tiny_cell.trained(cell(task, still, strategy={"name": "linear"}), tmp_path)
        assert linear == rows
        assert selection == probe
    moved, *_ = tiny_cell.trained(cell(task, strategy={"name": "lp-ft"}), tmp_path)
    before = plant(cell(task), 1 if task == "phantom-chest" else 3)[0].module.encoder.state_dict()
    after = moved.module.encoder.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_penalty_holds_the_weights_and_is_in_no_reported_loss(cell: Make, tmp_path: Path) -> None:
    distance, losses = [], []
    for alpha in (0.0, 100.0):
        config = cell(settings={"recipe.optimizer": "sgd", "recipe.lr": 0.003}, strategy={"name": "l2-sp", "alpha": alpha, "beta": 0.0})
        before = plant(config, 1)[0].module
        trainer, _, rows = tiny_cell.trained(config, tmp_path)
        pairs = zip(before.encoder.parameters(), trainer.module.encoder.parameters(), strict=True)
        distance.append(sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5)
        losses.append(rows[0]["train_loss"])
        assert trainer.transplant.penalty is not None
        assert 0 < rows[-1]["train_loss"] < 2
    assert distance[1] < 0.7 * distance[0]
    added, *_ = tiny_cell.trained(
        cell(settings={"recipe.epochs": 1}),
        tmp_path,
        change=lambda made: dataclasses.replace(made, penalty=lambda: torch.tensor(1000.0)),
    )
    plain, *_ = tiny_cell.trained(cell(settings={"recipe.epochs": 1}), tmp_path)
    assert sha256_of(added.module.state_dict()) == sha256_of(plain.module.state_dict())  # it has no gradient


def test_a_frozen_encoder_on_augmented_views_is_run_for_each_and_stays_as_it_is(cell: Make, tmp_path: Path) -> None:
    config = cell(strategy={"name": "linear-aug"})
    before = sha256_of(plant(config, 1)[0].module.encoder.state_dict())
    trainer, _, rows = tiny_cell.trained(config, tmp_path)
    assert sha256_of(trainer.module.encoder.state_dict()) == before
    assert set(trainer.evaluator._features) == {"val"}  # nothing is kept of training, whose views never come again
    _, _, flipped = tiny_cell.trained(cell(settings={"recipe.views.flip": False}, strategy={"name": "linear-aug"}), tmp_path)
    assert rows[0]["train_loss"] != flipped[0]["train_loss"]


def test_knn_is_fitted_once_in_epoch_0(cell: Make, tmp_path: Path) -> None:
    reported: list[dict[str, Any]] = []
    config = cell(strategy={"name": "knn", "k": 5}, fraction=0.5)
    trainer, selection, rows = tiny_cell.trained(config, tmp_path, reported.append)
    assert (selection.epoch, selection.epochs) == (0, 0)
    assert [row["epoch"] for row in reported] == [0]
    assert rows[0]["val_auroc_mean"] == selection.value
    assert len(trainer.module.head.z_ND) == len(trainer.arrays("train"))  # type: ignore[arg-type]
    assert trainer.logits("test").shape == trainer.arrays("test").target.shape


@pytest.mark.parametrize("strategy", ["full", "linear"])
@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_bf16_is_for_the_networks_arithmetic_alone(cell: Make, tmp_path: Path, task: str, strategy: str) -> None:
    outputs = []
    gently = {"recipe.lr": 1e-5, "linear.lr": 1e-5}
    for dtype in ("fp32", "bf16"):
        trainer, *_ = tiny_cell.trained(cell(task, gently, dtype=dtype, strategy={"name": strategy}), tmp_path)
        assert {parameter.dtype for parameter in trainer.module.parameters()} == {torch.float32}
        outputs.append(trainer.logits("val"))
        assert outputs[-1].dtype == np.float32
    assert (outputs[0] != outputs[1]).any()
    if trainer.task.kind != "segmentation":  # not rounded to bf16: thresholds would be ties
        assert (torch.from_numpy(outputs[1]).bfloat16().float().numpy() != outputs[1]).any()
    assert np.corrcoef(outputs[0].ravel(), outputs[1].ravel())[0, 1] > 0.8  # standardised features show the rounding of theirs


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "ordinal"])
@pytest.mark.parametrize("strategy", ["full", "linear"])
def test_ten_crop_is_the_mean_of_ten_and_for_the_test_split_alone(cell: Make, tmp_path: Path, strategy: str, kind: str) -> None:
    task, of_kind = TASKS[kind]
    config = cell(task, {**of_kind, "evaluation": "ten-crop"}, strategy={"name": strategy}, **tiny_cell.weights(tmp_path))
    trainer, *_ = tiny_cell.trained(config, tmp_path)
    large = trainer.arrays("test").large
    assert large is not None
    assert trainer.arrays("val").large is None
    crops = ten_crop(torch.from_numpy(np.array(large)), 32)
    with torch.no_grad():
        by_hand = np.stack([probabilities(config.task, trainer.module(crop).numpy()) for crop in crops]).mean(0)
        centre = trainer.module(torch.from_numpy(np.ascontiguousarray(trainer.arrays("val").image))).numpy()
    np.testing.assert_allclose(probabilities(config.task, trainer.logits("test")), by_hand, atol=1e-5)
    np.testing.assert_allclose(trainer.logits("val"), centre, atol=1e-5)


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "ordinal"])
def test_views_are_averaged_after_sigmoid_or_softmax(kind: Kind) -> None:
    """As in the transfer benchmark; the mean of logits is another number."""
    views, task = torch.stack([3 * answers(kind, 50, seed)[0] for seed in range(10)]), task_of(kind)
    if kind == "ordinal":
        views = views.sort(2, descending=True).values
    by_hand = np.stack([probabilities(task, view.numpy()) for view in views]).mean(0)
    np.testing.assert_allclose(probabilities(task, over_views(kind, views).numpy()), by_hand, atol=1e-6)
    assert np.abs(probabilities(task, views.mean(0).numpy()) - by_hand).max() > 0.1


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "ordinal"])
def test_logits_over_views_are_finite_however_sure_a_view_is_and_not_where_it_is_no_number(kind: Kind) -> None:
    views = torch.tensor([[[300.0, 90.0, -300.0]], [[2e4, 100.0, -2e4]]])
    found = over_views(kind, views)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    if kind != "multiclass":  # of two views nearly as sure of yes, or of no, the less sure one's doubt remains, halved
        torch.testing.assert_close(found, torch.tensor([[300.0, 90.0, -300.0]]) + math.log(2) * torch.tensor([[1.0, 1.0, -1.0]]))
    assert torch.equal(over_views(kind, views[:1]), views[0])
    for wrong in (math.inf, -math.inf, math.nan):
        spoilt = views.clone()
        spoilt[0, 0, 1] = wrong
        assert not over_views(kind, spoilt)[0, 1].isfinite()


# -- Inception's auxiliary classifier


@pytest.mark.parametrize(("size", "kernel"), [(96, 1), (224, 3), (299, 5)])
def test_the_auxiliary_classifier_is_timms_at_299_px(size: int, kernel: int) -> None:
    from timm.models.inception_v3 import InceptionAux

    encoder = build("inception_v3", 1)
    auxiliary = attach(Network(encoder, PooledHead(2048, 3), pyramid=False), task_of("multilabel"), size, seed=0)
    assert auxiliary is not None
    assert auxiliary.layers.conv1.conv.kernel_size == (kernel, kernel)
    if kernel == 5:
        theirs = InceptionAux(768, 3)
        theirs.load_state_dict(auxiliary.layers.state_dict())
        h = torch.randn(2, 768, 17, 17)
        auxiliary._seen[:] = [h]
        torch.testing.assert_close(auxiliary(), theirs(h))


def test_the_auxiliary_loss_trains_both_and_is_absent_in_evaluation(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_load(monkeypatch, lambda arrays: arrays.take(np.arange(6)))
    config = cell(architecture="inception_v3", resolution=75, settings={"recipe.epochs": 1, "recipe.batch": 3, "recipe.select": "loss"})
    trainer, *_ = tiny_cell.trained(config, tmp_path)
    module, beside = trainer.module, trainer._auxiliary
    assert beside is not None
    assert beside._seen == []  # evaluation leaves nothing there
    fresh = attach(module, config.task, 75, seed_of("auxiliary", 0))
    assert fresh is not None
    assert not any(torch.equal(a, b) for a, b in zip(beside.parameters(), fresh.parameters(), strict=True))
    module.train().zero_grad()
    module(torch.randint(0, 256, (2, 1, 75, 75), dtype=torch.uint8))
    beside().sum().backward()
    stem = module.encoder.net.get_submodule("Conv2d_1a_3x3.conv").weight.grad
    assert isinstance(stem, torch.Tensor)
    assert stem.abs().sum() > 0
    assert not any("layers.conv0" in name for name in module.state_dict())
    module.encoder.requires_grad_(False)
    assert attach(module, config.task, 75, 0) is None


def test_volumes_have_no_auxiliary_classifier() -> None:
    task = task_of("multilabel").model_copy(update={"volume": True})
    assert attach(Network(inflate(build("inception_v3", 1)), PooledHead(2048, 3), pyramid=False), task, 75, 0) is None


def test_does_not_repeat_an_auxiliary_classifier_whose_gradients_each_worker_keeps(cell: Make) -> None:
    """What DeepSpeed averages over workers are the parameters of its module."""
    config = cell(architecture="inception_v3", resolution=75)
    trainer = Trainer(config, plant(config, 1)[0])
    beside = trainer._auxiliary = attach(trainer.module, config.task, 75, 0)
    assert beside is not None
    groups = [*trainer.transplant.groups, Group("auxiliary", list(beside.parameters()))]
    trainer._together(optimizer_of(config.task.recipe, groups), 8, 4)
    averaged: Any = trainer.evaluator.network.__self__.module  # type: ignore[attr-defined]
    assert {id(p) for p in averaged.parameters()} == {id(p) for p in (*trainer.module.parameters(), *beside.parameters())}
    image = torch.randint(0, 256, (2, 1, 75, 75), dtype=torch.uint8)
    trainer.module.eval()
    torch.testing.assert_close(trainer.evaluator.network(image), trainer.module(image))


@pytest.mark.parametrize(("strategy", "beside"), [({"name": "lwft", "cut": "Mixed_6e"}, False), ({"name": "gradual", "stages": 2}, True)])
def test_an_auxiliary_classifier_of_a_frozen_block_adds_no_loss(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any], beside: bool
) -> None:
    """What is frozen for good has none; of what waits it begins with the block."""
    changed_load(monkeypatch, lambda arrays: arrays.take(np.arange(4)))
    settings = {"recipe.epochs": 2, "recipe.batch": 4, "recipe.select": "loss"}
    trainer, selection, _ = tiny_cell.trained(
        cell(architecture="inception_v3", resolution=75, settings=settings, strategy=strategy), tmp_path
    )
    assert selection.epochs == 2
    assert (trainer._auxiliary is not None) == beside


# -- features of a frozen encoder


def kept_folders(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "features").glob("*") if path.is_dir()}


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_features_are_computed_once_and_read_by_all_cells(cell: Make, tmp_path: Path, task: str) -> None:
    """Seeds, fractions, kNN, the probe and other heads read what the first cell wrote; numbers are those of a cell that found nothing."""
    source = tiny_cell.weights(tmp_path, 1 if task == "phantom-chest" else 3)
    cold, *_ = tiny_cell.trained(cell(task, strategy={"name": "linear"}, seed=1, **source, fraction=0.6), tmp_path)
    expected = cold.logits("test")
    first = kept_folders(tmp_path)
    assert len(first) == 3  # train, val, test
    runs: list[int] = []
    for fields in ({"seed": 1, "fraction": 0.6}, {"seed": 2}, {"settings": {"linear.lr": 0.1}}, {"strategy": {"name": "knn"}}):
        if task == "phantom-vessels" and "strategy" in fields:
            continue
        asked: dict[str, Any] = {"strategy": {"name": "linear"}, **fields}
        config = cell(task, **asked, **source)

        def counted(transplant: Transplant) -> Transplant:
            transplant.module.encoder.net.register_forward_hook(lambda *_: runs.append(1))
            return transplant

        trainer, *_ = tiny_cell.trained(config, tmp_path, change=counted)
        if "fraction" in fields:
            np.testing.assert_array_equal(trainer.logits("test"), expected)
    assert runs == []
    if task == "phantom-chest":
        tiny_cell.trained(cell(task, strategy={"name": "lp-ft"}, **source), tmp_path)
    assert kept_folders(tmp_path) == first


def test_what_decides_features_names_them(cell: Make, tmp_path: Path) -> None:
    source = tiny_cell.weights(tmp_path)
    linear = {"strategy": {"name": "linear"}, **source}
    names = []
    asked: list[dict[str, Any]] = [{}, {"resolution": 24}, {"settings": {"evaluation": "center-crop"}}, {"dtype": "bf16"}, {"threads": 2}]
    for fields in [*asked, {"fraction": 0.05}]:
        trainer = Trainer(cell(**fields, **linear), plant(cell(**fields, **linear), 1)[0])
        trainer.evaluator.keep("val")
        names.append(kept_folders(tmp_path))
    assert [len(found) for found in names] == [1, 2, 3, 4, 5, 5]  # of a fraction validation is the same
    trainer.evaluator.keep("train")  # under a tenth: those images alone
    (added,) = kept_folders(tmp_path) - names[-1]
    assert np.load(tmp_path / "cache" / "features" / added / "0.npy", mmap_mode="r").shape[0] == len(trainer.arrays("train"))
    random = cell(strategy={"name": "linear"})
    trainer = Trainer(random, plant(random, 1)[0])
    trainer.evaluator.keep("train")  # of random weights, which no other cell has: in memory
    assert trainer.evaluator._features["train"] is not None
    assert kept_folders(tmp_path) - names[-1] == {added}


def test_features_of_other_canvases_are_others(cell: Make, tmp_path: Path) -> None:
    """A linear head pads a vision transformer's images to 16, a decoder to 32: at 48 px the maps are 3 x 3 and 4 x 4."""
    shapes, source = set(), tiny_cell.weights(tmp_path, 3, "test_vit", 48)
    for strategy in ("linear", "lp-ft"):
        config = cell("phantom-vessels", strategy={"name": strategy}, resolution=48, **source)
        trainer = Trainer(config, plant(config, 3)[0])
        trainer.evaluator.keep("val")
        shapes.add(trainer.evaluator.maps("val", np.arange(1))[0].shape[-1])
    assert shapes == {3, 4}


def test_volumes_are_evaluated_fewer_at_a_time(cell: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_load(monkeypatch, lambda arrays: dataclasses.replace(arrays, slices=24))
    config = cell(resolution=224)
    assert Trainer(config, plant(config, 1)[0]).evaluator.chunk == 64 // 24


def test_a_frozen_cell_holds_one_copy_of_what_is_large(cell: Make, tmp_path: Path) -> None:
    """Features are mapped, and of the images it trains on it holds none."""
    trainer, *_ = tiny_cell.trained(cell(strategy={"name": "linear"}, fraction=0.5, **tiny_cell.weights(tmp_path)), tmp_path)
    assert trainer.arrays("train").image.nbytes == 0
    kept = trainer.evaluator._features["train"]
    assert kept is not None
    assert len(kept.maps[0]) > len(kept.rows) == len(trainer.arrays("train"))
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert any(f"{kept.maps[0].data_ptr() - 128 & ~4095:x}-" in line and "/features/" in line for line in lines)


def test_features_that_are_too_large_are_computed_again(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"strategy": {"name": "linear"}, **tiny_cell.weights(tmp_path)}
    expected, *_ = tiny_cell.trained(cell(**source), tmp_path)
    monkeypatch.setattr(features, "LIMIT_BYTES", 0)
    (tmp_path / "cache" / "features").rename(tmp_path / "gone")
    trainer, *_ = tiny_cell.trained(cell(**source), tmp_path)
    assert kept_folders(tmp_path) == set()
    np.testing.assert_allclose(trainer.logits("test"), expected.logits("test"), atol=1e-4)


# -- bad input


def changed_load(monkeypatch: pytest.MonkeyPatch, change: Callable[[data.Arrays], data.Arrays]) -> None:
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: change(load(*args)))


@pytest.mark.parametrize("kind", ["multiclass", "ordinal"])
@pytest.mark.parametrize("strategy", ["full", "linear", "knn"])
def test_a_class_absent_from_training_is_trained_without(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, strategy: str
) -> None:
    """It weighs nothing, is predicted badly, and its images are measured."""
    changed_load(monkeypatch, lambda arrays: arrays.take(np.flatnonzero(arrays.target[:, 2] == 0)) if arrays.split == "train" else arrays)
    config = cell(settings={**TASKS[kind][1], "class_weights": "balanced"}, strategy={"name": strategy})
    trainer, selection, _ = tiny_cell.trained(config, tmp_path)
    assert trainer._weights is not None
    assert trainer._weights[2] == 0
    assert selection.value is not None
    assert np.isfinite(trainer.logits("test")).all()


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_constant_images_train_to_something_finite(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, strategy: str
) -> None:
    if (task, strategy) == ("phantom-vessels", "knn"):
        return
    changed_load(monkeypatch, lambda arrays: dataclasses.replace(arrays, image=np.full_like(arrays.image, 7)))
    trainer, selection, _ = tiny_cell.trained(cell(task, strategy={"name": strategy}), tmp_path)
    logits = trainer.logits("test")
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-4)
    if task == "phantom-chest":
        assert selection.value == 0.5


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "ordinal"])  # masks are bytes
@pytest.mark.parametrize("split", ["train", "val"])
def test_targets_that_are_no_numbers_are_refused(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, split: str
) -> None:
    """One label of one image, as it lies in the shards: where labels exclude each other that image was left out without a word."""
    decoded = data._decoded

    def spoilt(url: str, digest: str, of: str, *args: Any) -> Any:
        found = decoded(url, digest, of, *args)
        if of != split:
            return found
        first: dict[str, Any] = {**dict.fromkeys(found.raw[0], 0), "count": math.nan}
        return found._replace(raw=[first, *found.raw[1:]])

    monkeypatch.setattr(data, "_decoded", spoilt)
    with pytest.raises(WorkError, match=f"targets of split {split} that are not finite"):
        tiny_cell.trained(cell(*TASKS[kind]), tmp_path)


@pytest.mark.parametrize("strategy", ["full", "lp-ft", "linear-aug"])
def test_one_image_left_over_joins_the_batch_before(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Batch norm needs two values: at 32 px test_resnet's last map has one position."""
    changed_load(monkeypatch, lambda arrays: arrays.take(np.arange(min(33, len(arrays)))) if arrays.split == "train" else arrays)
    for task in ("phantom-chest", "phantom-vessels"):
        settings = {"recipe.batch": 8, "linear.batch": 8}
        if task == "phantom-vessels":
            settings = {"recipe.batch": 19, "linear.batch": 19}
        trainer, *_ = tiny_cell.trained(cell(task, settings, strategy={"name": strategy}), tmp_path)
        assert len(trainer.arrays("train")) % settings["recipe.batch"] == 1


def test_less_than_two_training_images_are_refused(cell: Make, tmp_path: Path) -> None:
    for strategy in ("full", "linear", "knn"):
        with pytest.raises(RequestError, match="1 training image is too few"):
            tiny_cell.trained(cell(strategy={"name": strategy}, fraction=0.001), tmp_path)


@pytest.mark.parametrize(("architecture", "least"), [("cbr_larget_valid", 217), ("inception_v3", 75)])
def test_images_under_the_networks_least_size_are_found_before_anything_is_read(
    cell: Make, monkeypatch: pytest.MonkeyPatch, architecture: str, least: int
) -> None:
    monkeypatch.setattr(data, "load", None)
    config = cell(architecture=architecture)
    with pytest.raises(RequestError, match=f"takes images of at least {least} px, not of 32"):
        Trainer(config, plant(config, 1)[0])
