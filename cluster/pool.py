"""The warm workers of the fan-out on Ray: placed within what the cluster has, several to a GPU, in teams that each compute one cell.

    pool = Pool(resources)
    pool.provide(wanted=40, needs=0, size=pool.size({}))
    team = pool.choose(needs=0)
    pool.give(team, config_json, needs=0)
    for event in pool.events(timeout_s=1.0): ...        # a team has started, has computed its cell, or is lost

A team is what computes one cell: one process, or `cell_ranks` of them on one node that meet in torch.distributed. A place is what Ray
gives at once: room for one team, or, with `gpus_per_cell: measured`, a whole GPU, on which teams are added as memory allows.
"""

import queue
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from base.errors import AllograftError
from cluster.places import alive, fitting, of_place, teams_on_gpu
from cluster.study import Resources
from cluster.worker import CellWorker, Spent, of_cuda

FULL = 0.92  # of a GPU's memory: allocators leave holes


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
        gpus = 1 / place.most if self.measured else self.resources.gpus_per_cell
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
