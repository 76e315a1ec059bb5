"""What every file format hands to `shards.ingest`: a row of planes, each as it is shown and, where it is grey, as it was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from shards.pixels16 import to_unit

MAX_PIXELS = 64_000_000  # a plane above this is refused before it is decoded: a small file can unfold to gigabytes
MIN_SIDE = 2  # px: below, there is nothing to see
PERCENTILES = (0.5, 99.5)  # black and white of an image whose file names no window


class Unusable(Exception):
    """This file cannot become a sample; the text says why. The sample is quarantined, the others are packed.

    The text holds nothing that stood in the file: a quarantined file may hold a name anywhere.
    """


class Measured(NamedTuple):
    """A grey plane in its own unit: `slope * raw_HW + intercept`.

    low, high: the values shown black and white. inverted: large values are dark. padded_HW: True where nothing was measured.
    """

    raw_HW: np.ndarray
    slope: float
    intercept: float
    low: float
    high: float
    inverted: bool = False
    padded_HW: np.ndarray | None = None


@dataclass(frozen=True)
class Planes:
    """The planes of one file, or of one series of files.

    shown: plane i as u8 HW or RGB HWC. measured: plane i, None where it is coloured. Both raise Unusable.
    affine: (column, row, plane, 1) to RAS millimetres, for planes that are a stack. spacing_yx: millimetres between rows, columns.
    meta: allow-listed values of the header. remarks: what a reader of the data should know.
    """

    count: int
    shown: Callable[[int], np.ndarray]
    measured: Callable[[int], Measured | None]
    affine: np.ndarray | None = None
    spacing_yx: tuple[float, float] | None = None
    meta: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def check_size(width: int, height: int, what: str = "image") -> None:
    """Raises Unusable for a plane too large to decode, or too small to be a picture."""
    if width * height > MAX_PIXELS:
        raise Unusable(f"{what} measures {height} x {width} (height x width), more than {MAX_PIXELS // 10**6} million pixels")
    if min(width, height) < MIN_SIDE:
        raise Unusable(f"{what} measures {height} x {width} (height x width): too small to be a picture")


def own_range(raw_HW: np.ndarray, padded_HW: np.ndarray | None = None) -> tuple[float, float]:
    """Black and white where no window is named: robust extremes of what was measured. Raises Unusable where nothing was."""
    seen = raw_HW if padded_HW is None else raw_HW[~padded_HW]
    if not seen.size:
        raise Unusable("every pixel is padding")
    low, high = np.percentile(seen, PERCENTILES)
    return float(low), float(high)


def show(plane: Measured) -> np.ndarray:
    """u8 HW between the plane's low and high; padding is black."""
    unit_HW = to_unit(plane.raw_HW * plane.slope + plane.intercept, plane.low, plane.high)
    return to_bytes(unit_HW, plane.inverted, plane.padded_HW)


def to_bytes(unit_HW: np.ndarray, inverted: bool, padded_HW: np.ndarray | None) -> np.ndarray:
    """[0, 1] to u8, turned where large is dark; padding is black."""
    shown_HW = np.rint(255 * (1 - unit_HW if inverted else unit_HW)).astype(np.uint8)
    if padded_HW is not None:
        shown_HW[padded_HW] = 0
    return shown_HW
