"""Many Ray tasks, few at a time: only so many are asked for as there is room, so that other work of the study finds its place.

for ended in run_tasks(lambda i: write.remote(jobs[i]), len(jobs), room):
    ...                                                     # {i: result} of those that ended since; empty when a second has passed
"""

from collections.abc import Callable, Iterator
from typing import Any

from base.errors import AllograftError, WorkError, in_a_line

TICK_S = 1.0


def run_tasks(submit: Callable[[int], Any], count: int, room: Callable[[], float] | None = None) -> Iterator[dict[int, Any]]:
    """Results by number, as they come.

    Args:
        submit: gives the reference of task i.
        room: how many may be asked for at a time, at least one; by default all.

    Raises:
        RequestError: a task found the request wrong.
        WorkError: a task failed, or was lost with its worker or node.
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
            except ray.exceptions.RayError as error:
                raise of_task(error) from error
        yield ended


def of_task(error: Any) -> AllograftError:
    """What an error of Ray's says of a task: an error of ours as it was raised, anything else as failed work."""
    cause = getattr(error, "cause", error)  # what the task itself raised; workers and nodes that die leave none
    if isinstance(cause, AllograftError):
        return cause
    return WorkError(in_a_line(cause), hint="the same command goes on from what stands")
