"""A file is what its content says, whatever its name; what cannot be a sample is named with its reason, and nothing crashes the pack."""

import gzip
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_files import card, dicom, mask, nifti

from shards import decode
from shards.ingest import Stored, image, kind, unfold
from shards.manifest import read
from shards.pack import commit, pack, plan, write
from shards.planes import Unusable

GREY = np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


FILES: dict[str, bytes] = {
    "jpeg": encoded(GREY, "JPEG"),
    "png": encoded(GREY, "PNG"),
    "tiff": encoded(GREY, "TIFF", compression="tiff_lzw"),
    "gif": encoded(GREY, "GIF"),
    "bmp": encoded(GREY, "BMP"),
    "dicom": dicom(GREY),
    "nifti": nifti(np.repeat(GREY[::-1, ::-1].T[:, :, None], 2, 2)),
}


def pixels_of(data: bytes, channels: int = 1) -> np.ndarray:
    return decode.image(image(data, channels).data, channels)


@pytest.mark.parametrize("name", FILES)
def test_content_decides(name: str) -> None:
    assert kind(FILES[name]) == name
    shown = pixels_of(FILES[name])[:, :, 0]
    if name == "jpeg":
        assert np.abs(shown.astype(int) - GREY).mean() < 10
    elif name == "nifti":
        assert np.corrcoef(shown.ravel(), GREY.ravel())[0, 1] > 0.999  # a window between robust extremes
    else:
        assert (shown == GREY).all()


def test_gzip_is_looked_into() -> None:
    assert kind(gzip.compress(FILES["nifti"])) == "nifti"
    assert (pixels_of(gzip.compress(FILES["nifti"])) == pixels_of(FILES["nifti"])).all()
    for data in (gzip.compress(FILES["png"]), gzip.compress(b"text"), b"\x1f\x8b" + b"x" * 40):
        with pytest.raises(Unusable):
            kind(data)
    with pytest.raises(Unusable, match="truncated gzip"):
        image(gzip.compress(FILES["nifti"])[:-30], 1)


def test_colours_of_every_kind() -> None:
    exact = {
        "tiff": encoded(RGB, "TIFF"),
        "bmp": encoded(RGB, "BMP"),
        "palette png": encoded(Image.fromarray(RGB).quantize(200), "PNG"),
        "opaque": encoded(np.dstack([RGB, np.full((12, 16), 255, np.uint8)]), "PNG"),
        "gif": encoded(Image.fromarray(RGB).quantize(200), "GIF"),
    }
    for name, data in exact.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (pixels_of(data, 3) == expected).all(), name
        assert pixels_of(data, 1).shape == (12, 16, 1)
    flat = Image.new("CMYK", (16, 12), (0, 255, 255, 0))  # printing colours, of which some photographs are made: red
    assert np.abs(pixels_of(encoded(flat, "JPEG"), 3).astype(int) - [255, 0, 0]).max() < 8
    with pytest.raises(Unusable, match="transparent"):
        image(encoded(np.dstack([RGB, GREY]), "PNG"), 3)


def test_deep_pictures_keep_or_show_their_range() -> None:
    deep = (GREY.astype(np.uint16) + 3) * 200
    for data in (encoded(deep, "PNG"), encoded(deep, "TIFF"), encoded(deep.astype(np.float32), "TIFF")):
        shown = pixels_of(data)
        assert (shown.min(), shown.max()) == (0, 255)
        assert np.corrcoef(shown.ravel(), GREY.ravel())[0, 1] > 0.999
        ((_, stored),) = unfold([data], card(depth=16))
        assert isinstance(stored, Stored)
        assert (decode.image(stored.data, 1) == shown).all()


def test_pages_are_frames() -> None:
    pages = [Image.fromarray(GREY // (k + 1)) for k in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    found = [stored for _, stored in unfold([data], card(frames="each"))]
    assert len(found) == 3
    for k, stored in enumerate(found):
        assert isinstance(stored, Stored)
        assert (decode.image(stored.data, 1)[:, :, 0] == GREY // (k + 1)).all()
    assert (pixels_of(data)[:, :, 0] == GREY).all()


def test_masks_of_every_kind() -> None:
    of = image(FILES["png"], 1)
    square = np.zeros((12, 16), np.uint8)
    square[2:5, 6:9] = 255
    two = Image.fromarray(square).convert("P")
    two.putpalette([255, 255, 255, 0, 0, 0])  # entry 0 is white, entry 1 black
    two.putdata((square == 0).astype(int).ravel().tolist())
    for data in (
        encoded(square, "GIF"),
        encoded(square, "TIFF"),
        encoded(square, "BMP"),
        encoded(Image.fromarray(square).convert("1"), "PNG"),
        encoded(two, "GIF"),
        dicom((square // 255).astype(np.uint8)),
        nifti((square[::-1, ::-1].T > 0).astype(np.uint8)[:, :, None]),
    ):
        assert (decode.mask(mask(data, 1, of)) == square // 255).all()
    with pytest.raises(Unusable, match="JPEG, whose values are not exact"):
        mask(encoded(square, "JPEG"), 1, of)
    with pytest.raises(Unusable, match="holds the value"):
        mask(nifti(np.full((16, 12, 1), -1, np.int16)), 3, of)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6), st.integers(0, 2000))
def test_damage_never_escapes(name: str, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(FILES[name])
    for at, value in flips:
        data[at % len(data)] = value
    data = data[: len(data) - cut] if cut % 3 == 0 else data
    try:
        stored = image(bytes(data), 1)
        decode.image(stored.data, 1)
    except Unusable:
        pass


@cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    bomb = bytearray(encoded(GREY, "BMP"))
    bomb[18:26] = (60000).to_bytes(4, "little") * 2
    wide = Image.new("1", (20000, 4000))
    return {
        "empty.dcm": (b"", "an empty file"),
        "text.dcm": (b"<html>404</html>", "none of JPEG"),
        "pdf.png": (b"%PDF-1.7 ...", "none of JPEG"),
        "one_pixel.png": (encoded(np.zeros((1, 1), np.uint8), "PNG"), "1 x 1 (height x width): too small"),
        "large.png": (encoded(wide, "PNG"), "4000 x 20000 (height x width), more than 64 million pixels"),
        "bomb.bmp": (bytes(bomb), "million pixels"),
        "cut.jpg": (FILES["jpeg"][:200], "truncated|does not decode"),
        "cut.tif": (encoded(GREY, "TIFF")[:90], "does not decode"),
        "cut.gif": (FILES["gif"][:40], "does not decode"),
        "cut.nii.gz": (gzip.compress(FILES["nifti"])[:200], "gzip"),
        "cut.dcm": (FILES["dicom"][:-50], "truncated DICOM file: 142 of 192 bytes"),
        "clear.png": (encoded(np.dstack([RGB, GREY]), "PNG"), "transparent"),
    }


def test_bad_files_are_named_and_the_others_packed(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for name, (data, _) in bad_files().items():
        (raw / name).write_bytes(data)
    good = {"png_named.jpg": FILES["png"], "jpeg_named.png": FILES["jpeg"], "dicom_named.txt": FILES["dicom"], "no_name": FILES["gif"]}
    for name, data in good.items():
        (raw / name).write_bytes(data)
    manifest = pack(card(), str(raw), str(out))
    reasons = {row["file"]: row["reason"] for row in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}
    assert set(reasons) == set(bad_files())
    assert manifest.counts == {"train": len(good)}
    for name, (_, says) in bad_files().items():
        assert any(part in reasons[name] for part in says.split("|")), (name, reasons[name])


def test_a_file_that_is_not_allowed_or_gone_is_named(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a.png", "b.png"):
        (raw / name).write_bytes(FILES["png"])
    jobs = plan(card(), str(raw))
    (raw / "b.png").unlink()
    entries = [write(job, str(tmp_path / "out")) for job in jobs]
    commit(card(), entries, str(tmp_path / "out"))
    assert read(str(tmp_path / "out")).quarantined == 1
    assert "image is not there" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_colour_order_is_kept(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    for data in (encoded(red, "PNG"), encoded(red, "TIFF"), dicom(red)):
        assert (pixels_of(data, 3) == [255, 0, 0]).all()
    stored = cv2.imdecode(np.frombuffer(image(encoded(red, "PNG"), 3).data, np.uint8), cv2.IMREAD_COLOR)
    assert stored is not None
    assert stored[0, 0].tolist() == [0, 0, 255]
