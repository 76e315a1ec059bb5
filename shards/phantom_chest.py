"""Chest phantom: a frontal radiograph with body outline, ribs, collar bones, spine, heart, diaphragm, two lungs and opacities.

    phantom = chest(seed=0, index=7, size=64)      # image_HW u8, labels, mask_HW u8 (1 = lung)

Planted: `texture`, the direction of the fine lung pattern (local); `count`, 2 to 3 or 6 to 8 opacities of the same total area;
`arrangement`, opacities in the upper zones (1) or the lower zones (0) of the lungs (global: their look is the same, only their place
relative to the anatomy differs). All are kept by mirroring left and right.
"""

from __future__ import annotations

import cv2
import numpy as np

from shards.phantom_parts import FEW, MANY, Phantom, blobs, grey_values, grid, place, smooth_field, specify, step, streams, texture

# rank -> grey of a typical radiograph: air around the body, lungs, soft tissue, heart and spine
GREYS = [(0.0, 0.02), (0.10, 0.06), (0.22, 0.22), (0.45, 0.42), (0.65, 0.60), (0.85, 0.78), (1.0, 0.97)]
UPPER, HEIGHT = -0.60, 0.42  # the upper zone of opacities, y from UPPER on; the lower one is its image a quarter of the side below
TEXTURE, OPACITY, NOISE = 0.036, 0.25, 0.018


def chest(seed: int, index: int, size: int) -> Phantom:
    """Image `index` of the series `seed` with side `size` pixels (at least 32): a pure function of the three."""
    s = streams("chest", seed, index)
    a = s.anatomy
    x0, y0 = grid(size)
    turn, scale = a.normal(0, 0.03), a.uniform(0.94, 1.06)
    dx, dy = a.normal(0, 0.03, 2)
    x = ((x0 - dx) * np.cos(turn) - (y0 - dy) * np.sin(turn)).astype(np.float32) / np.float32(scale * a.uniform(0.96, 1.04))
    y = ((x0 - dx) * np.sin(turn) + (y0 - dy) * np.cos(turn)).astype(np.float32) / np.float32(scale)

    side = np.abs(x)
    body = step(0.40 + 0.52 / (1 + np.exp(-(y + 0.80) / 0.07)) - side, size, 1.5)
    heart = _heart(a, x, y, size)
    lung = _lungs(a, x, y, heart, size)

    field = 0.02 + 0.56 * body
    field += 0.10 * body * np.exp(-(((side - 0.9) / 0.12) ** 2))  # the thicker flank
    field -= 0.40 * lung
    field += 0.30 * _mediastinum(a, x, y, heart, size)
    ribs = _ribs(a, x, y, size)
    field += ribs * (0.13 * lung + 0.04 * body)
    field += 0.10 * _collar_bones(a, x, y, size) * body
    field += 0.05 * smooth_field(a, size, 4) * body

    p = s.pathology
    # An opacity shows only where lung lies both there and a quarter of the side above or below it, so every place has a twin in the
    # other zone: same part of a patch of 8 or 16 pixels (of 64), same lung around it. What is left of the label is where, as a whole.
    quarter, upper = size // 4, s.labels["arrangement"] == 1
    both = lung[:-quarter] * lung[quarter:]
    twins = np.concatenate([both, np.zeros_like(lung[:quarter])] if upper else [np.zeros_like(lung[:quarter]), both])
    height = (y if upper else np.roll(y, quarter, axis=0)) - UPPER
    inner = cv2.blur(twins, (size // 12 * 2 + 1,) * 2) * ((height > 0) & (height < HEIGHT))
    candidates = np.argwhere(inner > 0.75 * inner.max())
    candidates = candidates[p.permutation(len(candidates))]
    centres = np.stack([x0[0, candidates[:, 1]], y0[candidates[:, 0], 0]], axis=1)
    low, high = MANY if s.labels["count"] else FEW
    centres = place(p, centres, int(p.integers(low, high + 1)))
    field += OPACITY * p.uniform(0.85, 1.15) * blobs(p, size, centres, p.uniform(0.16, 0.21)) * twins
    field += TEXTURE * p.uniform(0.8, 1.2) * texture(p, size, s.labels["texture"]) * (lung + 0.1 * body)

    field += NOISE * s.display.standard_normal((size, size), dtype=np.float32)
    image = specify(field, grey_values(s.display, size * size, GREYS, 0.05))
    return Phantom(image, s.labels, (lung > 0.5).astype(np.uint8), s.metadata)


def _lungs(a: np.random.Generator, x: np.ndarray, y: np.ndarray, heart: np.ndarray, size: int) -> np.ndarray:
    """Both lungs, 0..1."""
    lung = np.zeros_like(x)
    width, top = a.uniform(0.29, 0.33), a.uniform(-0.76, -0.70)
    for sign in (-1, 1):
        floor = a.uniform(0.52, 0.58) + (0.05 if sign > 0 else 0.0)  # the liver lifts one side (left in the image)
        t = np.clip((y - top) / (floor - top), 0, 1.3)
        half = width * (0.45 + 0.55 * np.sqrt(np.clip(t, 0, 1)))
        centre = sign * (0.30 + 0.16 * np.clip(t, 0, 1))
        u = (sign * (x - centre)) / half
        apex = step((1 - u * u) - np.clip((0.22 - t) / 0.22, 0, None) ** 2, size, 5)
        dome = floor - 0.10 * (1 - u * u) + 0.10 * np.clip(u, 0, 1.2) ** 3
        lung = np.maximum(lung, apex * step(dome - y, size, 1.5))
    return lung * (1 - heart)


def _heart(a: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    wide = a.uniform(0.27, 0.35)
    cx = a.uniform(0.10, 0.15)
    turn = 0.5
    u = ((x - cx) * np.cos(turn) + (y - 0.30) * np.sin(turn)) / wide
    v = ((y - 0.30) * np.cos(turn) - (x - cx) * np.sin(turn)) / (wide * 0.78)
    return step((1 - np.sqrt(u * u + v * v)) * wide, size, 2.0)


def _mediastinum(a: np.random.Generator, x: np.ndarray, y: np.ndarray, heart: np.ndarray, size: int) -> np.ndarray:
    """Spine with its vertebrae, great vessels, heart and what lies under the diaphragm, about 0..1.5."""
    spine = np.exp(-((x / 0.10) ** 4)) * (0.42 + 0.12 * np.cos(2 * np.pi * (y / a.uniform(0.15, 0.18) + a.uniform())))
    vessels = step(a.uniform(0.15, 0.19) + 0.10 * np.clip(y, 0, 1) - np.abs(x - 0.02), size, 2) * step(y + 0.62, size, 6) * 0.5
    hila = sum(np.exp(-(((x - sign * 0.24) / 0.10) ** 2) - ((y + 0.05) / 0.14) ** 2) for sign in (-1, 1)) * a.uniform(0.3, 0.6)
    below = step(y - 0.66, size, 8) * step(0.9 - np.abs(x), size, 4) * 0.5
    return spine + vessels + hila + below + 0.42 * heart


def _ribs(a: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Posterior arcs that fall outwards and fainter anterior arcs that fall inwards, 0..1."""
    side = np.abs(x)
    spacing, phase = a.uniform(0.19, 0.23), a.uniform()
    back = y - a.uniform(0.35, 0.5) * np.clip(side - 0.05, 0, None) ** 1.6 + 0.10 * np.cos(side * 2.2)
    front = y + a.uniform(0.55, 0.75) * (side - 0.25)
    shape = np.clip(1.5 * np.cos(2 * np.pi * (back / spacing + phase)) - 0.45, 0, 1)
    faint = np.clip(1.5 * np.cos(2 * np.pi * (front / (spacing * 1.25) + phase)) - 0.75, 0, 1)
    cage = step(0.86 - side, size, 3) * step(side - 0.07, size, 2) * step(0.75 - y, size, 6) * step(y + 0.85, size, 4)
    return (shape + 0.35 * faint) * cage


def _collar_bones(a: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    side = np.abs(x)
    line = y + a.uniform(0.58, 0.64) + 0.24 * side + 0.05 * np.sin(side * 7)
    return np.exp(-((line / 0.035) ** 2)) * step(side - 0.08, size, 2) * step(0.72 - side, size, 3)
