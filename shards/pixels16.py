"""Sixteen bits a pixel as stored: `.u16.zst`, an image or a slab of slices that carries what its numbers mean.

    data = encode(Deep(stored_DHW, slope=1.0, intercept=-1024.0, low=-160.0, high=239.0, inverted=False))
    image_HWC = display(decode(data), windows=[(-600, 1500), (40, 400)])      # u8, C = D x windows: slice 0 in each window, slice 1, ...

A file is one zstd frame around a header of 52 bytes and the pixels as differences to their left neighbours, all low bytes before all
high ones: faster to read than a 16-bit PNG, and smaller. A value (HU, counts, ...) is `slope * stored + intercept`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import zstandard

MAGIC = b"u16\x01"
_HEADER = struct.Struct("<4s3IB3x4d")  # magic, D, H, W, inverted, slope, intercept, low, high
_LARGEST = 2**31  # bytes unpacked: more is not a slab of ours


class Deep(NamedTuple):
    """Pixels u16 (D, H, W), D = 1 for a plane, and how to show them.

    low, high: the values that are black and white where no window is asked for. inverted: large values are dark (MONOCHROME1).
    """

    stored_DHW: np.ndarray
    slope: float
    intercept: float
    low: float
    high: float
    inverted: bool


def encode(deep: Deep) -> bytes:
    """The bytes of a `.u16.zst` file: the same for the same pixels."""
    depth, height, width = deep.stored_DHW.shape
    delta_DHW = deep.stored_DHW.astype("<u2")
    delta_DHW[:, :, 1:] -= deep.stored_DHW[:, :, :-1]
    planes = delta_DHW.view(np.uint8).reshape(-1, 2).T.tobytes()
    header = _HEADER.pack(MAGIC, depth, height, width, deep.inverted, deep.slope, deep.intercept, deep.low, deep.high)
    return zstandard.ZstdCompressor(level=3).compress(header + planes)


def decode(data: bytes | memoryview) -> Deep:
    """Bit for bit what was encoded. Raises ValueError for bytes that are none of ours."""
    try:
        if not _HEADER.size <= zstandard.frame_content_size(data) <= _LARGEST:
            raise ValueError("the 16-bit image has no size, or an absurd one")
        plain = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError:
        raise ValueError("the 16-bit image does not decompress") from None
    magic, depth, height, width, inverted, slope, intercept, low, high = _HEADER.unpack_from(plain)
    if magic != MAGIC or len(plain) != _HEADER.size + 2 * depth * height * width:
        raise ValueError("the 16-bit image is of another format")
    low_N, high_N = np.frombuffer(plain, np.uint8, offset=_HEADER.size).reshape(2, -1)
    stored_DHW = high_N.astype(np.uint16)
    stored_DHW <<= 8
    stored_DHW |= low_N
    stored_DHW = stored_DHW.reshape(depth, height, width)
    np.add.accumulate(stored_DHW, axis=2, dtype=np.uint16, out=stored_DHW)  # wraps round, as the differences did
    return Deep(stored_DHW, slope, intercept, low, high, bool(inverted))


def display(deep: Deep, windows: Sequence[tuple[float, float]] = ()) -> np.ndarray:
    """u8 HWC: each slice in each window (centre, width; DICOM's LINEAR function), or in the image's own range without windows."""
    ranges = [linear_range(centre, width) for centre, width in windows] or [(deep.low, deep.high)]
    depth, height, width = deep.stored_DHW.shape
    image_HWC = np.empty((height, width, depth * len(ranges)), np.uint8)
    for number, (low, high) in enumerate(ranges):
        table = _table(deep.slope, deep.intercept, low, high, deep.inverted)
        for d in range(depth):
            image_HWC[:, :, d * len(ranges) + number] = np.take(table, deep.stored_DHW[d])
    return image_HWC


def linear_range(centre: float, width: float) -> tuple[float, float]:
    """The values that a window makes black and white: PS3.3 C.11.2.1.2.1. A width of 1 is a threshold."""
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def to_unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to [0, 1], linear between low and high; a threshold above low where they are equal."""
    if high <= low:
        return (values > low).astype(np.float64)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


@lru_cache(maxsize=64)
def _table(slope: float, intercept: float, low: float, high: float, inverted: bool) -> np.ndarray:
    """u8 (65536): what each stored number looks like."""
    unit = to_unit(np.arange(65536) * slope + intercept, low, high)
    return np.rint(255 * (1 - unit if inverted else unit)).astype(np.uint8)


def quantise(raw_DHW: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> tuple[np.ndarray, float, float]:
    """Any numbers as u16 with the slope and intercept that give `slope * raw + intercept` back.

    Exact for integers that span at most 65,535; others are rounded to one of 65,536 equal steps between their extremes.
    """
    kind, size = raw_DHW.dtype.kind, raw_DHW.dtype.itemsize
    if kind in "bu" and size <= 2:
        return raw_DHW.astype(np.uint16), slope, intercept
    if kind == "i" and size <= 2:  # one offset for every slice, whatever it holds
        offset = -(1 << (8 * size - 1))
        return (raw_DHW.astype(np.int32) - offset).astype(np.uint16), slope, intercept + slope * offset
    low, high = float(raw_DHW.min()), float(raw_DHW.max())
    if high - low <= 65535 and (kind in "iu" or (raw_DHW == np.rint(raw_DHW)).all()):
        return (raw_DHW - raw_DHW.min()).astype(np.uint16), slope, intercept + slope * low
    step = (high - low) / 65535 or 1.0
    return np.rint((raw_DHW.astype(np.float64) - low) / step).astype(np.uint16), slope * step, intercept + slope * low
