"""The raw folder: which files match a card's globs, what tells a changed one from an unchanged one, and which of them a table names.

    found = files("RAW", ["images/*.png"])           # {"images/a.png": "1024@1700000000000000000"}
    Finder(found).find("a", "labels.csv, row 2")     # "images/a.png"

A glob that ends in a slash matches folders: one image in many files, such as a DICOM series. Paths are relative, with slashes.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, BinaryIO, cast

from base import storage
from base.config import digest
from base.errors import RequestError
from base.paths import is_url


def files(raw: str, patterns: Iterable[str], exclude: Sequence[str] = (), first: bool = False) -> dict[str, str]:
    """Files (or folders) below the raw folder that match a glob and none of `exclude`, by relative path, each with its stamp "size@time".

    `first`: stop at the first. In `exclude` a star goes through slashes.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = _remote(raw, pattern) if is_url(raw) else _local(raw, pattern)
        for relative, known in matches:
            if any(fnmatch.fnmatchcase(relative, shape) for shape in exclude):
                continue
            found[relative] = known or stamp(raw, relative)
            if first:
                return found
    return found


def _local(raw: str, pattern: str) -> Iterable[tuple[str, str | None]]:
    for relative in glob.iglob(pattern, root_dir=raw, recursive=True):
        path = os.path.join(raw, relative)
        # A link to nothing is named and quarantined like any image that is not there.
        if relative.endswith("/") or os.path.isfile(path) or not os.path.exists(path):
            yield relative, None


def _remote(raw: str, pattern: str) -> Iterable[tuple[str, str | None]]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(raw)
    start = len(root.rstrip("/")) + 1
    for path, info in fs.glob(f"{root.rstrip('/')}/{pattern}", detail=True).items():
        folder = info.get("type") == "directory"
        if folder == pattern.endswith("/"):
            yield (f"{path[start:].rstrip('/')}/", None) if folder else (path[start:], _remote_stamp(info))


def sizes(raw: str) -> dict[str, int]:
    """Every file below the raw folder by relative path, with its bytes; what begins with a dot is left out, with all below it."""
    found: dict[str, int] = {}
    if is_url(raw):
        import fsspec

        fs, root = fsspec.core.url_to_fs(raw)
        start = len(root.rstrip("/")) + 1
        for path, info in fs.find(root, detail=True).items():
            if info.get("type") == "file" and not any(part.startswith(".") for part in path[start:].split("/")):
                if info.get("size") is None:
                    raise RequestError(
                        "this server does not tell the sizes of its files", where=raw, hint="copy them to a disk or a bucket"
                    )
                found[path[start:]] = int(info["size"])
        return found
    for folder, folders, names in os.walk(raw):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                found[os.path.relpath(path, raw).replace(os.sep, "/")] = os.path.getsize(path)
    return found


def opened(url: str, block: int | None = None) -> BinaryIO:
    """A file to read from, local or not, which can seek. `block`: bytes that a store is asked for at once, where few of many are wanted."""
    if not is_url(url):
        return open(url, "rb")
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    return cast(BinaryIO, fs.open(path, "rb", block_size=block))


def stamp(raw: str, relative: str) -> str:
    """What changes when a file does: its size and time, of a folder those of its files; "absent" where there is none."""
    if relative.endswith("/"):
        inside = storage.listing(storage.join(raw, relative))
        return digest([[name, stamp(raw, f"{relative}{name}")] for name in inside])[:16] if inside else "absent"
    if is_url(raw):
        import fsspec

        fs, path = fsspec.core.url_to_fs(storage.join(raw, relative))
        try:
            return _remote_stamp(fs.info(path))
        except FileNotFoundError:
            return "absent"
    try:
        status = os.stat(os.path.join(raw, relative))
    except OSError:
        return "absent"
    return f"{status.st_size}@{status.st_mtime_ns}"


def _remote_stamp(info: Mapping[str, Any]) -> str:
    return f"{info.get('size')}@{info.get('ETag') or info.get('etag') or info.get('mtime') or info.get('LastModified')}"


def extension(name: str) -> str:
    """`.png`, `.nii.gz`, or nothing; a number behind a dot (as in a UID) is no extension."""
    match = re.search(r"(?<=[^/])((\.nii|\.csv|\.tar)?\.[A-Za-z][A-Za-z0-9]{0,5})$", name)
    return match.group(1) if match else ""


def bare(relative: str) -> str:
    """The relative path without its extension: what a card's patterns are searched in. A folder's name is kept whole."""
    return relative[:-1] if relative.endswith("/") else relative.removesuffix(extension(relative))


def stem(relative: str) -> str:
    """The file's name without its extension."""
    return os.path.basename(bare(relative))


def inside(path: str, where: str) -> str:
    """The path, if it stays below the raw folder. Raises RequestError."""
    if path.startswith("/") or ".." in path.split("/") or is_url(path):
        raise RequestError(f"'{path}' leads out of the raw folder", where=where)
    return path


class Finder:
    """Finds the file that a table or a list means: by its path, by the end of its path, or by its name with or without extension."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self.files = found
        self.names = (_by_ending(found, 1, str), _by_ending(found, 1, bare))

    @cached_property
    def endings(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        # Only where names repeat: the endings of two million paths take a gigabyte.
        return _by_ending(self.files, None, str), _by_ending(self.files, None, bare)

    def find(self, value: str, where: str) -> str | None:
        """The file, or None where there is none. Raises RequestError where it could be several."""
        for at in [0, *(i + 1 for i, letter in enumerate(value) if letter == "/")]:
            for path in (value[at:], f"{value[at:]}/"):
                if path in self.files:
                    return path
        name = value.rpartition("/")[2]
        for which, names in enumerate(self.names):
            found = names.get(name, [])
            if len(found) > 1:
                found = self.endings[which].get(value, [])
            if len(found) > 1:
                raise RequestError(f"'{value}' could be {' or '.join(sorted(found)[:2])}", where=where, hint="name it with its folder")
            if found:
                return found[0]
        return None


def _by_ending(found: Iterable[str], longest: int | None, shape: Callable[[str], str]) -> dict[str, list[str]]:
    """Files by the ends of their paths, of one component, two, ... up to `longest`."""
    ends: dict[str, list[str]] = defaultdict(list)
    for file in found:
        parts = shape(file).rstrip("/").split("/")
        for count in range(1, min(longest or len(parts), len(parts)) + 1):
            ends["/".join(parts[-count:])].append(file)
    return dict(ends)
