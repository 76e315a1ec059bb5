"""Tasks, strategies and files around a cell: strict, versioned, with the nearest right name in the error."""

import json
from pathlib import Path

import pytest

from base.config import load, parse
from base.errors import RequestError
from base.paths import ROOT, names
from finetune.cell import CellConfig, Result
from finetune.strategies import STRATEGIES, get, resolve
from finetune.task import Task, load_task
from shards.card import load_card

SCHEMAS = {"task": Task, "cell": CellConfig, "cell_result": Result}
GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize("name", names("task"))
def test_every_task_reads_and_fits_its_card(name: str) -> None:
    task = load_task(name)
    card = load_card(task.dataset)
    assert task.task == name
    assert set(task.labels) <= set(card.labels)
    assert task.kind != "segmentation" or card.has_masks
    assert task.mask_class is None or task.mask_class in card.mask_classes


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
    """To change a format: raise its `schema`, then write what this test prints."""
    schema = json.dumps(SCHEMAS[name].model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / f"{name}.json").read_text() == schema


def test_golden_files_still_read() -> None:
    assert load(GOLDEN / "task.yaml", Task).schema_ == 2
    assert load(GOLDEN / "cell.yaml", CellConfig).schema_ == 1
    result = json.loads((GOLDEN / "cell_result.json").read_text())
    assert parse(result, Result, "golden").model_dump(mode="json", by_alias=True) == result
