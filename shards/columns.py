"""What the columns of an unknown table seem to be: image, patient, split, labels, metadata. Guesses by content first, by name second.

facts = survey_table("RAW", "labels.csv", files)     # None if it is not a table
facts.having("patient"), facts.having("label")
"""

import csv
import gzip
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from base import storage
from shards.cells import CELLS
from shards.rawfiles import opened, stem
from shards.splitting import SPLIT_WORDS

Role = Literal["image", "mask", "patient", "split", "label", "findings", "class", "view", "sex", "age", "other"]
SEPARATORS = ("|", ";", ",")
_NAMES: tuple[tuple[Role, str], ...] = (
    ("sex", r"\bsex\b|gender"),
    ("age", r"\bage\b"),
    ("view", r"view|projection|position"),
    ("patient", r"patient|subject|person|participant|individual|\bpid\b|case id"),  # after the others: `Patient Age` is an age
    ("mask", r"mask|segment|contour"),
    ("class", r"label|class|diagnos|\bdx\b|grade|level|finding|category|target"),
)
MOST_ROWS = 200_000  # of a table are looked at
NEAR, SHORTEST = 2, 5  # letters between a word and its slip, and those of the shortest word that is looked at
MOST_CLASSES = 50  # distinct values of a column beyond which they are not classes


@dataclass(frozen=True)
class Column:
    """One column: how many cells are filled, how many values differ, the commonest ones, and what it seems to be."""

    name: str
    filled: int
    distinct: int
    top: tuple[tuple[str, int], ...]
    role: Role
    words: tuple[str, ...] = ()  # of findings: the names in its cells; of a class: its values
    separator: str = ""
    images: int = 0  # of an image column: how many cells name a file that is there
    slips: tuple[tuple[str, str], ...] = ()  # of findings or a class: words of one row that are nearly another one, with that


@dataclass(frozen=True)
class TableFacts:
    """One table of the raw folder; of `rows` there are more where they are MOST_ROWS."""

    file: str
    separator: str
    rows: int
    columns: tuple[Column, ...]
    one_of: bool  # each row has a 1 in exactly one of the label columns: they are classes
    doubled: int = 0  # images that stand in several rows
    agree: bool = True  # the rows of each of them are equal

    def having(self, role: Role) -> list[Column]:
        """The columns of that role, the best first."""
        return [column for column in self.columns if column.role == role]

    @property
    def images(self) -> int:
        """How many of its rows name an image that is there."""
        return max((column.images for column in self.having("image")), default=0)


class FileNames:
    """The raw folder's files by path, base name and stem: what a cell of a table may mean."""

    def __init__(self, files: Iterable[str]) -> None:
        self.paths = set(files)
        self.bases = {os.path.basename(file) for file in self.paths}
        self.stems = {stem(base) for base in self.bases}

    def knows(self, cell: str) -> bool:
        """Whether the cell names a file, with or without folder and extension."""
        base = os.path.basename(cell)
        return cell in self.paths or base in self.bases or base in self.stems


def read_rows(url: str) -> tuple[str, list[dict[str, str]]] | None:
    """Separator and the first rows of a text table; None where the text is not one (no second column, ragged rows, another encoding)."""
    try:
        with opened(url) as file:
            plain = gzip.GzipFile(fileobj=file) if url.endswith(".gz") else file
            stream = io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")
            first = stream.readline()
            separator = max((",", ";", "\t"), key=first.count)
            if separator not in first:
                return None
            names = [name.strip() for name in next(csv.reader([first], delimiter=separator))]
            cells = islice(csv.reader(stream, delimiter=separator), MOST_ROWS)
            rows = [dict(zip(names, (cell.strip() for cell in row), strict=True)) for row in cells if len(row) == len(names)]
    except (UnicodeDecodeError, OSError, EOFError, csv.Error):
        return None
    return (separator, rows) if rows and len(set(names)) == len(names) else None


def survey_table(raw: str, file: str, files: FileNames) -> TableFacts | None:
    """The facts of one table of a raw folder, or None."""
    read = read_rows(storage.join(raw, file))
    if read is None:
        return None
    separator, rows = read
    columns = tuple(_column(name, [row[name] for row in rows], files) for name in rows[0] if name)
    labels = [column.name for column in columns if column.role == "label"]
    one_of = len(labels) > 1 and all(sum(_value(row[name]) == 1 for name in labels) == 1 for row in rows)
    image = next((column.name for column in columns if column.role == "image"), None)
    of_image: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows if image is not None else ():
        if cell := row[str(image)]:
            of_image[cell].append(row)
    several = [held for held in of_image.values() if len(held) > 1]
    agree = all(row == held[0] for held in several for row in held)
    return TableFacts(file, separator, len(rows), columns, one_of, len(several), agree)


def _column(name: str, cells: Sequence[str], files: FileNames) -> Column:
    counts = Counter(cell for cell in cells if cell)
    filled = sum(counts.values())
    facts = Column(name, filled, len(counts), tuple(counts.most_common(5)), "other")
    images = sum(n for cell, n in counts.items() if files.knows(cell))
    if filled and images >= 0.5 * filled and len(counts) > 1:
        return _as(facts, "mask" if _named(name) == "mask" else "image", images=images)
    by_name = _named(name)
    if counts and all(cell.lower() in SPLIT_WORDS for cell in counts):
        return _as(facts, "split")
    if by_name in ("patient", "sex", "age", "view"):
        return _as(facts, by_name)
    if _is_label(counts):
        return _as(facts, "label")
    separator = _joins(counts)
    if separator:
        words = Counter(word.strip() for cell, n in counts.items() for word in cell.split(separator) for _ in range(n) if word.strip())
        return _as(facts, "findings", words=tuple(words), separator=separator, slips=_slips(words))
    repeated = 2 <= len(counts) <= min(MOST_CLASSES, filled // 2)
    if repeated and (by_name == "class" or not all(_is_number(cell) for cell in counts)):
        return _as(facts, "class", words=tuple(sorted(counts)), slips=_slips(counts))
    return facts


def _as(facts: Column, role: Role, **found: Any) -> Column:
    return replace(facts, role=role, **found)


def _slips(counts: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """Words that occur once and are one or two letters from a commoner one, each with that: slips of a pen, perhaps."""
    found = []
    for word in (word for word, n in counts.items() if n == 1 and len(word) >= SHORTEST):
        near = [other for other, n in counts.items() if n > 1 and _letters_apart(word, other) <= NEAR]
        # `grade 1` and `grade 2` are no slips of each other.
        near = [other for other in near if re.sub(r"\d+", "0", other) != re.sub(r"\d+", "0", word)]
        if near:
            found.append((word, max(near, key=lambda other: counts[other])))
    return tuple(found)


def _letters_apart(a: str, b: str) -> int:
    """Letters to put in, take out or change (Levenshtein); any number above NEAR where the lengths say so."""
    if abs(len(a) - len(b)) > NEAR:
        return NEAR + 1
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


def _named(name: str) -> Role:
    # Words are told apart in `patient_id`, `Patient ID` and `PatientID` alike.
    spaced = re.sub(r"[_\W]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).lower()
    return next((role for role, pattern in _NAMES if re.search(pattern, spaced)), "other")


def _is_label(counts: Mapping[str, int]) -> bool:
    """Cells of 1, 0, -1 or yes and no, and a 1 among them: a column that never says 1 teaches nothing."""
    return len(counts) > 1 and all(_cell(cell) in CELLS for cell in counts) and any(_value(cell) == 1 for cell in counts)


def _cell(cell: str) -> str:
    return cell.lower().removesuffix(".0")


def _value(cell: str) -> int | None:
    return CELLS.get(_cell(cell))


def _joins(counts: Mapping[str, int]) -> str:
    """The separator that joins names of a small vocabulary in these cells, or nothing."""
    for separator in SEPARATORS:
        joined = [cell for cell in counts if separator in cell]
        if not joined:
            continue
        words = {word.strip() for cell in counts for word in cell.split(separator)}
        if len(words) <= MOST_CLASSES and len(words) < len(counts) + 2 and not all(_is_number(word) for word in words):
            return separator
    return ""


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", cell) is not None
