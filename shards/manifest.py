"""The manifest of a packed dataset and the index of a shard: what every reader of shards trusts.

    manifest = read("OUT/shards/nih-cxr14")        # RequestError if nothing is packed there
    manifest.digest                                 # the dataset's version
    index_N = load_index(storage.read_bytes(url))   # structured array, one row a sample, dtype INDEX_DTYPE

A directory of shards holds `<dataset>-<split>-00000.tar`, the index `.idx` beside each, and `manifest.json`, written last.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from pydantic import Field

from base import storage
from base.config import Strict, canonical_json, digest, parse
from base.errors import RequestError, WorkError
from shards.card import Card, Split

MANIFEST = "manifest.json"
EXTENSIONS: tuple[str, ...] = ("jpg", "png", "u16.zst")  # index column `ext` counts into this

# Offsets are of the payload inside the tar (not its header), so one pread gives the bytes. crc is zlib.crc32. len 0 = absent.
INDEX_DTYPE = np.dtype(
    [
        ("key", "S20"),
        ("patient", "S16"),
        ("image_off", "<i8"),
        ("image_len", "<i8"),
        ("image_crc", "<u4"),
        ("json_off", "<i8"),
        ("json_len", "<i8"),
        ("json_crc", "<u4"),
        ("seg_off", "<i8"),
        ("seg_len", "<i8"),
        ("seg_crc", "<u4"),
        ("ext", "u1"),
    ]
)


class Quarantined(Strict):
    """A sample that was left out. `file` (relative to the raw folder) is written for public datasets only: names can identify."""

    key: str
    reason: str
    file: str | None = None


class Elsewhere(Strict):
    """A tar of others that holds a shard's images, where it lies."""

    url: str
    bytes: int
    sha256: str


class ShardEntry(Strict):
    """One shard. `positives` counts, a label, the samples in it whose value is 1. `images` names the tar into which the index's image
    offsets point, where that is not the shard itself."""

    name: str  # without extension
    split: Split
    bytes: int
    samples: int
    sha256: str
    index_sha256: str
    positives: dict[str, int] = Field(default_factory=dict)
    quarantined: list[Quarantined] = Field(default_factory=list)
    images: Elsewhere | None = None


class Manifest(Strict):
    """A packed dataset. Equal inputs give equal bytes, so `digest` is the dataset's version."""

    schema_: Literal[2] = Field(2, alias="schema")
    dataset: str
    card: Card
    layout: str
    shards: list[ShardEntry]
    counts: dict[str, int]
    patients: dict[str, int]
    positives: dict[str, dict[str, int]]
    quarantined: int
    expected: dict[str, int] = Field(default_factory=dict)  # images the card expects of this layout: a split's or the total
    of: int | None = None  # the whole dataset's images, where the layout is a subset of it
    split_rule: str  # official lists, columns or folders, files of the user's own, or the keyed hash of the patient
    left_out: int = 0  # images that a rule of the card or the user's split files leave out
    secret_fingerprint: str
    raw_digest: str

    @property
    def digest(self) -> str:
        """sha256 (64 hex) of the canonical JSON: the dataset's version."""
        return digest(self.model_dump(mode="json", by_alias=True))

    def text(self) -> str:
        """The bytes of manifest.json."""
        return canonical_json(self.model_dump(mode="json", by_alias=True)) + "\n"

    def splits(self, names: list[str] | tuple[str, ...]) -> list[ShardEntry]:
        """The shards of those splits, in the manifest's order. Raises RequestError for a split without shards."""
        for name in names:
            if name not in self.counts:
                raise RequestError(f"{self.dataset} has no split {name!r}", hint=f"its splits are {', '.join(self.counts)}")
        return [shard for shard in self.shards if shard.split in names]


def read(url: str) -> Manifest:
    """The manifest of the shards at `url` (a directory, local or remote). Raises RequestError where there is none that can be read."""
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise RequestError("no packed dataset here", where=where, hint=f"allograft pack CARD RAW --out {url}")
    try:
        held = storage.read_json(where)
    except ValueError as error:
        raise RequestError(f"damaged: not JSON ({error})", where=where, hint="pack the dataset again") from None
    return parse(held, Manifest, where)


def dump_index(index_N: np.ndarray) -> bytes:
    """The bytes of an .idx file: a .npy file of INDEX_DTYPE rows."""
    buffer = io.BytesIO()
    np.save(buffer, index_N.astype(INDEX_DTYPE, copy=False), allow_pickle=False)
    return buffer.getvalue()


def load_index(data: bytes, where: str = "index") -> np.ndarray:
    """The rows of an .idx file, N of INDEX_DTYPE. Raises WorkError if it is not one."""
    try:
        index_N = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise WorkError(f"not an index: {error}", where=where, hint="pack the dataset again") from None
    if index_N.dtype != INDEX_DTYPE or index_N.ndim != 1:
        raise WorkError(f"not an index of this version: {index_N.dtype}", where=where, hint="pack the dataset again")
    return index_N
