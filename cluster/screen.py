"""Tables for people and for pipes.

table([("montgomery", "138"), ...], header=("dataset", "images"))
"""

import sys
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def table(rows: Rows, header: Sequence[str] = ()) -> None:
    """Print rows in columns: wrapped to the window on a terminal; elsewhere a row is one line, however long, for grep and cut."""
    if sys.stdout.isatty():
        _to_terminal(rows, header)
    else:
        print(aligned(rows, header), end="")


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
