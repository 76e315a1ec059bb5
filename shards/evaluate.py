"""Every sample once, in its evaluation view: batches over ranks for large sets, whole arrays for small ones.

    for batch in eval_batches(corpus, size=224, batch=64, rank=r, world=W): ...    # position i goes to rank i mod W
    decoded = decode_all(corpus, size=96)                                          # u8 (N, C, 96, 96), targets, patients, ...

A fine-tuning cell reads a small set for tens of epochs: it decodes once, then `shards.views.augment` makes each training batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import cv2
import numpy as np

from shards import prefetch
from shards.batches import NO_MASK, Batch, BatchReader
from shards.corpus import Corpus, targets
from shards.views import ViewsConfig, resize, resize_mask


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


class Decoded(NamedTuple):
    """A corpus in memory, in id order.

    images: u8 (N, C, size, size). seg: u8 (N, size, size), NO_MASK where a sample has none; None for data without masks.
    target, mask: float32 (N, L), see shards.corpus.targets. ids: keys `<dataset>-<20 hex>`, which no packing changes.
    """

    images: np.ndarray
    seg: np.ndarray | None
    target: np.ndarray
    mask: np.ndarray
    labels: list[str]
    patients: list[str]
    meta: list[dict[str, Any]]
    ids: list[str]


def in_order(corpus: Corpus) -> Iterator[int]:
    """The ids of a corpus, with the shards of later ones being fetched."""
    chunks = np.array_split(np.arange(len(corpus)), -(-len(corpus) // 64))
    with closing(prefetch.ahead(((id_B, np.zeros_like(id_B)) for id_B in chunks), [corpus])) as orders:
        for id_B, _ in orders:
            yield from id_B.tolist()


def decode_all(corpus: Corpus, size: int, labels: Sequence[str] | None = None) -> Decoded:
    """The whole corpus, resized for evaluation (views.resize). Memory: N x C x size x size bytes.

    Raises as eval_batches, and for a damaged sample: the result of a cell is that of its whole dataset.
    """
    corpus.check_keys()
    cv2.setNumThreads(0)
    count, names = len(corpus), list(corpus.labels if labels is None else labels)
    images = np.empty((count, corpus.channels, size, size), dtype=np.uint8)
    seg = np.full((count, size, size), NO_MASK, dtype=np.uint8) if corpus.has_masks else None
    raw: list[dict[str, int | None]] = []
    patients: list[str] = []
    meta: list[dict[str, Any]] = []
    for i in in_order(corpus):
        sample = corpus.read(i, seg=seg is not None)
        images[i] = resize(sample.image, size).transpose(2, 0, 1)
        if seg is not None and sample.seg is not None:
            seg[i] = resize_mask(sample.seg, size)
        raw.append(sample.labels)
        patients.append(sample.patient)
        meta.append(sample.meta)
    target_NL, mask_NL = targets(raw, names)
    return Decoded(images, seg, target_NL, mask_NL, names, patients, meta, corpus.keys())
