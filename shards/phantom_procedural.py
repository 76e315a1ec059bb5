"""The procedural corpus: fractals, chest and fundus phantoms, all in grey; the label is which of the three. No patient, no licence.

    phantom = procedural(seed=0, index=7, size=64)     # image_HW u8, labels {"fractal": 1}

A third of the images each. A fractal is the attractor of a random system of affine maps, as in FractalDB (Kataoka et al. 2020, arXiv
2101.08515), drawn by the chaos game: from a point, apply one of the maps again and again, and count where it lands. What differs from
FractalDB: every image has a system of its own (there, a thousand images a system), maps are scaled to contractions instead of drawn
again where they diverge, and grey is the logarithm of the count rather than a small random patch at each point.
"""

from __future__ import annotations

import cv2
import numpy as np

from base.seeds import rng
from shards.phantom_chest import chest
from shards.phantom_fundus import fundus
from shards.phantom_parts import Phantom

KINDS: tuple[str, ...] = ("fractal", "chest", "fundus")
MAPS = (2, 8)  # of a system, ends included
CONTRACTION = (0.4, 0.9)  # largest singular value of a map
STEPS, UNSEEN = 40, 8  # of a point; the first ones are not yet on the attractor
POINTS_A_PIXEL = 4
FILLED, TRIES = 0.2, 8  # share of the pixels that are not empty after smoothing: thinner systems are drawn again, as in FractalDB


def procedural(seed: int, index: int, size: int) -> Phantom:
    """Image `index` of the series `seed` with side `size` pixels (at least 32): a pure function of the three."""
    kind = KINDS[rng("procedural", seed, index, "kind").integers(len(KINDS))]
    if kind == "fractal":
        image = fractal(rng("procedural", seed, index, "fractal"), size)
    elif kind == "chest":
        image = chest(seed, index, size).image
    else:
        image = cv2.cvtColor(fundus(seed, index, size).image, cv2.COLOR_RGB2GRAY)
    return Phantom(image, {kind: 1}, None, {})


def fractal(draw: np.random.Generator, size: int) -> np.ndarray:
    """The attractor of a random system, u8 HW, grey on black or black on grey."""
    for _ in range(TRIES):
        count_HW = _attractor(draw, size)
        if (count_HW > 0).mean() > FILLED:
            break
    grey_HW = np.log1p(count_HW)
    grey_HW = (grey_HW / grey_HW.max()) ** draw.uniform(0.5, 1.0)
    image = np.rint(255 * grey_HW).astype(np.uint8)
    return 255 - image if draw.integers(2) else image


def _attractor(draw: np.random.Generator, size: int) -> np.ndarray:
    """How often each pixel is visited, HW, smoothed over neighbours."""
    maps = int(draw.integers(MAPS[0], MAPS[1] + 1))
    linear_M22 = draw.uniform(-1, 1, (maps, 2, 2))
    linear_M22 *= (draw.uniform(*CONTRACTION, maps) / np.linalg.norm(linear_M22, 2, axis=(1, 2)))[:, None, None]
    system_6M = np.concatenate([linear_M22.reshape(maps, 4), draw.uniform(-1, 1, (maps, 2))], axis=1).T
    area_M = np.abs(np.linalg.det(linear_M22)) + 0.01  # a map is taken as often as its part of the attractor is large
    chains = POINTS_A_PIXEL * size * size // (STEPS - UNSEEN)
    which_SC = np.searchsorted(np.cumsum(area_M / area_M.sum())[:-1], draw.random((STEPS, chains)), side="right")
    x_C, y_C = np.zeros((2, chains))
    seen = np.empty((STEPS - UNSEEN, 2, chains))
    for step, which_C in enumerate(which_SC):
        a, b, c, d, e, f = system_6M[:, which_C]
        x_C, y_C = a * x_C + b * y_C + e, c * x_C + d * y_C + f
        if step >= UNSEEN:
            seen[step - UNSEEN] = x_C, y_C
    low, high = seen.min(axis=(0, 2), keepdims=True), seen.max(axis=(0, 2), keepdims=True)
    column, row = ((seen - low) / np.maximum(high - low, 1e-9) * (size - 1e-6)).astype(np.int64).transpose(1, 0, 2)
    count_HW = np.bincount((row * size + column).ravel(), minlength=size * size).reshape(size, size).astype(np.float32)
    return cv2.GaussianBlur(count_HW, (3, 3), 0)
