"""Procedural, medical-like images with planted labels: what demo, tests and benchmarks run on where no real data stands.

    phantom = GENERATORS["chest"](seed=0, index=7, size=64)      # Phantom(image, labels, mask, metadata)
    series = parse_raw("phantom:3000@1/48")                      # Series(images=3000, seed=1, size=48)

Chest and fundus have three labels, each 1 in half of the images and independent of one another: `texture` (local), `count`,
`arrangement` (global). None can be read from grey values alone: see `shards.phantom_parts.specify`. Scales have the same labels without
anatomy, each at a scale of its own. The procedural corpus mixes chest and fundus with fractals, to pretrain on: see
`shards.phantom_procedural`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from base.errors import RequestError
from shards.phantom_chest import chest
from shards.phantom_fundus import fundus
from shards.phantom_parts import LABELS, PHANTOM_VERSION, Phantom, patient_of
from shards.phantom_procedural import procedural
from shards.phantom_scales import scales

__all__ = [
    "GENERATORS",
    "LABELS",
    "PHANTOM_VERSION",
    "Phantom",
    "Series",
    "chest",
    "fundus",
    "parse_raw",
    "patient_of",
    "procedural",
    "scales",
]

GENERATORS: dict[str, Callable[[int, int, int], Phantom]] = {
    "chest": chest,
    "fundus": fundus,
    "procedural": procedural,
    "scales": scales,
}
_RAW = re.compile(r"phantom:(\d+)(?:@(\d+))?(?:/(\d+))?")


class Series(NamedTuple):
    """`images` of the series `seed`; `size` overrides the card's side in pixels."""

    images: int
    seed: int
    size: int | None


def parse_raw(raw: str) -> Series:
    """`phantom:N`, `phantom:N@SEED` or `phantom:N@SEED/SIZE`. Raises RequestError for anything else."""
    match = _RAW.fullmatch(raw)
    if match is None:
        raise RequestError(f"'{raw}' is not a series of phantoms", where="raw", hint="write phantom:3000 or phantom:3000@SEED")
    count, seed, size = (None if group is None else int(group) for group in match.groups())
    if not count:
        raise RequestError("no images asked for", where=raw, hint="write phantom:3000")
    if size is not None and not 32 <= size <= 1024:
        raise RequestError(f"side {size} is not within 32 to 1024 pixels", where=raw)
    return Series(count, seed or 0, size)
