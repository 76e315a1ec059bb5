"""DICOM: real odd files decode to the pixels that are published for them; from pixels to picture all is as the standard says."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataelem import DataElement
from raw_files import card, ct_slice, dicom, item

from base.paths import ROOT
from shards import ingest
from shards.dicom import frames_of, pixels, planes, read, series
from shards.pack import pack
from shards.planes import Unusable

FOLDER = ROOT.parent / "shared" / "data" / "dicom"
ROWS = list(csv.DictReader((FOLDER / "manifest.csv").open())) if FOLDER.is_dir() else []
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
here = pytest.mark.skipif(not ROWS, reason="the real files are not here")


def stored(file: str) -> np.ndarray:
    data = (FOLDER / file).read_bytes()
    ingest.kind(data)
    ds = read(data)
    frames = [pixels(ds, i) for i in range(frames_of(ds))]
    return frames[0] if len(frames) == 1 else np.stack(frames)


@here
@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row["file"]).name)
def test_real_files_decode_to_the_published_pixels(row: dict[str, str]) -> None:
    if not row["pixel_md5"]:
        with pytest.raises(Unusable):
            stored(row["file"])
        return
    array = stored(row["file"])
    assert array.shape == tuple(int(n) for n in row["shape"].strip("()").split(","))
    assert (array.min(), array.max()) == (float(row["min"]), float(row["max"]))
    assert hashlib.md5(array.astype(row["dtype"]).tobytes()).hexdigest() == row["pixel_md5"]


@here
def test_equal_images_come_out_equal() -> None:
    small = [stored(row["file"]) for row in ROWS if "MR_small" in row["file"]]
    lossless = [stored(f"files/wg_CT1_{name}") for name in ("J2KR", "JPLL", "JLSL", "RLE")]
    segments = [stored(f"files/pd_liver_{name}1frame.dcm") for name in ("", "expb_")]
    assert (len(small), len(lossless), len(segments)) == (7, 4, 2)
    for group in (small, lossless, segments):
        assert all((one == group[0]).all() and one.dtype == group[0].dtype for one in group)


@here
@pytest.mark.parametrize("depth", [8, 16])
def test_a_folder_of_odd_files_packs_and_names_what_it_leaves_out(tmp_path: Path, depth: int) -> None:
    clean = [{"match": {"Modality": word}} for word in ("OT", "NM")]
    files = card(depth=depth, channels=3, frames="each", burned_in=clean)
    manifest = pack(files, str(FOLDER / "files"), str(tmp_path))
    reasons = {row["file"]: row["reason"] for row in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())}
    packed = sum(manifest.counts.values())
    assert packed + len(reasons) == len(ROWS) + 14 + 1  # rtdose has 15 frames, the 32-bit RGB file two
    assert {name for name in reasons if "pd_" not in name and "broken_" not in name} == set()
    for row in ROWS:
        if not row["pixel_md5"]:
            assert reasons[Path(row["file"]).name]
    assert "ultrasound" in reasons["pd_examples_jpeg2k.dcm"]
    assert reasons["broken_text.dcm"] == "image is none of JPEG, PNG, TIFF, GIF, BMP, DICOM, NIfTI"


def window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, as its pseudo-code has it, to 0..255."""
    middle = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    shown = np.where(values <= centre - 0.5 - (width - 1) / 2, 0, np.where(values > centre - 0.5 + (width - 1) / 2, 255, middle))
    return np.rint(shown).astype(np.uint8)


def shown(*args: np.ndarray, **values: Any) -> np.ndarray:
    return planes(dicom(*args, **values)).shown(0)


def test_rescale_comes_before_the_window_and_the_first_window_counts() -> None:
    expected = window(RAMP * 2.0 - 1024, 40, 400)
    assert (shown(RAMP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400) == expected).all()
    several = shown(RAMP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, 300], WindowWidth=[400, 1500])
    assert (several == expected).all()


def test_window_functions() -> None:
    values = RAMP.astype(float)
    exact = shown(RAMP, WindowCenter=2048, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    assert np.abs(exact - np.clip((values - 2048) / 1000 + 0.5, 0, 1) * 255).max() <= 0.5 + 1e-9
    sigmoid = shown(RAMP, WindowCenter=2048, WindowWidth=1000, VOILUTFunction="SIGMOID")
    assert (sigmoid == np.rint(255 / (1 + np.exp(-4 * (values - 2048) / 1000)))).all()
    threshold = shown(RAMP, WindowCenter=2048, WindowWidth=1)
    assert (threshold == np.where(values > 2047.5, 255, 0)).all()


def test_lookup_tables() -> None:
    table = item(LUTDescriptor=[4, 16, 8], LUTData=bytes([0, 255, 7, 200]))
    assert (np.unique(shown(RAMP, VOILUTSequence=[table], WindowCenter=9, WindowWidth=9)) == [0, 200]).all()  # the table beats the window
    long = np.arange(1024) // 4  # 8 bits, more than 256 entries, one each 16 bits
    table = item(LUTDescriptor=[1024, 0, 8], LUTData=long.astype("<u2").tobytes())
    assert (shown(RAMP // 4, VOILUTSequence=[table]) == RAMP // 16).all()
    modality = item(LUTDescriptor=[2, 16, 16], LUTData=np.array([100, 300], "<u2").tobytes(), ModalityLUTType="US")
    out = shown(RAMP, ModalityLUTSequence=[modality], WindowCenter=200.5, WindowWidth=201)
    assert set(np.unique(out)) == {0, 255}
    assert out[0, 1] == 0
    assert out[0, 2] == 255


@pytest.mark.parametrize(
    ("photometric", "shape", "inverts", "contradicts"),
    [
        ("MONOCHROME2", "IDENTITY", False, False),
        ("MONOCHROME1", "INVERSE", True, False),
        ("MONOCHROME2", "INVERSE", False, True),
        ("MONOCHROME1", "IDENTITY", True, True),
        ("MONOCHROME1", None, True, False),
    ],
)
def test_inverted_exactly_once(photometric: str, shape: str | None, inverts: bool, contradicts: bool) -> None:
    more: dict[str, Any] = {} if shape is None else {"PresentationLUTShape": shape}
    found = planes(dicom(RAMP, PhotometricInterpretation=photometric, WindowCenter=2048, WindowWidth=4096, **more))
    expected = window(RAMP.astype(float), 2048, 4096)
    assert (found.shown(0) == (255 - expected if inverts else expected)).all()
    assert bool(found.remarks) is contradicts


def test_padding_is_black_and_counts_for_nothing() -> None:
    image = np.full((16, 16), 1000, np.int16)
    image[4:12, 4:12] = np.arange(64).reshape(8, 8) * 10
    image[0] = -2000
    unsigned = DataElement("PixelPaddingValue", "US", 63536)  # as some writers leave it there
    for padding in (-2000, unsigned):
        for photometric in ("MONOCHROME2", "MONOCHROME1"):
            out = shown(image, PixelPaddingValue=padding, PhotometricInterpretation=photometric)
            assert (out[0] == 0).all()
            assert np.ptp(out[4:12, 4:12].astype(int)) > 100  # the extremes are those of what was measured
    ranged = shown(image, PixelPaddingValue=-2000, PixelPaddingRangeLimit=500)
    assert (ranged[4:8, 4:12] == 0).all()
    with pytest.raises(Unusable, match="every pixel is padding"):
        shown(np.full((8, 8), 5, np.uint16), PixelPaddingValue=5)


def test_eight_bits_without_a_window_stay_as_they_are() -> None:
    image = np.random.default_rng(0).integers(50, 90, (20, 20), dtype=np.uint8)
    assert (shown(image) == image).all()
    robust = shown(image.astype(np.uint16) * 30)
    assert (robust.min(), robust.max()) == (0, 255)


def test_sixteen_bit_colours_and_palettes_become_eight_bit_rgb() -> None:
    rgb = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    assert (shown(rgb) == rgb >> 8).all()
    red, green, blue = (np.random.default_rng(k).integers(0, 256, 256, dtype=np.uint8) for k in range(3))
    index = np.random.default_rng(3).integers(0, 256, (8, 8), dtype=np.uint8)
    table = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in (("Red", red), ("Green", green), ("Blue", blue)):
        table |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8], f"{name}PaletteColorLookupTableData": values.tobytes()}  # type: ignore[dict-item]
    assert (shown(index, **table) == np.stack([red[index], green[index], blue[index]], 2)).all()


def test_enhanced_files_keep_windows_and_positions_by_frame() -> None:
    frames = np.stack([RAMP, RAMP])
    own = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1000 * k, RescaleType="HU")],
            FrameVOILUTSequence=[item(WindowCenter=100, WindowWidth=2000)],
            PlanePositionSequence=[item(ImagePositionPatient=[1, 2, 3 + 5 * k])],
        )
        for k in range(2)
    ]
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[2, 3], SliceThickness=5)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    found = planes(dicom(frames, ct=True, PerFrameFunctionalGroupsSequence=own, SharedFunctionalGroupsSequence=[shared]))
    for k in range(2):
        assert (found.shown(k) == window(RAMP - 1000.0 * k, 100, 2000)).all()
    assert found.affine is not None
    assert found.affine.tolist() == [[-3, 0, 0, -1], [0, -2, 0, -2], [0, 0, 5, 3], [0, 0, 0, 1]]


def test_a_series_is_sorted_by_position_and_refused_with_a_gap() -> None:
    files = [ct_slice(np.full((8, 8), k, np.uint16), 2.5 * k) for k in (3, 0, 2, 1, 4)]
    found = series(files)
    assert [int(found.measured(i).raw_HW[0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    assert found.affine is not None
    assert found.affine @ [4, 2, 3, 1] == pytest.approx([9, 19, 7.5, 1])  # LPS (-9, -19, 7.5)
    with pytest.raises(Unusable, match="missing"):
        series([files[0], files[1], files[2]] + [files[4]])
    with pytest.raises(Unusable, match="missing from the series, or stands in it twice"):
        series([*files, files[0]])
    with pytest.raises(Unusable, match="differ in SeriesInstanceUID"):
        series([files[0], ct_slice(RAMP[:8, :8].copy(), 9, SeriesInstanceUID="2.25.8")])
    with pytest.raises(Unusable, match="order is unknown"):
        series([ct_slice(RAMP, 0, ImagePositionPatient=None), ct_slice(RAMP, 1, ImagePositionPatient=None)])


def test_what_may_show_a_name_waits_for_a_rule() -> None:
    image = np.full((20, 20), 7, np.uint8)
    capture: dict[str, Any] = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT"}
    ultrasound: dict[str, Any] = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}
    for values in (capture, ultrasound, {"BurnedInAnnotation": "YES"}, ultrasound | {"BurnedInAnnotation": "NO"}):
        with pytest.raises(Unusable, match="no rule of the card"):
            planes(dicom(image, **values))
    assert planes(dicom(image, **capture, BurnedInAnnotation="NO")).count == 1
    assert planes(dicom(image, BurnedInAnnotation="NO")).count == 1
    rules = card(burned_in=[{"match": {"Modality": "US", "Rows": 20}, "blank": [[0, 0, 3, 20]]}]).burned_in
    out = planes(dicom(image, **ultrasound, BurnedInAnnotation="YES"), rules).shown(0)
    assert (out[:3] == 0).all()
    assert (out[3:] == 7).all()
    with pytest.raises(Unusable, match="no rule of the card"):
        planes(dicom(image, **ultrasound), card(burned_in=[{"match": {"Rows": 99}}]).burned_in)
    colour = np.full((20, 20, 3), 9, np.uint8)
    assert (planes(dicom(colour, **ultrasound), rules).shown(0)[:3] == 0).all()


def test_files_that_unfold_are_refused_before_they_do() -> None:
    with pytest.raises(Unusable, match="million pixels"):
        planes(dicom(RAMP, Rows=30000, Columns=30000))
    with pytest.raises(Unusable, match="truncated"):
        planes(dicom(RAMP, Rows=2000, Columns=2000))
    with pytest.raises(Unusable, match="truncated"):
        planes(dicom(RAMP, NumberOfFrames=2**31 - 1))


def test_a_deflated_file_is_measured_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom(np.zeros((600, 600), np.uint8), deflated=True)
    assert len(data) < 2000
    assert planes(data).shown(0).shape == (600, 600)
    monkeypatch.setattr("shards.dicom.MAX_UNPACKED", 100_000)
    with pytest.raises(Unusable, match="unfolds to more than"):
        planes(data)


@here
def test_the_size_inside_a_compressed_frame_is_checked() -> None:
    for name in ("wg_CT1_J2KR", "wg_CT1_JPLL", "wg_CT1_JLSL"):
        data = (FOLDER / "files" / name).read_bytes()
        rows = b"\x28\x00\x10\x00US\x02\x00"
        assert data.count(rows) == 1
        with pytest.raises(Unusable, match="whose compressed pixels measure 512 x 512"):
            planes(data.replace(rows + b"\x00\x02", rows + b"\x40\x00")).shown(0)


@here
def test_damage_never_escapes() -> None:
    random = np.random.default_rng(0)
    names = ["pd_MR_small_RLE.dcm", "pd_examples_overlay.dcm", "pd_SC_rgb_small_odd.dcm", "pd_6154", "pd_rtdose.dcm", "pd_image_dfl.dcm"]
    for name in names:
        whole = (FOLDER / "files" / name).read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            for at in random.integers(0, min(len(data), 4000), 8):
                data[at] = random.integers(0, 256)
            try:
                found = planes(bytes(data))
                found.shown(0)
            except Unusable as reason:
                assert len(str(reason)) < 200  # noqa: PT017
