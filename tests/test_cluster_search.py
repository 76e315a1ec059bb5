"""Searches in a study: trials are cells in the one pool, answers stand in OUT, and a driver that starts again asks for what is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_study
import pytest
import tiny_cell
import tiny_study
import yaml

from analysis import search_section
from analysis.results import finished
from base import storage
from base.config import parse
from base.errors import Diverged, RequestError, WorkError
from cluster import plan
from cluster.fanout import Tally, run_cells
from cluster.load import load_study
from cluster.outlook import outlook
from cluster.plan import Packed
from cluster.run import run
from cluster.searches import Searches, most
from cluster.single import finetune_study
from cluster.sources import read_weights
from cluster.study import Resources, Study
from encoders.build import build
from encoders.cuts import cuts
from encoders.export import export
from encoders.truncate import truncate
from finetune.cell import CellConfig
from finetune.search import Answer
from finetune.strategies import resolve
from shards import manifest

TREE: dict[str, Any] = {
    "schema": 1,
    "study": "searched",
    "resources": {"cell_workers": 2},
    "cells": {
        "sources": ["random", {"name": "random-b", "source": "random"}],
        "architectures": ["test_resnet"],
        "strategies": [{"name": "fat", "cut": "auto"}, "linear"],
        "tasks": ["phantom-chest"],
        "resolutions": [32],
        "seeds": [0, 1],
        "tune": {"lr": [3.0e-2, 1.0e-2, 1.0e-3], "trials": 2},
        "task_settings": {"phantom-chest": {"linear.epochs": 3}},
    },
}

GUIDED = [{"name": name, "cut": "auto", "search": "halving", "similarity": "auto"} for name in ("truncated", "fat")]


def written(folder: Path, shards: str, **cells: object) -> Study:
    folder.mkdir(exist_ok=True)
    tree = {**TREE, "data": {"phantom-chest": {"shards": shards}}, "cells": {**TREE["cells"], **cells}}
    return load_study(tiny_study.write(folder, tree))


def planned(study: Study, shards: str, **changes: Any) -> Searches:
    return Searches(plan.settings(study, {"phantom-chest": Packed(shards, manifest.read(shards))}, {}), **changes)


def result_of(config: CellConfig, value: float | None) -> dict[str, Any]:
    metric = config.task.metric
    if config.role == "similarity":
        names = [point.name for point in cuts(config.architecture)]
        return {"metrics": [{"class": name, "value": 0.9 if i < 3 else 0.1} for i, name in enumerate(names)]}
    rows: list[dict[str, Any]] = [
        {"metric": metric, "class": "", "value": value},
        {"metric": f"{metric}_error", "class": "", "value": 0.01},
    ]
    selection = {"metric": metric, "value": value, "epoch": 1, "epochs": 2}  # of the three that were asked for
    return {"metrics": [{**row, "split": "val"} for row in rows], "params": 1000, "key": config.key, "selection": selection}


def drive(searches: Searches, value: Callable[[CellConfig], float | Exception | None], limit: int = 1000) -> list[CellConfig]:
    """Run trials and cells one after the other as the pool would, with values in place of trainings; what ran, in order."""
    queue = searches.ready()
    ran: list[CellConfig] = []
    while queue and len(ran) < limit:
        config = queue.pop(0)
        found = value(config)
        problem = found if isinstance(found, Exception) else None
        if problem is None:
            storage.put(storage.join(config.out, "result.json"), json.dumps(result_of(config, found)))  # type: ignore[arg-type]
        ran.append(config)
        queue = [*searches.told(config, problem), *queue]
    return ran


def likes(config: CellConfig) -> float:
    """A value that rises with the cut and falls with the rate."""
    cut = config.strategy.get("cut")
    depth = [point.name for point in cuts(config.architecture)].index(cut) if cut else 0
    return 0.6 + 0.05 * depth - config.task.linear.lr


def test_every_setting_gets_the_same_rates_and_budget(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest)
    searches = planned(study, phantom_chest)
    ran = drive(searches, likes)
    rates: dict[tuple[str, str], list[float]] = {}
    for config in ran:
        if config.role == "trial" and (config.strategy["name"] != "fat" or config.strategy["cut"] == "layer4.0"):
            rates.setdefault((config.source, config.strategy["name"]), []).append(config.task.linear.lr)
    tuned = {key: sorted(set(found) - {1e-3 if key[1] == "fat" else None}) for key, found in rates.items()}
    assert len(rates) == 4
    assert len({tuple(found) for (_, name), found in rates.items() if name == "linear"}) == 1
    assert {len(found) for (_, name), found in rates.items() if name == "linear"} == {2}
    assert tuned["random", "fat"] == tuned["random-b", "fat"]
    assert not searches.open
    assert {(config.strategy.get("cut"), config.task.linear.lr) for config in searches.cells} == {
        ("layer4.0", min(rates["random", "linear"])),
        (None, min(rates["random", "linear"])),
    }
    assert len(searches.cells) == 8
    assert len({config.key for config in ran}) == len(ran)


def test_cells_do_not_wait_for_searches_that_still_ask(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest, strategies=[{"name": "fat", "cut": "auto"}, "linear"], tune=None)
    first = planned(study, phantom_chest).ready()
    assert {config.strategy["name"] for config in first if config.role == "cell"} == {"linear"}
    assert {config.role for config in first if config.strategy["name"] == "fat"} == {"trial"}


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_a_driver_that_starts_again_asks_only_for_what_is_missing(after: int, tmp_path: Path, phantom_chest: str) -> None:
    study, whole = written(tmp_path / "cut", phantom_chest), written(tmp_path / "whole", phantom_chest)
    undisturbed = drive(planned(whole, phantom_chest), likes)
    before = drive(planned(study, phantom_chest), likes, limit=after)
    searches = planned(study, phantom_chest)
    rest = drive(searches, likes)
    assert searches.kept == sum(config.role == "cell" for config in before)
    assert sorted(config.key for config in before + rest) == sorted(config.key for config in undisturbed)
    assert {config.key for config in searches.cells} == {config.key for config in planned(whole, phantom_chest).cells}
    assert not planned(study, phantom_chest).ready()


def test_answers_stand_with_their_curves_and_the_plan_names_them(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest)
    searches = planned(study, phantom_chest)
    assert {row["key"] for row in searches.rows()} == {""}
    drive(searches, likes)
    rows = list(searches.rows())
    keys = {key for row in rows for key in row["searches"]}
    assert keys == set(storage.listing(f"{study.out}/analyses"))
    answers = [parse(storage.read_json(f"{study.out}/analyses/{key}/search.json"), Answer, key) for key in keys]
    assert sorted(found.kind for found in answers) == ["rates"] * 4 + ["two-stage"] * 2
    for found in answers:
        assert found.about["source"] in ("random", "random-b")
        assert found.metric == "auroc_mean"
        assert all(point.error == pytest.approx(0.01) for point in found.curve)
    assert {(row["strategy"], row["asked"].get("cut"), row["tuned"]) for row in rows} == {("fat", "auto", True), ("linear", None, True)}
    drawn = next(found for found in answers if found.kind == "rates")
    assert all(row["key"] and row["lr"] == min(point.at for point in drawn.curve) for row in rows)
    shutil.rmtree(f"{study.out}/analyses")
    assert not planned(study, phantom_chest, keep=False).ready()  # the trials say it all again
    assert not storage.exists(f"{study.out}/analyses")


def test_a_diverged_trial_is_the_worst_of_its_search_and_another_failure_stops_it(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest, strategies=["linear"])
    searches = planned(study, phantom_chest)
    ran = drive(
        searches,
        lambda config: (
            Diverged("not finite")
            if config.task.linear.lr > 5e-3 and config.role == "trial" and config.source == "random"
            else likes(config)
        ),
    )
    diverged = [config for config in ran if searches.excused(config.key)]
    assert [config.source for config in diverged] == ["random"] * len(diverged)
    assert diverged
    worse = written(tmp_path, phantom_chest, strategies=["linear"], seeds=[5], trial_seeds=[5])
    searches = planned(worse, phantom_chest)
    drive(searches, lambda config: WorkError("disk full") if config.source == "random" else likes(config))
    assert [(one.setting.source, one.failed) for one in searches.open] == [("random", "a trial of its search failed: disk full")]
    assert {config.source for config in searches.cells} == {"random-b"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("trials", [1, 2])
def test_a_search_whose_last_trial_fails_stops(trials: int, tmp_path: Path, phantom_chest: str) -> None:
    tune = {"lr": [1.0e-2, 1.0e-3], "trials": trials}
    searches = planned(written(tmp_path, phantom_chest, strategies=["linear"], sources=["random"], tune=tune), phantom_chest)
    last = searches.ready()[-1].key
    ran = drive(searches, lambda config: WorkError("disk full") if config.key == last else likes(config))
    assert len(ran) == trials
    assert [one.failed for one in searches.open] == ["a trial of its search failed: disk full"]
    assert not searches.cells


def test_the_cost_of_a_search_is_what_was_trained_not_what_was_asked_for(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest, sources=["random"])
    drive(planned(study, phantom_chest), likes)
    for key in storage.listing(f"{study.out}/analyses"):
        found = parse(storage.read_json(f"{study.out}/analyses/{key}/search.json"), Answer, key)
        assert found.cost == pytest.approx(found.trials * 2 / 3, abs=1e-5)


def test_a_metric_that_validation_cannot_define_is_said_and_not_taken_for_divergence(tmp_path: Path, phantom_chest: str) -> None:
    searches = planned(written(tmp_path, phantom_chest, strategies=["linear"], sources=["random"]), phantom_chest)
    drive(searches, lambda config: None)
    (failed,) = [one.failed for one in searches.open]
    assert failed is not None
    assert "auroc_mean is not defined on validation" in failed
    assert "rates" not in failed


def test_a_truncated_source_is_searched_at_the_cuts_that_it_has(tmp_path: Path, phantom_chest: str) -> None:
    short = tmp_path / "short"
    facts: dict[str, Any] = {"name": "short", "method": "made", "lineage": [], "data": [], "revision": "0"}
    export(truncate(build("test_resnet", 1, seed=0), "layer3.0"), short, image_size=32, **facts)
    ways = [{"name": "truncated", "cut": "auto", "search": way} for way in ("two-stage", "halving", "exhaustive")]
    study = written(tmp_path, phantom_chest, strategies=ways, sources=[{"name": "short", "source": str(short)}], tune=None)
    corpora = {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}
    searches = Searches(plan.settings(study, corpora, {"short": [read_weights(str(short))]}))
    ran = drive(searches, likes)
    assert {config.strategy["cut"] for config in ran} == {"stem", "layer1.0", "layer2.0", "layer3.0"}
    assert [config.strategy["cut"] for config in searches.cells] == ["layer3.0"] * 6


def guided(study: Study, shards: str, sources: dict[str, str], **changes: Any) -> Searches:
    """Searches of random weights and of exported ones, by their names and folders."""
    corpora = {"phantom-chest": Packed(shards, manifest.read(shards))}
    return Searches(plan.settings(study, corpora, {name: [read_weights(folder)] for name, folder in sources.items()}), **changes)


def test_what_guides_a_search_is_computed_once_for_a_source_on_a_tasks_data(tmp_path: Path, phantom_chest: str) -> None:
    folders = {name: str(tiny_cell.exported(tmp_path / name, architecture="resnet18")[0]) for name in ("a", "b")}
    sources: list[Any] = ["random", *({"name": name, "source": folder} for name, folder in folders.items())]
    cells: dict[str, Any] = {"sources": sources, "architectures": ["resnet18"], "strategies": GUIDED, "tune": None, "seeds": [0]}
    study = written(tmp_path, phantom_chest, fractions=[0.5, 1.0], shuffled_labels=["a"], **cells)
    searches = guided(study, phantom_chest, folders)
    first = {config.key: config for config in searches.ready()}
    assert [config.source for config in first.values() if config.role == "similarity"] == ["a", "b"]
    assert {config.source for config in first.values() if config.role == "trial"} == {"random"}
    asked, trials, _ = most(one.setting for one in searches.chosen)
    ran = drive(searches, likes_cut)
    assert sum(config.role == "similarity" for config in ran) == 2
    assert sum(config.role == "trial" for config in ran) == trials == 6 * asked
    answers = {key: parse(storage.read_json(f"{study.out}/analyses/{key}/search.json"), Answer, key) for key in searches_of(searches)}
    names = [point.name for point in cuts("resnet18")]
    for found in answers.values():
        at = [names.index(str(point.at)) for point in found.curve]
        if found.about["source"] == "random":
            assert (found.guided, found.similarity) == ("random", None)
            assert at == [0, 3, 5, 8]
        else:
            assert found.guided == "similarity"
            assert found.similarity == {name: 0.9 if i < 3 else 0.1 for i, name in enumerate(names)}
            assert at == [1, 2, 3, 4]
    again = guided(study, phantom_chest, folders)
    assert not again.ready()
    for key in answers:
        shutil.rmtree(f"{study.out}/analyses/{key}")
    assert not guided(study, phantom_chest, folders).ready()  # a driver that starts again goes by the numbers that stand
    assert searches_of(guided(study, phantom_chest, folders)) == set(answers)


def searches_of(searches: Searches) -> set[str]:
    return {key for row in searches.rows() for key in row["searches"]}


def likes_cut(config: CellConfig) -> float:
    return 0.5 + 0.01 * [point.name for point in cuts(config.architecture)].index(config.strategy.get("cut", "stem"))


def test_a_comparison_with_random_weights_that_fails_stops_its_search(tmp_path: Path, phantom_chest: str) -> None:
    folder = str(tiny_cell.exported(tmp_path / "a")[0])
    study = written(tmp_path, phantom_chest, sources=[{"name": "a", "source": folder}], strategies=[*GUIDED, "linear"], tune=None)
    searches = guided(study, phantom_chest, {"a": folder})
    drive(searches, lambda config: WorkError("no channel ever changes") if config.role == "similarity" else likes_cut(config))
    assert {(one.setting.strategy["name"], one.failed) for one in searches.open} == {
        (way["name"], "a trial of its search failed: no channel ever changes") for way in GUIDED
    }
    assert {config.strategy["name"] for config in searches.cells} == {"linear"}


def test_a_resolution_among_the_settings_of_a_task_is_that_of_its_cells(tmp_path: Path, phantom_chest: str) -> None:
    given = {"phantom-chest": {"resolution": 32}}
    study = written(tmp_path, phantom_chest, strategies=["linear"], tune=None, resolutions={}, task_settings=given)
    assert {config.resolution for config in planned(study, phantom_chest).cells} == {32}
    words = [f"data.phantom-chest.shards={phantom_chest}", "architecture=test_resnet", "settings.resolution=48"]
    assert {config.resolution for config in planned(finetune_study("phantom-chest", words), phantom_chest).cells} == {48}


def test_a_strategy_is_the_same_cell_whether_its_defaults_are_typed_or_not(tmp_path: Path, phantom_chest: str) -> None:
    short = {"name": "truncated", "cut": "layer2.0"}
    typed = {"name": "truncated", **resolve(short)[1].model_dump(mode="json")}
    assert typed != short
    keys = []
    for strategy in (short, typed):
        study = written(tmp_path, phantom_chest, strategies=[strategy], tune=None)
        keys.append([config.key for config in planned(study, phantom_chest).cells])
        setting = next(iter(planned(study, phantom_chest).chosen)).setting
        assert plan.identity(setting, 0, setting.strategy, setting.task)["cell"]["strategy"] == typed
    assert keys[0] == keys[1]


def test_cells_compute_in_the_numbers_that_the_study_asks_for(tmp_path: Path, phantom_chest: str) -> None:
    keys: dict[str, set[str]] = {"fp32": set(), "bf16": set()}
    gpu: list[dict[str, Any]] = [{"gpus_per_cell": share} for share in (0.25, 1, "measured")]
    plain: list[dict[str, Any]] = [{}, {"dtype": "fp32"}, {"dtype": "bf16"}]
    for asked in (*plain, *gpu, *(resources | {"dtype": "fp32"} for resources in gpu)):
        study = written(tmp_path, phantom_chest, strategies=["linear"], sources=["random"], tune=None, seeds=[0])
        study = study.model_copy(update={"resources": parse(asked, Resources, "resources")})
        (config,) = planned(study, phantom_chest).cells
        assert config.dtype == asked.get("dtype", "bf16" if asked else "fp32")
        keys[config.dtype].add(config.key)
    assert [len(of_dtype) for of_dtype in keys.values()] == [1, 1]


def test_a_normalisation_is_part_of_the_key_where_one_is_asked_for(tmp_path: Path, phantom_chest: str) -> None:
    study = written(tmp_path, phantom_chest, strategies=["linear"], sources=["random"], tune=None, seeds=[0])
    setting = next(iter(planned(study, phantom_chest).chosen)).setting
    plain, asked = (
        plan.identity(setting, 0, setting.strategy, setting.task.model_copy(update={"normalise": name}))["task"] for name in (None, "none")
    )
    assert asked == plain | {"normalise": "none"}
    assert "normalise" not in plain


@pytest.mark.parametrize("keep", ["nothing", "encoder"])
def test_cells_keep_their_encoders_where_the_study_asks_and_trials_never(keep: str, tmp_path: Path, phantom_chest: str) -> None:
    cells = {"strategies": [{"name": "fat", "cut": "auto"}], "sources": ["random"], "seeds": [0], "tune": None}
    searches = planned(written(tmp_path, phantom_chest, keep=keep, **cells), phantom_chest)
    ran = drive(searches, likes)
    assert {config.keep for config in ran if config.role == "trial"} == {"nothing"}
    assert {config.keep for config in searches.cells} == {keep}


def test_encoders_that_are_asked_for_once_cells_have_finished_are_made(tmp_path: Path, phantom_chest: str) -> None:
    """A finished study said that all of it stood, and the analyses went on asking for `cells.keep: encoder`."""
    cells = {"strategies": ["full"], "sources": ["random"], "seeds": [0, 1], "tune": None}
    drive(planned(written(tmp_path, phantom_chest, **cells), phantom_chest), likes)
    assert not planned(written(tmp_path, phantom_chest, **cells), phantom_chest).ready()
    asked = planned(written(tmp_path, phantom_chest, keep="encoder", **cells), phantom_chest).ready()
    assert [config.seed for config in asked] == [0, 1]
    storage.put(f"{asked[0].out}/encoder/allograft.json", "{}")
    asked = planned(written(tmp_path, phantom_chest, keep="encoder", **cells), phantom_chest).ready()
    assert [config.seed for config in asked] == [1]


def test_a_search_shares_the_trials_of_another(tmp_path: Path, phantom_chest: str) -> None:
    both = [{"name": "fat", "cut": "auto", "search": "exhaustive"}, {"name": "fat", "cut": "auto", "search": "two-stage"}]
    study = written(tmp_path, phantom_chest, strategies=both, tune=None, sources=["random"], seeds=[0])
    searches = planned(study, phantom_chest)
    ran = drive(searches, likes)
    assert len([config for config in ran if config.role == "trial"]) == 5
    assert {config.strategy["cut"] for config in searches.cells} == {"layer4.0"}
    assert len(searches.cells) == 2  # one for each way of searching: the report tells them apart


def test_a_cell_whose_cut_was_searched_is_not_the_one_that_names_it(tmp_path: Path, phantom_chest: str) -> None:
    strategies = [{"name": "fat", "cut": "auto"}, {"name": "fat", "cut": "layer4.0"}]
    searches = planned(written(tmp_path, phantom_chest, strategies=strategies, tune=None, sources=["random"]), phantom_chest)
    drive(searches, likes)
    assert len({config.key for config in searches.cells}) == len(searches.cells) == 4


def test_other_cells_keep_their_keys(tmp_path: Path, phantom_chest: str) -> None:
    """A study in which nothing is searched has the keys it had."""
    study = written(tmp_path, phantom_chest, strategies=["linear"], tune=None)
    searches = planned(study, phantom_chest)
    corpora = {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}
    assert [config.key for config in searches.cells] == [config.key for config in tiny_study.cells(study, corpora, {})]
    assert all("role" not in plan.identity(one.setting, 0, one.strategy, one.task) for one in searches.chosen)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"strategies": [{"name": "transfusion", "cut": "auto"}]}, "cut: auto is for truncated, fat"),
        ({"strategies": [{"name": "fat", "cut": "auto", "search": "greedy"}]}, "two-stage"),
        ({"tune": {"lr": [1e-3], "trials": 2}}, "trials: 2 of 1 rates"),
        ({"trial_seeds": [0, 0]}, "trial_seeds: 0 stands twice"),
    ],
)
def test_a_wrong_search_is_refused(cells: dict[str, object], message: str, tmp_path: Path, phantom_chest: str) -> None:
    with pytest.raises(RequestError, match=message):
        written(tmp_path, phantom_chest, **cells)


def test_the_plan_says_how_many_trials_and_what_is_untuned(tmp_path: Path, phantom_chest: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = written(tmp_path, phantom_chest)
    assert outlook(study)
    said = " ".join(capsys.readouterr().out.split())
    assert "6, of which 0 have answered; at most 18 trials, 18 to try everything" in said
    assert "tuned: 2 rates x 1 trial seeds" in said
    assert not storage.exists(f"{study.out}/analyses")
    assert outlook(written(tmp_path, phantom_chest, tune=None, strategies=["linear"]))
    assert "untuned: one fixed rate" in " ".join(capsys.readouterr().out.split())
    raw = {**TREE, "data": {"phantom-chest": {"raw": "phantom:60"}}, "cells": {**TREE["cells"], "tune": None}}
    assert outlook(load_study(tiny_study.write(tmp_path, raw, out=str(tmp_path / "new"))))
    said = " ".join(capsys.readouterr().out.split())
    assert "untuned: one fixed rate" in said
    assert "counted once data and weights stand" in said
    assert most(plan.settings(study, {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}, {}))[0] == 6


def test_one_cell_searches_as_well(phantom_chest: str) -> None:
    words = [
        f"data.phantom-chest.shards={phantom_chest}",
        "architecture=resnet18",
        "strategy.name=truncated",
        "strategy.cut=auto",
        "seed=3",
    ]
    study = finetune_study("phantom-chest", words)
    assert study.cells is not None
    assert study.cells.trial_seeds == [3]
    searches = planned(study, phantom_chest)
    assert [config.strategy["cut"] for config in searches.ready()] == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]


def test_one_cell_is_guided_as_well(tmp_path: Path, phantom_chest: str) -> None:
    folder = str(tiny_cell.exported(tmp_path / "a")[0])
    words = [f"data.phantom-chest.shards={phantom_chest}", f"source={folder}", "strategy.name=truncated", "strategy.cut=auto", "seed=3"]
    words += ["strategy.search=halving", "strategy.similarity=auto"]
    searches = guided(finetune_study("phantom-chest", words), phantom_chest, {"a": folder})
    (config,) = searches.ready()
    assert (config.role, config.source, config.seed) == ("similarity", "a", 3)
    with pytest.raises(RequestError, match="halving begins by it"):
        finetune_study("phantom-chest", [word.replace("halving", "random") for word in words])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_head")
def test_a_study_with_searches_runs_and_goes_on_where_it_was_cut_off(tmp_path: Path, phantom_chest: str) -> None:
    source = {"name": "a", "source": str(tiny_cell.exported(tmp_path / "a")[0])}
    study = written(tmp_path, phantom_chest, sources=["random", source], strategies=[*TREE["cells"]["strategies"], GUIDED[1]])
    summary = run(study)
    assert not summary.failed
    assert summary.cells_new == 12
    held = {key: storage.read_json(f"{study.out}/cells/{key}/result.json") for key in storage.listing(f"{study.out}/cells")}
    trials = {key: result for key, result in held.items() if result["role"] == "trial"}
    ((likeness, compared),) = [(key, result) for key, result in held.items() if result["role"] == "similarity"]
    assert len(held) - len(trials) == 12 + 1
    # the test split was never opened
    assert {row["split"] for result in [*trials.values(), compared] for row in result["metrics"]} == {"val"}
    assert all(any(row["metric"] == "auroc_mean_error" and row["value"] for row in result["metrics"]) for result in trials.values())
    rows = json.loads(storage.read_bytes(f"{study.out}/plan.json"))
    page = storage.read_bytes(summary.report).decode()
    assert "untuned" not in page
    assert 'id="searches"' in page
    assert "cut, halving, evenly spread: the source is random weights" in page
    of_cut = {row["source"]: row["searches"][0] for row in rows if row["asked"].get("search") == "halving"}
    found = {source: storage.read_json(f"{study.out}/analyses/{key}/search.json") for source, key in of_cut.items()}
    assert found["random"]["guided"] == "random"
    assert found["a"]["guided"] in ("similarity", "flat")
    assert found["a"]["similarity"] == {row["class"]: row["value"] for row in compared["metrics"]}
    gone = [rows[0]["key"], next(iter(trials))]
    for folder in (*(f"cells/{key}" for key in gone), f"analyses/{rows[0]['searches'][0]}", f"analyses/{of_cut['a']}"):
        shutil.rmtree(f"{study.out}/{folder}")
    at = Path(f"{study.out}/cells/{likeness}/result.json").stat().st_mtime_ns
    again = run(study)
    assert (again.cells_kept, again.cells_new) == (11, 1)
    assert json.loads(storage.read_bytes(f"{study.out}/plan.json")) == rows
    assert storage.read_json(f"{study.out}/analyses/{of_cut['a']}/search.json") == found["a"]
    assert Path(f"{study.out}/cells/{likeness}/result.json").stat().st_mtime_ns == at  # not compared again


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("on_head")
def test_work_may_grow_while_it_runs(tmp_path: Path) -> None:
    """Cells that became ready run in the same pool; those that fail are told with their errors."""
    from cluster.session import session

    base = yaml.safe_load((Path(__file__).parent / "golden" / "cell.yaml").read_text())
    held = json.loads((Path(__file__).parent / "golden" / "cell_result.json").read_text())

    def standing(key: str, good: bool = True) -> CellConfig:
        out = tmp_path / key
        storage.put(str(out / "result.json"), json.dumps({**held, "key": key if good else "0" * 16}))
        return parse({**base, "key": key, "out": str(out), "encoder_dir": None, "encoder_sha256": None}, CellConfig, "cell")

    told: list[tuple[str, Exception | None]] = []
    totals: list[int] = []

    def grow(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        told.append((config.key, problem))
        return [standing(f"{config.key}{i}", good=i > 0) for i in range(3)] if len(config.key) < 2 else []

    def show(tally: Tally) -> None:
        totals.append(tally.total)

    with session():
        tally = run_cells([standing("a"), standing("b")], Resources(cell_workers=2), show, grow)
    assert (tally.total, tally.done, sorted(tally.failed)) == (8, 6, ["a0", "b0"])
    assert {key for key, problem in told if isinstance(problem, RequestError)} == {"a0", "b0"}
    assert len(told) == 8
    assert totals[0] == 2
    assert totals[-1] == 8


def test_the_report_draws_what_a_search_saw_and_says_what_is_untuned(tmp_path: Path) -> None:
    from analysis.report import report

    out = made_study.make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=2, images=60)
    page = storage.read_bytes(report(str(out))).decode()
    assert "Untuned: each task has one fixed rate" in page
    assert 'id="searches"' not in page
    golden = (Path(__file__).parent / "golden" / "search.json").read_text()
    storage.put(
        str(out / "analyses" / "0123" / "search.json"), golden.replace('"phantom-chest"', '"phantom-chest", "dataset": "phantom-chest"')
    )
    rows = json.loads((out / "plan.json").read_text())
    asked = {"cut": "auto", "search": "two-stage"}
    (out / "plan.json").write_text(json.dumps([{**row, "asked": asked, "searches": ["0123"]} for row in rows]))
    study = yaml.safe_load((out / "study.yaml").read_text())
    study["cells"]["tune"] = {"lr": [1e-3, 1e-2], "trials": 2}
    (out / "study.yaml").write_text(yaml.safe_dump(study))
    page = storage.read_bytes(report(str(out))).decode()
    assert "Untuned" not in page
    assert "among the same 2 of the rates 0.001, 0.01, with 1 seed(s) each" in page
    section = page[page.index('id="searches"') :].partition("</section>")[0]
    assert "<b>layer3.3</b>" in section
    assert "Chosen: layer3.3" in section  # the figure's description
    assert "tag bad" not in section
    assert {"auto"} == {json.loads(cell.options)["cut"] for cell in finished(str(out))}


@pytest.mark.parametrize(("metric", "mean", "says"), [("kappa_quadratic", 0.0, "all alike"), ("auroc_mean", None, "none above chance")])
def test_does_not_repeat_a_search_that_measured_nothing_as_an_answer(metric: str, mean: float | None, says: str, tmp_path: Path) -> None:
    held = json.loads((Path(__file__).parent / "golden" / "search.json").read_text())
    curve = [{**point, "mean": point["mean"] - 0.4 if mean is None else mean} for point in held["curve"]]
    row = search_section._row(held | {"metric": metric, "curve": curve})
    assert sum(f'<span class="tag bad">{says}</span>' in part for part in row) == 1
