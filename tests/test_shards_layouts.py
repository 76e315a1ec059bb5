"""What layouts can say: joined and repeated tables, class folders, containers, masks of all kinds, splits of the user's own; and what is
refused of each. Whole official layouts are in test_datasets."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from base.config import parse
from base.errors import RequestError, WorkError
from shards.card import Card, SplitRule
from shards.corpus import Corpus
from shards.deidentify import Names
from shards.manifest import Manifest
from shards.pack import pack, plan
from shards.pack import write as write_shard
from shards.readers import Found, read

CARD: dict[str, Any] = {
    "schema": 2,
    "dataset": "tiny",
    "title": "tiny",
    "reader": "csv",
    "kind": "multilabel",
    "labels": ["edema", "mass"],
    "split": {"val": 0.3, "test": 0.3},
    "public": True,
    "licence": "none",
    "access": "nowhere",
    "citation": "none",
}
TABLE: dict[str, Any] = {
    "name": "one",
    "requires": ["t.csv"],
    "images": ["images/*.png"],
    "table": "t.csv",
    "image_column": "image",
    "label_columns": {"edema": "edema", "mass": "mass"},
}
ROWS = [f"images/{n}.png,{n % 2},{n % 3 // 2}" for n in range(12)]
SPLITS = ["train", "train", "val", "test"] * 3


def layout(**change: Any) -> dict[str, Any]:
    return {key: value for key, value in (TABLE | change).items() if value is not None}


def card(*layouts: Mapping[str, Any], **change: Any) -> Card:
    return parse(CARD | {"layouts": list(layouts or [TABLE])} | change, Card, "card")


def png(n: int = 0, side: int = 8) -> bytes:
    return bytes(cv2.imencode(".png", np.full((side, side), n, np.uint8) + np.arange(side, dtype=np.uint8))[1])


def write(folder: Path, name: str, data: bytes | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twelve images and the table of them."""
    for n in range(12):
        write(tmp_path / "raw", f"images/{n}.png", png(n))
    write(tmp_path / "raw", "t.csv", "\n".join(["image,edema,mass", *ROWS]))
    return tmp_path / "raw"


def find(a_card: Card, raw: Path, split_files: Path | None = None) -> Found:
    return read(a_card, str(raw), Names.of(a_card), None if split_files is None else str(split_files))


def labels(found: Found) -> dict[str, dict[str, int | None]]:
    return {record.file: record.labels for record in found.records}


def packed(a_card: Card, raw: Path, out: Path) -> tuple[Manifest, dict[str, dict[str, Any]]]:
    """The manifest, and by file each sample: its JSON, with its pixels and its mask u8 HW."""
    manifest = pack(a_card, str(raw), str(out))
    files = {f"tiny-{record.key}": record.file for record in find(a_card, raw).records}
    samples: dict[str, dict[str, Any]] = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                image = None if field == "json" else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
                found = json.loads(data) if image is None else {"mask" if field == "seg.png" else "image": image}
                samples.setdefault(files[key], {}).update(found)
    return manifest, samples


# Tables


def test_a_table_beside_class_folders(raw: Path) -> None:
    """The images that it names have their class from a word of its cell, the others from their folder."""
    for n in range(6):
        (raw / "images" / ["wet", "dry"][n % 2]).mkdir(exist_ok=True)
        (raw / "images" / f"{n}.png").rename(raw / "images" / ["wet", "dry"][n % 2] / f"{n}.png")
    write(raw, "t.csv", "\n".join(["image,said", *(f"{n},{['dry', 'wet'][n % 2]} 1 2 3 4" for n in range(6, 12))]))
    both = layout(images=["images/*.png", "images/*/*.png"], label_columns=None, findings_column="said", label_pattern="(dry|wet)")
    classes: dict[str, Any] = {"reader": "folders", "kind": "multiclass", "labels": ["dry", "wet"]}
    found = find(card(both, **classes), raw)
    assert [labels(found)[f"images/{name}.png"] for name in ("wet/2", "dry/3", "6", "7")] == [
        {"wet": 1},
        {"dry": 1},
        {"dry": 1},
        {"wet": 1},
    ]
    assert (len(found.records), found.left_out) == (12, 0)
    write(raw, "t.csv", "image,said\n6,moist 1 2 3 4\n")
    with pytest.raises(RequestError, match=r"t\.csv, row 2, column said: 'moist 1 2 3 4' names no label: no match of"):
        find(card(both, **classes), raw)


def test_joined_tables(raw: Path) -> None:
    write(raw, "t.csv", "\n".join(["image,study", *(f"images/{n}.png,s{n // 2}" for n in range(12))]))
    write(raw, "studies.csv", "\n".join(["study,edema,mass,who", *(f"s{n},{n % 2},1,p{n // 2}" for n in range(6))]))
    joined = card(layout(join=[{"table": "studies.csv", "by": "study"}], patient_column="who"), split={"val": 0, "test": 0})
    found = find(joined, raw)
    assert labels(found)["images/3.png"] == {"edema": 1, "mass": 1}
    assert len({record.patient for record in found.records}) == 3
    write(raw, "studies.csv", "study,edema,mass,who\ns0,1,0,p\n")
    with pytest.raises(RequestError, match=r"no row for 's1', which .*t\.csv, row 4 names"):
        find(joined, raw)
    optional = card(layout(join=[{"table": "studies.csv", "by": "study", "optional": True}]), split={"val": 0, "test": 0})
    assert labels(find(optional, raw))["images/2.png"] == {"edema": None, "mass": None}
    write(raw, "studies.csv", "study,edema,mass,who\ns0,1,0,p\ns0,1,0,p\n")
    with pytest.raises(RequestError, match=r"studies.csv, row 3: 's0' stands twice"):
        find(optional, raw)
    write(raw, "studies.csv", "study,image,edema,mass,who\ns0,images/1.png,1,0,p\n")
    with pytest.raises(RequestError, match=r"the column 'image' says 'images/1.png'"):
        find(optional, raw)


def test_one_table_a_split(raw: Path) -> None:
    write(raw, "a.csv", "\n".join(["image,edema,mass", *ROWS[:9]]))
    write(raw, "b.csv", "\n".join(["image,edema,mass", *ROWS[9:]]))
    tables = layout(table=None, split_tables={"train_val": "a.csv", "test": "b.csv"})
    found = find(card(tables, split={"val": 0.5, "test": 0}), raw)
    assert [record.file for record in found.records if record.split == "test"] == ["images/10.png", "images/11.png", "images/9.png"]
    assert {record.split for record in found.records} == {"train", "val", "test"}
    assert found.split_rule == "official tables a.csv, b.csv; validation from the training patients by keyed hash, 0.5"
    write(raw, "b.csv", "\n".join(["image,edema,mass", *ROWS[8:]]))
    with pytest.raises(RequestError, match=r"1 image in several rows: images/8.png \(the rows differ: keep one"):
        find(card(tables), raw)


def test_votes(raw: Path) -> None:
    votes = [(0, 1, 1), (0, 1, 0), (0, 0, ""), (1, 1, 0), (1, 0, -1), *((n, 0, 0) for n in range(2, 12))]
    write(raw, "t.csv", "\n".join(["image,edema,mass", *(f"images/{n}.png,{edema},{mass}" for n, edema, mass in votes)]))
    found = labels(find(card(layout(repeated="majority")), raw))
    assert found["images/0.png"] == {"edema": 1, "mass": -1}  # one of two is no majority
    assert found["images/1.png"] == {"edema": -1, "mass": -1}
    agreeing = "\n".join(["image,edema,mass", *(f"images/{n % 12}.png,1,0" for n in range(13))])
    write(raw, "t.csv", agreeing)
    with pytest.raises(RequestError, match=r"1 image in several rows: .*the rows agree: write `repeated: majority`"):
        find(card(), raw)
    write(raw, "t.csv", "\n".join(["image,edema,mass", *(f"images/{n}.png,{edema},{mass}" for n, edema, mass in votes)]))
    with pytest.raises(RequestError, match=r"2 images in several rows: .* rows differ: .*`repeated: majority`"):
        find(card(), raw)


def test_rows_that_are_left_out_are_counted(raw: Path) -> None:
    write(raw, "t.csv", "\n".join(["image,edema,mass,good", *(f"{row},{int(n < 9)}" for n, row in enumerate(ROWS))]))
    found = find(card(layout(keep={"good": ["1"]})), raw)
    assert len(found.records) == 9
    assert found.left_out == 3 + 3  # three rows, and three images of which no row is left
    with pytest.raises(RequestError, match="no image in the layout one"):
        find(card(layout(keep={"good": ["2"]})), raw)


def test_values_and_gaps(raw: Path) -> None:
    write(raw, "t.csv", "\n".join(["image,grade", *(f"images/{n}.png,{n % 3}.0" for n in range(11)), "images/11.png,"]))
    grades = layout(label_columns=None, findings_column="grade", values={"0": "none", "1": "mild", "2": "severe", "": ""})
    graded = card(grades, kind="multiclass", labels=["none", "mild", "severe"])
    found = labels(find(graded, raw))
    assert found["images/4.png"] == {"mild": 1}
    assert found["images/11.png"] == {}
    strict = card(grades | {"values": {"0": "none", "1": "mild", "2": "severe"}}, kind="multiclass", labels=["none", "mild", "severe"])
    with pytest.raises(RequestError, match=r"row 13, column grade: no class"):
        find(strict, raw)


@pytest.mark.parametrize("cell", ["{n}", "{n}.png", "images/{n}.png", "release-1/images/{n}.png", "9.8.7/{n}"])
def test_images_are_found_by_what_a_table_calls_them(raw: Path, cell: str) -> None:
    write(raw, "t.csv", "\n".join(["image,edema,mass", *(f"{cell.format(n=n)},{n % 2},0" for n in range(12))]))
    assert len(labels(find(card(), raw))) == 12
    assert labels(find(card(), raw))["images/7.png"] == {"edema": 1, "mass": 0}


def test_a_name_that_several_files_have_is_refused_and_one_that_none_has_is_kept(raw: Path) -> None:
    for n in range(12):
        write(raw, f"copy/images/{n}.png", png(n))
    two = layout(images=["images/*.png", "copy/images/*.png"])
    assert len(find(card(two), raw).records) == 12  # the table's path is one of the two exactly
    write(raw, "t.csv", "image,edema,mass\n3,0,1\n")
    with pytest.raises(RequestError, match=r"'3' could be copy/images/3.png or images/3.png"):
        find(card(two), raw)
    write(raw, "t.csv", "\n".join(["image,edema,mass", *ROWS, "images/12.png,0,1"]))
    manifest = pack(card(), str(raw), str(raw.parent / "out"))
    assert manifest.quarantined == 1
    assert '"file":"images/12.png"' in (raw.parent / "out" / "quarantine.jsonl").read_text()


# Splits


def lists(folder: Path, **of: list[str]) -> Path:
    for split, names in of.items():
        write(folder, f"{split}.txt", "\n".join(names) + "\n")
    return folder


def test_split_files_of_the_users_own_replace_the_cards_rule(raw: Path, tmp_path: Path) -> None:
    mine = lists(tmp_path / "mine", train=["0.png", "1", "images/2.png", "4"], val=["5"], test=["6", "7"])
    with_benchmark = card(benchmark={"name": "Known", "counts": {"train": 4, "val": 1, "test": 2}})
    found = find(with_benchmark, raw, mine)
    assert {record.file: record.split for record in found.records} == {
        **{f"images/{n}.png": "train" for n in (0, 1, 2, 4)},
        "images/5.png": "val",
        **{f"images/{n}.png": "test" for n in (6, 7)},
    }
    assert found.left_out == 5
    assert found.split_rule.startswith("split files of the user's own (train 4, val 1, test 2; ")
    assert found.split_rule.endswith("; the counts of the benchmark's split (Known: 4/1/2)")
    assert str(tmp_path) not in found.split_rule
    assert find(with_benchmark, raw).split_rule.endswith("; not the benchmark's split (Known: 4/1/2)")
    manifest = pack(with_benchmark, str(raw), str(tmp_path / "out"), split_files=str(mine))
    assert (manifest.counts, manifest.left_out, manifest.split_rule) == ({"train": 4, "val": 1, "test": 2}, 5, found.split_rule)


def test_split_files_as_a_table(raw: Path, tmp_path: Path) -> None:
    write(tmp_path, "mine.csv", "\n".join(["image,split", *(f"{n},{split}" for n, split in enumerate(SPLITS))]))
    found = find(card(), raw, tmp_path / "mine.csv")
    assert [record.split for record in sorted(found.records, key=lambda record: int(record.file[7:-4]))] == SPLITS


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ({"train": ["0"], "val": ["1"]}, "test.txt not there"),
        ({"train": ["0"], "val": ["1"], "test": ["0"]}, "1 image in two splits: 0"),
        ({"train": ["0"], "val": [], "test": ["2"]}, "val.txt: the list is empty"),
        ({"train": ["0"], "val": ["1"], "test": ["99"]}, "1 of the 3 listed images are not there: 99"),
        ({"train": ["0"], "test": ["2"]}, "no image in split 'val'"),
    ],
)
def test_wrong_split_files_are_refused(raw: Path, tmp_path: Path, of: dict[str, list[str]], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        find(card(), raw, lists(tmp_path / "mine", **of))


def test_split_files_that_are_not_there(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such split files"):
        find(card(), raw, tmp_path / "nowhere")
    write(tmp_path, "mine.csv", "image,split\n0,tset\n")
    with pytest.raises(RequestError, match="'tset' is not a split"):
        find(card(), raw, tmp_path / "mine.csv")


@pytest.mark.parametrize("by", ["image", "patient", "who"])
def test_official_lists_of_images_patients_or_a_columns_values(raw: Path, by: str) -> None:
    write(raw, "t.csv", "\n".join(["image,edema,mass,who", *(f"{row},p{n // 2}" for n, row in enumerate(ROWS))]))
    names = [f"{n}.png" for n in range(12)] if by == "image" else [f"p{n // 2}" for n in range(12)]
    of = {"train": names[:6], "val": names[6:8], "test": names[8:]}
    for part, listed in of.items():
        write(raw, f"{part}.txt", "\n".join(listed))
    split_lists = {part: f"{part}.txt" for part in of}
    found = find(card(layout(split_lists=split_lists, split_lists_by=by, patient_column="who")), raw)
    splits = {record.file: record.split for record in found.records}
    assert [splits[f"images/{n}.png"] for n in range(12)] == ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    write(raw, "test.txt", names[11])
    with pytest.raises(RequestError, match=r"(3|2) images in none of the official lists"):
        find(card(layout(split_lists=split_lists, split_lists_by=by, patient_column="who")), raw)


# Files without a table

FOLDERS: dict[str, Any] = {"name": "one", "reader": "folders", "requires": ["train/*/*.png"], "images": ["*/*/*.png"]}


def test_class_folders(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for n in range(10):
            write(tmp_path, f"{part}/{['cat', 'dog'][n % 2]}/{n}.png", png(n))
    words = {"split_pattern": "^(train|val)/", "split_words": {"train": "train_val", "val": "test"}}
    folders = card(FOLDERS | words, kind="multiclass", labels="found", split={"val": 0.3, "test": 0})
    found = find(folders, tmp_path)
    assert found.card.labels == ["cat", "dog"]
    assert labels(found)["val/dog/3.png"] == {"dog": 1}
    assert {record.split for record in found.records if record.file.startswith("val/")} == {"test"}
    manifest, samples = packed(folders, tmp_path, tmp_path / "out")
    assert manifest.card.labels == ["cat", "dog"]
    assert samples["val/dog/3.png"]["labels"] == {"dog": 1}
    assert sum(manifest.positives["test"].values()) == 10
    named = FOLDERS | words | {"values": {"cat": "edema", "dog": "nothing"}, "no_finding": ["nothing"]}
    assert labels(find(card(named, split={"val": 0.3, "test": 0}), tmp_path))["train/dog/1.png"] == {"edema": 0, "mass": 0}
    with pytest.raises(RequestError, match=r"unknown label '(cat|dog)'"):
        find(card(FOLDERS | words), tmp_path)
    with pytest.raises(RequestError, match="'va' is not a split: train"):
        find(card(FOLDERS | words | {"split_words": {"train": "train"}, "split_pattern": "^(train|va)"}, labels=["cat", "dog"]), tmp_path)


def test_excluded_files_are_no_images(raw: Path) -> None:
    write(raw, "images/0_mask.png", png())
    found = find(card(FOLDERS | {"reader": "pairs", "requires": ["images/*.png"], "images": ["images/*.png"], "exclude": ["*_mask*"]}), raw)
    assert len(found.records) == 12


# Containers


def npz(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path.parent


def images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 8, 8, *shape), dtype=np.uint8)


NPZ: dict[str, Any] = {"name": "one", "reader": "npz", "requires": ["*.npz"], "images": ["*.npz"]}


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path: Path, channels: int) -> None:
    shape = (3,) if channels == 3 else ()
    arrays = {"train": images(12, *shape), "val": images(3, *shape), "test": images(4, *shape)}
    classes = {split: np.arange(len(array), dtype=np.uint8)[:, None] % 2 for split, array in arrays.items()}
    raw = npz(tmp_path / "raw" / "x.npz", **{f"{k}_images": v for k, v in arrays.items()}, **{f"{k}_labels": v for k, v in classes.items()})
    one = card(NPZ, kind="multiclass", channels=channels)
    manifest, samples = packed(one, raw, tmp_path / "out")
    assert manifest.counts == {"train": 12, "val": 3, "test": 4}
    assert manifest.patients == manifest.counts
    sample = samples["x.npz/train/0000011"]
    assert sample["labels"] == {"mass": 1}
    assert np.array_equal(sample["image"], arrays["train"][11][..., ::-1] if channels == 3 else arrays["train"][11])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_labels": np.array([[0], [2]])}, r"x.npz: train_labels, row 1: class 2 is not one of the card's 2"),
        ({"train_labels": np.array([[0, 1], [1, 0]])}, "class 0, 1 is not one"),
        ({"train_images": None, "extra": np.zeros(3)}, "holds no train_images, val_images or test_images"),
        ({"train_labels": np.array([[0]])}, "2 train_images, 1 train_labels"),
        ({"train_labels": np.array([[None], [1]], dtype=object)}, "not an .npz of images and labels"),
        ({"train_labels": np.array([[0], [0.7]])}, "train_labels, row 1: 0.7 is not a whole number"),
        ({"train_labels": np.array([[np.nan], [1]])}, "row 0: nan is not a whole number"),
    ],
)
def test_wrong_npz_files_are_refused(tmp_path: Path, change: dict[str, np.ndarray | None], says: str) -> None:
    arrays: dict[str, Any] = {"train_images": images(2), "train_labels": np.array([[0], [1]])} | change
    raw = npz(tmp_path / "raw" / "x.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(RequestError, match=says):
        find(card(NPZ, kind="multiclass"), raw)


@pytest.mark.parametrize("change", ["objects", "numbers", "flipped", "gone"])
def test_what_is_wrong_inside_an_npz_is_named_when_it_is_packed(tmp_path: Path, change: str) -> None:
    strange = {"objects": np.array([None] * 4), "numbers": np.zeros((4, 8, 8))}
    arrays: dict[str, Any] = {"train_images": images(40), "test_images": strange.get(change, images(4))}
    path = tmp_path / "raw" / "x.npz"
    npz(path)
    np.savez(path, **arrays)
    classes = card(NPZ, kind="unlabelled", labels=[], split={"val": 0, "test": 0})
    jobs = plan(classes, str(tmp_path / "raw"))
    if change == "flipped":
        data = bytearray(path.read_bytes())
        data[1000] ^= 0xFF
        path.write_bytes(data)
    if change == "gone":
        path.unlink()
    if change in strange:
        entries = [write_shard(job, str(tmp_path / "out")) for job in jobs]
        assert [len(entry.quarantined) for entry in entries] == [0, 4]
        assert "is no image" in entries[1].quarantined[0].reason
    else:
        with pytest.raises(WorkError, match=r"x\.npz: cannot be read: .*(CRC-32|No such file)"):
            write_shard(jobs[0], str(tmp_path / "out"))


def test_links_in_a_tar_and_links_to_nothing_are_named(tmp_path: Path) -> None:
    raw = tar(tmp_path / "raw" / "x.tar", {"a.png": png()})
    with tarfile.open(raw / "x.tar", "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(RequestError, match=r"x\.tar: 'b\.png' is a link or device"):
        find(card(TARS, kind="multiclass"), raw)
    for n in range(9):
        write(tmp_path / "files", f"{n}.png", png(n))
    (tmp_path / "files" / "link.png").symlink_to("/nonexistent")
    plain = card({"name": "one", "reader": "folders", "requires": ["*.png"], "images": ["*.png"]}, kind="unlabelled", labels=[])
    jobs = plan(plain.model_copy(update={"split": SplitRule(val=0, test=0)}), str(tmp_path / "files"))
    quarantined = write_shard(jobs[0], str(tmp_path / "out")).quarantined
    assert [(row.file, row.reason) for row in quarantined] == [("link.png", "image is not there")]


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "x.npz", b"PK\x03\x04 and no more")
    with pytest.raises(RequestError, match=r"x\.npz: not an \.npz"):
        find(card(NPZ, kind="multiclass"), tmp_path)


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name.removesuffix("#2"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.parent


TARS: dict[str, Any] = {"name": "one", "reader": "tars", "requires": ["*.tar"], "images": ["*.tar"]}


def test_tars(tmp_path: Path) -> None:
    for part in ("train", "test"):
        members = {f"{n:04d}.png": png(n) for n in range(10)} | {f"{n:04d}.cls": str(n % 2).encode() for n in range(10)}
        raw = tar(tmp_path / "raw" / f"x-{part}-0.tar", dict(sorted(members.items())))
    split = {"split_pattern": "^x-(train|test)-", "split_words": {"train": "train_val"}}
    classes = card(TARS | split, kind="multiclass", split={"val": 0.3, "test": 0})
    manifest, samples = packed(classes, raw, tmp_path / "out")
    assert manifest.counts["test"] == 10
    sample = samples["x-train-0.tar/0007.png"]
    assert sample["labels"] == {"mass": 1}
    expected = cv2.imdecode(np.frombuffer(png(7), np.uint8), cv2.IMREAD_UNCHANGED)
    assert expected is not None
    assert np.array_equal(sample["image"], expected)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"../a.png": png(), "a.cls": b"0"}, r"'\.\./a.png' leads out"),
        ({"/etc/a.png": png()}, "leads out"),
        ({"a.png": png(), "a.png#2": png(1)}, "two images are named 'a'"),
        ({"a.png": png(), "a.cls": b"7"}, r"a\.cls: class 7 is not one of the card's 2"),
        ({"a.png": png(), "a.cls": b"cat"}, "unknown label 'cat'"),
    ],
)
def test_wrong_tars_are_refused(tmp_path: Path, members: dict[str, bytes], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        find(card(TARS, kind="multiclass"), tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("cut", [700, 100])
def test_a_truncated_tar_is_refused(tmp_path: Path, cut: int) -> None:
    tar(tmp_path / "x.tar", {"a.png": b"x" * 2000, "a.cls": b"0"})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    with pytest.raises(RequestError, match=r"x\.tar: not a tar, or cut short"):
        find(card(TARS, kind="multiclass"), tmp_path)


# Masks

MASKED: dict[str, Any] = {"name": "one", "reader": "pairs", "requires": ["images/*.png"], "images": ["images/*.png"]}


def mask_card(layout: dict[str, Any], **change: Any) -> Card:
    return card(MASKED | layout, **({"kind": "segmentation", "labels": [], "mask_classes": ["lung", "heart"]} | change))


def block(value: int, *at: int, side: int = 8) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    mask[at[0] : at[1], at[2] : at[3]] = value
    return mask


def encoded(mask: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", mask)[1])


def test_a_mask_file_for_each_class(raw: Path, tmp_path: Path) -> None:
    for n in range(12):
        write(raw, f"outlines/left/{n}.png", encoded(block(255, 0, 4, 0, 2)))
        write(raw, f"outlines/right/{n}.png", encoded(block(255, 0, 4, 6, 8)))
        write(raw, f"outlines/heart/{n}.png", encoded(block(7, 2, 6, 1, 5)))
    masks = {"lung": ["outlines/left/{stem}.png", "outlines/right/{stem}.png"], "heart": ["{dir}/../outlines/heart/{stem}.png"]}
    manifest, samples = packed(mask_card({"masks": masks}), raw, tmp_path / "out")
    assert manifest.quarantined == 0
    expected = np.maximum(np.maximum(block(1, 0, 4, 0, 2), block(1, 0, 4, 6, 8)), block(2, 2, 6, 1, 5))
    assert np.array_equal(samples["images/3.png"]["mask"], expected)


def test_several_masks_by_a_star_none_at_all_and_a_field_of_view(raw: Path, tmp_path: Path) -> None:
    for n in range(1, 12):
        write(raw, f"images/{n}_mask.png", encoded(block(255, 0, 2, 0, 3)))
    write(raw, "images/1_mask_1.png", encoded(block(255, 4, 6, 4, 7)))
    for n in range(12):
        write(raw, f"views/{n}.png", encoded(block(255, 0, 8, 0, 6)))
    layout = {"exclude": ["*_mask*"], "masks": ["{dir}/{stem}_mask*.png"], "field_of_view": "views/{stem}.png"}
    one = {"mask_classes": ["lesion"]}
    manifest, samples = packed(mask_card(layout | {"mask_optional": True}, **one), raw, tmp_path / "out")
    assert manifest.quarantined == 0
    expected = block(1, 0, 2, 0, 3) | block(1, 4, 6, 4, 7)
    expected[:, 6:] = 255
    assert np.array_equal(samples["images/1.png"]["mask"], expected)
    assert "mask" not in samples["images/0.png"]
    strict = pack(mask_card(layout, **one), str(raw), str(tmp_path / "strict"))
    assert strict.quarantined == 1
    assert "mask is not there" in (tmp_path / "strict" / "quarantine.jsonl").read_text()


def test_masks_of_another_size_are_quarantined_unless_the_card_takes_them(raw: Path, tmp_path: Path) -> None:
    for n in range(12):
        write(raw, f"m/{n}.png", encoded(block(1, 0, 8, 0, 4, side=16 if n == 5 else 8)))
    layout, one = {"masks": ["m/{stem}.png"]}, {"mask_classes": ["lung"]}
    assert pack(mask_card(layout, **one), str(raw), str(tmp_path / "strict")).quarantined == 1
    assert "mask measures 16 x 16 (height x width), its image 8 x 8" in (tmp_path / "strict" / "quarantine.jsonl").read_text()
    manifest, samples = packed(mask_card(layout | {"mask_resize": True}, **one), raw, tmp_path / "out")
    assert manifest.quarantined == 0
    assert np.array_equal(samples["images/5.png"]["mask"], block(1, 0, 8, 0, 4, side=16))  # as it was drawn
    corpus = Corpus(str(tmp_path / "out"), ("train", "val", "test"))
    segs = [sample.seg for sample in (corpus[i] for i in range(len(corpus))) if sample.seg is not None]
    assert sorted(int(seg.sum()) for seg in segs) == [8, *[32] * 11]  # brought to the image


def test_masks_of_several_sizes_and_the_field_of_view_meet_in_one(raw: Path, tmp_path: Path) -> None:
    """Masks that differ among themselves are brought to the image's size; a field of view to that of the masks."""
    for n in range(12):
        write(raw, f"a/{n}.png", encoded(block(1, 0, 8, 0, 4, side=16)))
        write(raw, f"b/{n}.png", encoded(block(1, 4, 8, 4, 8) if n == 5 else block(1, 8, 16, 8, 16, side=16)))
        write(raw, f"views/{n}.png", encoded(block(255, 0, 8, 0, 6)))
    layout = {"masks": ["a/{stem}.png", "b/{stem}.png"], "field_of_view": "views/{stem}.png", "mask_resize": True}
    manifest, samples = packed(mask_card(layout, mask_classes=["lung"]), raw, tmp_path / "out")
    assert manifest.quarantined == 0
    for name, side in (("5", 8), ("6", 16)):
        expected = block(1, 0, side // 2, 0, side // 4, side=side) | block(1, side // 2, side, side // 2, side, side=side)
        expected[:, side * 3 // 4 :] = 255
        assert np.array_equal(samples[f"images/{name}.png"]["mask"], expected)


def test_run_lengths_of_several_rows_are_one_mask_and_one_label(raw: Path, tmp_path: Path) -> None:
    rows = ["images/0.png,1 2", "images/0.png,9 2", "images/1.png,-1", "images/2.png,60 9", *(f"images/{n}.png,1 1" for n in range(3, 12))]
    write(raw, "t.csv", "\n".join(["image,runs", *rows]))
    rle = layout(label_columns=None, rle={"column": "runs", "kind": "kaggle", "label": "mass"})
    manifest, samples = packed(card(rle, kind="mixed", labels=["mass"], mask_classes=["mass"]), raw, tmp_path / "out")
    assert samples["images/0.png"]["labels"] == {"mass": 1}
    assert np.array_equal(samples["images/0.png"]["mask"], block(1, 0, 2, 0, 2))
    assert samples["images/1.png"]["labels"] == {"mass": 0}
    assert not samples["images/1.png"]["mask"].any()
    assert manifest.quarantined == 1
    assert "beyond the image's 64 pixels" in (tmp_path / "out" / "quarantine.jsonl").read_text()


# Patients


def test_patients_by_dicom_header_and_by_a_table_of_groups(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    for n in range(4):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        header.PatientID, header.StudyInstanceUID = f"p{n // 2}", f"1.2.{n}"
        header.save_as(tmp_path / f"{n}.dcm", enforce_file_format=False)
    write(tmp_path, "text.dcm", "not one")
    tags = {"requires": ["*.dcm"], "images": ["*.dcm"], "patient_tag": "PatientID", "study_tag": "StudyInstanceUID"}
    found = find(card(MASKED | tags, kind="unlabelled", labels=[], split={"val": 0, "test": 0}), tmp_path)
    assert len({record.patient for record in found.records}) == 3
    studies = {record.meta["study"] for record in found.records if "study" in record.meta}
    assert len(studies) == 4
    assert all(isinstance(study, str) and len(study) == 16 for study in studies)
    with monkeypatch.context() as patch:
        patch.setattr(pydicom, "dcmread", lambda *given, **named: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(WorkError, match=r"\.dcm: cannot be read: .*Input/output error"):  # and not a patient of its own
            find(card(MASKED | tags, kind="unlabelled", labels=[], split={"val": 0, "test": 0}), tmp_path)
    header.PatientID = ""
    header.save_as(tmp_path / "3.dcm", enforce_file_format=False)
    with pytest.raises(RequestError, match=r"3\.dcm, tag PatientID: no patient"):
        find(card(MASKED | tags, kind="unlabelled", labels=[], split={"val": 0, "test": 0}), tmp_path)
    write(raw, "pairs.csv", "\n".join(["left;right", *(f"{n};{n + 1}.png" for n in range(0, 12, 2))]))
    groups = {"patient_groups": {"table": "pairs.csv", "sep": ";", "columns": ["left", "right"]}}
    grouped = find(card(layout(**groups), split={"val": 0, "test": 0}), raw)
    assert len({record.patient for record in grouped.records}) == 6
    write(raw, "pairs.csv", "left;right\n0;1\n2;0\n")
    with pytest.raises(RequestError, match=r"pairs.csv, row 3: '0' is of two patients"):
        find(card(layout(**groups)), raw)
    write(raw, "pairs.csv", "left;right\n0;1\n")
    with pytest.raises(RequestError, match="has no patient in the table of patients"):
        find(card(layout(**groups)), raw)
