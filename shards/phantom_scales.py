"""Scales phantom: each label is a relation at a scale of its own, and is nowhere in what is smaller. Made to plant depths with.

    phantom = scales(seed=0, index=7, size=128)      # image_HW u8, labels, no mask

`texture`: fine lines run along one axis or the other, 4 pixels apart. `count`: the dots of six pairs lie a seventh of the side apart, and
few pairs (0 or 2) or many (4 or 6) are of two dots alike; always six dots are bright and six dark, so that what sees less than a pair sees
nothing. `arrangement`: on a board of nine marks, two fifths of the side apart, rows take turns in being bright and dark, or columns do;
every mark is bright in half of the images whatever the label, so that what sees less than two neighbours sees nothing.

In one image of twenty each label says the opposite of what is shown, as readers do: no network reaches 1, and the error of a score that is
near the best possible does not vanish.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shards.phantom_parts import Phantom, grey_values, grid, smooth_field, specify, streams, texture

GREYS = [(0.0, 0.05), (0.1, 0.35), (0.9, 0.65), (1.0, 0.95)]
CELLS, PAIRS, APART = 4, 6, 0.14  # cells a side; distance of the dots of a pair, in sides
BOARD, STEP = 3, 0.38  # marks a side; distance of neighbours, in sides
DOT, MARK, JITTER = 0.016, 0.03, 0.01  # standard deviations of a dot and of a mark's core; how far a thing strays: in sides
LINES, SLOW, NOISE = 0.14, 0.06, 0.05
MISREAD = 0.05


class Plan(NamedTuple):
    """What an image shows. dots_N3, two of a pair after each other, and marks_N3: x, y, in sides from 0 to 1, and 1 (bright) or -1."""

    dots: np.ndarray
    marks: np.ndarray


def plan(draw: np.random.Generator, many: bool, columns: bool) -> Plan:
    """Places and signs of an image in which many pairs are alike, and columns of marks take turns, not rows."""
    first = int(draw.choice([-1, 1]))
    board = [(column, row) for row in range(BOARD) for column in range(BOARD)]
    marks = np.array([(*_at(column, row), first * (-1) ** (column if columns else row)) for column, row in board])
    marks[:, :2] += draw.uniform(-JITTER, JITTER, (len(marks), 2))

    colour = int(draw.integers(2))  # of a chequered board, whose corners stay free
    inner = [(i, j) for i in range(CELLS) for j in range(CELLS) if (i + j) % 2 == colour and not {i, j} <= {0, CELLS - 1}]
    alike = int(draw.choice([4, 6] if many else [0, 2]))
    signs = np.array([(1, 1)] * (alike // 2) + [(-1, -1)] * (alike // 2) + [(1, -1)] * (PAIRS - alike))
    dots = []
    for (i, j), pair in zip(inner, signs[draw.permutation(PAIRS)], strict=True):
        across = int(draw.integers(2))  # or down: a dot of a slanting pair could be nearer to the next pair than to its own
        for sign, side in zip(pair, (-APART / 2, APART / 2), strict=True):
            dots.append(((i + 0.5) / CELLS + side * across, (j + 0.5) / CELLS + side * (1 - across), sign))
    found = np.array(dots)
    found[:, :2] += draw.uniform(-JITTER, JITTER, (PAIRS, 2)).repeat(2, axis=0)
    return Plan(found, marks)


def _at(column: int, row: int) -> tuple[float, float]:
    """Of a mark of the board."""
    middle = (BOARD - 1) / 2
    return 0.5 + STEP * (column - middle), 0.5 + STEP * (row - middle)


def scales(seed: int, index: int, size: int) -> Phantom:
    """Image `index` of the series `seed` with side `size` pixels (at least 32): a pure function of the three."""
    s = streams("scales", seed, index)
    p = s.pathology
    shown = {name: bit ^ int(p.random() < MISREAD) for name, bit in s.labels.items()}
    things = plan(p, shown["count"] == 1, shown["arrangement"] == 1)
    field = LINES * texture(p, size, shown["texture"]) + SLOW * smooth_field(s.anatomy, size, 4)
    for x, y, sign in things.dots:
        field += sign * _spot(size, x, y, DOT)
    for x, y, sign in things.marks:
        field += sign * (2 * _spot(size, x, y, MARK) - _spot(size, x, y, MARK * np.sqrt(2)))  # bright within dark, as much of both
    field += NOISE * s.display.standard_normal((size, size), dtype=np.float32)
    return Phantom(specify(field, grey_values(s.display, size * size, GREYS, 0.05)), s.labels, None, s.metadata)


def _spot(size: int, x: float, y: float, spread: float) -> np.ndarray:
    """A round Gaussian of peak 1, HW."""
    x_HW, y_HW = grid(size)
    return np.exp(-(np.square(x_HW - np.float32(2 * x - 1)) + np.square(y_HW - np.float32(2 * y - 1))) / np.float32(8 * spread**2))
