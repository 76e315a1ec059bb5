"""The order of training samples: a function of (data digests, mixture, seed, epoch, lanes, global batch), never of ranks or workers.

    order = Order([Source(digest, (1000, 1000, 417))], seed=0, global_batch=256)
    id_B, epoch_B = order.batch(step)               # any step, in any order, for the same price

One source, one epoch: the shards are permuted, samples are shuffled inside windows of K consecutive shards, and the result is cut into
`lanes` streams of consecutive samples; lane l holds order[l::lanes]. A lane therefore walks few shards at a time. Inside a global batch
positions stand lane by lane, so that a rank, which takes consecutive positions, owns whole lanes when ranks divide lanes: each node reads
its own part of the shards. Every sample comes once an epoch. The last incomplete global batch of an epoch is dropped; with `exact_epoch`
epochs follow one another without a gap instead and nothing is dropped.

Several sources are interleaved by earliest due time: the k-th of q samples of a source is due at (k + 1/2) / q of the period, so every
stretch of the sequence holds each source in its proportion (within one sample per source). Each source walks epochs of its own, without
gaps; nothing is dropped. Without weights the period is one pass over all sources and an epoch holds every sample once.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from base.errors import RequestError
from base.seeds import rng

LANES = 16
WINDOW_SHARDS = 8
_WEIGHT_PERIOD = 10_000  # explicit weights are rounded to 1e-4: then a period's counts make seeking O(1)


class Source(NamedTuple):
    """A dataset in a mixture: its identity (manifest digest and splits) and the number of samples in each shard."""

    digest: str
    shard_samples: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)


def epoch_order(source: Source, seed: int, epoch: int, lanes: int = LANES, window: int = WINDOW_SHARDS) -> np.ndarray:
    """Permutation of range(source.samples) for one epoch, int64."""
    random = rng("order", source.digest, seed, epoch)
    sizes = np.asarray(source.shard_samples, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = random.permutation(len(sizes))
    pieces = []
    for at in range(0, len(shards), window):
        piece = np.concatenate([np.arange(starts[s], starts[s] + sizes[s]) for s in shards[at : at + window]])
        random.shuffle(piece)
        pieces.append(piece)
    flat = np.concatenate(pieces)
    order = np.empty_like(flat)
    at = 0
    for lane in range(lanes):
        held = len(range(lane, len(flat), lanes))
        order[lane::lanes] = flat[at : at + held]
        at += held
    return order


class Order:
    """The infinite sequence of global batches.

    Args:
        sources: the datasets of the mixture.
        weights: share of each source, any positive numbers; None = in proportion to their sizes.
        global_batch: samples in a step over all ranks.
    Raises:
        RequestError: no samples, a batch larger than an epoch (unless `exact_epoch`), or weights that do not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        lanes: int = LANES,
        exact_epoch: bool = False,
    ) -> None:
        if not sources or any(source.samples == 0 for source in sources):
            raise RequestError("a source of the mixture holds no samples", where="data")
        if global_batch < 1 or lanes < 1:
            raise RequestError(f"global batch {global_batch} and lanes {lanes} must be at least 1", where="global_batch")
        self.sources, self.seed, self.global_batch, self.lanes, self.exact_epoch = list(sources), seed, global_batch, lanes, exact_epoch
        self.offsets = np.concatenate([[0], np.cumsum([source.samples for source in sources])]).astype(np.int64)
        self.samples = int(self.offsets[-1])
        if not self._gapless and self.samples < global_batch:
            raise RequestError(
                f"the global batch of {global_batch} is larger than the {self.samples} samples of an epoch",
                where="global_batch",
                hint=f"at most {self.samples}, or exact_epoch=true",
            )
        if len(sources) > 1:
            self._quotas = _quotas(self.sources, weights)
            self._turns, self._taken = _interleave(self._quotas)
        # The current and the next epoch of each source; a permutation of 10 M samples takes half a second and 80 MB.
        self._epoch = lru_cache(maxsize=2 * len(sources))(lambda i, epoch: epoch_order(self.sources[i], seed, epoch, lanes))

    @property
    def _gapless(self) -> bool:
        return self.exact_epoch or len(self.sources) > 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample has come (but for the dropped tail); a mixture's epoch is as long as all its sources together."""
        whole = self.samples // self.global_batch
        return -(-self.samples // self.global_batch) if self._gapless else whole

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Global ids and their sources' epochs of one global batch, both int64 of length global_batch. O(1) in `step`.

        A global id is the sample's id in its source plus the sizes of the sources before it.
        """
        size = self.global_batch
        if self._gapless:
            position_B = np.arange(step * size, (step + 1) * size, dtype=np.int64)
        else:
            epoch, inside = divmod(step, self.steps_per_epoch)
            position_B = epoch * self.samples + np.arange(inside * size, (inside + 1) * size, dtype=np.int64)
        if len(self.sources) == 1:
            source_B, count_B = np.zeros_like(position_B), position_B
        else:
            source_B, count_B = self._turn(position_B)
        inside_B, epoch_B, id_B = np.empty_like(position_B), np.empty_like(position_B), np.empty_like(position_B)
        for i in np.unique(source_B):
            mine = source_B == i
            epoch_B[mine], inside_B[mine] = np.divmod(count_B[mine], self.sources[i].samples)
            for epoch in np.unique(epoch_B[mine]):
                now = mine & (epoch_B == epoch)
                id_B[now] = self.offsets[i] + self._epoch(int(i), int(epoch))[inside_B[now]]
        by_lane = np.argsort(inside_B % self.lanes, kind="stable")
        return id_B[by_lane], epoch_B[by_lane]

    def _turn(self, position_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is at these positions, and how many turns that source has had before."""
        period_B, inside_B = np.divmod(position_B, len(self._turns))
        source_B = self._turns[inside_B].astype(np.int64)
        return source_B, period_B * self._quotas[source_B] + self._taken[inside_B]


def _quotas(sources: Sequence[Source], weights: Sequence[float] | None) -> np.ndarray:
    if weights is None:
        return np.array([source.samples for source in sources], dtype=np.int64)
    share = np.asarray(weights, dtype=np.float64)
    if share.shape != (len(sources),) or not np.all(np.isfinite(share)) or np.any(share <= 0):
        raise RequestError(f"expected {len(sources)} positive weights, got {list(weights)}", where="weights")
    exact = share / share.sum() * _WEIGHT_PERIOD
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    for i in np.argsort(quotas - exact, kind="stable")[: max(_WEIGHT_PERIOD - int(quotas.sum()), 0)]:
        quotas[i] += 1
    return quotas // np.gcd.reduce(quotas)


def _interleave(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one period: the source at each position (int16), and that source's turns before it (int64)."""
    due = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
    source = np.repeat(np.arange(len(quotas), dtype=np.int16), quotas)
    turn = np.concatenate([np.arange(quota, dtype=np.int64) for quota in quotas])
    by_due = np.argsort(due, kind="stable")
    return source[by_due], turn[by_due]
