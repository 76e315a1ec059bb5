"""DICOM: from a file's bytes, or a series of them, to planes.

    found = planes(data, rules=card.burned_in)      # Planes; Unusable for everything that is no image, or may show a name
    found.shown(0)                                  # u8, as PS3.3 C.7.6.3, C.11 and PS3.4 N.2 have it shown

The order is fixed: decode, mask padding, modality LUT or rescale, VOI LUT or window (the first of several), invert MONOCHROME1, scale.
Whether to invert follows PhotometricInterpretation alone: in a conformant file PresentationLUTShape says the same.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

from shards import deidentify, geometry
from shards.card import BurnedIn
from shards.pixels16 import linear_range
from shards.planes import Measured, Planes, Unusable, check_size, own_range, show, to_bytes

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values of the file, which may be names
MAX_UNPACKED = 2**31  # bytes of a deflated data set
NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation")
# What pydicom and its decoders raise for files that are not what they say.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, BytesLengthException, EOFError, InvalidDicomError, LookupError, MemoryError,
    NotImplementedError, OSError, RuntimeError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
GROUPS = (
    "PixelValueTransformationSequence", "FrameVOILUTSequence", "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
)  # fmt: skip
FACTS = (
    "PhotometricInterpretation", "PixelRepresentation", "BitsAllocated", "BitsStored", "ModalityLUTSequence", "RescaleSlope",
    "RescaleIntercept", "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing",
    "SpacingBetweenSlices", "SliceThickness",
)  # fmt: skip


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what damaged files make pydicom raise into Unusable, without a word of the file in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of every deviation; what matters is refused or remarked here
            yield
    except FAULTS as error:
        raise Unusable(f"a DICOM file that does not decode ({type(error).__name__})") from None


def read(data: bytes) -> Dataset:
    """The data set of a file that holds an image. Raises Unusable: no DICOM, no pixels, no transfer syntax, too large, incomplete."""
    if data[128:132] != b"DICM":
        raise Unusable("a DICOM file without its preamble, so without a transfer syntax")
    with _reading():
        _refuse_unfolding(data)
        ds = dcmread(io.BytesIO(data))
        if not ds.file_meta.get("TransferSyntaxUID"):
            raise Unusable("a DICOM file that names no transfer syntax")
        if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            kind = UID(str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or ""))
            raise Unusable(f"a DICOM file without pixels ({kind.name if kind and kind.name != kind else 'of unknown kind'})")
        lacking = [name for name in NEEDED if ds.get(name) is None and "PixelData" in ds]
        if lacking:
            raise Unusable(f"a DICOM file that lacks {', '.join(lacking)}")
        check_size(int(ds.Columns), int(ds.Rows))
        if frames_of(ds) < 1:
            raise Unusable("a DICOM file with no frame")
        syntax = ds.file_meta.TransferSyntaxUID
        if not syntax.is_encapsulated and "PixelData" in ds:
            subsampled = 2 / 3 if ds.PhotometricInterpretation == "YBR_FULL_422" else 1
            bits = frames_of(ds) * ds.Rows * ds.Columns * ds.SamplesPerPixel * ds.BitsAllocated * subsampled
            if len(ds.PixelData) < int(bits / 8):
                raise Unusable(f"a truncated DICOM file: {len(ds.PixelData)} of {int(bits / 8)} bytes of pixels")
    return ds


def frames_of(ds: Dataset) -> int:
    """How many frames the file says it has."""
    return int(ds.get("NumberOfFrames") or 1)


def pixels(ds: Dataset, index: int = 0) -> np.ndarray:
    """One frame as stored, before any LUT: HW, or HWC with colours turned to RGB (palette indices stay). Raises Unusable."""
    with _reading():
        _refuse_other_size(ds, index)
        array = np.asarray(pixel_array(ds, index=index))
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def planes(data: bytes, rules: Sequence[BurnedIn] = ()) -> Planes:
    """The frames of one file, in the file's order. Raises Unusable."""
    ds = read(data)
    return _planes([_Slice(ds, index, _facts(ds, index), _blanked(ds, rules)) for index in range(frames_of(ds))])


def series(files: Sequence[bytes], rules: Sequence[BurnedIn] = ()) -> Planes:
    """One series of single-frame files as a stack along its normal. Raises Unusable: two series, no positions, a slice missing."""
    found = [read(data) for data in files]
    with _reading():
        if any(frames_of(ds) > 1 for ds in found):
            raise Unusable("a folder with a multi-frame file is no series of slices")
        for name in ("SeriesInstanceUID", "Rows", "Columns", "ImageOrientationPatient"):
            if len({str(ds.get(name)) for ds in found}) > 1:
                raise Unusable(f"the slices of a folder differ in {name}")
        if any(ds.get("ImagePositionPatient") is None or ds.get("ImageOrientationPatient") is None for ds in found):
            raise Unusable("slices without position and orientation: their order is unknown")
        normal = geometry.normal_of([float(x) for x in found[0].ImageOrientationPatient])
        place_N = np.array([normal @ np.array(ds.ImagePositionPatient, float) for ds in found])
        order = np.argsort(place_N, kind="stable")
        gap_N = np.diff(place_N[order])
        if len(gap_N) and (gap_N.min() <= 0.01 or gap_N.max() > 1.5 * np.median(gap_N)):
            raise Unusable("a slice is missing from the series, or stands in it twice")
    return _planes([_Slice(found[k], 0, _facts(found[k], 0), _blanked(found[k], rules)) for k in order])


class _Slice(NamedTuple):
    ds: Dataset
    number: int
    facts: Dataset
    blank: list[deidentify.Rectangle]


def _blanked(ds: Dataset, rules: Sequence[BurnedIn]) -> list[deidentify.Rectangle]:
    with _reading():
        return deidentify.blanked(ds, rules)


def _planes(slices: list[_Slice]) -> Planes:
    with _reading():
        first, facts = slices[0].ds, slices[0].facts
        spacing = facts.get("PixelSpacing") or facts.get("ImagerPixelSpacing") or facts.get("NominalScannedPixelSpacing")
        shape = str(first.get("PresentationLUTShape") or "")
        contradicts = {"MONOCHROME2": "INVERSE", "MONOCHROME1": "IDENTITY"}.get(facts.get("PhotometricInterpretation", "")) == shape
        remarks = ["PresentationLUTShape contradicts PhotometricInterpretation, which was followed"] if contradicts else []
        if deidentify.may_show_a_face(first):
            remarks.append("a head: a face may be reconstructed from its slices")
        return Planes(
            count=len(slices),
            shown=lambda i: _shown(*slices[i]),
            measured=lambda i: _measured(*slices[i]),
            affine=_affine([each.facts for each in slices]),
            spacing_yx=(float(spacing[0]), float(spacing[1])) if spacing else None,
            meta=deidentify.header_values(first),
            remarks=tuple(remarks),
        )


def _facts(ds: Dataset, index: int) -> Dataset:
    """What decides how a frame is shown and where it lies; enhanced files keep it a frame (PS3.3 C.7.6.16)."""
    with _reading():
        facts = Dataset()
        facts.set_original_encoding(*ds.original_encoding)
        facts.update({ds[name].tag: ds[name] for name in FACTS if name in ds})
        shared, own = ds.get("SharedFunctionalGroupsSequence") or [], ds.get("PerFrameFunctionalGroupsSequence") or []
        for group in [*shared[:1], *own[index : index + 1]]:
            for name in GROUPS:
                for item in group.get(name) or []:
                    facts.update({item[fact].tag: item[fact] for fact in FACTS if fact in item})
        return facts


def _measured(ds: Dataset, index: int, facts: Dataset, blank: list[deidentify.Rectangle]) -> Measured | None:
    raw_HW = pixels(ds, index)
    with _reading():
        if raw_HW.ndim != 2 or facts.get("PhotometricInterpretation") == "PALETTE COLOR":
            return None
        padded_HW = _padding(raw_HW, facts)
        for top, left, bottom, right in blank:
            padded_HW = np.zeros(raw_HW.shape, bool) if padded_HW is None else padded_HW
            padded_HW[top:bottom, left:right] = True
        if facts.get("ModalityLUTSequence"):
            raw_HW, slope, intercept = _looked_up(raw_HW, facts.ModalityLUTSequence[0], facts), 1.0, 0.0
        else:
            slope, intercept = float(facts.get("RescaleSlope") or 1), float(facts.get("RescaleIntercept") or 0)
        inverted = facts.get("PhotometricInterpretation") == "MONOCHROME1"
        low, high = _range(raw_HW, slope, intercept, facts, padded_HW)
        return Measured(raw_HW, slope, intercept, low, high, inverted, padded_HW)


def _shown(ds: Dataset, index: int, facts: Dataset, blank: list[deidentify.Rectangle]) -> np.ndarray:
    plane = _measured(ds, index, facts, blank)
    if plane is None:
        return _colour(ds, index, blank)
    with _reading():
        values_HW = plane.raw_HW * plane.slope + plane.intercept
        if facts.get("VOILUTSequence"):
            table = facts.VOILUTSequence[0]
            unit_HW = _looked_up(values_HW, table, facts) / (2 ** int(table.LUTDescriptor[2]) - 1)
            return to_bytes(np.clip(unit_HW, 0, 1), plane.inverted, plane.padded_HW)
        window = _window(facts)
        if window is not None and facts.get("VOILUTFunction") == "SIGMOID":
            centre, width = window
            unit_HW = 1 / (1 + np.exp(np.clip(-4 * (values_HW - centre) / width, -500, 500)))
            return to_bytes(unit_HW, plane.inverted, plane.padded_HW)
    return show(plane)


def _looked_up(values_HW: np.ndarray, table: Dataset, facts: Dataset) -> np.ndarray:
    """Through a table, u16 (PS3.3 C.11.1.1.1): what lies below its first value gets the first entry, what lies beyond its last the last.

    pydicom's apply_voi folds the indices of 8-bit tables of more than 256 entries, and does not know tables of 8 bits an entry.
    """
    count, first = int(table.LUTDescriptor[0]) % 65536 or 65536, int(table.LUTDescriptor[1])
    entries = table.LUTData
    if isinstance(entries, bytes):
        big = facts.original_encoding[1] is False
        entries = np.frombuffer(entries, np.uint8 if len(entries) < 2 * count else ">u2" if big else "<u2")
    place_HW = np.clip(np.rint(values_HW) - first, 0, count - 1).astype(np.int64)
    return np.asarray(entries, np.int64).astype(np.uint16)[place_HW]


def _range(raw_HW: np.ndarray, slope: float, intercept: float, facts: Dataset, padded_HW: np.ndarray | None) -> tuple[float, float]:
    """The values shown black and white: of the VOI LUT, else the window, else all of 8 bits, else robust extremes."""
    if facts.get("VOILUTSequence"):
        count, first, _ = (int(x) for x in facts.VOILUTSequence[0].LUTDescriptor)
        return float(first), float(first + (count % 65536 or 65536) - 1)
    window = _window(facts)
    if window is not None:
        centre, width = window
        linear = facts.get("VOILUTFunction", "LINEAR") not in ("LINEAR_EXACT", "SIGMOID")
        return linear_range(centre, width) if linear else (centre - width / 2, centre + width / 2)
    bits = int(facts.get("BitsStored") or 32)
    if bits <= 8 and raw_HW.dtype.kind == "u" and not facts.get("ModalityLUTSequence"):
        ends = (intercept, slope * (2**bits - 1) + intercept)  # made to be shown as it is: kept bit for bit
    else:
        low, high = own_range(raw_HW, padded_HW)
        ends = (slope * low + intercept, slope * high + intercept)
    return min(ends), max(ends)


def _window(facts: Dataset) -> tuple[float, float] | None:
    """Centre and width of the first window; None where there is none, or none that PS3.3 C.11.2.1.2 allows."""
    centre, width = facts.get("WindowCenter"), facts.get("WindowWidth")
    centre, width = (value[0] if isinstance(value, MultiValue) and len(value) else value for value in (centre, width))
    if centre is None or width is None or isinstance(centre, MultiValue) or isinstance(width, MultiValue):
        return None
    least = 0.0 if facts.get("VOILUTFunction") in ("LINEAR_EXACT", "SIGMOID") else 1.0
    return (float(centre), float(width)) if float(width) >= least and float(width) > 0 else None


def _padding(raw_HW: np.ndarray, facts: Dataset) -> np.ndarray | None:
    """Where the pixels are padding (PS3.3 C.7.5.1.1.2); the values may stand there with the wrong sign."""
    ends = [facts.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None or raw_HW.dtype.kind not in "iu":
        return None
    bits, signed = int(facts.BitsAllocated), raw_HW.dtype.kind == "i"
    numbers = [int(end) % 2**bits for end in ends if end is not None]
    numbers = [number - 2**bits if signed and number >= 2 ** (bits - 1) else number for number in numbers]
    return (raw_HW >= min(numbers)) & (raw_HW <= max(numbers))


def _colour(ds: Dataset, index: int, blank: list[deidentify.Rectangle]) -> np.ndarray:
    """u8 RGB."""
    array = pixels(ds, index)
    with _reading():
        bits = int(ds.BitsStored)
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            array = apply_color_lut(array, ds)
            bits = 8 * array.dtype.itemsize
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind != "u":
            raise Unusable(f"a DICOM file in colours that are not RGB: shape {array.shape}")
        shown = (array >> (bits - 8) if bits > 8 else array).astype(np.uint8)
        for top, left, bottom, right in blank:
            shown[top:bottom, left:right] = 0
        return shown


def _affine(facts: list[Dataset]) -> np.ndarray | None:
    """Of the stack, None where the file says too little, or the frames are no stack."""
    orientation, spacing = facts[0].get("ImageOrientationPatient"), facts[0].get("PixelSpacing")
    positions = [each.get("ImagePositionPatient") for each in facts]
    if orientation is None or not spacing or positions[0] is None:
        return None
    cosines, place_N3 = [float(x) for x in orientation], np.array([p for p in positions if p is not None], float)
    if len(facts) == 1:
        step = geometry.normal_of(cosines) * float(facts[0].get("SpacingBetweenSlices") or facts[0].get("SliceThickness") or 1)
    elif len(place_N3) < len(facts):
        return None
    else:
        step = (place_N3[-1] - place_N3[0]) / (len(facts) - 1)
        even_N3 = place_N3[0] + np.arange(len(facts))[:, None] * step
        if not np.linalg.norm(step) or np.abs(even_N3 - place_N3).max() > 0.5 * np.linalg.norm(step):
            return None
    return geometry.of_dicom(cosines, place_N3[0].tolist(), [float(x) for x in spacing], step)


def _refuse_unfolding(data: bytes) -> None:
    """A deflated data set is unpacked whole by pydicom; this looks at its size first."""
    start = 144 + int.from_bytes(data[140:144], "little")
    if b"\x02\x00\x10\x00UI\x16\x00" + DeflatedExplicitVRLittleEndian.encode() in data[132:start]:
        unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        rest = data[start:]
        while rest and not unpacker.eof:
            size += len(unpacker.decompress(rest, 2**24))
            rest = unpacker.unconsumed_tail
            if size > MAX_UNPACKED:
                raise Unusable("a deflated DICOM file that unfolds to more than 2 GiB")


def _refuse_other_size(ds: Dataset, index: int) -> None:
    """Decoders believe the size inside the compressed frame and allocate for it; it must be the one that was checked."""
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated or ds.file_meta.TransferSyntaxUID == RLELossless:
        return
    size = _size_inside(get_frame(ds.PixelData, index, number_of_frames=frames_of(ds)))
    if size is not None and size != (int(ds.Rows), int(ds.Columns)):
        raise Unusable(f"a DICOM file of {ds.Columns} x {ds.Rows} whose compressed pixels measure {size[1]} x {size[0]}")


def _size_inside(frame: bytes) -> tuple[int, int] | None:
    """(height, width) that a JPEG, JPEG-LS or JPEG 2000 stream says of itself; None where it says nothing that is understood."""
    at = frame.find(b"\xff\x4f\xff\x51")
    if 0 <= at < 1024:
        right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
        return bottom - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        code = frame[at + 1]
        if code == 0xF7 or (0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">2H", frame, at + 5)
            return int(height), int(width)
        at += 1 if code == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
