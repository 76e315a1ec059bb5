"""A packed dataset as a sequence: sample i by one read of the node's local copy of its shard, checked and decoded.

    corpus = Corpus("OUT/shards/nih-cxr14", splits=("train", "val"))
    corpus[17].image                                 # u8 HWC
    targets([r.labels for r in corpus.records()], corpus.labels)     # float32 N x L and the mask of what is known

Ids count through the manifest's shards of those splits. Files are opened when first read, in the process that reads them (workers fork).
"""

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from base import storage
from base.errors import WorkError
from shards import cache, decode, manifest
from shards.order import Source

_OPEN_FILES = 128  # a process's limit is often 1024


class Sample(NamedTuple):
    """id; image u8 HWC; seg u8 HW or None; raw labels {name: 1 | 0 | -1 (uncertain) | None (unknown)}; patient hash; metadata."""

    id: int
    image: np.ndarray
    seg: np.ndarray | None
    labels: dict[str, int | None]
    patient: str
    meta: dict[str, Any]


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
        self._starts = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)
        self._index: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for file in self._files.values():
                os.close(file)

    @property
    def source(self) -> Source:
        """Identity and sizes for shards.order."""
        return Source(f"{self.manifest.digest}:{'+'.join(self.splits)}", tuple(shard.samples for shard in self.shards))

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def read(self, i: int, *, image: bool = True, seg: bool = True, text: bool = True) -> Sample:
        """Sample i, or the parts of it that are asked for; the others are left empty. One pread over the parts, which lie side by side."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = self._rows(shard)[i - int(self._starts[shard])]
        wanted = {"image": image, "json": text, "seg": seg and bool(row["seg_len"])}
        spans = {part: (int(row[f"{part}_off"]), int(row[f"{part}_len"]), int(row[f"{part}_crc"])) for part, on in wanted.items() if on}
        start = min(offset for offset, _, _ in spans.values())
        end = max(offset + length for offset, length, _ in spans.values())
        data = memoryview(os.pread(self._file(shard), end - start, start))
        parts = {}
        for part, (offset, length, crc) in spans.items():
            parts[part] = data[offset - start : offset - start + length]
            if zlib.crc32(parts[part]) != crc:
                raise self._damaged(shard, row, f"the checksum of its {part} differs")
        try:
            pixels = decode.image(parts["image"], self.channels) if image else np.empty((0, 0, self.channels), dtype=np.uint8)
            mask = decode.mask(parts["seg"]) if "seg" in parts else None
            side = json.loads(bytes(parts["json"])) if text else {}
        except ValueError as error:
            raise self._damaged(shard, row, str(error)) from error
        if image and mask is not None and mask.shape != pixels.shape[:2]:
            raise self._damaged(shard, row, f"its mask is {mask.shape}, its image {pixels.shape[:2]}")
        return Sample(i, pixels, mask, side.get("labels", {}), row["patient"].decode(), side.get("meta", {}))

    def records(self) -> list[Record]:
        """All samples without their pixels, in id order."""
        samples = (self.read(i, image=False, seg=False) for i in range(len(self)))
        return [Record(sample.id, sample.labels, sample.patient, sample.meta) for sample in samples]

    def keys(self) -> list[str]:
        """The samples' keys, `<dataset>-<20 hex>`, in id order: the same in every packing of the same raw files."""
        return [f"{self.manifest.dataset}-{key.decode()}" for shard in range(len(self.shards)) for key in self._rows(shard)["key"]]

    def _rows(self, shard: int) -> np.ndarray:
        if shard not in self._index:
            entry = self.shards[shard]
            path = cache.local(storage.join(self.url, f"{entry.name}.idx"), entry.index_sha256, self.cache_dir)
            rows = manifest.load_index(storage.read_bytes(path), path)
            if len(rows) != entry.samples:
                raise WorkError(
                    f"the index has {len(rows)} rows, the manifest says {entry.samples}", where=path, hint="pack the dataset again"
                )
            self._index[shard] = rows
        return self._index[shard]

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # after a fork; the parent's descriptors stay the parent's to close
            self._files, self._pid = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self.shards[shard]
        path = cache.local(storage.join(self.url, f"{entry.name}.tar"), entry.sha256, self.cache_dir)
        self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def _damaged(self, shard: int, row: np.void, reason: str) -> WorkError:
        where = f"{storage.join(self.url, self.shards[shard].name)}.tar: {self.manifest.dataset}-{row['key'].decode()}"
        return WorkError(f"the sample cannot be read: {reason}", where=where, hint="pack the dataset again")


def targets(labels: Sequence[Mapping[str, int | None]], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Raw labels of N samples as float32 (N, L) of 0 and 1, and the mask (N, L), 1 where known.

    Uncertain (-1) counts as unknown, and so does a label that the sample's dataset does not have. Unknown targets are 0.
    """
    mask_NL = np.array([[sample.get(name) in (0, 1) for name in names] for sample in labels], dtype=np.float32).reshape(
        len(labels), len(names)
    )
    target_NL = np.array([[sample.get(name) == 1 for name in names] for sample in labels], dtype=np.float32).reshape(
        len(labels), len(names)
    )
    return target_NL, mask_NL
