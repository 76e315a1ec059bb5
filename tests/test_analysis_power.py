"""What a study can find before it is computed: formulas, order, and the seeds that a wanted difference needs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.components import Parts
from analysis.power import AUROC, MASKS, Spread, auroc_variance, cell_variance, observed, power
from analysis.statistics import Comparison
from base.seeds import rng

CHEST: dict[str, Any] = {"patients": 400, "prevalence": [0.1, 0.2]}
METRICS = ["auroc_mean", "auroc_within_mean", "auprc_mean", "accuracy", "balanced_accuracy", "kappa_quadratic", "dice", "iou"]


def test_the_variance_of_an_auroc_is_that_of_simulated_scores() -> None:
    draw = rng("auroc variance")
    apart = math.sqrt(2) * stats.norm.ppf(0.8)
    above = (draw.normal(apart, 1, (4000, 30))[:, :, None] > draw.normal(0, 1, (4000, 1, 70))).mean((1, 2))
    assert auroc_variance(0.8, 30, 70) == pytest.approx(above.var(), rel=0.08)
    assert auroc_variance(0.5, 30, 70) == pytest.approx(101 / (12 * 30 * 70))  # Mann and Whitney's of no difference


@pytest.mark.parametrize("of_seeds", [0.0, 1e-12])
def test_seeds_that_do_not_vary_leave_what_patients_allow(of_seeds: float) -> None:
    """A head that is solved and not trained: 1.98 + 0.84 standard errors of 120 patients."""
    found = observed(Parts(of_seeds, 4 if of_seeds else 0, 1e-4, 119), 120, 0.05)
    assert found == pytest.approx(0.01 * (stats.t.ppf(0.975, 119) + stats.norm.ppf(0.8)), rel=1e-3)
    assert observed(Parts(0, 0, 1e-4, 119), 120, 0.05, equivalent=True) < 0.1


@pytest.mark.parametrize("metric", METRICS)
def test_more_patients_seeds_and_fewer_comparisons_find_smaller_differences(metric: str) -> None:
    base: dict[str, Any] = {"patients": 300, "prevalence": [0.1, 0.3], "seeds": 4, "family": 5}
    held = power(metric, **base).detectable
    assert 0 < held < 1
    assert power(metric, **{**base, "patients": 1200}).detectable < held
    assert power(metric, **{**base, "seeds": 8}).detectable < held
    assert power(metric, **{**base, "family": 1}).detectable < held
    assert power(metric, **base, pretraining_seeds=8).detectable > power(metric, **base, pretraining_seeds=16).detectable


@given(st.integers(30, 2000), st.floats(0.05, 0.5), st.integers(1, 30), st.floats(0.005, 0.2))
@settings(max_examples=8, deadline=None)
def test_the_seeds_that_a_difference_needs_find_it_and_one_fewer_do_not(patients: int, share: float, family: int, wanted: float) -> None:
    size: dict[str, Any] = {"patients": patients, "prevalence": [share], "family": family}
    found = power("auroc_mean", seeds=3, wanted=wanted, **size)
    if found.seeds_needed is None:
        assert found.floor > wanted
    else:
        assert power("auroc_mean", seeds=found.seeds_needed, **size).detectable <= wanted
        assert power("auroc_mean", seeds=found.seeds_needed - 1, **size).detectable > wanted


def test_patients_set_a_floor_that_seeds_cannot_pass() -> None:
    found = power("auroc_mean", seeds=5, wanted=0.001, **CHEST)
    assert found.seeds_needed is None
    assert 0.001 < found.floor < found.detectable
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    of_cell = cell_variance("auroc_mean", 400, [0.1, 0.2], AUROC)
    assert found.floor == pytest.approx(z * math.sqrt(2 * of_cell * (AUROC.same - AUROC.other)), rel=0.05)


def test_one_seed_finds_nothing_and_says_so() -> None:
    found = power("dice", patients=100, prevalence=None, seeds=1)
    assert found.detectable == math.inf
    assert "one seed" in found.assumptions
    assert power("auroc_mean", patients=100, prevalence=[0.0, 1.0], seeds=5).detectable == math.inf
    assert "prevalence not known" in power("auroc_mean", patients=100, prevalence=None, seeds=5).assumptions
    with pytest.raises(ValueError, match="speed"):
        power("speed", patients=100, prevalence=None, seeds=5)


def test_without_noise_between_seeds_it_is_the_power_of_a_t_test() -> None:
    """Many patients with a spread of their own and nothing else: a paired t test over patients; scipy's noncentral t says what it finds."""
    spread = Spread(tuning_sd=0.0, same=1.0, other=0.6)
    found = power("dice", patients=40, prevalence=None, seeds=3, spread=spread)
    se = math.sqrt(2 * spread.patient_sd**2 * 0.4 / 40)
    assert found.se == pytest.approx(se)
    assert found.detectable == pytest.approx(Comparison(0, 0, 0, se, 39.0, 1, "seeds and patients").detectable, rel=0.02)


def test_without_patients_it_is_the_power_of_a_t_test_over_seeds() -> None:
    found = power("dice", patients=10**9, prevalence=None, seeds=5, spread=replace(MASKS, tuning_sd=0.01))
    se = math.sqrt(2 * 0.01**2 / 5)
    assert found.detectable == pytest.approx(Comparison(0, 0, 0, se, 4.0, 1, "seeds and patients").detectable, rel=0.03)


def test_labels_that_err_together_help_less() -> None:
    prevalence = [0.1] * 8
    one = cell_variance("auroc_mean", 300, [0.1], AUROC)
    apart, together = (cell_variance("auroc_mean", 300, prevalence, replace(AUROC, labels=share)) for share in (0.0, 1.0))
    assert (apart, together) == pytest.approx((one / 8, one))
    assert np.isinf(cell_variance("auroc_mean", 300, [], AUROC))
