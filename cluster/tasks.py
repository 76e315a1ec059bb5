"""Many Ray tasks, few at a time: only so many are asked for as there is room, so that other work of the study finds its place.

for ended in run_tasks(lambda i: write.remote(jobs[i]), len(jobs), room):
    ...                                                     # {i: result} of those that ended since; empty when a second has passed
"""

from collections.abc import Callable, Iterator
from typing import Any

TICK_S = 1.0


def run_tasks(submit: Callable[[int], Any], count: int, room: Callable[[], float] | None = None) -> Iterator[dict[int, Any]]:
    """Results by number, as they come.

    Args:
        submit: gives the reference of task i.
        room: how many may be asked for at a time, at least one; by default all.

    Raises:
        What a task raised.
    """
    import ray

    waiting: dict[Any, int] = {}
    asked = 0
    while waiting or asked < count:
        while asked < count and len(waiting) < max(1, int(room()) if room else count):
            waiting[submit(asked)] = asked
            asked += 1
        ended: dict[int, Any] = {}
        for reference in ray.wait(list(waiting), num_returns=1, timeout=TICK_S)[0]:
            try:
                ended[waiting.pop(reference)] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
        yield ended
