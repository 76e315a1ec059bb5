"""Predictions of cells, read from their predictions.parquet: the columns and the split that statistics need, and no more.

    load = Loaded(); held = load(cell)       # Scores of the test split, or None

Cells of one task tested the same images: what is known of these is held once for all of them.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.replicates import Scores
from analysis.results import Cell
from base import storage

HELD = 48  # predictions of cells in memory, some 3 MB each where 25,000 test images have 14 labels
SHARED = 4  # sets of test images in memory
OF_IMAGES = ("split", "sample_id", "patient", "stratum")
PREDICTED = ("decided", "dice", "iou")
Images = tuple[NDArray[np.int64], Scores]  # rows of the test split by sample_id, and what is known of these images


class Loaded:
    """Predictions of cells, the HELD last ones kept: a study of 10,000 cells has more of them than memory."""

    def __init__(self) -> None:
        self._held: dict[str, Scores | None] = {}
        self._images: dict[bytes, Images] = {}

    def __call__(self, cell: Cell) -> Scores | None:
        found = self._held.pop(cell.key) if cell.key in self._held else scores(cell, self._images)
        self._held[cell.key] = found
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return found


def scores(cell: Cell, images: dict[bytes, Images] | None = None) -> Scores | None:
    """Test predictions of a cell as arrays; None when they were not kept or hold a score that is not a number.

    Args:
        images: sets of images that other cells had, by their digest; this cell's is added.
    """
    table = _rows(cell)
    if table is None:
        return None
    held = [name.removeprefix("score_") for name in table.column_names if name.startswith("score_")]
    # Some tasks train on labels that they do not measure.
    labels = [label for label in held if label in cell.measured] or held
    known, key = {} if images is None else images, _digest(table, labels)
    if key not in known:
        if len(known) >= SHARED:
            del known[next(iter(known))]
        known[key] = _images(table, labels)
    order, shared = known[key]
    dice, iou = (_finite(table, name, order) for name in ("dice", "iou"))
    seeds = {"seed": int(cell.seed), "source_seed": cell.source_seed}
    if dice is not None:
        return shared.again(**seeds, dice_N=dice, iou_N=iou)
    score = _columns(table, "score", labels, order) if labels else np.empty((0, 0))
    if not score.size or not np.isfinite(score).all():
        return None
    true = decided = None
    if "decided" in table.column_names:
        true = _columns(table, "target", held, order).argmax(1)
        place = {label: at for at, label in enumerate(held)}
        decided = np.array([place[label] for label in table["decided"].take(order).to_pylist()], np.int64)
    return shared.again(**seeds, score_NL=score, true_N=true, decided_N=decided)


def _rows(cell: Cell) -> pa.Table | None:
    raw = storage.read_or_none(storage.join(cell.url, "predictions.parquet"))
    if raw is None:
        return None
    file = pq.ParquetFile(pa.BufferReader(raw))
    wanted = (*OF_IMAGES, *PREDICTED)
    names = [name for name in file.schema_arrow.names if name in wanted or name.startswith(("score_", "target_"))]
    return file.read(columns=names, use_threads=False).combine_chunks()


def _columns(table: pa.Table, kind: str, labels: list[str], order: NDArray[np.int64]) -> Any:
    return np.column_stack([table[f"{kind}_{label}"].to_numpy()[order] for label in labels]).astype(float)


def _finite(table: pa.Table, name: str, order: NDArray[np.int64]) -> Any:
    column = table[name].to_numpy()[order].astype(float) if name in table.column_names else np.array([])
    return column if np.isfinite(column).any() else None


def _digest(table: pa.Table, labels: list[str]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name in (*(name for name in OF_IMAGES if name in table.column_names), *(f"target_{label}" for label in labels)):
        found.update(name.encode())
        for chunk in table[name].chunks:
            for buffer in chunk.buffers():
                found.update(b"-" if buffer is None else buffer)
    return found.digest()


def _images(table: pa.Table, labels: list[str]) -> Images:
    """What every cell that tested these images shares."""
    test = np.flatnonzero(np.asarray(table["split"].to_pylist(), str) == "test")
    every = np.array(table["sample_id"].to_pylist(), str)
    order = test[np.argsort(every[test], kind="stable")]
    ids, named = every[order], table["patient"].take(order).to_pylist()
    # An image without a patient is a patient of its own.
    patients = np.array([str(patient) if patient else f"image {image}" for image, patient in zip(ids, named, strict=True)], object)
    target = _columns(table, "target", labels, order) if labels else None
    strata = table["stratum"].take(order).to_pylist() if "stratum" in table.column_names else []
    known = any(stratum is not None for stratum in strata)
    stratum = np.array([None if stratum is None else str(stratum) for stratum in strata], object) if known else None
    target = None if target is None else np.where(target < 0, np.nan, target)
    return order, Scores(0, ids, patients, target, stratum_N=stratum)
