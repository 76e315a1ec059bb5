"""The images of a raw folder as rows: where each lies, what is said of it, whose it is. Nothing is decided here about splits or hashes.

rows, left_out = read_rows(card, "RAW", files)       # the card has the found layout alone
"""

from __future__ import annotations

import fnmatch
import glob
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from base import storage
from base.errors import RequestError, WorkError
from shards import cells, containers
from shards.card import Card, Layout, Part
from shards.containers import Inside
from shards.deidentify import clean_metadata
from shards.rawfiles import Finder, bare, files, inside, stamp, stem
from shards.splitting import count, official, part_of, some
from shards.tables import Table


@dataclass
class Row:
    """One image. `said` is what the table calls it; `where` names its row or file in errors; `part` None: no official split."""

    file: str
    said: str
    where: str
    labels: dict[str, cells.Label]
    cells: dict[str, str] = field(default_factory=dict)
    meta: dict[str, str | int | None] = field(default_factory=dict)
    inside: Inside | None = None
    part: Part | None = None
    identity: str = ""
    study: str | None = None
    masks: tuple[str, ...] = ()
    mask_classes: tuple[int, ...] = ()
    runs: tuple[str, ...] | None = None
    field_of_view: str | None = None


def read_rows(card: Card, raw: str, found: dict[str, str]) -> tuple[list[Row], int]:
    """The rows of the card's only layout, and how many of its images or rows the card leaves out. Raises RequestError."""
    layout = card.layouts[0]
    reader = card.reader_of(layout)
    left_out = 0
    if reader in ("npz", "tars", "tars-in-place"):
        rows = list(_contained(card, raw, found))
    else:
        rows, left_out = _table_rows(card, raw, found) if layout.has_table else ([], 0)
        named = {row.file for row in rows}
        others = [file for file in found if file not in named]
        if reader == "folders" or not layout.has_table:
            rows += [Row(file, file, file, cells.of_path(card, layout, file, folders=reader == "folders")) for file in others]
        else:
            left_out += len(others)
    patients = _Patients(layout, raw, found)
    masks = _Masks(card, raw) if card.has_masks else None
    for row in rows:
        row.identity, row.study = patients.of(row)
        row.part = row.part or _part(layout, row)
        if masks is not None:
            row.masks, row.mask_classes, row.field_of_view = masks.of(row)
    return _by_list(layout, raw, rows), left_out


def _contained(card: Card, raw: str, found: dict[str, str]) -> Iterator[Row]:
    layout = card.layouts[0]
    inner = containers.npz if card.reader_of(layout) == "npz" else containers.tar
    for name in sorted(found):
        for image in inner(raw, name, card):
            labels = cells.of_path(card, layout, image.file) if image.labels is None else image.labels
            yield Row(image.file, image.file, image.file, labels, inside=image.inside, part=image.part)


def _tables(layout: Layout, raw: str) -> Iterator[tuple[Part | None, Table]]:
    """The layout's tables, joined, each with the part that it is the table of."""
    columns = layout.columns
    keeps = {*columns, *(join.by for join in layout.join)}
    whole: list[tuple[Part | None, str]] = [(None, layout.table)] if layout.table is not None else list(layout.split_tables.items())

    def read(pattern: str, needs: list[str]) -> Table:
        there = files(raw, [pattern])
        if not there:
            raise RequestError("no such table", where=storage.join(raw, pattern))
        return Table.read(storage.join(raw, min(there)), needs, layout.sep, keeps)

    others = [(join, read(join.table, [join.by])) for join in layout.join]
    for part, pattern in whole:
        table = read(pattern, [] if layout.join else columns)
        for join, other in others:
            table = table.joined(other, join.by, join.optional)
        table.need(columns)
        yield part, table


def _table_rows(card: Card, raw: str, found: dict[str, str]) -> tuple[list[Row], int]:
    """The rows of the layout's tables, and how many of them the card leaves out."""
    layout = card.layouts[0]
    assert layout.image_column is not None
    finder, left_out = Finder(found), 0
    rows: list[Row] = []
    for part, table in _tables(layout, raw):
        groups: dict[str, list[dict[str, str]]] = defaultdict(list)
        merge = layout.rle is not None or layout.repeated is not None
        for number, cell in enumerate(table):
            if any(cell[column] not in values for column, values in layout.keep.items()):
                left_out += 1
                continue
            if not cell[layout.image_column]:
                raise RequestError("no image", where=f"{table.place(cell)}, column {layout.image_column}")
            groups[cell[layout.image_column] if merge else str(number)].append(cell)
        for group in groups.values():
            row = _table_row(card, layout, finder, table, group)
            row.part = part
            rows.append(row)
    return rows, left_out


def _table_row(card: Card, layout: Layout, finder: Finder, table: Table, group: list[dict[str, str]]) -> Row:
    """The row of an image, of all rows of a table that name it."""
    assert layout.image_column is not None
    first = group[0]
    where, said = table.place(first), first[layout.image_column]
    path = said
    if layout.image_pattern is not None:
        match = re.search(layout.image_pattern, said)
        if match is None:
            raise RequestError(f"'{said}' names no image: no match of {layout.image_pattern}", where=where)
        path = match.group(1)
    file = finder.find(path, where) or path
    labels = cells.of_row(card, layout, first, where)
    if layout.label_pattern is not None and layout.findings_column is None:
        labels = cells.of_path(card, layout, file)
    elif layout.repeated is not None:
        labels = cells.majority([cells.of_row(card, layout, row, table.place(row)) for row in group])
    meta = {name: clean_metadata(name, first[column]) for name, column in layout.metadata.items()}
    row = Row(inside(file, where), said, where, labels, first, meta)
    if layout.rle is not None:
        row.runs = tuple(cell[layout.rle.column] for cell in group if cell[layout.rle.column] not in layout.rle.empty)
        if layout.rle.label is not None:
            row.labels = labels | {layout.rle.label: int(bool(row.runs))}
    return row


def _part(layout: Layout, row: Row) -> Part | None:
    if layout.split_column is not None:
        return part_of(layout, row.cells[layout.split_column], f"{row.where}, column {layout.split_column}")
    if layout.split_pattern is None:
        return None
    match = re.search(layout.split_pattern, bare(row.file))
    if match is None:
        raise RequestError(f"the path tells no split: no match of {layout.split_pattern}", where=row.file)
    return part_of(layout, match.group(1), row.file)


def _by_list(layout: Layout, raw: str, rows: list[Row]) -> list[Row]:
    if not layout.split_lists:
        return rows
    lists, unlisted = official(layout, raw), []
    for row in rows:
        by = layout.split_lists_by
        if by == "image":
            names = [os.path.basename(row.said), os.path.basename(row.file), stem(row.file)]
        else:
            names = [row.identity if by == "patient" else row.cells[by]]
        row.part = next((lists[name] for name in names if name in lists), None)
        if row.part is None:
            unlisted.append(row.said)
    if unlisted:
        raise RequestError(f"{count(len(unlisted), 'image')} in none of the official lists: {some(unlisted)}", where=raw)
    return rows


class _Patients:
    """The patient and the study of each row: of a column, a DICOM tag, another table or the path; else each image is a patient."""

    def __init__(self, layout: Layout, raw: str, found: dict[str, str]) -> None:
        self.layout, self.raw = layout, raw
        self.group: dict[str, str] = {}
        groups = layout.patient_groups
        if groups is not None:
            table = Table.read(storage.join(raw, min(files(raw, [groups.table]), default=groups.table)), groups.columns, groups.sep)
            for number, row in enumerate(table):
                for column in groups.columns:
                    if row[column] and self.group.setdefault(row[column], f"row {number}") != f"row {number}":
                        raise RequestError(f"'{row[column]}' is of two patients", where=table.place(row))

    def of(self, row: Row) -> tuple[str, str | None]:
        layout = self.layout
        tags = [tag for tag in (layout.patient_tag, layout.study_tag) if tag]
        header = _tags(self.raw, row.file, tags) if tags else None
        if layout.patient_groups is not None:
            identity = self._group(row)
        else:
            patient = self._text(row, "patient", layout.patient_column, layout.patient_tag, layout.patient_pattern, header)
            identity = patient or row.file
        study = self._text(row, "study", layout.study_column, layout.study_tag, layout.study_pattern, header)
        return identity, None if study is None else f"{identity}\x1f{study}"

    def _group(self, row: Row) -> str:
        for name in (row.said, os.path.basename(row.file), stem(row.file)):
            if name in self.group:
                return self.group[name]
        raise RequestError(f"'{row.said}' has no patient in the table of patients", where=row.where)

    @staticmethod
    def _text(row: Row, what: str, column: str | None, tag: str | None, pattern: str | None, header: dict[str, str] | None) -> str | None:
        text: str | None = None
        if column is not None:
            text = row.cells[column]
            if not text:
                raise RequestError(f"no {what}", where=f"{row.where}, column {column}")
        elif tag is not None:
            if header is None:  # no DICOM: packing quarantines it
                return None
            text = header.get(tag)
            if text is None:
                raise RequestError(f"no {what}", where=f"{row.file}, tag {tag}")
        if pattern is None:
            return text
        match = re.search(pattern, bare(row.file) if text is None else text)
        if match is None:
            raise RequestError(f"'{row.file if text is None else text}' tells no {what}: no match of {pattern}", where=row.where)
        return str(match.group(1))


def _tags(raw: str, file: str, tags: list[str]) -> dict[str, str] | None:
    """Those attributes of a DICOM file (of a folder: of its first); None of a file that is no DICOM or not there, which packing will
    quarantine.

    Raises:
        WorkError: it is there and cannot be read now: an image must not become a patient of its own by a fault of the disk.
    """
    import pydicom
    from fsspec import open as fs_open
    from pydicom.errors import InvalidDicomError

    url = storage.join(raw, file)
    if file.endswith("/"):
        url = storage.join(url, storage.listing(url)[0])
    try:
        with fs_open(url, "rb") as stream:
            header: Any = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags)
            return {tag: str(header[tag].value).strip() for tag in tags if tag in header and str(header[tag].value or "").strip()}
    except (FileNotFoundError, InvalidDicomError, ValueError, KeyError, EOFError, NotImplementedError, AttributeError):
        return None
    except OSError as error:
        raise WorkError(f"cannot be read: {error}", where=url, hint="run the same command again") from error


class _Masks:
    """Where the masks of each row lie."""

    def __init__(self, card: Card, raw: str) -> None:
        self.card, self.layout, self.raw = card, card.layouts[0], raw
        view = self.layout.field_of_view
        starred = [template for template in [*(template for _, template in self.layout.templates), view or ""] if "*" in template]
        self.there = {template: sorted(files(raw, [re.sub(r"\{\w+\}", "*", template)])) for template in starred}

    def of(self, row: Row) -> tuple[tuple[str, ...], tuple[int, ...], str | None]:
        found: list[str] = []
        classes: list[int] = []
        for name, template in self.layout.templates:
            of_template = self._files(template, row)
            found += of_template
            classes += [self.card.mask_classes.index(name) + 1] * len(of_template) if name is not None else []
        column = self.layout.mask_column
        if column is not None and row.cells[column]:
            found = [inside(row.cells[column], row.where)]
        view = self.layout.field_of_view
        views = self._files(view, row) if view else []
        return tuple(found), tuple(classes), views[0] if views else None

    def _files(self, template: str, row: Row) -> list[str]:
        """The files of a template; one that is not there is named all the same, so that the sample is quarantined by name."""
        parts = {"stem": stem(row.file), "dir": os.path.dirname(row.file.rstrip("/")) or "."}
        if self.layout.mask_pattern is not None:
            match = re.search(self.layout.mask_pattern, bare(row.file))
            if match is None:
                raise RequestError(f"the path tells no mask: no match of {self.layout.mask_pattern}", where=row.file)
            parts["id"] = match.group(1)
        if "*" in template:
            shape = posixpath.normpath(template.format(**{name: glob.escape(part) for name, part in parts.items()}))
            return fnmatch.filter(self.there[template], shape) or ([] if self.layout.mask_optional else [shape])
        path = inside(posixpath.normpath(template.format(**parts)), row.where)
        return [] if self.layout.mask_optional and stamp(self.raw, path) == "absent" else [path]
