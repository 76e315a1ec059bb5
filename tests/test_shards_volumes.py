"""Sixteen bits, windows, slabs and volumes: numbers come back exact, and every voxel is where it was in the patient."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
import webdataset as wds
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from raw_files import card, ct_slice, dicom, mask, nifti

from shards import decode, pixels16
from shards import nifti as nifti_reader
from shards.corpus import Corpus
from shards.ingest import Stored, unfold
from shards.pack import pack
from shards.planes import Unusable

WINDOWS = [(-600.0, 1500.0), (40.0, 400.0), (400.0, 1800.0)]
DEEP = {"depth": 16, "public": True}
SLABS = DEEP | {"frames": "slab", "slab": 3, "channels": 9, "windows": WINDOWS}
U16 = arrays(np.uint16, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9))


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """DICOM's window function to 0..255."""
    return np.rint(np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255)


def all_of(found: Any) -> list[Stored]:
    kept = [stored for _, stored in found]
    assert all(isinstance(stored, Stored) for stored in kept)
    return kept


@given(U16, st.floats(-10, 10, allow_subnormal=False), st.floats(-4000, 4000), st.booleans())
def test_every_number_comes_back(stored: np.ndarray, slope: float, intercept: float, inverted: bool) -> None:
    deep = pixels16.Deep(stored, slope, intercept, -1.5, 7.25, inverted)
    data = pixels16.encode(deep)
    again = pixels16.decode(data)
    assert (again.stored_DHW == stored).all()
    assert again[1:] == deep[1:]
    assert data == pixels16.encode(again)
    assert len(zstandard.ZstdDecompressor().decompress(data)) == 52 + stored.nbytes  # any zstd tool unpacks it


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    for candidate in (data, zstandard.ZstdCompressor().compress(data)):
        with pytest.raises(ValueError, match="16-bit image"):
            pixels16.decode(candidate)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_any_numbers_become_sixteen_bits(dtype: str) -> None:
    raw = (np.random.default_rng(0).integers(0, 120, (2, 6, 5)) + (0 if dtype[0] == "u" else -60)).astype(dtype)
    stored, slope, intercept = pixels16.quantise(raw, 2.0, -7.0)
    assert (slope * stored + intercept == 2.0 * raw - 7.0).all()
    wide = np.linspace(-1e6, 1e6, 60).reshape(1, 6, 10)
    stored, slope, intercept = pixels16.quantise(wide, 0.5, 1.0)
    assert np.abs(slope * stored + intercept - (0.5 * wide + 1)).max() <= slope / 2 * 1.0001


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(-1000, 1000), st.integers(2, 4000)), max_size=3), st.booleans())
def test_channels_are_slices_by_windows(depth: int, windows: list[tuple[int, int]], inverted: bool) -> None:
    values = np.random.default_rng(depth).integers(-1024, 3000, (depth, 5, 7)).astype(np.int16)
    stored, slope, intercept = pixels16.quantise(values)
    image = pixels16.display(pixels16.Deep(stored, slope, intercept, -1000, 2000, inverted), windows)
    count = len(windows) or 1
    assert image.shape == (5, 7, depth * count)
    for d in range(depth):
        for k in range(count):
            expected = linear(values[d], *windows[k]) if windows else np.clip((values[d] + 1000.0) / 3000, 0, 1) * 255
            shown = 255 - image[:, :, d * count + k].astype(float) if inverted else image[:, :, d * count + k]
            assert np.abs(shown - expected).max() <= 0.5 + 1e-9 if not windows else np.abs(shown - expected).max() <= 1


def test_windows_are_applied_to_hounsfield_units_at_load() -> None:
    raw = np.random.default_rng(0).integers(-2000, 2000, (16, 16)).astype(np.int16)
    files = card(**DEEP, channels=3, windows=WINDOWS)
    (stored,) = all_of(unfold([ct_slice(raw, 0, WindowCenter=1, WindowWidth=2)], files))
    assert stored.ext == "u16.zst"
    image = decode.image(stored.data, 3, WINDOWS)
    for k, window in enumerate(WINDOWS):
        assert np.abs(image[:, :, k] - linear(raw - 1024.0, *window)).max() <= 1
    with pytest.raises(ValueError, match="slices and windows, expected 2"):
        decode.image(stored.data, 2, WINDOWS)


def test_sixteen_bits_without_windows_are_shown_as_their_file_says() -> None:
    raw = (np.arange(256, dtype=np.uint16) * 16).reshape(16, 16)
    data = dicom(raw, WindowCenter=2048, WindowWidth=1000, PhotometricInterpretation="MONOCHROME1")
    (deep,), (flat,) = (all_of(unfold([data], card(depth=depth))) for depth in (16, 8))
    assert (deep.ext, flat.ext) == ("u16.zst", "png")
    assert (decode.image(deep.data, 1) == decode.image(flat.data, 1)).all()
    png16 = cv2.imencode(".png", raw)[1].tobytes()
    (stored,) = all_of(unfold([png16], card(depth=16)))
    assert (pixels16.decode(stored.data).stored_DHW[0] == raw).all()
    (colour,) = all_of(unfold([cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()], card(depth=16, channels=3)))
    assert colour.ext == "png"


def test_a_folder_of_slices_becomes_slabs(tmp_path: Path) -> None:
    for scan in range(4):
        folder = tmp_path / "raw" / f"scan{scan}"
        folder.mkdir(parents=True)
        for z in range(7):
            values = np.full((8, 10), 1000 * scan + z, np.int16)
            (folder / f"{(z * 5) % 7}.dcm").write_bytes(ct_slice(values, 3.0 * z, SeriesInstanceUID=f"2.25.{scan + 1}"))
    (tmp_path / "raw" / "scan3" / "0.dcm").unlink()  # the first slice: nothing is missing inside
    (tmp_path / "raw" / "scan2" / "1.dcm").unlink()  # the third
    layout = {"name": "series", "requires": ["*/*.dcm"], "images": ["*/"]}
    manifest = pack(card(**SLABS, layouts=[layout]), str(tmp_path / "raw"), str(tmp_path / "out"))
    assert manifest.counts == {"train": 3 + 3 + 2}
    assert manifest.quarantined == 1
    assert "slice is missing" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    corpus = Corpus(str(tmp_path / "out"))
    assert corpus[0].image.shape == (8, 10, 9)
    assert len(set(corpus.keys())) == len(corpus)
    seen = set()
    for sample in wds.WebDataset(str(tmp_path / "out" / "odd-train-00000.tar"), shardshuffle=False):
        facts, deep = json.loads(sample["json"])["image"], pixels16.decode(sample["u16.zst"])
        first, stop = facts["slices"]
        stored = deep.slope * deep.stored_DHW[:, 0, 0] + deep.intercept + 1024
        scan, depth = int(stored[0]) // 1000, facts["of_slices"]
        assert (stop - first, depth) == (3, 6 if scan == 3 else 7)
        assert stored.tolist() == [1000 * scan + first + k + (scan == 3) for k in range(3)]
        assert facts["spacing_mm"] == [3.0, 0.5, 0.25]
        assert (np.array(facts["affine"]) @ [4, 2, 1, 1]).tolist() == [9.0, 19.0, 3.0 * (first + 1 + (scan == 3)), 1.0]
        seen |= {(scan, first + k) for k in range(3)}
    assert len(seen) == 7 + 7 + 6  # no slice is left out


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_slabs_cover_every_slice(count: int, slab: int) -> None:
    volume = nifti(np.arange(count, dtype=np.int16)[None, None] + np.zeros((5, 4, 1), np.int16))
    files = card(depth=16, frames="slab", slab=slab, channels=slab)
    if count < slab:
        with pytest.raises(Unusable, match=f"{count} slices, the card's slabs have {slab}"):
            all_of(unfold([volume], files))
        return
    slabs = [pixels16.decode(stored.data) for stored in all_of(unfold([volume], files))]
    seen = [(deep.slope * deep.stored_DHW[:, 0, 0] + deep.intercept).tolist() for deep in slabs]
    assert all(each == list(range(int(each[0]), int(each[0]) + slab)) for each in seen)
    assert {z for each in seen for z in each} == set(range(count))
    assert len(seen) == -(-count // slab)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR", "ASL"])
def test_volumes_lie_on_their_back_however_they_are_stored(axes: str) -> None:
    """The patient's right is on the left, the front on top, slices run upward; the affine finds each voxel's place again."""
    ras_XYZ = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
    affine = np.array([[2.0, 0, 0, -7], [0, 3.0, 0, 5], [0, 0, 4.0, 11], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(ras_XYZ, affine)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(axes)))
    found = nifti_reader.planes(image.as_reoriented(turn).to_bytes())
    assert found.count == 4
    assert found.affine is not None
    for x, y, z in [(0, 0, 0), (5, 4, 3), (2, 1, 3)]:
        column, row = 5 - x, 4 - y
        plane = found.measured(z)
        assert plane is not None
        assert plane.raw_HW[row, column] == ras_XYZ[x, y, z]
        assert found.affine @ [column, row, z, 1] == pytest.approx(affine @ [x, y, z, 1])


def test_wrong_volumes_are_refused() -> None:
    colour = np.zeros((4, 4, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    whole = nifti(np.zeros((6, 6, 6), np.int16))
    for data, says in [
        (nifti(np.zeros((4, 4, 3, 2), np.int16)), "4 dimensions"),
        (nibabel.Nifti1Image(colour, np.eye(4)).to_bytes(), "colours"),
        (whole[: len(whole) // 2], "does not decode"),
        (whole[:100] + b"\xff" * 40 + whole[140:], "does not decode|dimensions|measures|colours"),
    ]:
        with pytest.raises(Unusable, match=says):
            nifti_reader.planes(data).shown(0)
    holes = np.random.default_rng(0).normal(size=(8, 8, 2)).astype(np.float32)
    holes[0, 0, 0] = np.nan
    assert nifti_reader.planes(nifti(holes)).shown(0)[7, 7] == 0


def test_reduction_keeps_voxels_where_they_are() -> None:
    raw = np.zeros((40, 80), np.int16)
    raw[10:14, 40:48] = 100
    files = card(depth=16, max_side=None)
    (whole,) = all_of(unfold([ct_slice(raw, 5)], files))
    (small,) = all_of(unfold([ct_slice(raw, 5)], files.model_copy(update={"max_side": 20})))
    assert (small.height, small.width, small.reduced_from) == (10, 20, (40, 80))
    deep = pixels16.decode(small.data)
    assert (deep.slope * deep.stored_DHW[0, 2:5, 9:13] + deep.intercept + 1024).tolist() == [[0, 50, 50, 0], [0, 50, 50, 0], [0, 0, 0, 0]]
    centre = np.array(whole.facts["affine"]) @ [43.5, 11.5, 0, 1]
    assert np.array(small.facts["affine"]) @ [(43.5 + 0.5) / 4 - 0.5, (11.5 + 0.5) / 4 - 0.5, 0, 1] == pytest.approx(centre)
    assert small.facts["spacing_mm"][1:] == [2.0, 1.0]


def test_masks_follow_their_frame() -> None:
    volume = np.zeros((6, 5, 4), np.int16)
    marks = np.zeros((6, 5, 4), np.uint8)
    for z in range(4):
        marks[z, 0, z] = 1
    each = all_of(unfold([nifti(volume)], card(frames="each")))
    assert [stored.frame for stored in each] == [0, 1, 2, 3]
    for z, stored in enumerate(each):
        seg = decode.mask(mask(nifti(marks), 1, stored))
        assert np.argwhere(seg).tolist() == [[4, 5 - z]]
    (slab,) = all_of(unfold([nifti(volume)], card(depth=16, frames="slab", slab=4, channels=4)))
    assert np.argwhere(decode.mask(mask(nifti(marks), 1, slab))).tolist() == [[4, 3]]  # of the slice in the middle


def test_stock_tools_read_a_shard_of_sixteen_bits(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for k in range(3):
        (tmp_path / "raw" / f"{k}").write_bytes(ct_slice(np.full((8, 8), k, np.int16), k))
    pack(card(depth=16), str(tmp_path / "raw"), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "odd-train-00000.tar") as archive:
        names = archive.getnames()
        stream = archive.extractfile(names[1])
        assert stream is not None
        plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(stream.read())).read()
    assert [name.partition(".")[2] for name in names] == ["json", "u16.zst"] * 3
    assert plain[:4] == b"u16\x01"
