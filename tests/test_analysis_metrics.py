"""Metrics against scikit-learn, against the definition, and where scikit-learn refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from analysis.metrics import auprc, auroc, auroc_within, dice_per_image, mean_defined, stratified

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
