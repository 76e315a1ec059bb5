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

import numpy as np
from isal import isal_zlib

from base import storage
from base.errors import WorkError
from shards import decode, manifest, shardfile
from shards.order import Source
from shards.shardfile import Row, ShardFile


class DamagedSample(WorkError):
    """One sample cannot be read: its bytes differ from what was packed (in a fresh copy too), or do not decode."""


class Sample(NamedTuple):
    """id; image u8 HWC; seg u8 HW or None; raw labels {name: 1 | 0 | -1 (uncertain) | None (unknown)} (of a
    multiclass dataset the class alone); patient hash; metadata; key `<dataset>-<20 hex>`."""

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
    Raises:
        RequestError: nothing packed there, or no such split.
    Reading raises WorkError naming shard, key and reason for a damaged sample: none is skipped in silence.
    """

    def __init__(self, url: str, splits: Sequence[str] = ("train",), cache_dir: str | None = None) -> None:
        self.url, self.splits, self.cache_dir = url, tuple(splits), cache_dir
        self.manifest = manifest.read(url)
        self.card = self.manifest.card
        self.labels = list(self.card.labels)
        self.channels: int = self.card.channels
        self.has_masks: bool = self.card.has_masks
        self.shards = self.manifest.splits(self.splits)
        self.starts = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)
        self._starts: list[int] = self.starts.tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def source(self) -> Source:
        """Identity and sizes for shards.order."""
        return Source(f"{self.manifest.digest}:{'+'.join(self.splits)}", tuple(shard.samples for shard in self.shards))

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
            raise self._damaged(i, row, f"its mask is {mask.shape}, its image {pixels.shape[:2]}")
        key = f"{self.manifest.dataset}-{row.key.decode()}"
        return Sample(i, pixels, mask, side.get("labels", {}), row.patient.decode(), side.get("meta", {}), key)

    def stored(self, i: int, *, image: bool = True, seg: bool = True, text: bool = True) -> tuple[Row, dict[str, memoryview]]:
        """The index row of sample i and its parts `image`, `json` and `seg` as they are stored, by one pread: they lie side by side.

        A part whose checksum differs is read again from a fresh copy of its shard, where there is one to fetch.
        """
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect_right(self._starts, i) - 1
        entry = self.shards[number]
        while True:
            shard = shardfile.opened(entry, self.url, self.cache_dir)
            row = shard.row(i - self._starts[number])
            spans = []
            if image:
                spans.append(("image", row.image_off, row.image_len, row.image_crc))
            if text:
                spans.append(("json", row.json_off, row.json_len, row.json_crc))
            if seg and row.seg_len:
                spans.append(("seg", row.seg_off, row.seg_len, row.seg_crc))
            start = min(span[1] for span in spans)
            data = memoryview(shard.read(start, max(offset + length for _, offset, length, _ in spans) - start))
            parts = {name: data[offset - start : offset - start + length] for name, offset, length, _ in spans}
            wrong = next((name for name, _, _, crc in spans if isal_zlib.crc32(parts[name]) != crc), None)
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
        return [f"{self.manifest.dataset}-{key.decode()}" for shard in self._opened() for key in shard.rows()["key"].tolist()]

    def check_keys(self) -> None:
        """Raises WorkError unless every sample has a key of its own: a sample counted twice is a wrong metric."""
        # The first 64 of a key's 80 bits are 8 bytes a sample; whole strings only decide where those meet.
        bits = [bytes.fromhex(shard.rows()["key"].tobytes().decode()) for shard in self._opened()]
        start_N = np.frombuffer(b"".join(bits), np.uint8).reshape(-1, 10)[:, :8].copy().view(np.uint64)
        if len(np.unique(start_N)) < len(self) and (distinct := len(set(self.keys()))) < len(self):
            raise WorkError(f"{len(self)} samples, {distinct} different keys", where=self.url, hint="pack the dataset again")

    def _opened(self) -> Iterator[ShardFile]:
        return (shardfile.opened(entry, self.url, self.cache_dir) for entry in self.shards)

    def _damaged(self, i: int, row: Row, reason: str) -> DamagedSample:
        shard = self.shards[bisect_right(self._starts, i) - 1].name
        where = f"{storage.join(self.url, shard)}.tar: {self.manifest.dataset}-{row.key.decode()}"
        return DamagedSample(f"the sample cannot be read: {reason}", where=where, hint="pack the dataset again")
