"""Stored bytes to pixels: uint8, height first, grey with one channel, colour as RGB, 16 bits through windows.

    image_HWC = image(data, channels=1)
    image_HWC = image(data, channels=3, windows=[(-600, 1500), (40, 400), (400, 1800)])
    seg_HW = mask(data)

Decoding is by OpenCV, whose libjpeg-turbo decodes grey JPEGs 1.15x as fast as PIL without ever making them RGB. Errors are ValueErrors
with the reason; the caller knows shard and key.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from shards import pixels16

_FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}
_ZSTD = b"\x28\xb5\x2f\xfd"


def image(data: bytes | memoryview, channels: int, windows: Sequence[tuple[float, float]] = ()) -> np.ndarray:
    """JPEG, PNG or `.u16.zst` bytes to u8 HWC with C = channels. Orientation tags are ignored.

    Eight bits: C is 1 (a colour file is turned grey) or 3 (a grey file is repeated), and windows are ignored. Sixteen bits: each slice
    in each window (centre, width), slice by slice; without windows each slice in the range that its file named.

    Raises:
        ValueError: not an image, truncated before its pixels begin, or of another number of slices.
    """
    if bytes(data[:4]) == _ZSTD:
        shown_HWC = pixels16.display(pixels16.decode(data), windows)
        if shown_HWC.shape[2] == 1 and channels == 3:
            return np.repeat(shown_HWC, 3, axis=2)
        if shown_HWC.shape[2] != channels:
            raise ValueError(f"the image has {shown_HWC.shape[2]} slices and windows, expected {channels}")
        return shown_HWC
    if channels not in _FLAGS:
        raise ValueError(f"the image has 8 bits, expected slices or windows that make {channels} channels")
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _FLAGS[channels] | cv2.IMREAD_IGNORE_ORIENTATION) if len(data) else None
    if pixels is None:
        raise ValueError("the image does not decode")
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def mask(data: bytes | memoryview) -> np.ndarray:
    """PNG bytes of a mask to u8 HW, values as stored (class indices).

    Raises:
        ValueError: not an image, or not 8-bit with one channel.
    """
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if len(data) else None
    if pixels is None:
        raise ValueError("the mask does not decode")
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise ValueError(f"the mask is {pixels.dtype} with shape {pixels.shape}, expected 8 bit and one channel")
    return pixels
