"""A batch, and how it is read: positions of the order in, one shared uint8 tensor of views out. Training and evaluation share it.

A worker reads, decodes and writes the views of a batch into one shared tensor; a grey image travels as one channel of bytes, a twelfth of
three float32 channels. torch's DataLoader hands batches over in order whichever worker is first.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from base.errors import AllograftError, RequestError
from shards import prefetch
from shards.card import NOT_JUDGED
from shards.corpus import Corpus, DamagedSample, Sample
from shards.device_views import table
from shards.labels import Targets
from shards.order import Order
from shards.quarantine import Quarantine
from shards.slots import Slots
from shards.views import ViewsConfig, make

PREFETCH = 2  # batches that each worker reads ahead
# Images decoded before their views are made: one image at a time, decoder and views drive each other's code out of the processor's cache,
# which costs 7 %.
GROUP = 8


class Batch(NamedTuple):
    """A rank's part of a step.

    index_B: int64, id of the sample (in a mixture plus the sizes of the corpora before; -1 = padding). One that cannot be read is, in
        training, replaced by the next of its lane, whose id stands here; in evaluation it keeps its place and is not valid.
    views: u8 (B, C, H, W), one tensor a view.
    target_BL, mask_BL: float32; target 0 or 1, mask 1 where the label is known; None when no label was asked for.
    seg_BHW: u8 class indices, NOT_JUDGED where the sample has no mask; None for two views and for data without masks.
    valid_B: bool, False = padding, or a damaged sample (evaluation only).
    epoch_B: int64, the epoch of each sample in its corpus; with the id it names the sample's random draws. Ids and epochs stay on the host,
        where these are drawn, when the rest goes to a device.
    draws_VBP: float32 on the host, with views.device_side only: `views` is then the whole images, and these are what
        shards.device_views.apply makes the views by.
    """

    index_B: torch.Tensor
    views: list[torch.Tensor]
    target_BL: torch.Tensor | None
    mask_BL: torch.Tensor | None
    seg_BHW: torch.Tensor | None
    valid_B: torch.Tensor
    epoch_B: torch.Tensor
    draws_VBP: np.ndarray | None = None


class Parts(NamedTuple):
    """What a worker hands over: pixels by shared memory, the rest as small arrays."""

    index_B: np.ndarray
    epoch_B: np.ndarray
    pixels: torch.Tensor | int  # the views one after the other, flat; or the number of the slot that holds them
    shapes: list[tuple[int, int, int, int]]
    target_BL: np.ndarray | None
    mask_BL: np.ndarray | None
    seg_BHW: torch.Tensor | None
    valid_B: np.ndarray
    draws_VBP: np.ndarray | None
    damaged: list[DamagedSample]

    def batch(self, slots: Slots | None) -> Batch:
        if isinstance(self.pixels, int):
            assert slots is not None
            pixels = slots.lend(self.pixels, _bytes(self.shapes))
        else:
            pixels = self.pixels
        return Batch(
            torch.from_numpy(self.index_B),
            _split(pixels, self.shapes),
            None if self.target_BL is None else torch.from_numpy(self.target_BL),
            None if self.mask_BL is None else torch.from_numpy(self.mask_BL),
            self.seg_BHW,
            torch.from_numpy(self.valid_B),
            torch.from_numpy(self.epoch_B),
            self.draws_VBP,
        )


class BatchReader(Dataset[Parts | AllograftError]):
    """Reads batches of (global id, epoch); id -1 is padding. Shared by training, which has an order, and evaluation, which has none."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        views: ViewsConfig,
        labels: Sequence[str],
        seed: int,
        order: Order | None = None,
        quarantine_url: str | None = None,
    ) -> None:
        self.corpora, self.views, self.labels, self.seed, self.order = list(corpora), views, list(labels), seed, order
        self.starts = list(itertools.accumulate((len(corpus) for corpus in corpora), initial=0))
        self.channels = corpora[0].channels
        if any(corpus.channels != self.channels for corpus in corpora):
            found = ", ".join(f"{corpus.manifest.dataset} {corpus.channels}" for corpus in corpora)
            raise RequestError(f"the datasets of a mixture must have the same channels: {found}", where="data")
        self.rgb = corpora[0].card.colour
        self.with_masks = views.moves_masks and any(corpus.has_masks for corpus in corpora)
        self.targets = [Targets(corpus.card, labels, training=order is not None, seed=seed) for corpus in corpora]
        self.quarantine = Quarantine(self.starts[-1], quarantine_url)
        self.slots: Slots | None = None

    def source(self, i: int) -> int:
        return bisect_right(self.starts, i) - 1

    def sample(self, i: int) -> Sample:
        source = self.source(i)
        return self.corpora[source].read(i - self.starts[source], seg=self.with_masks, text=bool(self.labels))

    def readable(self, i: int, epoch: int, damaged: list[DamagedSample]) -> tuple[int, Sample | None]:
        """Sample i and its id; if it is damaged, the next in its lane that is not, or none without an order. `damaged` grows."""
        while True:
            try:
                return i, self.sample(i)
            except DamagedSample as error:
                damaged.append(error)
                if len(damaged) > self.quarantine.limit:
                    raise
                if self.order is None:
                    return i, None
                i = self.order.substitute(i, epoch)

    def __getitems__(self, order: tuple[Any, ...]) -> Parts | AllograftError:
        try:
            return self.read(*order)
        except AllograftError as error:
            return error  # raised again by `batches`: DataLoader would turn it into a page of traceback

    def read(self, id_B: np.ndarray, epoch_B: np.ndarray, slot: int | None = None) -> Parts:
        """The batch of those samples in the views of those epochs, written to that slot if there is one."""
        count, size, shared = len(id_B), self.views.size, torch.utils.data.get_worker_info() is not None
        shapes = self._shapes(count)
        held = None if slot is None or self.slots is None else self.slots.memory[slot, : _bytes(shapes)]
        pixels = _empty((_bytes(shapes),), shared) if held is None else held
        masks = _empty((count, size, size), shared) if self.with_masks else None
        out, out_seg = [view_BCHW.numpy() for view_BCHW in _split(pixels, shapes)], None if masks is None else masks.numpy()
        target_BL, mask_BL = np.zeros((2, count, len(self.labels)), np.float32) if self.labels else (None, None)
        damaged: list[DamagedSample] = []
        id_B = id_B.copy()
        valid_B = id_B >= 0
        for b, i, epoch, sample in self._samples(id_B.tolist(), epoch_B.tolist(), damaged):
            if sample is None:
                valid_B[b] = False
                for view_BCHW in out:
                    view_BCHW[b] = 0
                if out_seg is not None:
                    out_seg[b] = NOT_JUDGED
                continue
            id_B[b] = i
            views, moved = make(sample.image, sample.seg, self.views, (self.seed, epoch, i), self.rgb)
            for view_BCHW, view_HWC in zip(out, views, strict=True):
                cv2.split(view_HWC, list(view_BCHW[b]))  # into the planes: numpy's transposed copy of colour takes six times as long
            if out_seg is not None:
                out_seg[b] = NOT_JUDGED if moved is None else moved
            if target_BL is not None and mask_BL is not None:
                self.targets[self.source(i)].fill(sample.labels, sample.key, target_BL[b], mask_BL[b])
        handed, draws_VBP = pixels if slot is None else slot, self._draws(id_B, epoch_B)
        return Parts(id_B, epoch_B, handed, shapes, target_BL, mask_BL, masks, valid_B, draws_VBP, damaged)

    def _samples(
        self, ids: Sequence[int], epochs: Sequence[int], damaged: list[DamagedSample]
    ) -> Iterator[tuple[int, int, int, Sample | None]]:
        """Place, id, epoch and sample of each; none for padding."""
        for start in range(0, len(ids), GROUP):
            places = range(start, min(start + GROUP, len(ids)))
            found = [self.readable(ids[b], epochs[b], damaged) if ids[b] >= 0 else (ids[b], None) for b in places]
            yield from ((b, i, epochs[b], sample) for b, (i, sample) in zip(places, found, strict=True))

    def _shapes(self, count: int) -> list[tuple[int, int, int, int]]:
        return [(count, self.channels, side, side) for side in self.views.handed_sizes]

    def _draws(self, id_B: np.ndarray, epoch_B: np.ndarray) -> np.ndarray | None:
        if not (side := self.views.device_side):
            return None
        keys = [(self.seed, epoch, i) for i, epoch in zip(id_B.tolist(), epoch_B.tolist(), strict=True)]
        return table(self.views, keys, side, side, self.rgb)

    def batches(self, orders: Iterator[tuple[np.ndarray, np.ndarray]], workers: int) -> Iterator[Batch]:
        """Read in this process (workers=0) or by that many others. Raises WorkError when too many samples are damaged."""
        with closing(prefetch.ahead(orders, self.corpora)) as looked_ahead:
            handed, slots = self._start(looked_ahead, workers)
            for parts in handed:
                if isinstance(parts, AllograftError):
                    raise parts
                if parts.damaged:
                    self.quarantine.add(parts.damaged)
                yield parts.batch(slots)

    def _start(
        self, orders: Iterator[tuple[np.ndarray, np.ndarray]], workers: int
    ) -> tuple[Iterator[Parts | AllograftError], Slots | None]:
        if workers == 0:
            cv2.setNumThreads(0)  # images are small: OpenCV's own threads cost more than they give, and fight with torch's
            return map(self.__getitems__, orders), None
        first = next(orders, None)
        if first is None:
            return iter(()), None
        # The workers that start now inherit self.slots; another stream of this reader will have its own.
        slots = self.slots = Slots(PREFETCH * workers + 3, _bytes(self._shapes(len(first[0]))))
        loader: Any = DataLoader(
            self,
            batch_sampler=_Stream((*order, slots.take()) for order in itertools.chain([first], orders)),
            num_workers=workers,
            collate_fn=_same,
            prefetch_factor=PREFETCH,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the workers' seeds, which nothing here reads, would be drawn from the caller's random state
        )
        return iter(loader), slots


class _Stream(Sampler[Any]):
    """A one-off stream of orders in the shape that DataLoader asks for."""

    def __init__(self, orders: Iterator[tuple[Any, ...]]) -> None:
        self.orders = orders

    def __iter__(self) -> Iterator[Any]:
        return self.orders


def _same(parts: Any) -> Any:
    return parts


def _start_worker(worker: int) -> None:
    # 0 = no threads. Never 1: that joins the pool's threads, which a fork does not carry over, and waits for ever.
    cv2.setNumThreads(0)


def _bytes(shapes: Sequence[tuple[int, int, int, int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _split(pixels: torch.Tensor, shapes: Sequence[tuple[int, int, int, int]]) -> list[torch.Tensor]:
    parts = pixels.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _empty(shape: tuple[int, ...], shared: bool) -> torch.Tensor:
    # Memory that is shared from the start spares a worker the copy of each batch.
    tensor = torch.empty(shape, dtype=torch.uint8)
    return tensor.share_memory_() if shared else tensor
