"""The Context of a worker under Ray: its rows stand in storage already, where the driver follows them."""

from typing import Any


class WorkerContext:
    """Satisfies `engine.context.Context`."""

    def __init__(self, rank: int, world_size: int, dir: str) -> None:
        self.rank, self.world_size, self.dir = rank, world_size, dir

    def report(self, row: dict[str, Any]) -> None:
        """Nothing: see the module."""

    def should_stop(self) -> str | None:
        """Never: a study is stopped by ending its driver, and goes on from storage."""
        return None
