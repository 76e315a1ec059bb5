"""Tasks, strategies and files around a cell: strict, versioned, with the nearest right name in the error."""

import json
import os
from pathlib import Path

import pytest

from base.config import load, parse
from base.errors import RequestError
from base.paths import PRESETS, ROOT, named, names
from finetune.cell import CellConfig, Result
from finetune.strategies import STRATEGIES, get, resolve
from finetune.task import LOSSES, METRICS, Task, TaskFile, load_task
from shards.card import load_card

SCHEMAS = {"task": TaskFile, "cell": CellConfig, "cell_result": Result}
GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize("name", names("task"))
def test_every_task_reads_in_every_preset_and_fits_its_card(name: str) -> None:
    for preset in PRESETS:
        task = load_task(f"{name}/{preset}")
        card = load_card(task.dataset)
        assert (task.task, task.preset) == (name, preset)
        assert set(task.labels) <= {*card.labels, *card.derived}
        assert task.kind != "segmentation" or card.has_masks
        assert task.mask_class is None or task.mask_class in card.mask_classes
        assert task.kind != "ordinal" or card.kind == "multiclass"
        assert task.aggregate is None or task.aggregate.by in {"patient", *card.metadata}
        assert not task.volume or card.slab


def test_a_preset_is_named_after_the_task(tmp_path: Path) -> None:
    assert load_task("dxc14") == load_task("dxc14/small")
    assert load_task("dxc14").recipe.optimizer == "adamw"
    assert load_task("dxc14/paper", {"recipe.epochs": 3}).recipe.model_dump(include={"optimizer", "epochs"}) == {
        "optimizer": "adam",
        "epochs": 3,
    }
    assert named("task", "dxc14/paper") == named("task", "dxc14")
    with pytest.raises(RequestError, match=r"unknown task 'dxc14/papr'.*did you mean 'dxc14/paper'"):
        load_task("dxc14/papr")
    own = tmp_path / "own.yaml"
    text = named("task", "lxs").read_text()
    own.write_text(text.partition("  paper:")[0].replace("task: lxs", "task: own"))
    assert load_task(f"{own}/smoke").task == "own"
    with pytest.raises(RequestError, match="unknown preset 'paper'"):
        load_task(f"{own}/paper")
    own.write_text(text.replace("patience: 20", "patienec: 20"))
    with pytest.raises(RequestError, match=r"presets.paper.recipe.patienec.*did you mean 'patience'"):
        load_task(str(own))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_kind_has_its_losses_and_metrics_and_no_others(kind: str) -> None:
    facts = {"schema": 3, "task": "t", "title": "t", "dataset": "d", "kind": kind, "resolution": 32}
    facts |= {"labels": [] if kind == "segmentation" else ["a", "b"], "recipe": {"epochs": 1, "batch": 2, "lr": 0.1, "patience": 1}}
    assert parse({**facts, "metric": METRICS[kind][0]}, Task, "t").loss == LOSSES[kind][0]
    for loss in sorted({loss for losses in LOSSES.values() for loss in losses} - set(LOSSES[kind])):
        with pytest.raises(RequestError, match=f"loss: '{loss}' does not fit"):
            parse({**facts, "metric": METRICS[kind][0], "loss": loss}, Task, "t")
    for metric in sorted({metric for metrics in METRICS.values() for metric in metrics} - set(METRICS[kind])):
        with pytest.raises(RequestError, match=f"metric: '{metric}' does not measure"):
            parse({**facts, "metric": metric}, Task, "t")


def test_errors_name_file_key_and_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"unknown task 'dxc15'.*did you mean 'dxc14'"):
        load_task("dxc15")
    with pytest.raises(RequestError, match=r"recipe\.epoch.*did you mean 'epochs'"):
        load_task("dxc14", ["recipe.epoch=3"])
    assert load_task("dxc14", ["recipe.epochs=3"]).recipe.epochs == 3
    with pytest.raises(RequestError, match="'dice' does not measure a multilabel task"):
        load_task("dxc14", ["metric=dice"])
    with pytest.raises(RequestError, match="a segmentation task has none"):
        load_task("lxs", ["labels=[tb]"])
    with pytest.raises(RequestError, match="a multilabel task has no masks"):
        load_task("dxc14", ["mask_class=heart"])
    with pytest.raises(RequestError, match="evaluate: Fracture is not among labels"):
        load_task("dxc14", ["evaluate=[Mass,Fracture]"])
    with pytest.raises(RequestError, match="aggregate: not for a segmentation task"):
        load_task("lxs", {"aggregate": {"by": "patient", "how": "mean"}})
    assert load_task("dxc14", ["evaluate=[Mass,Effusion]"]).measured == ["Effusion", "Mass"]
    with pytest.raises(RequestError, match="no such task file"):
        load_task(str(tmp_path / "mine.yaml"))


def test_strategies_by_name() -> None:
    for name in STRATEGIES:
        make, options = resolve(name)
        assert make is get(name)
        assert options == make.Config()
    with pytest.raises(RequestError, match=r"unknown strategy 'linaer'.*did you mean 'linear'"):
        resolve("linaer")
    with pytest.raises(RequestError, match="unknown key 'cut'"):
        resolve({"name": "full", "cut": "layer3"})
    with pytest.raises(RequestError, match="needs a name"):
        resolve({"cut": "layer3"})


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schema_is_committed(name: str) -> None:
    """To change a format: raise its `schema`; ALLOGRAFT_UPDATE_GOLDEN=1 rewrites the file."""
    schema = json.dumps(SCHEMAS[name].model_json_schema(by_alias=True), indent=1) + "\n"
    path = ROOT / "docs" / "schemas" / f"{name}.json"
    if os.environ.get("ALLOGRAFT_UPDATE_GOLDEN"):
        path.write_text(schema)
    assert path.read_text() == schema


def test_golden_files_still_read() -> None:
    assert load(GOLDEN / "task.yaml", TaskFile).schema_ == 3
    assert load(GOLDEN / "cell.yaml", CellConfig).schema_ == 1
    result = json.loads((GOLDEN / "cell_result.json").read_text())
    assert parse(result, Result, "golden").model_dump(mode="json", by_alias=True) == result
