"""Turned, bent and gamma-corrected views, for fine-tuning: what is done to a view after it was cropped and mirrored.

    image_HWC, seg_HW = apply(image_HWC, seg_HW, Warp(angle=5.0, bend="elastic", seed=7, exponent=1.2))

All of a warp's geometry is one map from the pixels of the view to places in it, so pixels are interpolated once; the mask moves along by
nearest neighbour. Fields are drawn on coarse grids and are smooth between their points, and strengths are shares of the side, so that a
view bends alike at any resolution.
"""

import math
from typing import Literal, NamedTuple

import cv2
import numpy as np

Bend = Literal["elastic", "grid", "optical"]
BENDS: tuple[Bend, ...] = ("elastic", "grid", "optical")
ELASTIC_POINTS, ELASTIC_STD = 8, 0.015  # points a side of the field; standard deviation of a displacement, share of the side
GRID_CELLS, GRID_LIMIT = 5, 0.3  # cells a side, each scaled by a factor of 1 +- limit
OPTICAL_LIMIT = 0.2  # of k in radius x (1 + k radius^2), barrel to cushion


class Warp(NamedTuple):
    """angle: degrees, counter-clockwise. bend: how the view is distorted, by fields that are drawn from `seed`. exponent: of grey levels
    between 0 and 1."""

    angle: float = 0.0
    bend: Bend | None = None
    seed: int = 0
    exponent: float = 1.0


def apply(image_HWC: np.ndarray, seg_HW: np.ndarray | None, warp: Warp) -> tuple[np.ndarray, np.ndarray | None]:
    """Image u8 and mask u8 of one size, warped. What comes in from outside is black and, in the mask, 0 where the view is turned; where it
    is only bent the border is mirrored."""
    if warp.exponent != 1:
        table = np.rint(255 * (np.arange(256) / 255) ** warp.exponent).astype(np.uint8)
        image_HWC = cv2.LUT(image_HWC, table).reshape(image_HWC.shape)
    if not warp.angle and warp.bend is None:
        return image_HWC, seg_HW
    x_HW, y_HW = places(warp, *image_HWC.shape[:2])
    border = cv2.BORDER_CONSTANT if warp.angle else cv2.BORDER_REFLECT_101
    # Channel by channel: how OpenCV rounds hangs on how many it moves at once.
    planes = [cv2.remap(plane_HW, x_HW, y_HW, cv2.INTER_LINEAR, borderMode=border) for plane_HW in cv2.split(image_HWC)]
    moved = np.stack(planes, axis=2)
    return moved, None if seg_HW is None else cv2.remap(seg_HW, x_HW, y_HW, cv2.INTER_NEAREST, borderMode=border)


def places(warp: Warp, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the warped view is taken from: x and y, float32 HW, in pixels."""
    # Coordinates of pixel centres from -1 to 1 at the edges; the third axis holds x and y.
    at_HW2 = np.stack(np.meshgrid(_centres(width), _centres(height)), axis=2)
    draw = np.random.default_rng(warp.seed)
    if warp.bend == "elastic":
        field = draw.normal(0, 2 * ELASTIC_STD, (ELASTIC_POINTS, ELASTIC_POINTS, 2))  # 2: the side's length in these coordinates
        at_HW2 = at_HW2 + cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)
    if warp.bend == "grid":
        ends = np.linspace(-1, 1, GRID_CELLS + 1)
        for axis in (0, 1):
            steps = draw.uniform(1 - GRID_LIMIT, 1 + GRID_LIMIT, GRID_CELLS)
            moved = np.concatenate([[0], np.cumsum(steps)]) / steps.sum() * 2 - 1
            at_HW2[:, :, axis] = np.interp(at_HW2[:, :, axis], ends, moved)
    if warp.bend == "optical":
        k = draw.uniform(-OPTICAL_LIMIT, OPTICAL_LIMIT)
        at_HW2 = at_HW2 * (1 + k * np.square(at_HW2).sum(2, keepdims=True)) / (1 + k)  # the middles of the edges stay
    half_2 = np.array([width, height]) / 2
    at_HW2 = at_HW2 * half_2
    if warp.angle:
        turn = math.radians(warp.angle)
        at_HW2 = at_HW2 @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    pixel_HW2 = (at_HW2 + half_2 - 0.5).astype(np.float32)
    return pixel_HW2[:, :, 0].copy(), pixel_HW2[:, :, 1].copy()


def _centres(length: int) -> np.ndarray:
    return (2 * np.arange(length) + 1) / length - 1
