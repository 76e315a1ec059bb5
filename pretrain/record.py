"""What a run logs: rows of numbers and events, in `metrics.jsonl` and to whoever started it.

record = Record("OUT/pretrain/x-1234/metrics.jsonl", ctx)
record.add({"step": 10, "loss": 4.2})        # every rank, the same row
record.put()                                 # now, not within seconds
"""

import json
import time
from typing import Any

from base import storage
from engine import ranks
from engine.context import Context

SECONDS_BETWEEN_PUTS = 5.0
Row = dict[str, Any]


class Record:
    """The rows of one run so far; every rank holds the same."""

    def __init__(self, url: str, ctx: Context) -> None:
        self.url, self.ctx = url, ctx
        self.rows: list[Row] = []
        self._last_put = 0.0

    @property
    def measured(self) -> list[Row]:
        """The rows of steps, without events."""
        return [row for row in self.rows if "loss" in row]

    def of(self, event: str) -> list[Row]:
        """The rows of an event."""
        return [row for row in self.rows if row.get("event") == event]

    def add(self, row: Row) -> None:
        """One row, told to the context now and written within seconds."""
        self.rows.append(row)
        self.ctx.report(row)
        if time.perf_counter() - self._last_put > SECONDS_BETWEEN_PUTS:
            self.put()

    def put(self) -> None:
        """Write the whole file (object stores cannot append); rank 0 does."""
        if ranks.rank() == 0:
            storage.put(self.url, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._last_put = time.perf_counter()

    def take_up(self, step: int) -> None:
        """Go on from what stands in the file up to that step; rows after it will be logged again by the same steps."""
        held = [row for row in storage.read_rows(self.url) if row["step"] <= step] if ranks.rank() == 0 else None
        self.rows = ranks.share(held)
