"""Cards and manifests: the shipped ones are right, wrong ones are refused, their schemas and golden files stand still."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from base.config import parse
from base.errors import RequestError
from base.paths import ROOT, names
from shards.card import Card, load_card
from shards.manifest import Manifest, load_index, read

NIH_LABELS = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema Fibrosis "
    "Pleural_Thickening Hernia"
)
SMALL: dict[str, Any] = {
    "schema": 2,
    "dataset": "tiny",
    "title": "t",
    "reader": "csv",
    "kind": "multilabel",
    "channels": 1,
    "labels": ["a"],
    "namespace": "tiny",
    "layouts": [
        {"name": "one", "requires": ["t.csv"], "images": ["*.png"], "table": "t.csv", "image_column": "f", "label_columns": {"a": "a"}}
    ],
    "licence": "none",
    "access": "nowhere",
    "citation": "none",
}

TOLD = {key: value for key, value in SMALL["layouts"][0].items() if key != "label_columns"}


def test_shipped_cards_load() -> None:
    assert {"phantom-chest", "phantom-fundus", "nih-cxr14", "montgomery"} <= set(names("card"))
    for name in names("card"):
        assert load_card(name).dataset == name


def test_nih_card_states_the_official_layout_first() -> None:
    card = load_card("nih-cxr14")
    assert card.labels == NIH_LABELS.split()
    assert card.layouts[0].counts == {"train_val": 86524, "test": 25596, "total": 112120}
    assert card.layouts[1].of == 112120
    assert card.layouts[1].counts["total"] == 1605
    assert card.stratify_by == "source"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lables": []}, "did you mean 'labels'"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"dataset": "has.dot"}, "dataset"),
        ({"stratify_by": "site"}, "not in metadata"),
        ({"kind": "segmentation"}, "mask_classes"),
        ({"reader": "phantom"}, "phantom"),
        ({"layouts": []}, "needs layouts"),
        ({"split": {"val": 0.5, "test": 0.5}}, "nothing to train on"),
        ({"schema": 1}, "schema"),
        ({"layouts": [SMALL["layouts"][0] | {"label_columns": {"b": "b"}}]}, "are not in the card"),
        ({"layouts": [SMALL["layouts"][0] | {"patient_pattern": "(("}]}, "regular expression"),
        (
            {"layouts": [{**TOLD, "findings_column": "c", "label_pattern": "(?P<a>1)"}]},
            "label_pattern has named groups, which are of paths",
        ),
        ({"layouts": [SMALL["layouts"][0] | {"table": None}]}, "no table"),
        ({"layouts": [SMALL["layouts"][0] | {"split_tables": {"test": "u.csv"}}]}, "not both"),
        ({"layouts": [SMALL["layouts"][0] | {"split_column": "s", "split_pattern": "(s)"}]}, "one of split_tables"),
        ({"layouts": [SMALL["layouts"][0] | {"masks": ["masks/all.png"]}]}, "needs {stem} or {id}"),
        ({"layouts": [SMALL["layouts"][0] | {"masks": ["{id}.png"]}]}, "needs mask_pattern"),
        ({"layouts": [SMALL["layouts"][0] | {"masks": {"lung": ["{stem}.png"]}}]}, "not in the card's metadata, labels or mask_classes"),
        ({"layouts": [SMALL["layouts"][0] | {"reader": "npz"}]}, "reads no table"),
        ({"layouts": [SMALL["layouts"][0] | {"reader": "folders"}]}, "reader folders takes images and their classes from a table"),
        ({"kind": "unlabelled"}, "neither labels nor mask_classes"),
        ({"labels": "found"}, "found is for kind multiclass"),
        ({"channels": 2}, "1 or 3"),
        ({"windows": [[40, 400]]}, "depth: 16"),
        ({"depth": 16, "windows": [[40, 400], [-600, 1500]]}, "2 windows of 1 slices make 2"),
        ({"frames": "slab"}, "the key slab"),
    ],
)
def test_wrong_cards_are_refused(change: dict[str, Any], says: str) -> None:
    parse(SMALL, Card, "card.yaml")
    with pytest.raises(RequestError, match=r"^card\.yaml: ") as caught:
        parse(SMALL | change, Card, "card.yaml")
    assert says in str(caught.value)


def test_unknown_card_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="montgomery"):
        load_card("montgomry")


@pytest.mark.parametrize(("name", "model"), [("card", Card), ("manifest", Manifest)])
def test_schema_file_matches_the_model(name: str, model: type[Card] | type[Manifest]) -> None:
    """A change of the format shows as a change of a committed file; ALLOGRAFT_UPDATE_GOLDEN=1 rewrites it."""
    path = ROOT / "docs" / "schemas" / f"{name}.json"
    text = json.dumps(model.model_json_schema(by_alias=True), indent=1, sort_keys=True) + "\n"
    if os.environ.get("ALLOGRAFT_UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_golden_card_still_reads() -> None:
    path = ROOT / "tests" / "golden" / "card.json"
    data = json.loads(path.read_text())
    card = parse(data, Card, str(path))
    assert card.model_dump(mode="json", by_alias=True) == data
    assert card == load_card("montgomery")


def test_reading_where_nothing_is_packed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="allograft pack"):
        read(str(tmp_path))


def test_a_damaged_index_is_named() -> None:
    with pytest.raises(Exception, match=r"here\.idx: not an index"):
        load_index(b"\x93NUMPY garbage", "here.idx")
