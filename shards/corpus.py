"""A packed dataset as a sequence: sample i by one read of the node's local copy of its shard, checked and decoded.

    corpus = Corpus("OUT/shards/nih-cxr14", splits=("train", "val"))
    corpus[17].image                                 # u8 HWC
    corpus.records()                                 # raw labels, patients and metadata; shards.labels makes targets of them

Ids count through the manifest's shards of those splits. Nothing is opened, fetched or loaded before a sample of its shard is read.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from isal import isal_zlib

from base import storage
from base.config import digest
from base.errors import RequestError, WorkError
from shards import decode, manifest, shardfile
from shards.order import Source
from shards.shardfile import Row


class DamagedSample(WorkError):
    """One sample cannot be read: its bytes differ from what was packed (in a fresh copy too), or do not decode."""


class Sample(NamedTuple):
    """id; image u8 HWC; seg u8 HW or None, of the image's size, or as it was drawn where no image is read; raw labels
    {name: 1 | 0 | -1 (uncertain) | None (unknown)} (of a multiclass dataset the class alone); patient hash; metadata; key
    `<dataset>-<20 hex>`."""

    id: int
    image: np.ndarray
    seg: np.ndarray | None
    labels: dict[str, int | None]
    patient: str
    meta: dict[str, Any]
    key: str


class Record(NamedTuple):
    """A sample without its pixels."""

    id: int
    labels: dict[str, int | None]
    patient: str
    meta: dict[str, Any]


class Corpus:
    """The samples of some splits of a packed dataset.

    Args:
        url: folder of manifest and shards, local or remote.
        splits: their shards, in the manifest's order.
        cache_dir: where local copies of remote shards go (default: shards.cache.default_dir()).
        without: ids of samples to leave out, as they count without this setting; the others close up.
    Raises:
        RequestError: nothing packed there, or no such split.
    Reading raises WorkError naming shard, key and reason for a damaged sample: none is skipped in silence.
    """

    def __init__(self, url: str, splits: Sequence[str] = ("train",), cache_dir: str | None = None, without: Sequence[int] = ()) -> None:
        self.url, self.splits, self.cache_dir, self.without = url, tuple(splits), cache_dir, sorted(set(without))
        self.manifest = manifest.read(url)
        self.card = self.manifest.card
        self.labels = list(self.card.labels)
        self.channels: int = self.card.channels
        self.has_masks: bool = self.card.has_masks
        self._mask_sizes = self.card.max_side is not None or any(layout.mask_resize for layout in self.card.layouts)  # of their own
        self.shards = self.manifest.splits(self.splits)
        self._kept = _kept_rows([shard.samples for shard in self.shards], self.without)
        sizes = [len(self._kept[n]) if n in self._kept else shard.samples for n, shard in enumerate(self.shards)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._starts: list[int] = self.starts.tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def source(self) -> Source:
        """Identity and sizes for shards.order."""
        name = f"{self.manifest.digest}:{'+'.join(self.splits)}" + (f":without {digest(self.without)}" if self.without else "")
        return Source(name, tuple(np.diff(self.starts).tolist()))

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def read(self, i: int, *, image: bool = True, seg: bool = True, text: bool = True) -> Sample:
        """Sample i, or the parts of it that are asked for; the others are left empty."""
        row, parts = self.stored(i, image=image, seg=seg, text=text)
        try:
            pixels = (
                decode.image(parts["image"], self.channels, self.card.windows) if image else np.empty((0, 0, self.channels), dtype=np.uint8)
            )
            mask = decode.mask(parts["seg"]) if "seg" in parts else None
            side = json.loads(bytes(parts["json"])) if text else {}
        except ValueError as error:
            raise self._damaged(i, row, str(error)) from error
        if image and mask is not None and mask.shape != pixels.shape[:2]:
            if not self._mask_sizes:
                raise self._damaged(i, row, f"its mask is {mask.shape}, its image {pixels.shape[:2]}")
            mask = cv2.resize(mask, pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        key = f"{self.manifest.dataset}-{row.key.decode()}"
        return Sample(i, pixels, mask, side.get("labels", {}), row.patient.rstrip(b"\0").decode(), side.get("meta", {}), key)

    def stored(self, i: int, *, image: bool = True, seg: bool = True, text: bool = True) -> tuple[Row, dict[str, memoryview]]:
        """The index row of sample i and its parts `image`, `json` and `seg` as they are stored, without a copy: they lie in the page cache.

        A part whose checksum differs is read again from a fresh copy of its shard, where there is one to fetch.
        """
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect_right(self._starts, i) - 1
        entry = self.shards[number]
        while True:
            shard = shardfile.opened(entry, self.url, self.cache_dir)
            place = i - self._starts[number]
            row = shard.row(int(self._kept[number][place]) if number in self._kept else place)
            spans = []
            if image:
                spans.append(("image", row.image_off, row.image_len, row.image_crc))
            if text:
                spans.append(("json", row.json_off, row.json_len, row.json_crc))
            if seg and row.seg_len:
                spans.append(("seg", row.seg_off, row.seg_len, row.seg_crc))
            parts, wrong = shard.parts(spans), None
            for name, _, _, crc in spans:
                if isal_zlib.crc32(parts[name]) != crc:
                    wrong = name
            if wrong is None:
                return row, parts
            if not shardfile.renewed(entry, self.url, self.cache_dir):
                raise self._damaged(i, row, f"the checksum of its {wrong} differs")

    def records(self) -> list[Record]:
        """All samples without their pixels, in id order."""
        samples = (self.read(i, image=False, seg=False) for i in range(len(self)))
        return [Record(sample.id, sample.labels, sample.patient, sample.meta) for sample in samples]

    def keys(self) -> list[str]:
        """The samples' keys, `<dataset>-<20 hex>`, in id order: the same in every packing of the same raw files."""
        return [f"{self.manifest.dataset}-{key.decode()}" for rows in self.rows() for key in rows["key"].tolist()]

    def check_keys(self) -> None:
        """Raises WorkError unless every sample has a key of its own: a sample counted twice is a wrong metric."""
        # The first 64 of a key's 80 bits are 8 bytes a sample; whole strings only decide where those meet.
        bits = [bytes.fromhex(rows["key"].tobytes().decode()) for rows in self.rows()]
        start_N = np.frombuffer(b"".join(bits), np.uint8).reshape(-1, 10)[:, :8].copy().view(np.uint64)
        if len(np.unique(start_N)) < len(self) and (distinct := len(set(self.keys()))) < len(self):
            raise WorkError(f"{len(self)} samples, {distinct} different keys", where=self.url, hint="pack the dataset again")

    def rows(self) -> Iterator[np.ndarray]:
        """The index rows of each shard, of manifest.INDEX_DTYPE, in id order."""
        for number, entry in enumerate(self.shards):
            rows = shardfile.opened(entry, self.url, self.cache_dir).rows()
            yield rows[self._kept[number]] if number in self._kept else rows

    def _damaged(self, i: int, row: Row, reason: str) -> DamagedSample:
        shard = self.shards[bisect_right(self._starts, i) - 1].name
        where = f"{storage.join(self.url, shard)}.tar: {self.manifest.dataset}-{row.key.decode()}"
        return DamagedSample(f"the sample cannot be read: {reason}", where=where, hint="pack the dataset again")


def _kept_rows(sizes: Sequence[int], without: Sequence[int]) -> dict[int, np.ndarray]:
    """What is kept of the shards that lose samples, by their number. Raises RequestError for an id that there is not."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if without and (without[0] < 0 or without[-1] >= starts[-1]):
        raise RequestError(f"samples {without[0]} to {without[-1]} cannot be left out of {starts[-1]}", where="without")
    number_K = np.searchsorted(starts, without, side="right") - 1
    return {n: np.delete(np.arange(sizes[n]), np.asarray(without)[number_K == n] - starts[n]) for n in set(number_K.tolist())}
