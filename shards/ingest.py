"""From the bytes of a raw file to the bytes of a sample: decoded and checked, nothing kept but pixels.

    stored = image(data, channels=1, max_side=None)       # Stored(ext, data, height, width); Unusable(reason) if it must be left out
    seg_png = mask([left_png, right_png], classes=1, stored)

A JPEG keeps its entropy-coded bytes (decoding again and saving would cost quality) but loses every segment that can carry text:
EXIF, XMP, ICC, comments, thumbnails, and whatever follows the end of the image. All else becomes an 8-bit PNG, bit for bit.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # a decoded image above this is refused before it is decoded: a small file can unfold to gigabytes
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


class Unusable(Exception):
    """This file cannot become a sample; the text says why. The sample is quarantined, the others are packed."""


class Stored(NamedTuple):
    """The bytes of an image as packed, its extension (jpg or png) and its size in pixels."""

    ext: str
    data: bytes
    height: int
    width: int
    reduced_from: tuple[int, int] | None  # (height, width) before reduction to max_side


def image(data: bytes, channels: int, max_side: int | None = None) -> Stored:
    """Check an image file and make it storable. Raises Unusable."""
    picture = _open(data)
    jpeg = picture.format == "JPEG"
    upright = int(picture.getexif().get(0x0112, 1)) in (0, 1)
    pixels = _pixels(picture if upright else ImageOps.exif_transpose(picture), channels)
    height, width = pixels.shape[:2]
    too_large = max_side is not None and max(height, width) > max_side
    # A grey decoder takes the luma of a colour JPEG, which is how a colour file on a grey card is meant to be read.
    if jpeg and upright and not too_large and (picture.mode == "RGB" or (picture.mode == "L" and channels == 1)):
        return Stored("jpg", strip_jpeg(data), height, width, None)
    if too_large and max_side is not None:
        pixels = cv2.resize(pixels, _reduced(height, width, max_side), interpolation=cv2.INTER_AREA)
        return Stored("png", png(pixels), pixels.shape[0], pixels.shape[1], (height, width))
    return Stored("png", png(pixels), height, width, None)


def mask(files: list[bytes], classes: int, of: Stored) -> bytes:
    """The union of mask files as one 8-bit index PNG of the stored image's size. Raises Unusable.

    With one class every non-zero value means it; with more, values are class indices and the larger one wins where files overlap.
    """
    merged = np.zeros(of.reduced_from or (of.height, of.width), np.uint8)
    for data in files:
        picture = _open(data, "mask")
        if picture.format != "PNG" or picture.mode not in ("1", "L", "P", "RGB"):
            raise Unusable(f"mask is {picture.format} {picture.mode}, not an 8-bit PNG")
        values = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise Unusable("mask is coloured, its classes are not indices")
            values = values[..., 0]
        if values.shape != merged.shape:
            raise Unusable(f"mask measures {values.shape[1]} x {values.shape[0]}, its image {merged.shape[1]} x {merged.shape[0]}")
        indices = (values > 0).astype(np.uint8) if classes == 1 else values
        if int(indices.max(initial=0)) > classes:
            raise Unusable(f"mask holds the value {int(indices.max())}, the card has {classes} classes")
        merged = np.maximum(merged, indices)
    if of.reduced_from:
        merged = cv2.resize(merged, (of.width, of.height), interpolation=cv2.INTER_NEAREST_EXACT)
    return png(merged)


def png(pixels: np.ndarray) -> bytes:
    """u8 HW, or HWC in RGB, as PNG bytes: no text, no times, the same bytes for the same pixels."""
    ok, encoded = cv2.imencode(".png", pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1]))
    if not ok:
        raise Unusable("cannot be encoded as PNG")
    return encoded.tobytes()


def strip_jpeg(data: bytes) -> bytes:
    """The same JPEG without metadata; the JFIF header (without thumbnail) and Adobe's colour flag stay. Raises Unusable."""
    out, position = [b"\xff\xd8"], 2
    while True:
        if data[position : position + 1] != b"\xff":
            raise Unusable("a damaged JPEG: no marker where one must be")
        while data[position + 1 : position + 2] == b"\xff":
            position += 1
        code = data[position + 1 : position + 2]
        if code == b"\xd9":
            return b"".join(out) + b"\xff\xd9"
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position : position + 2 + length]
        if length < 2 or len(segment) < 2 + length:
            raise Unusable("a truncated JPEG")
        position += len(segment)
        if code == b"\xe0":
            if segment[4:9] == b"JFIF\x00":
                out.append(b"\xff\xe0\x00\x10" + segment[4:16] + b"\x00\x00")
        elif code == b"\xee":
            if segment[4:9] == b"Adobe":
                out.append(b"\xff\xee\x00\x0e" + segment[4:16])
        elif not (b"\xe1" <= code <= b"\xef" or code == b"\xfe"):
            out.append(segment)
        if code == b"\xda":  # entropy-coded bytes follow, up to the next marker that is not a restart
            found = _MARKER.search(data, position)
            if found is None:
                raise Unusable("a truncated JPEG: no end of image")
            out.append(data[position : found.start()])
            position = found.start()


def _open(data: bytes, what: str = "image") -> Image.Image:
    if not data:
        raise Unusable(f"{what} is an empty file")
    if not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        raise Unusable(f"{what} is neither JPEG nor PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images; they are refused here
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            if picture.width * picture.height > MAX_PIXELS:
                raise Unusable(f"{what} measures {picture.width} x {picture.height}, more than {MAX_PIXELS // 10**6} million pixels")
            if picture.format == "PNG":
                _check_png(data, what)
            picture.load()
    except UnidentifiedImageError:
        raise Unusable(f"{what} does not decode: its header is damaged") from None
    except Image.DecompressionBombError:
        raise Unusable(f"{what} has more than {MAX_PIXELS // 10**6} million pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:  # what PIL's decoders raise for damaged files
        raise Unusable(f"{what} does not decode: {error}") from None
    return picture


def _check_png(data: bytes, what: str) -> None:
    # PIL decodes a PNG whose pixel chunks fail their checksum; a flipped bit in a scan is not a scan.
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise Unusable(f"{what} does not decode: a PNG chunk fails its checksum")
        if data[position + 4 : position + 8] == b"IEND":
            return
        position = end + 4
    raise Unusable(f"{what} does not decode: a truncated PNG")


def _pixels(picture: Image.Image, channels: int) -> np.ndarray:
    """u8 HW or HWC (RGB) with the card's channels. Transparency is dropped where it is opaque throughout and refused elsewhere."""
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode in ("LA", "RGBA"):
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise Unusable("image is partly transparent")
        picture = picture.convert(picture.mode[:-1])
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode not in ("L", "RGB"):
        raise Unusable(f"image has mode {picture.mode}: only 8-bit grey and RGB are packed, deeper ones need a window")
    pixels = np.asarray(picture)
    if channels == 1 and pixels.ndim == 3:
        equal = (pixels == pixels[..., :1]).all()
        return np.ascontiguousarray(pixels[..., 0]) if equal else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if channels == 3 and pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels


def _reduced(height: int, width: int, max_side: int) -> tuple[int, int]:
    scale = max_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))
