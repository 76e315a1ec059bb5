"""CSV tables of raw datasets: read once, columns checked before any work, cells turned into labels.

table = Table.read("RAW/labels.csv", needs=["image", "tb"])      # RequestError names the file, the column and the nearest one
for row in table: row["image"], table.place(row)                  # "labels.csv, row 7"
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from base import storage
from base.errors import RequestError, nearest, unknown
from shards.card import Card, Layout

Label = int | None
CELLS: dict[str, Label] = {"1": 1, "0": 0, "-1": -1, "": None, "nan": None, "true": 1, "false": 0, "yes": 1, "no": 0}


@dataclass(frozen=True)
class Table:
    """Rows of a CSV file as dictionaries; row numbers count the header as row 1, as a spreadsheet does."""

    url: str
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, url: str, needs: Sequence[str]) -> Table:
        """Read a CSV file (UTF-8, with or without BOM). Raises RequestError for a missing column, a ragged row, another encoding."""
        try:
            text = storage.read_bytes(url).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RequestError(f"not UTF-8 at byte {error.start}", where=url, hint="save the table as UTF-8") from None
        try:
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            header = [name.strip() for name in next(reader, [])]
            for column in needs:
                if column not in header:
                    close = nearest(column, [name for name in header if name])
                    hint = f"nearest column: '{close}'" if close else f"its columns: {', '.join(header) or 'none'}"
                    raise RequestError(f"no column '{column}', which the card needs", where=url, hint=hint)
                if header.count(column) > 1:
                    raise RequestError(f"two columns named '{column}'", where=url)
            rows = []
            for number, cells in enumerate(reader, start=2):
                if not any(cells):
                    continue
                # A surplus cell has shifted the others: a label would be read from its neighbour's column.
                if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
                    raise RequestError(f"row {number} has {len(cells)} cells, the header {len(header)}", where=url)
                rows.append({"": str(number)} | {name: cell.strip() for name, cell in zip(header, cells, strict=False) if name})
        except csv.Error as error:
            raise RequestError(f"not a CSV table: {error}", where=url) from None
        if not rows:
            raise RequestError("the table has no rows", where=url)
        return cls(url, rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.rows)

    def place(self, row: dict[str, str]) -> str:
        """Where a row stands, for error messages."""
        return f"{self.url}, row {row['']}"


def columns_of(layout: Layout) -> list[str]:
    """Every column that a layout reads."""
    single = (layout.image_column, layout.mask_column, layout.findings_column, layout.patient_column, layout.split_column)
    return list(dict.fromkeys([*(name for name in single if name), *layout.label_columns.values(), *layout.metadata.values()]))


def labels_of_row(card: Card, layout: Layout, row: dict[str, str], where: str) -> dict[str, Label]:
    """The labels of a row, raw: 1, 0, -1 uncertain, None unknown. Raises RequestError for a value that is none of the card's."""
    if layout.findings_column is not None:
        return _from_findings(card, layout, row[layout.findings_column], where)
    labels: dict[str, Label] = dict.fromkeys(card.labels)
    for label, column in layout.label_columns.items():
        cell = row[column].lower()
        cell = cell[:-2] if cell.endswith(".0") else cell
        if cell not in CELLS:
            raise RequestError(f"'{row[column]}' is not a label: 1, 0, -1 or nothing", where=f"{where}, column {column}")
        labels[label] = CELLS[cell]
    if card.kind == "multiclass" and labels and sum(value == 1 for value in labels.values()) != 1:
        raise RequestError(f"{sum(value == 1 for value in labels.values())} classes are 1, it must be one", where=where)
    return labels


def _from_findings(card: Card, layout: Layout, text: str, where: str) -> dict[str, Label]:
    if card.kind == "multiclass":
        names = [text] if text else []  # a single label: one name, in which the separator has no meaning
    else:
        names = [name.strip() for name in text.split(layout.separator) if name.strip()]
    if not names:
        if card.kind == "multiclass":
            raise RequestError("no class", where=f"{where}, column {layout.findings_column}")
        return dict.fromkeys(card.labels)  # an empty cell says nothing; "no finding" has a name of its own
    for name in names:
        if name not in card.labels and name not in layout.no_finding:
            raise unknown("label", name, [*card.labels, *layout.no_finding], where=f"{where}, column {layout.findings_column}")
    return {label: int(label in names) for label in card.labels}
