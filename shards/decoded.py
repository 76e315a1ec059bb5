"""A corpus decoded once a node: arrays of bytes on disk that all processes map, for sets that are read again and again.

    decoded = decode_all(corpus, size=96)              # images u8 (N, C, 96, 96), targets, patients, ...

A fine-tuning cell reads a small set for tens of epochs, and a node runs many cells: the first of them decodes, the others map what it
wrote, and none holds it in memory twice. `shards.views.augment` makes each training batch of it. The arrays lie in the node's cache under
a key of all that decides them, and make room for others like shards do.
"""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from base.config import digest
from shards import cache
from shards.card import NOT_JUDGED
from shards.corpus import Corpus
from shards.evaluate import in_order
from shards.labels import targets
from shards.views import VIEWS_VERSION, resize, resize_mask

_FORMAT = 1
Pad = Literal["black", "white"] | None
FILL = {"black": 0, "white": 255}


class Decoded(NamedTuple):
    """A corpus in id order.

    images: u8 (N, C, size, size). seg: u8 (N, size, size), NOT_JUDGED where a sample has none; None for data without masks. Both are
        mapped, shared with other processes until written to.
    target, mask: float32 (N, L), see shards.labels.targets. raw: the labels as packed. ids: keys `<dataset>-<20 hex>`, which no packing
        changes.
    """

    images: np.ndarray
    seg: np.ndarray | None
    target: np.ndarray
    mask: np.ndarray
    labels: list[str]
    raw: list[dict[str, int | None]]
    patients: list[str]
    meta: list[dict[str, Any]]
    ids: list[str]


def decode_all(corpus: Corpus, size: int, labels: Sequence[str] | None = None, pad: Pad = None) -> Decoded:
    """The whole corpus, resized for evaluation (views.resize), from the node's cache. Targets are those of `labels` (default: its own).

    Args:
        pad: oblong images are first made square with that colour, the image in the middle; what is added to a mask is NOT_JUDGED.
    Raises:
        WorkError: as eval_batches; for a damaged sample, since the result of a cell is that of its whole dataset; no space left.
    """
    key = digest([_FORMAT, VIEWS_VERSION, corpus.source.digest, size, *([pad] if pad else [])])[:32]
    folder = Path(corpus.cache_dir or cache.default_dir()) / "decoded" / key
    while True:
        if not folder.is_dir():
            cache.make_once(folder, partial(_write, corpus, size, pad), "decoded images")
        try:
            os.utime(folder)  # the time of last use, by which the cache makes room
            images = np.load(folder / "images.npy", mmap_mode="c")
            seg = np.load(folder / "seg.npy", mmap_mode="c") if corpus.has_masks else None
            rows = json.loads((folder / "rows.json").read_bytes())
        except FileNotFoundError:  # another process made room just now, or was ended while it did
            with suppress(FileNotFoundError):
                cache.discard(str(folder))
            continue
        names = list(corpus.labels if labels is None else labels)
        return Decoded(images, seg, *targets(rows["raw"], corpus.card, names), labels=names, **rows)


def _write(corpus: Corpus, size: int, pad: Pad, folder: Path) -> None:
    corpus.check_keys()
    cv2.setNumThreads(0)
    raw, patients, meta = [], [], []
    with ExitStack() as stack:
        # Written from first to last, not through a map: a full disk is then an error and not a signal that ends the process.
        images = stack.enter_context((folder / "images.npy").open("wb"))
        _begin(images, (len(corpus), corpus.channels, size, size))
        segs = stack.enter_context((folder / "seg.npy").open("wb")) if corpus.has_masks else None
        if segs is not None:
            _begin(segs, (len(corpus), size, size))
        for i in in_order(corpus):
            sample = corpus.read(i, seg=segs is not None)
            images.write(resize(_squared(sample.image, FILL[pad]) if pad else sample.image, size).transpose(2, 0, 1).tobytes())
            if segs is not None:
                seg = sample.seg if sample.seg is None or pad is None else _squared(sample.seg, NOT_JUDGED)
                mask = np.full((size, size), NOT_JUDGED, np.uint8) if seg is None else resize_mask(seg, size)
                segs.write(mask.tobytes())
            raw.append(sample.labels)
            patients.append(sample.patient)
            meta.append(sample.meta)
    rows = {"raw": raw, "patients": patients, "meta": meta, "ids": corpus.keys()}
    (folder / "rows.json").write_text(json.dumps(rows))


def _squared(pixels: np.ndarray, value: int) -> np.ndarray:
    """HWC or HW with the shorter side filled up on both ends."""
    side = max(pixels.shape[:2])
    square = np.full((side, side, *pixels.shape[2:]), value, np.uint8)
    top, left = ((side - length) // 2 for length in pixels.shape[:2])
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return square


def _begin(file: Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
