"""The warm workers of the fan-out on Ray: processes that import torch once, placed within what the cluster has, several to a GPU.

    pool = Pool(resources)
    pool.provide(wanted=40, needs=0, size=pool.size({}))
    team = pool.choose(needs=0)
    pool.give(team, config_json, needs=0)
    for event in pool.events(timeout_s=1.0): ...        # a team has started, has computed its cell, or is lost

A team is what computes one cell: one process, or `cell_ranks` of them on one node that meet in torch.distributed. A place is what Ray
gives at once: room for one team, or, with `gpus_per_cell: measured`, a whole GPU, on which teams are added as memory allows.
"""

import errno
import os
import queue
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from base.config import parse
from base.errors import AllograftError, WorkError
from cluster.context import WorkerContext
from cluster.study import Resources
from finetune.cell import CellConfig

MOST = 8  # teams on one GPU: more of them share its time without using it better
CONTEXT_BYTES = 700 * 2**20  # of a process's CUDA context and libraries, which its allocator does not count
FULL = 0.92  # of a GPU's memory: allocators leave holes
EPSILON = 1e-9
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.EREMOTEIO, errno.EIO)


class Room(NamedTuple):
    """Where a worker is. gpu_bytes: of its GPU's memory, 0 without one."""

    node: str
    gpu_bytes: int


class Spent(NamedTuple):
    """What a cell took. gpu_bytes: of GPU memory at its peak, the process's own included; images: seen in training."""

    gpu_bytes: int
    images: int
    seconds: float


class StorageDown(WorkError):
    """Storage let a cell down, which is no fault of the cell: it may be tried again."""


class CellWorker:
    """A warm process: imports torch and timm once, then computes cells one after the other."""

    def __init__(self) -> None:
        import finetune.run  # noqa: F401  the import is the warming

    def meeting(self) -> tuple[str, int]:
        """Where the ranks of a team meet: this node's address and a port that is free."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), int(free.getsockname()[1])

    def start(self, rank: int, world: int, meeting: tuple[str, int] | None) -> Room:
        """Join the team; returns where it is."""
        import ray
        import torch

        self.rank, self.world = rank, world
        if meeting is not None:
            where = {"MASTER_ADDR": meeting[0], "MASTER_PORT": str(meeting[1]), "WORLD_SIZE": str(world), "RANK": str(rank)}
            os.environ.update(where | {"LOCAL_RANK": "0" if torch.cuda.is_available() else str(rank)})  # Ray shows each process its own GPU
            from engine import ranks

            ranks.start()
        total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        return Room(ray.get_runtime_context().get_node_id(), total)

    def run(self, config_json: str) -> Spent:
        """Compute one cell, or this rank's part of it.

        Raises:
            StorageDown: storage did not answer, or has no space left.
        """
        import json

        import torch

        from finetune import run

        config = parse(json.loads(config_json), CellConfig, "cell configuration")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run.run(config, WorkerContext(rank=self.rank, world_size=self.world, dir=config.out))
        except Exception as error:
            with suppress(RuntimeError):  # where CUDA broke this does, too, and the first error is the one to tell
                _peak_bytes()
            if isinstance(error, AllograftError | OSError) and of_storage(error):
                raise StorageDown(str(error)) from None
            raise
        return Spent(_peak_bytes(), result["train_images"] * result["selection"]["epochs"], result["seconds"])


def _peak_bytes() -> int:
    """GPU memory that the cell took at its peak; what its allocator holds goes back to those beside it."""
    import torch

    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    return peak + CONTEXT_BYTES


def of_storage(error: BaseException) -> bool:
    """Whether an error comes from a store that did not answer, or from a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.partition(".")[0] in ("botocore", "aiohttp"):
            return True
        if isinstance(cause, OSError) and (isinstance(cause, TimeoutError | ConnectionError) or cause.errno in STORAGE):
            return True
        cause = cause.__cause__
    return False


def of_cuda(error: BaseException) -> bool:
    """Whether a process can no longer use its GPU: after an error of CUDA that is no lack of memory, all that it asks of it fails."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("CUDA error", "cuDNN error", "CUDNN_STATUS"))


def why(error: BaseException) -> tuple[str, bool]:
    """Why a worker died, in words, and whether its cell may have been the reason."""
    text = str(error)
    if "node has died" in text or "preempted" in text:
        return "its node died", False
    if type(error).__name__ == "ActorUnavailableError":
        return "its worker could not be reached", False
    if "low on memory" in text:
        return "its worker was killed, since its node ran out of memory", True
    if getattr(error, "actor_init_failed", False):
        return f"its worker could not start: {text.strip().splitlines()[-1]}", True
    _, _, detail = text.partition("Worker exit detail:")
    return f"its worker died ({(detail or type(error).__name__).partition('Some common causes')[0].strip()})", True


# -- sizes


def alive() -> list[dict[str, float]]:
    """Resources of the nodes that are there."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def fitting(nodes: Sequence[Mapping[str, float]], resources: Resources, reserved: Mapping[str, float]) -> int:
    """Places that these nodes have room for, whoever holds it; while others hold everything back, none. At least one where nothing is held
    back: a cluster that grows on demand grows by who waits.

    Args:
        reserved: what running or waiting pretrainings hold back, {"CPU": ..., "GPU": ...}.
    """
    needs = of_place(resources, nodes)
    whole = {name: sum(bundle.get(name, 0.0) for bundle in needs) for name in ("CPU", "GPU")}
    fits = sum(_on_node(node, needs[0], len(needs)) for node in nodes)
    for name, need in whole.items():
        if need and reserved.get(name):
            fits = min(fits, int((sum(node.get(name, 0.0) for node in nodes) - reserved[name]) / need + EPSILON))
    if resources.cell_workers:
        fits = min(fits, resources.cell_workers) if any(reserved.values()) else resources.cell_workers
    return max(0 if any(reserved.values()) else 1, fits)


def of_place(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What a place asks Ray for: a bundle for each process of a team, or one for all teams of a GPU."""
    if resources.gpus_per_cell == "measured":
        return [{"CPU": float(resources.threads * teams_on_gpu(resources, nodes)), "GPU": 1.0}]
    bundle = {"CPU": float(resources.threads)}
    if resources.gpus_per_cell:
        bundle["GPU"] = resources.gpus_per_cell
    return [dict(bundle) for _ in range(resources.cell_ranks)]


def teams_on_gpu(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many teams a GPU's share of its node's processors can feed, on the node where they are fewest."""
    shares = [node.get("CPU", 0.0) / node["GPU"] / resources.threads for node in nodes if node.get("GPU")]
    return max(1, min(MOST, *(int(share + EPSILON) for share in shares))) if shares else 1


def _on_node(node: Mapping[str, float], bundle: Mapping[str, float], count: int) -> int:
    """Places on a node: all bundles of one lie on it, and a share of a GPU lies on one GPU."""
    fits = node.get("CPU", 0.0) / bundle["CPU"]
    if gpus := bundle.get("GPU"):
        whole = int(node.get("GPU", 0.0))
        fits = min(fits, whole * int(1 / gpus + EPSILON) if gpus <= 1 else whole / gpus)
    return int(fits / count + EPSILON)


# -- workers


@dataclass(eq=False)
class Place:
    """What Ray gave at once. most: teams that it has room for."""

    group: Any
    most: int = 1
    teams: list["Team"] = field(default_factory=list)
    gpu_bytes: int | None = None  # None: no worker has started here yet


@dataclass(eq=False)
class Team:
    """The processes of one cell at a time. needs: bytes of GPU memory that its cell takes; None: it has none, or is starting."""

    place: Place
    actors: list[Any]
    started: bool = False
    needs: float | None = None
    asked: list[Any] = field(default_factory=list)  # references, held until they are answered
    answers: list[Any] = field(default_factory=list)


class Event(NamedTuple):
    """What became of a team. lost: it is gone, and why; guilty: its cell may be the reason."""

    team: Team
    started: bool = False
    spent: Spent | None = None
    error: BaseException | None = None
    lost: str | None = None
    guilty: bool = False


class Pool:
    """Places and their teams. Everything is asked of it from one thread."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.measured = resources.gpus_per_cell == "measured"
        self.places: list[Place] = []
        self.idle: list[Team] = []
        self._nodes: list[dict[str, float]] = []
        self._told: queue.SimpleQueue[tuple[Team, Any]] = queue.SimpleQueue()

    def size(self, reserved: Mapping[str, float]) -> int:
        """Places that the cluster has room for now, see `fitting`."""
        self._nodes = alive()
        return fitting(self._nodes, self.resources, reserved)

    @property
    def starting(self) -> int:
        """Teams that are not up yet."""
        return sum(not team.started for place in self.places for team in place.teams)

    def shrink(self, size: int) -> None:
        """Give back places beyond `size` that rest."""
        resting = [place for place in self.places if all(team in self.idle for team in place.teams)]
        for held in resting[: max(0, len(self.places) - size)]:
            self._leave(held)

    def provide(self, wanted: int, needs: float, size: int) -> None:
        """See that so many more teams come, as far as room and `size` places go.

        needs: bytes of GPU memory that the next cell takes.
        """
        for _ in range(wanted - self.starting):
            place = next((place for place in self.places if self._room_for_team(place, needs)), None)
            if place is None and len(self.places) < size:
                place = self._place()
            if place is None:
                return
            self._team(place)

    def choose(self, needs: float) -> Team | None:
        """An idle team with room for a cell, on the emptiest GPU."""
        fit = [team for team in self.idle if self._fits(team.place, needs)]
        return min(fit, key=lambda team: self._used(team.place)) if fit else None

    def give(self, team: Team, config_json: str, needs: float) -> None:
        """Have a team compute a cell."""
        self.idle.remove(team)
        team.needs = needs
        self._ask(team, [actor.run.remote(config_json) for actor in team.actors])

    def beside(self, team: Team) -> int:
        """Cells that run on the same GPU."""
        return sum(other.needs is not None for other in team.place.teams if other is not team)

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What happened; waits for something at most that long."""
        try:
            team, future = self._told.get(timeout=timeout_s)
            while True:
                event = self._heard(team, future)
                if event is not None:
                    yield event
                team, future = self._told.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        """End all workers."""
        for place in list(self.places):
            self._leave(place)

    # -- places

    def _place(self) -> Place:
        from ray.util import placement_group

        most = teams_on_gpu(self.resources, self._nodes) if self.measured else 1
        place = Place(placement_group(of_place(self.resources, self._nodes), strategy="STRICT_PACK"), most)
        self.places.append(place)
        return place

    def _leave(self, place: Place) -> None:
        from ray.util import remove_placement_group

        self.places.remove(place)
        self.idle = [team for team in self.idle if team.place is not place]
        place.teams.clear()  # what they still answer is not listened to
        remove_placement_group(place.group)

    def _used(self, place: Place) -> float:
        return sum(team.needs or 0.0 for team in place.teams)

    def _fits(self, place: Place, needs: float, coming: int = 0) -> bool:
        """Whether the memory of a place's GPU holds one more cell that needs so much, beside others that start."""
        if not self.measured or not (coming or any(team.needs is not None for team in place.teams)):
            return True
        return place.gpu_bytes is not None and self._used(place) + (1 + coming) * needs <= FULL * place.gpu_bytes

    def _room_for_team(self, place: Place, needs: float) -> bool:
        if place.gpu_bytes is None or len(place.teams) >= place.most:
            return False
        coming = sum(team.needs is None for team in place.teams)
        return self._fits(place, needs, coming)

    # -- teams

    def _team(self, place: Place) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        make, world = ray.remote(CellWorker), self.resources.cell_ranks
        gpus = 1 / place.most if self.resources.gpus_per_cell == "measured" else self.resources.gpus_per_cell
        actors = []
        for rank in range(world):
            there = PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=rank)
            actors.append(make.options(num_cpus=self.resources.threads, num_gpus=gpus, scheduling_strategy=there).remote())
        team = Team(place, actors)
        place.teams.append(team)
        meeting = actors[0].meeting.remote() if world > 1 else None
        self._ask(team, [actor.start.remote(rank, world, meeting) for rank, actor in enumerate(actors)])

    def _ask(self, team: Team, references: list[Any]) -> None:
        team.asked, team.answers = references, []
        for reference in references:
            reference.future().add_done_callback(lambda future: self._told.put((team, future)))

    def _heard(self, team: Team, future: Any) -> Event | None:
        """An answer of one process; an event once the team is through, or broken."""
        if team not in team.place.teams:
            return None
        error = future.exception()
        if error is not None:
            return self._broken(team, error)
        team.answers.append(future.result())
        if len(team.answers) < len(team.actors):
            return None
        self.idle.append(team)
        if not team.started:
            team.started, team.place.gpu_bytes = True, team.answers[0].gpu_bytes
            return Event(team, started=True)
        team.needs = None
        return Event(team, spent=max(team.answers))

    def _broken(self, team: Team, error: BaseException) -> Event:
        import ray

        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) and team.started else None
        alone = len(team.actors) == 1
        context_broke = cause is not None and of_cuda(cause)
        if cause is not None and alone and not context_broke:
            self.idle.append(team)
            team.needs = None
            return Event(team, error=cause)
        # Other ranks may wait for this one for ever, so a team ends as a whole; and each next cell would fail on a broken GPU context.
        team.place.teams.remove(team)
        for actor in team.actors:
            ray.kill(actor)
        if not team.place.teams:
            self._leave(team.place)
        if isinstance(cause, AllograftError):
            return Event(team, error=cause)
        if context_broke:
            return Event(team, lost=f"its worker can no longer use its GPU ({str(cause).strip().splitlines()[0][:200]})", guilty=True)
        if cause is not None:  # what a rank says when another has gone; that one's own answer may come later
            return Event(team, lost=f"its ranks lost one another ({type(cause).__name__}: {str(cause)[:200]})", guilty=True)
        words, guilty = why(error)
        return Event(team, lost=words, guilty=guilty)
