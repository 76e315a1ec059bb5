"""Studies: what is checked before anything starts."""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tiny_corpus
import tiny_study
import yaml

from base import storage
from base.config import to_yaml
from base.errors import RequestError, WorkError
from base.paths import ROOT, named
from cluster import lock, plan, stages
from cluster.events import Events
from cluster.load import load_study
from cluster.lock import DriverLock
from cluster.mlflow_store import require_server
from cluster.outlook import outlook
from cluster.outs import refuse_other_out
from cluster.pack import check_place
from cluster.registry import champion_score
from cluster.single import as_typed, finetune_study, pretrain_study, spelled
from cluster.standing import jobs_of, shards_url, standing_corpora
from cluster.study import DataEntry, Resources, Study
from cluster.submit import _texts
from finetune.task import load_task
from shards.card import load_card
from shards.manifest import read
from shards.pack import pack

TINY: dict[str, Any] = {
    "schema": 1,
    "study": "tiny",
    "out": "runs/tiny",
    "data": {"phantom-chest": {"raw": "phantom:60"}},
    "pretrain": [{"name": "simclr", "recipe": "simclr/smoke", "data": {"phantom-chest": "train"}, "architecture": "test_resnet"}],
    "cells": {"sources": ["random", "pretrain:simclr"], "strategies": ["full"], "tasks": ["phantom-chest"]},
}


def written(tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def test_short_forms_are_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_study(written(tmp_path))
    assert study.cells is not None
    assert [(source.name, source.source) for source in study.cells.sources] == [("random", "random"), ("simclr", "pretrain:simclr")]
    assert study.cells.strategies == [{"name": "full"}]
    assert study.out == str(tmp_path / "runs" / "tiny")
    assert study.data["phantom-chest"].raw == "phantom:60"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"celsl": {}}, "did you mean 'cells'"),
        ({"cells": {**TINY["cells"], "fraction": [0.1]}}, "unknown key 'cells.fraction', did you mean 'cells.fractions'?"),
        ({"cells": {**TINY["cells"], "sedes": [0]}}, "unknown key 'cells.sedes', did you mean 'cells.seeds'?"),
        ({"sources": ["random"]}, "unknown key 'sources', did you mean 'cells.sources'?"),
        ({"data": {"phantom-chest": {"rwa": "phantom:60"}}}, "did you mean 'data.phantom-chest.raw'"),
        (
            {"data": {"phantom-chets": {"raw": "phantom:60"}}},
            ": data.phantom-chets: unknown card 'phantom-chets' (did you mean 'phantom-chest'",
        ),
        ({"data": {"phantom-chest": {"raw": "x", "shards": "y"}}}, "exactly one of raw and shards"),
        (
            {"cells": {**TINY["cells"], "tasks": ["phantom-chets"]}},
            ": cells.tasks[0]: unknown task 'phantom-chets' (did you mean 'phantom-chest'",
        ),
        (
            {"cells": {**TINY["cells"], "task_settings": {"phantom-chest": {"recipe.epohcs": 1}}}},
            ": cells.task_settings.phantom-chest: unknown key 'recipe.epohcs', did you mean 'recipe.epochs'",
        ),
        ({"cells": {**TINY["cells"], "tasks": ["dxc14"]}}, "data.nih-cxr14.raw=PATH"),
        ({"cells": {**TINY["cells"], "strategies": ["liner"]}}, ": cells.strategies[0]: unknown strategy 'liner' (did you mean 'linear'"),
        ({"cells": {**TINY["cells"], "strategies": "full"}}, 'cells.strategies: expected a list, got "full"'),
        ({"cells": {**TINY["cells"], "sources": "random"}}, 'cells.sources: expected a list, got "random"'),
        ({"claims": ["transfer-on-few-dat"]}, ": claims[0]: unknown claim 'transfer-on-few-dat' (did you mean 'transfer-on-few-data'"),
        (
            {"cells": {**TINY["cells"], "strategies": ["full", {"name": "lwft", "cut": "layer9"}]}},
            "cells.strategies[1]: test_resnet has no cut 'layer9'",
        ),
        ({"cells": {**TINY["cells"], "strategies": ["lora"]}}, "cells.strategies[0]: lora adapts the attention of vision transformers"),
        ({"cells": {**TINY["cells"], "sources": ["randon"]}}, "did you mean 'random'"),
        ({"cells": {**TINY["cells"], "sources": ["pretrain:simcrl"]}}, "did you mean 'simclr'"),
        ({"cells": {**TINY["cells"], "sources": ["random", "random"]}}, "sources: random stands twice"),
        (
            {"pretrain": [{**TINY["pretrain"][0], "recipe": "simcrl/smoke"}]},
            ": pretrain[0].recipe: unknown recipe 'simcrl/smoke' (did you mean 'simclr/smoke'",
        ),
        (
            {"pretrain": [{**TINY["pretrain"][0], "settings": {"epohcs": 1}}]},
            ": pretrain[0]: recipe simclr/smoke: unknown key 'epohcs', did you mean 'epochs'",
        ),
        ({"pretrain": [{**TINY["pretrain"][0], "architecture": None}]}, "needs an architecture"),
        ({"out": "s3://bucket/x"}, "tracking must be a server"),
        ({"preset": "smok"}, ": preset: unknown preset 'smok' (there is none)"),
        ({"champion": {"task": "dxc14"}}, "unknown task 'dxc14'"),
        ({"champion": {"task": "phantom-chest", "metric": "auroc_maen"}}, "champion.metric"),
        ({"champion": {"task": "phantom-chest", "metric": "dice"}}, "does not measure phantom-chest"),
        ({"tracking": "foo"}, "tracking"),
        ({"cells": {**TINY["cells"], "seeds": [-1]}}, "cells.seeds.0: -1 is less than 0"),
        ({"cells": {**TINY["cells"], "fractions": [-1.0]}}, "cells.fractions.0: -1.0 is not more than 0"),
        ({"cells": {**TINY["cells"], "fractions": [10]}}, "yaml: cells.fractions.0: 10 is more than 1"),
        ({"cells": {**TINY["cells"], "fractions": "10%"}}, 'cells.fractions: expected a list or a mapping of keys to values, got "10%"'),
        ({"cells": {**TINY["cells"], "tasks": []}}, "cells.tasks: is empty"),
        ({"cells": {**TINY["cells"], "resolutions": [7]}}, "cells.resolutions.0: 7 is less than 16"),
        ({"cells": {**TINY["cells"], "seeds": [0, 0]}}, "seeds: 0 stands twice"),
        ({"cells": {**TINY["cells"], "tasks": ["phantom-chest"] * 2}}, "tasks: phantom-chest stands twice"),
        ({"cells": {**TINY["cells"], "tasks": ["phantom-chest", "phantom-chest/paper"]}}, "tasks: phantom-chest stands twice"),
        ({"champion": {"task": "phantom-chest/small", "metric": "iou"}}, "does not measure phantom-chest"),
        (
            {"champion": {"task": "phantom-chest/paper"}},
            "champion.task: unknown task 'phantom-chest/paper' (cells.tasks has phantom-chest)",
        ),
        ({"cells": {**TINY["cells"], "task_settings": {"dxc14": {}}}}, "unknown task 'dxc14'"),
        (
            {"cells": {**TINY["cells"], "architectures": ["resnet19"]}},
            ": cells.architectures[0]: unknown architecture 'resnet19' (did you mean 'resnet18'",
        ),
        (
            {"pretrain": [{**TINY["pretrain"][0], "architecture": "resnet19"}]},
            ": pretrain[0].architecture: unknown architecture 'resnet19' (did you mean 'resnet18'",
        ),
        (
            {
                "data": {"phantom-chest": {"raw": "phantom:60"}, "phantom-fundus": {"raw": "phantom:60"}},
                "pretrain": [{**TINY["pretrain"][0], "data": {"phantom-chest": "train", "phantom-fundus": "train"}}],
            },
            "grey and colour",
        ),
    ],
)
def test_a_wrong_study_is_refused_with_the_nearest_right_name(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        load_study(written(tmp_path, **changes))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/study.yaml: ")


def test_a_study_is_found_by_its_name_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    assert load_study("study").study == "tiny"
    (tmp_path / "README.md").write_text("# Words\n")
    (tmp_path / "empty").mkdir()
    for word, says in (
        (str(tmp_path), f"{tmp_path}: this is a folder, and a study is a YAML file (in it: study.yaml)"),
        ("empty", "empty: this is a folder, and a study is a YAML file (allograft init NAME writes one)"),
        ("README.md", "README.md: this is no study: its name would end in .yaml"),
        ("below/study", "below/study.yaml: no such file"),
        ("dmeo", "unknown study 'dmeo' (did you mean 'demo'?)"),
    ):
        with pytest.raises(RequestError) as caught:
            load_study(word)
        assert str(caught.value) == says


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Here, cards/mine.yaml is the card of a dataset `ward` and ward-task.yaml a task of it; a study of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cards").mkdir()
    files: list[tuple[Any, str]] = [("card", "cards/mine.yaml"), ("task", "ward-task.yaml")]
    for kind, file in files:
        (tmp_path / file).write_text(named(kind, "phantom-chest").read_text().replace("dataset: phantom-chest", "dataset: ward"))
    run = {**TINY["pretrain"][0], "data": {"ward": "train"}}
    return {"data": {"cards/mine.yaml": {"raw": "phantom:60"}}, "pretrain": [run], "cells": {**TINY["cells"], "tasks": ["ward-task.yaml"]}}


def test_a_card_of_ones_own_is_named_by_its_file_once_and_by_its_name_from_there_on(tmp_path: Path, ward: dict[str, Any]) -> None:
    study = load_study(written(tmp_path, **ward), ["data.cards/mine.yaml.raw=phantom:80"])
    assert study.data == {"ward": DataEntry(raw="phantom:80", card="cards/mine.yaml")}
    assert {job.card.dataset for job in jobs_of(study, "ward")} == {"ward"}
    assert shards_url(study, "ward") == f"{tmp_path}/runs/tiny/shards/ward"
    assert standing_corpora(study) == {}
    assert "cards/mine.yaml" in _texts(study.model_dump())  # so that it goes along with a job
    (tmp_path / "again.yaml").write_text(to_yaml(study))
    assert load_study("again.yaml") == study  # OUT/study.yaml is a study file
    one = pretrain_study("simclr/smoke", ["data.cards/mine.yaml.raw=phantom:60", "architecture=test_resnet"])
    assert (one.pretrain[0].data, one.data["ward"].card) == ({"ward": "train"}, "cards/mine.yaml")
    cell = finetune_study("ward-task.yaml", ["data.cards/mine.yaml.raw=phantom:60", "architecture=test_resnet"])
    assert [*cell.data] == ["ward"]


def test_what_names_a_card_of_ones_own_by_its_file_elsewhere_is_told_the_name(tmp_path: Path, ward: dict[str, Any]) -> None:
    asked = ["data.cards/mine.yaml.raw=phantom:60", "architecture=test_resnet"]
    run = {**ward["pretrain"][0], "data": {"cards/mine.yaml": "train"}}
    with pytest.raises(RequestError, match=r"pretrain\[0\]\.data: 'cards/mine.yaml' is a file \(write the name that its card has: ward\)"):
        load_study(written(tmp_path, **{**ward, "pretrain": [run]}))
    with pytest.raises(RequestError, match=r"needs the dataset 'ward' \(data\.CARD\.yaml\.raw=PATH\)"):
        load_study(written(tmp_path, cells=ward["cells"]))
    with pytest.raises(RequestError, match=r"data\.CARD\.yaml\.raw=FOLDER"):
        finetune_study("ward-task.yaml", ["architecture=test_resnet"])
    task = tmp_path / "ward-task.yaml"
    task.write_text(task.read_text().replace("dataset: ward", "dataset: cards/mine.yaml"))
    says = r"ward-task.yaml: dataset: 'cards/mine.yaml' is a file, write the name that its card has: ward"
    with pytest.raises(RequestError, match=says):
        load_study(written(tmp_path, **ward))
    with pytest.raises(RequestError, match=says):
        finetune_study("ward-task.yaml", asked)


@pytest.fixture
def blob(tmp_path: Path, ward: dict[str, Any]) -> dict[str, Any]:
    """blob.yaml is the file of a task `blob` in presets smoke and small, cells.tasks has it in smoke, and beside it a task of ours."""
    task = yaml.safe_load(named("task", "phantom-chest").read_text())
    (tmp_path / "blob.yaml").write_text(yaml.safe_dump({**task, "task": "blob", "dataset": "ward"}))
    data = {**ward["data"], **TINY["data"]}
    return {**ward, "data": data, "cells": {**TINY["cells"], "tasks": ["phantom-chest/small", "blob.yaml/smoke"]}}


def tiny_settings(study: Study, corpora: Mapping[str, plan.Packed] = MappingProxyType({})) -> list[plan.Setting]:
    return list(plan.settings(study, corpora, {"simclr": [plan.Weights("", "", "test_resnet")]}))


@pytest.mark.parametrize("spelling", ["blob", "blob/smoke", "blob.yaml", "blob.yaml/smoke"])
def test_a_task_is_named_by_its_name_or_its_file_wherever_a_study_names_one(tmp_path: Path, blob: dict[str, Any], spelling: str) -> None:
    given = {"fractions": [0.5], "resolutions": [48], "task_settings": {"recipe.epochs": 7}}
    cells = {**blob["cells"], **{axis: {spelling: value} for axis, value in given.items()}}
    sides = {"a": {"source": "simclr"}, "b": {"source": "random"}}
    claim = {"name": "c", "sentence": "S.", "about": "encoders", "comparison": sides, "expect": "greater", "margin": 0.1}
    file = written(tmp_path, **{**blob, "cells": cells}, champion={"task": spelling}, claims=[{**claim, "where": {"task": spelling}}])
    study = load_study(file)
    assert study.cells is not None
    assert study.champion is not None
    assert (study.champion.task, study.claims[0].where.task) == ("blob", "blob")
    settings = {(one.task.task, one.fraction, one.resolution, one.task.recipe.epochs) for one in tiny_settings(study)}
    ours = load_task("phantom-chest")
    assert settings == {("blob", 0.5, 48, 7), ("phantom-chest", 1.0, ours.resolution, ours.recipe.epochs)}
    (tmp_path / "again.yaml").write_text(to_yaml(study))
    assert load_study("again.yaml") == study
    cell = json.loads((ROOT / "tests" / "golden" / "cell_result.json").read_text())
    row = {"split": "val", "metric": "auroc_mean", "class": "", "value": 0.75}
    assert champion_score(study, "e", [{**cell, "task": "blob", "encoder_sha256": "e", "metrics": [row]}]) == 0.75


def test_a_task_that_a_study_has_not_and_two_of_one_name_are_refused(tmp_path: Path, blob: dict[str, Any]) -> None:
    has = r"\(cells\.tasks has phantom-chest \(phantom-chest/small\), blob \(blob\.yaml/smoke\)\)$"
    sides = {"a": {"source": "simclr"}, "b": {"source": "random"}}
    claim = {"name": "c", "sentence": "S.", "about": "encoders", "comparison": sides, "expect": "greater", "margin": 0.1}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"cells": {"fractions": {"blob.yaml/small": [0.5]}}}, r"cells\.fractions: unknown task 'blob\.yaml/small' " + has),
        ({"cells": {"resolutions": {"blub": [48]}}}, "cells.resolutions: unknown task 'blub' " + has),
        ({"champion": {"task": "blob/paper"}}, "champion.task: unknown task 'blob/paper' " + has),
        ({"claims": [{**claim, "where": {"task": "bolb.yaml"}}]}, r"claims\.c\.where\.task: unknown task 'bolb\.yaml' " + has),
        ({"cells": {"fractions": {"blob": [0.5], "blob.yaml": [0.1]}}}, r"cells\.fractions: blob and blob\.yaml are one task$"),
        ({"cells": {"tasks": ["blob.yaml", "./blob.yaml/smoke"]}}, r"cells\.tasks\[1\]: two tasks are named 'blob': blob.yaml and \./blob"),
    ]
    for changes, says in wrong:
        changed = {**blob, **changes, "cells": {**blob["cells"], **changes.get("cells", {})}}
        with pytest.raises(RequestError, match=r"study\.yaml: " + says):
            load_study(written(tmp_path, **changed))


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (
            {"strategies": ["full", {"name": "slim", "cut": "layer2", "factor": 7}]},
            r"factor: \[256, 512\] channels of resnet18 do not divide by 7",
        ),
        ({"strategies": ["full", {"name": "slim", "cut": "layer2.0"}], "keep": "encoder"}, r"cannot be exported.*\(cells\.keep=nothing\)"),
        ({"strategies": ["full", "linear"], "keep": "encoder", "task_settings": {"phantom-chest": {"volume": True}}}, "cannot be exported"),
    ],
)
def test_a_strategy_that_would_fail_in_its_cell_is_refused(tmp_path: Path, cells: dict[str, Any], says: str) -> None:
    sources = {"sources": ["random"], "architectures": ["resnet18"]}
    with pytest.raises(RequestError, match=r"study\.yaml: cells\.strategies\[[01]\]: .*" + says):
        load_study(written(tmp_path, pretrain=[], cells={**TINY["cells"], **sources, **cells}))
    allowed = {"name": "slim", "cut": "layer2", "factor": 4}
    assert load_study(written(tmp_path, pretrain=[], cells={**TINY["cells"], **sources, "strategies": [allowed], "keep": "encoder"}))


def test_sides_that_are_not_whole_patches_are_refused_where_nothing_pads_them(tmp_path: Path) -> None:
    cells = {"sources": ["random"], "strategies": ["linear"], "architectures": ["test_vit"], "resolutions": [50]}
    data = {"phantom-chest": {"raw": "phantom:60"}, "phantom-fundus": {"raw": "phantom:60"}}
    study = load_study(written(tmp_path, pretrain=[], data=data, cells={**cells, "tasks": ["phantom-vessels"]}))
    assert [one.resolution for one in plan.settings(study, {}, {})] == [50]
    study = load_study(written(tmp_path, pretrain=[], data=data, cells={**cells, "tasks": ["phantom-chest"]}))
    with pytest.raises(RequestError, match=r"linear: resolution: test_vit takes .* multiples of 16 px, not 50 \(take 48 px\)"):
        list(plan.settings(study, {}, {}))


def test_labels_that_the_images_do_not_have_are_refused_before_anything_runs(tmp_path: Path, blob: dict[str, Any]) -> None:
    task = yaml.safe_load((tmp_path / "blob.yaml").read_text())
    (tmp_path / "blob.yaml").write_text(yaml.safe_dump({**task, "labels": ["texture", "nolabel"]}))
    says = r"study\.yaml: cells\.tasks\[1\]: blob\.yaml: labels: ward has no label 'nolabel' \(known: texture, .*\)"
    with pytest.raises(RequestError, match=says):
        load_study(written(tmp_path, **blob))
    # Of images that are packed, their own card is asked, and of a label without a positive the images themselves.
    labels: dict[str, Any] = {"dataset": "ward", "labels": ["texture", "count"], "splits": ["val", "train", "test"]}
    shards = {"known": tiny_corpus.write(tmp_path / "known", (4, 8, 4), **labels)}
    shards["unknown"] = tiny_corpus.write(tmp_path / "unknown", (12, 4, 4), **labels)  # every fourth four of images say nothing of `count`
    for name, of_task, refused in (
        ("known", ["count", "nolabel"], r"cells\.tasks: blob\.yaml/smoke: labels: ward has no label 'nolabel' \(known: texture, count\)"),
        ("unknown", ["texture", "count"], r"labels: 'count' is known for none of the training images of ward"),
        ("known", ["texture", "count"], None),
    ):
        (tmp_path / "blob.yaml").write_text(yaml.safe_dump({**task, "labels": of_task}))
        data = {**blob["data"], "cards/mine.yaml": {"shards": shards[name]}}
        study = load_study(written(tmp_path, **{**blob, "data": data}))
        packed = plan.Packed(shards[name], read(shards[name]))
        with pytest.raises(RequestError, match=refused) if refused else nullcontext():
            assert tiny_settings(study, {"ward": packed})


def test_a_label_that_is_the_same_in_all_images_of_a_split_is_said(tmp_path: Path, phantom_chest: str) -> None:
    study = load_study(written(tmp_path, data={"phantom-chest": {"shards": phantom_chest}}))
    manifest = read(phantom_chest)
    assert list(plan.one_class(study, "phantom-chest", plan.Packed(phantom_chest, manifest))) == []
    counted = {"train": {"texture": 0, "count": manifest.counts["train"], "arrangement": 1}, "val": {"count": 1}, "test": {"count": 0}}
    packed = plan.Packed(phantom_chest, manifest.model_copy(update={"positives": counted}))
    assert list(plan.one_class(study, "phantom-chest", packed)) == [
        "phantom-chest: no training image is labelled texture; every training image is labelled count: a cell can only learn to say so",
        "phantom-chest: no test image is labelled count: of that there is no AUROC",
    ]
    assert list(plan.one_class(study, "ward", packed)) == []


def test_data_of_ones_own_are_planned_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card and the task of docs/datasets.md and docs/tasks.md, as they stand there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALLOGRAFT_SECRET", "s" * 32)
    study = load_study(tiny_study.write(tmp_path, tiny_study.own(tmp_path)))
    assert outlook(study) is True
    assert "pack my-ward" in capsys.readouterr().out
    made = pack(study.card("my-ward"), str(study.data["my-ward"].raw), shards_url(study, "my-ward"))
    assert (made.dataset, sum(made.counts.values())) == ("my-ward", 24)
    corpora = standing_corpora(study)
    assert outlook(study) is True
    config = plan.pretrain_config(study, study.pretrain[0], 0, corpora, None)
    assert [(ref.dataset, ref.shards) for ref in config.data] == [("my-ward", f"{study.out}/shards/my-ward")]
    seen = plan.Weights(
        "x", "0" * 64, "test_resnet", labelled=("my-ward",), data=({"dataset": "my-ward", "split": "train", "digest": "x"},)
    )
    made_of = {
        cell.source: (cell.shards, cell.own_source, cell.exposed_to) for cell in tiny_study.cells(study, corpora, {"simclr": [seen]})
    }
    url = shards_url(study, "my-ward")
    assert made_of == {"random": (url, False, []), "simclr": (url, True, ["my-ward"])}


def test_shards_of_a_card_or_of_files_that_have_changed_since_do_not_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another card, other patients, or another image of the same size under the same name: the study said that all of it stood."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALLOGRAFT_SECRET", "s" * 32)
    study = load_study(tiny_study.write(tmp_path, tiny_study.own(tmp_path)))
    raw = Path(str(study.data["my-ward"].raw))
    pack(study.card("my-ward"), str(raw), shards_url(study, "my-ward"))
    assert standing_corpora(study).keys() == {"my-ward"}
    file = next(path for path in raw.rglob("*") if path.suffix in {".png", ".jpg", ".jpeg", ".bmp"})
    held = file.stat()
    os.utime(file, ns=(held.st_atime_ns, held.st_mtime_ns + 10**9))
    assert standing_corpora(study) == {}
    os.utime(file, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert standing_corpora(study).keys() == {"my-ward"}
    card = study.card("my-ward")
    monkeypatch.setattr(Study, "card", lambda self, name: card.model_copy(update={"max_side": 16}))
    assert standing_corpora(study) == {}


def test_two_cards_of_one_dataset_and_a_card_of_another_name_are_refused(tmp_path: Path, ward: dict[str, Any]) -> None:
    (tmp_path / "mine.yaml").write_text((tmp_path / "cards" / "mine.yaml").read_text())
    wrong = [
        ({"mine.yaml": {"raw": "phantom:60"}}, "data: two entries are the dataset 'ward': cards/mine.yaml and mine.yaml"),
        ({"cards/mine.yaml": {"raw": "phantom:60", "card": "mine.yaml"}}, "the key names the card already, leave card: mine.yaml out"),
        ({"ward2": {"raw": "phantom:60", "card": "mine.yaml"}}, r"data\.ward2: mine.yaml: this card names the dataset 'ward', not 'ward2'"),
        ({"gone.yaml": {"raw": "phantom:60"}}, r"study.yaml: data\.gone\.yaml: gone.yaml: no such card file"),
    ]
    for data, says in wrong:
        with pytest.raises(RequestError, match=says):
            load_study(written(tmp_path, **{**ward, "data": {**ward["data"], **data}}))


def test_shards_of_another_dataset_are_refused_before_anything_starts(tmp_path: Path, phantom_fundus: str) -> None:
    study = load_study(written(tmp_path, data={"phantom-chest": {"shards": phantom_fundus}}))
    with pytest.raises(RequestError, match=r"data\.phantom-chest\.shards = .*: these shards are phantom-fundus, not phantom-chest"):
        standing_corpora(study)


def test_presets_apply_and_what_is_typed_wins(tmp_path: Path) -> None:
    presets = {"smoke": {"cells.seeds": [7], "pretrain.simclr.seeds": [5]}}
    study = load_study(written(tmp_path, presets=presets), ["preset=smoke", "cells.seeds=[9]"])
    assert study.cells is not None
    assert study.cells.seeds == [9]
    assert study.pretrain[0].seeds == [5]


def test_relative_paths_are_refused_inside_a_ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(RequestError, match="is relative"):
        load_study(written(tmp_path))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
def test_the_ready_studies_are_valid(name: str) -> None:
    assert load_study(name).study == name
    for preset in yaml.safe_load((ROOT / "studies" / f"{name}.yaml").read_text()).get("presets", {}):
        assert load_study(name, [f"preset={preset}"]).study == name


def test_json_schema_is_committed() -> None:
    """To change the format: raise its `schema`, then write what this test prints."""
    schema = json.dumps(Study.model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / "study.json").read_text() == schema


def test_the_golden_study_still_reads() -> None:
    study = load_study(str(ROOT / "tests" / "golden" / "study.yaml"))
    assert study.schema_ == 1
    assert study.pretrain[1].start_from == "pretrain:simclr"


def test_shards_are_not_written_over_anything_else(tmp_path: Path) -> None:
    card = load_card("phantom-chest")
    check_place(card, str(tmp_path / "new"))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"not shards of phantom-chest \(thesis.txt\)"):
        check_place(card, str(tmp_path))
    with pytest.raises(RequestError, match="this is a file"):
        check_place(card, str(tmp_path / "thesis.txt"))
    other = tmp_path / "fundus"
    storage.put(str(other / "phantom-fundus-train-00000.tar"), "x")
    with pytest.raises(RequestError, match="not shards of phantom-chest"):
        check_place(card, str(other))
    with pytest.raises(RequestError, match="in the folder of raw files"):
        check_place(card, str(tmp_path / "raw" / "shards"), str(tmp_path / "raw"))
    check_place(card, str(tmp_path / "raw-shards"), str(tmp_path / "raw"))


def test_no_dataset_of_a_study_is_packed_where_one_stands_with_another_secret(tmp_path: Path) -> None:
    data = {"phantom-fundus": {"raw": "phantom:60"}, "phantom-chest": {"raw": "phantom:60"}}
    study = load_study(written(tmp_path, data=data, out=str(tmp_path / "out")))
    storage.put(str(tmp_path / "out" / "shards" / "phantom-chest" / "manifest.json"), '{"secret_fingerprint": "0123456789ab"}')
    with pytest.raises(RequestError, match=r"shards/phantom-chest/manifest.json: .* another secret: 0123456789ab, .* public cards"):
        stages.refuse_other_secrets(study)
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["phantom-chest"]


def test_one_pretraining_and_one_cell_are_studies() -> None:
    one = pretrain_study("simclr/smoke", ["data.phantom-chest.raw=phantom:60", "architecture=test_resnet"])
    assert one.pretrain[0].recipe == "simclr/smoke"
    cell = finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "architecture=test_resnet", "seed=3"])
    assert cell.cells is not None
    assert cell.cells.seeds == [3]
    with pytest.raises(RequestError, match="architecture=resnet18"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60"])
    with pytest.raises(RequestError, match="did you mean 'seed'"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "sed=3"])
    with pytest.raises(RequestError, match=r"cells\.resolutions\.0: 0 is less than 16"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "architecture=test_resnet", "resolution=0"])
    with pytest.raises(RequestError, match=r"cells\.sources\[0\]: unknown published weights 'resnet18.foo'"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "source=timm:resnet18.foo"])
    with pytest.raises(RequestError, match=r"unknown source 'rando'.*did you mean 'random'"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "source=rando", "architecture=test_resnet"])
    words = ["data.phantom-chest.raw=phantom:60", "architecture=test_resnet", "settings.recipe.lr=-1"]
    says = r"^allograft finetune phantom-chest/smoke: settings: recipe\.lr: -1 is not more than 0$"
    with pytest.raises(RequestError, match=says), as_typed():
        finetune_study("phantom-chest/smoke", words)
    with pytest.raises(RequestError, match=r"architecture: '\./encoder' brings its own architecture"):
        finetune_study("phantom-chest", ["data.phantom-chest.raw=phantom:60", "source=./encoder", "architecture=resnet18"])


@pytest.mark.parametrize(
    ("of_study", "typed"),
    [
        ("pretrain.simclr-smoke.settings.views.size=64, or larger images", "settings.views.size=64, or larger images"),
        ("allograft pretrain simclr/smoke: pretrain[0].start_from", "allograft pretrain simclr/smoke: start_from"),
        ("allograft pretrain simclr/smoke: pretrain[0]", "allograft pretrain simclr/smoke"),
        ("pretrain.0.seeds.0", "seed"),
        ("data.phantom-chest.raw", "data.phantom-chest.raw"),
        ("allograft finetune dxc14: cells.sources[0]", "allograft finetune dxc14: source"),
        ("cells.sources.0.name", "source"),
        ("cells.strategies.0.name", "strategy"),
        ("cells.task_settings.phantom-chest.linear.epochs", "settings.linear.epochs"),
        ("cells.task_settings./my data/blob.yaml/smoke.linear.epochs", "settings.linear.epochs"),
        ("allograft finetune ../b.yaml: cells.task_settings.../b.yaml", "allograft finetune ../b.yaml: settings"),
        ("cells.resolutions.0: 0 is less than 16", "resolution: 0 is less than 16"),
        ("cells.architectures=[resnet18]", "architecture=resnet18"),
        ("cells.seeds.0", "seed"),
        ("cells.tune.trials", "tune.trials"),
    ],
)
def test_keys_of_a_study_are_spelled_as_its_command_takes_them(of_study: str, typed: str) -> None:
    assert spelled(of_study) == typed
    with pytest.raises(RequestError) as refused, as_typed():
        raise RequestError("wrong", where=of_study, hint=of_study)
    assert (refused.value.where, refused.value.hint) == (typed, typed)


def test_supervised_without_labels_is_refused_by_the_card(tmp_path: Path) -> None:
    card = (ROOT / "datasets" / "phantom-chest.yaml").read_text()
    tree = {key: value for key, value in yaml.safe_load(card).items() if key != "labels"}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({**tree, "dataset": "plain", "kind": "unlabelled", "views": {}}))
    words = [f"data={{{tmp_path}/plain.yaml: {{raw: 'phantom:60'}}}}", "architecture=test_resnet"]
    assert pretrain_study("simclr/smoke", words)
    with pytest.raises(RequestError, match="supervised needs labels, and the datasets' cards name none"):
        pretrain_study("supervised/smoke", words)


def test_one_cell_may_name_a_preset_and_without_data_the_words_to_type_are_said(tmp_path: Path) -> None:
    words = ["data.phantom-chest.raw=phantom:60", "architecture=test_resnet"]
    one = finetune_study("phantom-chest/smoke", words)
    assert (one.study, one.out) == ("finetune-phantom-chest-smoke", str(Path("runs/finetune-phantom-chest-smoke").absolute()))
    assert finetune_study("phantom-chest", words).out != one.out  # the second task finds a folder of its own
    assert finetune_study("phantom-chest", [*words, "out=/x"]).out == "/x"
    text = named("task", "phantom-chest").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("task: phantom-chest", "task: mine"))  # a folder goes by the task's own name
    assert finetune_study(f"{tmp_path}/own.yaml/smoke", words).study == "finetune-mine-smoke"
    with pytest.raises(RequestError, match="where are the images") as refused:
        finetune_study("phantom-chest", ["architecture=test_resnet"])
    assert "data.phantom-chest.raw=FOLDER" in str(refused.value)
    with pytest.raises(RequestError, match=r"data\.DATASET\.raw"):
        pretrain_study("simclr/smoke", ["architecture=test_resnet"])


def test_what_a_piece_of_work_is_given_is_documented() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert all(f"| `{key}` |" in text for key in Resources.model_fields)


def test_a_second_driver_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    with DriverLock(str(tmp_path)), pytest.raises(RequestError, match="another driver"), DriverLock(str(tmp_path)):
        pass
    assert not storage.exists(str(tmp_path / "driver.lock"))
    storage.put(str(tmp_path / "driver.lock"), f'{{"owner": "elsewhere:1:1", "beat": {time.time() - 600}}}')
    with DriverLock(str(tmp_path)):
        assert "elsewhere" not in storage.read_bytes(str(tmp_path / "driver.lock")).decode()


def test_a_driver_that_slept_stops_and_leaves_the_lock_to_who_took_it_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    url = str(tmp_path / "driver.lock")

    def sleep() -> None:
        storage.put(url, json.dumps({"owner": "elsewhere:1:1", "beat": time.time()}))
        time.sleep(30)

    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test runner in the background ignores
    try:
        with pytest.raises(WorkError, match=r"another driver \(elsewhere:1:1\) has taken over"), DriverLock(str(tmp_path)):
            sleep()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20
    assert storage.read_json(url)["owner"] == "elsewhere:1:1"


def test_a_lock_that_was_removed_by_hand_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    url = str(tmp_path / "driver.lock")
    with DriverLock(str(tmp_path)) as held:
        storage.remove(url)
        time.sleep(0.5)
        assert storage.read_json(url)["owner"] == held.owner
    assert not storage.exists(url)


def test_a_driver_that_slept_through_another_ones_life_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other took the lock over, finished and removed it: nothing was left to be seen, and the first wrote over what it had done."""
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def sleep(held: DriverLock) -> None:
        held._beaten = time.time() - 2 * lock.STALE_S
        storage.remove(held.url)
        time.sleep(30)

    try:
        with pytest.raises(WorkError, match=r"another driver \(gone by now\) has taken over"), DriverLock(str(tmp_path)) as held:
            sleep(held)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not storage.exists(str(tmp_path / "driver.lock"))


def test_a_process_number_of_another_container_says_nothing(tmp_path: Path) -> None:
    """Two containers may share the name of their host, and no process number."""
    with DriverLock(str(tmp_path)) as held:
        host, _, made, processes = held.owner.split(":")
    assert processes.strip("-")
    assert lock._dead(f"{host}:{2**22 + 1}:{made}:{processes}")
    assert not lock._dead(f"{host}:{2**22 + 1}:{made}:another")
    assert not lock._dead(f"{host}:{2**22 + 1}:{made}")


def test_events_of_two_writers_are_all_kept(tmp_path: Path) -> None:
    """An analysis asked for by hand beside a driver cut the diary back to what it had read at its start."""
    first, second = Events(str(tmp_path)), Events(str(tmp_path))
    for events, name in ((first, "start"), (second, "analysed"), (first, "claim"), (second, "analysed"), (first, "end")):
        events.add(name)
    rows = storage.read_rows(str(tmp_path / "events.jsonl"))
    assert [row["event"] for row in rows] == ["start", "analysed", "claim", "analysed", "end"]


def test_what_a_probe_of_the_folder_left_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "out" / ".doctor-0123abcd").mkdir(parents=True)
    refuse_other_out(load_study(tiny_study.write(tmp_path, tiny_study.SMALLER)))


def test_a_login_in_the_address_of_mlflow_is_refused_and_not_shown() -> None:
    with pytest.raises(RequestError, match="holds a login") as refused:
        require_server("https://somebody:secret@example.org")
    assert "secret" not in str(refused.value)


def test_of_two_drivers_that_find_a_lock_stale_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(str(tmp_path / "driver.lock"), json.dumps({"owner": "elsewhere:1:1", "beat": time.time() - 600}))
    both, refused, held = threading.Barrier(2), [], []
    real = storage.put

    def together(url: str, data: str) -> None:
        both.wait()  # each has found it stale before the other writes
        real(url, data)

    def drive() -> None:
        try:
            with DriverLock(str(tmp_path)) as own:
                held.append(storage.read_json(own.url)["owner"] == own.owner)
                time.sleep(0.5)
        except RequestError as error:
            refused.append(str(error))

    monkeypatch.setattr(storage, "put", together)
    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert held == [True]
    assert len(refused) == 1
