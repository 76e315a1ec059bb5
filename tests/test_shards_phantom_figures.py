"""Figures phantoms: three labels, each at its depth and nowhere before."""

from functools import cache

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shards.card import load_card
from shards.phantoms import GENERATORS, LABELS

SIZE, COUNT = 64, 700


@cache
def series() -> tuple[np.ndarray, np.ndarray]:
    """Images N,64,64 u8 and targets N,3."""
    made = [GENERATORS["figures"](11, index, SIZE) for index in range(COUNT)]
    return np.stack([phantom.image for phantom in made]), np.array([[phantom.labels[label] for label in LABELS] for phantom in made])


def held_out_auroc(features: np.ndarray, target: np.ndarray) -> float:
    train = COUNT // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, tol=1e-3)).fit(features[:train], target[:train])
    return float(roc_auc_score(target[train:], model.decision_function(features[train:])))


def test_the_card_names_what_the_generator_makes() -> None:
    card = load_card("phantom-figures")
    assert card.phantom is not None
    assert (card.phantom.generator, tuple(card.labels)) == ("figures", LABELS)


@pytest.mark.parametrize("label", range(3))
def test_no_label_shows_in_the_grey_values(label: int) -> None:
    images, target = series()
    levels = np.sort(images.reshape(COUNT, -1), axis=1)[:, :: SIZE * SIZE // 16].astype(float)
    assert 0.4 < held_out_auroc(levels, target[:, label]) < 0.6


def test_labels_are_balanced_and_independent() -> None:
    _, target = series()
    assert (np.abs(target.mean(0) - 0.5) < 0.06).all()
    assert np.abs(np.corrcoef(target.T) - np.eye(3)).max() < 0.12


def test_lines_show_texture_and_halves_show_arrangement() -> None:
    images, target = series()
    steps = [np.abs(np.diff(images.astype(float), axis=axis)).mean((1, 2)) for axis in (1, 2)]
    assert held_out_auroc(np.stack(steps, axis=1), target[:, 0]) > 0.98
    bright = images > np.quantile(images, 0.9, axis=(1, 2), keepdims=True)
    assert held_out_auroc(bright.reshape(COUNT, 2, -1).mean(2), target[:, 2]) > 0.95
    for other in (1, 2):  # and neither says anything of the others
        assert held_out_auroc(np.stack(steps, axis=1), target[:, other]) < 0.6


def test_figures_are_those_that_the_label_says() -> None:
    """As much line in both kinds; the arcs of closed figures are away from its centre, those of open ones touch it."""
    from shards.phantom_figures import _figure

    closed, opened = _figure(SIZE, 0.0, 0.0, 0.3, True), _figure(SIZE, 0.0, 0.0, 0.3, False)
    assert closed.sum() == pytest.approx(opened.sum(), rel=0.1)
    x, y = np.meshgrid(*[(np.arange(SIZE) + 0.5) * 2 / SIZE - 1] * 2)
    inner = np.hypot(x, y) < 0.1
    assert closed[inner].sum() < 0.2 * opened[inner].sum()


def test_same_arguments_same_pixels_and_another_index_another_image() -> None:
    make = GENERATORS["figures"]
    one, again, other = make(3, 5, 48), make(3, 5, 48), make(3, 6, 48)
    assert one.image.dtype == np.uint8
    assert one.image.shape == (48, 48)
    assert (one.image == again.image).all()
    assert one.labels == again.labels
    assert (one.image != other.image).mean() > 0.5
