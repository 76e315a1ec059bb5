"""The formats of the two JSON files of a checkpoint: `state.json`, and `COMMIT`, which is written last.

state = read_state(url); state.loader.next_step; commit = read_commit(url)       # url: the folder step-00000120
"""

import json
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from base import storage
from base.config import Number, Strict, parse
from base.errors import RequestError

STATE = "state.json"
M = TypeVar("M", bound=Strict)


class Position(Strict):
    """Where the loader goes on: the step whose batch is the next."""

    next_step: int
    global_batch: int
    seed: int


class RunState(Strict):
    """What a run says of itself beside its tensors.

    Args:
        key: of the run; version: of what computes it.
        optimizer_values: of the optimiser what is no tensor, as `<slot>|<parameter name>`.
        plateau: best loss (infinite before the first), epochs since, factor of the rate.
        score: the higher the better; null is never best. sound: whether a run that went wrong may be taken back to here.
        seconds: of training up to here. configuration: of the run, resolved.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    key: str
    version: str
    epoch: float
    total_steps: int
    loader: Position
    optimizer_values: dict[str, int | float | None]
    plateau: tuple[Number, float, float]
    score: float | None
    sound: bool
    seconds: float
    restarts: int
    configuration: dict[str, Any]


class State(RunState):
    """state.json: that, at a step, by so many ranks."""

    schema_: Literal[1] = Field(1, alias="schema")
    step: int
    world_size: int


class Commit(Strict):
    """COMMIT: what the checkpoint's files must hash to, and what decides whether it is kept."""

    schema_: Literal[1] = Field(1, alias="schema")
    step: int
    sha256: dict[str, str]
    score: float | None
    sound: bool


def read_state(place: str, named: str | None = None) -> State:
    """Of the checkpoint in that folder, `named` where a user sees it. Raises RequestError: damaged, or another version wrote it."""
    return _parsed(storage.read_bytes(storage.join(place, STATE)), State, storage.join(named or place, STATE))


def read_commit(place: str) -> Commit | None:
    """Of the checkpoint in that folder, None where it was not committed. Raises as `read_state`."""
    where = storage.join(place, storage.COMMIT)
    raw = storage.read_or_none(where)
    return None if raw is None else _parsed(raw, Commit, where)


def _parsed(raw: bytes, model: type[M], where: str) -> M:
    try:
        held = json.loads(raw)
    except ValueError as error:
        raise RequestError("not JSON", where=where) from error
    try:
        return parse(held, model, where)
    except RequestError as error:
        raise RequestError(error.what, where=error.where, hint="another version wrote it: give another out") from error
