"""What a file is, by its first bytes and its header; no pixel is decoded and no name is believed.

found = header(Path("RAW/a.dcm"))      # Header(format="dicom", size="512 x 512", pixels="MONOCHROME2, 12 bits", tags={"Modality": "CT"})
"""

import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

IMAGES = ("jpeg", "png", "tiff", "gif", "bmp", "dicom", "nifti")
DICOM_TAGS = ("Modality", "ViewPosition", "BodyPartExamined", "Manufacturer", "BurnedInAnnotation", "ImageType")
# Read for counting only, shown nowhere: how many patients there are decides whether splits can be by patient.
IDENTITIES = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
_PIXELS = ("Rows", "Columns", "NumberOfFrames", "PhotometricInterpretation", "BitsStored", "TransferSyntaxUID", "SOPClassUID")
_MODES = {"1": "1 bit", "L": "grey, 8 bits", "P": "palette", "RGBA": "RGB with alpha", "LA": "grey with alpha"}
_MAGIC = (
    (128, b"DICM", "dicom"),  # first: the 128 free bytes before it may begin like a TIFF
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"GIF8", "gif"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"BM", "bmp"),
    (344, b"n+1\x00", "nifti"),
    (257, b"ustar", "tar"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"%PDF", "pdf"),
)


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


def header(path: Path, file: str) -> Header:
    """The header of a file; `file` is its name in the answer. Whatever is wrong with it is said in `problem`, nothing is raised."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
    except OSError as error:
        return Header(file, "unreadable", problem=error.strerror or str(error))
    if not start:
        return Header(file, "empty", problem="an empty file")
    kind = next((name for offset, magic, name in _MAGIC if start[offset : offset + len(magic)] == magic), None)
    if kind in ("jpeg", "png", "gif", "tiff", "bmp"):
        return _picture(path, file, kind)
    if kind == "tar":
        return _tar(path, file)
    if start.startswith(b"PK\x03\x04"):
        return _zip(path, file)
    if kind == "nifti" or start.startswith(b"\x1f\x8b"):
        return _nifti(path, file) if kind or path.name.endswith(".nii.gz") else Header(file, "gzip")
    if kind == "dicom" or _could_be_dicom(start):
        return _dicom(path, file, marked=kind == "dicom")
    if kind:
        return Header(file, kind)
    return Header(file, "text" if b"\x00" not in start else "unknown")


def _could_be_dicom(start: bytes) -> bool:
    # Files without preamble begin with a group 0002 or 0008 element, in either byte order.
    return start[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")


def _picture(path: Path, file: str, kind: str) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; nothing is decoded here
            with Image.open(path) as picture:
                frames = getattr(picture, "n_frames", 1)
                size = f"{picture.height} x {picture.width}" + (f" x {frames} frames" if frames > 1 else "")
                mode = _MODES.get(picture.mode, "grey, 16 bits" if picture.mode.startswith("I") else picture.mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        return Header(file, kind, problem=f"damaged: {error}".replace(str(path), file))
    return Header(file, kind, size, mode)


def _dicom(path: Path, file: str, marked: bool) -> Header:
    from pydicom import config, dcmread
    from pydicom.errors import InvalidDicomError

    config.settings.reading_validation_mode = config.IGNORE  # a survey counts odd values, it does not warn of each
    names = [*DICOM_TAGS, *IDENTITIES, *_PIXELS]
    try:
        read = dcmread(path, stop_before_pixels=True, force=not marked, specific_tags=names)
        meta = getattr(read, "file_meta", None)
        found = {name: str(value) for name in names if (value := read.get(name)) not in (None, "")}
    except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError, EOFError, NotImplementedError) as error:
        return Header(file, "dicom" if marked else "unknown", problem=f"damaged: {error}".replace(str(path), file))
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
    return Header(file, "dicom", size, pixels, tags, identities)


def _sop_name(uid: str | None) -> str:
    from pydicom.uid import UID

    return UID(uid).name if uid else "not said"


def _nifti(path: Path, file: str) -> Header:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        volume = nibabel.load(path)
        return Header(file, "nifti", " x ".join(map(str, volume.shape)), str(volume.get_data_dtype()))
    except (ImageFileError, OSError, ValueError, EOFError) as error:
        return Header(file, "nifti", problem=f"damaged: {error}".replace(str(path), file))


def _zip(path: Path, file: str) -> Header:
    """An .npz is a zip of .npy files; their names and shapes stand in front of each."""
    import numpy as np

    shapes = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not names or not all(name.endswith(".npy") for name in names):
                return Header(file, "zip", f"{len(names)} members")
            for name in names:
                with archive.open(name) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                    shapes.append((name.removesuffix(".npy"), shape, str(dtype)))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        return Header(file, "zip", problem=f"damaged: {error}".replace(str(path), file))
    text = ", ".join(f"{name} {' x '.join(map(str, shape))} {dtype}" for name, shape, dtype in shapes)
    return Header(file, "npz", text, tags={name: " x ".join(map(str, shape)) for name, shape, _ in shapes})


def _tar(path: Path, file: str) -> Header:
    """The first members' extensions: a tar of samples (WebDataset) repeats them."""
    extensions: dict[str, None] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for number, member in enumerate(archive):
                extensions[member.name.rpartition("/")[2].partition(".")[2]] = None
                if number == 20:
                    break
    except (tarfile.TarError, OSError) as error:
        return Header(file, "tar", problem=f"damaged: {error}".replace(str(path), file))
    return Header(file, "tar", pixels=", ".join(extensions))
