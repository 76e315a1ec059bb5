"""An open shard: its rows, which stay in the page cache that all processes of the node share, and the bytes that they point to.

    shard = opened(entry, url, cache_dir)          # from the table of what this process has open
    row = shard.row(17)
    jpeg = shard.read(row.image_off, row.image_len)

Index and tar are mapped, never loaded: a loader over ten million samples holds only the pages it reads from, and no sample is copied.
"""

import hashlib
import mmap
import os
import resource
import struct
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache as cached
from typing import NamedTuple

import numpy as np

from base import storage
from base.errors import WorkError
from shards import cache
from shards.manifest import INDEX_DTYPE, Elsewhere, ShardEntry, dump_index


class Row(NamedTuple):
    """A row of the index as plain numbers, in the order of manifest.INDEX_DTYPE."""

    key: bytes
    patient: bytes
    image_off: int
    image_len: int
    image_crc: int
    json_off: int
    json_len: int
    json_crc: int
    seg_off: int
    seg_len: int
    seg_crc: int
    ext: int


_ROW = struct.Struct("<20s16s" + 3 * "qqI" + "B")
_unpack, _make_row = _ROW.unpack_from, Row._make
assert _ROW.size == INDEX_DTYPE.itemsize
assert Row._fields == INDEX_DTYPE.names


class ShardFile:
    """One shard: its index, and its tar, which is mapped when first read. Raises WorkError where one is missing or not the manifest's."""

    def __init__(self, entry: ShardEntry, url: str, cache_dir: str | None) -> None:
        self._entry, self._url, self._cache_dir = entry, url, cache_dir
        self.tar: _Mapped | None = None
        self.images: _Mapped | None = None
        self._index, self._first = _map_index(entry, storage.join(url, f"{entry.name}.idx"), cache_dir)

    def row(self, n: int) -> Row:
        """Row n: some ten times as fast as an element of a structured array. Short names end in zeros."""
        return _make_row(_unpack(self._index, self._first + n * _ROW.size))

    def rows(self) -> np.ndarray:
        """All rows, N of INDEX_DTYPE, without a copy."""
        return np.frombuffer(self._index, INDEX_DTYPE, offset=self._first)

    def parts(self, spans: Sequence[tuple[str, int, int, int]]) -> dict[str, memoryview]:
        """The named parts (name, offset, length, checksum), without a copy; they lie side by side, an image elsewhere by itself."""
        parts: dict[str, memoryview] = {}
        for name, offset, length, _ in spans:
            if name == "image" and self._entry.images is not None:
                parts[name] = self._elsewhere(self._entry.images, offset, length)
            else:
                parts[name] = self.read(offset, length)
        return parts

    def _elsewhere(self, images: Elsewhere, offset: int, length: int) -> memoryview:
        if self.images is None:
            self.images = _Mapped(images.url, _open(images.url, images.sha256, images.bytes, self._cache_dir))
        return self.images.read(offset, length)

    def read(self, offset: int, length: int) -> memoryview:
        """That part of the tar, which stays in the page cache; shorter only at the tar's end. Raises WorkError where the tar was cut."""
        if self.tar is None:
            url = storage.join(self._url, f"{self._entry.name}.tar")
            self.tar = _Mapped(url, _open(url, self._entry.sha256, self._entry.bytes, self._cache_dir))
        return self.tar.read(offset, length)


class _Mapped:
    """A file in the address space: a read costs no system call and no copy. Takes the descriptor."""

    def __init__(self, url: str, file: int) -> None:
        self._url, self.inode = url, os.fstat(file).st_ino
        try:
            self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(file)
        self._view, self._bytes = memoryview(self._map), len(self._map)

    def read(self, offset: int, length: int) -> memoryview:
        # A page that a shorter file has lost ends the process by a signal, and nobody would know which file it was.
        if self._map.size() < self._bytes:
            raise WorkError(f"the file was cut from {self._bytes} to {self._map.size()} bytes while it was in use", where=self._url)
        return self._view[offset : offset + length]


def _open(url: str, sha256: str, size: int | None, cache_dir: str | None) -> int:
    while True:
        try:
            return os.open(cache.local(url, sha256, size, cache_dir), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed from the cache in between, to make room for others
            continue


def _map_index(entry: ShardEntry, url: str, cache_dir: str | None) -> tuple[mmap.mmap, int]:
    """The mapped index, checked, and where its rows begin."""
    header = _header(entry.samples)
    while True:
        file = _open(url, entry.index_sha256, len(header) + entry.samples * _ROW.size, cache_dir)
        try:
            mapped, inode = mmap.mmap(file, 0, access=mmap.ACCESS_READ), os.fstat(file).st_ino
        finally:
            os.close(file)
        if hashlib.sha256(mapped).hexdigest() == entry.index_sha256:
            break
        if not cache.renew(url, entry.index_sha256, inode, cache_dir):
            raise WorkError("the index is damaged, or that of another shard", where=url, hint="pack the dataset again")
    if mapped[: len(header)] != header:
        raise WorkError(f"not an index of this version with {entry.samples} rows", where=url, hint="pack the dataset again")
    return mapped, len(header)


@cached
def _header(samples: int) -> bytes:
    """How an index of that many rows begins."""
    whole = dump_index(np.zeros(samples, INDEX_DTYPE))
    return whole[: len(whole) - samples * _ROW.size]


_opened: OrderedDict[tuple[str, str, str, str | None], ShardFile] = OrderedDict()


def opened(entry: ShardEntry, url: str, cache_dir: str | None) -> ShardFile:
    """The shard `entry` of the packed dataset at `url`. One table a process for all datasets; what was used least recently is closed."""
    key = (url, entry.name, entry.sha256, cache_dir)
    if key not in _opened:
        _opened[key] = ShardFile(entry, url, cache_dir)
        if len(_opened) > _most_open():
            _opened.popitem(last=False)
    _opened.move_to_end(key)
    return _opened[key]


def renewed(entry: ShardEntry, url: str, cache_dir: str | None) -> bool:
    """Whether the shard was fetched again because its local copy is not what was fetched (see cache.renew); then it is opened anew."""
    held = _opened[url, entry.name, entry.sha256, cache_dir]
    tars = [(storage.join(url, f"{entry.name}.tar"), entry.sha256, held.tar)]
    tars += [(entry.images.url, entry.images.sha256, held.images)] if entry.images else []
    fetched = [cache.renew(place, sha256, mapped.inode, cache_dir) for place, sha256, mapped in tars if mapped is not None]
    if not any(fetched):
        return False
    del _opened[url, entry.name, entry.sha256, cache_dir]
    return True


def forget() -> None:
    """Close all that is open."""
    _opened.clear()


@cached
def _most_open() -> int:
    """Each takes two descriptors (every mapping keeps one of its own); half of them are left to others. 16 lanes walk 128 shards."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 1024)
