"""Figures phantom: the three labels without anatomy. Measured depths are in docs/benchmarks.md: texture is early, the others are not.

    phantom = figures(seed=0, index=7, size=64)      # image_HW u8, labels, no mask

Six figures of two arcs each on a ground of fine lines. `texture`, the direction of the lines (an area of 8 pixels shows it); `count`, how
many figures are closed, arc facing arc, one or none of six or five or all (a single figure must be seen whole: the arcs are the same in
both kinds); `arrangement`, the figures lie in the upper or the lower half (the frame must be seen). In the chest phantom opacities must be
told from ribs first, which makes `count` its deepest label.
"""

from __future__ import annotations

import numpy as np

from shards.phantom_parts import Phantom, grey_values, grid, smooth_field, specify, streams, texture

GREYS = [(0.0, 0.10), (0.5, 0.45), (0.9, 0.60), (1.0, 0.95)]
FIGURES, RADIUS, STROKE, GAP = 6, 0.07, 0.017, 0.023  # radius of an arc, width of its line, half the gap between arcs: parts of the side
COLUMNS, ROWS, JITTER = (-2 / 3, 0.0, 2 / 3), (0.2, 0.6), 0.06  # places in the lower half, in half sides from the middle
LINES, SLOW, NOISE = 0.125, 0.1, 0.05


def figures(seed: int, index: int, size: int) -> Phantom:
    """Image `index` of the series `seed` with side `size` pixels (at least 32): a pure function of the three."""
    s = streams("figures", seed, index)
    p = s.pathology
    closed = int(p.integers(0, 2)) + (FIGURES - 1 if s.labels["count"] else 0)
    order = p.permutation(FIGURES)
    field = np.zeros((size, size), np.float32)
    for place, (row, column) in enumerate((row, column) for row in ROWS for column in COLUMNS):
        dx, dy = p.uniform(-JITTER, JITTER, 2)
        y = -row if s.labels["arrangement"] else row
        field = np.maximum(field, _figure(size, column + dx, y + dy, p.uniform(0, 2 * np.pi), order[place] < min(closed, FIGURES)))
    field += LINES * texture(p, size, s.labels["texture"]) + SLOW * smooth_field(s.anatomy, size, 4)
    field += NOISE * s.display.standard_normal((size, size), dtype=np.float32)
    return Phantom(specify(field, grey_values(s.display, size * size, GREYS, 0.05)), s.labels, None, s.metadata)


def _figure(size: int, cx: float, cy: float, turn: float, closed: bool) -> np.ndarray:
    """Two arcs of half a circle: facing each other, or back to back; HW, 0..1."""
    x, y = grid(size)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = ((x - cx) * c + (y - cy) * s) / 2, ((y - cy) * c - (x - cx) * s) / 2  # in sides of the image
    out = np.zeros((size, size), np.float32)
    for side in (-1, 1):
        centre = side * (GAP if closed else RADIUS + GAP)
        outside = side * (u - centre) > 0
        line = np.exp(-np.square((np.hypot(u - centre, v) - RADIUS) / STROKE))
        np.maximum(out, line * (outside == closed) * (np.abs(v) < 0.95 * RADIUS), out=out)
    return out
