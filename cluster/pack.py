"""Packing on Ray: each shard is one task, the manifest is written last by the driver."""

from collections.abc import Callable

from shards.card import Card
from shards.manifest import Manifest, ShardEntry
from shards.pack import commit, plan, write


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
