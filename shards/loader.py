"""Batches of views for training: an infinite, seekable stream that is the same for any number of ranks and workers.

    loader = TrainLoader([corpus], None, ViewsConfig(kind="two", size=224), global_batch=256, seed=0, rank=0, world=1, workers=2)
    for batch in loader.batches(start_step):
        one_BCHW, two_BCHW = batch.views             # u8

The id sequence comes from shards.order; rank r of W takes positions [r GB / W, (r + 1) GB / W) of each global batch. To resume, keep one
integer: the number of steps done.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from base.errors import RequestError, unknown
from shards.batches import Batch, BatchReader
from shards.corpus import Corpus
from shards.order import Order
from shards.views import ViewsConfig


class TrainLoader:
    """See the module's header.

    Args:
        corpora: the datasets; several are a mixture.
        weights: the share of each, or None: in proportion to their sizes.
        views: what is made of an image; its kind is `two`, `one` or `eval`.
        global_batch: samples in a step over all ranks.
        labels: names of the targets, in this order; masked where a corpus has no such label. None = all labels of all corpora, [] = none.
        workers: processes that read ahead, of this rank; 0 = read in this process.
        exact_epoch: wrap the last incomplete global batch into the next epoch rather than drop it.
        quarantine_url: where this rank writes which samples could not be read (see shards.quarantine); each is replaced by the next of
            its lane, which every world size and number of workers does alike.
    Raises:
        RequestError: the world size does not divide the global batch, a label that no corpus has, and what Order refuses.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float] | None,
        views: ViewsConfig,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        labels: Sequence[str] | None = None,
        exact_epoch: bool = False,
        quarantine_url: str | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise RequestError(f"rank {rank} of a world of {world}", where="rank")
        if global_batch % world:
            raise RequestError(
                f"a global batch of {global_batch} cannot be shared by {world} workers",
                where="global_batch",
                hint=f"use {global_batch - global_batch % world or world} or {global_batch - global_batch % world + world}",
            )
        known = list(dict.fromkeys(name for corpus in corpora for name in corpus.labels))
        made = [name for corpus in corpora for name in corpus.card.derived]
        for name in labels or []:
            if name not in known and name not in made:
                raise unknown("label", name, [*known, *made], where="labels")
        self.labels = known if labels is None else list(labels)
        self.order = Order(
            [corpus.source for corpus in corpora],
            seed=seed,
            global_batch=global_batch,
            weights=weights,
            exact_epoch=exact_epoch,
        )
        self.reader = BatchReader(corpora, views, self.labels, seed, self.order, quarantine_url)
        self.workers = workers
        self._mine = slice(rank * global_batch // world, (rank + 1) * global_batch // world)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch: see Order.steps_per_epoch."""
        return self.order.steps_per_epoch

    def ids(self, step: int) -> np.ndarray:
        """Ids of the whole global batch of that step, int64 of length global_batch: rank 0's part first."""
        return self.order.batch(step)[0]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of the steps from `start_step` on, for ever. Close the iterator (or let it go) to stop its workers."""
        return self.reader.batches(self._orders(start_step), self.workers)

    def _orders(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            id_B, epoch_B = self.order.batch(step)
            yield id_B[self._mine], epoch_B[self._mine]
            step += 1
