"""NIfTI: a volume as a stack of axial planes, the patient's right on the left and the front on top, from feet to head.

found = planes(data)             # .nii or .nii.gz; Planes with the affine of the stack as it is turned here
"""

from __future__ import annotations

import zlib

import numpy as np
from nibabel import Nifti1Image, Nifti2Image, as_closest_canonical
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from shards import geometry
from shards.planes import Measured, Planes, Unusable, check_size, own_range, show

GZIP = b"\x1f\x8b"
MAX_UNPACKED = 2**31  # bytes
FAULTS = (
    HeaderDataError, ImageFileError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, TypeError, ValueError,
)  # fmt: skip


def unpacked(data: bytes) -> bytes:
    """The bytes inside gzip, or the same bytes. Raises Unusable for a damaged file and for one that unfolds to more than 2 GiB."""
    if not data.startswith(GZIP):
        return data
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        plain = unpacker.decompress(data, MAX_UNPACKED)
    except zlib.error:
        raise Unusable("a damaged gzip file") from None
    if not unpacker.eof:
        raise Unusable("a truncated gzip file" if len(plain) < MAX_UNPACKED else "a gzip file that unfolds to more than 2 GiB")
    return plain


def planes(data: bytes) -> Planes:
    """The slices of a volume. Raises Unusable: damaged, not three-dimensional, in colours or complex numbers."""
    plain = unpacked(data)
    try:
        volume = (Nifti2Image if plain[4:8] == b"n+2\0" else Nifti1Image).from_bytes(plain)
        shape = tuple(n for n in volume.shape[3:] if n != 1)
        if volume.ndim < 2 or shape:
            raise Unusable(f"a NIfTI file of {volume.ndim} dimensions: one volume a file is packed")
        if volume.get_data_dtype().kind not in "iuf":
            raise Unusable("a NIfTI file of colours or complex numbers")
        volume = volume.slicer[..., *([0] * (volume.ndim - 3))] if volume.ndim > 3 else volume
        if volume.ndim == 2:
            volume = type(volume)(np.asanyarray(volume.dataobj)[..., None], volume.affine)
        turned = as_closest_canonical(volume)
        values_XYZ = np.asanyarray(turned.dataobj)
    except FAULTS as error:
        raise Unusable(f"a NIfTI file that does not decode ({type(error).__name__})") from None
    columns, rows, count = values_XYZ.shape
    check_size(columns, rows)
    raw_DHW = values_XYZ[::-1, ::-1].transpose(2, 1, 0)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = columns - 1, rows - 1
    affine = turned.affine @ flip
    lost_DHW = None if raw_DHW.dtype.kind != "f" or np.isfinite(raw_DHW).all() else ~np.isfinite(raw_DHW)
    low, high = own_range(raw_DHW, lost_DHW)

    def measured(i: int) -> Measured:
        lost_HW = None if lost_DHW is None else lost_DHW[i]
        raw_HW = raw_DHW[i] if lost_HW is None else np.where(lost_HW, low, raw_DHW[i])
        return Measured(np.ascontiguousarray(raw_HW), 1.0, 0.0, low, high, padded_HW=lost_HW)

    _, row_mm, column_mm = geometry.spacing_zyx(affine)
    return Planes(count, shown=lambda i: show(measured(i)), measured=measured, affine=affine, spacing_yx=(row_mm, column_mm))
