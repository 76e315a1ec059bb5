"""`allograft plan`: what is left to do, what it takes by measurements or by operations, what has changed; and 10,000 cells in seconds."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_study

from analysis.results import Pretraining
from base import storage
from base.errors import RequestError
from cluster import plan
from cluster.cells import write_plan
from cluster.estimate import Run, Seen, Speeds, devices
from cluster.load import load_study
from cluster.outlook import comparisons, outlook
from cluster.plan import Packed, Weights
from cluster.searches import Searches
from cluster.standing import foreseen
from cluster.study import Resources, Study
from engine import gpus
from engine.context import LocalContext
from finetune.run import run
from shards import manifest
from shards.card import load_card
from shards.pack import plan as jobs

H100 = gpus.get("h100-sxm")
TREE: dict[str, Any] = {
    "schema": 1,
    "study": "planned",
    "cells": {
        "sources": ["random", {"name": "random-b", "source": "random"}],
        "architectures": ["test_resnet"],
        "strategies": ["linear"],
        "tasks": ["phantom-chest"],
        "resolutions": [32],
        "seeds": [0, 1],
        "task_settings": {"phantom-chest": {"linear.epochs": 3}},
    },
}


def written(folder: Path, shards: str, cells: dict[str, Any] | None = None, **changes: Any) -> Study:
    tree = {**TREE, "data": {"phantom-chest": {"shards": shards}}, "cells": {**TREE["cells"], **(cells or {})}}
    return load_study(tiny_study.write(folder, tree, **changes))


def searches_of(study: Study, shards: str) -> Searches:
    return Searches(plan.settings(study, {"phantom-chest": Packed(shards, manifest.read(shards))}, {}), keep=False)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_sides_under_the_least_that_a_network_takes_are_refused_and_those_of_one_cut_off_may_be_taken(
    tmp_path: Path, phantom_chest: str
) -> None:
    small = {"architectures": ["densenet121"], "resolutions": [48, 24]}
    truncated = written(tmp_path, phantom_chest, {**small, "strategies": [{"name": "truncated", "cut": "denseblock1"}]})
    assert len(searches_of(truncated, phantom_chest).cells) == 8
    with pytest.raises(RequestError, match="phantom-chest, linear: resolution: densenet121 takes images of at least 29 px, not of 24"):
        searches_of(written(tmp_path, phantom_chest, small), phantom_chest)
    given = written(tmp_path, phantom_chest, {"sources": [{"name": "given", "source": "./export"}]})
    assert [one.architecture for one in plan.settings(given, {}, foreseen(given, {}, {}))] == [""], "not looked at yet"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, phantom_chest: str) -> Study:
    """A study of four cells, of which two are finished."""
    study = written(tmp_path_factory.mktemp("begun"), phantom_chest)
    searches = searches_of(study, phantom_chest)
    for config in searches.ready()[:2]:
        run(config, LocalContext(dir=config.out))
    storage.put(f"{study.out}/study.yaml", Path(study.out).parent.joinpath("study.yaml").read_text())
    write_plan(study.out, searches)
    return study


def test_ten_thousand_cells_take_seconds(tmp_path: Path, phantom_chest: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The bound for each cell, in the processor's time: the machine may have other things to do."""
    strategies = ["full", "linear", "mean-var", "l2-sp", {"name": "lwft", "cut": "layer2"}]
    cells = {"strategies": strategies, "fractions": [0.1, 0.5, 1.0], "seeds": list(range(20))}
    small = written(tmp_path, phantom_chest, {"strategies": strategies})
    outlook(small)  # the imports are paid for by the command, whatever it plans
    study = written(tmp_path, phantom_chest, cells)
    began = time.process_time()
    assert outlook(study)
    assert time.process_time() - began < 600 * 10 / 10_000 + 0.5
    assert "cells 600, of which 0 stand" in said(capsys)


def test_finished_cells_say_how_long_the_others_take(begun: Study, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in Path(begun.out).rglob("*"))
    assert outlook(begun, rate=3600.0)
    text = said(capsys)
    assert "cells 4, of which 2 stand" in text
    assert "cells of phantom-chest 2 to do" in text
    assert "measured on 2 finished cells" in text
    assert " at 3600 an hour" in text
    assert "licence phantom-chest generated, no rights reserved" in text
    assert "free there" in text
    assert sorted(path.name for path in Path(begun.out).rglob("*")) == before


def test_an_estimate_by_measurement_is_what_was_measured(begun: Study) -> None:
    shards = str(begun.data["phantom-chest"].shards)
    done = [config for config in searches_of(begun, shards).cells if storage.exists(f"{config.out}/result.json")]
    seen = {"phantom-chest": Seen.packed(manifest.read(shards))}
    speeds = Speeds(begun.resources, H100)
    speeds.learn(done, seen)
    seconds = [storage.read_json(f"{config.out}/result.json")["seconds"] for config in done]
    assert speeds.of(done[0], seen["phantom-chest"]).seconds == pytest.approx(sum(seconds) / 2)
    half = done[0].model_copy(update={"fraction": 0.5})
    assert speeds.of(half, seen["phantom-chest"]).seconds < sum(seconds) / 2
    other = done[0].model_copy(update={"architecture": "resnet18"})
    assert speeds.of(other, seen["phantom-chest"]).basis.startswith("by operations")
    on_gpu = Speeds(Resources(gpus_per_cell=0.5), H100)
    assert on_gpu.of(other, seen["phantom-chest"]).basis == "by operations, at 25% of the GPU in bf16"
    assert devices(on_gpu.resources) == ("GPU", 0.0, 0.5)


def test_a_changed_study_file_is_told_by_what_becomes_of_the_cells(begun: Study, capsys: pytest.CaptureFixture[str]) -> None:
    folder, shards = Path(begun.out).parent, str(begun.data["phantom-chest"].shards)
    outlook(written(folder, shards, {"seeds": [0, 1, 2]}))
    text = said(capsys)
    assert "the study file has changed: cells.seeds.2" in text
    assert "cells: 2 kept; 4 new" in text
    outlook(written(folder, shards, {"task_settings": {"phantom-chest": {"linear.epochs": 4}}}))
    text = said(capsys)
    assert "the study file has changed: cells.task_settings.phantom-chest.linear.epochs" in text
    assert "cells: 2 computed again, since what they are made of has changed; 2 new" in text
    outlook(written(folder, shards, {"strategies": ["full"]}))
    assert "cells: 4 new; 2 no longer asked for" in said(capsys)
    outlook(written(folder, shards))
    text = said(capsys)
    assert "the study file has changed" not in text
    assert "cells: 2 kept; 2 new" in text


def test_a_pretraining_is_told_by_operations_before_its_data_are_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {**tiny_study.SMALLER, "resources": {"gpus_per_pretrain_worker": 1, "gpus_per_cell": 0.25}}
    sources = ["random", "pretrain:simclr", "zoo:moco-v2"]
    study = load_study(tiny_study.write(tmp_path, tree, cells={**tree["cells"], "sources": sources}))
    assert outlook(study, wanted=0.1)
    text = said(capsys)
    assert "pack phantom-chest to do, from phantom:120" in text
    assert "pretrain simclr 1 of 1 to do, 4 steps, " in text  # two epochs of 86 images, 32 at a time
    assert "by operations, at 50% of the GPU's roofline in fp32" in text
    assert "cells 4, of which 0 stand" in text  # random weights of both architectures
    assert "source zoo:moco-v2 not here: fetched when the study runs" in text
    assert "licence zoo:moco-v2 CC-BY-NC-4.0" in text
    assert "power phantom-chest declares no difference among 2 comparisons" in text  # one seed
    assert not Path(study.out).exists()


def test_what_is_missing_is_said_first_and_nothing_is_counted_as_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**tiny_study.SMALLER, "data": {"phantom-chest": {"shards": str(tmp_path / "nowhere")}}}
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as a terminal shows both
    assert not outlook(load_study(tiny_study.write(tmp_path, tree)))
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"cannot start: phantom-chest: .*/nowhere: no packed dataset here \(allograft pack phantom-chest RAW", lines[0])
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "\npack phantom-chest cannot start, see above\n" in text
    assert re.search(r"\ncells of phantom-chest \d+ to do, not all of it can be told yet\n", text)
    assert "\nin all not all of it can be told yet\n" in text
    assert "\nstorage not all of it can be told yet in " in text
    assert "nothing to compute" not in text
    assert not re.search(r"\b0 (kB|s\b)", text)


def test_lines_hold_in_a_window(begun: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert outlook(begun, wanted=0.02)
    lines = capsys.readouterr().out.splitlines()
    power = next(i for i, line in enumerate(lines) if line.startswith("power phantom-chest"))
    assert "declares" in lines[power]
    assert " takes " in lines[power] or "no number of seeds" in lines[power]
    assert lines[power + 1].strip().startswith("assumes ")
    assert max(map(len, lines[power : power + 2])) <= 140


def test_more_steps_take_more_hours(tmp_path: Path) -> None:
    study = load_study(tiny_study.write(tmp_path, {**tiny_study.SMALLER, "resources": {"gpus_per_pretrain_worker": 1}}))
    entry = study.pretrain[0]
    long = entry.model_copy(update={"settings": {"max_steps": 24, "epochs": 100}})
    runs = [Run.of(study, one, "test_resnet", images=100, channels=1) for one in (entry, long)]
    short_s, long_s = (one.estimate(study.resources, H100, []).seconds for one in runs)
    assert runs[0].explained.steps < runs[1].explained.steps == 24
    assert long_s / short_s == pytest.approx(24 / runs[0].explained.steps)


def test_hours_are_of_all_that_finished_runs_took(tmp_path: Path) -> None:
    """And not of the median of their steps, which leaves out the start and the probes."""
    study = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER))
    run = Run.of(study, study.pretrain[0], "test_resnet", images=100, channels=1)
    recipe = run.explained.recipe
    result = {
        "images": 192,
        "seconds": 14.1,
        "img_per_s": 95.5,
        "image_size": recipe.views.size,
        "architecture": "test_resnet",
        "workers": 1,
    }
    config = {"recipe": {"method": recipe.method, "global_batch": recipe.global_batch}}
    finished = [Pretraining("a", "k", "", config, [], result)] * 2
    found = run.estimate(study.resources, H100, finished)
    assert found.basis == "measured on 2 finished runs"
    assert found.seconds == pytest.approx(run.explained.steps * recipe.global_batch * 14.1 / 192)


def test_what_is_known_before_packing_is_what_the_manifest_says(phantom_chest: str) -> None:
    planned, packed = Seen.planned(jobs(load_card("phantom-chest"), "phantom:240")), Seen.packed(manifest.read(phantom_chest))
    assert planned.images == packed.images
    assert planned.patients == packed.patients
    assert planned.positive == {}
    assert all(0 < share < 1 for share in packed.positive.values())
    assert planned.to_pack > 0 == packed.to_pack


def test_comparisons_are_those_of_the_report(tmp_path: Path, phantom_chest: str) -> None:
    cells = {"strategies": ["full", "linear"], "fractions": [0.1, 1.0], "shuffled_labels": ["random"]}
    study = written(tmp_path, phantom_chest, cells)
    assert comparisons(study, searches_of(study, phantom_chest)) == 4
    given = {"name": "given", "source": "timm:test_resnet.r160_in1k"}
    sources = ["random", {"name": "random-b", "source": "random"}, given]
    study = written(tmp_path, phantom_chest, cells | {"sources": sources})
    weights = {"given": [Weights("", "0" * 64, "test_resnet")]}
    settings = plan.settings(study, {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}, weights)
    assert comparisons(study, Searches(settings, keep=False)) == 4, "twins are controls"
    claim = {
        "name": "twins",
        "sentence": "Two draws of random weights are one source.",
        "about": "encoders",
        "comparison": {"a": {"source": "random"}, "b": {"source": "random-b"}},
        "expect": "equivalent",
        "margin": 0.02,
        "where": {"strategy": "full"},
    }
    study = written(tmp_path, phantom_chest, cells, claims=[claim])
    assert comparisons(study, searches_of(study, phantom_chest)) == 2


def test_no_power_is_promised_where_every_comparison_has_a_source_that_the_task_taught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**tiny_study.SIMCLR, "recipe": "supervised/smoke"}
    cells = {**tiny_study.SMALLER["cells"], "sources": ["random", f"pretrain:{entry['name']}"], "seeds": [0, 1]}
    study = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER, pretrain=[entry], cells=cells))
    outlook(study)
    text = said(capsys)
    assert "power nothing is declared: every comparison has a source that the task's own images or labels have taught" in text
    assert "declares" not in text


def test_comparisons_leave_out_labels_that_a_source_will_have_seen() -> None:
    """Two gains and a chain in four settings, without those of simclr-sup on the findings that it learns, before any run has begun."""
    study = load_study("studies/real-mini.yaml", ["cells.seeds=[0,1]"])
    searches = Searches(plan.settings(study, {}, foreseen(study, {}, {})), keep=False)
    assert comparisons(study, searches) == 8
