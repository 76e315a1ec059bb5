"""What a person sees while a study runs: lines that stay, one live line of all that goes on, and plain lines where there is no terminal."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from base import storage
from base.errors import WorkError

QUIET_S = 15.0
POLL_S = 2.0
BESIDE = " || "  # between the lines of two pieces of work
NEWEST_LINES = 16  # read at each look: a long run has thousands


class Progress:
    """Prints lines that change: on a terminal in place, beside each other where several pieces of work go on at once; elsewhere each of
    them every `QUIET_S` seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        self._lock = threading.RLock()
        self._lines: dict[str, str] = {}  # the newest of each piece of work that goes on
        self._shown: dict[str, float] = {}  # when one was last printed, or first there
        self._started = time.monotonic()
        self._closed = False

    def say(self, text: str) -> None:
        """A line that stays, with the minutes and seconds since the start."""
        with self._lock:
            if self._closed:
                return
            self._clear()
            self._print(text)
            self._draw()

    def line(self, text: str, *, of: str = "") -> None:
        """A line that the next one of the same piece of work replaces."""
        with self._lock:
            if self._closed:
                return
            self._lines[of] = text
            now = time.monotonic()
            if self._live:
                self._draw()
            elif now - self._shown.setdefault(of, now) >= QUIET_S:
                self._print(text)
                self._shown[of] = now

    def gone(self, of: str) -> None:
        """This piece of work has ended: its line goes."""
        with self._lock:
            self._lines.pop(of, None)
            self._shown.pop(of, None)
            self._clear()
            self._draw()

    def close(self) -> None:
        """The study has ended early: what threads of it still say is dropped, so that its error is the last line."""
        with self._lock:
            self._closed = True
            self._lines.clear()
            self._clear()

    def _draw(self) -> None:
        if not self._live or not self._lines:
            return
        width = self.console.width - 1 - len(self._clock()) - 1
        share = max(10, width // len(self._lines) - len(BESIDE))
        whole = BESIDE.join(self._lines.values())
        text = whole if len(whole) <= width else BESIDE.join(line[:share] for line in self._lines.values())
        self._clear()
        sys.stdout.write(f"{self._clock()} {text}"[: self.console.width - 1])
        sys.stdout.flush()

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
                    self.line(f"{label} {_describe(row)}", of=label)
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
    try:
        lines = storage.read_bytes(url).splitlines()
    except (OSError, WorkError):
        return None
    newest: dict[str, float] | None = None
    for row in reversed(storage.rows(b"\n".join(lines[-NEWEST_LINES:]))):
        if "loss" in row:
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
