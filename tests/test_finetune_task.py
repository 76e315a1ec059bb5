"""Tasks, strategies and files around a cell: strict, versioned, with the nearest right name in the error."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from base.config import load, parse
from base.errors import RequestError
from base.paths import PRESETS, ROOT, named, names
from finetune.catalogue import STRATEGIES
from finetune.cell import CellConfig, Result
from finetune.strategies import get, resolve
from finetune.task import LOSSES, METRICS, Kind, Task, TaskFile, load_task
from shards.card import load_card

SCHEMAS: dict[str, type[BaseModel]] = {"task": TaskFile, "cell": CellConfig, "cell_result": Result}
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
        studies = {"study"} if all(layout.study_column or layout.study_pattern or layout.study_tag for layout in card.layouts) else set()
        assert task.aggregate is None or task.aggregate.by in {"patient", *studies, *card.metadata}
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
    with pytest.raises(RequestError, match=r"presets.paper.recipe.patienec.*did you mean 'presets.paper.recipe.patience'"):
        load_task(str(own))


IMAGENET = {"normalise": "imagenet"}  # of every source, random ones too
BENCHMARK = {"batch": 32, "optimizer": "adam", "weight_decay": 0, "warmup": 0, "select": "loss"}
DOERRICH = {"batch": 64, "optimizer": "adamw", "weight_decay": 0.01, "lr": 1e-4, "epochs": 100, "schedule": "cosine", "patience": 5}
RECIPES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {  # study: tasks, what their paper presets say, and their views
    # Sections 3.2 and 3.3 of the reference.
    "benchmark classification": (
        ["ecc", "dxc14", "dxc5", "txc", "vindr", "mimic", "busi"],
        {**BENCHMARK, "lr": 2e-4, "epochs": 1000, "schedule": "plateau", "patience": 10, "plateau.patience": 5, "plateau.factor": 0.5},
        {"crop_scale": (0.08, 1), "flip": True, "rotate": 7, "resolution": 224, "evaluation": "ten-crop", **IMAGENET},
    ),
    "benchmark segmentation": (
        ["pxs", "lxs", "scr-heart", "scr-clavicle", "busi-lesion"],
        {**BENCHMARK, "lr": 1e-3, "epochs": 200, "schedule": "cosine", "patience": 20},
        {"light_p": 0.3, "distort_p": 0.3, "resized_crop_p": 0.25, "flip": False, "resolution": 224, "loss": "dice", **IMAGENET},
    ),
    "benchmark vessels": (
        ["vfs", "chase"],
        {**BENCHMARK, "lr": 1e-3, "epochs": 200, "schedule": "cosine", "patience": 20},
        {"crop_scale": (1, 1), "flip": False, "brightness": 0, "contrast": 0, "distort_p": 0, "resolution": 512, "loss": "bce", **IMAGENET},
    ),
    # Section 2.2.
    "TruncatedTL": (
        ["bimcv", "ham", "chexpert-14", "ecc-volume"],
        {"batch": 64, "optimizer": "adam", "lr": 1e-4, "epochs": 50, "schedule": "plateau", "select": "loss", "plateau.stop_below": 1e-6},
        {"crop_scale": (0.08, 1), "flip": True, "rotate": 0, "resolution": 224, "evaluation": "center-crop", "class_weights": "balanced"}
        | IMAGENET,
    ),
    # Section 1.2.
    "Transfusion retina": (
        ["retina", "retina-aptos", "retina-messidor", "referable", "referable-aptos", "referable-messidor"],
        {"batch": 32, "optimizer": "adam", "lr": 1e-3, "schedule": "constant"},
        {"resolution": 587, "evaluation": "whole"},
    ),
    "Transfusion chest": (
        ["chexpert-5"],
        {"batch": 32, "optimizer": "sgd", "momentum": 0.9, "lr": 1e-3, "schedule": "constant"},
        {"resolution": 224, "evaluation": "whole"},
    ),
    # Doerrich et al. 2025, their train.py and config.yaml.
    "MedMNIST+": (
        [name for name in names("task") if name.endswith("mnist")],
        DOERRICH,
        {"crop_scale": (1, 1), "flip": False, "resolution": 224, "evaluation": "whole"},
    ),
    "MedMNIST+ volumes": (
        [name for name in names("task") if name.endswith("mnist3d")],
        DOERRICH,
        {"crop_scale": (1, 1), "flip": False, "resolution": 28, "evaluation": "whole", "volume": True},
    ),
}


@pytest.mark.parametrize("study", RECIPES)
def test_paper_presets_are_the_studies_recipes_to_the_number(study: str) -> None:
    tasks, recipe, seen = RECIPES[study]
    for name in tasks:
        task = load_task(f"{name}/paper")
        flat = task.recipe.model_dump() | {f"plateau.{key}": value for key, value in task.recipe.plateau.model_dump().items()}
        assert {key: flat[key] for key in recipe} == recipe, name
        flat = {**task.model_dump(), **task.recipe.views.model_dump()}
        assert {key: flat[key] for key in seen} == seen, name


def test_every_task_comes_from_a_study_or_is_a_phantom() -> None:
    known = {name for tasks, _, _ in RECIPES.values() for name in tasks}
    assert set(names("task")) - known == {"phantom-chest", "phantom-scales", "phantom-vessels"}


def test_no_mirror_where_a_side_has_a_meaning() -> None:
    """The heart has a side, and so have labels that name one; what a study did all the same stays in its paper preset."""
    chests = ["dxc14", "dxc5", "txc", "bimcv", "chexpert-5", "chexpert-14", "vindr", "mimic", "ecc", "pxs", "scr-heart", "ecc-volume"]
    chests += ["chestmnist", "pneumoniamnist", "organamnist", "organcmnist", "organsmnist", "organmnist3d"]
    assert not [name for name in chests for preset in ("smoke", "small") if load_task(f"{name}/{preset}").recipe.views.flip]
    sided = [name for name in names("task") if any("left" in label or "right" in label for label in load_task(name).labels)]
    assert sided == ["organamnist", "organcmnist", "organmnist3d", "organsmnist"]
    assert not [name for name in sided if load_task(f"{name}/paper").recipe.views.flip]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_kind_has_its_losses_and_metrics_and_no_others(kind: Kind) -> None:
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
    with pytest.raises(RequestError, match=r"unknown task 'dxc114'.*did you mean 'dxc14'"):
        load_task("dxc114")
    with pytest.raises(RequestError, match=r"recipe\.epoch.*did you mean 'recipe\.epochs'"):
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
    for wrong in ("recipe.views.crop_scale=[0,1]", "recipe.views.crop_scale=[0.9,0.5]", "recipe.views.crop_ratio=[-1,1]"):
        with pytest.raises(RequestError, match=r"recipe\.views: crop_\w+ must be 0 < low <= high"):
            load_task("dxc14", [wrong])
    with pytest.raises(RequestError, match=r"recipe\.views\.rotate"):
        load_task("dxc14", ["recipe.views.rotate=-7"])
    with pytest.raises(RequestError, match="no such task file"):
        load_task(str(tmp_path / "mine.yaml"))


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    text = "{schema: 3, task: t, title: t, dataset: mine.yaml, kind: ordinal, metric: dice, loss: bce, mask_class: a, decoder: upernet,"
    (tmp_path / "t.yaml").write_text(f"{text} evaluate: [b], presets: {{small: {{resolution: 8, recipe: {{batch: 32, lr: 0.1}}}}}}}}")
    with pytest.raises(RequestError) as refused:
        load_task(str(tmp_path / "t.yaml"))
    assert refused.value.what.split("; ") == [
        "dataset: 'mine.yaml' is a file, write the name that its card has",
        "labels: an ordinal task needs them",
        "mask_class: an ordinal task has no masks",
        f"metric: 'dice' does not measure an ordinal task, {' or '.join(METRICS['ordinal'])} does",
        "loss: 'bce' does not fit an ordinal task, cumulative does",
        "decoder: an ordinal task has none",
        "presets.small.resolution: 8 is less than 16",
        "missing key 'presets.small.recipe.epochs'",
    ]


def test_strategies_by_name() -> None:
    for name in STRATEGIES:
        required = {key: "layer3" for key, field in get(name).Config.model_fields.items() if field.is_required()}
        make, options = resolve({"name": name, **required})
        assert make is get(name)
        assert options == make.Config(**required)
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
    assert load(GOLDEN / "cell.yaml", CellConfig).schema_ == 2
    result = json.loads((GOLDEN / "cell_result.json").read_text())
    assert parse(result, Result, "golden").model_dump(mode="json", by_alias=True) == result


# -- docs/tasks.md


PAGE = ROOT / "docs" / "tasks.md"


def test_the_page_lists_every_task() -> None:
    """ALLOGRAFT_UPDATE_GOLDEN=1 rewrites the table."""
    text = PAGE.read_text()
    head = text.index("| task |")
    end = text.index("\n\n", head)
    if os.environ.get("ALLOGRAFT_UPDATE_GOLDEN"):
        text = text[:head] + _table() + text[end:]
        PAGE.write_text(text)
        end = text.index("\n\n", head)
    assert text[head:end] == _table()


def _table() -> str:
    rows = ["| task | what | dataset | kind | metric | paper recipe | its source |", "|---|---|---|---|---|---|---|"]
    for name in names("task"):
        task, source = load_task(f"{name}/paper"), load(named("task", name), TaskFile).source
        recipe = task.recipe
        said = [f"{recipe.optimizer} {recipe.lr:g}", f"batch {recipe.batch}", f"{recipe.epochs} epochs", recipe.schedule, task.loss]
        said += [f"{task.resolution} px"] + [task.evaluation] * (task.evaluation != "whole")
        said += ["balanced"] * (task.class_weights == "balanced") + ["mirrored"] * recipe.views.flip
        cells = [f"`{name}`", task.title, f"`{task.dataset}`", task.kind, task.metric, ", ".join(said), source]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_task_on_the_page_is_ten_lines_at_most_and_reads(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 10
    (tmp_path / "effusion.yaml").write_text(text)
    assert load_task(str(tmp_path / "effusion.yaml")).recipe.views.flip is False


def test_the_page_lists_the_keys_without_a_default(tmp_path: Path) -> None:
    """And whoever leaves out all of them is told so at once."""
    listed = PAGE.read_text().partition("These keys have no default: ")[2].partition(". What else")[0]
    (tmp_path / "effusion.yaml").write_text("presets: {small: {recipe: {}}}")
    with pytest.raises(RequestError) as refused:
        load_task(str(tmp_path / "effusion.yaml"))
    missing = [re.sub(r"missing key '(?:.*\.)?(\w+)'", r"\1", part) for part in refused.value.what.split("; ")]
    assert {*missing, "labels"} == set(re.findall(r"`(\w+)`", listed))  # labels are wanted where the kind is known


def test_the_page_names_the_losses_and_metrics_of_every_kind() -> None:
    text = PAGE.read_text()
    for kind, losses in LOSSES.items():
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", text, re.MULTILINE)
        assert list(re.findall(r"`([a-z_-]+)`", row.split("|")[4])) == list(losses)
