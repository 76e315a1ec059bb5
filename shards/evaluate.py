"""Every sample once, in its evaluation view, over ranks.

    for batch in eval_batches(corpus, size=224, batch=64, rank=r, world=W): ...    # position i goes to rank i mod W

Small sets that are read again and again are decoded once: shards.decoded.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np

from shards import prefetch
from shards.batches import Batch, BatchReader
from shards.corpus import Corpus
from shards.views import ViewsConfig


def eval_batches(
    corpus: Corpus, size: int, batch: int, rank: int = 0, world: int = 1, workers: int = 0, labels: Sequence[str] | None = None
) -> Iterator[Batch]:
    """Each sample of the corpus exactly once over all ranks; a damaged one is there and not valid.

    Every rank gets the same number of batches of `batch` samples; what is missing at the end is padding (valid_B False, index_B -1).
    Targets are those of `labels` (default: the corpus's own; [] = none). Raises WorkError where two samples have one key.
    """
    corpus.check_keys()
    reader = BatchReader([corpus], ViewsConfig(kind="eval", size=size), corpus.labels if labels is None else labels, seed=0)
    steps = -(-len(corpus) // (batch * world))
    position_SB = np.arange(steps * batch, dtype=np.int64).reshape(steps, batch) * world + rank
    id_SB = np.where(position_SB < len(corpus), position_SB, -1)
    return reader.batches(((id_B, np.zeros_like(id_B)) for id_B in id_SB), workers)


def in_order(corpus: Corpus) -> Iterator[int]:
    """The ids of a corpus, with the shards of later ones being fetched."""
    chunks = np.array_split(np.arange(len(corpus)), -(-len(corpus) // 64))
    with closing(prefetch.ahead(((id_B, np.zeros_like(id_B)) for id_B in chunks), [corpus])) as orders:
        for id_B, _ in orders:
            yield from id_B.tolist()
