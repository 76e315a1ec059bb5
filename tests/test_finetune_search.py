"""Searches for a rate and for a cut: what they ask for, and what they answer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.replicates import Scores, metric_B, resample
from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from base.seeds import rng
from encoders.cuts import cuts
from finetune.jackknife import error_row, patients_error
from finetune.search import Answer, Outcome, Results, Search, Trial, Tune, Way, answer, asked, cut_search, most_trials, propose, rate_search
from finetune.task import load_task

ARCHITECTURES = ["resnet50", "resnet18", "test_resnet", "densenet121", "inception_v3", "efficientnet_b0", "convnext_tiny", "cbr_larget"]
ARCHITECTURES += ["swin_tiny_patch4_window7_224", "vit_small_patch16_224"]
KINDS = ["two-stage", "halving", "random", "exhaustive"]


class Drawn(dict[str, float]):
    """A similarity for whatever cut is asked for."""

    def __missing__(self, name: str) -> float:
        return float(rng("similarity", int(self["seed"]), name).random())


def outcome(trial: Trial, seed: int, error: float = 0.01, diverge: float = 0.0) -> Outcome:
    """An outcome drawn from the trial alone, as a deterministic training would give it."""
    if trial.epochs == 0:
        return Outcome(math.nan, similarity=Drawn(seed=seed))
    draw = rng("outcome", str(trial), seed)
    value = math.nan if draw.random() < diverge else float(draw.normal(0.8, 0.03))
    return Outcome(value, error * float(draw.random()), 1000)


def run(search: Search, seed: int, order: int | None = None, **changes: float) -> tuple[Results, list[Trial]]:
    """Results until nothing is proposed; with an `order`, one trial at a time, drawn from those that are proposed."""
    results: dict[Trial, Outcome] = {}
    ran: list[Trial] = []
    draw = np.random.default_rng(order or 0)
    while trials := propose(search, results):
        chosen = trials if order is None else [trials[draw.integers(len(trials))]]
        results |= {trial: outcome(trial, seed, **changes) for trial in chosen}
        ran += chosen
    return results, ran


searches = st.builds(
    lambda kind, architecture, seeds, epochs, similarity: cut_search(
        kind, architecture, range(seeds), epochs, similarity if kind == "halving" else None
    ),
    st.sampled_from(KINDS),
    st.sampled_from(ARCHITECTURES),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([None, "auto"]),
)


@given(searches, st.integers(0, 1000))
def test_the_chosen_cut_is_the_first_within_one_standard_error_of_the_best(search: Search, seed: int) -> None:
    results, _ = run(search, seed)
    found = answer(search, results)
    full: dict[str | float, Any] = {point.at: point for point in found.curve if point.epochs is None}
    best = full[found.best]
    assert best.mean == max(point.mean for point in full.values())
    bar = best.mean - best.error
    assert full[found.choice].mean >= bar
    order = list(search.candidates)
    assert all(point.mean < bar for at, point in full.items() if order.index(at) < order.index(found.choice))


@given(searches, st.integers(0, 1000))
def test_no_search_takes_more_trials_than_trying_every_cut(search: Search, seed: int) -> None:
    results, ran = run(search, seed)
    found = answer(search, results)
    assert len(ran) == len(set(ran))
    assert sum(trial.epochs != 0 for trial in ran) == found.trials <= most_trials(search) <= found.exhaustive
    assert found.cost <= found.trials


@pytest.mark.parametrize("kind", ["two-stage", "halving", "random"])
@pytest.mark.parametrize("architecture", ["resnet50", "resnet18", "densenet121", "efficientnet_b0", "vit_small_patch16_224"])
def test_searches_take_fewer(kind: Any, architecture: str) -> None:
    search = cut_search(kind, architecture, [0], 40)
    assert most_trials(search) < len(cuts(architecture))


@settings(max_examples=30, deadline=None)  # a trial at a time
@given(searches, st.integers(0, 1000), st.integers(1, 1000), st.sampled_from([0.0, 0.3]))
def test_results_in_any_order_give_the_same_trials_and_the_same_answer(search: Search, seed: int, order: int, diverge: float) -> None:
    (at_once, ran), (one_by_one, drawn) = run(search, seed, diverge=diverge), run(search, seed, order, diverge=diverge)
    assert set(ran) == set(drawn)
    try:
        assert answer(search, at_once) == answer(search, one_by_one)
    except WorkError:
        with pytest.raises(WorkError, match="no trial has a finite"):
            answer(search, one_by_one)


@given(searches, st.integers(0, 1000), st.data())
def test_a_search_that_was_cut_off_asks_only_for_what_is_missing(search: Search, seed: int, data: st.DataObject) -> None:
    results, ran = run(search, seed)
    kept = {trial: results[trial] for trial in data.draw(st.lists(st.sampled_from(ran), unique=True))}
    again = dict(kept)
    while trials := propose(search, again):
        assert not set(trials) & set(kept)
        again |= {trial: outcome(trial, seed) for trial in trials}
    assert answer(search, again) == answer(search, results)
    assert set(again) == set(ran)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8, unique=True), st.integers(1, 8), st.integers(1, 3))
def test_every_source_and_strategy_gets_the_same_rates_and_budget(grid: list[float], trials: int, seeds: int) -> None:
    trials = min(trials, len(grid))
    one, other = (rate_search(Tune(lr=held, trials=trials), range(seeds)) for held in (grid, grid[::-1]))
    assert one == other
    assert len(set(one.candidates)) == trials
    assert set(one.candidates) <= set(grid)
    for seed in (0, 1):  # two sources with other results
        results, ran = run(one, seed, diverge=0.2 if trials > 4 else 0.0)
        assert len(ran) == trials * seeds == most_trials(one)
        if any(all(not math.isnan(results[Trial(lr=float(rate), seed=s)].value) for s in range(seeds)) for rate in one.candidates):
            assert answer(one, results).exhaustive == trials * seeds


def test_the_best_rate_is_that_of_the_highest_mean_and_of_equals_the_smaller() -> None:
    search = rate_search(Tune(lr=[1e-2, 1e-3, 1e-4], trials=3), (0, 1))
    values = {1e-4: (0.7, 0.7), 1e-3: (0.9, 0.7), 1e-2: (0.8, 0.8)}
    results = {Trial(lr=rate, seed=seed): Outcome(values[rate][seed], 0.5) for rate in values for seed in (0, 1)}
    assert answer(search, results).choice == 1e-3
    results[Trial(lr=1e-2, seed=1)] = Outcome(0.81, 0.5)  # no rule of one error here: a rate costs nothing
    assert answer(search, results).choice == 1e-2
    results[Trial(lr=1e-2, seed=0)] = Outcome(math.nan)  # one seed diverged: that rate is out
    found = answer(search, results)
    assert found.choice == 1e-3
    assert [point.mean for point in found.curve] == [0.7, 0.8, None]
    with pytest.raises(WorkError, match="smaller rates"):
        answer(search, dict.fromkeys(results, Outcome(math.nan)))


def test_two_stages_end_first_and_then_lie_around_the_chosen_one() -> None:
    search = cut_search("two-stage", "resnet50", (0,))
    first = propose(search, {})
    assert [trial.cut for trial in first] == ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]  # the four blocks of the paper
    values = {"layer1.2": 0.70, "layer2.3": 0.80, "layer3.5": 0.86, "layer4.2": 0.861}
    results = {trial: Outcome(values[str(trial.cut)], 0.01) for trial in first}
    second = propose(search, results)
    # layer4.2 is best by less than an error, so the search goes on around layer3.5
    assert [trial.cut for trial in second] == [f"layer3.{i}" for i in range(5)] + ["layer4.0", "layer4.1"]
    results |= {trial: Outcome(0.855 if trial.cut == "layer3.4" else 0.75, 0.01) for trial in second}
    found = answer(search, results)
    assert (found.choice, found.best, found.trials, found.exhaustive) == ("layer3.4", "layer4.2", 11, 17)


def test_the_first_stage_end_leads_down_to_the_stem() -> None:
    search = cut_search("two-stage", "resnet18", (0,))
    results = {trial: Outcome(0.9, 0.01) for trial in propose(search, {})}
    assert [trial.cut for trial in propose(search, results)] == ["stem", "layer1.0", "layer2.0"]


def test_halving_doubles_the_epochs_and_halves_the_cuts() -> None:
    search = cut_search("halving", "resnet50", (0,), epochs=40)
    results: dict[Trial, Outcome] = {}
    rungs = []
    while trials := propose(search, results):
        rungs.append((len(trials), {trial.epochs for trial in trials}))
        results |= {trial: Outcome(0.5 + 0.01 * search.candidates.index(str(trial.cut)), 0.001) for trial in trials}
    assert rungs == [(8, {10}), (4, {20}), (2, {None})]
    found = answer(search, results)
    assert (found.trials, found.cost, found.choice) == (14, 6.0, "layer4.2")
    assert {point.epochs for point in found.curve} == {10, 20, None}


@given(st.sampled_from(ARCHITECTURES), st.integers(1, 3), st.integers(0, 1000))
def test_the_better_half_by_mean_survives_a_halving_whatever_the_errors(architecture: str, seeds: int, seed: int) -> None:
    search = cut_search("halving", architecture, range(seeds), 40)
    results: dict[Trial, Outcome] = {}
    before: list[Trial] = []
    while trials := propose(search, results):
        results |= {trial: outcome(trial, seed, error=0.2) for trial in trials}  # wide: all are within one error of the best
        left = {trial.cut for trial in trials}
        mean = {cut: np.mean([results[trial].value for trial in before if trial.cut == cut]) for cut in {trial.cut for trial in before}}
        assert not mean or min(mean[cut] for cut in left) >= max(mean[cut] for cut in set(mean) - left)
        before = trials


def test_halving_begins_where_likeness_to_random_features_falls() -> None:
    names = [cut.name for cut in cuts("resnet50")]
    falling = {name: 0.9 if i < 7 else 0.2 for i, name in enumerate(names)}
    first = [str(trial.cut) for trial in propose(cut_search("halving", "resnet50", (0,), 40, falling), {})]
    assert first == names[3:11]
    even = [names.index(str(trial.cut)) for trial in propose(cut_search("halving", "resnet50", (0,), 40), {})]
    assert even[0] == 0
    assert even[-1] == 16
    assert max(np.diff(even)) - min(np.diff(even)) <= 1
    flat = cut_search("halving", "resnet50", (0,), 40, dict.fromkeys(names, 0.97))
    assert flat.first == cut_search("halving", "resnet50", (0,), 40).first, "a flat one says nothing"


def test_halving_asks_how_like_random_features_a_source_is_before_it_begins() -> None:
    names = [cut.name for cut in cuts("resnet50")]
    falling = {name: 0.9 if i < 7 else 0.2 for i, name in enumerate(names)}
    search, evenly = (cut_search("halving", "resnet50", (3, 1), 40, similarity) for similarity in ("auto", None))
    (first,) = propose(search, {})
    assert first == Trial(seed=3, epochs=0)
    for similarity, guided, like in (
        (falling, "similarity", cut_search("halving", "resnet50", (3, 1), 40, falling)),
        (dict.fromkeys(names, 0.5), "flat", evenly),
    ):
        results: dict[Trial, Outcome] = {first: Outcome(math.nan, similarity=similarity)}
        assert propose(search, results) == propose(like, {})
        while trials := propose(search, results):
            results |= {trial: outcome(trial, 0) for trial in trials}
        found = answer(search, results)
        assert (found.guided, found.similarity) == (guided, similarity)
        assert (found.trials, found.cost) == (answer(like, results).trials, answer(like, results).cost)
        assert found.trials == most_trials(search) == most_trials(like)
    held, _ = run(cut_search("halving", "resnet50", (0,), 40, falling), 0)
    found = answer(cut_search("halving", "resnet50", (0,), 40, falling), held)
    assert (found.guided, found.similarity) == ("similarity", falling)


def test_random_weights_have_nothing_to_be_guided_by() -> None:
    search, evenly = (cut_search("halving", "resnet50", (0,), 40, similarity) for similarity in ("random", None))
    assert propose(search, {}) == propose(evenly, {})
    results, _ = run(search, 0)
    assert (answer(search, results).guided, answer(search, results).similarity) == ("random", None)
    assert answer(evenly, results).guided is None


def test_the_random_baseline_draws_half_of_the_cuts_for_every_source_alike() -> None:
    search = cut_search("random", "resnet50", (0,), 40)
    assert search == cut_search("random", "resnet50", (0,), 40) != cut_search("random", "resnet50", (1,), 40)
    results, ran = run(search, 0)
    assert len(ran) == len({trial.cut for trial in ran}) == most_trials(search) == 9
    found = answer(search, results)
    assert (found.trials, found.cost, found.exhaustive) == (9, 9.0, 17)
    assert {point.at for point in found.curve} == {trial.cut for trial in ran}
    drawn = {trial.cut for seed in range(20) for trial in propose(cut_search("random", "resnet50", (seed,)), {})}
    assert drawn == {cut.name for cut in cuts("resnet50")}


def test_which_strategies_are_searched_and_how() -> None:
    assert asked({"name": "truncated", "cut": "auto"}) == (Way(), {"name": "truncated", "cut": "auto"})
    assert Way().search == "two-stage"
    assert asked({"name": "fat", "cut": "auto", "search": "halving", "similarity": {"stem": 1}})[0] == Way(
        search="halving", similarity={"stem": 1}
    )
    assert asked({"name": "fat", "cut": "auto", "search": "halving", "similarity": "auto"})[0] == Way(search="halving", similarity="auto")
    assert asked({"name": "truncated", "cut": "layer2"}) == (None, {"name": "truncated", "cut": "layer2"})
    assert asked({"name": "full"})[0] is None
    for wrong, hint in (
        ({"name": "truncated", "cut": "auto", "search": "twostage"}, "search"),
        ({"name": "truncated", "cut": "auto", "similarity": {"stem": 1}}, "halving begins by it"),
        ({"name": "truncated", "cut": "auto", "similarity": "auto"}, "halving begins by it"),
        ({"name": "truncated", "cut": "auto", "search": "exhaustive", "similarity": "auto"}, "halving begins by it"),
        ({"name": "truncated", "cut": "auto", "search": "halving", "similarity": "measured"}, "similarity"),
        ({"name": "truncated", "cut": "layer2", "similarity": "auto"}, "cut=auto"),
        ({"name": "truncated", "cut": "layer2", "search": "halving"}, "cut=auto"),
        ({"name": "transfusion", "cut": "auto"}, "truncated, fat"),
    ):
        with pytest.raises(RequestError, match=hint):
            asked(wrong)
    with pytest.raises(RequestError, match=r"every cut of test_resnet \(not so: layer1.0"):
        cut_search("halving", "test_resnet", (0,), 40, {"stem": 1.0})


@pytest.mark.parametrize("tune", [{"lr": [], "trials": 1}, {"lr": [1e-3], "trials": 2}, {"lr": [-1.0], "trials": 1}])
@pytest.mark.parametrize("twice", [{"lr": [1e-3, 1e-3], "trials": 1}, {"lr": [1e-3]}])
def test_a_wrong_grid_is_refused(tune: dict[str, object], twice: dict[str, object]) -> None:
    for wrong in (tune, twice):
        with pytest.raises(RequestError, match=r"lr|trials"):
            parse(wrong, Tune, "cells.tune")


def test_seeds_and_patients_both_widen_the_error() -> None:
    search = Search("exhaustive", ("a",), (0, 1))
    two = answer(search, {Trial("a", seed=0): Outcome(0.8, 0.03), Trial("a", seed=1): Outcome(0.9, 0.03)})
    assert two.curve[0].error == pytest.approx(math.sqrt(0.03**2 + 0.005 / 2))
    assert answer(Search("exhaustive", ("a",), (0,)), {Trial("a"): Outcome(0.8, 0.03)}).curve[0].error == pytest.approx(0.03)


def test_json_schema_and_golden_answer() -> None:
    """To change the format: raise its `schema`, then write what this test prints."""
    schema = json.dumps(Answer.model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / "search.json").read_text() == schema
    held = json.loads(Path(ROOT / "tests" / "golden" / "search.json").read_text())
    assert parse(held, Answer, "search.json").model_dump(mode="json", by_alias=True) == held


def test_the_error_over_patients_is_that_of_a_bootstrap() -> None:
    draw, task = rng("jackknife test"), load_task("phantom-chest")
    n = 600
    frame: dict[str, object] = {"split": "val", "sample_id": [f"{i:020d}" for i in range(n)], "stratum": None}
    frame["patient"] = [f"{i // 6}" for i in range(n)]  # six images each, of one mind: a sixth as many facts as images
    for label in task.labels:
        target, shared = draw.integers(0, 2, n // 6).repeat(6), draw.normal(0, 1, n // 6).repeat(6)
        frame |= {f"target_{label}": target.astype(float), f"score_{label}": 1 / (1 + np.exp(-(target + shared)))}
    table = pd.DataFrame(frame)
    error, groups = patients_error(task, table)
    assert groups == 20
    columns = [table[[f"{kind}_{label}" for label in task.labels]].to_numpy(float) for kind in ("target", "score")]
    ids, patients = table["sample_id"].to_numpy(str), table["patient"].to_numpy(object)
    scores = Scores(0, ids, patients, target_NL=columns[0], score_NL=columns[1])
    bootstrap = metric_B(scores, "auroc_mean", resample(scores, "auroc_mean", 500).weight_BN).std()
    assert error == pytest.approx(float(bootstrap), rel=0.35)  # 20 groups give 19 degrees of freedom: a sixth of it, twice
    alone, _ = patients_error(task, table.assign(patient=[f"{i}" for i in range(n)]))
    assert alone < 0.7 * error
    assert error_row(task, table)["metric"] == "auroc_mean_error"
    assert error_row(task, table[table["patient"] == "0"])["value"] is None
