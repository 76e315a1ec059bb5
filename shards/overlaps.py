"""The register of known overlaps between public sets: which of them share images or patients.

    for overlap in known():                      # datasets/overlaps.yaml
        overlap.datasets, overlap.kind, overlap.extent

It needs no image to be looked at, so a plan can use it; it lists what is published, and what it does not list may still overlap.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import Field, model_validator

from base.config import Strict, load
from base.paths import OVERLAPS


class Overlap(Strict):
    """Two public sets, and what of the first is in the second."""

    datasets: tuple[str, str]  # names of cards, or of corpora that have no card here
    kind: Literal["images", "patients"]  # patients: the same people in other pictures
    extent: Literal["all", "part", "unknown"]
    note: str
    source: str

    @model_validator(mode="after")
    def _names_two(self) -> Overlap:
        if self.datasets[0] == self.datasets[1]:
            raise ValueError(f"{self.datasets[0]} overlaps itself")
        return self


class Register(Strict):
    """datasets/overlaps.yaml."""

    schema_: Literal[1] = Field(alias="schema")
    overlaps: list[Overlap]


@cache
def known() -> tuple[Overlap, ...]:
    """Every entry of the register. Raises RequestError for a bad file."""
    return tuple(load(OVERLAPS, Register).overlaps)
