"""Scales phantoms: three labels, each at its scale and nowhere below it."""

from functools import cache

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from shards.card import load_card
from shards.phantom_scales import APART, BOARD, CELLS, DOT, JITTER, MARK, MISREAD, PAIRS, STEP, plan, scales
from shards.phantoms import GENERATORS, LABELS

SIZE, COUNT = 64, 600
BEST = 1 - MISREAD  # the area under the curve of who reads every image rightly: a share of the positives, and one of the negatives, lies


@cache
def series() -> tuple[np.ndarray, np.ndarray]:
    """Images N,64,64 u8 and targets N,3."""
    made = [GENERATORS["scales"](11, index, SIZE) for index in range(COUNT)]
    return np.stack([phantom.image for phantom in made]), np.array([[phantom.labels[label] for label in LABELS] for phantom in made])


def held_out_auroc(features: np.ndarray, target: np.ndarray) -> float:
    train = COUNT // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, tol=1e-3)).fit(features[:train], target[:train])
    return float(roc_auc_score(target[train:], model.decision_function(features[train:])))


def test_the_card_names_what_the_generator_makes() -> None:
    card = load_card("phantom-scales")
    assert card.phantom is not None
    assert (card.phantom.generator, tuple(card.labels)) == ("scales", LABELS)


def test_labels_are_balanced_and_independent() -> None:
    _, target = series()
    assert (np.abs(target.mean(0) - 0.5) < 0.06).all()
    assert np.abs(np.corrcoef(target.T) - np.eye(3)).max() < 0.12


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_what_an_image_shows_has_the_same_parts_whatever_its_labels(many: bool, columns: bool) -> None:
    """As many dots of both signs, at the same distances; every mark as often bright as dark. Only who is whose neighbour differs."""
    draw = np.random.default_rng(3)
    bright = np.zeros((BOARD, BOARD))
    for _ in range(200):
        dots, marks = plan(draw, many, columns)
        assert sorted(dots[:, 2]) == [-1] * PAIRS + [1] * PAIRS
        pairs = dots.reshape(PAIRS, 2, 3)
        apart = np.linalg.norm(pairs[:, 0, :2] - pairs[:, 1, :2], axis=1)
        np.testing.assert_allclose(apart, APART)
        alike = int((pairs[:, 0, 2] == pairs[:, 1, 2]).sum())
        assert alike in ((4, 6) if many else (0, 2))
        between = np.linalg.norm(dots[:, None, :2] - dots[None, :, :2], axis=2) + 9 * np.kron(np.eye(PAIRS), np.ones((2, 2)))
        assert between.min() > APART  # nobody's neighbour is nearer than its own
        assert len(marks) == BOARD**2
        signs = marks[:, 2].reshape(BOARD, BOARD)  # rows, columns
        same, turning = (signs, signs.T) if columns else (signs.T, signs)
        assert (same == same[0]).all()
        assert (turning[1:] == -turning[:-1]).all()
        places = marks[:, :2].reshape(BOARD, BOARD, 2)
        assert np.linalg.norm(np.diff(places, axis=0), axis=2).min() > STEP - 3 * JITTER > 1.8 * APART
        bright += signs == 1
    np.testing.assert_allclose(bright / 200, 0.5, atol=0.1)


@pytest.mark.parametrize("label", range(3))
def test_no_label_shows_in_the_grey_values(label: int) -> None:
    images, target = series()
    levels = np.sort(images.reshape(COUNT, -1), axis=1)[:, :: SIZE * SIZE // 16].astype(float)
    assert 0.42 < held_out_auroc(levels, target[:, label]) < 0.58


def patches_of(side: int) -> np.ndarray:
    """Per image, over all patches of that side: mean and spread of their means, of their contrasts, of their steps along both axes."""
    cut = series()[0].astype(np.float32)
    step = max(1, side // 2)
    windows = np.lib.stride_tricks.sliding_window_view(cut, (side, side), axis=(1, 2))[:, ::step, ::step]
    flat = windows.reshape(COUNT, -1, side, side)
    parts = [flat.mean((2, 3)), flat.std((2, 3)), np.abs(np.diff(flat, axis=2)).mean((2, 3)), np.abs(np.diff(flat, axis=3)).mean((2, 3))]
    bands = [np.quantile(part, [0.02, 0.1, 0.5, 0.9, 0.98], axis=1).T for part in parts]
    return np.concatenate([*bands, *(part.mean(1)[:, None] for part in parts), *(part.std(1)[:, None] for part in parts)], axis=1)


def test_texture_shows_in_patches_of_eight_pixels_and_the_others_do_not() -> None:
    _, target = series()
    found = [held_out_auroc(patches_of(8), target[:, label]) for label in range(3)]
    assert found[0] > BEST - 0.04
    assert max(found[1:]) < 0.58


def test_count_does_not_show_in_a_patch_that_holds_half_a_pair() -> None:
    """Nor does the board: its neighbours are three patches apart."""
    _, target = series()
    assert max(held_out_auroc(patches_of(int(APART * SIZE * 2 / 3)), target[:, label]) for label in (1, 2)) < 0.58


def test_count_is_the_sum_over_pairs_of_what_their_dots_have_in_common() -> None:
    """Read by who knows the places: neither dot of a pair says anything, their product does."""
    images, target = series()
    grey = images.astype(np.float32)
    dots = np.stack([cv2.GaussianBlur(image, (0, 0), DOT * SIZE) - cv2.GaussianBlur(image, (0, 0), 4 * DOT * SIZE) for image in grey])
    centre, half = ((np.arange(CELLS) + 0.5) * SIZE / CELLS).astype(int), round(APART * SIZE / 2)
    places = [(i, j) for i in range(CELLS) for j in range(CELLS) if not {i, j} <= {0, CELLS - 1}]
    together, alone = np.zeros(COUNT), np.zeros(COUNT)
    for i, j in places:
        for dy, dx in ((0, half), (half, 0)):
            one = dots[:, centre[i] - dy, centre[j] - dx]
            other = dots[:, centre[i] + dy, centre[j] + dx]
            together += one * other
            alone += np.abs(one) + np.abs(other)
    assert roc_auc_score(target[:, 1], together) > BEST - 0.1
    assert 0.42 < roc_auc_score(target[:, 1], alone) < 0.58


def test_arrangement_is_in_neighbouring_marks_together_and_in_none_alone() -> None:
    images, target = series()
    places = np.round((0.5 + STEP * (np.arange(BOARD) - 1)) * SIZE).astype(int)
    blurred = np.stack([cv2.GaussianBlur(image.astype(np.float32), (0, 0), MARK * SIZE) for image in images])
    marks = blurred[:, places][:, :, places].reshape(COUNT, -1)
    assert held_out_auroc(marks, target[:, 2]) < 0.58
    together = PolynomialFeatures(2, interaction_only=True, include_bias=False).fit_transform(StandardScaler().fit_transform(marks))
    assert held_out_auroc(together, target[:, 2]) > BEST - 0.04
    assert max(held_out_auroc(together, target[:, label]) for label in (0, 1)) < 0.58


def test_same_arguments_same_pixels_and_another_index_another_image() -> None:
    one, again, other = scales(3, 5, 48), scales(3, 5, 48), scales(3, 6, 48)
    assert one.image.dtype == np.uint8
    assert one.image.shape == (48, 48)
    assert (one.image == again.image).all()
    assert one.labels == again.labels
    assert (one.image != other.image).mean() > 0.5
