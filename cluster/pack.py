"""Packing on Ray: each shard is one task, the manifest is written last by the driver."""

import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base import storage
from base.config import parse
from base.errors import RequestError
from base.paths import absolute, is_url
from cluster.progress import Progress, minutes
from cluster.ray_tasks import TICK_S, run_tasks
from shards.card import Card, load_card
from shards.manifest import MANIFEST, Manifest, ShardEntry
from shards.pack import QUARANTINE, ShardJob, commit, kept, plan, refuse_another_secret, write

OURS = {MANIFEST, QUARANTINE}


@dataclass
class Packing:
    """How far a packing is. Rates are of what was written: shards that stood already cost nothing and count for nothing."""

    shards: int
    images: int  # raw files named by the plan
    shards_done: int = 0
    shards_kept: int = 0
    images_done: int = 0
    images_written: int = 0
    bytes_written: int = 0
    under_way: int = 0  # raw files done of the shards that are being written
    quarantined: dict[str, str] = field(default_factory=dict)  # key -> raw file, or the key again where one file has several samples
    started: float = field(default_factory=time.monotonic)

    def add(self, job: ShardJob, entry: ShardEntry, stood: bool) -> None:
        """Count a finished shard."""
        self.shards_done += 1
        self.images_done += len(job.records)
        left_out = {row.key: row.key for row in entry.quarantined}
        self.quarantined |= left_out | {record.key: record.file for record in job.records if record.key in left_out}
        if stood:
            self.shards_kept += 1
        else:
            self.images_written += len(job.records)
            self.bytes_written += entry.bytes

    @property
    def seconds(self) -> float:
        """Since the first task was asked for."""
        return time.monotonic() - self.started

    def rates(self) -> str:
        """`412 img/s, 18.2 MB/s`; nothing while nothing is written."""
        if not self.images_written + self.under_way:
            return ""
        size = f", {self.bytes_written / 1e6 / self.seconds:,.1f} MB/s" if self.bytes_written else ""
        return f"{(self.images_written + self.under_way) / self.seconds:,.0f} img/s{size}"

    def line(self) -> str:
        """One line of progress: shards, images, throughput, quarantine, time to go."""
        done, written = self.images_done + self.under_way, self.images_written + self.under_way
        parts = [f"{self.shards_done}/{self.shards} shards", f"{done:,}/{self.images:,} images", self.rates()]
        parts.append(f"{len(self.quarantined):,} quarantined" if self.quarantined else "")
        if written and done < self.images:
            parts.append(f"to go {minutes(self.seconds / written * (self.images - done))}")
        return " | ".join(part for part in parts if part)

    def summary(self) -> str:
        """What was done, when all is done."""
        stood = f"{self.shards_kept} of {self.shards} shards stood unchanged" if self.shards_kept else f"{self.shards} shards"
        return ", ".join(part for part in (stood, minutes(self.seconds), self.rates()) if part)


def pack_command(name: str, raw: str, out: str, changes: dict[str, int], split_files: str | None) -> None:
    """`allograft pack`: the card's raw files to shards, on a Ray started here or joined, with a live line and a summary.

    Args:
        changes: keys of the card that are to be others than it says (max_side, depth).
        split_files: folder or CSV that replaces the card's rule of splitting.
    """
    from cluster.inspect import copies, left_out, quarantine_lines
    from cluster.session import session

    card = load_card(name)
    if changes:
        card = parse(card.model_dump(by_alias=True) | changes, Card, " ".join(f"--{key.replace('_', '-')}" for key in changes))
    raw = raw if raw.startswith("phantom:") else absolute(raw)
    split_files = split_files and absolute(split_files)
    url = absolute(out)
    check_place(card, url, raw)
    refuse_another_secret(card, url)
    plan(card, raw, split_files=split_files)  # bad input is refused before a cluster is started
    progress = Progress()
    progress.say("starting Ray")
    with session():
        manifest, packing = pack_on_ray(card, raw, url, lambda so_far: progress.line(so_far.line()), split_files)
    progress.gone("")
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.counts.items())
    progress.say(f"{manifest.dataset}: {counts}; digest {manifest.digest[:16]}")
    progress.say(f"split by {manifest.split_rule}")
    progress.say(packing.summary())
    for line in (left_out(manifest), copies(url, manifest), *quarantine_lines(url, packing.quarantined)):
        if line:
            progress.say(line)
    progress.say(f"look at it: {shlex.join(['allograft', 'inspect', out])}")


def check_place(card: Card, out: str, raw: str = "") -> None:
    """Refuse to write a dataset's shards where something else lies.

    Raises:
        RequestError: `out` is a file or below one, may not be written, lies in the raw folder, holds another dataset, or holds files that
            no packing wrote.
    """
    if f"{out.rstrip('/')}/".startswith(f"{raw.rstrip('/')}/") and raw:
        raise RequestError("this is in the folder of raw files, which would be others then", where=out, hint="give another --out")
    if not is_url(out):
        nearest = next(str(folder) for folder in (Path(out), *Path(out).parents) if os.path.exists(folder))
        if not os.path.isdir(nearest):
            raise RequestError("this is a file, shards need a folder of their own", where=nearest)
        if not os.access(nearest, os.W_OK):
            raise RequestError("not allowed to write here", where=nearest)
    foreign = [name for name in storage.listing(out) if name not in OURS and not name.startswith(f"{card.dataset}-")]
    if foreign:
        raise RequestError(f"not empty, and not shards of {card.dataset} ({', '.join(foreign[:3])})", where=out, hint="give another --out")


def pack_on_ray(
    card: Card,
    raw: str,
    out: str,
    progress: Callable[[Packing], None],
    split_files: str | None = None,
    room: Callable[[], float] | None = None,
) -> tuple[Manifest, Packing]:
    """Plan here, write everywhere, commit here. Shards that stand already are kept.

    Args:
        out: folder of the dataset's shards (path or URL).
        progress: called every second and after each shard.
        split_files: folder or CSV that replaces the card's rule of splitting.
        room: how many shards may be written at a time; by default all.

    Raises:
        RequestError: bad raw data, found while planning, or shards of another secret lie there.
        WorkError: a shard could not be written.
    """
    refuse_another_secret(card, out)
    import ray

    jobs = plan(card, raw, split_files=split_files)
    write_there = ray.remote(num_cpus=1, max_retries=2)(_keep_or_write)
    counter = ray.remote(num_cpus=0)(_Counter).remote()
    asked = counter.counts.remote()
    entries: dict[int, ShardEntry] = {}
    counts: dict[str, int] = {}
    so_far = Packing(len(jobs), sum(len(job.records) for job in jobs))
    for ended in run_tasks(lambda i: write_there.remote(jobs[i], out, counter), len(jobs), room):
        for i, (entry, stood) in ended.items():
            entries[i] = entry
            so_far.add(jobs[i], entry, stood)
        if ray.wait([asked], timeout=0)[0]:
            with suppress(ray.exceptions.RayActorError):  # without it only whole shards are counted
                counts, asked = ray.get(asked), counter.counts.remote()
        finished = {jobs[i].name for i in entries}
        so_far.under_way = sum(n for name, n in counts.items() if name not in finished)
        progress(so_far)
    return commit(jobs[0].card, [entries[i] for i in range(len(jobs))], out), so_far


class _Counter:
    """A Ray actor: how many raw files of each shard are done, as the tasks tell it. What it loses with its node is only shown late."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, shard: str, done: int) -> None:
        self._counts[shard] = done

    def counts(self) -> dict[str, int]:
        return self._counts


def _keep_or_write(job: ShardJob, out: str, counter: Any) -> tuple[ShardEntry, bool]:
    """The shard's entry, and whether it stood already."""
    standing = kept(job, out)
    if standing is not None:
        return standing, True
    told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TICK_S:
            told = time.monotonic()
            counter.add.remote(job.name, done)

    return write(job, out, tell), False
