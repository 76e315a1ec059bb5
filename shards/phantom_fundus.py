"""Fundus phantom: a colour photograph of the retina with optic disc, fovea, a branching vessel tree and its mask, and exudates.

    phantom = fundus(seed=0, index=7, size=64)     # image_HWC u8 RGB, labels, mask_HW u8 (1 = vessel)

Planted: `texture`, the direction of the fine choroidal pattern (local); `count`, 2 to 3 or 6 to 8 exudates of the same total area;
`arrangement`, exudates in the upper (1) or the lower (0) half of the retina (global). All are kept by mirroring left and right.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from shards.phantom_parts import FEW, MANY, Phantom, blobs, grey_values, grid, place, smooth_field, specify, step, streams, texture

OVERSAMPLE = 4  # vessels are drawn at this multiple of the side and averaged down: thin ones stay smooth
TEXTURE, EXUDATE, NOISE = 0.030, 0.30, 0.012
# rank -> grey inside the field of view, a channel: red is bright, green carries the contrast, blue is nearly dark
RED = [(0.0, 0.35), (0.1, 0.55), (0.5, 0.74), (0.9, 0.86), (1.0, 0.98)]
GREEN = [(0.0, 0.08), (0.1, 0.21), (0.5, 0.36), (0.9, 0.48), (1.0, 0.88)]
BLUE = [(0.0, 0.03), (0.1, 0.08), (0.5, 0.14), (0.9, 0.20), (1.0, 0.55)]


def fundus(seed: int, index: int, size: int) -> Phantom:
    """Image `index` of the series `seed` with side `size` pixels (at least 32): a pure function of the three."""
    s = streams("fundus", seed, index)
    a, p, d = s.anatomy, s.pathology, s.display
    x, y = grid(size)
    nasal = a.choice((-1.0, 1.0))  # left or right eye: the side of the disc
    disc = (nasal * a.uniform(0.42, 0.52), a.uniform(-0.08, 0.08))
    fovea = (disc[0] - nasal * a.uniform(0.50, 0.58), disc[1] + a.uniform(0.0, 0.08))
    view = np.hypot(x, y) < a.uniform(0.92, 0.97)  # the round field of view; outside the image is black

    vessels = _vessels(a, size, disc, nasal)
    radius = a.uniform(0.13, 0.16)
    to_disc = np.hypot((x - disc[0]) * 1.08, y - disc[1])
    head = step(radius - to_disc, size, 1.5)
    cup = np.exp(-((to_disc / (radius * a.uniform(0.4, 0.55))) ** 4))
    macula = np.exp(-((np.hypot(x - fovea[0], y - fovea[1]) / a.uniform(0.16, 0.22)) ** 2))
    shade = -0.16 * (x * x + y * y) + 0.06 * smooth_field(a, size, 3)

    # The zones lie half the image's side apart, a whole number of patches of 8 or 16 pixels at 64: the place within a patch says nothing.
    height = -y if s.labels["arrangement"] else y
    zone = (height > 0.28) & (height < 0.72) & (np.abs(x) < 0.46) & (to_disc > radius + 0.08)
    candidates = np.argwhere(zone)
    candidates = candidates[p.permutation(len(candidates))]
    centres = np.stack([x[0, candidates[:, 1]], y[candidates[:, 0], 0]], axis=1)
    low, high = MANY if s.labels["count"] else FEW
    centres = place(p, centres, int(p.integers(low, high + 1)))
    exudates = EXUDATE * p.uniform(0.85, 1.15) * blobs(p, size, centres, p.uniform(0.10, 0.14))
    pattern = TEXTURE * p.uniform(0.8, 1.2) * texture(p, size, s.labels["texture"]) * (1 - head)

    channels = []
    for knots, of_vessel, of_head, of_macula in ((RED, 0.16, 0.22, 0.10), (GREEN, 0.24, 0.42, 0.13), (BLUE, 0.12, 0.50, 0.05)):
        field = shade + pattern + exudates + of_head * head + 0.5 * of_head * cup - of_macula * macula
        field = field - of_vessel * vessels * (1 - 0.3 * head) + NOISE * d.standard_normal((size, size), dtype=np.float32)
        plane = np.zeros((size, size), np.uint8)
        inside = field[view]
        plane[view] = specify(inside, grey_values(d, inside.size, knots, 0.03))
        channels.append(plane)
    return Phantom(np.stack(channels, axis=2), s.labels, ((vessels > 0.35) & view).astype(np.uint8), s.metadata)


def _vessels(a: np.random.Generator, size: int, disc: tuple[float, float], nasal: float) -> np.ndarray:
    """Coverage of each pixel by vessels, HW, 0..1: four arcades that leave the disc, curve and branch."""
    side = size * OVERSAMPLE
    canvas = np.zeros((side, side), np.uint8)
    unit = side / 2
    noise = a.standard_normal(4096).tolist()
    chance = a.random(4096).tolist()
    used = 0
    # (x, y, heading, bend a step, width, steps left, branchings left); heading 0 looks away from the nose, where the fovea lies
    pending: list[tuple[float, float, float, float, float, int, int]] = []
    for updown in (-1, 1):
        for turn, bend, width, steps in ((1.25, -0.055, 0.050, 34), (2.25, 0.015, 0.036, 16)):  # temporal and nasal arcade
            heading = updown * (turn + 0.15 * a.standard_normal())
            pending.append((disc[0], disc[1], heading, updown * bend * a.uniform(0.8, 1.2), width * a.uniform(0.85, 1.15), steps, 2))
        pending.append((disc[0], disc[1], updown * (0.35 + 0.1 * a.standard_normal()), updown * 0.03, 0.020, 9, 0))  # towards the fovea
    while pending:
        px, py, heading, bend, width, steps, depth = pending.pop()
        points = [(px, py)]
        side_of_last = 1.0
        for k in range(steps):
            heading += bend + 0.09 * noise[used % 4096]
            used += 1
            px -= nasal * 0.045 * math.cos(heading)
            py += 0.045 * math.sin(heading)
            points.append((px, py))
            if depth and k > 2 and chance[used % 4096] < 0.14:
                side_of_last = -side_of_last
                spread = side_of_last * (0.55 + 0.35 * chance[(used + 1) % 4096])
                pending.append((px, py, heading + spread, -0.02 * spread, width * 0.62, int((steps - k) * 0.7) + 3, depth - 1))
            if math.hypot(px, py) > 1.05:
                break
        line = np.array([[(qx + 1) * unit * 8, (qy + 1) * unit * 8] for qx, qy in points]).round().astype(np.int32)
        halves = (line[: len(line) // 2 + 1], line[len(line) // 2 :])
        for part, taper in zip(halves, (1.0, 0.72), strict=True):
            if len(part) > 1:
                cv2.polylines(canvas, [part], False, 255, max(2, round(width * taper * unit)), cv2.LINE_AA, 3)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
