"""Speed of a run: source images per second over all ranks, and the share of time spent waiting for the loader.

meter = Meter(global_batch); with meter.waiting(): batch = next(batches); ...; meter.tick(); row |= meter.read()
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Counts between two `read` calls. Under 0.1 the step is bound by the network, above it look at the loader first.

    Args:
        least: seconds that a step takes at the roofline (engine.gpus); None where that is not known.
    """

    def __init__(self, global_batch: int, least: float | None = None) -> None:
        self.global_batch, self.least = global_batch, least
        self._steps, self._wait, self._start = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def tick(self) -> None:
        """One step is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """`img_per_s`, `s_per_step` and `data_wait` (0 to 1) since the last read; where it is known `roofline`, the share of it reached."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        row = {"img_per_s": round(self._steps * self.global_batch / elapsed, 2), "data_wait": round(self._wait / elapsed, 4)}
        row["s_per_step"] = round(elapsed / max(1, self._steps), 5)
        if self.least is not None:
            row["roofline"] = round(self._steps * self.least / elapsed, 4)
        self._steps, self._wait, self._start = 0, 0.0, time.perf_counter()
        return row
