"""Images that lie in files of many: the arrays of an .npz (as MedMNIST releases them), the members of WebDataset tars.

    for found in npz("RAW", "chestmnist_224.npz", card): found.file, found.inside, found.labels, found.part
    data = read("RAW", inside, stamp)                    # the bytes of one image file; a row of an array comes as PNG, a volume as TIFF

An .npz holds `train_images` (N, H, W), (N, H, W, 3) or volumes (N, D, H, W), and `train_labels` (N, 1) or (N, L), likewise val and test.
A tar's sample has an image and, beside it, `.cls` with the number (or name) of its class, or its path tells the label.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from base import storage
from base.errors import RequestError, WorkError
from shards import cells
from shards.card import SPLITS, Card, Part
from shards.planes import Unusable
from shards.raster import pages, png
from shards.rawfiles import inside as inside_folder
from shards.rawfiles import opened

PICTURES = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "dcm", "webp", "ppm")


@dataclass(frozen=True)
class Inside:
    """Where an image lies: bytes [start, start + length) of a tar, or row `start` of the array `array` of an .npz."""

    container: str
    start: int
    length: int = 0
    array: str | None = None


@dataclass(frozen=True)
class Found:
    """An image in a container. `file` is its path as if the container were a folder. `labels` None: its path may tell them."""

    file: str
    inside: Inside
    labels: dict[str, cells.Label] | None
    part: Part | None


def npz(raw: str, name: str, card: Card) -> Iterator[Found]:
    """The images of an .npz, split by split. Raises RequestError for a damaged file, other arrays, labels out of range."""
    url = storage.join(raw, name)
    try:
        with opened(url) as stream, np.load(stream, allow_pickle=False) as arrays:
            splits = [split for split in SPLITS if f"{split}_images" in arrays.files]
            if not splits:
                raise RequestError(
                    "holds no train_images, val_images or test_images", where=url, hint=f"it holds {', '.join(arrays.files)}"
                )
            for split in splits:
                count = _Array(url, f"{split}_images").shape[0]
                labels = arrays[f"{split}_labels"] if f"{split}_labels" in arrays.files else None
                if labels is not None and len(labels) != count:
                    raise RequestError(f"{count} {split}_images, {len(labels)} {split}_labels", where=url)
                for i in range(count):
                    where = f"{url}: {split}_labels, row {i}"
                    known = None if labels is None or card.kind == "unlabelled" else _whole(labels[i], where)
                    numbers = None if known is None else cells.of_numbers(card, known, where)
                    place = Inside(name, i, array=f"{split}_images")
                    yield Found(f"{name}/{split}/{i:07d}", place, numbers, split)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        # numpy's second sentence tells how to load the file unsafely.
        raise RequestError(f"not an .npz of images and labels: {str(error).partition('. ')[0]}", where=url) from None


def _whole(labels: np.ndarray, where: str) -> list[int]:
    """The numbers of a row. Raises RequestError where one is not whole."""
    for number in labels.reshape(-1).tolist():
        if not float(number).is_integer():
            raise RequestError(f"{number} is not a whole number", where=where)
    return [int(number) for number in labels.reshape(-1).tolist()]


def tar(raw: str, name: str, card: Card) -> Iterator[Found]:
    """The samples of a WebDataset tar. Raises RequestError for a damaged tar, members that lead out of it, equal names, unknown classes."""
    url = storage.join(raw, name)
    pictures: dict[str, tuple[str, Inside]] = {}
    classes: dict[str, str] = {}
    try:
        with opened(url) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                path = inside_folder(member.name.removeprefix("./"), url)
                if member.isdir():
                    continue
                if not member.isfile():
                    raise RequestError(f"'{path}' is a link or device, not a file", where=url)
                folder, _, base = path.rpartition("/")
                key, _, extension = base.partition(".")
                key = f"{folder}/{key}" if folder else key
                if extension.lower() in PICTURES:
                    if key in pictures:
                        raise RequestError(f"two images are named '{key}'", where=url)
                    pictures[key] = path, Inside(name, member.offset_data, member.size)
                elif extension == "cls":
                    source = archive.extractfile(member)
                    classes[key] = source.read().decode("utf-8", "replace").strip() if source else ""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RequestError(f"not a tar, or cut short: {error}", where=url) from None
    for key, (path, place) in pictures.items():
        labels = None
        if key in classes and card.kind != "unlabelled":
            number = classes[key]
            where = f"{url}: {key}.cls"
            by_name = number in card.labels or not number.lstrip("-").isdigit()
            labels = cells.named(card, card.layouts[0], number, where) if by_name else cells.of_numbers(card, [int(number)], where)
        yield Found(f"{name}/{path}", place, labels, None)


def read(raw: str, inside: Inside, stamp: str, slices: bool = False) -> bytes:
    """The bytes of an image file in a container; a row of an array as PNG, with `slices` a volume's as the pages of a TIFF.

    `stamp` tells a changed container.

    Raises:
        Unusable: this image is none.
        WorkError: the container as a whole is damaged, or gone: none of its images can be believed.
    """
    url = storage.join(raw, inside.container)
    try:
        if inside.array is None:
            with opened(url, max(1, inside.length)) as stream:  # s3fs would read 50 MB ahead of each image
                stream.seek(inside.start)
                data: bytes = stream.read(inside.length)
            return data
        array = _array(url, inside.array, stamp)
        shape = array.shape[1:]
        volume = len(shape) == 3 and shape[2] not in (1, 3)
        if array.dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or (volume and not slices):
            why = "is no image" + (", but perhaps slices: frames: slab, or each" if volume else "")
            raise Unusable(f"a row of {array.dtype} {shape} {why}")
        pixels = array.row(inside.start)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise WorkError(f"cannot be read: {error}", where=url, hint="fetch the file again, then pack again") from error
    if volume:
        return pages(pixels)
    return png(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


class _Array:
    """An array of an .npz read row by row: unpacking the largest whole takes 14 GB. Rows in rising order are read once through."""

    def __init__(self, url: str, name: str) -> None:
        self._zip = zipfile.ZipFile(opened(url))
        self._stream = self._zip.open(f"{name}.npy")
        version = np.lib.format.read_magic(self._stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = read_header(self._stream)
        if fortran:
            raise ValueError(f"{name} is in Fortran order")
        self._start = self._stream.tell()

    def row(self, i: int) -> np.ndarray:
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._stream.seek(self._start + i * size)
        data = self._stream.read(size)
        if len(data) != size:
            raise Unusable("the array ends before this row")
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])


@lru_cache(maxsize=2)
def _array(url: str, name: str, stamp: str) -> _Array:
    return _Array(url, name)
