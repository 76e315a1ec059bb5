"""Remote shards are fetched before their samples come up, by a process of their own: an S3 client keeps a core as busy as decoding does.

    for id_B, epoch_B in ahead(orders, corpora): ...         # the same orders, in the same order

The order of samples is known, so the orders of coming steps are looked at while those before them are read. The process is
`python -m shards.prefetch`, takes one request a line from its standard input and ends with it. It only fills the node's cache: who reads
a shard that it could not fetch fetches it again and meets the error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from base import storage
from base.errors import AllograftError, WorkError
from base.paths import ROOT, absolute, is_url
from shards import cache

if TYPE_CHECKING:  # the process imports this module, and decodes nothing
    from shards.corpus import Corpus

FETCHES = 4  # at once; measured at 30 ms latency: 8 give 13 % more, and less without latency
SHARDS_AHEAD = 8  # a lane that comes to a new window reads all its shards at once
STEPS_AHEAD = 512
_LOOKS = 64  # orders looked at for each that is handed on, so that the first does not wait for all
Order = tuple[np.ndarray, np.ndarray]


def ahead(orders: Iterator[Order], corpora: Sequence[Corpus]) -> Generator[Order, None, None]:
    """The orders (global ids, -1 = padding; epochs), with the shards of later ones being fetched. Close it to end the process.

    Raises:
        WorkError: the process was ended by someone else.
    """
    if not any(is_url(corpus.url) or any(shard.images and is_url(shard.images.url) for shard in corpus.shards) for corpus in corpora):
        yield from orders
        return
    shards = _Shards(corpora)
    waiting: deque[tuple[Order, set[int], int]] = deque()  # with the shards an order reads, and how many of them it is the first to read
    readers: Counter[int] = Counter()  # orders, waiting or just handed on, that read a shard
    with subprocess.Popen(
        [sys.executable, "-m", "shards.prefetch", str(storage.SILENCE_S)], stdin=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        assert process.stdin is not None
        try:
            to_come = 0
            while True:
                for _ in range(_LOOKS):
                    if len(waiting) == STEPS_AHEAD or to_come >= SHARDS_AHEAD:
                        break
                    order = next(orders, None)
                    if order is None:
                        break
                    read = shards.of(order[0])
                    fresh = [shard for shard in sorted(read) if not readers[shard]]
                    process.stdin.write("".join(shards.requests(shard) for shard in fresh))
                    readers.update(read)
                    waiting.append((order, read, len(fresh)))
                    to_come += len(fresh) if len(waiting) > 1 else 0
                process.stdin.flush()
                if not waiting:
                    return
                order, read, _ = waiting.popleft()
                to_come -= waiting[0][2] if waiting else 0
                yield order
                readers.subtract(read)
        except BrokenPipeError:
            raise WorkError("the process that fetches shards has ended", where=corpora[0].url, hint="run the same command again") from None
        finally:
            process.kill()


class _Shards:
    """The shards of several corpora, numbered through."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        offsets = np.cumsum([0, *(len(corpus) for corpus in corpora)])
        self._starts = np.concatenate([corpus.starts[:-1] + offset for corpus, offset in zip(corpora, offsets, strict=False)])
        self._shards = [(corpus, shard) for corpus in corpora for shard in corpus.shards]

    def of(self, id_B: np.ndarray) -> set[int]:
        """The shards in which these samples lie."""
        return set((np.searchsorted(self._starts, id_B[id_B >= 0], side="right") - 1).tolist())

    def requests(self, number: int) -> str:
        """What the process is asked for: the remote ones of a shard's files, a line each."""
        corpus, shard = self._shards[number]
        folder, place = absolute(corpus.cache_dir or cache.default_dir()), storage.join(corpus.url, shard.name)
        files: list[tuple[str, str, int | None]] = [(f"{place}.idx", shard.index_sha256, None), (f"{place}.tar", shard.sha256, shard.bytes)]
        if shard.images is not None:
            files.append((shard.images.url, shard.images.sha256, shard.images.bytes))
        return "".join(json.dumps([url, sha256, size, folder]) + "\n" for url, sha256, size in files if is_url(url))


def _fetch(url: str, sha256: str, size: int | None, folder: str) -> None:
    try:
        cache.local(url, sha256, size, folder)
    except AllograftError:
        return  # told by the one who reads the shard


def _serve() -> None:
    """The process: `argv[1]` is storage.SILENCE_S."""
    storage.SILENCE_S = float(sys.argv[1])
    pool = ThreadPoolExecutor(FETCHES)
    for line in sys.stdin:
        pool.submit(_fetch, *json.loads(line))
    os._exit(0)  # whoever asked is gone, and waits for nothing


if __name__ == "__main__":
    _serve()
