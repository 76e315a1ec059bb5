"""Packing: raw files in, checked and de-identified WebDataset shards out.

    manifest = pack(load_card("montgomery"), "RAW", "OUT/shards/montgomery")

or in steps, when `write` is to run elsewhere (jobs and entries pickle):

    jobs = plan(card, raw)                               # RequestError for everything that is wrong with the request
    entries = [write(job, url) for job in jobs]          # each on its own; run again, it keeps what is unchanged
    manifest = commit(card, entries, url)                # the manifest is written last

One shard holds one split's samples in the order of their file names, a fixed number each, so equal input gives equal names and bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from base import storage
from base.config import Strict, canonical_json, digest, parse
from base.errors import RequestError, WorkError
from base.paths import absolute, is_url
from shards import in_place, readers
from shards.card import SPLITS, Card, Split
from shards.deidentify import FINGERPRINT, PUBLIC, Names, keyed
from shards.manifest import MANIFEST, Manifest, ShardEntry, dump_index, load_index
from shards.open_points import refuse_open
from shards.phantoms import PHANTOM_VERSION
from shards.samples import index_of_tar, write_tar

PACK_VERSION = 3  # raised when a change moves a byte of a shard
QUARANTINE = "quarantine.jsonl"
READERS = 16  # receipts that are read at once


class Origin(Strict):
    """What the manifest says of the raw files as a whole; every job carries it."""

    layout: str
    expected: dict[str, int]
    of: int | None
    split_rule: str
    left_out: int
    raw_digest: str
    secret_fingerprint: str


class Receipt(Strict):
    """`<shard>.entry.json`, written after a shard and its index: the proof that both are whole, and of what they were made."""

    fingerprint: str
    origin: Origin
    entry: ShardEntry


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    name: str
    split: Split
    raw: str
    card: Card
    records: tuple[readers.Record, ...]
    origin: Origin

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the shard's bytes; files count by size and time, as in make."""
        phantom = PHANTOM_VERSION if self.card.phantom else 0
        return digest(
            [
                PACK_VERSION,
                phantom,
                self.name,
                self.card.model_dump(mode="json", by_alias=True),
                [asdict(record) for record in self.records],
                *([absolute(self.raw)] if self.card.in_place else []),  # where the images stay
            ]
        )


def plan(card: Card, raw: str, secret: bytes | None = None, shard_samples: int = 1000, split_files: str | None = None) -> list[ShardJob]:
    """The shards to write, train first. Decodes nothing.

    Args:
        split_files: folder or CSV that replaces the card's rule of splitting, see shards.splitting.
    Raises:
        RequestError: a draft with open points, no secret, and all that `shards.readers` refuses.
    """
    refuse_open(card)
    names = Names.of(card, secret)
    found = readers.read(card, raw, names, split_files)
    card = found.card
    origin = Origin(
        layout=found.layout,
        expected=dict(found.expected),
        of=found.of,
        split_rule=found.split_rule,
        left_out=found.left_out,
        raw_digest=found.raw_digest,
        secret_fingerprint=names.fingerprint,
    )
    jobs = []
    for split in SPLITS:
        records = [record for record in found.records if record.split == split]
        if card.in_place:  # a shard for each of their tars
            parts = [tuple(held) for _, held in groupby(records, lambda record: record.inside and record.inside.container)]
        else:
            parts = [tuple(records[start : start + shard_samples]) for start in range(0, len(records), shard_samples)]
        for number, held in enumerate(parts):
            jobs.append(ShardJob(f"{card.dataset}-{split}-{number:05d}", split, raw, card, held, origin))  # type: ignore[arg-type]
    return jobs


def made_of(jobs: Sequence[ShardJob], out_url: str) -> bool:
    """Whether the shards at `out_url` are those of these very jobs, by their receipts: a card, a patient or a file may have changed since.
    Reads no shard."""

    def same(job: ShardJob) -> bool:
        text = storage.read_or_none(storage.join(out_url, f"{job.name}.entry.json"))
        with suppress(ValueError, RequestError):
            return text is not None and parse(json.loads(text), Receipt, job.name).fingerprint == job.fingerprint
        return False

    with ThreadPoolExecutor(READERS) as pool:
        return all(pool.map(same, jobs))


def refuse_another_secret(card: Card, out_url: str, secret: bytes | None = None) -> None:
    """Refuse to pack over shards whose names were keyed with another secret: every patient would get another name, and perhaps split.

    Raises:
        RequestError: the manifest at `out_url`, or the receipts of a packing that was stopped, name another secret; or there is none now.
    """
    names = storage.listing(out_url)
    for name in ([MANIFEST] if MANIFEST in names else []) + sorted(name for name in names if name.endswith(".entry.json")):
        where = storage.join(out_url, name)
        try:
            held = storage.read_json(where)
        except (ValueError, FileNotFoundError):
            continue  # damaged: written again
        held = held.get("origin", held) if isinstance(held, dict) else {}
        then = held.get("secret_fingerprint") if isinstance(held, dict) else None
        if then is None:
            continue
        now = Names.of(card, secret).fingerprint
        if then != now:
            public = keyed(PUBLIC, FINGERPRINT, 12)
            shown = [f"the constant of public cards ({one})" if one == public else one for one in (then, now)]
            raise RequestError(
                f"the patients here are keyed with another secret: {shown[0]}, now it is {shown[1]}; packed again, each patient would get "
                "another name and perhaps another split",
                where=where,
                hint="set ALLOGRAFT_SECRET_FILE to the old secret, give another --out (a study: out=), or delete this folder of shards",
            )
        return


def write(job: ShardJob, out_url: str, tell: Callable[[int], object] | None = None) -> ShardEntry:
    """Write one shard, its index and its receipt under `out_url`, or keep them if they stand there unchanged.

    A file that does not decode is quarantined with its reason; the others are packed.

    Args:
        tell: called with the number of raw files done, before each.
    Raises:
        WorkError: the disk is full.
    """
    receipt_url = storage.join(out_url, f"{job.name}.entry.json")
    standing = kept(job, out_url)
    if standing is not None:
        return standing
    # From here on neither the old receipt nor the old manifest may be believed, whenever we are killed.
    storage.remove(storage.join(out_url, MANIFEST))
    storage.remove(receipt_url)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tar = Path(folder) / f"{job.name}.tar"
            if job.card.in_place:
                positives, quarantined, index_N, images = in_place.write(job.card, job.raw, job.records, tar, tell)
            else:
                (positives, quarantined), images = write_tar(job.card, job.raw, job.records, tar, tell), None
                index_N = index_of_tar(tar)
            index = dump_index(index_N)
            with tar.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = tar.stat().st_size
            storage.put_file(tar, storage.join(out_url, f"{job.name}.tar"))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(
                "no space left on the device", where=error.filename or tempfile.gettempdir(), hint="set TMPDIR elsewhere"
            ) from error
        raise
    storage.put(storage.join(out_url, f"{job.name}.idx"), index)
    entry = ShardEntry(
        name=job.name,
        split=job.split,
        bytes=size,
        samples=len(index_N),
        sha256=sha256,
        index_sha256=hashlib.sha256(index).hexdigest(),
        positives=positives,
        quarantined=quarantined,
        images=images,
    )
    storage.put(receipt_url, canonical_json(Receipt(fingerprint=job.fingerprint, origin=job.origin, entry=entry)))
    return entry


def commit(card: Card, entries: Iterable[ShardEntry], out_url: str) -> Manifest:
    """Write quarantine.jsonl (also where it is the reason to stop) and then manifest.json over written shards, and return the manifest.

    Then shards of an earlier packing that this one does not name are removed: whoever takes all tars of the folder would read patients
    who have left the raw data, or stand in another split now.

    Raises:
        WorkError: a shard's receipt is missing or another one, the shards are not of one plan, or a split has no sample left.
    """
    entries = sorted(entries, key=lambda entry: (SPLITS.index(entry.split), entry.name))
    origins: dict[str, Origin] = {}
    patients: dict[str, set[bytes]] = {}
    counts: dict[str, int] = {}
    positives: dict[str, dict[str, int]] = {}
    for entry in entries:
        where = storage.join(out_url, f"{entry.name}.entry.json")
        receipt = parse(storage.read_json(where), Receipt, where) if storage.exists(where) else None
        if receipt is None or receipt.entry != entry:
            raise WorkError("this shard was not written, or by another run since", where=where, hint="pack again")
        origins[receipt.origin.raw_digest] = receipt.origin
        url = storage.join(out_url, f"{entry.name}.idx")
        index_N = load_index(storage.read_bytes(url), url)
        patients.setdefault(entry.split, set()).update(index_N["patient"].tolist())
        counts[entry.split] = counts.get(entry.split, 0) + entry.samples
        of_split = positives.setdefault(entry.split, dict.fromkeys(card.labels, 0))
        for label, n in entry.positives.items():
            of_split[label] += n
    if len(origins) != 1:
        raise WorkError(f"shards of {len(origins)} different plans", where=out_url, hint="pack again")
    quarantined = [{"dataset": card.dataset, "split": e.split, **row.model_dump()} for e in entries for row in e.quarantined]
    storage.put(storage.join(out_url, QUARANTINE), "".join(canonical_json(row) + "\n" for row in quarantined))
    for split, n in counts.items():
        if n == 0:
            refused = [row["reason"] for row in quarantined if row["split"] == split]
            reasons = ", ".join(f"{len(held):,} because {reason}" for reason, held in by_reason(refused).items())
            raise WorkError(
                f"no image of split '{split}' is usable, of {len(refused):,}: {reasons}", where=storage.join(out_url, QUARANTINE)
            )
    manifest = Manifest(
        dataset=card.dataset,
        card=card,
        shards=[entry for entry in entries if entry.samples],
        counts=counts,
        patients={split: len(found) for split, found in patients.items()},
        positives=positives,
        quarantined=len(quarantined),
        **next(iter(origins.values())).model_dump(),
    )
    storage.put(storage.join(out_url, MANIFEST), manifest.text())
    ours, named = re.compile(rf"({re.escape(card.dataset)}-(?:{'|'.join(SPLITS)})-\d+)\.(tar|idx|entry\.json)"), {e.name for e in entries}
    for name in storage.listing(out_url):
        if (found := ours.fullmatch(name)) and found[1] not in named:
            storage.remove(storage.join(out_url, name))
    return manifest


def by_reason(reasons: Sequence[str]) -> dict[str, list[int]]:
    """Where in `reasons` each kind of them stands, the commonest first. One kind differ in numbers only (sizes, offsets): those are N."""
    kinds: dict[str, list[int]] = {}
    for i, reason in enumerate(reasons):
        kinds.setdefault(re.sub(r"\d+", "0", reason), []).append(i)
    return {_in_common([reasons[i] for i in held]): held for held in sorted(kinds.values(), key=len, reverse=True)}


def _in_common(reasons: Sequence[str]) -> str:
    places = zip(*(re.split(r"(\d+)", reason) for reason in reasons), strict=True)
    return "".join(words[0] if len(set(words)) == 1 else "N" for words in places)


def pack(
    card: Card,
    raw: str,
    out_url: str,
    secret: bytes | None = None,
    shard_samples: int = 1000,
    split_files: str | None = None,
) -> Manifest:
    """Plan, write one after the other, and commit. Raises RequestError where shards of another secret lie."""
    refuse_another_secret(card, out_url, secret)
    jobs = plan(card, raw, secret, shard_samples, split_files)
    return commit(jobs[0].card, [write(job, out_url) for job in jobs], out_url)


def kept(job: ShardJob, out_url: str) -> ShardEntry | None:
    """The entry of an unchanged shard that stands whole at its place, else None."""
    receipt_url = storage.join(out_url, f"{job.name}.entry.json")
    if not storage.exists(receipt_url):
        return None
    try:
        receipt = parse(storage.read_json(receipt_url), Receipt, receipt_url)
    except (RequestError, ValueError):
        return None  # of another version: written again
    tar, index = (storage.join(out_url, f"{job.name}.{ext}") for ext in ("tar", "idx"))
    if receipt.fingerprint != job.fingerprint or not (storage.exists(tar) and storage.exists(index)):
        return None
    if not is_url(tar):  # reading 45 GB back from an object store to look at its hash is not worth it; a disk is read at 1 GB/s
        with open(tar, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != receipt.entry.sha256:
                return None
    if hashlib.sha256(storage.read_bytes(index)).hexdigest() != receipt.entry.index_sha256:
        return None
    if receipt.origin != job.origin:
        storage.put(receipt_url, canonical_json(receipt.model_copy(update={"origin": job.origin})))
    return receipt.entry
