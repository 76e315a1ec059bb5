"""What a file is, by its first bytes; no name is believed. Packing and the survey ask here, so that they never differ.

format_of(data[:HEAD])         # "png"; "nifti" also of a gzipped one; None for a file of another kind
"""

from __future__ import annotations

import zlib

HEAD = 4096  # bytes that decide
IMAGES = ("jpeg", "png", "tiff", "gif", "bmp", "dicom", "nifti")
DAMAGED_GZIP = "damaged gzip"
_MAGIC = (
    (128, b"DICM", "dicom"),  # first: the 128 free bytes before it may begin like anything
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (344, b"n+1\x00", "nifti"),
    (4, b"n+2\x00", "nifti"),
    (257, b"ustar", "tar"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"%PDF", "pdf"),
)
# A data set without a preamble begins with an element of group 2 or 8, in either byte order.
_BARE_DICOM = tuple(start for group in (2, 8) for n in range(0x20) for start in (bytes([group, 0, n, 0]), bytes([0, group, 0, n])))


def format_of(head: bytes) -> str | None:
    """One of IMAGES, tar, zip, npy, pdf, gzip (of anything but NIfTI), DAMAGED_GZIP, or None."""
    if head.startswith(b"\x1f\x8b"):
        try:
            inner = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head[:HEAD], 1024)
        except zlib.error:
            return DAMAGED_GZIP
        return "nifti" if _known(inner) == "nifti" else "gzip"
    return _known(head) or ("dicom" if head.startswith(_BARE_DICOM) else None)


def _known(head: bytes) -> str | None:
    return next((name for at, magic, name in _MAGIC if head[at : at + len(magic)] == magic), None)
