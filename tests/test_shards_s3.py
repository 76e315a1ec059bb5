"""Shards in an object store that fails in every way: what is packed into it and streamed out of it equals what a disk gives."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import READS, store
from test_pretrain_run import metrics, tree
from tiny_corpus import write

from base import storage
from base.config import parse
from base.errors import WorkError
from engine.context import LocalContext
from pretrain.run import PretrainConfig, run
from shards import shardfile
from shards.card import load_card
from shards.corpus import Corpus
from shards.decoded import decode_all
from shards.evaluate import eval_batches
from shards.loader import TrainLoader
from shards.pack import pack
from shards.views import ViewsConfig

BUCKET = "s3://allograft"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], dict[str, int]]]:
    patience = pytest.MonkeyPatch()
    patience.setattr(storage, "SILENCE_S", 0.5)
    patience.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    with store(tmp_path_factory.mktemp("s3"), faults=True) as served:
        yield served
    patience.undo()


def streams(corpus: Corpus, workers: int) -> str:
    """sha256 of ids and pixels of training batches, then of the evaluation."""
    found = hashlib.sha256()
    loader = TrainLoader([corpus], None, ViewsConfig(kind="two", size=32), 16, seed=0, workers=workers)
    for batch in itertools.chain(itertools.islice(loader.batches(3), 12), eval_batches(corpus, 32, 32, workers=workers)):
        found.update(batch.index_B.numpy().tobytes())
        for view in batch.views:
            found.update(view.numpy().tobytes())
    return found.hexdigest()


def test_pack_train_and_evaluate_through_faults(seen: Callable[[], dict[str, int]], tmp_path: Path) -> None:
    card = load_card("phantom-chest")
    here, there = str(tmp_path / "chest"), f"{BUCKET}/chest"
    manifest = pack(card, "phantom:120", here, shard_samples=20)
    assert pack(card, "phantom:120", there, shard_samples=20).digest == manifest.digest
    local = Corpus(here)
    expected = streams(local, 0)
    for workers in (0, 2):
        shardfile.forget()
        assert streams(Corpus(there, cache_dir=str(tmp_path / f"cache-{workers}")), workers) == expected
    decoded = decode_all(Corpus(there, ("test",), str(tmp_path / "cache-test")), 32)
    assert np.array_equal(decoded.images, decode_all(Corpus(here, ("test",)), 32).images)
    assert set(READS) <= set(seen())  # and every fault was met


def test_a_pretraining_from_a_failing_store_is_that_from_a_disk(seen: Callable[[], dict[str, int]], tmp_path: Path) -> None:
    here, there = write(tmp_path / "tiny"), f"{BUCKET}/tiny"
    storage.put_dir(here, there, last=("manifest.json",))
    rows = []
    for name, url in (("here", here), ("there", there)):
        shardfile.forget()
        place = {"out": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"), "workers": 1}
        config = parse(tree("simclr", url, "simclr", epochs=1) | place, PretrainConfig, name)
        assert run(config, LocalContext(dir=config.out)) is not None
        rows.append(metrics(tmp_path / name))
    assert rows[0] == rows[1]
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3
    assert not list(tmp_path.glob("*/quarantine-*.jsonl"))


def test_a_store_that_keeps_failing_is_an_error_that_names_the_file(
    seen: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{BUCKET}/broken/x.bin"
    storage.put(url, "x")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with pytest.raises(WorkError, match=rf"^{url}: the object store cannot be used: "):
        storage.read_bytes(url)


def test_a_lock_is_taken_once_though_its_answer_is_lost(seen: Callable[[], dict[str, int]]) -> None:
    for i in range(4):
        assert storage.create(f"{BUCKET}/lock-{i}", f"mine {i}")
        assert not storage.create(f"{BUCKET}/lock-{i}", f"yours {i}")
