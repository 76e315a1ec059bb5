"""Readers: from a raw folder and a card to a list of records, without decoding an image.

    found = read(card, "RAW", Names.of(card))       # Found(layout, records, ...); RequestError for everything that is wrong

One reader for tables (csv), one for images beside their masks (pairs, with or without a table), one for phantoms. All refuse before
any work: a missing folder, no known layout, missing columns, an image named twice, a patient in two splits, an empty split.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from base import storage
from base.config import canonical_json
from base.errors import RequestError
from base.paths import is_url
from shards.card import SPLITS, Card, Layout, Split
from shards.deidentify import Names, clean_metadata, keyed, keyed_split
from shards.phantoms import parse_raw, patient_of
from shards.tables import Label, Table, columns_of, labels_of_row

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
SHOWN = 5  # of the offenders an error lists


@dataclass(frozen=True)
class Record:
    """One sample to be: where its files lie and all that is kept of it but pixels. `stamp` tells a changed file from an unchanged one."""

    key: str
    file: str  # relative to the raw folder; for phantoms their number
    masks: tuple[str, ...]
    labels: dict[str, Label]
    patient: str
    split: Split
    meta: dict[str, str | int | None]
    stamp: str


@dataclass(frozen=True)
class Found:
    """What a reader found: the layout's name, the records sorted by file, and what the manifest says of them as a whole."""

    card: Card  # with the labels that were found, where it asks for those
    layout: str
    records: list[Record]
    expected: Mapping[str, int]
    of: int | None
    split_rule: str
    left_out: int
    raw_digest: str


@dataclass(frozen=True)
class _Row:
    file: str
    masks: tuple[str, ...]
    labels: dict[str, Label]
    identity: str
    split: Split | Literal["train_val"] | None
    meta: dict[str, str | int | None]


def read(card: Card, raw: str, names: Names) -> Found:
    """All records of a raw folder (or series of phantoms), sorted by file. Raises RequestError; nothing is written or decoded."""
    if card.reader == "phantom":
        return _phantoms(card, raw, names)
    if raw.startswith("phantom:"):
        raise RequestError(f"the card {card.dataset} reads files, not phantoms", where=raw)
    if not (storage.exists(raw) if is_url(raw) else os.path.isdir(raw)):
        raise RequestError("no such folder of raw files", where=raw, hint=f"fetch it first: {card.access}")
    layout = _recognise(card, raw)
    files = _files(raw, layout.images)
    rows = _rows_of_table(card, layout, raw, files) if layout.table else _rows_of_files(card, layout, files)
    _refuse([row.file for row in rows], "image", "stands in several rows", raw)
    rows.sort(key=lambda row: row.file)
    records = []
    for row in rows:
        patient = names.patient(row.identity)
        if row.split == "train_val":
            split = keyed_split(patient, card.split.val / (1 - card.split.test), 0)
        else:
            split = row.split or keyed_split(patient, card.split.val, card.split.test)
        stamp = "|".join([files.get(row.file, "absent"), *(_stamp(raw, mask) for mask in row.masks)])
        records.append(Record(names.key(row.file), row.file, row.masks, row.labels, patient, split, row.meta, stamp))
    if not any(row.file in files for row in rows):
        raise RequestError(f"none of the {len(rows)} images that the table names is there, for instance {rows[0].file}", where=raw)
    _refuse_shared_patients(rows, records, raw)
    by_hash = layout.split_column is None and not layout.split_lists
    wanted = ["train", *(["val"] if card.split.val else []), *(["test"] if card.split.test else [])] if by_hash else list(SPLITS)
    _refuse_empty(records, wanted, raw)
    inventory = canonical_json([[record.file, re.sub(r"@[^|]*", "", record.stamp), record.labels, record.split] for record in records])
    expected = {str(part): n for part, n in layout.counts.items()}
    split_rule = layout.split_rule or _hash_rule(card)
    return Found(card, layout.name, records, expected, layout.of, split_rule, 0, keyed(names.secret, inventory, 64))


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
    _refuse_empty(records, list(SPLITS), raw)
    digest = keyed(names.secret, canonical_json([card.phantom.generator, series.images, series.seed, size]), 64)
    return Found(card, "phantom", records, {}, None, _hash_rule(card), 0, digest)


def _hash_rule(card: Card) -> str:
    return f"keyed hash of the patient: val {card.split.val:g}, test {card.split.test:g}"


def _recognise(card: Card, raw: str) -> Layout:
    missing = []
    for layout in card.layouts:
        absent = [pattern for pattern in layout.requires if not _files(raw, [pattern], first=True)]
        if not absent:
            return layout
        missing.append(f"{layout.name} lacks {', '.join(absent)}")
    raise RequestError(f"no layout that the card {card.dataset} knows", where=raw, hint="; ".join(missing))


def _files(raw: str, patterns: Iterable[str], first: bool = False) -> dict[str, str]:
    """Files below the raw folder that match a glob, by relative path, each with its stamp "size@time"."""
    found: dict[str, str] = {}
    if is_url(raw):
        import fsspec

        fs, root = fsspec.core.url_to_fs(raw)
        for pattern in patterns:
            for path, info in fs.glob(f"{root.rstrip('/')}/{pattern}", detail=True).items():
                relative = path[len(root.rstrip("/")) + 1 :]
                found[relative] = _remote_stamp(info)
        return found
    for pattern in patterns:
        for relative in glob.iglob(pattern, root_dir=raw):
            if os.path.isfile(os.path.join(raw, relative)):
                found[relative] = _stamp(raw, relative)
                if first:
                    return found
    return found


def _stamp(raw: str, relative: str) -> str:
    if is_url(raw):
        import fsspec

        fs, path = fsspec.core.url_to_fs(storage.join(raw, relative))
        try:
            return _remote_stamp(fs.info(path))
        except FileNotFoundError:
            return "absent"
    try:
        status = os.stat(os.path.join(raw, relative))
    except OSError:
        return "absent"
    return f"{status.st_size}@{status.st_mtime_ns}"


def _remote_stamp(info: Mapping[str, Any]) -> str:
    return f"{info.get('size')}@{info.get('ETag') or info.get('etag') or info.get('mtime') or info.get('LastModified')}"


def _rows_of_files(card: Card, layout: Layout, files: dict[str, str]) -> list[_Row]:
    rows = []
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        labels: dict[str, Label] = dict.fromkeys(card.labels)
        if layout.label_pattern is not None:
            match = re.search(layout.label_pattern, os.path.splitext(file)[0])
            if match is None:
                raise RequestError(f"the name does not tell its labels: no match of {layout.label_pattern}", where=file)
            labels |= {label: int(value) for label, value in match.groupdict().items() if label in labels and value is not None}
        masks = tuple(template.format(stem=stem) for _, template in layout.templates)
        rows.append(_Row(file, masks, labels, _patient(layout, None, stem, file, file), None, {}))
    return rows


def _rows_of_table(card: Card, layout: Layout, raw: str, files: dict[str, str]) -> list[_Row]:
    assert layout.table is not None
    assert layout.image_column is not None
    table = Table.read(storage.join(raw, min(_files(raw, [layout.table]))), columns_of(layout))
    by_name: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_name[os.path.basename(file)].append(file)
    lists = _split_lists(layout, raw)
    rows, unlisted = [], []
    for row in table:
        where = table.place(row)
        value = row[layout.image_column]
        same_name = by_name.get(os.path.basename(value), [])
        if value not in files and len(same_name) > 1:
            raise RequestError(f"'{value}' could be {' or '.join(sorted(same_name)[:2])}", where=where)
        file = value if value in files or not same_name else same_name[0]
        stem = os.path.splitext(os.path.basename(file))[0]
        identity = _patient(layout, row.get(layout.patient_column or ""), stem, file, where)
        labels = labels_of_row(card, layout, row, where)
        meta = {name: clean_metadata(name, row[column]) for name, column in layout.metadata.items()}
        masks = tuple(template.format(stem=stem) for _, template in layout.templates)
        if layout.mask_column is not None and row[layout.mask_column]:
            masks = (_inside(row[layout.mask_column], where),)
        split: Split | Literal["train_val"] | None = None
        if layout.split_column is not None:
            word = row[layout.split_column].lower()
            if word not in SPLIT_WORDS:
                raise RequestError(f"'{word}' is not a split: train, val or test", where=f"{where}, column {layout.split_column}")
            split = SPLIT_WORDS[word]
        elif lists:
            listed = lists.get(os.path.basename(value))
            if listed is None:
                unlisted.append(value)
                continue
            split = listed
        rows.append(_Row(_inside(file, where), masks, labels, identity, split, meta))
    if unlisted:
        raise RequestError(f"{len(unlisted)} images are in none of the official lists: {_some(unlisted)}", where=table.url)
    return rows


def _inside(path: str, where: str) -> str:
    if path.startswith("/") or ".." in path.split("/") or is_url(path):
        raise RequestError(f"'{path}' leads out of the raw folder", where=where)
    return path


def _split_lists(layout: Layout, raw: str) -> dict[str, Split | Literal["train_val"]]:
    of_image: dict[str, Split | Literal["train_val"]] = {}
    twice = []
    for part, name in layout.split_lists.items():
        for line in storage.read_bytes(storage.join(raw, name)).decode().splitlines():
            image = os.path.basename(line.strip())
            if image and of_image.setdefault(image, part) != part:
                twice.append(image)
    if twice:
        raise RequestError(f"{len(twice)} images are in two of the official lists: {_some(twice)}", where=raw)
    return of_image


def _patient(layout: Layout, value: str | None, stem: str, file: str, where: str) -> str:
    """The patient's identity: of the column, of the stem, or, if the card names neither, the file itself."""
    if layout.patient_column is not None and not value:
        raise RequestError("no patient", where=f"{where}, column {layout.patient_column}")
    text = value if layout.patient_column is not None else os.path.splitext(file)[0]
    if layout.patient_pattern is not None:
        match = re.search(layout.patient_pattern, text or "")
        if match is None:
            raise RequestError(f"'{text}' tells no patient: no match of {layout.patient_pattern}", where=where)
        return str(match.group(1))
    return text if layout.patient_column is not None and text else file


def _some(items: Iterable[str]) -> str:
    listed = sorted(set(items))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _refuse(items: list[str], what: str, problem: str, where: str) -> None:
    if len(set(items)) != len(items):
        seen: set[str] = set()
        twice = [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]
        raise RequestError(f"{len(set(twice))} {what}s: each {problem}: {_some(twice)}", where=where)


def _refuse_shared_patients(rows: list[_Row], records: list[Record], raw: str) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row, record in zip(rows, records, strict=True):
        splits[row.identity].add(record.split)
    shared = [identity for identity, where in splits.items() if len(where) > 1]
    if shared:
        example = " and ".join(sorted(splits[min(shared)], key=SPLITS.index))
        raise RequestError(
            f"{len(shared)} patients are in more than one split ({example}): {_some(shared)}",
            where=raw,
            hint="give all images of a patient the same split, or drop the split from the card: then patients are split by their hash",
        )


def _refuse_empty(records: list[Record], wanted: list[str], where: str) -> None:
    there = {record.split for record in records}
    for split in wanted:
        if split not in there:
            raise RequestError(
                f"no image in split '{split}' ({len(records)} images in all)", where=where, hint="more images, or another split rule"
            )
