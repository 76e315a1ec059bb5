"""Readers: layouts found, labels and patients read, wrong requests refused in one line before any work."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.config import parse
from base.errors import RequestError
from shards.card import Card, load_card
from shards.deidentify import Names, clean_metadata, keyed_split, share
from shards.readers import read
from shards.tables import Table

GREY = cv2.imencode(".png", np.arange(64, dtype=np.uint8).reshape(8, 8))[1].tobytes()
LAYOUT: dict[str, Any] = {
    "name": "one",
    "requires": ["labels.csv"],
    "images": ["images/*.png"],
    "table": "labels.csv",
    "image_column": "image",
    "label_columns": {"edema": "edema"},
    "patient_column": "patient",
    "split_column": "split",
    "metadata": {"age": "age"},
}
CARD: dict[str, Any] = {
    "schema": 2,
    "dataset": "tiny",
    "title": "t",
    "reader": "csv",
    "kind": "multilabel",
    "channels": 1,
    "labels": ["edema"],
    "namespace": "tiny",
    "metadata": ["age"],
    "layouts": [LAYOUT],
    "public": True,
    "licence": "none",
    "access": "https://example.org/tiny",
    "citation": "none",
}
ROWS = [
    {"image": f"images/{n}.png", "edema": value, "patient": f"p{n}", "split": split, "age": age}
    for n, (value, split, age) in enumerate([("1", "train", "34"), ("0", "train", "95"), ("-1", "val", "058Y"), ("", "test", "")])
]


def card(**change: Any) -> Card:
    return parse(CARD | change, Card, "card")


def raw(folder: Path, rows: list[dict[str, str]] = ROWS, header: list[str] | None = None) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for row in rows:
        (folder / row["image"]).write_bytes(GREY)
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, header or list(ROWS[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def records(a_card: Card, folder: str) -> list[Any]:
    return read(a_card, folder, Names.of(a_card, b"secret")).records


def test_rows_become_records(tmp_path: Path) -> None:
    found = records(card(), raw(tmp_path))
    assert [record.labels["edema"] for record in found] == [1, 0, -1, None]
    assert [record.split for record in found] == ["train", "train", "val", "test"]
    assert [record.meta["age"] for record in found] == [34, 90, 58, None]
    assert len({record.key for record in found}) == 4
    assert not any("p0" in text for text in (found[0].key, found[0].patient))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such folder of raw files \(fetch it first: https://example.org/tiny\)"):
        records(card(), str(tmp_path / "absent"))


def test_no_known_layout(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"layout 'one' lacks labels\.csv"):
        records(card(), str(tmp_path))


def test_missing_column_names_file_column_and_nearest(tmp_path: Path) -> None:
    folder = raw(tmp_path, header=["image", "oedema", "patient", "split", "age"])
    with pytest.raises(RequestError) as caught:
        records(card(), folder)
    assert str(caught.value) == f"{folder}/labels.csv: no column 'edema', which the card needs (nearest column: 'oedema')"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"edema": "maybe"}, "'maybe' is not a label"),
        ({"split": "tset"}, "'tset' is not a split"),
        ({"patient": ""}, "no patient"),
        ({"patient": "p0", "split": "test"}, "1 patient in more than one split (train and test): p0"),
        ({"image": "images/0.png"}, "1 image in several rows: images/0.png (the rows differ: keep the right one, or"),
        ({"split": "train"}, "no image in split 'test'"),
    ],
)
def test_wrong_rows_are_refused(tmp_path: Path, change: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        records(card(), raw(tmp_path, [*ROWS[:3], ROWS[3] | change]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_at_most_five_shared_patients_are_listed(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"image": f"images/{n}{s}.png", "patient": f"q{n}", "split": s} for n in range(9) for s in ("train", "test")]
    with pytest.raises(RequestError, match=r"9 patients .*: q0, q1, q2, q3, q4 and 4 more"):
        records(card(), raw(tmp_path, rows))


def test_paths_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = raw(tmp_path)
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("images/3.png", "../../etc/passwd"))
    with pytest.raises(RequestError, match="leads out"):
        records(card(), folder)


def test_a_changed_mask_of_a_remote_folder_is_seen(tmp_path: Path) -> None:
    layout = LAYOUT | {"mask_column": "mask"}
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "0.png").write_bytes(GREY)
    rows = [row | {"mask": mask} for row, mask in zip(ROWS, ["masks/0.png", "masks/absent.png", "", ""], strict=True)]
    folder, masked = raw(tmp_path, rows, [*ROWS[0], "mask"]), card(kind="mixed", mask_classes=["lung"], layouts=[layout])
    first = records(masked, f"file://{folder}")
    assert [record.stamp.count("|") for record in first] == [1, 1, 0, 0]
    assert first[1].stamp.endswith("|absent")
    (tmp_path / "masks" / "0.png").write_bytes(GREY + b" ")
    assert [a.stamp == b.stamp for a, b in zip(first, records(masked, f"file://{folder}"), strict=True)] == [False, True, True, True]


def test_single_label_tables(tmp_path: Path) -> None:
    layout = {key: value for key, value in LAYOUT.items() if key != "label_columns"} | {"findings_column": "edema", "no_finding": ["none"]}
    classes = card(kind="multiclass", labels=["mild", "severe"], layouts=[layout])
    rows = [row | {"edema": value} for row, value in zip(ROWS, ["mild", "severe", "mild", "severe"], strict=True)]
    found = records(classes, raw(tmp_path, rows))
    assert [record.labels for record in found[:2]] == [{"mild": 1}, {"severe": 1}]
    with pytest.raises(RequestError, match=r"unknown label 'sever' \(did you mean 'severe'\?\)"):
        records(classes, raw(tmp_path, [*rows[:3], rows[3] | {"edema": "sever"}]))


def test_official_nih_layout(tmp_path: Path) -> None:
    """The official names, on four made-up files: lists decide the test split, the patient's hash the validation split."""
    nih = load_card("nih-cxr14")
    names = [f"{patient:08d}_00{k}.png" for patient in range(1, 41) for k in range(2)]
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    for name in names:
        (tmp_path / "images_001" / "images" / name).write_bytes(GREY)
    lines = [f"{name},{'No Finding' if k % 2 else 'Edema|Hernia'},{int(name[:8])},PA,M,{k}" for k, name in enumerate(names)]
    header = "Image Index,Finding Labels,Patient ID,View Position,Patient Gender,Patient Age"
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([header, *lines]) + "\n")
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:60]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[60:]))
    found = read(nih, str(tmp_path), Names.of(nih))
    assert found.layout == "official"
    assert found.expected["total"] == 112120
    assert [record.split for record in found.records[60:]] == ["test"] * 20
    assert {record.split for record in found.records[:60]} == {"train", "val"}
    assert found.records[0].labels == {label: int(label in ("Edema", "Hernia")) for label in nih.labels}
    assert set(found.records[1].labels.values()) == {0}
    assert found.records[0].patient == found.records[1].patient == Names.of(nih).patient("1")


def test_private_datasets_need_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = card(public=False)
    monkeypatch.delenv("ALLOGRAFT_SECRET", raising=False)
    monkeypatch.delenv("ALLOGRAFT_SECRET_FILE", raising=False)
    with pytest.raises(RequestError, match="export ALLOGRAFT_SECRET_FILE"):
        Names.of(private)
    monkeypatch.setenv("ALLOGRAFT_SECRET", "one" * 16)
    first = Names.of(private)
    (tmp_path / "secret").write_text("two" * 16 + "\n")
    monkeypatch.setenv("ALLOGRAFT_SECRET_FILE", str(tmp_path / "secret"))
    second = Names.of(private)
    assert first.fingerprint != second.fingerprint
    assert first.key("a") != second.key("a")
    assert Names.of(card()).secret == b"public"


@pytest.mark.parametrize("secret", ["s", "a" * 15])
def test_a_secret_that_can_be_guessed_is_refused(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALLOGRAFT_SECRET_FILE", raising=False)
    monkeypatch.setenv("ALLOGRAFT_SECRET", secret)
    with pytest.raises(RequestError, match=r"can be guessed.*urandom"):
        Names.of(card(public=False))


@given(st.text(min_size=1))
def test_a_patient_keeps_its_place(patient: str) -> None:
    place = share(patient)
    assert 0 <= place < 1
    assert keyed_split(patient, 0.1, 0.2) == ("test" if place < 0.2 else "val" if place < 0.2 + 0.1 else "train")


def test_keyed_shares_are_as_asked() -> None:
    splits = [keyed_split(str(n), 0.1, 0.2) for n in range(5000)]
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02
    assert abs(splits.count("val") / 5000 - 0.1) < 0.02


def test_ages_are_bucketed() -> None:
    assert [clean_metadata("age", text) for text in ("66.0", "414", "007Y", "", None, "old")] == [66, 90, 7, None, None, None]


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("011M", 0),
        ("030M", 2),
        ("052W", 0),
        ("053W", 1),
        ("364D", 0),
        ("365D", 1),
        ("800D", 2),
        ("18 months", 1),
        ("095Y", 90),
        ("089Y", 89),
        ("000D", 0),
    ],
)
def test_ages_are_whole_years_in_any_unit(text: str, years: int) -> None:
    assert clean_metadata("age", text) == years


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no column 'a'"),
        (b"a\n", "no rows"),
        (b"a,b\n1\n", "row 2 has 1 cells"),
        (b"a,b\n0,1,1\n", "row 2 has 3 cells, the header 2"),
        (b"a\n\xff\n", "not UTF-8"),
        (b"PK\x03\x04\x14\x00", "a workbook or another zip archive, not a table of text"),
    ],
)
def test_broken_tables(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(RequestError, match=says):
        Table.read(str(tmp_path / "t.csv"), ["a"])


def test_empty_cells_at_the_end_of_a_row_shift_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n0,1,, \n")
    assert Table.read(str(tmp_path / "t.csv"), ["a"]).rows == [{"": "2", "a": "0", "b": "1"}]
