"""What a raw dataset says of an image, turned into labels: 1, 0, -1 uncertain, None unknown.

    labels = of_row(card, layout, row, "labels.csv, row 7")       # {"edema": 1, "mass": None}
    labels = of_path(card, layout, "covid19_posi/a.png")
    labels = majority([{"mass": 1}, {"mass": 1}, {"mass": 0}])     # {"mass": 1}

A sample of a multiclass dataset holds its class alone, {"melanoma": 1}: the others are 0, and of ten thousand nobody writes the zeros.
Nothing known of it is {}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from base.errors import RequestError, unknown
from shards.card import Card, Layout
from shards.rawfiles import bare

Label = int | None
CELLS: dict[str, Label] = {"1": 1, "0": 0, "-1": -1, "": None, "nan": None, "true": 1, "false": 0, "yes": 1, "no": 0}


def of_row(card: Card, layout: Layout, row: Mapping[str, str], where: str) -> dict[str, Label]:
    """The labels of a row of a table. Raises RequestError for a value that is none of the card's."""
    if layout.findings_column is not None:
        text, place = row[layout.findings_column], f"{where}, column {layout.findings_column}"
        if layout.label_pattern is not None:
            match = re.search(layout.label_pattern, text)
            if match is None:
                raise RequestError(f"'{text}' names no label: no match of {layout.label_pattern}", where=place)
            text = match.group(1)
        return named(card, layout, text, place)
    known = {label: _cell(layout, row[column], f"{where}, column {column}") for label, column in layout.label_columns.items()}
    return _whole(card, known, where)


def of_path(card: Card, layout: Layout, file: str, folders: bool = False) -> dict[str, Label]:
    """The labels that a file's path tells, by the layout's pattern or, with `folders`, by the folder it lies in. Raises RequestError."""
    if layout.label_pattern is None:
        if not folders:
            return _whole(card, {}, file)
        folder = file.rstrip("/").rpartition("/")[0].rpartition("/")[2]
        return named(card, layout, folder, file)
    match = re.search(layout.label_pattern, bare(file))
    if match is None:
        raise RequestError(f"the name does not tell its labels: no match of {layout.label_pattern}", where=file)
    groups = {label: value for label, value in match.groupdict().items() if label in card.labels}
    if not groups:
        return named(card, layout, match.group(1) or "", file)
    return _whole(card, {label: _cell(layout, value or "", file) for label, value in groups.items()}, file)


def of_numbers(card: Card, numbers: Sequence[int], where: str) -> dict[str, Label]:
    """The labels of a sample by number: one number of a class, or a 1, 0 or -1 for each label. Raises RequestError."""
    if card.kind == "multiclass":
        if len(numbers) != 1 or (card.labels and not 0 <= numbers[0] < len(card.labels)):
            shown = ", ".join(str(number) for number in numbers)
            raise RequestError(f"class {shown} is not one of the card's {len(card.labels)}", where=where)
        return {card.labels[numbers[0]] if card.labels else str(numbers[0]): 1}
    if len(numbers) != len(card.labels):
        raise RequestError(f"{len(numbers)} labels, the card has {len(card.labels)}", where=where)
    for number in numbers:
        if number not in (1, 0, -1):
            raise RequestError(f"{number} is not a label: 1, 0 or -1", where=where)
    return dict(zip(card.labels, numbers, strict=True))


def named(card: Card, layout: Layout, text: str, where: str) -> dict[str, Label]:
    """The labels that a text names: one class, or findings joined by the layout's separator. Raises RequestError for an unknown name."""
    if card.kind == "unlabelled":
        return {}
    single = card.kind == "multiclass"  # one name, in which the separator has no meaning
    said = [text] if single else [name.strip() for name in text.split(layout.separator) if name.strip()]
    names = [name for name in (_said(layout, name) for name in said) if name]
    if single and not names and text not in layout.values:
        raise RequestError("no class", where=where)
    for name in names:
        if not (card.labels_found and not card.labels) and name not in card.labels and name not in layout.no_finding:
            raise unknown("label", name, [*card.labels, *layout.no_finding], where=where)
    if single:
        return {name: 1 for name in names if name not in layout.no_finding}
    # An empty text says nothing; "no finding" has a name of its own.
    return {label: int(label in names) for label in card.labels} if names else dict.fromkeys(card.labels)


def majority(votes: Sequence[Mapping[str, Label]]) -> dict[str, Label]:
    """What more than half of those say who say anything of a label; -1 where no value has that many."""
    decided: dict[str, Label] = {}
    for label in votes[0]:
        known = [vote[label] for vote in votes if vote[label] is not None]
        winner = next((value for value in (1, 0) if 2 * known.count(value) > len(known)), -1)
        decided[label] = winner if known else None
    return decided


def _said(layout: Layout, text: str) -> str:
    if text in layout.values:
        return layout.values[text]
    whole = text.removesuffix(".0")  # a column of whole numbers with a gap is written as one of fractions
    return layout.values.get(whole, text)


def _cell(layout: Layout, text: str, where: str) -> Label:
    cell = _said(layout, text).lower().removesuffix(".0")
    if cell not in CELLS:
        raise RequestError(f"'{text}' is not a label: 1, 0, -1 or nothing", where=where)
    return CELLS[cell]


def _whole(card: Card, known: Mapping[str, Label], where: str) -> dict[str, Label]:
    if card.kind != "multiclass":
        return dict.fromkeys(card.labels) | dict(known)
    ones = [label for label, value in known.items() if value == 1]
    if known and len(ones) != 1 and any(value is not None for value in known.values()):
        raise RequestError(f"{len(ones)} classes are 1, it must be one", where=where)
    return dict.fromkeys(ones, 1)
