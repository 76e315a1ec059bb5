"""Transferability without training: each score against its definition in plain numpy, its invariances, and planted orders of sources."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from analysis.correlation import correlation
from analysis.transferability import h_score, leep, logme, soft_clusters
from base.errors import RequestError
from base.seeds import rng

Array = np.ndarray[Any, Any]
SCORES = (logme, h_score)


def features(n: int, d: int, classes: int, seed: int, signal: float = 1.0) -> tuple[Array, Array]:
    """Gaussian rows whose mean depends on the class, as far as `signal` says."""
    draw = rng("transferability", seed)
    y = draw.permutation(np.arange(n) % classes)
    return draw.normal(size=(n, d)) + signal * draw.normal(size=(classes, d))[y], y


def log_evidence(x: Array, y: Array, alpha: float, beta: float) -> float:
    """Of labels y with prior precision alpha and noise precision beta: the density of a Gaussian of all images at once, by image."""
    covariance = np.eye(len(y)) / beta + x @ x.T / alpha
    return float(stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)) / len(y)


def best_evidence(x: Array, y: Array) -> float:
    def negative(at: Array) -> float:
        return -log_evidence(x, y, *np.exp(at))

    starts = [
        optimize.minimize(negative, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).fun for start in ([0, 0], [3, 1])
    ]
    return -min(starts)


@pytest.mark.parametrize(("n", "d", "classes"), [(40, 3, 2), (30, 8, 3), (20, 30, 2)])
def test_logme_is_the_highest_evidence_that_a_search_finds(n: int, d: int, classes: int) -> None:
    x, y = features(n, d, classes, seed=n)
    expected = np.mean([best_evidence(x, (y == k).astype(float)) for k in range(classes)])
    assert logme(x, y) == pytest.approx(expected, abs=1e-6)


def h_score_by_definition(x: Array, y: Array) -> float:
    means = np.stack([x[y == k].mean(0) for k in y])
    return float(np.trace(np.linalg.pinv(np.cov(x.T, bias=True)) @ np.cov(means.T, bias=True)))


def leep_by_definition(p: Array, y: Array) -> float:
    total = 0.0
    for i in range(len(y)):
        likelihood = 0.0
        for z in range(p.shape[1]):
            joint = sum(p[j, z] for j in range(len(y)) if y[j] == y[i]) / len(y)
            likelihood += joint / (p[:, z].sum() / len(y)) * p[i, z]
        total += math.log(likelihood)
    return total / len(y)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 4))
@settings(max_examples=25)
def test_h_score_and_leep_are_their_definitions(seed: int, d: int, classes: int) -> None:
    x, y = features(40, d, classes, seed)
    assert h_score(x, y) == pytest.approx(h_score_by_definition(x, y), abs=1e-8)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    assert leep(p, y) == pytest.approx(leep_by_definition(p, y), abs=1e-10)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_invariances(seed: int) -> None:
    x, y = features(50, 5, 3, seed)
    draw = rng("transferability invariances", seed)
    order, rotation = draw.permutation(50), np.linalg.qr(draw.normal(size=(5, 5)))[0]
    for score in SCORES:
        assert score(x[order], y[order]) == pytest.approx(score(x, y), abs=1e-8), "rows have no order"
        assert score(x @ rotation, y) == pytest.approx(score(x, y), abs=1e-8), "nor have features"
        assert score(x, 7 - 2 * y) == pytest.approx(score(x, y), abs=1e-8), "nor names of classes"
        assert score(np.concatenate([x, np.zeros((50, 2))], 1), y) == pytest.approx(score(x, y), abs=1e-8), "a dead feature says nothing"
    assert logme(3 * x, y) == pytest.approx(logme(x, y), abs=1e-8), "the prior follows the scale"
    mixed = x @ (rotation * np.geomspace(1, 10, 5)) + 4
    assert h_score(mixed, y) == pytest.approx(h_score(x, y), abs=1e-8), "any invertible map"
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    assert leep(p[:, draw.permutation(5)], y) == pytest.approx(leep(p, y), abs=1e-10)


def test_bounds() -> None:
    x, y = features(60, 4, 3, seed=1)
    hot = np.eye(3)[y]
    assert h_score(hot, y) == pytest.approx(2.0)  # K - 1: the features are the classes
    assert leep(hot, y) == pytest.approx(0.0, abs=1e-12)
    uniform = np.full((60, 5), 0.2)
    assert leep(uniform, y) == pytest.approx(math.log(1 / 3))  # says nothing: the entropy of the labels
    assert 0 <= h_score(x, y) <= 2
    assert logme(hot, y) == math.inf  # a linear map gives the labels exactly
    assert h_score(np.ones((60, 4)), y) == 0


def test_fewer_images_than_features_is_finite_and_has_no_h_score() -> None:
    """Of 64 images and 96 features it was 1.0000 of any, noise included, and less only where features were dead."""
    x, y = features(20, 50, 2, seed=2)
    assert math.isfinite(logme(x, y))
    for held in (x, x * (np.arange(50) < 12), x[:, :19]):  # dead features too; with 19 a direction is left to no image
        with pytest.raises(RequestError, match=f"no H-score of 20 labelled images and {held.shape[1]} features, whose covariance"):
            h_score(held, y)
    assert h_score(x[:, :18], y) < 1
    target = np.stack([y, np.where(np.arange(20) < 10, y, math.nan)], axis=1)
    with pytest.raises(RequestError, match="of 10 labelled images and 12 features"):  # of the label that fewer know
        h_score(x[:, :12], target)


@pytest.mark.parametrize("score", [logme, h_score, lambda x, y: leep(soft_clusters(x, 10), y)])
def test_sources_with_more_of_the_classes_in_them_stand_higher(score: Any) -> None:
    strengths = [0.0, 0.3, 0.6, 1.2]
    found = [np.mean([score(*features(300, 6, 3, seed, signal)) for seed in range(3)]) for signal in strengths]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_labels_that_do_not_exclude_each_other_are_tasks_of_their_own_and_unknown_ones_are_left_out() -> None:
    x, _ = features(60, 4, 2, seed=3)
    draw = rng("labels")
    target = (draw.random((60, 3)) < 0.4).astype(float)
    target[::7, 1] = math.nan
    target[:, 2] = 1  # every image has it: nothing to tell apart
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    known = np.isfinite(target[:, 1])
    for score, held in ((logme, x), (h_score, x), (leep, p)):
        expected = np.mean([score(held, target[:, 0].astype(int)), score(held[known], target[known, 1].astype(int))])
        assert score(held, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.ones((4, 2)), np.zeros(4, int)), "one class"),
        ((np.ones((4, 2)), np.ones((4, 2))), "no label"),
        ((np.ones((4, 2)), np.zeros(3, int)), "4 rows"),
        ((np.ones(4), np.zeros(4, int)), "shape"),
        ((np.full((4, 2), math.nan), np.array([0, 1, 0, 1])), "not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(given: tuple[Array, Array], message: str) -> None:
    for score in SCORES:
        with pytest.raises(RequestError, match=message):
            score(*given)


def test_leep_takes_probabilities_only() -> None:
    with pytest.raises(RequestError, match="not probabilities"):
        leep(np.array([[3.0, -1.0], [0.5, 0.5]]), np.array([0, 1]))
    with pytest.raises(RequestError, match="clusters"):
        soft_clusters(np.ones((5, 2)), 2)


def test_the_correlation_with_real_results_is_scipys_and_few_sources_have_none() -> None:
    guesses, real = [0.1, 0.4, 0.2, 0.9, math.nan], [0.60, 0.72, 0.70, 0.71, 0.9]
    found = correlation(guesses, real)
    assert found.n == 4
    assert found.tau == stats.weightedtau(guesses[:4], real[:4]).statistic
    assert correlation([1, 2, 3], [4, 5, 6]).tau == pytest.approx(1)
    assert math.isnan(correlation([1, 2], [2, 3]).tau)
    assert "takes 3" in correlation([1, 2], [2, 3]).why
    assert "alike" in correlation([1, 1, 1], [2, 3, 4]).why
    assert "alike" in correlation([0.1, 0.1, 0.1], [2, 3, 4]).why  # whose standard deviation rounds to more than 0
