"""JPEG, PNG, TIFF, GIF and BMP: opened, checked, and turned into planes without a word of what stands beside the pixels.

picture = open_picture(data, kind="png")           # Unusable: damaged, truncated, too large
found = planes(picture)                            # the pages of a TIFF or GIF, or one plane
clean = strip_jpeg(data)                           # the same JPEG without EXIF, XMP, ICC, comments, thumbnails
"""

from __future__ import annotations

import io
import re
import warnings
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.planes import MAX_PIXELS, Measured, Planes, Unusable, check_size, own_range, show

KINDS = ("jpeg", "png", "tiff", "gif", "bmp")
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_CODING = frozenset(bytes([code]) for code in (*range(0xC0, 0xD0), *range(0xDA, 0xE0)) if code != 0xC8)  # frames, scans, tables
# What PIL's decoders raise for damaged files.
FAULTS = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError, zlib.error)


def open_picture(data: bytes, kind: str, what: str = "image") -> Image.Image:
    """The decoded picture. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images; they are refused here
            picture = Image.open(io.BytesIO(data), formats=(kind.upper(),))
            check_size(picture.width, picture.height, what)
            if kind == "png":
                _check_png(data, what)
            picture.load()
    except UnidentifiedImageError:
        raise Unusable(f"{what} does not decode: its header is damaged") from None
    except Image.DecompressionBombError:
        raise Unusable(f"{what} has more than {MAX_PIXELS // 10**6} million pixels") from None
    except FAULTS as error:
        reason = "truncated" if "truncated" in str(error) else type(error).__name__
        raise Unusable(f"{what} does not decode: {reason}") from None
    return picture


def upright(picture: Image.Image) -> bool:
    """Whether the file has its pixels as they are to be seen (EXIF orientation)."""
    return int(picture.getexif().get(0x0112, 1)) in (0, 1)


def planes(picture: Image.Image) -> Planes:
    """The pages of a picture. Grey pages of more than 8 bits are shown between their robust extremes."""

    def page(i: int) -> Image.Image:
        if i == 0 and getattr(picture, "n_frames", 1) == 1:
            return picture if upright(picture) else ImageOps.exif_transpose(picture)
        try:
            picture.seek(i)
            check_size(picture.width, picture.height)
            picture.load()
        except FAULTS as error:
            raise Unusable(f"page {i} does not decode: {type(error).__name__}") from None
        return picture.copy()

    def measured(i: int) -> Measured | None:
        found = page(i)
        if found.mode.startswith("I") or found.mode == "F":
            raw_HW = np.asarray(found)
            if not np.isfinite(raw_HW).all():
                raise Unusable("the image holds values that are no numbers")
            return Measured(raw_HW, 1.0, 0.0, *own_range(raw_HW))
        pixels = _bytes(found)
        return Measured(pixels, 1.0, 0.0, 0.0, 255.0) if pixels.ndim == 2 else None

    def shown(i: int) -> np.ndarray:
        plane = measured(i)
        if plane is None:
            return _bytes(page(i))
        return plane.raw_HW if plane.raw_HW.dtype == np.uint8 else show(plane)

    return Planes(getattr(picture, "n_frames", 1), shown, measured)


def _bytes(picture: Image.Image) -> np.ndarray:
    """u8 HW or RGB HWC. Transparency is dropped where it is opaque throughout and refused elsewhere."""
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA" if picture.mode == "PA" or "transparency" in picture.info else "RGB")
    if picture.mode in ("LA", "RGBA"):
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise Unusable("image is partly transparent")
        picture = picture.convert(picture.mode[:-1])
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("CMYK", "YCbCr", "RGBX"):
        picture = picture.convert("RGB")
    if picture.mode not in ("L", "RGB"):
        raise Unusable(f"image has mode {picture.mode}, which is neither grey nor RGB")
    return np.asarray(picture)


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """u8 HW or RGB HWC as HW (channels 1; colours become luma) or HWC (channels 3; grey is repeated)."""
    if channels == 1 and pixels.ndim == 3:
        equal = (pixels == pixels[..., :1]).all()
        return np.ascontiguousarray(pixels[..., 0]) if equal else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if channels == 3 and pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels


def png(pixels: np.ndarray) -> bytes:
    """u8 HW, or HWC in RGB, as PNG bytes: no text, no times, the same bytes for the same pixels."""
    ok, encoded = cv2.imencode(".png", pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1]))
    if not ok:
        raise Unusable("cannot be encoded as PNG")
    return encoded.tobytes()


def pages(pixels_DHW: np.ndarray) -> bytes:
    """Grey planes as the pages of a TIFF, bit for bit."""
    first, *others = (Image.fromarray(np.ascontiguousarray(plane)) for plane in pixels_DHW)
    out = io.BytesIO()
    first.save(out, "TIFF", save_all=True, append_images=others)
    return out.getvalue()


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
        elif code in _CODING:
            out.append(segment)
        if code == b"\xda":  # entropy-coded bytes follow, up to the next marker that is not a restart
            found = _MARKER.search(data, position)
            if found is None:
                raise Unusable("a truncated JPEG: no end of image")
            out.append(data[position : found.start()])
            position = found.start()


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
