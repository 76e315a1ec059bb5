"""Predictions of cells, read from their predictions.parquet: the columns and the split that statistics need, and no more.

    load = Loaded(); held = load(cell)       # Scores of the test split, or None

Cells of one task tested the same images: what is known of these is held once for all of them.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.replicates import Scores
from analysis.results import Cell
from base import storage

HELD = 48  # predictions of cells in memory, some 3 MB each where 25,000 test images have 14 labels
SHARED = 4  # sets of test images in memory
OF_IMAGES = ("sample_id", "patient", "stratum")
PREDICTED = ("decided", "dice", "iou")


class Loaded:
    """Predictions of cells, the HELD last ones kept: a study of 10,000 cells has more of them than memory."""

    def __init__(self) -> None:
        self._held: dict[str, Scores | None] = {}
        self._images: dict[bytes, Scores] = {}

    def __call__(self, cell: Cell) -> Scores | None:
        found = self._held.pop(cell.key) if cell.key in self._held else scores(cell, self._images)
        self._held[cell.key] = found
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return found


def scores(cell: Cell, images: dict[bytes, Scores] | None = None) -> Scores | None:
    """Test predictions of a cell as arrays; None when they were not kept or hold a score that is not a number.

    Args:
        images: sets of test images that other cells had, by their digest; this cell's is added.
    """
    table = _test_rows(cell)
    if table is None:
        return None
    held = [name.removeprefix("score_") for name in table.column_names if name.startswith("score_")]
    # Some tasks train on labels that they do not measure.
    labels = [label for label in held if label in cell.measured] or held
    dice, iou = (_finite(table, name) for name in ("dice", "iou"))
    score = true = decided = None
    if labels and dice is None:
        score = _columns(table, "score", labels)
        if not np.isfinite(score).all():
            return None
        if "decided" in table.column_names:
            true = _columns(table, "target", held).argmax(1)
            place = {label: at for at, label in enumerate(held)}
            decided = np.array([place[label] for label in table["decided"].to_pylist()], np.int64)
    targets = [] if score is None else labels
    if dice is None and score is None:
        return None
    known, key = {} if images is None else images, _digest(table, targets)
    if key not in known:
        if len(known) >= SHARED:
            del known[next(iter(known))]
        known[key] = _images(table, targets)
    seeds = {"seed": int(cell.seed), "source_seed": cell.source_seed}
    return known[key].again(**seeds, score_NL=score, dice_N=dice, iou_N=iou, true_N=true, decided_N=decided)


def _test_rows(cell: Cell) -> pa.Table | None:
    """In the order of sample_id."""
    raw = storage.read_or_none(storage.join(cell.url, "predictions.parquet"))
    if raw is None:
        return None
    file = pq.ParquetFile(pa.BufferReader(raw))
    wanted = ("split", *OF_IMAGES, *PREDICTED)
    names = [name for name in file.schema_arrow.names if name in wanted or name.startswith(("score_", "target_"))]
    table = file.read(columns=names, use_threads=False)
    table = table.filter(pc.equal(table["split"], "test"))
    return table.take(pc.sort_indices(table["sample_id"])).combine_chunks() if len(table) else None


def _columns(table: pa.Table, kind: str, labels: list[str]) -> Any:
    return np.column_stack([table[f"{kind}_{label}"].to_numpy() for label in labels]).astype(float)


def _finite(table: pa.Table, name: str) -> Any:
    column = table[name].to_numpy().astype(float) if name in table.column_names else np.array([])
    return column if np.isfinite(column).any() else None


def _digest(table: pa.Table, labels: list[str]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name in (*(name for name in OF_IMAGES if name in table.column_names), *(f"target_{label}" for label in labels)):
        found.update(name.encode())
        for chunk in table[name].chunks:
            for buffer in chunk.buffers():
                found.update(b"-" if buffer is None else buffer)
    return found.digest()


def _images(table: pa.Table, labels: list[str]) -> Scores:
    """What every cell that tested these images shares."""
    ids, named = (table[name].to_pylist() for name in ("sample_id", "patient"))
    # An image without a patient is a patient of its own.
    patients = np.array([str(patient) if patient else f"image {image}" for image, patient in zip(ids, named, strict=True)], object)
    target = _columns(table, "target", labels) if labels else None
    strata = table["stratum"].to_pylist() if "stratum" in table.column_names else []
    known = any(stratum is not None for stratum in strata)
    stratum = np.array([None if stratum is None else str(stratum) for stratum in strata], object) if known else None
    target = None if target is None else np.where(target < 0, np.nan, target)
    return Scores(0, np.array(ids, str), patients, target, stratum_N=stratum)
