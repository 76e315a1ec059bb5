"""Reading and writing anywhere fsspec reaches, so that nothing half-written is ever trusted.

Locally a file is written beside its place and renamed into it; an object store's PUT is atomic by itself. A folder is complete
when the file named last stands in it. Requests to an object store that fail for the moment (throttled, stalled, cut off) are sent again.
"""

import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from base.errors import WorkError
from base.paths import is_url

COMMIT = "COMMIT"
T = TypeVar("T")


ATTEMPTS = 6
SILENCE_S = 15.0  # a store that sends no byte for so long has stalled
_FIRST_PAUSE_S = 0.25  # doubled at each attempt: 8 s in all


def _fs(url: str) -> tuple[Any, str]:
    # Looked up at each call and never kept: an s3fs instance carried into a forked child does not work there. fsspec caches by process.
    import fsspec

    if not url.startswith("s3://"):
        return fsspec.core.url_to_fs(url)
    # `_ask` is the only one to repeat: botocore and s3fs would each multiply its attempts, and s3fs pauses without jitter.
    config = {"read_timeout": SILENCE_S, "connect_timeout": SILENCE_S, "retries": {"total_max_attempts": 1}}
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, config_kwargs=config)
    fs.retries = 1
    return fs, path


def _ask(act: Callable[[], T], url: str) -> T:
    """A request to an object store, again while it fails for the moment; what its client cannot send becomes one line."""
    attempts = 0
    while True:
        try:
            return act()
        except Exception as error:
            attempts += 1
            momentary = _is_momentary(error)
            if momentary and attempts < ATTEMPTS:
                # Jitter spreads the load of many nodes; it decides nothing that is computed.
                time.sleep(random.uniform(0.5, 1.0) * _FIRST_PAUSE_S * 2 ** (attempts - 1))
                continue
            # The client is only loaded for URLs that need it, so its exceptions are known by where they come from.
            if not momentary and type(error).__module__.partition(".")[0] != "botocore":
                raise
            hint = "check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise WorkError(f"the object store cannot be used: {error}", where=url, hint=hint) from error


def _patience(fs: Any, size: int) -> dict[str, float]:
    """How long a write may take, s. A store that drops the connection while the client waits for its leave to send leaves it waiting for
    ever: the read timeout does not count there."""
    return {"timeout": 4 * SILENCE_S + size / 1e6} if fs.async_impl else {}


def _is_momentary(error: Exception) -> bool:
    """Throttled (503, 429), broken inside (500), silent, cut off or falsified: the same request may work in a moment."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    room = type(error).__module__.partition(".")[0]
    if room == "aiohttp":
        return True
    if room == "botocore":
        from botocore import exceptions, parsers

        broken = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, parsers.ResponseParserError)
        return isinstance(error, (*broken, exceptions.FlexibleChecksumError))  # the last: other bytes than the store's own checksum says
    return isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO)


def _guard(act: Callable[[], T], url: str) -> T:
    try:
        return _ask(act, url) if is_url(url) else act()
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        if not is_url(url):
            raise
        raise WorkError(f"cannot be written: {error}", where=url, hint="make the bucket first") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError("no space left on the device", where=url, hint="free some space and run the same command again") from error
        if isinstance(error, PermissionError) and not isinstance(error, FileNotFoundError):
            raise WorkError(f"not allowed to write ({error.strerror or error})", where=url) from error
        raise


def join(url: str, *parts: str) -> str:
    """`url` and the parts below it."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(url: str) -> bool:
    """True when a file or folder stands there."""
    if not is_url(url):
        return os.path.exists(url)
    fs, path = _fs(url)
    return _ask(lambda: bool(fs.exists(path)), url)


def listing(url: str) -> list[str]:
    """Names directly below a folder, sorted; empty when there is no such folder. Files being written are left out."""
    if not is_url(url):
        found = os.listdir(url) if os.path.isdir(url) else []
    else:
        fs, path = _fs(url)
        try:
            entries = _ask(lambda: fs.ls(path, detail=False), url)
            found = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path.rstrip("/")]
        except FileNotFoundError:
            found = []
    return sorted(name for name in found if not name.startswith(".tmp-"))


def holding(url: str, name: str) -> list[str]:
    """Names of the folders directly below a folder in which a file of that name stands, sorted. Of a store all is listed at once, since
    asking for each would take its time."""
    if not is_url(url):
        return [folder for folder in listing(url) if os.path.exists(join(url, folder, name))]
    fs, path = _fs(url)
    found = _ask(lambda: fs.find(path), url)
    parts = [file.rstrip("/").rsplit("/", 2) for file in found]
    return sorted(
        folder for above, folder, file in (part for part in parts if len(part) == 3) if file == name and above == path.rstrip("/")
    )


def read_bytes(url: str) -> bytes:
    """All bytes of a file; FileNotFoundError when there is none."""
    if not is_url(url):
        return Path(url).read_bytes()
    fs, path = _fs(url)
    # Without this s3fs asks for the size first, a round trip more, and fetches what is large in ranges.
    whole = {"max_concurrency": 1} if url.startswith("s3://") else {}
    return _ask(lambda: bytes(fs.cat_file(path, **whole)), url)


def read_json(url: str) -> Any:
    """A JSON file as plain data."""
    return json.loads(read_bytes(url))


def read_yaml(url: str) -> Any:
    """A YAML file as plain data."""
    return from_yaml(read_bytes(url))


def from_yaml(data: bytes) -> Any:
    """YAML as plain data, by libyaml, which is several times as fast: a study has thousands of these files."""
    import yaml

    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def read_or_none(url: str) -> bytes | None:
    """A file's bytes if it stands: one request where asking first would be two."""
    try:
        return read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_rows(url: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, see `rows`; no file, no rows."""
    return rows(read_or_none(url) or b"")


def parsed(data: bytes) -> Any:
    """JSON, by the faster parser. Raises ValueError."""
    try:
        return from_json(data)
    except ValueError:
        return json.loads(data)  # names of files that are no UTF-8 are lone surrogates, which the other refuses


def rows(data: bytes) -> list[dict[str, Any]]:
    """The objects of JSON lines; a last line that is still being written is left out."""
    found = []
    for line in data.splitlines():
        try:
            row = parsed(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def put(url: str, data: bytes | str) -> None:
    """Write a file whole or not at all.

    Raises:
        WorkError: the disk is full, or writing is not allowed.
    """
    raw = data.encode() if isinstance(data, str) else data
    if is_url(url):
        fs, path = _fs(url)
        _guard(lambda: fs.pipe_file(path, raw, **_patience(fs, len(raw))), url)
        return
    _guard(lambda: _write_and_rename(url, lambda temporary: Path(temporary).write_bytes(raw)), url)


def create(url: str, data: str) -> bool:
    """Write a file only if none stands there; False when one does. What a lock is made with."""
    if is_url(url):
        fs, path = _fs(url)
        try:
            _guard(lambda: fs.pipe_file(path, data.encode(), mode="create", **_patience(fs, len(data))), url)
        except FileExistsError:
            # An answer may have been lost on its way back, and the request repeated: then what stands there is our own.
            return read_bytes(url) == data.encode()
        return True
    _make_folder(os.path.dirname(url))
    try:
        handle = os.open(url, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        _guard(lambda: file.write(data), url)
    return True


def put_file(local: str | Path, url: str) -> None:
    """Copy a local file to its place, whole or not at all."""
    if is_url(url):
        fs, path = _fs(url)
        _guard(lambda: fs.put_file(str(local), path, **_patience(fs, os.path.getsize(local))), url)
        return
    _guard(lambda: _write_and_rename(url, lambda temporary: shutil.copyfile(local, temporary)), url)


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise WorkError(f"no folder can be made here ({error.strerror})", where=folder) from error


def _write_and_rename(target: str, write: Callable[[str], object]) -> None:
    folder = os.path.dirname(target)
    _make_folder(folder)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def put_dir(local: str | Path, url: str, last: Sequence[str] = ()) -> None:
    """Copy a folder's files; those named in `last` go last and in that order, so that they can serve as the mark of completeness."""
    root = Path(local)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    for name in [name for name in files if name not in last] + [name for name in last if name in files]:
        put_file(root / name, join(url, name))


def get_file(url: str, local: str | Path) -> None:
    """Copy a file to a local place, whole or not at all; FileNotFoundError when there is none."""
    if is_url(url):
        fs, path = _fs(url)
        _write_and_rename(os.path.abspath(local), lambda temporary: _ask(lambda: fs.get_file(path, temporary), url))
    else:
        _write_and_rename(os.path.abspath(local), lambda temporary: shutil.copyfile(url, temporary))


def get_dir(url: str, local: str | Path) -> None:
    """Copy a folder's files to a local folder."""
    if is_url(url):
        fs, path = _fs(url)
        for found in _ask(lambda: fs.find(path), url):
            get_file(join(url, found[len(path) :]), Path(local) / found[len(path) :].lstrip("/"))
    else:
        for file in Path(url).rglob("*"):
            if file.is_file() and not file.name.startswith(".tmp-"):
                get_file(str(file), Path(local) / file.relative_to(url))


def remove(url: str) -> None:
    """Remove a file or a folder with all below it; nothing happens when there is none, or when others remove it at the same time."""
    if is_url(url):
        fs, path = _fs(url)
        with suppress(FileNotFoundError):
            _ask(lambda: fs.rm(path, recursive=True), url)
    elif os.path.isdir(url):
        shutil.rmtree(url, ignore_errors=True)
    else:
        Path(url).unlink(missing_ok=True)
