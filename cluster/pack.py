"""Packing on Ray: each shard is one task, the manifest is written last by the driver."""

import os
from collections.abc import Callable

from base import storage
from base.errors import RequestError
from base.paths import is_url
from shards.card import Card
from shards.manifest import MANIFEST, Manifest, ShardEntry
from shards.pack import QUARANTINE, commit, plan, write

OURS = {MANIFEST, QUARANTINE}


def check_place(card: Card, out: str) -> None:
    """Refuse to write a dataset's shards where something else lies.

    Raises:
        RequestError: `out` is a file, holds another dataset, or holds files that no packing wrote.
    """
    if not is_url(out) and os.path.isfile(out):
        raise RequestError("this is a file, shards need a folder of their own", where=out)
    foreign = [name for name in storage.listing(out) if name not in OURS and not name.startswith(f"{card.dataset}-")]
    if foreign:
        raise RequestError(f"not empty, and not shards of {card.dataset} ({', '.join(foreign[:3])})", where=out, hint="give another --out")


def pack_on_ray(card: Card, raw: str, out: str, progress: Callable[[int, int], None]) -> Manifest:
    """Plan here, write everywhere, commit here. Shards that stand already are kept.

    Args:
        out: folder of the dataset's shards (path or URL).
        progress: called with (shards done, shards in all).

    Raises:
        RequestError: bad raw data, found while planning.
        WorkError: a shard could not be written.
    """
    import ray

    jobs = plan(card, raw)
    write_there = ray.remote(num_cpus=1, max_retries=2)(write)
    waiting = [write_there.remote(job, out) for job in jobs]
    order = {reference: i for i, reference in enumerate(waiting)}
    entries: dict[int, ShardEntry] = {}
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        for reference in done:
            try:
                entries[order[reference]] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
        progress(len(entries), len(jobs))
    return commit(card, [entries[i] for i in range(len(jobs))], out)
