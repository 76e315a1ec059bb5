"""The survey: what files are by content, what columns mean, and a draft that packs once its open points are settled."""

import csv
import dataclasses
import gzip
import io
import re
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from faulty_s3 import store
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from base import storage
from base.errors import RequestError, WorkError
from shards.card import Card, load_card
from shards.columns import FileNames, survey_table
from shards.corpus import Corpus
from shards.draft import draft
from shards.headers import header
from shards.open_points import open_points
from shards.pack import pack, plan
from shards.rawfiles import Finder
from shards.survey import globs, mask_templates, survey

DICOM = Path(__file__).parent.parent.parent / "shared" / "data" / "dicom" / "files"
SPLITS = ["train", "train", "train", "val", "test", "test"]


def picture(path: Path, i: int, mode: str = "L", size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_table(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def dicom(path: Path, patient: str, preamble: bytes = b"\0" * 128, sop_class: str = "", modality: str = "DX") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path)])
    image = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=preamble)
    image.PatientID, image.Modality, image.SOPClassUID = patient, modality, sop_class or meta.MediaStorageSOPClassUID
    image.Rows, image.Columns, image.SamplesPerPixel, image.PhotometricInterpretation = 8, 9, 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    image.PixelData = bytes(range(72))
    image.save_as(path, enforce_file_format=True)


def test_a_server_that_tells_no_sizes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(RequestError, match="does not tell the sizes of its files"):
            survey(f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()


def test_formats_are_known_by_content(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0, "RGB")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    (tmp_path / "text.dcm").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.jpg").read_bytes()[:12])
    dicom(tmp_path / "tiff.dcm", "p", b"II*\0" + b"\0" * 124)  # a preamble may be a TIFF's
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "v.nii.gz")
    (tmp_path / "volume.dat").write_bytes((tmp_path / "v.nii.gz").read_bytes())
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b" + b"x" * 40)
    np.savez(tmp_path / "x.npz", train_images=np.zeros((7, 4, 4), np.uint8), train_labels=np.zeros((7, 1), np.uint8))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("0.jpg", "0.cls"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    found = {path.name: header(str(tmp_path), path.name) for path in tmp_path.iterdir()}
    assert {name: one.format for name, one in found.items()} == {
        "a.jpg": "png",
        "text.dcm": "text",
        "empty.png": "empty",
        "cut.png": "png",
        "tiff.dcm": "dicom",
        "v.nii.gz": "nifti",
        "volume.dat": "nifti",
        "cut.gz": "gzip",
        "x.npz": "npz",
        "s.tar": "tar",
    }
    assert found["a.jpg"].size == "36 x 40"
    assert found["tiff.dcm"].size == "8 x 9"
    assert found["tiff.dcm"].tags["Modality"] == "DX"
    assert found["v.nii.gz"].size == found["volume.dat"].size == "4 x 5 x 6"
    assert found["cut.gz"].problem
    assert found["x.npz"].tags["train_images"] == "7 x 4 x 4"
    assert found["s.tar"].pixels == "jpg, cls"
    assert found["empty.png"].problem
    assert found["cut.png"].problem
    assert str(tmp_path) not in found["cut.png"].problem


@pytest.mark.skipif(not DICOM.exists(), reason="needs the shared DICOM files")
def test_odd_dicom_files_are_surveyed_without_a_fall() -> None:
    found = {path.name: header(str(DICOM), path.name) for path in DICOM.iterdir()}
    assert sum(one.format == "dicom" for one in found.values()) >= 50
    assert found["broken_text.dcm"].format == "text"
    assert found["pd_rtplan.dcm"].problem == "DICOM without an image"


@given(st.lists(st.lists(st.sampled_from(["a", "b1", "b2", "img.png", "7"]), min_size=1, max_size=3), min_size=1, max_size=30))
@settings(deadline=None)
def test_globs_cover_every_file_once(tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]]) -> None:
    files = sorted({"/".join([*parts, "x.png"]) for parts in paths})
    found = globs(files)
    assert sorted(file for group in found.values() for file in group) == files


def test_numbered_folders_become_a_star() -> None:
    files = [f"images_{n:03}/images/{n}.png" for n in range(1, 4)] + [f"p{n}/view.jpg" for n in range(20)]
    assert set(globs(files)) == {"images_*/images/*.png", "p*/*.jpg"}
    assert set(globs([f"{name}/x.png" for name in ("benign", "malignant")])) == {"benign/*.png", "malignant/*.png"}


def test_masks_are_found_by_the_names_of_their_images() -> None:
    images = [f"images/a_{n}.png" for n in range(10)]
    assert list(mask_templates(images, [f"masks/a_{n}_mask.gif" for n in range(10)])) == ["masks/{stem}_mask.gif"]
    beside = [f"images/a_{n}_mask{extra}.png" for n in range(10) for extra in ("", "_1")]
    assert list(mask_templates(images, beside)) == ["{dir}/{stem}_mask*.png"]
    assert mask_templates(images, ["masks/other.png"]) == {}


def test_columns_are_known_by_content_and_name(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "Image Index": f"{n:03}.png",
            "PatientID": n // 2,
            "Finding Labels": ["Mass|Nodule", "No Finding", "Mass", "Nodule"][n % 4],
            "edema": ["1.0", "0.0", "", "-1.0"][n % 4],
            "always": 0,
            "fold": SPLITS[n % 6],
            "Patient Age": n,
            "Patient Gender": "FM"[n % 2],
            "View Position": ["PA", "AP"][n % 2],
            "site": ["north", "south"][n % 2],
        }
        for n in range(24)
    ]
    write_table(tmp_path / "t.tsv", rows, "\t")
    facts = survey_table(str(tmp_path), "t.tsv", FileNames(f"x/{n:03}.png" for n in range(24)))
    assert facts is not None
    assert {column.name: column.role for column in facts.columns} == {
        "Image Index": "image",
        "PatientID": "patient",
        "Finding Labels": "findings",
        "edema": "label",
        "always": "other",
        "fold": "split",
        "Patient Age": "age",
        "Patient Gender": "sex",
        "View Position": "view",
        "site": "class",
    }
    assert facts.separator == "\t"
    assert facts.images == 24


def with_table(raw: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(36):
        picture(raw / "xrays" / f"{n // 2:04}_{n % 2}.png", n)
        rows.append(
            {"file": f"{n // 2:04}_{n % 2}.png", "patient_id": n // 2, "opacity": n % 2, "fold": SPLITS[n // 6], "sex": "FM"[n // 18]}
        )
    write_table(raw / "labels.csv", rows)


def with_findings(raw: Path) -> None:
    rows: list[dict[str, object]] = []
    for n in range(60):
        picture(raw / "images" / f"{n // 3:04}_{n % 3}.jpg", n)
        rows.append({"Image": f"{n // 3:04}_{n % 3}.jpg", "Findings": ["Mass|Nodule", "No Finding", "Mass", "Nodule"][n % 4]})
    write_table(raw / "entries.csv", rows)


def with_class_folders(raw: Path) -> None:
    for n in range(120):
        patient = n // 2
        folder = raw / ["train", "train", "test"][patient % 3] / ["benign", "malignant", "normal"][patient // 3 % 3]
        picture(folder / f"p{patient}_{n % 2}.png", n, "RGB")


def with_masks_beside(raw: Path) -> None:
    for n in range(40):
        picture(raw / "scans" / f"{n // 2:03}-{n % 2}.png", n)
        picture(raw / "outlines_mask" / f"{n // 2:03}-{n % 2}_mask.png", n, "1")


def with_dicom(raw: Path) -> None:
    for n in range(80):
        dicom(raw / f"study{n // 2}" / f"1.2.840.{n}", f"patient {n // 2}")


def with_volumes(raw: Path) -> None:
    for n in range(40):
        voxels = np.random.default_rng(n).integers(-900, 900, (9, 8, 3)).astype(np.int16)
        for folder, end, values in (("scans", "", voxels), ("organs", "_mask", (voxels > 0).astype(np.uint8))):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), raw / folder / f"{n // 2:03}-v1.{n % 2}{end}.nii.gz")


def with_names_that_end_in_numbers(raw: Path) -> None:
    for n in range(40):
        dicom(raw / "scans" / f"1.2.840.{n}", f"patient {n // 2}")
        picture(raw / "outlines" / f"1.2.840.{n}_mask.png", n, "1", (9, 8))


def with_arrays(raw: Path) -> None:
    raw.mkdir()
    random = np.random.default_rng(0)
    splits = ("train", "val", "test")
    arrays: dict[str, Any] = {f"{split}_images": random.integers(0, 255, (9, 28, 28, 3), dtype=np.uint8) for split in splits}
    labels: dict[str, Any] = {f"{split}_labels": np.arange(9, dtype=np.uint8)[:, None] % 3 for split in splits}
    np.savez(raw / "tiny_28.npz", **arrays, **labels)


def settled(raw: Path, folder: Path) -> Card:
    """The draft as a person would finish it who accepts every guess."""
    text = draft(survey(str(raw)))
    (folder / "draft.yaml").write_text(text)
    unfinished = load_card(str(folder / "draft.yaml"))
    assert {"title", "licence", "access", "citation"} <= set(open_points(unfinished))
    with pytest.raises(RequestError, match="open points"):
        plan(unfinished, str(raw), b"secret" * 16)
    (folder / "card.yaml").write_text(text.replace("OPEN:", "settled:"))
    return load_card(str(folder / "card.yaml"))


@pytest.mark.parametrize(
    ("make", "kind", "labels", "images", "patients"),
    [
        (with_table, "multilabel", ["opacity"], 36, 18),
        (with_findings, "multilabel", ["Mass", "Nodule"], 60, 20),
        (with_class_folders, "multiclass", ["benign", "malignant", "normal"], 120, 60),
        (with_masks_beside, "segmentation", [], 40, 20),
        (with_dicom, "unlabelled", [], 80, 40),
        (with_volumes, "segmentation", [], 120, 20),
        (with_names_that_end_in_numbers, "segmentation", [], 40, 20),
        (with_arrays, "multiclass", ["class-0", "class-1", "class-2"], 27, 27),
    ],
)
def test_from_an_unknown_folder_to_shards(
    make: Callable[[Path], None], kind: str, labels: list[str], images: int, patients: int, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    make(raw)
    card = settled(raw, tmp_path)
    assert card.kind == kind
    assert card.labels == labels
    manifest = pack(card, str(raw), str(tmp_path / "shards"), secret=b"secret" * 16)
    assert manifest.quarantined == 0
    assert sum(manifest.counts.values()) == images
    assert sum(manifest.patients.values()) == patients
    samples = [Corpus(str(tmp_path / "shards"), ("train",))[i] for i in range(manifest.counts["train"])]
    assert {name for sample in samples for name in sample.labels} == set(labels)
    assert all((sample.seg is not None) == (kind == "segmentation") for sample in samples)


def test_a_table_names_files_without_their_extension() -> None:
    found = {"scans/a.nii.gz": "", "scans/1.2.840.5": "", "scans/1.2.840.6": "", "series/1.2.7/": ""}
    finder = Finder(found)
    assert [finder.find(name, "t") for name in ("a", "1.2.840.5", "1.2.7", "1.2.840")] == [*list(found)[:2], "series/1.2.7/", None]
    assert FileNames(found).stems >= {"a", "1.2.840.5", "1.2.840.6"}


def test_captures_and_ultrasound_open_a_point_for_their_rule(tmp_path: Path) -> None:
    for n in range(60):
        values: dict[str, Any] = [{}, {"sop_class": "1.2.840.10008.5.1.4.1.1.7"}, {"modality": "US"}][n % 3]
        dicom(tmp_path / "raw" / f"study{n // 2}" / f"{n}.dcm", f"patient {n // 2}", **values)
    text = draft(survey(str(tmp_path / "raw")))
    assert "40 of 60 headers" in text
    (tmp_path / "draft.yaml").write_text(text)
    unfinished = load_card(str(tmp_path / "draft.yaml"))
    assert {"burned_in.0.match.SOPClassUID", "burned_in.1.match.Modality"} == {p for p in open_points(unfinished) if "burned" in p}
    without = re.sub(r"^burned_in:.*\n", "", text.replace("OPEN:", "settled:"), flags=re.MULTILINE)
    (tmp_path / "without.yaml").write_text(without)
    with pytest.raises(WorkError, match=r"split 'val' is usable, of 2: 1 because a secondary capture .* card's burned_in .* ultra"):
        pack(load_card(str(tmp_path / "without.yaml")), str(tmp_path / "raw"), str(tmp_path / "a"), secret=b"s" * 17)
    assert len((tmp_path / "a" / "quarantine.jsonl").read_text().splitlines()) == 40
    (tmp_path / "card.yaml").write_text(re.sub(r"OPEN: ([1U])", r"\1", text).replace("OPEN:", "settled:"))
    card = load_card(str(tmp_path / "card.yaml"))
    assert pack(card, str(tmp_path / "raw"), str(tmp_path / "b"), secret=b"s" * 17).quarantined == 0


def test_doubled_rows_and_slips_of_a_pen_are_pointed_out(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with_findings(raw)
    lines = (raw / "entries.csv").read_text().splitlines()
    lines[3] = lines[3].replace("Mass", "Masss|Noduel")
    (raw / "entries.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    found = survey(str(raw))
    assert (found.tables[0].doubled, found.tables[0].agree) == (1, True)
    text = draft(found)
    assert "'Noduel' 1 row: did you mean 'Nodule'?" in text
    assert "'Masss' 1 row: did you mean 'Mass'?" in text
    assert "1 images" not in text
    (tmp_path / "draft.yaml").write_text(text)
    assert "layouts.0.repeated" in open_points(load_card(str(tmp_path / "draft.yaml")))
    (tmp_path / "card.yaml").write_text(re.sub(r"repeated: '.*'", "repeated: majority", text).replace("OPEN:", "settled:"))
    assert len(plan(load_card(str(tmp_path / "card.yaml")), str(raw), b"secret" * 16)) == 3


def test_a_folder_without_images_or_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no file"):
        survey(str(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(RequestError, match="no image among"):
        draft(survey(str(tmp_path)))
    with pytest.raises(RequestError, match="this is a file; survey takes the folder"):
        survey(str(tmp_path / "notes.txt"))
    with pytest.raises(RequestError, match="no such folder"):
        survey(str(tmp_path / "absent"))


def test_a_folder_in_a_store_is_surveyed_as_one_on_a_disk(tmp_path: Path) -> None:
    raw, url = tmp_path / "raw", "s3://allograft/raw"
    with_arrays(raw)
    for n in range(4):
        dicom(raw / "scans" / f"1.2.840.{n}", f"patient {n // 2}")
        picture(raw / "outlines" / f"1.2.840.{n}_mask.png", n, "1", (9, 8))
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 8, 3), np.int16), np.eye(4)), raw / "volume.nii.gz")
    write_table(raw / "labels.csv", [{"file": f"1.2.840.{n}", "opacity": n % 2} for n in range(4)])
    (raw / "labels.csv.gz").write_bytes(gzip.compress((raw / "labels.csv").read_bytes()))
    (raw / "test_list.txt").write_text("1.2.840.1\n1.2.840.2\n")
    (raw / ".hidden").write_text("not looked at")
    with store(tmp_path):
        storage.put_dir(raw, url)
        there = survey(url)
        with pytest.raises(RequestError, match="s3://allograft/absent: no such folder"):
            survey("s3://allograft/absent")
        with pytest.raises(RequestError, match="this is a file; survey takes the folder"):
            survey(f"{url}/labels.csv")
        here = survey(str(raw))
        assert dataclasses.replace(there, raw=here.raw) == here
        assert (len(there.tables), there.lists, there.files) == (2, {"test": "test_list.txt"}, 13)
        assert draft(there) == draft(here)
