"""The format of OUT/plan.json: every cell that a study asks for, in its order."""

from typing import Any

from pydantic import RootModel

from base.config import Strict


class PlannedCell(Strict):
    """A cell before it is computed.

    Args:
        key: empty while its data, its encoder or the answer of its search are not there.
        source_seed: of the encoder; of random weights the cell's own.
        options: of the strategy, as the study gives them, with what a search chose.
        asked: the strategy's options as the study gives them, where a search chose some of them.
        lr: rate of the recipe that trains it; None where nothing is trained by steps.
        tuned: whether its rate is searched for.
        searches: keys of the answers, under OUT/analyses.
    """

    key: str
    architecture: str
    source: str
    source_seed: int
    fraction: float
    resolution: int
    seed: int
    shuffle_labels: bool
    own_source: bool
    exposed_to: list[str]
    strategy: str
    options: dict[str, Any]
    task: str
    asked: dict[str, Any]
    lr: float | None
    tuned: bool
    searches: list[str]


class Plan(RootModel[list[PlannedCell]]):
    """The file: a list."""
