"""The node's copies of shards: fetched once, checked, whole."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tiny_corpus import write

from base.errors import RequestError, WorkError
from shards import cache, prefetch, shardfile
from shards.corpus import Corpus
from shards.decoded import decode_all


def _fill(url: str, sha256: str, folder: str, results: "multiprocessing.Queue[tuple[str, str]]") -> None:
    path = cache.local(url, sha256, None, folder)
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
    cache.local(f"file://{tmp_path}/x.tar", sha256, None, str(folder))
    assert os.stat(next(iter(found))[0]).st_ino == stamp


def test_a_wrong_download_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"other bytes")
    sha256, folder = hashlib.sha256(b"bytes").hexdigest(), tmp_path / "cache"
    with pytest.raises(WorkError, match=r"x\.tar: the shard is damaged") as caught:
        cache.local(f"file://{tmp_path}/x.tar", sha256, None, str(folder))
    assert sha256[:12] in str(caught.value)
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".lock"]
    (tmp_path / "x.tar").write_bytes(b"bytes")  # mended: the next attempt works
    assert Path(cache.local(f"file://{tmp_path}/x.tar", sha256, None, str(folder))).read_bytes() == b"bytes"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/gone.tar", f"file://{tmp_path}/gone.tar"):
        with pytest.raises(WorkError, match=r"gone\.tar: the shard is missing"):
            cache.local(url, "0" * 64, None, str(tmp_path / "cache"))


def test_a_local_shard_is_used_in_place_and_refused_when_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"bytes")
    assert cache.local(str(path), "0" * 64, 5, str(tmp_path / "cache")) == str(path)
    assert not (tmp_path / "cache").exists()
    path.write_bytes(b"byte")
    with pytest.raises(WorkError, match=r"x\.tar: the shard is damaged: 4 bytes where the manifest says 5"):
        cache.local(str(path), "0" * 64, 5)


def test_the_least_recently_used_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOGRAFT_CACHE_GB", "0.003")
    folder, paths = tmp_path / "cache", []
    for i in range(3):
        data = os.urandom(1 << 20)
        (tmp_path / f"{i}.tar").write_bytes(data)
        paths.append((f"file://{tmp_path}/{i}.tar", hashlib.sha256(data).hexdigest()))
    kept = []
    for turn, i in enumerate((0, 1, 0)):
        kept.append(cache.local(*paths[i], None, str(folder)))
        os.utime(kept[-1], (turn, turn))  # a clock that no machine is too fast for
    with open(kept[1], "rb") as reader:
        kept.append(cache.local(*paths[2], None, str(folder)))
        os.utime(kept[-1], (4, 4))
        assert [os.path.exists(path) for path in kept] == [True, False, True, True]
        assert len(reader.read()) == 1 << 20
    decoded = folder / "decoded" / "key"
    decoded.mkdir(parents=True)
    (decoded / "images.npy").write_bytes(bytes(1 << 20))
    os.utime(decoded, (9, 9))
    cache.evict(str(folder), keep=str(decoded))
    assert [os.path.exists(path) for path in kept] == [False, False, False, True]
    monkeypatch.setenv("ALLOGRAFT_CACHE_GB", "much")
    with pytest.raises(RequestError, match="ALLOGRAFT_CACHE_GB: expected a number of gigabytes, got 'much'"):
        cache.evict(str(folder), keep=str(decoded))


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path) -> None:
    group = tmp_path / "ab"
    group.mkdir()
    for name, age_s in (("old", 100_000), ("new", 0)):
        (group / f".tmp-{name}").write_bytes(b"half")
        os.utime(group / f".tmp-{name}", (time.time() - age_s,) * 2)
    cache.evict(str(tmp_path), keep="")
    assert [path.name for path in group.iterdir()] == [".tmp-new"]


def in_memory(folder: str, name: str) -> str:
    """The packed dataset as objects of a store that this process holds."""
    memory = fsspec.filesystem("memory")
    for file in Path(folder).iterdir():
        memory.pipe_file(f"/{name}/tiny/{file.name}", file.read_bytes())
    return f"memory://{name}/tiny"


def test_a_copy_that_went_bad_is_fetched_again(tmp_path: Path) -> None:
    local = Corpus(write(tmp_path / "local", (6, 5)))
    url = in_memory(local.url, tmp_path.name)
    corpus = Corpus(url, cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(corpus[3].image, local[3].image)
    (copy,) = (tmp_path / "cache").rglob("*.tar")
    row = local.stored(3)[0]
    with open(copy, "r+b") as file:
        file.seek(row.image_off + 20)
        file.write(b"other bytes")
    assert np.array_equal(corpus[3].image, local[3].image)
    (index,) = (tmp_path / "cache").rglob("*.idx")
    index.write_bytes(bytes(index.stat().st_size))
    shardfile.forget()
    assert np.array_equal(Corpus(url, cache_dir=str(tmp_path / "cache"))[3].image, local[3].image)


def test_a_copy_that_another_process_renewed_is_opened_again(tmp_path: Path) -> None:
    """The file was good by then, and this process went on reading the one that it had mapped: a healthy sample was called damaged."""
    local = Corpus(write(tmp_path / "local", (6, 5)))
    corpus = Corpus(in_memory(local.url, tmp_path.name), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(corpus[3].image, local[3].image)
    (copy,) = (tmp_path / "cache").rglob("*.tar")
    good, row = copy.read_bytes(), local.stored(3)[0]
    with open(copy, "r+b") as file:
        file.seek(row.image_off + 20)
        file.write(b"other bytes")
    (tmp_path / "renewed").write_bytes(good)
    os.replace(tmp_path / "renewed", copy)
    assert np.array_equal(corpus[3].image, local[3].image)


def test_decoded_images_whose_removal_was_cut_short_are_made_again(tmp_path: Path) -> None:
    """Whoever asked for them looked for ever."""
    corpus = Corpus(write(tmp_path / "local", (6,)), cache_dir=str(tmp_path / "cache"))
    first = decode_all(corpus, 24).images.copy()
    (held,) = (tmp_path / "cache" / "decoded").glob("[!.]*/images.npy")
    held.unlink()
    assert np.array_equal(decode_all(corpus, 24).images, first)


def test_what_the_store_itself_damaged_is_named_and_not_fetched_for_ever(tmp_path: Path) -> None:
    url = in_memory(write(tmp_path / "local", (6,)), tmp_path.name)
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/tiny/tiny-train-00000.idx", b"index of another shard")
    with pytest.raises(WorkError, match=r"tiny-train-00000\.idx: the shard is damaged: sha256"):
        Corpus(url, cache_dir=str(tmp_path / "cache"))[0]


def test_more_shards_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardfile, "_most_open", lambda: 2)
    corpus = Corpus(write(tmp_path, (3,) * 7))
    shardfile.forget()
    before = len(os.listdir("/proc/self/fd"))
    assert [corpus[i].meta["age"] for i in (0, 20, 3, 6, 9, 1)] == [0, 20, 3, 6, 9, 1]
    assert len(shardfile._opened) == 2
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_corpus_is_read_from_any_url(tmp_path: Path) -> None:
    local = Corpus(write(tmp_path / "local", (6, 5)))
    remote = Corpus(in_memory(local.url, tmp_path.name), cache_dir=str(tmp_path / "cache"))
    assert remote.source == local.source
    assert all((remote[i].image == local[i].image).all() for i in range(11))


def test_shards_are_fetched_before_their_samples_come_up(tmp_path: Path) -> None:
    local = Corpus(write(tmp_path / "local", (4,) * 20))
    corpus = Corpus(f"file://{local.url}", cache_dir=str(tmp_path / "cache"))
    order = np.arange(80).reshape(40, 2)
    orders = prefetch.ahead(((id_B, np.zeros_like(id_B)) for id_B in order), [corpus])
    seen = [next(orders)[0]]
    deadline = time.monotonic() + 30
    wanted = 1 + prefetch.SHARDS_AHEAD
    while len(list((tmp_path / "cache").rglob("*.tar"))) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == wanted  # and no more: the rest waits until the reader comes nearer
    seen += [id_B for id_B, _ in orders]
    assert np.array_equal(np.stack(seen), order)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not any("shards.prefetch" in Path(f"/proc/{child}/cmdline").read_text() for child in children)


def test_local_shards_need_no_process(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, (4,)))
    orders = [(np.arange(4), np.zeros(4))]
    assert list(prefetch.ahead(iter(orders), [corpus])) == orders
