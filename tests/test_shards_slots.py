"""Memory of batches is used again, and never while somebody holds it."""

import gc
from pathlib import Path

import torch
from tiny_corpus import write

from shards.corpus import Corpus
from shards.loader import TrainLoader
from shards.slots import Slots
from shards.views import ViewsConfig


def test_a_slot_is_free_when_the_last_view_of_it_is_gone() -> None:
    slots = Slots(2, 16)
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    assert slots.take() is None
    slots.memory[first] = 7
    part = slots.lend(first, 12)[4:8].view(2, 2)
    gc.collect()
    assert slots.take() is None
    assert part.tolist() == [[7, 7], [7, 7]]
    del part
    gc.collect()
    assert slots.take() == first


def test_batches_that_are_kept_stay_as_they_were(tmp_path: Path) -> None:
    loader = TrainLoader([Corpus(write(tmp_path / "tiny"))], None, ViewsConfig(kind="two", size=16), 8, seed=0, workers=1)
    stream = loader.batches(0)
    kept = [next(stream) for _ in range(14)]  # more than there are slots
    copies = [[view.clone() for view in batch.views] for batch in kept]
    for _ in range(14):
        next(stream)
    assert all(
        torch.equal(view, copy) for batch, views in zip(kept, copies, strict=True) for view, copy in zip(batch.views, views, strict=True)
    )
    again = TrainLoader([Corpus(str(tmp_path / "tiny"))], None, ViewsConfig(kind="two", size=16), 8, seed=0).batches(0)
    assert all(torch.equal(batch.views[0], next(again).views[0]) for batch in kept)


def test_two_streams_of_one_loader_do_not_share(tmp_path: Path) -> None:
    loader = TrainLoader([Corpus(write(tmp_path / "tiny"))], None, ViewsConfig(kind="two", size=16), 8, seed=0, workers=1)
    one, two = loader.batches(0), loader.batches(3)
    first, fourth = next(one), next(two)
    ahead = [next(one) for _ in range(3)]
    assert not torch.equal(first.views[0], fourth.views[0])
    assert torch.equal(ahead[-1].views[0], fourth.views[0])
