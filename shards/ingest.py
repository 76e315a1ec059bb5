"""From the bytes of raw files to the bytes of samples: decoded and checked, nothing kept but pixels and where they lie.

    for frame, stored in unfold([data], card): ...        # one Stored or, of a file with several frames, several; Unusable if none
    seg_png = merged([mask_values(data, 1, stored.frame) for data in (left_png, right_png)], classes=1, of=stored)

What a file is, its content says, never its name. A JPEG keeps its entropy-coded bytes (decoding again and saving would cost quality)
but loses every segment that can carry text. All else becomes an 8-bit PNG, bit for bit, or with `depth: 16` a `.u16.zst`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from shards import geometry, headerless, pixels16, raster
from shards.card import NOT_JUDGED, Card, RawPixels
from shards.content import DAMAGED_GZIP, HEAD, IMAGES, format_of
from shards.planes import Measured, Planes, Unusable
from shards.raster import png, strip_jpeg


@dataclass(frozen=True)
class Stored:
    """The bytes of an image as packed, its extension (jpg, png or u16.zst) and its size in pixels.

    reduced_from: (height, width) before reduction to max_side. frame: of a file with several; of a slab, the slice in its middle.
    facts: where it lies (`spacing_mm`, `affine`, `slices`) and `remarks`. meta: allow-listed values of the header.
    """

    ext: str
    data: bytes
    height: int
    width: int
    reduced_from: tuple[int, int] | None = None
    frame: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


def kind(data: bytes, what: str = "image") -> str:
    """jpeg, png, tiff, gif, bmp, dicom or nifti, by content. Raises Unusable."""
    if not data:
        raise Unusable(f"{what} is an empty file")
    found = format_of(data[:HEAD])
    if found == DAMAGED_GZIP:
        raise Unusable(f"{what} is a damaged gzip file")
    if found not in IMAGES:
        raise Unusable(f"{what} is none of JPEG, PNG, TIFF, GIF, BMP, DICOM, NIfTI")
    return found


def planes(files: Sequence[bytes], card: Card | None = None) -> Planes:
    """The planes of a file, or of the files of one DICOM series. Raises Unusable."""
    if card is not None and (spec := _raw_pixels(card)) is not None:
        return headerless.planes(files[0], spec)
    kinds = {kind(data) for data in files}
    if "dicom" in kinds:
        from shards import dicom

        if kinds != {"dicom"}:
            raise Unusable("a folder with DICOM and other files is no series")
        rules = card.burned_in if card else ()
        return dicom.planes(files[0], rules) if len(files) == 1 else dicom.series(files, rules)
    if len(files) != 1:
        raise Unusable("only DICOM files make a series")
    if kinds == {"nifti"}:
        from shards import nifti

        return nifti.planes(files[0])
    return raster.planes(raster.open_picture(files[0], kinds.pop()))


def _raw_pixels(card: Card) -> RawPixels | None:
    return card.layouts[0].raw_pixels if card.layouts else None


def unfold(files: Sequence[bytes], card: Card) -> Iterator[tuple[int | None, Stored | Unusable]]:
    """What the card makes of a file (or series): its first frame, each frame or slabs of slices.

    The number is what tells a sample from the others of its file: the frame, or the slab's first slice; None where the file has only one.
    A frame that is unusable is given as such, and the others follow. Raises Unusable where the file as a whole is.
    """
    if card.depth == 8 and card.frames == "first" and len(files) == 1 and _raw_pixels(card) is None and kind(files[0]) == "jpeg":
        yield None, image(files[0], card.channels, card.max_side)
        return
    found = planes(files, card)
    if card.slab is not None:
        if found.count < card.slab:
            raise Unusable(f"{found.count} slices, the card's slabs have {card.slab}")
        starts = np.linspace(0, found.count - card.slab, -(-found.count // card.slab))  # none left over: the slabs overlap instead
        spans = [range(start, start + card.slab) for start in np.rint(starts).astype(int).tolist()]
    else:
        spans = [range(i, i + 1) for i in range(found.count if card.frames == "each" else 1)]
    for span in spans:
        first = span.start if found.count > 1 else None
        try:
            stored: Stored | Unusable = _stored(found, span, card)
        except Unusable as reason:
            stored = reason
        yield first, stored


def _stored(found: Planes, span: range, card: Card) -> Stored:
    place: dict[str, Any] = {"meta": {name: value for name, value in found.meta.items() if name in card.metadata}}
    if found.count > 1:
        place["frame"] = span[len(span) // 2]
    measured = [found.measured(i) for i in span] if card.depth == 16 else []
    grey = [plane for plane in measured if plane is not None]
    if measured and len(grey) == len(measured):
        deep = _deep(grey)
        pixels_DHW, before = _reduced(deep.stored_DHW, card.max_side)
        data = pixels16.encode(deep._replace(stored_DHW=pixels_DHW))
        height, width = pixels_DHW.shape[1:]
        return Stored("u16.zst", data, height, width, before, **place, facts=_facts(found, span, before, height, width))
    if card.windows or card.slab:
        raise Unusable("a coloured image has no windows or slabs")
    shown = raster.to_channels(found.shown(span.start), card.channels)
    pixels, before = _reduced(shown[None], card.max_side)
    height, width = pixels.shape[1:3]
    return Stored("png", png(pixels[0]), height, width, before, **place, facts=_facts(found, span, before, height, width))


def image(data: bytes, channels: int, max_side: int | None = None) -> Stored:
    """The first plane of an image file, in 8 bits. Raises Unusable."""
    name = kind(data)
    if name != "jpeg":
        pixels = raster.to_channels(planes([data]).shown(0), channels)
    else:
        picture = raster.open_picture(data, "jpeg")
        height, width = picture.height, picture.width
        too_large = max_side is not None and max(height, width) > max_side
        # A grey decoder takes the luma of a colour JPEG, which is how a colour file on a grey card is meant to be read.
        if raster.upright(picture) and not too_large and (picture.mode == "RGB" or (picture.mode == "L" and channels == 1)):
            return Stored("jpg", strip_jpeg(data), height, width)
        pixels = raster.to_channels(raster.planes(picture).shown(0), channels)
    small, before = _reduced(pixels[None], max_side)
    return Stored("png", png(small[0]), small.shape[1], small.shape[2], before)


def mask_values(data: bytes, classes: int, frame: int | None = None) -> np.ndarray:
    """The numbers in a mask file, HW: indices of classes, or anything but zero for the only one. Raises Unusable.

    frame: of a file with several, that of the image; of a slab, the one in its middle.
    """
    name = kind(data, "mask")
    if name in ("dicom", "nifti"):
        found = planes([data])
        if not (frame or 0) < found.count:
            raise Unusable(f"mask has {found.count} frames, its image a frame {frame}")
        plane = found.measured(frame or 0)
        if plane is None:
            raise Unusable("mask is coloured, its classes are not indices")
        return plane.raw_HW
    picture = raster.open_picture(data, name, "mask")
    if name == "jpeg":
        raise Unusable("mask is a JPEG, whose values are not exact")
    if picture.mode == "1" or (picture.mode == "P" and classes == 1):  # of two colours, the one that is not black
        picture = picture.convert("L")
    if picture.mode not in ("L", "P", "RGB", "I;16", "I"):
        raise Unusable(f"mask is {name.upper()} {picture.mode}, not an image of indices")
    values = np.asarray(picture)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise Unusable("mask is coloured, its classes are not indices")
        return values[..., 0]
    return values


def merged(masks: Sequence[np.ndarray], classes: int, of: Stored, resize: bool = False, seen: np.ndarray | None = None) -> bytes:
    """The union of masks (HW, see `mask_values`) as an 8-bit index PNG; of two classes the larger wins.

    It has the size at which they were drawn, whatever the stored image was reduced to: metrics are made there.

    resize: take masks of another size than the image's; those that differ among themselves are brought to that.
    seen: bool HW of the image's size; where it is False nothing is judged, and the mask is NOT_JUDGED. Raises Unusable.
    """
    image_shape = of.reduced_from or (of.height, of.width)
    drawn = {values.shape for values in masks}
    height, width = drawn.pop() if resize and len(drawn) == 1 else image_shape
    union = np.zeros((height, width), np.uint8)
    for values in masks:
        if values.shape != image_shape and not resize:
            raise Unusable(f"mask measures {values.shape[0]} x {values.shape[1]} (height x width), its image {height} x {width}")
        low, high = (values.min(), values.max()) if values.size else (0, 0)
        if classes > 1 and not 0 <= low <= high <= classes:
            raise Unusable(f"mask holds the value {low if low < 0 else high}, the card has {classes} classes")
        indices = (values != 0).astype(np.uint8) if classes == 1 else values.astype(np.uint8)
        if (values.dtype.kind == "f") and classes > 1 and (indices != values).any():
            raise Unusable("mask holds values between its classes")
        if values.shape != union.shape:
            indices = cv2.resize(indices, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        union = np.maximum(union, indices)
    if seen is not None:
        if seen.shape != image_shape:
            shapes = [f"{shape[0]} x {shape[1]}" for shape in (seen.shape, image_shape)]
            raise Unusable(f"field of view measures {shapes[0]} (height x width), its image {shapes[1]}")
        union[cv2.resize(seen.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT) == 0] = NOT_JUDGED
    return png(union)


def _deep(slices: list[Measured]) -> pixels16.Deep:
    """A slab of planes in one unit. Padding becomes the darkest value that was measured."""
    if len({plane.raw_HW.shape for plane in slices}) > 1 or len({plane.inverted for plane in slices}) > 1:
        raise Unusable("the slices of a slab differ in size or polarity")
    raw = [_filled(plane) for plane in slices]
    slope, intercept = slices[0].slope, slices[0].intercept
    if any((plane.slope, plane.intercept) != (slope, intercept) for plane in slices):
        raw = [plane.slope * values + plane.intercept for plane, values in zip(slices, raw, strict=True)]
        slope, intercept = 1.0, 0.0
    stored_DHW, slope, intercept = pixels16.quantise(np.stack(raw), slope, intercept)
    low, high = min(plane.low for plane in slices), max(plane.high for plane in slices)
    return pixels16.Deep(stored_DHW, slope, intercept, low, high, slices[0].inverted)


def _filled(plane: Measured) -> np.ndarray:
    if plane.padded_HW is None or not plane.padded_HW.any():
        return plane.raw_HW
    seen = plane.raw_HW[~plane.padded_HW]
    if not seen.size:
        raise Unusable("every pixel is padding")
    dark = seen.max() if plane.inverted == (plane.slope > 0) else seen.min()
    return np.where(plane.padded_HW, dark, plane.raw_HW).astype(plane.raw_HW.dtype)


def _reduced(pixels_DHW: np.ndarray, max_side: int | None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Planes (D, H, W) or (D, H, W, 3) brought to max_side by area averaging, and their height and width before, None if they fit."""
    height, width = pixels_DHW.shape[1:3]
    if max_side is None or max(height, width) <= max_side:
        return pixels_DHW, None
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in pixels_DHW]), (height, width)


def _facts(found: Planes, span: range, before: tuple[int, int] | None, height: int, width: int) -> dict[str, Any]:
    """Where the stored pixels lie, for the sample's .json; empty for images that say nothing."""
    factor_y, factor_x = (before[0] / height, before[1] / width) if before else (1.0, 1.0)
    facts: dict[str, Any] = {}
    if found.affine is not None:
        affine = geometry.reduced(geometry.from_slice(found.affine, span.start), factor_y, factor_x)
        facts |= {"affine": np.round(affine, 6).tolist(), "spacing_mm": np.round(geometry.spacing_zyx(affine), 6).tolist()}
    elif found.spacing_yx is not None:
        facts["spacing_mm"] = [round(found.spacing_yx[0] * factor_y, 6), round(found.spacing_yx[1] * factor_x, 6)]
    if found.count > 1:
        facts |= {"slices": [span.start, span.stop], "of_slices": found.count}
    return facts | ({"remarks": list(found.remarks)} if found.remarks else {})
