"""What a file is, by its first bytes and its header; no pixel is decoded and no name is believed.

found = header("RAW", "a.dcm")      # Header(format="dicom", size="512 x 512", pixels="MONOCHROME2, 12 bits", tags={...})
"""

import gzip
import io
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from base import storage
from shards.content import DAMAGED_GZIP, HEAD, format_of
from shards.deidentify import suspect
from shards.raster import KINDS
from shards.rawfiles import opened

DICOM_TAGS = ("Modality", "ViewPosition", "BodyPartExamined", "Manufacturer", "BurnedInAnnotation", "ImageType")
# Read for counting only, shown nowhere: how many patients there are decides whether splits can be by patient.
IDENTITIES = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
BLOCK = 1 << 16  # bytes of a header that a store is asked for at once
_PIXELS = ("Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "BitsStored", "TransferSyntaxUID", "SOPClassUID")
_MODES = {"1": "1 bit", "L": "grey, 8 bits", "P": "palette", "RGBA": "RGB with alpha", "LA": "grey with alpha"}


@dataclass(frozen=True)
class Header:
    """One file: `size` is height x width (x depth or frames), `tags` of DICOM; `problem` says why it cannot be read."""

    file: str
    format: str
    size: str = ""
    pixels: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict, repr=False)
    problem: str = ""
    suspect: tuple[str, str, str] | None = None  # of DICOM: why text may be burned in, and the tag and value that tell it


def header(raw: str, file: str) -> Header:
    """The header of a file of a raw folder. Whatever is wrong with it is said in `problem`, nothing is raised."""
    try:
        with opened(storage.join(raw, file), BLOCK) as stream:
            return _header(stream, file)
    except OSError as error:
        return Header(file, "unreadable", problem=error.strerror or str(error))


def _header(stream: BinaryIO, file: str) -> Header:
    start = stream.read(HEAD)
    stream.seek(0)
    if not start:
        return Header(file, "empty", problem="an empty file")
    kind = format_of(start)
    if kind in KINDS:
        return _picture(stream, file, kind)
    if kind == "dicom":
        return _dicom(stream, file, marked=start[128:132] == b"DICM")
    if kind == DAMAGED_GZIP:
        return Header(file, "gzip", problem="damaged: not a gzip file")
    readers = {"nifti": _nifti, "tar": _tar, "zip": _zip}
    if kind:
        return readers[kind](stream, file) if kind in readers else Header(file, kind)
    return Header(file, "text" if b"\x00" not in start else "unknown")


def _damage(error: Exception, stream: BinaryIO) -> str:
    """What is wrong, without the file's name, which differs for each."""
    return f"damaged: {error}".replace(f" {stream!r}", "")


def _picture(stream: BinaryIO, file: str, kind: str) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; nothing is decoded here
            with Image.open(stream) as picture:
                frames = getattr(picture, "n_frames", 1)
                size = f"{picture.height} x {picture.width}" + (f" x {frames} frames" if frames > 1 else "")
                mode = _MODES.get(picture.mode, "grey, 16 bits" if picture.mode.startswith("I") else picture.mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        return Header(file, kind, problem=_damage(error, stream))
    return Header(file, kind, size, mode)


def _dicom(stream: BinaryIO, file: str, marked: bool) -> Header:
    from pydicom import config, dcmread
    from pydicom.errors import InvalidDicomError

    config.settings.reading_validation_mode = config.IGNORE  # a survey counts odd values, it does not warn of each
    names = [*DICOM_TAGS, *IDENTITIES, *_PIXELS]
    try:
        read = dcmread(stream, stop_before_pixels=True, force=not marked, specific_tags=names)
        meta = getattr(read, "file_meta", None)
        found = {name: str(value) for name in names if (value := read.get(name)) not in (None, "")}
    except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError, EOFError, NotImplementedError) as error:
        return Header(file, "dicom" if marked else "unknown", problem=_damage(error, stream))
    if not marked and not found.keys() & {"SOPClassUID", "Rows"}:
        return Header(file, "unknown")
    syntax = getattr(meta, "TransferSyntaxUID", None)
    tags = {name: found[name] for name in DICOM_TAGS if name in found} | {"TransferSyntax": syntax.name if syntax else "not said"}
    tags["Type"] = _sop_name(found.get("SOPClassUID"))
    identities = {name: found[name] for name in IDENTITIES if name in found}
    if "Rows" not in found or "Columns" not in found:
        return Header(file, "dicom", tags=tags, identities=identities, problem="DICOM without an image")
    frames = found.get("NumberOfFrames", "1")
    size = f"{found['Rows']} x {found['Columns']}" + (f" x {frames} frames" if frames not in ("1", "0") else "")
    pixels = f"{found.get('PhotometricInterpretation', 'no photometric interpretation')}, {found.get('BitsStored', '?')} bits"
    return Header(file, "dicom", size, pixels, tags, identities, suspect=suspect(read))


def _sop_name(uid: str | None) -> str:
    from pydicom.uid import UID

    return UID(uid).name if uid else "not said"


def _nifti(stream: BinaryIO, file: str) -> Header:
    from nibabel import Nifti1Header, Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    try:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        start = (gzip.GzipFile(fileobj=stream) if packed else stream).read(HEAD)
        found = (Nifti2Header if start[4:8] == b"n+2\x00" else Nifti1Header).from_fileobj(io.BytesIO(start))
        return Header(file, "nifti", " x ".join(map(str, found.get_data_shape())), str(found.get_data_dtype()))
    except (HeaderDataError, OSError, ValueError, EOFError, zlib.error) as error:
        return Header(file, "nifti", problem=_damage(error, stream))


def _zip(stream: BinaryIO, file: str) -> Header:
    """An .npz is a zip of .npy files; their names and shapes stand in front of each."""
    import numpy as np

    shapes = []
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            if not names or not all(name.endswith(".npy") for name in names):
                return Header(file, "zip", f"{len(names)} members")
            for name in names:
                with archive.open(name) as array:
                    version = np.lib.format.read_magic(array)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(array)
                    shapes.append((name.removesuffix(".npy"), shape, str(dtype)))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        return Header(file, "zip", problem=_damage(error, stream))
    text = ", ".join(f"{name} {' x '.join(map(str, shape))} {dtype}" for name, shape, dtype in shapes)
    return Header(file, "npz", text, tags={name: " x ".join(map(str, shape)) for name, shape, _ in shapes})


def _tar(stream: BinaryIO, file: str) -> Header:
    """The first members' extensions: a tar of samples (WebDataset) repeats them."""
    extensions: dict[str, None] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, member in enumerate(archive):
                extensions[member.name.rpartition("/")[2].partition(".")[2]] = None
                if number == 20:
                    break
    except (tarfile.TarError, OSError) as error:
        return Header(file, "tar", problem=_damage(error, stream))
    return Header(file, "tar", pixels=", ".join(extensions))
