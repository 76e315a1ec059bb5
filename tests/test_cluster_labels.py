"""Supervised runs of some of a corpus' labels: in the key, the lineage and the plan; names that no card has are errors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_corpus import card, write

from base.errors import RequestError
from cluster import facts, plan
from cluster.load import load_study
from cluster.plan import Packed
from cluster.study import PretrainEntry, Study
from encoders.export import read_export
from engine.context import LocalContext
from pretrain import corpora
from pretrain.run import run
from shards import manifest
from shards.card import load_card

CHEXPERT = load_card("chexpert")


def study(folder: Path, shards: str, **entry: Any) -> Study:
    made = {"name": "a", "recipe": "supervised/smoke", "architecture": "test_resnet", "data": {"chexpert": "train"}}
    made |= {"settings": {"max_steps": 2, "checkpoint_every_steps": 0}} | entry
    tree = {"study": "labels", "out": str(folder / "out"), "data": {"chexpert": {"shards": shards}}, "pretrain": [made]}
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return load_study(str(folder / "study.yaml"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return write(tmp_path_factory.mktemp("shards"), (60,), dataset="chexpert", labels=CHEXPERT.labels)


def keys(folder: Path, shards: str, **entry: Any) -> str:
    packed = manifest.read(shards)
    packed = packed.model_copy(update={"card": packed.card.model_copy(update={"views": CHEXPERT.views})})
    made = study(folder, shards, **entry)
    return plan.pretrain_config(made, made.pretrain[0], 0, {"chexpert": Packed(shards, packed)}, None).key


def test_a_run_of_some_labels_learns_those_and_says_so(tmp_path: Path, shards: str) -> None:
    made = study(tmp_path, shards, labels=["Fracture", "Edema"])
    config = plan.pretrain_config(made, made.pretrain[0], 0, {"chexpert": Packed(shards, manifest.read(shards))}, None)
    assert config.labels == ["Edema", "Fracture"]  # in the card's order
    result = run(config, LocalContext(dir=str(tmp_path)))
    assert result is not None
    assert result["lineage"][0]["labels"] == ["Edema", "Fracture"]
    assert result["labelled"] == ["chexpert"]
    assert read_export(f"{config.out}/export").lineage[0]["labels"] == ["Edema", "Fracture"]
    told = facts.pretraining(config.model_dump(mode="json", by_alias=True), result)
    assert told.params["labels"] == "Edema, Fracture"


def test_labels_are_part_of_the_key_and_other_runs_keep_theirs(tmp_path: Path, shards: str) -> None:
    every, low, high = keys(tmp_path, shards), *(keys(tmp_path, shards, labels=name) for name in ("low-level", "high-level"))
    assert len({every, low, high}) == 3
    assert low == keys(tmp_path, shards, labels=CHEXPERT.views["low-level"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"labels": ["Edena"]}, r"pretrain\[0\]\.labels: unknown label 'Edena'.*did you mean 'Edema'"),
        ({"labels": "low-levels"}, r"unknown view of labels 'low-levels'.*did you mean 'low-level'"),
        ({"labels": ["Edema"], "recipe": "simclr/smoke"}, "simclr reads no labels"),
        ({"labels": []}, "labels"),
    ],
)
def test_labels_that_mean_nothing_are_refused(entry: dict[str, Any], message: str, tmp_path: Path, shards: str) -> None:
    with pytest.raises(RequestError, match=message):
        study(tmp_path, shards, **entry)


def test_classes_are_exclusive_only_where_all_of_them_are_learned() -> None:
    def corpus(*labels: str) -> Any:
        return SimpleNamespace(labels=list(labels), card=SimpleNamespace(kind="multiclass"))

    assert corpora.exclusive([corpus("a", "b", "c")], ["a", "b", "c"]) == ((0, 1, 2),)
    assert corpora.exclusive([corpus("a", "b", "c")], ["a", "c"]) == ()
    assert corpora.exclusive([corpus("a", "b"), corpus("c", "d")], ["a", "b", "c"]) == ((0, 1),)


def test_the_source_tasks_of_truncated_are_chexperts_levels() -> None:
    """Peng et al. 2023: classes 3, 5, 6, 7, 8, 10, 11 of CheXpert are of low level, 0, 1, 2, 4, 9, 12, 13 of high level."""
    runs = {entry.name: entry for entry in load_study("truncated", ["preset=medical"]).pretrain}
    found = {name: plan.pretrain_labels(entry, "supervised", [CHEXPERT], "") for name, entry in runs.items()}
    assert found == {
        "mix": None,
        "low": [CHEXPERT.labels[i] for i in (3, 5, 6, 7, 8, 10, 11)],
        "high": [CHEXPERT.labels[i] for i in (0, 1, 2, 4, 9, 12, 13)],
    }


def test_labels_of_a_mixture_are_the_union_of_its_cards() -> None:
    entry = PretrainEntry(name="a", recipe="supervised/smoke", data={"x": "train", "y": "train"}, labels=["c", "a"])
    cards = [card("x", labels=["a", "b"]), card("y", labels=["b", "c"])]
    assert plan.pretrain_labels(entry, "supervised", cards, "") == ["a", "c"]
