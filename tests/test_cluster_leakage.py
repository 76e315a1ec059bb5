"""A study whose pretraining would see test images: stopped with the pairs named, or run without those images."""

import json
from functools import cache
from pathlib import Path

import pytest
import tiny_corpus
import tiny_study
import yaml

from base import storage
from base.config import parse
from base.errors import RequestError
from cluster import leakage, plan
from cluster.events import Events
from cluster.load import load_study
from cluster.outlook import outlook
from cluster.plan import Packed
from cluster.progress import Progress
from cluster.run import run
from cluster.session import session
from cluster.standing import standing_corpora
from cluster.study import Study

LEAKED = 8


@pytest.fixture
def leaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Test pictures 0 to 7 stand in the training split too, under other names."""
    picture = tiny_corpus.picture
    monkeypatch.setattr(tiny_corpus, "picture", lambda i, size, channels=1: picture(i - 40 if 40 <= i < 40 + LEAKED else i, size, channels))
    splits = ("train", "train", "val", "test")
    labels = ["texture", "count", "arrangement"]
    shards = tiny_corpus.write(tmp_path / "shards", (20, 10, 10, 20), dataset="phantom-chest", splits=splits, size=64, labels=labels)
    data = {"phantom-chest": {"shards": shards}}
    entry = {**tiny_study.SIMCLR, "settings": {"global_batch": 16}}  # 22 of 30 training images are left
    return load_study(tiny_study.write(tmp_path, tiny_study.SMALLER, data=data, pretrain=[entry]))


def test_a_plan_tells_without_decoding(leaky: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import decode

    monkeypatch.delattr(decode, "image")
    monkeypatch.setenv("COLUMNS", "400")
    assert outlook(leaky) is False
    said = " ".join(capsys.readouterr().out.split())
    assert f"{LEAKED} images of the same patients or with the same bytes" in said
    assert "the study would stop" in said
    assert outlook(leaky.model_copy(update={"leakage": "exclude"})) is True
    assert storage.listing(leaky.out) == []


def compare(study: Study) -> dict[str, Packed]:
    """As the nodes of a study do, one corpus after the other."""
    corpora, ready = standing_corpora(study), cache(lambda test: leakage.prepared(standing_corpora(study)[test]))
    for corpus in leakage.by_corpus(study):
        leakage.compare_one(study, corpora, corpus, ready, Progress(), Events(study.out))
    leakage.summarise(study, corpora)
    return leakage.trained_on(study, corpora)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_head")
def test_a_finding_stops_the_study_and_can_be_left_out(leaky: Study) -> None:
    corpora = standing_corpora(leaky)
    assert leakage.standing(leaky, corpora) is None
    cells = {**leaky.model_dump()["cells"], "sources": ["random"], "architectures": ["test_resnet"]}
    changes = {"out": f"{leaky.out}-alone", "pretrain": [], "cells": cells}
    alone = parse({**leaky.model_dump(by_alias=True), **changes}, Study, "study")
    with session():
        with pytest.raises(RequestError, match="would see, test images") as stopped:
            compare(leaky)
        kept_alone = compare(alone)
    assert f"{LEAKED} images of phantom-chest train match the test images of phantom-chest" in str(stopped.value)
    assert str(stopped.value).count("file: phantom-chest-") == LEAKED
    assert "leakage=exclude" in str(stopped.value)
    with pytest.raises(RequestError):  # from what stands, without Ray
        leakage.standing(leaky, corpora)

    excluding = leaky.model_copy(update={"leakage": "exclude"})
    kept = leakage.standing(excluding, corpora)
    assert kept is not None
    assert kept["phantom-chest"].without == {"train": tuple(range(LEAKED))}
    before, after = (plan.pretrain_config(leaky, leaky.pretrain[0], 0, held, None) for held in (corpora, kept))
    assert before.key != after.key
    assert after.data[0].without == list(range(LEAKED))
    leakage.summarise(excluding, corpora)
    summary = json.loads(storage.read_bytes(f"{leaky.out}/leakage.json"))
    assert summary["setting"] == "exclude"
    assert (summary["checks"][0]["leaked"], summary["checks"][0]["same_pixels"]) == (LEAKED, LEAKED)
    # A study that pretrains nothing is told that the task's own images overlap, and nothing stops.
    assert kept_alone["phantom-chest"].without == {}
    summary = json.loads(storage.read_bytes(f"{alone.out}/leakage.json"))
    assert summary["checks"] == []
    assert [(row["corpus"]["split"], row["same_pixels"]) for row in summary["own"]] == [("train", LEAKED)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_head")
def test_a_study_trains_without_the_images_that_leak_and_says_so(leaky: Study, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(leaky.model_copy(update={"leakage": "exclude"}))
    assert not summary.failed
    assert summary.cells_new == 2
    assert f"{LEAKED} images match" in capsys.readouterr().out

    trained = f"{leaky.out}/pretrain/{storage.listing(f'{leaky.out}/pretrain')[0]}"
    config = yaml.safe_load(storage.read_bytes(f"{trained}/config.yaml"))
    result = storage.read_json(f"{trained}/result.json")
    assert config["data"][0]["without"] == list(range(LEAKED))
    assert storage.read_json(f"{trained}/export/allograft.json")["data"][0]["left_out"] == LEAKED
    assert result["steps"] > 0
    page = storage.read_bytes(summary.report).decode()
    assert "those images were left out of pretraining" in page
    assert "phantom-chest train (30)" in page
    assert "The dataset itself holds identical images on both sides" in page


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_head")
def test_data_of_ones_own_are_compared_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALLOGRAFT_SECRET", "s" * 32)
    tree = tiny_study.own(tmp_path)
    cells = {**tree["cells"], "sources": ["random"], "architectures": ["test_resnet"]}
    study = load_study(tiny_study.write(tmp_path, tree, pretrain=[], cells=cells))
    summary = run(study)
    assert (summary.failed, summary.cells_new) == ({}, 1)
    (row,) = storage.read_json(f"{study.out}/leakage.json")["own"]
    assert (row["corpus"]["dataset"], row["test"]["dataset"]) == ("my-ward", "my-ward")
    assert run(load_study(f"{study.out}/study.yaml")).cells_kept == 1


def test_a_study_without_leakage_keeps_its_keys(leaky: Study) -> None:
    config = plan.pretrain_config(leaky, leaky.pretrain[0], 0, standing_corpora(leaky), None)
    assert config.data[0].without == []
    identity = {key: getattr(config.data[0], key) for key in ("dataset", "split", "digest", "weight")}
    assert config.data[0].model_dump(exclude={"shards", "without"}) == identity


def test_pretraining_on_a_tasks_test_split_is_refused(tmp_path: Path) -> None:
    entry = {**tiny_study.SIMCLR, "data": {"phantom-chest": "test"}}
    with pytest.raises(RequestError, match="pretraining on the test images of a task"):
        load_study(tiny_study.write(tmp_path, {**tiny_study.SMALLER, "pretrain": [entry]}))


def test_a_patient_in_two_splits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.manifest import Manifest, read

    one = tiny_corpus.write(tmp_path / "one", (12,), splits=("train",), size=32)
    tiny_corpus.write(tmp_path / "two", (12,), splits=("test",), size=32)  # the same samples again
    for file in (tmp_path / "two").glob("tiny-test-*"):
        file.rename(tmp_path / "one" / file.name)
    first, second = read(one), read(str(tmp_path / "two"))
    counts = {"train": 12, "test": 12}
    both = first.model_copy(update={"shards": [*first.shards, *second.shards], "counts": counts, "patients": counts})
    (tmp_path / "one" / "manifest.json").write_text(Manifest.model_validate(both.model_dump(by_alias=True)).text())
    with pytest.raises(RequestError, match="12 patients of 'tiny' stand in two splits"):
        leakage.refuse_shared_patients({"tiny": Packed(one, read(one))})


def test_weights_from_outside_are_exposed_by_their_lineage(leaky: Study) -> None:
    corpora = standing_corpora(leaky)
    seen = ({"dataset": "phantom-chest", "split": "train", "digest": "of another packing", "licence": "none"},)
    for data, exposed in ((seen, ["phantom-chest"]), ((), [])):
        found = plan.Weights(url="x", sha256="0" * 64, architecture="test_resnet", data=data)
        made = tiny_study.cells(leaky, corpora, {"simclr": [found]})
        assert {config.source: config.exposed_to for config in made} == {"random": [], "simclr": exposed}
