"""Intervals that cover, comparisons that find what was planted and nothing else, corrections in the right order."""

import math
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from simulated import World
from simulated import study as simulated

from analysis import metrics
from analysis.components import Parts, critical
from analysis.replicates import EXACT, Bootstrap, Scores, metric_B, resample
from analysis.statistics import Comparison, compare, holm
from base.seeds import rng


def made(
    seed: int, score_NL: np.ndarray, target_NL: np.ndarray, patient_N: np.ndarray, strata: np.ndarray | None = None, pre: int = 0
) -> Scores:
    patients = patient_N.astype(str).astype(object)
    ids: Any = np.arange(len(score_NL))
    return Scores(seed, ids, patients, target_NL, score_NL, None, strata, pre)


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_weighted_auroc_equals_the_metric_on_repeated_images(seed: int, ties: bool, within: bool) -> None:
    draw = rng("weighted", seed)
    n = 40
    score = draw.integers(0, 6, (n, 2)).astype(float) if ties else draw.normal(0, 1, (n, 2))
    target = (draw.random((n, 2)) < 0.4).astype(float)
    target[:2] = [[0, 0], [1, 1]]
    strata: Any = draw.integers(0, 3, n).astype(str).astype(object)
    strata[:2] = "0"
    weight = draw.integers(0, 3, (4, n))
    weight[:, :2] = 1  # both classes stay
    held = made(0, score, target, np.arange(n), strata)
    name = "auroc_within_mean" if within else "auroc_mean"
    found = metric_B(held, name, weight.astype(float))
    for row, value in zip(weight, found, strict=True):
        at = np.repeat(np.arange(n), row)
        each = [
            metrics.auroc_within(score[at, j], target[at, j], strata[at]) if within else metrics.auroc(score[at, j], target[at, j])
            for j in range(2)
        ]
        assert value == pytest.approx(np.mean(each), abs=1e-12)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_every_weighted_metric_equals_the_metric_on_repeated_images(seed: int) -> None:
    draw = rng("weighted", seed)
    n = 30
    true, decided = draw.integers(0, 3, n), draw.integers(0, 3, n)
    score = draw.integers(0, 6, (n, 2)).astype(float)
    target = (draw.random((n, 2)) < 0.4).astype(float)
    target[:2], true[:3] = [[0, 0], [1, 1]], [0, 1, 2]
    weight = draw.integers(0, 3, (4, n))
    weight[:, :3] = 1
    names = np.arange(n).astype(str)
    iou = draw.random(n)
    held = Scores(0, names, names.astype(object), target, score, iou_N=iou, true_N=true, decided_N=decided)
    for row, at in ((row, np.repeat(np.arange(n), row)) for row in weight):
        once = row[None].astype(float)
        said = metrics.decided(true[at], decided[at], 3)
        for name in ("accuracy", "balanced_accuracy", "kappa_quadratic"):
            assert metric_B(held, name, once)[0] == pytest.approx(float(said[name]), abs=1e-12)
        assert metric_B(held, "iou", once)[0] == pytest.approx(iou[at].mean())
        assert metric_B(held, "auprc_mean", once)[0] == pytest.approx(np.mean([metrics.auprc(score[at, j], target[at, j]) for j in (0, 1)]))


def test_replicates_of_many_images_are_as_exact_as_those_of_few() -> None:
    """Sums of more than 24 bits: pairs are counted in 32 bits only where they are held exactly."""
    draw = rng("exact")
    target = (draw.random((300, 1)) < 0.5).astype(float)
    held = made(0, draw.integers(0, 200, (300, 1)).astype(float), target, np.arange(300))
    weight: Any = draw.integers(1, 5, (20, 300))
    few, many = (metric_B(held, "auroc_mean", weight * times) for times in (1, 10_001))
    assert weight.sum(1).max() * 10_001 > EXACT > weight.sum(1).max()
    np.testing.assert_allclose(few, many, rtol=1e-15)


def test_unknown_targets_and_labels_of_one_class_are_left_out() -> None:
    target = np.array([[0, 1, 0], [1, math.nan, 0], [0, 0, 0], [1, 1, 0]], float)
    score = np.array([[0.1, 0.9, 0], [0.8, 0.0, 0], [0.9, 0.2, 0], [0.95, 0.1, 0]], float)
    expected = (metrics.auroc(score[:, 0], target[:, 0]) + metrics.auroc(score[[0, 2, 3], 1], target[[0, 2, 3], 1])) / 2
    assert metric_B(made(0, score, target, np.arange(4)), "auroc_mean", np.ones((1, 4)))[0] == pytest.approx(expected)


def test_images_of_no_known_stratum_hold_no_pair() -> None:
    strata = np.array(["a", None, "b", "a", None], object)
    names = np.arange(5).astype(str)
    held = Scores(0, names, names.astype(object), np.ones((5, 1)), np.ones((5, 1)), None, strata)
    assert [at.tolist() for at in held.strata] == [[0, 3], [2]]


def test_resampling_is_by_patient_and_redraws_lost_classes() -> None:
    target = np.zeros((30, 1))
    target[:2] = 1  # one patient holds all positives
    patients = np.repeat(np.arange(15), 2)
    drawn = resample(made(0, np.arange(30.0)[:, None], target, patients), "auroc_mean", 300)
    assert drawn.weight_BN.shape == (300, 30)
    assert drawn.patients == 15
    assert (drawn.weight_BN[:, 0::2] == drawn.weight_BN[:, 1::2]).all()
    assert (drawn.weight_BN[:, 0] > 0).all()
    # That patient is in a draw of 15 from 15 with probability 1 - (14 / 15) ** 15 = 0.645.
    assert 300 / (300 + drawn.redrawn) == pytest.approx(0.645, abs=0.06)


def test_replicates_are_the_same_in_one_chunk_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = rng("chunks")
    target = (draw.random((60, 2)) < 0.4).astype(float)
    held = made(0, draw.integers(0, 30, (60, 2)).astype(float), target, np.arange(60))
    whole = Bootstrap(50)(held, "auroc_mean")
    monkeypatch.setattr("analysis.replicates.CHUNK", 600)
    assert Bootstrap(50).draw(held, "auroc_mean").rows is None
    np.testing.assert_array_equal(Bootstrap(50)(held, "auroc_mean"), whole)


def study(draw: np.random.Generator, seeds: int, lift: float, images: int = 120, replicates: int = 400) -> Comparison:
    """Two encoders on the same images: their own mistakes by image, noise by seed, several images a patient."""
    patient = draw.integers(0, images * 3 // 4, images)
    target = (draw.random((images, 1)) < 0.4).astype(float)
    base = target + draw.normal(0, 0.7, images)[patient][:, None]

    def side(shift: float) -> list[Scores]:
        own = draw.normal(0, 0.5, (images, 1))
        return [
            made(s, base + own + target * (shift + draw.normal(0, 0.15)) + draw.normal(0, 0.5, (images, 1)), target, patient)
            for s in range(seeds)
        ]

    return compare(side(lift), side(0.0), "auroc_mean", bootstrap=Bootstrap(replicates, int(draw.integers(1 << 40))))


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_encoders_are_rarely_flagged_and_a_planted_gain_is_found(seeds: int) -> None:
    draw = rng("null studies", seeds)
    flagged = sum(study(draw, seeds, 0.0, replicates=200).excludes_zero for _ in range(120))
    # At a true rate of 5 %, more than 12 of 120 come up once in 100 times.
    assert flagged <= 12
    found = [study(draw, seeds, 1.5) for _ in range(15)]
    assert sum(c.low > 0 for c in found) >= 14


def test_one_seed_has_patients_only_and_says_so() -> None:
    result = study(rng("one"), 1, 2.0)
    assert result.basis == "patients only"
    assert math.isnan(result.seed_variance)
    assert result.low < result.estimate < result.high


def test_dice_difference_matches_its_formula() -> None:
    draw = rng("dice")
    n, seeds = 60, 4
    hard = draw.normal(0.8, 0.05, n)

    def side(lift: float) -> list[Scores]:
        ids: Any = np.arange(n)
        people, own = ids.astype(str).astype(object), draw.normal(0, 0.03, n)
        return [Scores(s, ids, people, dice_N=hard + own + lift + draw.normal(0, 0.01) + draw.normal(0, 0.02, n)) for s in range(seeds)]

    a, b = side(0.02), side(0.0)
    result = compare(a, b, "dice", bootstrap=Bootstrap(4000))
    d_SN = np.array([x.dice_N - y.dice_N for x, y in zip(a, b, strict=True) if x.dice_N is not None and y.dice_N is not None])
    assert result.estimate == pytest.approx(d_SN.mean())
    # Of a mean it is the analysis of variance of crossed seeds and patients, whose interaction stands with the seeds.
    rest_SN = d_SN - d_SN.mean(1, keepdims=True) - d_SN.mean(0) + d_SN.mean()
    shared = (rest_SN**2).sum() / ((seeds - 1) * (n - 1)) / n
    seed_part, patient_part = d_SN.mean(1).var(ddof=1) / seeds, d_SN.mean(0).var(ddof=1) / n - shared / seeds
    assert result.seed_variance == pytest.approx(seed_part)
    assert result.patient_variance == pytest.approx(patient_part, rel=0.1)
    seed_part, patient_part = result.seed_variance, result.patient_variance
    weight = (seed_part / (seed_part + patient_part)) ** math.sqrt((seeds - 1) / 2)

    def beyond(away: float) -> float:
        return float(weight * stats.t.sf(away, seeds - 1) + (1 - weight) * stats.t.sf(away, n - 1)) - 0.025

    expected = optimize.brentq(beyond, 1, 10)
    assert result.high - result.estimate == pytest.approx(expected * result.se)
    assert stats.t.ppf(0.975, result.df) == pytest.approx(expected)
    # p is the level at which the interval begins at 0.
    assert compare(a, b, "dice", bootstrap=Bootstrap(4000), level=1 - result.p).low == pytest.approx(0, abs=1e-9)


def test_pretraining_seeds_are_the_units_where_there_are_several() -> None:
    draw = rng("methods")
    target = (draw.random((80, 1)) < 0.5).astype(float)
    people = np.arange(80)

    def cell(seed: int, pre: int, lift: float) -> Scores:
        return made(seed, target * lift + draw.normal(0, 1, (80, 1)), target, people, pre=pre)

    a = [cell(seed, pre, 1 + pre * 0.5) for pre in range(3) for seed in range(2)]
    b = [cell(seed, 0, 1.0) for seed in range(2)]
    result = compare(a, b, "auroc_mean", bootstrap=Bootstrap(300))
    assert (result.units, result.per_seed, result.pretraining_seeds) == (2, (), 1)
    assert result.basis == "seeds and patients"
    assert result.about == "encoders (these weights)"
    assert 0 < result.pretraining_variance <= result.seed_variance
    one_each = [cell(0, pre, 1.0) for pre in range(3)]
    both = compare(one_each, [cell(0, pre, 1.0) for pre in range(3)], "auroc_mean", bootstrap=Bootstrap(300))
    assert (both.units, both.about, both.basis) == (3, "methods", "seeds and patients")
    # Random weights are drawn with the fine-tuning seed: each cell is a checkpoint, and still a pair.
    drawn = [cell(seed, seed, 1.0) for seed in range(3)]
    assert compare(drawn, drawn[::-1], "auroc_mean", bootstrap=Bootstrap(300)).per_seed == (0, 0, 0)


def test_fine_tuning_seeds_that_differ_are_not_paired() -> None:
    world = World("dice", 4, paired=False, shared_sd=0.05, tuning_sd=0.0)
    a, b = simulated(world, rng("unpaired"))
    result = compare(a, b, "dice", bootstrap=Bootstrap(400))
    assert (result.units, result.basis, result.per_seed) == (4, "seeds and patients", ())
    paired = compare(*simulated(World("dice", 4, shared_sd=0.05, tuning_sd=0.0), rng("unpaired")), "dice", bootstrap=Bootstrap(400))
    assert paired.seed_variance < 0.1 * result.seed_variance
    # A seed that one side alone has is in no pair.
    less = compare(a, [replace(cell, seed=cell.seed - 1000) for cell in b[:3]], "dice", bootstrap=Bootstrap(400))
    assert len(less.per_seed) == less.units == 3


@given(st.integers(0, 10_000), st.sampled_from(["dice", "auroc_mean"]), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_comparison_turned_round_is_its_mirror_image(seed: int, metric: str, pretraining: int, seeds: int) -> None:
    a, b = simulated(World(metric, seeds, pretraining, patients=20, images=2, pretraining_sd=0.01), rng("mirror", seed))
    one, other = (compare(x, y, metric, bootstrap=Bootstrap(40, seed)) for x, y in ((a, b), (b, a)))
    assert (one.estimate, one.low, one.high) == pytest.approx((-other.estimate, -other.high, -other.low), rel=1e-9)
    assert (one.p, one.df, one.se) == pytest.approx((other.p, other.df, other.se), rel=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_other_names_for_patients_change_nothing(seed: int) -> None:
    draw = rng("names", seed)
    a, b = simulated(World(patients=20, images=2), draw)
    names = draw.permutation(20).astype(str).astype(object)

    def renamed(cells: list[Scores]) -> list[Scores]:
        return [replace(cell, patient_N=names[cell.patient_N.astype(int)]) for cell in cells]

    held, again = (compare(*sides, "auroc_mean", bootstrap=Bootstrap(50)) for sides in ((a, b), (renamed(a), renamed(b))))
    assert held == again


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12), st.randoms())
def test_holm_is_monotone_and_knows_no_order(p: list[float], random: Random) -> None:
    adjusted = holm(p)
    known = sorted((raw, done) for raw, done in zip(p, adjusted, strict=True) if not math.isnan(raw))
    assert all(raw <= done <= 1 for raw, done in known)
    assert all(earlier[1] <= later[1] for earlier, later in pairwise(known))
    order = list(range(len(p)))
    random.shuffle(order)
    assert np.array_equal(holm([p[i] for i in order]), [adjusted[i] for i in order], equal_nan=True)


def test_interaction_of_seeds_with_patients_is_counted_once() -> None:
    """Where all variance is of seeds with patients, it stands with the seeds and nothing is left for patients."""
    world = World("dice", 6, patients=200, tuning_sd=0.0, mistakes=(0.4, 0.0, 0.0, 0.6))
    found = [compare(*simulated(world, rng("once", i)), "dice", bootstrap=Bootstrap(200, i)) for i in range(40)]
    truth = 2 * world.spread**2 * 0.6 / (6 * 200)
    assert np.mean([c.seed_variance for c in found]) == pytest.approx(truth, rel=0.25)  # 40 estimates of 5 degrees of freedom each
    assert np.mean([c.patient_variance for c in found]) < 0.1 * truth


def test_welch_over_fine_tuning_seeds_declares_of_methods_what_is_of_checkpoints() -> None:
    """Checkpoints spread as much as seeds: one of each of two equal methods differ in half of the studies, and by no fault of Welch's."""
    declared = worded = 0
    for number in range(80):
        world = World("dice", 10, 1, False, patients=200, pretraining_sd=0.02, tuning_sd=0.02, spread=0.02)
        a, b = simulated(world, rng("one checkpoint", number))
        values = [[float(np.mean(cell.dice_N)) for cell in side if cell.dice_N is not None] for side in (a, b)]
        declared += stats.ttest_ind(*values, equal_var=False).pvalue < 0.05
        result = compare(a, b, "dice", bootstrap=Bootstrap(60, number))
        worded += result.excludes_zero and result.about == "methods"
    # |t| of 20 seeds over sqrt(11): 0.52 of studies; 24 to 59 of 80 are within 4 standard deviations.
    assert 24 <= declared <= 59
    assert worded == 0


def test_three_checkpoints_of_equal_methods_are_rarely_told_apart() -> None:
    world = World("dice", 2, 3, False, patients=100, pretraining_sd=0.02, tuning_sd=0.0, both_sd=0.02, spread=0.02)
    found = [compare(*simulated(world, rng("methods", i)), "dice", bootstrap=Bootstrap(60, i)) for i in range(100)]
    assert {c.about for c in found} == {"methods"}
    # At a true rate of 5 %, more than 11 of 100 come up once in 200 times.
    assert sum(c.excludes_zero for c in found) <= 11


def test_equal_scores_give_a_zero_interval_and_other_images_are_refused() -> None:
    draw = rng("equal")
    target = (draw.random((50, 1)) < 0.5).astype(float)
    same = [made(s, target + 0.1, target, np.arange(50)) for s in range(3)]
    result = compare(same, same, "auroc_mean", bootstrap=Bootstrap(100))
    assert (result.estimate, result.low, result.high, result.p) == (0, 0, 0, 1)
    assert not result.excludes_zero
    other = [made(s, target[:40], target[:40], np.arange(40)) for s in range(3)]
    assert compare(same, other, "auroc_mean").basis == "not comparable"
    assert compare(same, [], "auroc_mean").basis == "not comparable"
    nan = [made(s, target, np.zeros((50, 1)), np.arange(50)) for s in range(3)]
    assert compare(nan, nan, "auroc_mean", bootstrap=Bootstrap(50)).basis == "not comparable"


def dice(seed: int, value_N: np.ndarray, pre: int = 0) -> Scores:
    ids: Any = np.arange(len(value_N))
    return Scores(seed, ids, ids.astype(str).astype(object), None, None, value_N, None, pre)


def test_does_not_repeat_degrees_of_freedom_of_a_variance_from_rounding() -> None:
    """A part of 1e-34 beside one of 1e-4: the quantile is that of the larger, and its root is not looked for beyond the ends."""
    for part in (1e-34, 1e-30, 1e-22):
        for tail in (0.025, 0.05, 0.0005):
            assert Parts(part, 2, 1e-4, 99).df(tail) == pytest.approx(99, rel=1e-3)
            assert Parts(1e-4, 2, part, 99).df(tail) == pytest.approx(2, rel=1e-3)


def test_does_not_repeat_p_values_from_the_rounding_of_identical_seeds() -> None:
    """Seeds that do not vary: nothing among them, and of patients that are alike nothing either."""
    draw = rng("identical")
    value = draw.random(80)
    a, b = [dice(s, np.clip(value + 0.1, 0, 1)) for s in range(3)], [dice(s, value) for s in range(3)]
    result = compare(a, b, "dice", bootstrap=Bootstrap(100))
    assert result.seed_variance == 0
    assert result.df == 79
    shifted = [dice(s, value * (1 + s * 1e-16) + 0.1) for s in range(3)]  # the same difference on every image
    constant = compare(shifted, b, "dice", bootstrap=Bootstrap(100))
    assert (constant.se, constant.p) == (0, 1)
    assert not constant.excludes_zero


def test_does_not_repeat_certainty_from_scores_at_a_bound() -> None:
    """Both sides right on every image, by other scores: no variance was seen, which is not that there is none."""
    draw = rng("bound")
    target = (draw.random((60, 1)) < 0.5).astype(float)
    a, b = ([made(s, target + 0.1 * draw.random((60, 1)), target, np.arange(60)) for s in range(3)] for _ in range(2))
    result = compare(a, b, "auroc_mean", bootstrap=Bootstrap(100))
    assert (result.estimate, result.se, result.p) == (0, 0, 1)
    assert (result.low, result.high) == (-math.inf, math.inf)
    assert result.why == "both at a bound: patients and seeds do not vary"
    whole = [dice(s, np.ones(60)) for s in range(3)]
    assert math.isinf(compare(whole, [dice(s, np.ones(60)) for s in range(3)], "dice", bootstrap=Bootstrap(100)).width)


@pytest.mark.parametrize("level", [0.95, 0.995, 0.999])
@pytest.mark.parametrize(("seeds_df", "most"), [(1, 98.7), (2, 96.7), (4, 95.8), (9, 95.4)])
def test_the_interval_holds_its_level_whatever_part_is_of_seeds(seeds_df: int, most: float, level: float) -> None:
    """By integration over what is found of the seeds' variance, for an estimate that is normal: at Holm's steps too, and not much wider."""
    found_K = stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, seeds_df) / seeds_df
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
        seeds_K = share * found_K
        half_K = critical(seeds_K, seeds_df, 1 - share, 119, 0.5 - level / 2) * np.sqrt(seeds_K + 1 - share)
        misses = 2 * float(stats.norm.sf(half_K).mean())
        assert misses <= 1.03 * (1 - level)
        assert level > 0.95 or 100 * (1 - misses) < most


def test_the_parts_of_a_comparison_give_its_interval_and_its_p() -> None:
    a, b = simulated(World("dice", 3, patients=60), rng("parts"))
    result = compare(a, b, "dice", bootstrap=Bootstrap(100))
    assert result.parts.critical(0.025) * result.se == pytest.approx(result.high - result.estimate)
    assert result.parts.p(abs(result.estimate) / result.se) == pytest.approx(result.p)
    assert result.parts.seeds_df == pytest.approx(2)


def test_does_not_repeat_pretraining_seeds_of_cells_that_are_left_out() -> None:
    """Two of three checkpoints have a partner: a seed that only one side has is in no pair, and counts for nothing."""
    draw = rng("unpaired")
    a = [dice(s, draw.random(40), pre=s) for s in range(4)]
    b = [dice(s, draw.random(40), pre=s) for s in (0, 1, 7, 8)]
    result = compare(a, b, "dice", bootstrap=Bootstrap(50))
    assert (result.units, result.pretraining_seeds) == (2, 2)
    assert result.about == "encoders (these weights)"


def test_holm_is_in_order_monotone_and_blind_to_nan() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.01, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert holm([]) == []


@pytest.mark.parametrize(("se", "df"), [(0.02, 2.3), (0.01, 40.0)])
def test_a_detectable_difference_is_found_in_four_of_five_repetitions(se: float, df: float) -> None:
    result = Comparison(0, 0, 0, se, df, 1, "seeds and patients")
    effect = result.detectable
    draw = rng("power", int(df))
    t = (effect + draw.normal(0, se, 40_000)) / (se * np.sqrt(draw.chisquare(df, 40_000) / df))
    assert np.mean(np.abs(t) > stats.t.ppf(0.975, df)) == pytest.approx(0.8, abs=0.02)
    assert math.isnan(Comparison(0, 0, 0, 0.0, math.nan, 1, "patients only").detectable)
