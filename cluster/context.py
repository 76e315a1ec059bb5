"""The Context of a worker under Ray: its rows stand in storage already, where the driver follows them; Prometheus is told here."""

from typing import Any

from cluster import observe


class WorkerContext:
    """Satisfies `engine.context.Context`."""

    def __init__(self, rank: int, world_size: int, dir: str) -> None:
        self.rank, self.world_size, self.dir = rank, world_size, dir

    def report(self, row: dict[str, Any]) -> None:
        """The first rank sets the metrics of its run."""
        if self.rank == 0:
            observe.tell_row(self.dir, row)

    def should_stop(self) -> str | None:
        """Never: a study is stopped by ending its driver, and goes on from storage."""
        return None
