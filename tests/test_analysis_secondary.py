"""Tests that are printed and never declared: against scipy, published values and their own definitions."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated import World, study

from analysis.ranks import critical_difference, exact, ranks
from analysis.replicates import Scores, metric_B
from analysis.secondary import delong_difference, hedges, influence, secondary, stars
from base.seeds import rng


def delong(score_KN: np.ndarray, positive_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and DeLong's covariance from what every image moves."""
    auroc_K, moved_KN = influence(score_KN, positive_N)
    return auroc_K, moved_KN @ moved_KN.T


def plain_delong(score_KN: np.ndarray, positive_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition, every pair by itself: DeLong, DeLong and Clarke-Pearson 1988, equations 4 to 6."""
    x_KM, y_KN = score_KN[:, positive_N], score_KN[:, ~positive_N]
    wins = (x_KM[:, :, None] > y_KN[:, None, :]) + 0.5 * (x_KM[:, :, None] == y_KN[:, None, :])
    return wins.mean((1, 2)), np.atleast_2d(np.cov(wins.mean(2))) / x_KM.shape[1] + np.atleast_2d(np.cov(wins.mean(1))) / y_KN.shape[1]


@given(st.integers(0, 10_000), st.booleans(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_fast_delong_equals_its_definition(seed: int, ties: bool, cells: int) -> None:
    draw = rng("delong", seed)
    n = int(draw.integers(6, 60))
    score = draw.integers(0, 5, (cells, n)).astype(float) if ties else draw.normal(0, 1, (cells, n))
    positive = draw.permutation(n) < draw.integers(2, n - 1)
    (auroc, covariance), (expected, wanted) = delong(score, positive), plain_delong(score, positive)
    assert auroc == pytest.approx(expected, abs=1e-12)
    assert covariance == pytest.approx(wanted, abs=1e-12)


def test_delong_agrees_with_permuting_the_two_predictors() -> None:
    """Which of two predictors gave which score is exchangeable where they are equally good: brute force over 1,500 exchanges by image."""
    draw = rng("permutation", 1)
    positive = np.arange(160) < 60
    common = positive + draw.normal(0, 1, 160)
    a, b = (stats.rankdata(common + draw.normal(0, 0.6, 160) + lift * positive) for lift in (0.28, 0.0))
    auroc, covariance = delong(np.stack([a, b]), positive)
    se = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    p = 2 * stats.norm.sf(abs(auroc[0] - auroc[1]) / se)
    swap = draw.random((1500, 160)) < 0.5
    exchanged = delong(np.concatenate([np.where(swap, a, b), np.where(swap, b, a)]), positive)[0].reshape(2, -1)
    brute = np.mean(np.abs(exchanged[0] - exchanged[1]) >= abs(auroc[0] - auroc[1]) - 1e-12)
    assert 0.01 < p < 0.3
    assert p == pytest.approx(brute, abs=0.03)


def test_delong_of_one_label_and_one_image_a_patient_is_the_classical_one() -> None:
    a, b = study(World(patients=80, seeds=1, lift=0.03), rng("classical"))
    assert a[0].target_NL is not None
    scores = np.stack([cell.score_NL[:, 0] for cell in (a[0], b[0]) if cell.score_NL is not None])
    auroc, covariance = plain_delong(scores, a[0].target_NL[:, 0] > 0.5)
    difference, se = delong_difference(a, b)
    assert difference == pytest.approx(auroc[0] - auroc[1])
    assert se**2 == pytest.approx(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])


def test_delong_counts_patients_not_images() -> None:
    """Every image twice: the same knowledge, the same standard error."""
    a, b = study(World(patients=80, prevalence=(0.3, 0.5)), rng("twice"))

    def twice(cell: Scores) -> Scores:
        assert cell.target_NL is not None
        assert cell.score_NL is not None
        columns = {"patient_N": cell.patient_N, "target_NL": cell.target_NL, "score_NL": cell.score_NL}
        doubled: dict[str, Any] = {name: np.concatenate([x, x]) for name, x in columns.items()}
        return replace(cell, ids_N=np.arange(160).astype(str), **doubled)

    once, again = delong_difference(a, b), delong_difference([twice(cell) for cell in a], [twice(cell) for cell in b])
    assert once[0] == pytest.approx(again[0])
    assert once[1] == pytest.approx(again[1], rel=0.03)


def test_delong_standard_error_is_that_of_new_patients() -> None:
    world = World(patients=100, seeds=2, prevalence=(0.3, 0.4), tuning_sd=0.0, lift=0.02)
    found = np.array([delong_difference(*study(world, rng("new patients", i))) for i in range(200)])
    assert found[:, 0].mean() == pytest.approx(0.02, abs=0.005)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.15)


def test_tests_over_seeds_are_scipys() -> None:
    a, b = study(World("dice", 6, lift=0.01), rng("scipy"))
    found = secondary(a, b, "dice", family=1)
    values = [[float(np.mean(cell.dice_N)) for cell in side if cell.dice_N is not None] for side in (a, b)]
    for name, test in (
        ("welch", stats.ttest_ind(*values, equal_var=False)),
        ("student", stats.ttest_ind(*values)),
        ("paired", stats.ttest_rel(*values)),
    ):
        assert (found[f"t_{name}"], found[f"p_{name}"]) == pytest.approx((test.statistic, test.pvalue))
    assert found["p_wilcoxon"] == pytest.approx(stats.wilcoxon(*values).pvalue)
    assert found["stars"] == stars(float(found["p_student"]))
    assert found["p_delong"] == "refused: it is of AUROC over all images"


@pytest.mark.parametrize(("seeds", "family", "refused"), [(5, 1, True), (6, 1, False), (6, 2, True), (10, 20, False), (10, 26, True)])
def test_wilcoxon_is_refused_where_it_could_never_pass(seeds: int, family: int, refused: bool) -> None:
    found = secondary(*study(World("dice", seeds, lift=0.1), rng("rank", seeds)), "dice", family=family)["p_wilcoxon"]
    assert str(found).startswith("refused: with") == refused
    if refused:
        assert f"{2 ** (1 - seeds):.2g}" in str(found)


def test_effect_sizes_are_those_of_a_worked_example() -> None:
    # Means 4 and 2, both variances 2.5: d = 2 / sqrt(2.5); of 8 degrees of freedom g = 0.9027 d (Hedges 1981, table 1: c(8) = 0.9027).
    d, g = hedges(np.array([2.0, 3, 4, 5, 6]), np.array([0.0, 1, 2, 3, 4]))
    assert d == pytest.approx(2 / math.sqrt(2.5))
    assert g == pytest.approx(0.9027 * d, abs=1e-4)


def test_does_not_repeat_a_wilcoxon_of_no_difference_whose_smallest_p_is_two() -> None:
    a, _ = study(World("dice", 8), rng("no difference"))
    assert secondary(a, a, "dice")["p_wilcoxon"] == "refused: no seed differs"


def test_what_cannot_be_tested_is_refused_in_words() -> None:
    a, b = study(World("dice", 3), rng("refused"))
    for found in (secondary(a[:1], b[:1], "dice"), secondary([], b, "dice")):
        assert all(str(found[f"p_{name}"]).startswith("refused") for name in ("paired", "welch", "student", "wilcoxon", "delong"))
    same = secondary([replace(a[0], seed=s) for s in range(3)], [replace(b[0], seed=s) for s in range(3)], "dice")
    assert same["p_welch"] == same["p_paired"] == "refused: no spread between seeds"
    nested = secondary(*study(World("dice", 2, 3, pretraining_sd=0.01), rng("nested")), "dice")
    assert nested["p_paired"] == "refused: pretraining seeds of two sources are not pairs"
    assert isinstance(nested["p_welch"], float)
    lost = [replace(cell, dice_N=np.full(120, math.nan)) for cell in a]
    with np.errstate(invalid="ignore"):
        assert secondary(lost, b, "dice")["p_welch"] == "refused: the metric is not a number"


def test_stars_are_those_of_the_benchmark() -> None:
    assert [stars(p) for p in (0.06, 0.05, 0.04, 0.009, 0.0009, 0.00009)] == ["n.s.", "n.s.", "*", "**", "***", ">***"]


def test_units_of_the_secondary_tests_are_the_metric_itself() -> None:
    a, b = study(World(seeds=3), rng("units"))
    values = [[metric_B(cell, "auroc_mean", np.ones((1, 120)))[0] for cell in side] for side in (a, b)]
    assert secondary(a, b, "auroc_mean")["t_paired"] == pytest.approx(stats.ttest_rel(*values).statistic)


# Demsar 2006, table 6: AUROC of C4.5 with neither, one or both of two parameters tuned, on 14 data sets (one digit more in a near tie).
DEMSAR = """
0.763 0.768 0.771 0.798
0.599 0.591 0.590 0.569
0.954 0.971 0.968 0.967
0.628 0.661 0.654 0.657
0.882 0.888 0.886 0.898
0.936 0.931 0.916 0.931
0.661 0.668 0.609 0.685
0.583 0.583 0.563 0.625
0.775 0.838 0.866 0.875
1.000 1.000 1.000 1.000
0.940 0.962 0.965 0.962
0.619 0.666 0.614 0.669
0.972 0.981 0.9751 0.975
0.957 0.978 0.946 0.970
"""


def table() -> pd.DataFrame:
    return pd.DataFrame([[float(x) for x in line.split()] for line in DEMSAR.strip().splitlines()], columns=["C4.5", "+m", "+cf", "+m+cf"])


def test_ranks_are_those_of_the_paper() -> None:
    found = ranks(table())
    assert found.average == pytest.approx({"+m+cf": 1.964, "+m": 2.000, "+cf": 2.893, "C4.5": 3.143}, abs=5e-4)
    assert next(iter(found.average)) == "+m+cf"
    # The paper's 9.28 leaves ties uncorrected; scipy's statistic is that over 1 - ties / (N k (k^2 - 1)).
    ties = sum(float(np.sum(n**3 - n)) for _, row in table().iterrows() for n in [row.value_counts().to_numpy()])
    assert found.statistic * (1 - ties / (14 * 4 * 15)) == pytest.approx(9.28, abs=0.02)
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert found.cliques == [("+m+cf", "+m", "+cf", "C4.5")]


@pytest.mark.parametrize(("sources", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_differences_are_those_of_the_table(sources: int, q: float) -> None:
    assert critical_difference(sources, 10) == pytest.approx(q * math.sqrt(sources * (sources + 1) / 60), rel=5e-4)


def test_ranks_of_incomplete_and_equal_tables_are_truthful() -> None:
    held = table()
    held.iloc[0, 0] = math.nan
    assert (ranks(held).settings, ranks(held).dropped) == (13, 1)
    equal = ranks(pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}))
    assert (equal.why, equal.average) == ("all sources are equal in every setting", {"a": 2.0, "b": 2.0, "c": 2.0})
    assert math.isnan(equal.p)
    assert ranks(held[["+m", "+cf"]]).why == "Friedman's test is of three sources or more"
    assert ranks(held[["+m"]]).why == "fewer than two sources"
    assert ranks(pd.DataFrame({"a": [math.nan], "b": [1.0]})).why == "no setting has every source"
    two = ranks(pd.DataFrame({"a": [3.0, 3.0], "b": [2.0, 2.0], "c": [1.0, 1.0]}))
    assert (math.isnan(two.p), two.why) == (True, "Friedman's test is refused: of 3 sources in 2 settings its smallest p is 0.17")
    assert list(two.average) == ["a", "b", "c"]
    assert ranks(pd.DataFrame({"a": [3.0] * 3, "b": [2.0] * 3, "c": [1.0] * 3})).p == pytest.approx(1 / 36)
    apart = ranks(pd.DataFrame({"a": [3.0] * 9, "b": [2.0] * 9, "c": [1.0] * 9}))
    assert apart.cliques == [("a", "b"), ("b", "c")]


def every_order(table_NK: np.ndarray) -> tuple[float, float]:
    """Friedman's p and its least by the definition: every order within every setting."""
    ranked_NK = stats.rankdata(table_NK, axis=1)
    orders = itertools.product(*(itertools.permutations(row) for row in ranked_NK))
    apart = np.array([np.square(np.sum(drawn, axis=0) - len(ranked_NK) * ranked_NK.mean()).sum() for drawn in orders])
    seen = np.square(ranked_NK.sum(0) - len(ranked_NK) * ranked_NK.mean()).sum()
    return float((apart > seen - 1e-9).mean()), float((apart > apart.max() - 1e-9).mean())


@pytest.mark.parametrize(("settings", "sources", "levels"), [(4, 3, 100), (5, 3, 3), (3, 4, 100), (3, 4, 3), (2, 5, 100), (4, 3, 2)])
def test_friedmans_p_is_that_of_every_order(settings: int, sources: int, levels: int) -> None:
    """Few levels: ties."""
    draw = rng("friedman", settings, sources, levels)
    for _ in range(3):
        table_NK = draw.integers(0, levels, (settings, sources)).astype(float)
        p, least = every_order(table_NK)
        assert exact(stats.rankdata(table_NK, axis=1)) == pytest.approx((p, least))
        found = ranks(pd.DataFrame(table_NK))
        if not found.why:
            assert (found.p, found.exact) == (pytest.approx(p), True)


def test_friedmans_p_differs_in_verdict_from_the_asymptotic_one() -> None:
    """Of three sources in four settings 6.00 has 0.0498 by chi-squared and 0.0694 in Friedman's own table (1937)."""
    found = ranks(pd.DataFrame({"a": [3.0, 3.0, 2.0, 2.0], "b": [2.0, 2.0, 3.0, 3.0], "c": [1.0] * 4}))
    assert (found.statistic, round(found.p, 4), found.exact) == (6.0, 0.0694, True)


def test_friedmans_p_is_asymptotic_where_orders_are_too_many() -> None:
    draw = rng("friedman, many")
    found = ranks(pd.DataFrame(draw.random((30, 8))))
    assert not found.exact
    assert found.p == pytest.approx(float(stats.chi2.sf(found.statistic, 7)))
