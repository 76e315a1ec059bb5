"""What a run is given by whoever started it: its rank, where to write, whom to tell. Ray, torchrun and a plain call each bring one.

run(config, LocalContext(dir="runs/x"))
"""

import json
import os
from typing import Any, Protocol

from base.paths import is_url


class Context(Protocol):
    """Contract of DESIGN.md, section Method.

    Attributes:
        rank: this process, from 0 to world_size - 1.
        world_size: number of processes that work on this run.
        dir: a local folder for what need not outlive the process.
    """

    rank: int
    world_size: int
    dir: str

    def report(self, row: dict[str, Any]) -> None:
        """One row of metrics (JSON values). Called by every rank with the same row."""
        ...

    def should_stop(self) -> str | None:
        """The reason to stop at the next step boundary, or None."""
        ...


class LocalContext:
    """One process, or one of several under torchrun: rank 0 appends rows to `<dir>/metrics.jsonl`. Nobody asks it to stop."""

    def __init__(self, rank: int = 0, world_size: int = 1, dir: str = ".") -> None:
        self.rank, self.world_size, self.dir = rank, world_size, dir

    def report(self, row: dict[str, Any]) -> None:
        """Append the row to `<dir>/metrics.jsonl` (rank 0 only; object stores cannot append, so a URL gets nothing here)."""
        if self.rank == 0 and not is_url(self.dir):
            os.makedirs(self.dir, exist_ok=True)
            with open(os.path.join(self.dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")

    def should_stop(self) -> str | None:
        """Never."""
        return None
