"""What a person sees while a study runs: stage headings, one live line, and plain lines where there is no terminal."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from base import storage
from base.errors import WorkError

QUIET_S = 15.0
POLL_S = 2.0
NEWEST_LINES = 16  # read at each look: a long run has thousands


class Progress:
    """Prints a line that changes: in place on a terminal, every `QUIET_S` seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        self._last = 0.0
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays, with the minutes and seconds since the start."""
        self._clear()
        self._print(text)
        self._last = time.monotonic()

    def line(self, text: str, *, last: bool = False) -> None:
        """A line that the next one replaces."""
        if self._live:
            self._clear()
            sys.stdout.write(f"{self._clock()} {text}"[: self.console.width - 1])
            sys.stdout.flush()
        elif last or time.monotonic() - self._last >= QUIET_S:
            self._print(text)
            self._last = time.monotonic()
        if last and self._live:
            sys.stdout.write("\n")

    def _print(self, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"[dim]{self._clock()}[/dim] {escape(text)}")

    def _clear(self) -> None:
        if self._live:
            sys.stdout.write("\r\x1b[2K")

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"

    @contextmanager
    def follow(self, url: str, label: str) -> Iterator[None]:
        """Show the newest row of a metrics.jsonl while the work behind it goes on elsewhere."""
        stop = threading.Event()

        def watch() -> None:
            shown = None
            while not stop.wait(POLL_S):
                row = _newest(url)
                if row is not None and row != shown:
                    self.line(f"{label} {_describe(row)}")
                    shown = row

        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _newest(url: str) -> dict[str, float] | None:
    """The newest row, with the newest value of what only some rows have."""
    import json

    try:
        lines = storage.read_bytes(url).splitlines()
    except (OSError, WorkError):
        return None
    newest: dict[str, float] | None = None
    for line in reversed(lines[-NEWEST_LINES:]):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "loss" in row:
            newest = {**row, **newest} if newest else row
            if SELDOM in newest or "rankme" not in newest:  # the rows of a cell have none
                return newest
    return newest


SELDOM = "knn_auroc"  # every fifth logged step, where there are labels


FIELDS = (
    ("img_per_s", "img/s", "{:.0f}"),
    ("roofline", "roofline", "{:.0%}"),
    ("data_wait", "wait", "{:.0%}"),
    ("std_ratio", "std", "{:.2f}"),
    ("rankme", "rank", "{:.0f}"),
    (SELDOM, "knn", "{:.3f}"),
)


def _describe(row: dict[str, float]) -> str:
    total = f"/{row['steps']:.0f} {row['step'] / row['steps']:.0%}" if "steps" in row else ""
    parts = [f"step {row['step']:.0f}{total}", f"loss {row['loss']:.3f}"]
    parts += [f"{name} {form.format(row[key])}" for key, name, form in FIELDS if row.get(key) is not None]
    if row.get("health", "healthy") not in ("healthy", "too short"):
        parts.append(str(row["health"]))
    if "steps" in row and "s_per_step" in row and row["step"] > 1:  # the first step pays for the start
        parts.append(f"to go {minutes(row['s_per_step'] * (row['steps'] - row['step']))}")
    return " | ".join(parts)


def minutes(seconds: float | None) -> str:
    """`3m20s`; a question mark when it is not known."""
    if seconds is None:
        return "?"
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
