"""Readers: from a raw folder and a card to a list of records, without decoding an image.

    found = read(card, "RAW", Names.of(card))            # Found(card, layout, records, ...); RequestError for everything that is wrong
    found = read(card, "RAW", names, "lists/")           # with split files of the user's own

`shards.rows` reads tables (csv), class folders, images beside their masks (pairs), .npz files and tars; phantoms are numbers here. All
refuse before any work: a missing folder, no known layout, missing columns, an image named twice, a patient in two splits, an empty split.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from base import storage
from base.config import canonical_json
from base.errors import RequestError
from base.paths import is_url
from shards.card import SPLITS, Card, Layout, Split
from shards.cells import Label
from shards.containers import Inside
from shards.deidentify import Names, keyed, keyed_split
from shards.phantoms import parse_raw, patient_of
from shards.rawfiles import files, stamp
from shards.rows import Row, read_rows
from shards.splitting import SplitFiles, count, rule_of, some


@dataclass(frozen=True)
class Record:
    """One sample to be: where its files lie and all that is kept of it but pixels. `stamp` tells a changed file from an unchanged one.

    A file with several frames or slices is one record, and unfolds into several samples when it is read.
    mask_classes: the class of each mask file; empty where their values say. runs: run-length texts, empty for an empty mask; None for none.
    """

    key: str
    file: str  # relative to the raw folder, as if a container were a folder; for phantoms their number
    masks: tuple[str, ...]
    labels: dict[str, Label]
    patient: str
    split: Split
    meta: dict[str, str | int | None]
    stamp: str
    inside: Inside | None = None
    mask_classes: tuple[int, ...] = ()
    runs: tuple[str, ...] | None = None
    field_of_view: str | None = None


@dataclass(frozen=True)
class Found:
    """What a reader found: the layout's name, the records sorted by file, and what the manifest says of them as a whole."""

    card: Card  # with the layout that was found alone, and with the labels that were found where it asks for those
    layout: str
    records: list[Record]
    expected: Mapping[str, int]
    of: int | None
    split_rule: str
    left_out: int
    raw_digest: str


def read(card: Card, raw: str, names: Names, split_files: str | None = None) -> Found:
    """All records of a raw folder (or series of phantoms), sorted by file. Raises RequestError; nothing is written or decoded.

    split_files: folder or CSV that replaces the card's rule of splitting, see shards.splitting.SplitFiles.
    """
    mine = None if split_files is None else SplitFiles.read(split_files)
    if card.reader == "phantom":
        if mine is not None:
            raise RequestError("phantoms are split by their patients' hash, not by files", where=mine.url)
        return _phantoms(card, raw, names)
    if raw.startswith("phantom:"):
        raise RequestError(f"the card {card.dataset} reads files, not phantoms", where=raw)
    if not (storage.exists(raw) if is_url(raw) else os.path.isdir(raw)):
        raise RequestError("no such folder of raw files", where=raw, hint=f"fetch it first: {card.access}")
    layout = _recognise(card, raw)
    card = card.model_copy(update={"layouts": [layout]})
    there = files(raw, layout.images, layout.exclude)
    rows, left_out = read_rows(card, raw, there)
    if not rows:
        raise RequestError(f"no image in the layout {layout.name}", where=raw)
    _refuse_twice(card, rows, raw)
    if card.labels_found:
        labels = sorted({label for row in rows for label in row.labels})
        if len(labels) < 2:
            raise RequestError(f"{len(labels)} classes are found, it takes two", where=raw)
        card = card.model_copy(update={"labels": labels})
    if mine is not None:
        listed = [(row, mine.find(row.file, row.said)) for row in rows]
        mine.check()
        left_out += sum(part is None for _, part in listed)
        rows = [row for row, _ in listed]
        for row, part in listed:
            row.part = part
        rows = [row for row in rows if row.part is not None]
    rows.sort(key=lambda row: row.file)
    if not any((row.inside.container if row.inside else row.file) in there for row in rows):
        raise RequestError(f"none of the {count(len(rows), 'image')} that the table names is there, for instance {rows[0].file}", where=raw)
    records = [_record(card, raw, names, there, row) for row in rows]
    _refuse_shared_patients(rows, records, raw)
    _refuse_empty(card, records, raw)
    inventory = [
        [record.file, re.sub(r"@[^|]*", "", record.stamp), record.labels, record.split, *(record.runs or ())] for record in records
    ]
    counts = Counter(record.split for record in records)
    return Found(
        card,
        layout.name,
        records,
        {str(part): n for part, n in layout.counts.items()},
        layout.of,
        rule_of(card, layout, mine, counts),
        left_out,
        keyed(names.secret, canonical_json(inventory), 64),
    )


def _record(card: Card, raw: str, names: Names, there: Mapping[str, str], row: Row) -> Record:
    patient = names.patient(row.identity)
    if row.part == "train_val":
        split = keyed_split(patient, card.split.val / (1 - card.split.test), 0)
    else:
        split = row.part or keyed_split(patient, card.split.val, card.split.test)
    file = row.inside.container if row.inside else row.file
    views = [row.field_of_view] if row.field_of_view else []
    stamps = [there.get(file, "absent"), *(stamp(raw, mask) for mask in (*row.masks, *views))]
    meta = row.meta if row.study is None else row.meta | {"study": keyed(names.secret, f"study\x1f{names.namespace}\x1f{row.study}", 16)}
    return Record(
        key=names.key(row.file),
        file=row.file,
        masks=row.masks,
        labels=row.labels,
        patient=patient,
        split=split,
        meta=meta,
        stamp="|".join(stamps),
        inside=row.inside,
        mask_classes=row.mask_classes,
        runs=row.runs,
        field_of_view=row.field_of_view,
    )


def _phantoms(card: Card, raw: str, names: Names) -> Found:
    assert card.phantom is not None
    series = parse_raw(raw)
    size = series.size or card.phantom.size
    records = []
    for index in range(series.images):
        patient = names.patient(patient_of(series.seed, index))
        split = keyed_split(patient, card.split.val, card.split.test)
        key = names.key(f"phantom:{card.phantom.generator}@{series.seed}/{index:09d}")
        records.append(Record(key, f"{index:09d}", (), {}, patient, split, {}, f"{series.seed}/{size}"))
    _refuse_empty(card, records, raw)
    digest = keyed(names.secret, canonical_json([card.phantom.generator, series.images, series.seed, size]), 64)
    return Found(card, "phantom", records, {}, None, rule_of(card, None, None, {}), 0, digest)


def _recognise(card: Card, raw: str) -> Layout:
    missing = []
    for layout in card.layouts:
        absent = [pattern for pattern in layout.requires if not files(raw, [pattern], first=True)]
        if not absent:
            return layout
        missing.append(f"layout '{layout.name}' lacks {', '.join(absent)}")
    raise RequestError(f"no layout that the card {card.dataset} knows", where=raw, hint="; ".join(missing))


def _refuse_twice(card: Card, rows: list[Row], where: str) -> None:
    times = Counter(row.file for row in rows)
    twice = [file for file, n in times.items() if n > 1]
    if twice:
        said: dict[str, list[object]] = defaultdict(list)
        for row in rows:
            if times[row.file] > 1:
                said[row.file].append((row.labels, row.identity, row.study, row.part, row.meta, row.masks))
        agree = all(one == of[0] for of in said.values() for one in of)
        told = "the rows agree" if agree else "the rows differ"
        if card.kind == "multiclass" or card.layouts[0].split_tables:  # `repeated` joins neither classes nor rows of several tables
            hint = f"{told}: keep one of each image"
        elif agree:
            hint = f"{told}: write `repeated: majority` into the card's layout, which makes them one"
        else:
            hint = f"{told}: keep the right one, or, if they are readers' votes, write `repeated: majority` into the card's layout"
        raise RequestError(f"{count(len(twice), 'image')} in several rows: {some(twice)}", where=where, hint=hint)


def _refuse_shared_patients(rows: list[Row], records: list[Record], raw: str) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row, record in zip(rows, records, strict=True):
        splits[row.identity].add(record.split)
    shared = [identity for identity, where in splits.items() if len(where) > 1]
    if shared:
        example = " and ".join(sorted(splits[min(shared)], key=SPLITS.index))
        raise RequestError(
            f"{count(len(shared), 'patient')} in more than one split ({example}): {some(shared)}",
            where=raw,
            hint="give all images of a patient the same split, or drop the split from the card: then patients are split by their hash",
        )


def _refuse_empty(card: Card, records: list[Record], where: str) -> None:
    there = {record.split for record in records}
    # A split of no share is asked for by nobody, unless an official list fills it.
    shares = {"train": 1.0, "val": card.split.val, "test": card.split.test}
    official = {part for layout in card.layouts for part in layout.parts}
    for split in SPLITS:
        if (shares[split] or split in official) and split not in there:
            raise RequestError(
                f"no image in split '{split}' ({count(len(records), 'image')} in all)",
                where=where,
                hint="more images, or another split rule",
            )
