"""Steps to a threshold on curves whose answer is known; what never got there is said to be so; the command on a made study."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_study import make
from test_cluster_cli import Allograft, allograft

from analysis import study_floors
from analysis.convergence import (
    Curve,
    area,
    common_threshold,
    curves_of,
    first_reach,
    marginal,
    median,
    reached,
    shown,
    speedup,
    untrained,
)
from analysis.correlation import _interval, correlation, pearson
from analysis.evidence import floors_of, gather
from analysis.floors import Floors
from analysis.layers import against_random, start_against_end
from analysis.replicates import Bootstrap
from analysis.results import finished
from base.errors import RequestError
from base.seeds import rng
from cluster.convergence import compared

__all__ = ["allograft"]  # a fixture


def curve(source: str, tau: float, every: int, end: int, strategy: str = "full", seed: int = 0, group: str = "task") -> Curve:
    at = np.arange(every, end + 1, every, dtype=float)
    return Curve((group, "test_resnet", "1", "32"), source, strategy, seed, "auroc_mean", at, 1 - np.exp(-at / tau))


@given(st.floats(1, 500), st.floats(0.05, 0.95), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_steps_are_those_of_the_oracle(tau: float, threshold: float, every: int) -> None:
    """metric(t) = 1 - exp(-t / tau), evaluated every so often: -tau log(1 - threshold), rounded up to an evaluation."""
    exact = -tau * math.log(1 - threshold)
    expected = math.ceil(round(exact / every, 9)) * every
    held = curve("x", tau, every, max(2 * every, 2 * expected))
    assert first_reach(held.at_T, held.value_T, threshold - 1e-12) == max(every, expected)


def test_a_run_that_never_gets_there_is_censored_and_never_a_number() -> None:
    slow = [curve("random", 400, 10, 100, seed=seed) for seed in range(3)]
    fast = [curve("simclr", 50, 10, 200, seed=seed) for seed in range(3)]
    rows = reached([*slow, *fast], 0.6)
    random, simclr = rows
    assert random.words() == ">100"
    assert random.censored == 3
    assert simclr.words() == "50"
    assert simclr.speedup.words().startswith(">2.00 [2.00, more]")
    assert math.isinf(simclr.speedup.high)
    assert shown(math.inf, 100) == ">100"
    assert reached([*slow, *fast], 0.999)[1].speedup.words() == "-"
    other = reached([*slow, *fast], 0.6, base="simclr")
    assert other[0].speedup.sign == "<"
    assert other[0].speedup.ratio == 0.5
    assert (other[0].speedup.low, other[0].speedup.high) == (0, 0.5)


def test_half_censored_has_a_censored_median() -> None:
    runs = [curve("random", tau, 10, 100, seed=seed) for seed, tau in enumerate((20, 30, 400, 400))]
    assert reached(runs, 0.6)[0].words() == ">100"
    assert reached(runs[:3], 0.6)[0].words() == "30"


def test_runs_of_several_pretraining_seeds_do_not_take_one_anothers_place() -> None:
    runs = [replace(curve("simclr", tau, 1, 40, seed=seed), source_seed=r) for r, tau in ((0, 5.0), (1, 50.0)) for seed in (0, 1)]
    (row,) = reached(runs, 0.5)
    assert row.steps == {(0, 0): 4, (0, 1): 4, (1, 0): 35, (1, 1): 35}
    assert row.ends == dict.fromkeys(row.steps, 40)


def test_a_run_that_stopped_early_bounds_no_more_than_its_own_end() -> None:
    """Two random runs stopped for want of patience at 5, one reached at 19 of 20: of their median only that it is above 5 is known."""
    random = [curve("random", 400, 1, 5, seed=0), curve("random", 20.5, 1, 20, seed=1), curve("random", 400, 1, 5, seed=2)]
    source = [curve("simclr", 4.3, 1, 20, seed=seed) for seed in range(3)]
    one, other = reached([*random, *source], 0.6)
    assert one.steps == {(0, 0): math.inf, (0, 1): 19, (0, 2): math.inf}
    assert one.ends == {(0, 0): 5, (0, 1): 20, (0, 2): 5}
    assert one.words() == ">5"
    assert math.isinf(one.median)
    assert other.words() == "4"
    assert (other.speedup.ratio, other.speedup.sign) == (5 / 4, ">")
    assert other.speedup.words() == ">1.25 [1.25, more]"
    # The other way round: no more than 4/5 as fast.
    assert reached([*random, *source], 0.6, base="simclr")[0].speedup.words() == "<0.80 [0.00, 0.80]"


@pytest.mark.parametrize(
    ("steps", "ends", "words"),
    [
        ((4, 5, 6), (20, 20, 20), "5"),
        ((math.inf, 19, 21), (5, 20, 30), ">=19, <=21"),  # the one that stopped at 5 would have got there before 19, or after 21
        ((math.inf, 19, math.inf), (5, 20, 30), ">=19"),
        ((math.inf, 3, math.inf), (3, 20, 3), ">3"),
        ((math.inf, math.inf, math.inf), (5, 9, 30), ">9"),
        ((0, 0, math.inf), (9, 9, 9), "0"),
    ],
)
def test_a_median_is_told_as_far_as_it_is_known(steps: tuple[float, ...], ends: tuple[float, ...], words: str) -> None:
    assert median(steps, ends).words() == words


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=7), st.data())
@settings(max_examples=200, deadline=None)
def test_bounds_of_a_median_hold_whatever_censored_runs_would_have_taken(runs: list[tuple[int, bool]], data: st.DataObject) -> None:
    found = median([math.inf if lost else at for at, lost in runs], [at for at, _ in runs])
    least = sorted(at + 0.5 * lost for at, lost in runs)[len(runs) // 2]
    assert found.low == least - 0.5 * found.above  # attained but for `above`: no wider than it must be
    true = sorted(at + (data.draw(st.integers(1, 20)) if lost else 0) for at, lost in runs)[len(runs) // 2]
    assert found.low <= true <= found.high
    assert true > found.low or not found.above


def test_a_source_that_stands_there_at_step_0_is_unboundedly_faster() -> None:
    found = speedup([4, 5, 6], [0, 0, 0], 10, 10)
    assert math.isinf(found.ratio)
    assert found.sign == ">"
    assert found.words() == "unbounded"
    assert speedup([0, 0, 0], [4, 5, 6], 10, 10).words() == "0.00 [0.00, 0.00]"
    assert speedup([0, 0, 0], [0, 0, 0], 10, 10).words() == "-"
    # A source whose median may be 0: of three draws two or more are its zero in 7 of 27 cases, and are left out.
    part = speedup([0, 0, 0], [0, math.inf, math.inf], 10, 10)
    assert (part.ratio, part.sign, part.low, part.high) == (0, "", 0, 0)
    assert part.undefined == pytest.approx(7 / 27, abs=0.03)
    assert speedup([4, 5], [0, 0], 10, 10).words() == "unbounded"


@pytest.mark.filterwarnings("error")
def test_draws_of_0_over_0_are_left_out_and_counted() -> None:
    found = speedup([0, 4, 5], [0, 1, 1], 10, 10)
    assert found.ratio == 4
    assert (found.low, found.high) == (0, math.inf)
    # Two zeros of three draws on either side, 7 of 27 each.
    assert found.undefined == pytest.approx((7 / 27) ** 2, abs=0.02)
    assert found.words() == f"4.00 [0.00, more; {found.undefined:.0%} of draws 0/0]"


def test_speed_up_covers_the_true_ratio() -> None:
    draw, inside = rng("speed-up test"), 0
    for i in range(60):
        base, own = (np.exp(draw.normal(math.log(centre), 0.2, 9)).tolist() for centre in (300, 100))
        found = speedup(base, own, 1e9, 1e9, replicates=300, seed=i)
        inside += found.low <= 3 <= found.high
    assert inside >= 52  # of 60: 95 % but for three standard errors
    few = speedup([10, 20], [5, 5], 100, 100)
    assert few.words() == "4.00"
    assert math.isnan(few.low)


def test_a_pair_of_censored_medians_widens_the_interval_on_both_ends() -> None:
    found = speedup([10, 10, math.inf], [5, 5, math.inf], 100, 100)
    assert found.ratio == 2
    assert found.low == 0
    assert math.isinf(found.high)
    assert found.words() == "2.00 [0.00, more]"


def test_area_is_of_the_best_so_far_up_to_a_shared_horizon() -> None:
    at = np.array([1.0, 2.0, 3.0])
    assert area(at, np.array([0.5, 0.8, 0.6]), 3) == pytest.approx((0.5 + 0.8) / 2)
    assert area(at, np.array([0.5, 0.8, 0.6]), 5) == pytest.approx((0.5 + 3 * 0.8) / 4)
    assert area(at[:1], np.array([0.5]), 1) == 0.5


def test_the_threshold_is_what_the_typical_run_of_each_reaches() -> None:
    sides = [curve("a", 10, 1, end, seed=seed) for seed, end in enumerate((5, 10, 30))], [curve("b", 10, 1, 40)]
    assert common_threshold(sides) == pytest.approx(1 - math.exp(-1))
    assert all(math.isfinite(row.median) for row in reached([*sides[0], *sides[1]], common_threshold(sides)))
    with pytest.raises(RequestError, match="no finished cell has a learning curve"):
        common_threshold([])
    with pytest.raises(RequestError, match="one threshold is for one task"):
        reached([curve("a", 1, 1, 3), curve("a", 1, 1, 3, group="other")], 0.5)


@pytest.mark.parametrize(
    ("level", "untrained", "why"),
    [
        (0.6, (), ""),
        (0.6, ((math.nan, "a floor"), (0.5, "chance")), ""),
        (0.45, ((0.5, "chance"), (0.7, "a floor")), "chance, 0.5"),
        (0.6, ((0.5, "chance"), (0.7, "a floor")), "a floor, 0.7"),
        (0.02, (), "the first evaluation of random, full, 0.02469"),
    ],
)
def test_does_not_repeat_a_speed_up_to_what_takes_no_training(level: float, untrained: Any, why: str) -> None:
    slow, fast = ([curve(name, tau, 10, 100, seed=seed) for seed in range(3)] for name, tau in (("random", 400), ("simclr", 50)))
    base, other = reached([*slow, *fast], level, untrained=untrained)
    assert (base.why, other.why) == ("", why)
    assert (other.speedup.words() == "-") is bool(why)


def test_the_transfusion_curve_gives_each_block_what_was_planted() -> None:
    rows = marginal(["none", "stem", "layer1", "all"], [100, 60, 50, 50])
    assert [row.gain for row in rows[1:]] == [40, 10, 0]
    assert [row.share for row in rows[1:]] == pytest.approx([0.8, 0.2, 0])
    censored = marginal(["none", "stem", "all"], [math.inf, 60, 50])
    assert math.isnan(censored[1].gain)
    assert censored[2].gain == 10
    assert math.isnan(censored[2].share)


# -- groups of runs


def test_similarity_at_the_start_against_the_end_is_1_on_copies_and_chance_on_noise() -> None:
    draw = rng("pairs")
    runs = list("abcdef")
    start = {pair: float(draw.random()) for pair in itertools.combinations(runs, 2)}
    assert start_against_end(start, start, runs).r_squared.estimate == pytest.approx(1)
    assert math.isnan(start_against_end(start, start, runs).r_squared.low)  # an interval of a perfect line would have no width
    noise = {(b, a): float(draw.random()) for a, b in start}  # pairs in the other order are the same pairs
    found = start_against_end(start, noise, runs)
    assert found.r_squared.estimate < 0.3
    assert found.r_squared.low < 0.1
    assert math.isnan(pearson([1, 1, 1], [1, 2, 3]))
    with pytest.raises(RequestError, match="1 pairs of runs with different starting weights"):
        start_against_end(start, start, runs[:2])
    # Runs of one source share their beginning: those pairs are left out, and do not make a line of two clouds.
    shared = {pair: 1.0 if set(pair) <= {"a", "b", "c"} else value for pair, value in start.items()}
    ends = {pair: 0.9 if set(pair) <= {"a", "b", "c"} else value for pair, value in noise.items()}
    left = start_against_end(shared, ends, runs)
    assert left.same == 3
    assert len(left.pairs) == 12


@pytest.mark.parametrize(("starts", "of_each"), [(5, 1), (8, 1), (5, 2)])
@pytest.mark.parametrize("correlated", [0.0, 0.5, 0.9])
def test_intervals_of_r_squared_hold_what_further_runs_would_show(starts: int, of_each: int, correlated: float) -> None:
    """Starts with an offset of their own in both similarities, which two runs of one share. Also where nothing goes together."""
    draw, studies, held = rng("coverage of R squared", starts, of_each), 300, 0
    runs = [(i, j) for i in range(starts) for j in range(of_each)]
    names = [f"{i}.{j}" for i, j in runs]
    for _ in range(studies):
        x, y = draw.multivariate_normal([0, 0], [[1, correlated], [correlated, 1]], starts).T * 0.05
        before, after = {}, {}
        for (one, (a, _)), (other, (b, _)) in itertools.combinations(zip(names, runs, strict=True), 2):
            before[one, other] = 1.0 if a == b else 0.5 + x[a] + x[b]
            after[one, other] = 0.5 + y[a] + y[b] + draw.normal(0, 0.015)
        found = start_against_end(before, after, names).r_squared
        held += found.low <= (2 * correlated) ** 2 / (2 * 2.09) <= found.high
    assert held >= 0.93 * studies


def test_pretrained_against_random_finds_what_was_planted_and_no_more() -> None:
    draw = rng("groups")
    p, r = [f"p{i}" for i in range(4)], [f"r{i}" for i in range(4)]
    offset = dict(zip(p + r, draw.normal(0, 0.02, 8), strict=True))  # a run's own: pairs that share it are not independent
    values = {(a, b): 0.6 + offset[a] + offset[b] - (0.1 if a in p and b in r else 0) for a, b in itertools.combinations(p + r, 2)}
    found = against_random(p, r, values)
    assert found.difference.low <= -0.1 <= found.difference.high
    assert found.difference.high < 0
    assert found.random_random.estimate > found.pretrained_random.estimate
    same = {pair: value + (0.1 if pair[0] in p and pair[1] in r else 0) for pair, value in values.items()}
    assert against_random(p, r, same).difference.low <= 0 <= against_random(p, r, same).difference.high
    assert math.isnan(against_random(p[:2], r, values).difference.low)
    with pytest.raises(RequestError, match="1 random runs"):
        against_random(p, r[:1], values)


@pytest.mark.parametrize("runs", [3, 5])
def test_intervals_of_similarity_to_random_hold_what_further_runs_would_show(runs: int) -> None:
    """Runs with an offset of their own, which all their pairs share, and noise of the pairs."""
    draw, studies = rng("coverage of runs", runs), 1000
    p, r = [f"p{i}" for i in range(runs)], [f"r{i}" for i in range(runs)]
    truth, held = (0.5, 0.6, -0.1), [0, 0, 0]
    for _ in range(studies):
        offset = dict(zip(p + r, draw.normal(0, 0.02, 2 * runs), strict=True))
        values = {
            (a, b): (0.5 if a in p and b in r else 0.6) + offset[a] + offset[b] + draw.normal(0, 0.005)
            for a, b in itertools.combinations(p + r, 2)
        }
        found = against_random(p, r, values)
        intervals = (found.pretrained_random, found.random_random, found.difference)
        held = [count + (one.low <= true <= one.high) for count, one, true in zip(held, intervals, truth, strict=True)]
    assert min(held) >= 0.93 * studies
    assert held[1] <= 0.97 * studies  # of one kind of run: no wider than it has to be


def test_spearman_agrees_with_all_permutations() -> None:
    x, y = [1.0, 2, 3, 4, 5], [0.70, 0.72, 0.71, 0.75, 0.78]
    found = correlation(x, y)
    assert found.rho.estimate == pytest.approx(0.9)
    order = [np.corrcoef(np.argsort(np.argsort(p)), np.argsort(np.argsort(y)))[0, 1] for p in itertools.permutations(x)]
    assert found.p == pytest.approx(np.mean(np.abs(order) > 0.9 - 1e-9))
    assert found.n == 5
    assert math.isnan(correlation([1, 2, math.nan], [1, 2, 3]).rho.estimate)


@pytest.mark.parametrize(("n", "least"), [(3, "0.33"), (4, "0.083")])
def test_spearman_that_no_order_could_bring_under_5_percent_is_refused(n: int, least: str) -> None:
    found = correlation(range(n), range(n))
    assert math.isnan(found.p)
    assert found.why == f"refused: of these {n} sources the smallest p is {least}"
    assert found.rho.estimate == pytest.approx(1)
    assert correlation(range(5), range(5)).p == pytest.approx(2 / 120)
    tied = correlation([1, 1, 1, 1, 2], [1, 1, 1, 1, 2])
    assert (math.isnan(tied.p), tied.why.endswith("is 0.4")) == (True, True)


def test_spearman_has_an_interval_only_where_one_says_something() -> None:
    """Of four to seven sources Fisher's transformation is no guide, and a perfect order has an interval of no width."""
    four = correlation([1, 2, 3, 4], [1, 2, 3, 4])
    assert four.rho.words() == "1.000"
    assert correlation([1, 2, 3, 4], [2, 1, 3, 4]).rho.words() == "0.800"
    for n, rho in itertools.product((4, 7, 8, 12), (-1.0, -0.5, 0.9, 1.0)):
        one = _interval(rho, n)
        if n >= 8 and abs(rho) < 1:
            assert -1 < one.low < rho < one.high < 1
        else:
            assert math.isnan(one.low)
            assert math.isnan(one.high)


# -- the command


def study(out: Path, taus: dict[tuple[str, str, str], float], epochs: int = 20, seeds: int = 3) -> Path:
    """A finished study by its files: (source, strategy, options) -> how slowly it learns."""
    out.mkdir()
    (out / "study.yaml").write_text("study: made\n")
    for n, ((source, strategy, options), tau) in enumerate(taus.items()):
        for seed in range(seeds):
            cell = out / "cells" / f"{n}{seed}"
            cell.mkdir(parents=True)
            values = [0.5 + 0.4 * (1 - math.exp(-epoch / (tau * (1 + 0.1 * seed)))) for epoch in range(1, epochs + 1)]
            rows = [{"epoch": i, "val_auroc_mean": value, "seconds": 2.0} for i, value in enumerate(values, 1)]
            (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            result = {"key": f"{n}{seed}", "source": source, "strategy": strategy, "options": json.loads(options), "seed": seed}
            result |= {"task": "phantom-chest", "dataset": "phantom-chest", "architecture": "resnet18", "fraction": 1.0, "resolution": 32}
            result |= {"selection": {"metric": "auroc_mean"}, "role": "cell", "source_seed": 0}
            result["metrics"] = [{"split": "test", "class": "", "metric": "auroc_mean", "unit": "fraction", "value": values[-1], "n": 9}]
            (cell / "result.json").write_text(json.dumps(result))
    return out


TAUS = {
    ("random", "full", "{}"): 8.0,
    ("pretrain:simclr", "full", "{}"): 2.0,
    ("pretrain:moco", "full", "{}"): 4.0,
    ("pretrain:simclr", "transfusion", '{"cut": "layer1"}'): 4.0,
    ("pretrain:simclr", "transfusion", '{"cut": "stem"}'): 6.0,
    ("pretrain:simclr", "transfusion", '{"cut": "layer3"}'): 2.0,
}


def test_the_command_says_and_draws_it(tmp_path: Path, allograft: Allograft) -> None:
    out = study(tmp_path / "study", TAUS)
    accuracies = tmp_path / "accuracy.csv"
    accuracies.write_text("source,accuracy\nrandom,0.1\nsimclr,0.7\nmoco,0.6\n")
    words = ["analyze", "convergence", str(out), "--threshold", "0.85", "--accuracy", str(accuracies), "--out", str(tmp_path / "made")]
    said = allograft(*words)
    assert said.code == 0, said.err
    frame = pd.read_csv(tmp_path / "made" / "convergence.csv").set_index(["source", "strategy"])
    full = frame.xs("full", level="strategy")
    # Epochs are -tau log(1 - 0.35 / 0.4), rounded up; of seeds with tau, 1.1 tau, 1.2 tau the median.
    assert full.loc["simclr", "median"] == math.ceil(-2.2 * math.log(0.125))
    assert full.loc["random", "median"] == math.ceil(-8.8 * math.log(0.125))
    assert full.loc["random", "censored"] == 0
    depths = pd.read_csv(tmp_path / "made" / "depths.csv")
    assert depths["depth"].tolist() == ["none", "stem", "layer1", "layer3", "all"]
    assert depths["steps"].tolist() == [math.ceil(-1.1 * tau * math.log(0.125)) for tau in (8, 6, 4, 2, 2)]
    assert depths["share"].sum() == pytest.approx(1)
    assert "Spearman" in said.out
    for name in ("curves", "steps", "simclr-depths"):
        held = cv2.imread(str(tmp_path / "made" / f"phantom-chest-resnet18-1-32-auroc_mean-{name}.png"))
        assert held is not None
        assert held.std() > 5
    again = allograft("analyze", "convergence", str(out), "--threshold", "0.89", "--out", str(tmp_path / "high"))
    assert ">20" in again.out
    runs = pd.read_csv(tmp_path / "high" / "runs.csv")
    censored = runs[~runs["reached"]]
    assert len(censored)
    assert censored["at"].isna().all()
    assert set(censored["shown"]) == {">20"}


def test_random_weights_are_the_base_by_what_they_are(tmp_path: Path, allograft: Allograft) -> None:
    """Named by their configuration, whatever the study calls them; without any, no speed-up is given and that is said."""
    out = study(tmp_path / "study", {("noise", "full", "{}"): 8.0, ("pretrain:simclr", "full", "{}"): 2.0})
    words = ["analyze", "convergence", str(out), "--threshold", "0.85", "--out"]
    said = allograft(*words, str(tmp_path / "without"))
    assert said.code == 0, said.err
    assert "No learning curve of random, which speed-ups are over" in said.out
    for cell in (out / "cells").iterdir():
        kind = "random" if cell.name.startswith("0") else "weights"
        (cell / "config.yaml").write_text(f"source_kind: {kind}\n")
    said = allograft(*words, str(tmp_path / "made"))
    assert "No learning curve" not in said.out
    assert "times faster than noise" in said.out
    summary = pd.read_csv(tmp_path / "made" / "convergence.csv").set_index("source")
    assert summary.loc["simclr", "speedup"] == pytest.approx(19 / 5)


def ranked(out: Path, changes: dict[str, dict[str, Any]], table: str, allograft: Allograft) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Points and rank correlations of a study whose cells, by the start of their key, are given other axes and results."""
    for key, change in changes.items():
        for file in (out / "cells").glob(f"{key}?/result.json"):
            held = json.loads(file.read_text())
            held["metrics"][0]["value"] = change.pop("value", held["metrics"][0]["value"])
            file.write_text(json.dumps(held | change))
    (out / "table.csv").write_text(table)
    said = allograft("analyze", "convergence", str(out), "--accuracy", str(out / "table.csv"), "--out", str(out / "made"))
    assert said.code == 0, said.err
    return pd.read_csv(out / "made" / "accuracy.csv"), pd.read_csv(out / "made" / "correlation.csv")


def test_accuracy_is_held_against_results_of_one_share_of_the_labels(tmp_path: Path, allograft: Allograft) -> None:
    """A source with all labels alone must not stand beside means over shares."""
    sources = ("random", "pretrain:simclr", "pretrain:moco")
    out = study(
        tmp_path / "study", {(source, "full", "{}"): 4.0 for source in sources} | {(s, "full", "{ }"): 4.0 for s in sources[:2]}, seeds=1
    )
    few = {"fraction": 0.05}
    changes = {"0": {"value": 0.7}, "1": {"value": 0.8}, "2": {"value": 0.9}, "3": {**few, "value": 0.1}, "4": {**few, "value": 0.2}}
    points, ranks = ranked(out, changes, "source,accuracy\nrandom,0.1\nsimclr,0.6\nmoco,0.7\n", allograft)
    assert ranks["setting"].tolist() == ["phantom-chest, resnet18, 32 px, full"]  # of 5 % only two sources are there
    assert dict(zip(points["source"], points["value"], strict=True)) == {"random": 0.7, "simclr": 0.8, "moco": 0.9}
    assert ranks["Spearman"].tolist() == [1.0]


def test_sources_without_an_accuracy_or_with_a_seed_that_diverged_are_in_no_order(tmp_path: Path, allograft: Allograft) -> None:
    sources = ("pretrain:moco", "random", "pretrain:simclr", "one", "two")
    out = study(tmp_path / "study", {(source, "full", "{}"): 4.0 for source in sources}, seeds=2)
    diverged = out / "cells" / "00" / "result.json"  # the first of all
    held = json.loads(diverged.read_text())
    diverged.write_text(json.dumps(held | {"metrics": [row | {"value": None} for row in held["metrics"]]}))
    points, ranks = ranked(out, {}, "source,accuracy\nrandom,0.1\nsimclr,0.6\nmoco,0.7\none,0.2\ntwo,\n", allograft)
    assert set(points["source"]) == {"random", "simclr", "one"}
    assert ranks["sources"].tolist() == [3]


def test_cells_that_prove_nothing_are_in_no_order_of_sources(tmp_path: Path, allograft: Allograft) -> None:
    sources = ("random", "pretrain:simclr", "pretrain:moco", "saw-labels", "saw-images")
    out = study(tmp_path / "study", {(source, "full", "{}"): 4.0 for source in sources}, seeds=1)
    changes: dict[str, dict[str, Any]] = {"3": {"own_source": True}, "4": {"exposed_to": ["nih-cxr14"]}}
    table = "source,accuracy\nrandom,0.1\nsimclr,0.6\nmoco,0.7\nsaw-labels,0.8\nsaw-images,0.9\n"
    points, _ = ranked(out, changes, table, allograft)
    assert set(points["source"]) == {"random", "simclr", "moco"}
    (out / "study.yaml").write_text((out / "study.yaml").read_text() + "exposed: ranked\n")
    points, _ = ranked(out, {}, table, allograft)
    assert set(points["source"]) == {"random", "simclr", "moco", "saw-images"}


def test_accuracies_of_one_source_in_several_architectures_are_one_order(tmp_path: Path, allograft: Allograft) -> None:
    out = study(tmp_path / "study", {("imagenet", "full", " " * n + "{}"): 4.0 for n in range(3)}, seeds=1)
    changes: dict[str, dict[str, Any]] = {
        str(n): {"architecture": name, "value": value}
        for n, (name, value) in enumerate((("resnet18", 0.8), ("resnet50", 0.7), ("densenet121", 0.9)))
    }
    table = "source,architecture,accuracy\nimagenet,resnet18,0.70\nimagenet,resnet50,0.76\nimagenet,densenet121,0.75\n"
    points, ranks = ranked(out, changes, table, allograft)
    assert dict(zip(points["source"], points["value"], strict=True)) == {
        "imagenet resnet18": 0.8,
        "imagenet resnet50": 0.7,
        "imagenet densenet121": 0.9,
    }
    assert ranks["setting"].tolist() == ["phantom-chest, all architectures, 32 px, full"]
    assert ranks["Spearman"].tolist() == [-0.5]
    assert ranks["sources"].tolist() == [3]


def test_the_command_shows_each_run_by_its_own_end(tmp_path: Path, allograft: Allograft) -> None:
    out = study(tmp_path / "study", {("random", "full", "{}"): 400.0, ("pretrain:simclr", "full", "{}"): 2.0}, epochs=20)
    for seed, kept in enumerate((5, 5, 20)):  # of the random runs two stopped early
        rows = out / "cells" / f"0{seed}" / "metrics.jsonl"
        rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:kept]))
    said = allograft("analyze", "convergence", str(out), "--threshold", "0.85", "--out", str(tmp_path / "made"))
    assert said.code == 0, said.err
    runs = pd.read_csv(tmp_path / "made" / "runs.csv")
    assert runs[runs["source"] == "random"]["shown"].tolist() == [">5", ">5", ">20"]
    summary = pd.read_csv(tmp_path / "made" / "convergence.csv").set_index("source")
    assert summary.loc["random", "median"] == ">5"
    assert summary.loc["simclr", "speedup_sign"] == ">"
    assert summary.loc["simclr", "speedup"] == pytest.approx(5 / float(str(summary.loc["simclr", "median"])))
    assert summary.loc["simclr", "speedup_undefined"] == 0


def test_does_not_repeat_a_threshold_set_by_a_strategy_that_is_not_compared(tmp_path: Path, allograft: Allograft) -> None:
    """Linear probes that end low are no reason to time full training at their level; a strategy that random weights were not given is
    timed with random weights trained whole, and a transfusion chain at one level."""
    taus = {("random", "full", "{}"): 8.0, ("pretrain:simclr", "full", "{}"): 2.0, ("pretrain:simclr", "gabor", "{}"): 30.0}
    taus |= {("random", "linear", "{}"): 90.0, ("pretrain:simclr", "linear", "{}"): 80.0}
    out = study(tmp_path / "study", taus)
    said = allograft("analyze", "convergence", str(out), "--out", str(tmp_path / "made"))
    assert said.code == 0, said.err

    def ends(tau: float) -> float:
        return 0.5 + 0.4 * (1 - math.exp(-20 / (1.1 * tau)))

    summary = pd.read_csv(tmp_path / "made" / "convergence.csv").set_index(["threshold", "source", "strategy"])
    found = {(strategy, source, round(level, 9)) for level, source, strategy in summary.index}
    levels = {name: round(ends(tau), 9) for name, tau in (("full", 8.0), ("linear", 90.0), ("gabor", 30.0))}
    expected = {(name, source, levels[name]) for name in ("full", "linear") for source in ("random", "simclr")}
    assert found == expected | {("gabor", "simclr", levels["gabor"]), ("full", "random", levels["gabor"])}
    chain = [curve(source, 5, 1, 9, strategy) for source, strategy in (("random", "full"), ("simclr", "full"), ("random", "linear"))]
    chain += [curve("simclr", 5, 1, 9, f"transfusion cut={cut}") for cut in ("stem", "layer1")]
    assert {name: len(held) for name, held in compared(chain, "random").items()} == {"full": 4, "linear": 2}


def test_does_not_repeat_a_speed_up_below_chance(tmp_path: Path, allograft: Allograft) -> None:
    """The common threshold is the lowest best value: that of a source which learned nothing."""
    out = study(tmp_path / "study", {("random", "full", "{}"): 8.0, ("pretrain:simclr", "full", "{}"): 2.0})
    for cell in (out / "cells").iterdir():
        rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
        for row in rows if cell.name.startswith("0") else ():
            row["val_auroc_mean"] -= 0.4
        (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        held = json.loads((cell / "result.json").read_text())
        (cell / "result.json").write_text(json.dumps({**held, "own_source": cell.name.startswith("1")}))
    said = allograft("analyze", "convergence", str(out), "--out", str(tmp_path / "made"))
    level = 0.1 + 0.4 * (1 - math.exp(-20 / 8.8))
    told = f"No speed-up over random, phantom-chest, resnet18, 32 px: the threshold of {level:.4g} is not above chance, 0.5."
    assert told in said.out
    summary = pd.read_csv(tmp_path / "made" / "convergence.csv").set_index("source")
    assert summary["speedup"].isna().all()
    assert (summary.loc["simclr", "why"], summary.loc["simclr", "apart"]) == ("chance, 0.5", "own source")
    assert "simclr (own source)  full" in said.out
    again = allograft("analyze", "convergence", str(out), "--threshold", "0.55", "--out", str(tmp_path / "high"))
    assert "No speed-up" not in again.out


def test_speed_ups_are_given_over_the_floors_that_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`analyze convergence` reads them and computes none; the floors of a study are kept by its report."""
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, seeds=2, images=40)
    asked: list[object] = []

    def computed(*of: object, **_: object) -> dict[float, list[Floors]]:
        asked.append(of)
        return {1.0: [{"pixels": {"auroc_mean": 0.9}}]}

    monkeypatch.setattr(study_floors, "of_shards", computed)
    assert floors_of(str(out), finished(str(out)), compute=False).values == {}
    assert asked == []
    held = {("phantom-chest", 1.0): {"pixels": {"auroc_mean": 0.9}}}
    assert floors_of(str(out), finished(str(out)), compute=True).values == held
    assert floors_of(str(out), finished(str(out)), compute=False).values == held
    assert gather(str(out), Bootstrap(20)).floors.values == held
    assert len(asked) == 1
    assert untrained("auroc_mean", held["phantom-chest", 1.0])[1] == (0.9, "a floor of test images (pixel logistic regression, 32 px)")


def test_floors_without_a_number_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, seeds=2, images=40)
    fits: list[Floors] = [{"pixels": {"auroc_mean": math.nan}, "record": {"auroc_mean": value}} for value in (0.6, 0.7)]
    monkeypatch.setattr(study_floors, "of_shards", lambda *_, **__: {1.0: fits})
    for _ in range(2):
        held = floors_of(str(out), finished(str(out)), compute=True)
        assert math.isnan(held.of("phantom-chest", 1.0)["pixels"]["auroc_mean"])
        assert held.of("phantom-chest", 1.0)["record"]["auroc_mean"] == pytest.approx(0.65)
        assert held.known == 2


def test_does_not_repeat_curves_marked_exposed_in_a_study_that_ranks_them(tmp_path: Path) -> None:
    out = study(tmp_path / "study", TAUS, epochs=3, seeds=1)
    for file in (out / "cells").glob("*/result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"exposed_to": ["nih-cxr14"]}))
    assert {curve.apart for curve in curves_of(finished(str(out)))} == {"exposed"}
    (out / "study.yaml").write_text("{study: x, exposed: ranked}\n")
    assert {curve.apart for curve in curves_of(finished(str(out)))} == {""}


def test_seconds_add_up_and_steps_are_refused_where_rows_have_none(tmp_path: Path) -> None:
    cells = finished(str(study(tmp_path / "study", TAUS, epochs=3, seeds=1)))
    assert curves_of(cells, "seconds")[0].at_T.tolist() == [2, 4, 6]
    with pytest.raises(RequestError, match=r"do not count steps.*--by epochs"):
        curves_of(cells, "steps")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/nowhere"], "no study here"),
        (["{empty}"], "no finished cell has a learning curve"),
        (["{study}", "--by", "epoch"], "did you mean 'epochs'"),
        (["{study}", "--accuracy", "/nowhere.csv"], "no such file"),
        (["{study}", "--accuracy", "{few}"], "fewer than three sources"),
        (["{study}", "--accuracy", "{blank}"], "No columns to parse from file"),
        (["{study}", "--accuracy", "{words}"], "Unable to parse string '70 %'"),
    ],
)
def test_bad_requests_end_with_2_and_one_line(words: list[str], says: str, tmp_path: Path, allograft: Allograft) -> None:
    places = {"empty": study(tmp_path / "empty", {}), "study": study(tmp_path / "study", TAUS, seeds=1)}
    for name, text in {"few": "source,accuracy\nsimclr,0.7\n", "blank": "", "words": "source,accuracy\nsimclr,70 %\n"}.items():
        places[name] = tmp_path / f"{name}.csv"
        places[name].write_text(text)
    said = allograft("analyze", "convergence", *(word.format(**places) for word in words), "--out", str(tmp_path / "out"))
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1
