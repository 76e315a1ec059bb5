"""Image files that are nothing but pixels, row by row, as the card says: the size is the only check there is.

found = planes(data, RawPixels(height=2048, width=2048, dtype=">u2", bits=12, invert=True))
"""

from __future__ import annotations

import numpy as np

from shards.card import RawPixels
from shards.planes import Measured, Planes, Unusable, show


def planes(data: bytes, spec: RawPixels) -> Planes:
    """The plane of such a file, shown from black at 0 to white at the largest value of its bits. Raises Unusable."""
    dtype = np.dtype(spec.dtype)
    expected = spec.height * spec.width * dtype.itemsize
    if len(data) != expected:
        raise Unusable(f"image has {len(data)} bytes, {spec.height} x {spec.width} pixels (height x width) take {expected}")
    raw_HW = np.frombuffer(data, dtype).reshape(spec.height, spec.width).astype(dtype.newbyteorder("="))
    plane = Measured(raw_HW, 1.0, 0.0, 0.0, float(2**spec.bits - 1), spec.invert)
    return Planes(1, lambda _: show(plane), lambda _: plane)
