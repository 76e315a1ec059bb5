"""The node's copies of shards: whole files, checked by sha256, shared by all ranks and workers, the least recently used removed first.

    path = local("s3://bucket/shards/x/x-train-00000.tar", entry.sha256, entry.bytes, cache_dir)

A shard is fetched once a node: a lock file per shard (flock) makes the others wait, the copy is written beside its place and renamed, and
nothing is named by the place it came from but by its sha256, so that a dataset packed twice or mirrored elsewhere is one copy. fsspec's
own caches are not used: they hand out half-written files to concurrent readers (fsspec/filesystem_spec issue 639).

A local shard is used in place. Its size is compared here and every part that is read with its crc32 (shards.corpus): to hash it whole in
each process would read all data twice.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from base import storage
from base.errors import RequestError, WorkError
from base.paths import is_url

ATTEMPTS = 3  # at other bytes than the manifest's; storage repeats what fails on the way
_SHARE = 0.5  # of the file system, where ALLOGRAFT_CACHE_GB does not say
_STALE_S = 86_400.0  # what a killed process left half-written


def default_dir() -> str:
    """$ALLOGRAFT_CACHE, else `~/.cache/allograft/shards`."""
    return os.environ.get("ALLOGRAFT_CACHE") or str(Path.home() / ".cache" / "allograft" / "shards")


def limit_bytes(folder: str) -> int:
    """How large the cache may grow: $ALLOGRAFT_CACHE_GB, else half of its file system. Raises RequestError when it is not a number."""
    given = os.environ.get("ALLOGRAFT_CACHE_GB")
    if not given:
        return int(shutil.disk_usage(folder).total * _SHARE)
    try:
        return int(float(given) * 1e9)
    except ValueError:
        raise RequestError(f"expected a number of gigabytes, got {given!r}", where="ALLOGRAFT_CACHE_GB") from None


def local(shard_url: str, sha256: str, size: int | None, cache_dir: str | None = None) -> str:
    """Local path of a file that its sha256 names: a shard, or its index.

    Args:
        size: bytes, where the manifest says.
    Raises:
        WorkError: naming the file: it is missing, its size or its sha256 differs (after ATTEMPTS fetches), or the disk is full.
    """
    if not is_url(shard_url):
        return _in_place(shard_url, size)
    path = _place(shard_url, sha256, cache_dir)
    if os.path.exists(path):
        with suppress(FileNotFoundError, PermissionError):
            os.utime(path)  # the time of last use, by which `evict` goes
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(path):
        if not os.path.exists(path):
            _write(path, _fetch(shard_url, sha256))
            evict(cache_dir or default_dir(), keep=path)
    return path


def renew(shard_url: str, sha256: str, inode: int, cache_dir: str | None = None) -> bool:
    """Compare a copy whose parts do not fit their checksums with its sha256; if it differs, fetch it again. True when it was fetched, by
    this process or since `inode` was opened by another: then it is to be opened again.

    A local shard is nobody's copy: False. Raises as `local`.
    """
    if not is_url(shard_url):
        return False
    path = _place(shard_url, sha256, cache_dir)
    with locked(path):
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return os.fstat(file.fileno()).st_ino != inode
        _write(path, _fetch(shard_url, sha256))
    return True


@contextmanager
def locked(path: str) -> Iterator[None]:
    """One process of the node at a time holds `<path>.lock`; a killed one lets go."""
    with open(path + ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_once(folder: Path, write: Callable[[Path], None], what: str) -> None:
    """Make `<cache>/<kind>/<key>/` unless it stands: written beside its place by one process of the node, renamed, and room made for it.

    Args:
        write: fills the folder that it is given.
        what: that is made, for the error.
    Raises:
        WorkError: no space left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(str(folder)):
        if folder.is_dir():
            return
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        try:
            write(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise WorkError(f"no space left for {what}", where=str(folder), hint="free some space or set ALLOGRAFT_CACHE") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        evict(str(folder.parent.parent), keep=str(folder))


def evict(folder: str, keep: str) -> None:
    """Remove what was used least recently until the cache is within its limit. What a process has open stays readable to it.

    Args:
        folder: the cache. An entry is a file `??/<sha256>.*` or a folder `<kind>/<key>`.
        keep: the entry that was just written.
    """
    limit = limit_bytes(folder)
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= limit:
            break
        if path != keep:
            with suppress(FileNotFoundError):  # another process may be removing it too
                discard(path) if os.path.isdir(path) else os.remove(path)
            total -= size


def discard(folder: str) -> None:
    """Remove an entry that is a folder: out of its place at once, so that a removal cut short leaves nothing that looks whole."""
    aside = tempfile.mkdtemp(prefix=".tmp-", dir=os.path.dirname(folder))
    try:
        os.rename(folder, os.path.join(aside, "gone"))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _entries(folder: str) -> Iterator[tuple[float, int, str]]:
    """Last use (seconds), bytes and path of what is cached; what was left half-written long ago is removed on the way."""
    for group in os.scandir(folder):
        for entry in os.scandir(group.path) if group.is_dir() else ():
            with suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.startswith(".tmp-"):
                    if time.time() - stat.st_mtime > _STALE_S:
                        shutil.rmtree(entry.path) if entry.is_dir() else os.remove(entry.path)
                elif entry.is_dir():
                    yield stat.st_mtime, sum(file.stat().st_size for file in os.scandir(entry.path)), entry.path
                elif not entry.name.endswith(".lock"):
                    yield stat.st_mtime, stat.st_size, entry.path


def _place(shard_url: str, sha256: str, cache_dir: str | None) -> str:
    return os.path.join(cache_dir or default_dir(), sha256[:2], sha256 + os.path.splitext(shard_url)[1])


def _in_place(path: str, size: int | None) -> str:
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise _missing(path) from None
    if size is not None and found != size:
        raise WorkError(f"the shard is damaged: {found} bytes where the manifest says {size}", where=path, hint="pack the dataset again")
    return path


def _fetch(shard_url: str, sha256: str) -> bytes:
    """The whole file in one request: measured faster than reading an object in blocks, and range requests per sample far slower."""
    found = ""
    for _ in range(ATTEMPTS):
        try:
            data = storage.read_bytes(shard_url)
        except FileNotFoundError:
            raise _missing(shard_url) from None
        except OSError as error:
            raise WorkError(f"cannot fetch the shard: {error}", where=shard_url, hint="run the same command again") from error
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise WorkError(
        f"the shard is damaged: sha256 {found[:12]} where the manifest says {sha256[:12]}", where=shard_url, hint="pack the dataset again"
    )


def _write(path: str, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        hint = "free some space, or set ALLOGRAFT_CACHE or ALLOGRAFT_CACHE_GB"
        raise WorkError("no space left for the shard cache", where=path, hint=hint) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _missing(shard_url: str) -> WorkError:
    return WorkError("the shard is missing, though its manifest names it", where=shard_url, hint="pack the dataset again")
