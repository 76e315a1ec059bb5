"""CSV tables of raw datasets: read once, columns checked before any work.

table = Table.read("RAW/labels.csv", needs=["image", "tb"])      # RequestError names the file, the column and the nearest one
for row in table: row["image"], table.place(row)                  # "labels.csv, row 7"
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from base import storage
from base.errors import RequestError, nearest


@dataclass(frozen=True)
class Table:
    """Rows of a CSV file as dictionaries of stripped cells; row numbers count the header as row 1, as a spreadsheet does."""

    url: str
    header: tuple[str, ...]
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, url: str, needs: Sequence[str], sep: str = ",", keeps: Collection[str] | None = None) -> Table:
        """Read a CSV file (UTF-8, with or without BOM, gzip or not).

        Args:
            needs: columns that must be there.
            sep: what separates cells.
            keeps: columns to hold in memory; all without.
        Raises:
            RequestError: a missing column, a ragged row, another encoding, no rows.
        """
        try:
            data = storage.read_bytes(url)
            if data[:4] == b"PK\x03\x04":
                raise RequestError("a workbook or another zip archive, not a table of text", where=url, hint="save the sheet as CSV, UTF-8")
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RequestError(f"not UTF-8 at byte {error.start}", where=url, hint="save the table as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise RequestError(f"cannot be read: {error}", where=url) from None
        try:
            reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=sep)
            header = [name.strip() for name in next(reader, [])]
            table = cls(url, tuple(header), [])
            table.need(needs)
            kept = [(i, name) for i, name in enumerate(header) if name and (keeps is None or name in keeps)]
            for number, cells in enumerate(reader, start=2):
                if not any(cells):
                    continue
                # A surplus cell has shifted the others: a label would be read from its neighbour's column.
                if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
                    raise RequestError(f"row {number} has {len(cells)} cells, the header {len(header)}", where=url)
                table.rows.append({"": str(number)} | {name: cells[i].strip() for i, name in kept})
        except csv.Error as error:
            raise RequestError(f"not a CSV table: {error}", where=url) from None
        if not table.rows:
            raise RequestError("the table has no rows", where=url)
        return table

    def need(self, columns: Sequence[str]) -> None:
        """Raises RequestError unless each of these columns is there, once."""
        for column in columns:
            if column not in self.header:
                close = nearest(column, [name for name in self.header if name])
                hint = f"nearest column: '{close}'" if close else f"its columns: {', '.join(self.header) or 'none'}"
                raise RequestError(f"no column '{column}', which the card needs", where=self.url, hint=hint)
            if self.header.count(column) > 1:
                raise RequestError(f"two columns named '{column}'", where=self.url)

    def joined(self, other: Table, by: str, optional: bool) -> Table:
        """Each row with the cells of the other table's row of the same `by`; with `optional`, rows without one get empty cells.

        Raises:
            RequestError: two rows of the other table have one key, a row has no partner, or a column of both differs.
        """
        self.need([by])
        partners: dict[str, dict[str, str]] = {}
        for row in other:
            if partners.setdefault(row[by], row) is not row:
                raise RequestError(f"'{row[by]}' stands twice in the column '{by}'", where=other.place(row))
        added = [name for name in other.header if name and name not in self.header and name in other.rows[0]]
        shared = [name for name in other.header if name and name in self.header and name in other.rows[0] and name in self.rows[0]]
        rows = []
        for row in self:
            partner = partners.get(row[by])
            if partner is None and not optional:
                raise RequestError(f"no row for '{row[by]}', which {self.place(row)} names", where=f"{other.url}, column {by}")
            for name in shared if partner else ():
                if partner is not None and partner[name] != row[name]:
                    raise RequestError(f"the column '{name}' says '{partner[name]}', {self.place(row)} says '{row[name]}'", where=other.url)
            rows.append(row | {name: partner[name] if partner else "" for name in added})
        return replace(self, header=(*self.header, *added), rows=rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.rows)

    def place(self, row: dict[str, str]) -> str:
        """Where a row stands, for error messages."""
        return f"{self.url}, row {row['']}"
