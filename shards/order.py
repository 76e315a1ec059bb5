"""The order of training samples: a function of (data digests, mixture, seed, epoch, lanes, global batch), never of ranks or workers.

    order = Order([Source(digest, (1000, 1000, 417))], seed=0, global_batch=256)
    id_B, epoch_B = order.batch(step)               # any step, in any order, for the same price

One source, one epoch: the shards are permuted, samples are shuffled inside windows of K consecutive shards, and the result is cut into
`lanes` streams of consecutive samples; lane l holds order[l::lanes]. A lane therefore walks few shards at a time. Inside a global batch
positions stand lane by lane, so that a rank, which takes consecutive positions, owns whole lanes when ranks divide lanes: each node reads
its own part of the shards. Every sample comes once an epoch. The last incomplete global batch of an epoch is dropped; with `exact_epoch`
epochs follow one another without a gap instead and nothing is dropped.

Each window is drawn by itself when a lane reaches it, so ten million samples take no more memory or time to start than ten thousand.

Several sources are interleaved by earliest due time: the k-th of q samples of a source is due at (k + 1/2) / q of the period, so every
stretch of the sequence holds each source in its proportion (within one sample per source). Each source walks epochs of its own, without
gaps; nothing is dropped. Without weights the period is one pass over all sources and an epoch holds every sample once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from base.errors import RequestError
from base.seeds import rng

LANES = 16
WINDOW_SHARDS = 8
ORDER_VERSION = 2  # raised by whoever changes which sample comes when; pretrainings are keyed by it
_WEIGHT_PERIOD = 10_000  # explicit weights are rounded to 1e-4: then a period's counts make seeking O(1)


class Source(NamedTuple):
    """A dataset in a mixture: its identity (manifest digest and splits) and the number of samples in each shard."""

    digest: str
    shard_samples: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)


class Epoch:
    """One epoch of one source: a permutation of range(source.samples), made window by window as it is asked for."""

    def __init__(self, source: Source, seed: int, epoch: int, lanes: int = LANES, window: int = WINDOW_SHARDS) -> None:
        self._name, self._lanes, self._window = ("order", source.digest, seed, epoch), lanes, window
        self._sizes = np.asarray(source.shard_samples, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._shards = rng(*self._name).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[self._shards])
        self._window_starts = np.concatenate([[0], ends[window - 1 : -1 : window]])
        self._lane_length, self._longer_lanes = divmod(source.samples, lanes)
        self._drawn: OrderedDict[int, np.ndarray] = OrderedDict()

    def ids(self, position_N: np.ndarray) -> np.ndarray:
        """The samples at these positions of the epoch, int64."""
        flat_N = self._lane_start(position_N % self._lanes) + position_N // self._lanes
        return self._at(flat_N)

    def after(self, i: int) -> int:
        """The sample that follows sample i in its lane; the lane's first follows its last."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        window = int(np.flatnonzero(self._shards == shard)[0]) // self._window
        flat = int(self._window_starts[window]) + int(np.flatnonzero(self._draw(window) == i)[0])
        starts = self._lane_start(np.arange(self._lanes + 1))
        lane = int(np.searchsorted(starts, flat, side="right")) - 1
        following = flat + 1 if flat + 1 < starts[lane + 1] else int(starts[lane])
        return int(self._at(np.array([following]))[0])

    def _lane_start(self, lane_N: np.ndarray) -> np.ndarray:
        return lane_N * self._lane_length + np.minimum(lane_N, self._longer_lanes)

    def _at(self, flat_N: np.ndarray) -> np.ndarray:
        window_N = np.searchsorted(self._window_starts, flat_N, side="right") - 1
        id_N = np.empty_like(flat_N)
        for window in np.unique(window_N).tolist():
            mine = window_N == window
            id_N[mine] = self._draw(window)[flat_N[mine] - self._window_starts[window]]
        return id_N

    def _draw(self, window: int) -> np.ndarray:
        if window not in self._drawn:
            shards = self._shards[window * self._window : (window + 1) * self._window]
            ids = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in shards])
            rng(*self._name, window).shuffle(ids)
            self._drawn[window] = ids
            if len(self._drawn) > 3 * self._lanes:  # a lane is in one window or at the border of two; the third is for who looks ahead
                self._drawn.popitem(last=False)
        self._drawn.move_to_end(window)
        return self._drawn[window]


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
                hint=f"global_batch={self.samples} at most",
            )
        if len(sources) > 1:
            self._quotas = _quotas(self.sources, weights)
        self._epochs: OrderedDict[tuple[int, int], Epoch] = OrderedDict()

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
            first = step * size
        else:
            epoch, inside = divmod(step, self.steps_per_epoch)
            first = epoch * self.samples + inside * size
        if len(self.sources) == 1:
            source_B, count_B = np.zeros(size, dtype=np.int64), np.arange(first, first + size, dtype=np.int64)
        else:
            source_B, count_B = interleaved(self._quotas, first, size)
        inside_B, epoch_B, id_B = np.empty_like(count_B), np.empty_like(count_B), np.empty_like(count_B)
        for i in np.unique(source_B):
            mine = source_B == i
            epoch_B[mine], inside_B[mine] = np.divmod(count_B[mine], self.sources[i].samples)
            for epoch in np.unique(epoch_B[mine]):
                now = mine & (epoch_B == epoch)
                id_B[now] = self.offsets[i] + self._epoch(int(i), int(epoch)).ids(inside_B[now])
        by_lane = np.argsort(inside_B % self.lanes, kind="stable")
        return id_B[by_lane], epoch_B[by_lane]

    def substitute(self, i: int, epoch: int) -> int:
        """The global id that stands in for the global id `i`, which cannot be read, in that epoch: the next of the same lane."""
        source = int(np.searchsorted(self.offsets, i, side="right")) - 1
        offset = int(self.offsets[source])
        return offset + self._epoch(source, epoch).after(i - offset)

    def _epoch(self, source: int, epoch: int) -> Epoch:
        key = (source, epoch)
        if key not in self._epochs:
            self._epochs[key] = Epoch(self.sources[source], self.seed, epoch, self.lanes)
            if len(self._epochs) > 2 * len(self.sources):  # the current and the next of each
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]


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


def interleaved(quota_S: np.ndarray, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources by earliest due time, at positions first .. first + count: whose turn it is, and its turns before; both int64.

    Turn k of source i is due at (k + 1/2) / quota_i, the earlier source first where two are due at once. Its position is the number of
    turns that are due before it, which is counted in whole numbers source by source: nothing is stored, whatever the quotas.
    """
    total, sources = int(quota_S.sum()), len(quota_S)
    period, low = divmod(first, total)
    source_B, turn_B = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for i, quota in enumerate(quota_S.tolist()):
        turn = np.arange(max((low - sources) * quota // total - 1, 0), (low + count + sources) * quota // total + 2, dtype=np.int64)
        place = turn - low
        for j, other in enumerate(quota_S.tolist()):
            if j != i:
                due = (2 * turn + 1) * other
                place += ((due if j < i else due - 1) // quota + 1) // 2
        inside = (place >= 0) & (place < count)
        source_B[place[inside]] = i
        turn_B[place[inside]] = turn[inside] + period * quota
    return source_B, turn_B
