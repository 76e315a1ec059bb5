"""Drafted cards say OPEN where only a person can decide; nothing is packed by a card that still does.

refuse_open(load_card("draft.yaml"))      # RequestError lists the keys
"""

from collections.abc import Mapping

from base.errors import RequestError
from shards.card import Card

OPEN = "OPEN:"


def open_points(card: Card) -> list[str]:
    """Keys whose value still says OPEN, dotted."""
    found: list[str] = []

    def look(value: object, key: str) -> None:
        if isinstance(value, str) and OPEN in value:
            found.append(key)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                look(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list | tuple):
            for number, inner in enumerate(value):
                look(inner, f"{key}.{number}")

    look(card.model_dump(mode="json", by_alias=True), "")
    return found


def refuse_open(card: Card) -> None:
    """Raises RequestError for a draft that nobody has finished."""
    points = open_points(card)
    if points:
        hint = "replace what says OPEN in the card"
        raise RequestError(f"{len(points)} open points: {', '.join(points)}", where=f"card {card.dataset}", hint=hint)
