"""Shared memory for the batches in flight, written by workers and used again once a batch has been let go.

New shared memory costs a page fault for every 4 KB, a tenth of the time that a batch takes; here it is touched once. A batch that is kept
keeps its slot, so nothing that a caller holds is ever overwritten.
"""

import weakref

import torch


class Slots:
    """`count` pieces of `size` bytes. Made before the workers start, which inherit it."""

    def __init__(self, count: int, size: int) -> None:
        self.memory = torch.empty((count, size), dtype=torch.uint8).share_memory_()
        self._free = list(range(count))

    def take(self) -> int | None:
        """A free slot, or None when all are held."""
        return self._free.pop() if self._free else None

    def lend(self, slot: int, size: int) -> torch.Tensor:
        """The first `size` bytes of the slot, flat u8; the slot is free again when the last tensor on them is gone."""
        held = self.memory[slot, :size].numpy()
        weakref.finalize(held, self._free.append, slot).atexit = False
        return torch.from_numpy(held)
