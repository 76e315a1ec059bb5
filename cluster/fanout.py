"""The fan-out: thousands of cells on a pool of warm workers, each of which imports torch once.

Ray keeps nothing that matters: a cell is done when its result.json stands in storage. A worker that dies takes its cell's attempt
with it and is replaced; a cell that raises is recorded and the others go on.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from base.config import canonical_json, parse
from base.errors import WorkError
from cluster.context import WorkerContext
from cluster.sources import local_encoder
from cluster.study import Resources
from finetune.cell import CellConfig

ATTEMPTS = 3


@dataclass
class Tally:
    """Counts for the progress line, and what went wrong."""

    total: int
    done: int = 0
    running: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    deaths: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> int:
        return self.total - self.done - len(self.failed) - self.running

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the pace so far; None before the first cell is done."""
        finished = self.done + len(self.failed)
        return None if not finished else (time.monotonic() - self.started) / finished * (self.total - finished)


class CellWorker:
    """A warm process: imports torch and timm once, then computes cells one after the other."""

    def __init__(self) -> None:
        import finetune.run  # noqa: F401  the import is the warming

    def run(self, config_json: str) -> str:
        """Compute one cell; returns the key."""
        import json

        from finetune import run

        config = parse(json.loads(config_json), CellConfig, "cell configuration")
        if config.encoder_dir and config.encoder_sha256:
            config = config.model_copy(update={"encoder_dir": local_encoder(config.encoder_dir, config.encoder_sha256)})
        run.run(config, WorkerContext(rank=0, world_size=1, dir=config.out))
        return config.key


def pool_size(resources: Resources) -> int:
    """Workers that fit into the cluster."""
    import ray

    if resources.cell_workers:
        return resources.cell_workers
    available = ray.cluster_resources()
    fits = available.get("CPU", 1) / resources.threads
    if resources.gpus_per_cell:
        fits = min(fits, available.get("GPU", 0) / resources.gpus_per_cell)
    return max(1, int(fits))


def run_cells(
    configs: Sequence[CellConfig],
    resources: Resources,
    report: Callable[[Tally], None],
    told: Callable[[CellConfig, Exception | None], Sequence[CellConfig]] | None = None,
) -> Tally:
    """Compute the cells; returns when every one is done or has failed, those that were added meanwhile included.

    Args:
        report: called whenever a count changes, and at least every two seconds.
        told: called with each cell that ended, and with its error where it failed; returns cells that became ready by it. They come
            before those that wait, since others may depend on them.
    """
    import ray

    tally = Tally(total=len(configs))
    if not configs:
        return tally
    make = ray.remote(num_cpus=resources.threads, num_gpus=resources.gpus_per_cell)(CellWorker)
    room = pool_size(resources)
    idle: deque[Any] = deque()
    queue = deque((config, 1) for config in configs)
    running: dict[Any, tuple[Any, CellConfig, int]] = {}
    while queue or running:
        while queue and (idle or len(running) < room):
            worker, (config, attempt) = idle.popleft() if idle else make.remote(), queue.popleft()
            running[worker.run.remote(canonical_json(config))] = (worker, config, attempt)
        tally.running = len(running)
        report(tally)
        for reference in ray.wait(list(running), num_returns=1, timeout=2.0)[0]:
            worker, config, attempt = running.pop(reference)
            problem: Exception | None = None
            try:
                ray.get(reference)
                tally.done += 1
            except ray.exceptions.RayTaskError as error:
                problem = error.cause
            except ray.exceptions.RayActorError as error:
                tally.deaths += 1
                worker = None
                if attempt < ATTEMPTS:
                    queue.appendleft((config, attempt + 1))
                    continue
                problem = WorkError(f"its worker died {ATTEMPTS} times ({type(error).__name__})")
            if worker is not None:
                idle.append(worker)
            if problem is not None:
                tally.failed[config.key] = str(problem)
            more = told(config, problem) if told else ()
            tally.total += len(more)
            queue.extendleft((ready, 1) for ready in reversed(more))
    tally.running = 0
    report(tally)
    for worker in idle:
        ray.kill(worker)
    return tally
