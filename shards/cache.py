"""Local copies of shards, one set a node: whole files, checked by sha256, shared by all ranks and workers.

    path = local("s3://bucket/shards/x/x-train-00000.tar", sha256, cache_dir)

A shard is fetched once a node: a lock file per shard (flock) makes the others wait, the copy is written beside its place and renamed, and
nothing is named by the place it came from but by its sha256, so that a dataset packed twice or mirrored elsewhere is one copy. A local path
is used in place and checked once a process. fsspec's own caches are not used: they hand out half-written files to concurrent readers
(fsspec/filesystem_spec issue 639).
"""

import errno
import fcntl
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

from base import storage
from base.errors import WorkError
from base.paths import is_url

ATTEMPTS = 3
_BLOCK = 1 << 20
_verified: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime in ns) -> sha256, of local shards used in place


def default_dir() -> str:
    """$ALLOGRAFT_CACHE, else `~/.cache/allograft/shards`."""
    return os.environ.get("ALLOGRAFT_CACHE") or str(Path.home() / ".cache" / "allograft" / "shards")


def local(shard_url: str, sha256: str, cache_dir: str | None = None) -> str:
    """Local path of the shard (or of any file named by its sha256, the index too).

    Raises:
        WorkError: naming the shard: it is missing, its sha256 differs after ATTEMPTS fetches, or the disk is full.
    """
    if not is_url(shard_url):
        return _in_place(shard_url, sha256)
    folder = cache_dir or default_dir()
    path = os.path.join(folder, sha256[:2], sha256 + os.path.splitext(shard_url)[1])
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, a killed process included
        if not os.path.exists(path):
            _write(path, _fetch(shard_url, sha256))
    return path


def _in_place(path: str, sha256: str) -> str:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise _missing(path) from None
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _verified:
        seen = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                seen.update(block)
        _verified[key] = seen.hexdigest()
    if _verified[key] != sha256:
        raise _differs(path, _verified[key], sha256)
    return path


def _fetch(shard_url: str, sha256: str) -> bytes:
    """The whole shard in one request: measured faster than reading an object in blocks, and range requests per sample far slower."""
    problem = WorkError("not fetched", where=shard_url)
    for attempt in range(ATTEMPTS):
        if attempt:
            # Jitter only spreads the load of many nodes; it decides nothing that is computed.
            time.sleep(random.uniform(0.5, 1.0) * 0.5 * 2**attempt)
        try:
            data = storage.read_bytes(shard_url)
        except FileNotFoundError:
            raise _missing(shard_url) from None
        except (OSError, WorkError) as error:
            problem = WorkError(f"cannot fetch the shard: {error}", where=shard_url, hint="run the same command again")
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
        problem = _differs(shard_url, found, sha256)
    raise problem


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
        raise WorkError("no space left for the shard cache", where=path, hint="free some space or set ALLOGRAFT_CACHE") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _missing(shard_url: str) -> WorkError:
    return WorkError("the shard is missing, though its manifest names it", where=shard_url, hint="pack the dataset again")


def _differs(shard_url: str, found: str, expected: str) -> WorkError:
    return WorkError(
        f"the shard is damaged: sha256 {found[:12]} where the manifest says {expected[:12]}", where=shard_url, hint="pack the dataset again"
    )
