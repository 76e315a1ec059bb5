"""Analyses that stand in OUT: figures and tables that were computed from saved encoders and finished cells, for the report to show.

    for found in standing(out): found.kind, found.figures, storage.join(found.url, "layers.svg")

Each is a folder OUT/analyses/<kind>-<key>/ whose analysis.json is written last, beside its tables (.csv) and figures (.svg and .png). Of a
kind the newest counts: a study that grew has older ones, of fewer cells.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, ValidationError

from analysis import results
from base import storage
from base.config import Strict

FILE = "analysis.json"
Kind = Literal["similarity", "filters", "convergence", "efficiency", "transferability", "accuracy"]
KINDS: tuple[str, ...] = get_args(Kind)


class Drawn(Strict):
    """A figure: `file`.svg and `file`.png; text: what it shows, in words, for who does not see it."""

    file: str
    title: str
    text: str


class Listed(Strict):
    """A table: `file` with its extension. shown: its main columns as text, for the page; the file has all."""

    file: str
    title: str
    heads: list[str] = Field(default=[])
    rows: list[list[str]] = Field(default=[])


class Analysis(Strict):
    """analysis.json. cells: how many were looked at. notes: what a reader must know, such as what was left out and why."""

    schema_: Literal[1] = Field(1, alias="schema")
    kind: Kind
    key: str
    made: str
    revision: str
    cells: int
    settings: dict[str, str | int | float] = Field(default={})
    figures: list[Drawn] = Field(default=[])
    tables: list[Listed] = Field(default=[])
    notes: list[str] = Field(default=[])


@dataclass(frozen=True)
class Standing:
    """An analysis and the address of its folder."""

    url: str
    analysis: Analysis


def folder(out: str, kind: str, key: str) -> str:
    """Where an analysis stands, or will."""
    return storage.join(out, "analyses", f"{kind}-{key}")


def standing(out: str) -> list[Standing]:
    """The newest of each kind, in the order of KINDS. What another version wrote is left out: it is computed again."""
    newest: dict[str, Standing] = {}
    for name in storage.listing(storage.join(out, "analyses")):
        if name.partition("-")[0] not in KINDS:
            continue
        url = storage.join(out, "analyses", name)
        try:
            held = Analysis.model_validate(results.read_json(storage.join(url, FILE)))
        except ValidationError:  # not finished, or of another version
            continue
        known = newest.get(held.kind)
        if known is None or (known.analysis.made, known.analysis.key) < (held.made, held.key):
            newest[held.kind] = Standing(url, held)
    return [newest[kind] for kind in KINDS if kind in newest]
