"""The node's copies of shards: fetched once, checked, whole."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import fsspec
import pytest
from tiny_corpus import write

from base.errors import WorkError
from shards import cache
from shards.corpus import Corpus


def _fill(url: str, sha256: str, folder: str, results: "multiprocessing.Queue[tuple[str, str]]") -> None:
    path = cache.local(url, sha256, folder)
    results.put((path, hashlib.sha256(Path(path).read_bytes()).hexdigest()))


def test_four_processes_fetch_a_shard_once(tmp_path: Path) -> None:
    data = os.urandom(20 << 20)
    (tmp_path / "x.tar").write_bytes(data)
    sha256, folder = hashlib.sha256(data).hexdigest(), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[str, str]] = context.Queue()
    workers = [context.Process(target=_fill, args=(f"file://{tmp_path}/x.tar", sha256, str(folder), results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {(str(folder / sha256[:2] / f"{sha256}.tar"), sha256)}
    assert sorted(path.suffix for path in folder.rglob("*") if path.is_file()) == [".lock", ".tar"]
    stamp = os.stat(next(iter(found))[0]).st_ino
    cache.local(f"file://{tmp_path}/x.tar", sha256, str(folder))
    assert os.stat(next(iter(found))[0]).st_ino == stamp


def test_a_wrong_download_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "x.tar").write_bytes(b"other bytes")
    sha256, folder = hashlib.sha256(b"bytes").hexdigest(), tmp_path / "cache"
    with pytest.raises(WorkError, match=r"x\.tar: the shard is damaged") as caught:
        cache.local(f"file://{tmp_path}/x.tar", sha256, str(folder))
    assert sha256[:12] in str(caught.value)
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".lock"]
    (tmp_path / "x.tar").write_bytes(b"bytes")  # mended: the next attempt works
    assert Path(cache.local(f"file://{tmp_path}/x.tar", sha256, str(folder))).read_bytes() == b"bytes"


def test_a_download_that_was_cut_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers: list[object] = [ConnectionResetError("cut"), b"byt", b"bytes"]

    def read(url: str) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, bytes)
        return answer

    monkeypatch.setattr("base.storage.read_bytes", read)
    path = cache.local("s3://bucket/x.tar", hashlib.sha256(b"bytes").hexdigest(), str(tmp_path))
    assert Path(path).read_bytes() == b"bytes"
    assert not answers


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/gone.tar", f"file://{tmp_path}/gone.tar"):
        with pytest.raises(WorkError, match=r"gone\.tar: the shard is missing"):
            cache.local(url, "0" * 64, str(tmp_path / "cache"))


def test_a_local_shard_is_used_in_place_and_checked_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"bytes")
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    assert cache.local(str(path), sha256, str(tmp_path / "cache")) == str(path)
    assert not (tmp_path / "cache").exists()
    path.write_bytes(b"changed")
    with pytest.raises(WorkError, match="damaged"):
        cache.local(str(path), sha256)


def test_a_corpus_is_read_from_any_url(tmp_path: Path) -> None:
    folder = write(tmp_path / "local", (6, 5))
    memory = fsspec.filesystem("memory")
    for file in Path(folder).iterdir():
        memory.pipe_file(f"/bucket/tiny/{file.name}", file.read_bytes())
    remote, local = Corpus("memory://bucket/tiny", cache_dir=str(tmp_path / "cache")), Corpus(folder)
    assert remote.source == local.source
    assert all((remote[i].image == local[i].image).all() for i in range(11))
