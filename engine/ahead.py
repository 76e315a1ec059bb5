"""What is copied to a GPU while it computes: batches one ahead of the loop that trains on them, and small tensors that a step needs.

    for batch in ahead(make, items, device): ...          # make(item) of each
    masked_BN = to_device(drawn_BN, device)

`make` runs in a thread, and what it copies to a GPU or computes there goes through a stream of its own, beside the computation of the batch
before. The loop's stream waits for it, the host does not: the pattern of torch's notes on CUDA semantics (streams, pinned memory).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Item = TypeVar("Item")
Made = TypeVar("Made")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor there, without waiting for what the device still computes. It may be changed or freed at once: to a GPU it goes by way of
    pinned memory, which torch keeps until the copy is done."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def ahead(make: Callable[[Item], Made], items: Iterable[Item], device: torch.device) -> Iterator[Made]:
    """make(item) of each in order, one of them ahead of the caller in a thread; items come from the caller's own thread.

    An error of `make` is raised in its item's place, one of `items` an item early. Nothing here holds an item that `make` is done with.
    """
    stream = _beside(device) if device.type == "cuda" else None

    def in_thread(item: Item) -> tuple[Made, torch.cuda.Event | None]:
        with torch.cuda.stream(stream):
            made = make(item)
            return made, None if stream is None else stream.record_event()

    def handed(made: Made, done: torch.cuda.Event | None) -> Made:
        if done is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(here)  # or its memory would be used again while the caller's stream still reads it
        return made

    with ThreadPoolExecutor(1, "batches") as pool:
        waiting = None
        for item in items:
            following = pool.submit(in_thread, item)
            del item  # the loader's memory, which it uses again
            if waiting is not None:
                yield handed(*waiting.result())
            waiting = following
        if waiting is not None:
            yield handed(*waiting.result())


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    # One for all epochs and cells: torch keeps the free memory of each stream apart.
    return torch.cuda.Stream(device)
