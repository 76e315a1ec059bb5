"""The training stream: equal for any number of workers and ranks and after a seek; evaluation once each; damage is named."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from tiny_corpus import picture, write

from base.errors import RequestError, WorkError
from shards import manifest, shardfile
from shards.batches import Batch
from shards.card import NOT_JUDGED
from shards.corpus import Corpus, DamagedSample
from shards.decoded import decode_all
from shards.evaluate import eval_batches
from shards.labels import targets
from shards.loader import TrainLoader
from shards.order import Order
from shards.quarantine import Quarantine
from shards.views import ViewsConfig, resize, resize_mask

TWO = ViewsConfig(kind="two", size=24)
ONE = ViewsConfig(kind="one", size=24)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("masked"), (20, 15), masks=True, suffix="png", dataset="masked", splits=["train", "test"])


def steps_of(urls: Sequence[str], world: int, workers: int, start: int) -> Iterator[tuple[str, str]]:
    """sha256 of the ids and of the pixels of each global batch from that step on, put together from all ranks."""
    ranks = [
        TrainLoader([Corpus(url) for url in urls], [2.0, 1.0][: len(urls)], TWO, 16, 1, rank, world, workers).batches(start)
        for rank in range(world)
    ]
    for parts in zip(*ranks, strict=True):
        ids = torch.cat([part.index_B for part in parts]).numpy()
        pixels = torch.stack([torch.cat([part.views[v] for part in parts]) for v in range(2)]).numpy()
        yield hashlib.sha256(ids.tobytes()).hexdigest(), hashlib.sha256(pixels.tobytes()).hexdigest()


def stream(url: str, world: int, workers: int, start: int, steps: int) -> list[tuple[str, str]]:
    """That many steps."""
    return list(itertools.islice(steps_of([url], world, workers, start), steps))


@pytest.mark.parametrize("mixture", [False, True])
def test_the_stream_is_the_same_for_all_worlds_and_workers_and_after_a_seek(url: str, tmp_path: Path, mixture: bool) -> None:
    # 6 steps an epoch: the walk crosses into the third, and the stretch from step 4 on into the second.
    urls = [url, write(tmp_path, (20, 15), dataset="other")] if mixture else [url]
    walked = list(itertools.islice(steps_of(urls, 1, 0, 0), 14))
    for world, workers in itertools.product((1, 2, 4), (0, 1, 2, 3)):
        assert list(itertools.islice(steps_of(urls, world, workers, 4), 4)) == walked[4:8], (world, workers)
    assert list(itertools.islice(steps_of(urls, 2, 1, 11), 3)) == walked[11:]


def _log(urls: Sequence[str], world: int, workers: int, start: int, path: str) -> None:
    with open(path, "a") as file:
        for ids, pixels in itertools.islice(steps_of(urls, world, workers, start), 40 - start):
            file.write(f"{ids} {pixels}\n")
            file.flush()


def test_a_killed_stream_goes_on_where_it_was_with_other_ranks_and_workers(url: str, tmp_path: Path) -> None:
    urls = [url, write(tmp_path, (20, 15), dataset="other")]
    log = tmp_path / "log"
    log.touch()
    context = multiprocessing.get_context("fork")
    for world, workers, until in ((1, 2, 7), (4, 1, 19), (2, 3, 31), (1, 0, 40)):
        process = context.Process(target=_log, args=(urls, world, workers, len(log.read_text().splitlines()), str(log)))
        process.start()
        while len(log.read_text().splitlines()) < until:
            time.sleep(0.005)
        if until < 40:
            process.kill()
        process.join()
        whole, _, _ = log.read_text().rpartition("\n")  # a line that the kill cut off was not a step that was done
        log.write_text(whole + "\n")
    walked = [f"{ids} {pixels}" for ids, pixels in itertools.islice(steps_of(urls, 1, 0, 0), 40)]
    assert log.read_text().splitlines() == walked


def test_a_seek_continues_the_stream(url: str) -> None:
    walked = [batch.index_B for batch in itertools.islice(TrainLoader([Corpus(url)], None, TWO, 16, seed=1).batches(0), 20)]
    for start in (3, 6, 19):
        batch = next(TrainLoader([Corpus(url)], None, TWO, 16, seed=1).batches(start))
        assert torch.equal(batch.index_B, walked[start])


def test_exact_epochs_hold_every_sample_once_and_seek(url: str) -> None:
    walked = [b.index_B for b in itertools.islice(TrainLoader([Corpus(url)], None, ONE, 16, seed=1, exact_epoch=True).batches(0), 25)]
    assert torch.bincount(torch.cat(walked)).tolist() == [4] * 100
    for world in (2, 4):
        ranks = [TrainLoader([Corpus(url)], None, ONE, 16, 1, rank, world, exact_epoch=True).batches(5) for rank in range(world)]
        assert torch.equal(torch.cat([next(rank).index_B for rank in ranks]), walked[5])


def test_a_batch_has_the_promised_shapes(url: str) -> None:
    loader = TrainLoader([Corpus(url)], None, TWO, 16, seed=0)
    batch = next(loader.batches(0))
    assert [view.shape for view in batch.views] == [(16, 1, 24, 24)] * 2
    assert all(view.dtype == torch.uint8 for view in batch.views)
    assert not torch.equal(batch.views[0], batch.views[1])
    assert batch.index_B.dtype == torch.int64
    assert batch.index_B.tolist() == loader.ids(0).tolist()
    assert batch.target_BL is not None
    assert batch.target_BL.shape == (16, 2)
    assert batch.target_BL.dtype == torch.float32
    assert batch.seg_BHW is None
    assert batch.valid_B.all()
    assert loader.steps_per_epoch == 6


def test_views_change_from_epoch_to_epoch(url: str) -> None:
    by_id: dict[int, list[torch.Tensor]] = {}
    for batch in itertools.islice(TrainLoader([Corpus(url)], None, ONE, 50, seed=0).batches(0), 4):
        for i, view in zip(batch.index_B.tolist(), batch.views[0], strict=True):
            by_id.setdefault(i, []).append(view)
    assert all(len(views) == 2 and not torch.equal(*views) for views in by_id.values())


def test_unknown_and_uncertain_labels_are_masked(url: str) -> None:
    batch = next(TrainLoader([Corpus(url)], None, ONE, 100, seed=0).batches(0))
    assert batch.target_BL is not None
    assert batch.mask_BL is not None
    i = batch.index_B
    for place in range(2):
        raw = (i // 4**place) % 4  # 0, 1, uncertain, unknown
        assert torch.equal(batch.mask_BL[:, place], (raw < 2).float())
        assert torch.equal(batch.target_BL[:, place], (raw == 1).float())


def test_a_mixture_joins_labels_by_name(url: str, tmp_path: Path) -> None:
    other = write(tmp_path, (20,), dataset="other", labels=["b", "c"])
    loader = TrainLoader([Corpus(url), Corpus(other)], None, ONE, 120, seed=0)
    assert loader.labels == ["a", "b", "c"]
    batch = next(loader.batches(0))
    assert batch.mask_BL is not None
    assert sorted(batch.index_B.tolist()) == list(range(120))
    assert not batch.mask_BL[batch.index_B < 100, 2].any()
    assert not batch.mask_BL[batch.index_B >= 100, 0].any()
    assert batch.mask_BL[batch.index_B >= 100, 2].sum() == 12  # four each of 0, 1, -1, None, 0
    assert TrainLoader([Corpus(url), Corpus(other)], None, ONE, 8, seed=0, labels=["c"]).labels == ["c"]
    assert next(TrainLoader([Corpus(url)], None, ONE, 8, seed=0, labels=[]).batches(0)).target_BL is None
    with pytest.raises(RequestError, match="unknown label 'cc'"):
        TrainLoader([Corpus(url), Corpus(other)], None, ONE, 8, seed=0, labels=["cc"])


def test_samples_and_records_say_the_same(url: str) -> None:
    corpus = Corpus(url)
    records = corpus.records()
    assert len(corpus) == len(records) == 100
    for i in (0, 39, 40, 99):
        sample = corpus[i]
        assert (sample.id, sample.labels, sample.patient, sample.meta) == tuple(records[i])
        assert sample.meta == {"age": i}
        assert np.abs(sample.image.astype(int) - picture(i, 40)).mean() < 5
    with pytest.raises(IndexError):
        corpus[100]
    target_NL, mask_NL = targets([record.labels for record in records], corpus.card, ["a", "missing"])
    assert mask_NL[:, 1].sum() == 0
    assert target_NL.sum() == 25


def test_stock_webdataset_reads_the_same_samples(url: str) -> None:
    corpus = Corpus(url)
    stock = list(webdataset.WebDataset(sorted(str(path) for path in Path(url).glob("*.tar")), shardshuffle=False))
    assert [sample["__key__"] for sample in stock] == corpus.keys()


def test_colour_is_rgb_and_stays_three_channels(tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path, (6,), channels=3, suffix="png"))
    assert np.array_equal(corpus[3].image, picture(3, 40, 3))
    batch = next(TrainLoader([corpus], None, TWO, 6, seed=0).batches(0))
    assert batch.views[0].shape == (6, 3, 24, 24)


def test_masks_come_with_one_view_and_with_evaluation(masked: str) -> None:
    corpus = Corpus(masked)
    batch = next(TrainLoader([corpus], None, ONE.model_copy(update={"blur_p": 0.0, "jitter_p": 0.0}), 20, seed=0).batches(0))
    assert batch.seg_BHW is not None
    lacking = batch.index_B % 7 == 0
    assert (batch.seg_BHW[lacking] == NOT_JUDGED).all()
    assert (batch.seg_BHW[~lacking] <= 1).all()
    assert next(TrainLoader([corpus], None, TWO, 20, seed=0).batches(0)).seg_BHW is None


@pytest.mark.parametrize(("world", "batch"), [(1, 16), (2, 16), (3, 7), (4, 64)])
def test_evaluation_sees_each_sample_once(url: str, world: int, batch: int) -> None:
    ranks = [list(eval_batches(Corpus(url), 24, batch, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = torch.cat([b.index_B[b.valid_B] for batches in ranks for b in batches])
    assert sorted(seen.tolist()) == list(range(100))
    assert all((b.index_B[~b.valid_B] == -1).all() and len(b.index_B) == batch for batches in ranks for b in batches)


def test_decoded_evaluation_equals_the_batches(masked: str) -> None:
    corpus = Corpus(masked, splits=("train", "test"))
    decoded = decode_all(corpus, 24)
    batches: list[Batch] = list(eval_batches(corpus, 24, 35))
    assert np.array_equal(decoded.images, batches[0].views[0].numpy())
    assert decoded.seg is not None
    assert batches[0].seg_BHW is not None
    assert np.array_equal(decoded.seg, batches[0].seg_BHW.numpy())
    assert batches[0].target_BL is not None
    assert np.array_equal(decoded.target, batches[0].target_BL.numpy())
    sample = corpus[5]
    assert sample.seg is not None
    assert np.array_equal(decoded.images[5], resize(sample.image, 24).transpose(2, 0, 1))
    assert np.array_equal(decoded.seg[5], resize_mask(sample.seg, 24))
    assert decoded.ids == corpus.keys()
    assert decoded.raw[5] == sample.labels
    assert decoded.meta[34] == {"age": 34}


def _decode(url: str, folder: str, results: "multiprocessing.Queue[tuple[int, bytes]]") -> None:
    decoded = decode_all(Corpus(url, cache_dir=folder), 24)
    results.put((os.stat(next(Path(folder).glob("decoded/*/images.npy"))).st_ino, decoded.images.tobytes()))


def test_a_node_decodes_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, bytes]] = context.Queue()
    workers = [context.Process(target=_decode, args=(url, str(tmp_path), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(found) == 1
    assert sorted(path.suffix for path in tmp_path.glob("decoded/*")) == ["", ".lock"]
    monkeypatch.setattr("shards.decode.image", lambda *given: pytest.fail("decoded again"))
    decoded = decode_all(Corpus(url, cache_dir=str(tmp_path)), 24, labels=["b"])
    assert decoded.images.tobytes() == next(iter(found))[1]
    assert decoded.target.shape == (100, 1)
    decoded.images[0] = 0  # of this process alone
    assert decode_all(Corpus(url, cache_dir=str(tmp_path)), 24).images.tobytes() == next(iter(found))[1]


def test_samples_that_are_left_out_are_not_decoded(url: str, tmp_path: Path) -> None:
    whole, less = (decode_all(Corpus(url, ("train",), str(tmp_path), without), 24) for without in ((), (0, 5)))
    assert less.ids == [key for i, key in enumerate(whole.ids) if i not in (0, 5)]
    assert np.array_equal(less.images, np.delete(whole.images, (0, 5), 0))


def test_a_decoded_set_that_made_room_is_decoded_again(url: str, tmp_path: Path) -> None:
    corpus = Corpus(url, cache_dir=str(tmp_path))
    first = decode_all(corpus, 24)
    shutil.rmtree(next(path for path in tmp_path.glob("decoded/*") if path.is_dir()))
    assert np.array_equal(decode_all(corpus, 24).images, first.images)


def test_two_samples_of_one_key_are_no_evaluation(tmp_path: Path) -> None:
    url = write(tmp_path, (5, 4))
    corpus = Corpus(url)
    corpus.check_keys()
    first, second = (manifest.load_index((tmp_path / f"tiny-train-0000{shard}.idx").read_bytes()) for shard in range(2))
    second["key"][2] = first["key"][3]
    index = manifest.dump_index(second)
    (tmp_path / "tiny-train-00001.idx").write_bytes(index)
    corpus.shards[1] = corpus.shards[1].model_copy(update={"index_sha256": hashlib.sha256(index).hexdigest()})
    shardfile.forget()
    assert len(corpus.keys()) == 9
    for read in (lambda: decode_all(corpus, 24), lambda: eval_batches(corpus, 24, 4)):
        with pytest.raises(WorkError, match=rf"^{url}: 9 samples, 8 different keys"):
            read()


def test_reading_draws_nothing_from_the_global_random_state(url: str) -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(TrainLoader([Corpus(url)], None, TWO, 16, seed=0, workers=workers).batches(0))
        assert torch.equal(torch.get_rng_state(), before)


def damage(url: str, *numbers: int) -> None:
    """Flip a bit in the images of those samples."""
    corpus = Corpus(url)
    for i in numbers:
        shard = int(np.searchsorted(corpus.starts, i, side="right")) - 1
        with open(f"{url}/{corpus.shards[shard].name}.tar", "r+b") as tar:
            tar.seek(corpus.stored(i)[0].image_off + 60)
            byte = tar.read(1)
            tar.seek(-1, os.SEEK_CUR)
            tar.write(bytes([byte[0] ^ 1]))


def test_damage_is_named_with_shard_and_key(tmp_path: Path) -> None:
    url = write(tmp_path, (5,))
    damage(url, 3)
    corpus = Corpus(url)
    with pytest.raises(
        DamagedSample, match=rf"tiny-train-00000.tar: {corpus.keys()[3]}: the sample cannot be read: the checksum of its im"
    ):
        corpus[3]
    assert corpus[2].id == 2
    with pytest.raises(DamagedSample):
        decode_all(corpus, 24)


def test_a_cut_shard_and_the_index_of_another_are_refused(tmp_path: Path) -> None:
    url = write(tmp_path, (5, 5, 5))
    tar, index = tmp_path / "tiny-train-00000.tar", tmp_path / "tiny-train-00001.idx"
    tar.write_bytes(tar.read_bytes()[:-512])
    index.write_bytes((tmp_path / "tiny-train-00002.idx").read_bytes())
    with pytest.raises(WorkError, match=r"tiny-train-00000\.tar: the shard is damaged: \d+ bytes where the manifest says"):
        Corpus(url)[2]
    with pytest.raises(WorkError, match=r"tiny-train-00001\.idx: the index is damaged, or that of another shard"):
        Corpus(url)[7]


def test_a_shard_that_is_cut_while_it_is_in_use_is_named(tmp_path: Path) -> None:
    """A page that a mapped file has lost would end the process by a signal."""
    corpus = Corpus(write(tmp_path, (5,)))
    assert corpus[2].image.size
    tar = tmp_path / "tiny-train-00000.tar"
    os.truncate(tar, 512)
    with pytest.raises(WorkError, match=r"tiny-train-00000\.tar: the file was cut from \d+ to 512 bytes while it was in use"):
        Corpus.read(corpus, 3)


def test_a_damaged_sample_is_replaced_by_the_next_of_its_lane(tmp_path: Path) -> None:
    url = write(tmp_path / "shards", (40, 33, 27))
    whole = list(itertools.islice(TrainLoader([Corpus(url)], None, TWO, 20, seed=1).batches(0), 10))
    damage(url, 17, 60)
    order = Order([Corpus(url).source], seed=1, global_batch=20)
    quarantine = tmp_path / "quarantine-0.jsonl"
    seen = stream(url, 1, 0, 0, 10)
    for world, workers in ((2, 0), (4, 0), (1, 2), (2, 1)):
        assert stream(url, world, workers, 0, 10) == seen
    loader = TrainLoader([Corpus(url)], None, TWO, 20, seed=1, workers=1, quarantine_url=str(quarantine))
    for step, (batch, was) in enumerate(zip(loader.batches(0), whole, strict=False)):
        expected = [order.substitute(i, step // 5) if i in (17, 60) else i for i in was.index_B.tolist()]
        assert batch.index_B.tolist() == expected
        assert batch.valid_B.all()
        same = batch.index_B == was.index_B
        assert torch.equal(batch.views[1][same], was.views[1][same])
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(row["sample"].rsplit(" ", 1)[1] for row in rows) == sorted(Corpus(url).keys()[i] for i in (17, 60))
    assert {row["reason"] for row in rows} == {"the sample cannot be read: the checksum of its image differs"}


def test_evaluation_keeps_the_place_of_a_damaged_sample(tmp_path: Path) -> None:
    url = write(tmp_path, (40, 33))
    damage(url, 50)
    batches = [b for rank in range(2) for b in eval_batches(Corpus(url), 24, 16, rank, 2)]
    valid = torch.cat([b.index_B[b.valid_B] for b in batches]).tolist()
    assert sorted(valid) == [i for i in range(73) if i != 50]
    assert torch.cat([b.index_B[~b.valid_B] for b in batches]).unique().tolist() == [-1, 50]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_does_without_ten_samples_and_not_eleven(tmp_path: Path, workers: int) -> None:
    url = write(tmp_path, (100,))
    damage(url, *range(20, 30))
    list(itertools.islice(TrainLoader([Corpus(url)], None, ONE, 25, seed=0, workers=workers).batches(0), 4))
    damage(url, 70)
    with pytest.raises(
        WorkError, match=r"tiny-[0-9a-f]{20}: 11 samples cannot be read, at most 10 may; the last: the sample cannot be read"
    ):
        list(itertools.islice(TrainLoader([Corpus(url)], None, ONE, 25, seed=0, workers=workers).batches(0), 4))


def test_a_run_that_goes_on_counts_what_it_met_before(tmp_path: Path) -> None:
    file = str(tmp_path / "quarantine.jsonl")
    errors = [DamagedSample("broken", where=f"x.tar: {i}") for i in range(11)]
    first = Quarantine(100, file)
    first.add(errors[:10])
    Quarantine(100, file).add(errors[:10])
    with pytest.raises(WorkError, match="11 samples cannot be read"):
        Quarantine(100, file).add(errors[10:])
    assert Quarantine(50_000).limit == 50


def test_requests_that_cannot_be_met_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be shared by 3 workers"):
        TrainLoader([Corpus(url)], None, TWO, 16, seed=0, world=3)
    with pytest.raises(RequestError, match="no split"):
        Corpus(url, splits=("test",))
    with pytest.raises(RequestError, match="allograft pack"):
        Corpus(str(tmp_path))
    colour = write(tmp_path / "colour", (4,), channels=3, dataset="colour")
    with pytest.raises(RequestError, match="same channels: tiny 1, colour 3"):
        TrainLoader([Corpus(url), Corpus(colour)], None, TWO, 4, seed=0)


def test_closing_the_stream_stops_its_workers(url: str) -> None:
    batches = TrainLoader([Corpus(url)], None, TWO, 16, seed=0, workers=2).batches(0)
    next(batches)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    del batches
    assert len(before - set(children.read_text().split())) >= 2


@pytest.mark.timeout(60)
def test_workers_start_after_opencv_has_used_its_own_threads(url: str) -> None:
    # OpenCV's pool does not survive a fork: the wrong setting in a worker waits for threads that are not there.
    cv2.setNumThreads(4)
    for _ in range(20):
        cv2.resize(cv2.GaussianBlur(np.zeros((1024, 1024), dtype=np.float32), (0, 0), 2), (512, 512), interpolation=cv2.INTER_CUBIC)
    assert next(TrainLoader([Corpus(url)], None, TWO, 16, seed=0, workers=2).batches(0)).valid_B.all()


def test_a_corpus_survives_pickling(url: str) -> None:
    import pickle

    corpus = Corpus(url)
    first = corpus[0]
    again = pickle.load(io.BytesIO(pickle.dumps(corpus)))
    assert np.array_equal(again[0].image, first.image)


def test_what_is_packed_is_read(phantom_chest: str, phantom_fundus: str) -> None:
    splits = ("train", "val", "test")
    chest, fundus = Corpus(phantom_chest, splits), Corpus(phantom_fundus, splits)
    assert (len(chest), len(fundus)) == (240, 60)
    assert chest.channels == 1
    assert all(set(record.labels) == set(chest.labels) for record in chest.records())
    assert len(set(chest.keys())) == 240
    sample = fundus[7]
    assert sample.seg is not None
    assert sample.seg.shape == sample.image.shape[:2]
    batch = next(TrainLoader([fundus], None, ONE, 12, seed=0, workers=1).batches(0))
    assert batch.seg_BHW is not None
    assert batch.views[0].shape == (12, 3, 24, 24)
    assert 0 < (batch.seg_BHW == 1).float().mean() < 0.5
