"""Metrics against scikit-learn, against the definition, and where scikit-learn refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from analysis.metrics import (
    auprc,
    auroc,
    auroc_within,
    decided,
    dice_of,
    dice_per_image,
    ece,
    hd95,
    iou_of,
    mean_defined,
    operating_points,
    overlaps,
    stratified,
)

# Few distinct scores, so that ties are common.
samples = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 2)), min_size=2, max_size=60)


@settings(max_examples=200, deadline=None)
@given(samples)
def test_auroc_and_auprc_equal_sklearn(rows: list[tuple[int, bool, int]]) -> None:
    score, target = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows], int)
    if 0 < target.sum() < len(target):
        assert auroc(score, target) == pytest.approx(roc_auc_score(target, score), abs=1e-12)
        assert auprc(score, target) == pytest.approx(average_precision_score(target, score), abs=1e-12)
    else:
        assert math.isnan(auroc(score, target))
        assert math.isnan(auprc(score, target))


@settings(max_examples=200, deadline=None)
@given(samples)
def test_auroc_within_is_the_share_of_pairs_inside_strata(rows: list[tuple[int, bool, int]]) -> None:
    right = pairs = 0.0
    for score, positive, stratum in rows:
        for other, other_positive, other_stratum in rows:
            if positive and not other_positive and stratum == other_stratum:
                pairs += 1
                right += 1.0 if score > other else 0.5 if score == other else 0.0
    value = auroc_within([row[0] for row in rows], [int(row[1]) for row in rows], [row[2] for row in rows])
    assert math.isnan(value) if not pairs else value == pytest.approx(right / pairs, abs=1e-12)


def test_a_confounder_gains_nothing_within_its_strata() -> None:
    draw = np.random.default_rng(0)
    source = draw.integers(0, 3, 2000)
    target = (draw.random(2000) < np.array([0.1, 0.5, 0.9])[source]).astype(int)
    assert auroc(source, target) > 0.8
    assert auroc_within(source, target, source.tolist()) == 0.5


def test_samples_of_no_known_stratum_hold_no_pair() -> None:
    score, target = [0.1, 0.9, 0.8, 0.2, 0.3, 0.7], [0, 1, 0, 1, 0, 1]
    assert auroc_within(score, target, ["a", "a", None, None, "b", "b"]) == 1
    assert np.isnan(auroc_within(score, target, [None] * 6))
    assert not stratified([None, "a", "a"])
    assert stratified([None, "a", "b"])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        auroc([0.1, float("nan")], [0, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        auroc([0.1, 0.2], [0, -1])
    with pytest.raises(ValueError, match="length"):
        auroc([0.1, 0.2], [0, 1, 1])
    with pytest.raises(ValueError, match="strata"):
        auroc_within([0.1, 0.2], [0, 1], ["a"])


def test_dice_per_image_and_its_empty_policy() -> None:
    pred, true = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    pred[0, :2], true[0, 1:3] = True, True  # 8 and 8, 4 shared
    pred[1, 0] = True  # one empty
    pred[3, 0, 0] = true[3, 0, 0] = True
    np.testing.assert_allclose(dice_per_image(pred, true), [0.5, 0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="one shape"):
        dice_per_image(pred, true[:2])


def test_mean_over_labels_counts_those_that_have_a_value() -> None:
    assert mean_defined([0.5, float("nan"), 0.7]) == (pytest.approx(0.6), 2)
    mean, count = mean_defined([float("nan")])
    assert math.isnan(mean)
    assert count == 0


# -- decisions

decisions = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(decisions)
def test_decisions_equal_sklearn_where_it_is_defined(rows: list[tuple[int, int]]) -> None:
    true, pred = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = decided(true, pred, 4)
    assert float(found["accuracy"]) == pytest.approx(accuracy_score(true, pred))
    for label in range(4):
        hit, said, there = ((true == label) & (pred == label)).sum(), (pred == label).sum(), (true == label).sum()
        for metric, under in (("precision", said), ("sensitivity", there)):
            assert math.isnan(found[metric][label]) if not under else found[metric][label] == pytest.approx(hit / under)
    if len(set(true)) > 1:
        assert float(found["kappa"]) == pytest.approx(cohen_kappa_score(true, pred))
        assert float(found["kappa_quadratic"]) == pytest.approx(cohen_kappa_score(true, pred, weights="quadratic", labels=range(4)))
        if set(pred) <= set(true):
            assert float(found["balanced_accuracy"]) == pytest.approx(balanced_accuracy_score(true, pred))
            assert float(found["f1_macro"]) == pytest.approx(f1_score(true, pred, average="macro"))
    else:
        assert math.isnan(found["balanced_accuracy"])
        assert math.isnan(found["kappa"]) == (set(pred) == set(true))


def test_does_not_repeat_precision_that_is_recall() -> None:
    """TruncatedTL (2.5-3) divides by the counts of the true class and calls it precision."""
    true, pred = np.array([1, 1, 1, 1, 0, 0]), np.array([1, 0, 0, 0, 1, 1])
    found = decided(true, pred, 2)
    assert found["sensitivity"][1] == recall_score(true, pred) == 1 / 4
    assert found["precision"][1] == precision_score(true, pred) == 1 / 3


def test_decisions_of_no_sample_have_no_value() -> None:
    assert all(np.isnan(value).all() for value in decided([], [], 3).values())


@settings(max_examples=200, deadline=None)
@given(samples)
def test_operating_points_are_the_best_of_all_thresholds(rows: list[tuple[int, bool, int]]) -> None:
    score, target = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    points = operating_points(score, target)
    if target.all() or not target.any():
        assert all(math.isnan(value) for value in points.values())
        return
    tried = {t: ((score >= t)[target].mean(), (score < t)[~target].mean()) for t in [*np.unique(score), np.inf]}
    assert sum(tried[points["youden"]]) == pytest.approx(max(sum(pair) for pair in tried.values()))
    assert tried[points["spec95"]][1] >= 0.95
    assert tried[points["spec95"]][0] == max(sensitivity for sensitivity, specificity in tried.values() if specificity >= 0.95)
    assert tried[points["sens95"]][0] >= 0.95
    assert tried[points["sens95"]][1] == max(specificity for sensitivity, specificity in tried.values() if sensitivity >= 0.95)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.999), st.booleans()), min_size=1, max_size=80))
def test_ece_equals_sklearns_calibration_curve(rows: list[tuple[float, bool]]) -> None:
    score, target = np.array([row[0] for row in rows], np.float64), np.array([row[1] for row in rows], int)
    inner = np.abs(score * 15 - np.round(score * 15)) > 1e-6  # on the border of two bins either is right
    score, target = score[inner], target[inner]
    if not len(score):
        return
    right, said = calibration_curve(target, score, n_bins=15, strategy="uniform")
    share = np.histogram(score, np.linspace(0, 1, 16))[0] / len(score)
    assert ece(score, target) == pytest.approx((np.abs(right - said) * share[share > 0]).sum())


def test_ece_by_hand() -> None:
    assert ece([0.91, 0.93, 0.1, 0.1], [1, 0, 0, 0]) == pytest.approx((abs(0.91 + 0.93 - 1) + 0.2) / 4)
    assert ece([1.0, 1.0], [1, 1]) == 0
    assert math.isnan(ece([], []))
    with pytest.raises(ValueError, match="probabilities"):
        ece([1.5], [1])


# -- masks


def test_iou_and_pooled_dice_by_hand() -> None:
    pred, true = np.zeros((3, 4, 4), bool), np.zeros((3, 4, 4), bool)
    pred[0, :2], true[0, 1:3] = True, True  # 8 and 8, 4 shared
    pred[1, 0] = True  # 4 and none
    counts = overlaps(pred, true)
    assert counts.tolist() == [[4, 8, 8], [0, 4, 0], [0, 0, 0]]
    np.testing.assert_allclose(iou_of(*counts.T), [1 / 3, 0, 1])
    pooled = counts.sum(0)
    assert dice_of(*pooled) == pytest.approx(2 * 4 / (12 + 8))  # not the mean of 0.5, 0 and 1
    assert iou_of(*pooled) == pytest.approx(4 / 16)


def blobs(draw: np.random.Generator) -> np.ndarray:
    mask = np.zeros((24, 30), bool)
    for _ in range(draw.integers(1, 4)):
        y, x, h, w = draw.integers(0, 18), draw.integers(0, 24), draw.integers(1, 10), draw.integers(1, 10)
        mask[y : y + h, x : x + w] = True
    return mask


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.4, 1.7)])
def test_hausdorff_95_equals_distance_transforms(spacing: tuple[float, float]) -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        masks = [blobs(draw), blobs(draw)]
        borders = [mask & ~binary_erosion(mask) for mask in masks]
        away = [distance_transform_edt(~border, sampling=spacing) for border in borders]
        expected = max(np.percentile(away[1][borders[0]], 95), np.percentile(away[0][borders[1]], 95))
        assert hd95(masks[0], masks[1], spacing) == pytest.approx(expected)
        assert hd95(masks[0], masks[1], spacing) == hd95(masks[1], masks[0], spacing)


def test_hausdorff_95_by_hand_and_its_empty_policy() -> None:
    square, moved, empty = (np.zeros((40, 40), bool) for _ in range(3))
    square[5:15, 5:15], moved[5:15, 12:22] = True, True
    assert hd95(square, moved) == 7
    assert hd95(square, moved, (1.0, 0.5)) == 3.5
    assert hd95(square, square) == 0
    assert hd95(empty, empty) == 0
    assert math.isnan(hd95(square, empty))
    assert math.isnan(hd95(empty, square))
    with pytest.raises(ValueError, match="one shape"):
        hd95(square, square[:20])
