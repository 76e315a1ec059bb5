"""Tables for people and for pipes.

table([("montgomery", "138"), ...], header=("dataset", "images"))
"""

import shutil
import sys
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
WIDE = 140  # columns of a line that nobody said the width of


def table(rows: Rows, header: Sequence[str] = ()) -> None:
    """Print rows in columns: wrapped to the window on a terminal; elsewhere a row is one line, however long, for grep and cut."""
    if sys.stdout.isatty():
        _to_terminal(rows, header)
    else:
        print(aligned(rows, header), end="")


def brief(rows: Rows, header: Sequence[str] = ()) -> Rows:
    """Rows of sentences for `table`: elsewhere than on a terminal the longest are cut, so that a line holds in COLUMNS, or 140."""
    if sys.stdout.isatty():
        return rows
    room = shutil.get_terminal_size((WIDE, 24)).columns - 2 * (len(header) - 1)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    while sum(widths) > room and max(widths) > 3:
        widths[widths.index(max(widths))] -= 1
    return [
        [cell if len(cell) <= width else f"{cell[: width - 3].rstrip()}..." for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]


def aligned(rows: Rows, header: Sequence[str] = ()) -> str:
    """The rows as text, columns two spaces apart, no blanks at the ends of lines."""
    lines = [list(header), *map(list, rows)] if header else list(map(list, rows))
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)


def _to_terminal(rows: Rows, header: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, show_header=bool(header), header_style="bold")
    # Names are for copying into the next command, so the first column never wraps.
    for i in range(len(rows[0]) if rows else len(header)):
        shown.add_column(header[i] if header else "", no_wrap=i == 0)
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False, markup=False).print(shown)
