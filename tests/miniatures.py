"""Miniatures of the official layouts of public datasets: the same files, folders, tables and columns, with a few tiny images.

    truths = BUILDERS["chexpert", "official"](folder)      # {file: Truth(labels, patient, split)}, the layouts are in miniature_*.py

Written from the descriptions of the releases, not from the cards, so that a card is checked against something else than itself.
"""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 24  # pixels
PEOPLE = 24


@dataclass(frozen=True)
class Truth:
    """What a sample must come out as. `split` None: drawn by the card's rule; `mask`: index values, or None without masks."""

    labels: Mapping[str, int | None]
    patient: str
    split: str | None = None
    mask: np.ndarray | None = field(default=None, compare=False)


Truths = dict[str, Truth]


def pixels(i: int, channels: int = 1, side: int = SIDE) -> np.ndarray:
    """Noise that differs for each i: u8 HW or HWC."""
    shape = (side, side) if channels == 1 else (side, side, channels)
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def blob(i: int, side: int = SIDE) -> np.ndarray:
    """A mask of one rectangle, asymmetric and another for each i: u8 HW of 0 and 1."""
    mask = np.zeros((side, side), np.uint8)
    mask[2 + i % 5 : 9 + i % 7, 3 : 14 + i % 3] = 1
    return mask


def image(folder: Path, name: str, i: int, channels: int = 1, values: np.ndarray | None = None) -> None:
    """Write an image in the format that its name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pixels(i, channels) if values is None else values
    if path.suffix in (".dcm", ".dicom"):
        path.write_bytes(dicom(i, values))
    elif path.suffix.lower() in (".jpg", ".jpeg"):
        Image.fromarray(values).save(path, "JPEG", quality=95)
    elif path.suffix.lower() in (".tif", ".gif", ".png"):
        Image.fromarray(values).save(path)
    else:
        path.write_bytes(values.tobytes())


def dicom(i: int, values: np.ndarray) -> bytes:
    """A grey secondary-free DICOM file of those values (u8 or u16 HW), uncompressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    deep = values.dtype == np.uint16
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage if deep else DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{i + 1}"
    scan = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    scan.StudyInstanceUID, scan.SeriesInstanceUID = f"1.2.4.{i + 1}", f"1.2.5.{i + 1}"
    scan.PatientName, scan.PatientID = f"Nobody^{i}", f"nobody{i}"
    scan.Modality, scan.BurnedInAnnotation = "CT" if deep else "DX", "NO"
    scan.Rows, scan.Columns = values.shape
    scan.SamplesPerPixel, scan.PhotometricInterpretation, scan.PixelRepresentation = 1, "MONOCHROME2", 0
    scan.BitsAllocated = 16 if deep else 8
    scan.BitsStored, scan.HighBit = scan.BitsAllocated, scan.BitsAllocated - 1
    if deep:
        scan.RescaleSlope, scan.RescaleIntercept = 1, -1024
    scan.PixelData = values.tobytes()
    buffer = io.BytesIO()
    scan.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], sep: str = ",") -> None:
    """Write a table, compressed if its name ends in .gz; the columns are those of the first row."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=sep, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = buffer.getvalue().encode()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)


def relative_runs(mask: np.ndarray) -> str:
    """A mask as SIIM-ACR writes it: down the columns, pairs of (pixels skipped since the last run, length)."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat.astype(int)))
    starts, ends = edges[::2], edges[1::2]
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {length}" for gap, length in zip(gaps, ends - starts, strict=True))


Builder = Callable[[Path], Truths]
BUILDERS: dict[tuple[str, str], Builder] = {}


def layout(dataset: str, *names: str) -> Callable[[Callable[[Path, str], Truths]], Callable[[Path, str], Truths]]:
    """Registers a function of (folder, layout's name) for those layouts of a dataset."""

    def register(function: Callable[[Path, str], Truths]) -> Callable[[Path, str], Truths]:
        for name in names:
            BUILDERS[dataset, name] = lambda folder, name=name: function(folder, name)  # type: ignore[misc]
        return function

    return register


def archive(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> None:
    """A WebDataset tar as others write them: owners and times as they come."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime, member.uname = len(data), 1_700_000_000, "someone"
                tar.addfile(member, io.BytesIO(data))


def jpeg(i: int) -> bytes:
    """A small colour JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(i, 3)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


WNIDS = ["n01440764", "n01443537", "n01484850", "n15075141"]
