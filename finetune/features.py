"""Features of a frozen encoder: computed once, kept in memory or in the node's cache, where all cells of the node map them.

    maps = keep(embed, n, batch, folder)                 # [float32 (n, ...)], or None where they would take too much room
    features = Features(maps, rows)                      # of the images at those rows
    x = features.at(index)

A linear cell trains for a hundred epochs on what one pass of the encoder gives; its seeds, learning rates and heads, and kNN and the probe
of lp-ft, read what the first cell wrote. Kept are features of the evaluation view alone.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import cache

FORMAT = 1
LIMIT_BYTES = 2 << 30  # of one split; larger features are computed again for each batch
Embed = Callable[[NDArray[np.int64]], list[Tensor]]


@dataclass(frozen=True)
class Features:
    """What the head reads of some images: row `rows[i]` of every map belongs to image i."""

    maps: list[Tensor]
    rows: NDArray[np.int64]

    def at(self, index: NDArray[np.int64]) -> list[Tensor]:
        """Those of the images at these positions, copied."""
        chosen = torch.from_numpy(self.rows[index])
        return [x[chosen] for x in self.maps]


def chunks(n: int, size: int) -> Iterator[NDArray[np.int64]]:
    """0..n-1 in consecutive parts: always the same ones, since the last bits of a feature may depend on its batch."""
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))


def keep(embed: Embed, n: int, batch: int, folder: Path | None) -> list[Tensor] | None:
    """Features of n images, one copy of them: mapped from `folder`, which is made if need be, or in memory if that is None.

    Args:
        embed: positions -> float32 maps on the CPU; called for consecutive ones, `batch` at a time.
        folder: `<cache>/features/<key>`; the key says all that decides the numbers.
    Returns:
        None where they would take more than LIMIT_BYTES.
    Raises:
        WorkError: no space left.
    """
    while True:
        if folder is None or not folder.is_dir():
            first = embed(np.arange(min(batch, n)))
            if sum(x.nbytes for x in first) / len(first[0]) * n > LIMIT_BYTES:
                return None
            if folder is None:
                return _in_memory(embed, n, batch, first)
            cache.make_once(folder, partial(_write, embed, n, batch, first), "features")
        try:
            os.utime(folder)  # the time of last use, by which the cache makes room
            levels = int((folder / "levels").read_text())
            return [torch.from_numpy(np.load(folder / f"{level}.npy", mmap_mode="c")) for level in range(levels)]
        except FileNotFoundError:  # another process made room just now
            continue


def _each(embed: Embed, n: int, batch: int, first: list[Tensor]) -> Iterator[tuple[NDArray[np.int64], list[Tensor]]]:
    for index in chunks(n, batch):
        yield index, embed(index) if index[0] else first


def _in_memory(embed: Embed, n: int, batch: int, first: list[Tensor]) -> list[Tensor]:
    kept = [torch.empty(n, *x.shape[1:]) for x in first]
    for index, maps in _each(embed, n, batch, first):
        for whole, x in zip(kept, maps, strict=True):
            whole[index[0] : index[-1] + 1] = x
    return kept


def _write(embed: Embed, n: int, batch: int, first: list[Tensor], folder: Path) -> None:
    with ExitStack() as stack:
        # Written from first to last, not through a map: a full disk is then an error and not a signal that ends the process.
        files: list[Any] = [stack.enter_context((folder / f"{level}.npy").open("wb")) for level in range(len(first))]
        for file, x in zip(files, first, strict=True):
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, *x.shape[1:])})
        for _, maps in _each(embed, n, batch, first):
            for file, x in zip(files, maps, strict=True):
                file.write(x.contiguous().numpy().tobytes())
    (folder / "levels").write_text(str(len(first)))
