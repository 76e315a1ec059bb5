"""Nothing that names a patient reaches the shards: fake identifiers are planted wherever a file can hold text, all bytes searched."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zstandard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.tag import Tag
from raw_files import card, dicom, item

from base.errors import RequestError
from shards.deidentify import clean_metadata, keyed
from shards.pack import pack
from shards.raster import strip_jpeg

NAME = "ZZDOEZZ"  # the patient
SECRET = b"a secret of the test"
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")  # a name in a number's place is what is planted
TEXT = ["AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"]
BYTES = ["OB", "OD", "OF", "OL", "OV", "OW", "UN"]
NUMBERS = {"FL": 31.5, "FD": 31.5, "SL": -1, "SS": -1, "SV": -1, "UL": 1, "US": 1, "UV": 1, "AT": 0x00100010}
DATED = {"DA": "19310203", "DT": "19310203040506", "TM": "040506.193102", "DS": "19310203", "IS": "19310203"}
UID = "1.2.826.0.1.3680043.19310203"  # of the patient's study
FORBIDDEN = [NAME, NAME.lower(), "19310203", "Zzdoezz"]
# What the picture itself is made by; group 0028 besides.
DECODING = ["SpecificCharacterSet", "SOPClassUID", "PresentationLUTShape", "NumberOfFrames", "ImagerPixelSpacing", "SliceThickness"]
DECODING += ["NominalScannedPixelSpacing", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient"]


def everywhere(ds: Dataset, group: int) -> None:
    """Plant identifiers in every value representation, in elements of that (private) group."""
    block = ds.private_block(group, f"{NAME} BLOCK", create=True)
    planted: dict[str, Any] = dict.fromkeys(TEXT, NAME) | dict.fromkeys(BYTES, f"{NAME} ".encode() * 4) | NUMBERS | DATED | {"UI": UID}
    for number, (vr, value) in enumerate(planted.items()):
        block.add_new(number, vr, value)
    block.add_new(0xF0, "SQ", [item(PatientName=NAME, PatientID=NAME, OtherPatientIDs=NAME)])


def planted(**values: Any) -> bytes:
    """A DICOM file that holds the patient's name in all standard text elements, in sequences in sequences and in private blocks."""
    from pydicom.datadict import DicomDictionary

    elements: dict[str, Any] = {}
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if not 0x0008 <= tag >> 16 <= 0x4FFE or tag >> 16 == 0x0028 or keyword in DECODING or not keyword:
            continue
        if vr in TEXT:
            elements[keyword] = DataElement(tag, vr, f"{NAME}")
        elif vr in DATED or vr == "UI":
            elements[keyword] = DataElement(tag, vr, DATED.get(vr, UID))
    nest = item(PatientName=NAME, ReferencedSeriesSequence=[item(PatientName=NAME, SeriesDescription=NAME)])
    everywhere(nest, 0x0013)
    elements["RequestAttributesSequence"] = [nest]
    elements["OverlayComments"] = DataElement(Tag(0x6000, 0x4000), "LT", NAME)
    elements["OverlayData"] = DataElement(Tag(0x6000, 0x3000), "OW", (NAME + " ").encode() * 20)
    elements["DataSetTrailingPadding"] = (NAME + " ").encode()
    return dicom(PIXELS, **(elements | {"preamble": (NAME * 20).encode()[:128]} | values)) + NAME.encode()


def every_byte(folder: Path) -> list[tuple[str, bytes]]:
    """All that was written: each file, each member of each tar, and what is compressed in it, unpacked."""
    found = []
    for path in folder.iterdir():
        found.append((path.name, path.name.encode() + path.read_bytes()))
        if path.suffix != ".tar":
            continue
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                data = stream.read()
                found.append((member.name, member.name.encode() + data))
                if member.name.endswith(".png"):
                    chunks, at = [], 8
                    while at < len(data):
                        size = int.from_bytes(data[at : at + 4], "big")
                        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
                        at += 12 + size
                    assert {name for name, _ in chunks} == {b"IHDR", b"IDAT", b"IEND"}
                    found.append((member.name, zlib.decompress(b"".join(part for name, part in chunks if name == b"IDAT"))))
                elif member.name.endswith(".zst"):
                    found.append((member.name, zstandard.ZstdDecompressor().decompress(data)))
    return found


def assert_clean(folder: Path, extra: tuple[str, ...] = ()) -> None:
    for name, data in every_byte(folder):
        for word in (*FORBIDDEN, *extra):
            for form in (word.encode(), word.encode("utf-16-le"), word.encode("utf-16-be"), word[::-1].encode()):
                assert form not in data, f"{word} in {name}"


def open_card(**changes: Any) -> Any:
    wanted = ["modality", "view", "sex", "age", "body_part", "laterality"]
    return card(public=False, metadata=wanted, **changes)


@pytest.mark.parametrize("depth", [8, 16])
def test_no_identifier_of_a_dicom_file_reaches_the_shards(tmp_path: Path, depth: int) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    everything = planted()
    assert everything.count(NAME.encode()) > 900
    ds: dict[str, Any] = {}
    private = Dataset()
    everywhere(private, 0x0029)
    for element in private:
        ds[f"private{element.tag}"] = element
    (raw / f"{NAME}.dcm").write_bytes(everything)
    (raw / "private.dcm").write_bytes(planted(**ds))
    (raw / "compressed.dcm").write_bytes(dicom(PIXELS, deflated=True, PatientName=NAME, PatientBirthDate="19310203"))
    (raw / "no_pixels.dcm").write_bytes(planted(PixelData=None))
    (raw / "bad_number.dcm").write_bytes(planted(NumberOfFrames=DataElement("NumberOfFrames", "LO", NAME)))
    (raw / "text.dcm").write_bytes(f"patient: {NAME}".encode())
    manifest = pack(open_card(depth=depth), str(raw), str(out), secret=SECRET)
    assert (sum(manifest.counts.values()), manifest.quarantined) == (3, 3)
    assert_clean(out, ("no_pixels", "bad_number", SECRET.decode(), UID))


def test_only_known_words_of_a_header_are_kept(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    kept: dict[str, Any] = {"Modality": "CR", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "093Y", "BodyPartExamined": "CHEST"}
    (raw / "a.dcm").write_bytes(dicom(PIXELS, **kept, PatientName=NAME))
    pack(open_card(), str(raw), str(tmp_path / "out"), secret=SECRET)
    text = next(data for name, data in every_byte(tmp_path / "out") if name.endswith(".json") and name.startswith("odd-"))
    assert b'"meta":{"age":90,"body_part":"CHEST","modality":"CR","sex":"F","view":"PA"}' in text


def test_no_identifier_of_a_picture_or_volume_reaches_the_shards(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = exif[0x9C9B] = NAME
    text = PngInfo()
    text.add_text("Patient", NAME)
    text.add_text("Packed", NAME * 50, zip=True)
    text.add_itxt("Name", NAME, lang="en", tkey=NAME)
    text.add(b"prVt", NAME.encode())
    picture = Image.fromarray(PIXELS)
    picture.save(raw / "a.png", pnginfo=text, exif=exif)
    picture.save(raw / "b.jpg", exif=exif, comment=NAME.encode(), quality=95, icc_profile=NAME.encode() * 40)
    picture.save(raw / "c.tif", tiffinfo={270: NAME, 315: NAME, 65000: NAME})
    picture.save(raw / "d.gif", comment=NAME.encode())
    Image.fromarray(PIXELS.astype(np.uint16) * 200).save(raw / "e.png", pnginfo=text)
    for name in ("a.png", "b.jpg", "c.tif", "d.gif", "e.png"):  # and after the end of the file
        with (raw / name).open("ab") as stream:
            stream.write(NAME.encode())
    jpeg = (raw / "b.jpg").read_bytes()
    extended = jpeg[:2] + b"\xff\xf0\x00\x09" + NAME.encode() + jpeg[2:]  # a segment of an extension
    assert NAME.encode() not in strip_jpeg(extended)
    volume = nibabel.Nifti1Image(np.arange(20 * 24 * 3, dtype=np.int16).reshape(20, 24, 3), np.eye(4))
    volume.header["descrip"] = volume.header["aux_file"] = volume.header["intent_name"] = NAME
    volume.header["db_name"] = NAME
    volume.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode() * 9))
    (raw / "g.nii.gz").write_bytes(gzip.compress(volume.to_bytes(), mtime=0))
    for path in raw.iterdir():
        plain = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert NAME.encode() in plain
    for depth in (8, 16):
        out = tmp_path / str(depth)
        manifest = pack(open_card(depth=depth), str(raw), str(out), secret=SECRET)
        assert (out / "quarantine.jsonl").read_text() == ""
        assert sum(manifest.counts.values()) == 6
        assert_clean(out)


def test_tables_give_what_the_card_lists_and_no_dates(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.fromarray(PIXELS).save(raw / "a.png")
    (raw / "t.csv").write_text(f"file,id,name,born,age,site,seen\na.png,{NAME}7,{NAME},1931-02-03,95,ward 3,1931-02-03T10:00:00\n")
    layout = {
        "name": "table",
        "requires": ["t.csv"],
        "images": ["*.png"],
        "table": "t.csv",
        "image_column": "file",
        "patient_column": "id",
        "metadata": {"age": "age", "site": "site", "seen": "seen"},
    }
    tabled = card(public=False, reader="csv", layouts=[layout], metadata=["age", "site", "seen"])
    pack(tabled, str(raw), str(tmp_path / "out"), secret=SECRET)
    assert_clean(tmp_path / "out", ("1931-02-03",))
    text = next(data for name, data in every_byte(tmp_path / "out") if name.endswith(".json") and name.startswith("odd-"))
    assert b'"age":90,"seen":null,"site":"ward 3"' in text


@pytest.mark.parametrize("date", ["1931-02-03", "03.02.1931", "1931/2/3", "19310203", "2018-01-01 10:00", "19310203040506.0"])
def test_dates_are_nothing(date: str) -> None:
    assert clean_metadata("anything", date) is None


@pytest.mark.parametrize("text", ["PA", "512", "0.143", "12345678", "frontal 2020"])
def test_what_is_no_date_stays(text: str) -> None:
    assert clean_metadata("anything", text) == text


def test_bits_beside_the_stored_ones_are_dropped() -> None:
    """Old files draw overlays, names too, into the bits of a pixel that are not used."""
    from shards.dicom import planes

    clean = np.random.default_rng(1).integers(0, 4096, (16, 16), dtype=np.uint16)
    drawn = clean | (np.random.default_rng(2).integers(0, 16, (16, 16), dtype=np.uint16) << 12)
    found = planes(dicom(drawn, BitsStored=12, HighBit=11)).measured(0)
    assert found is not None
    assert (found.raw_HW == clean).all()


def test_the_planted_file_covers_every_value_representation() -> None:
    whole = planted()
    assert io.BytesIO(whole).read(132)[128:] == b"DICM"
    for vr in TEXT + BYTES + list(NUMBERS) + list(DATED) + ["SQ", "UI"]:
        assert f"{vr}".encode() in whole, vr


def test_a_file_whose_name_is_not_utf8_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"scan-\\udcff\.png'?: a name that is not UTF-8 \(rename the file\)"):
        keyed(b"s" * 32, "key\x1fward\x1fscan-\udcff.png", 16)
