"""Turned, bent and gamma-corrected views, for fine-tuning: what is done to a view after it was cropped and mirrored.

    image_HWC, seg_HW = apply(image_HWC, seg_HW, Warp(angle=5.0, bend="elastic", seed=7, exponent=1.2))
    image_BCHW, seg_BHW = apply_on_device(image_BCHW, seg_BHW, warps)

All of a warp's geometry is one map from the pixels of the view to places in it, so pixels are interpolated once; the mask moves along by
nearest neighbour. Fields are drawn on coarse grids and are smooth between their points, and strengths are shares of the side, so that a
view bends alike at any resolution.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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

    @property
    def moves(self) -> bool:
        """Whether it changes more than grey levels."""
        return self.angle != 0 or self.bend is not None


def apply(image_HWC: np.ndarray, seg_HW: np.ndarray | None, warp: Warp) -> tuple[np.ndarray, np.ndarray | None]:
    """Image u8 and mask u8 of one size, square, warped. What comes in from outside is black and, in the mask, 0 where the view is turned;
    where it is only bent the border is mirrored."""
    if warp.exponent != 1:
        table = np.rint(255 * (np.arange(256) / 255) ** warp.exponent).astype(np.uint8)
        image_HWC = cv2.LUT(image_HWC, table).reshape(image_HWC.shape)
    if not warp.moves:
        return image_HWC, seg_HW
    x_HW, y_HW = places(warp, image_HWC.shape[0])
    border = cv2.BORDER_CONSTANT if warp.angle else cv2.BORDER_REFLECT
    # Channel by channel: how OpenCV rounds hangs on how many it moves at once.
    planes = [cv2.remap(plane_HW, x_HW, y_HW, cv2.INTER_LINEAR, borderMode=border) for plane_HW in cv2.split(image_HWC)]
    moved = np.stack(planes, axis=2)
    return moved, None if seg_HW is None else cv2.remap(seg_HW, x_HW, y_HW, cv2.INTER_NEAREST, borderMode=border)


class _Geometry(NamedTuple):
    """Where the columns and rows of a side of S pixels are taken from, -1 and 1 at the edges; what is added to that, on a coarse grid; k of
    the lens; cosine and sine of the turn. All of it float32."""

    x_S: np.ndarray
    y_S: np.ndarray
    field_2PP: np.ndarray
    k: np.float32
    cos: np.float32
    sin: np.float32


def _geometry(warp: Warp, side: int) -> _Geometry:
    draw = np.random.default_rng(warp.seed)
    x_S = y_S = ((2 * np.arange(side) + 1) / side - 1).astype(np.float32)
    field, k = np.zeros((2, ELASTIC_POINTS, ELASTIC_POINTS), np.float32), 0.0
    if warp.bend == "elastic":
        field = draw.normal(0, 2 * ELASTIC_STD, field.shape).astype(np.float32)  # 2: the side's length in these coordinates
    if warp.bend == "grid":
        x_S, y_S = _stretched(x_S, draw), _stretched(y_S, draw)
    if warp.bend == "optical":
        k = draw.uniform(-OPTICAL_LIMIT, OPTICAL_LIMIT)
    turn = math.radians(warp.angle)
    return _Geometry(x_S, y_S, field, np.float32(k), np.float32(math.cos(turn)), np.float32(math.sin(turn)))


def _stretched(at_S: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    steps = draw.uniform(1 - GRID_LIMIT, 1 + GRID_LIMIT, GRID_CELLS)
    lines = np.concatenate([[0], np.cumsum(steps)]) / steps.sum() * 2 - 1
    return np.interp(at_S, np.linspace(-1, 1, GRID_CELLS + 1), lines).astype(np.float32)


def places(warp: Warp, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the warped view is taken from: x and y, float32 (side, side), in pixels."""
    found = _geometry(warp, side)
    # Rows stay rows and columns columns as long as they can: that is most of the time it takes.
    x, y = found.x_S[None], found.y_S[:, None]
    if warp.bend == "elastic":
        x, y = (
            at + cv2.resize(part, (side, side), interpolation=cv2.INTER_CUBIC) for at, part in zip((x, y), found.field_2PP, strict=True)
        )
    if warp.bend == "optical":
        factor = (1 + found.k * (x * x + y * y)) / (1 + found.k)  # the middles of the edges stay
        x, y = x * factor, y * factor
    if warp.angle:
        x, y = found.cos * x - found.sin * y, found.sin * x + found.cos * y
    half, whole = np.float32(side / 2), np.zeros((side, side), np.float32)
    return whole + (x * half + half - np.float32(0.5)), whole + (y * half + half - np.float32(0.5))


@torch.no_grad()
def apply_on_device(image_BCSS: Tensor, seg_BSS: Tensor | None, warps: Sequence[Warp]) -> tuple[Tensor, Tensor | None]:
    """`apply` for a batch of u8, where it lies: the same within the rounding of the interpolation."""
    image_BCSS, device = image_BCSS.clone(), image_BCSS.device
    seg_BSS = None if seg_BSS is None else seg_BSS.clone()
    with torch.autocast(device.type, enabled=False):
        if bright := [b for b, warp in enumerate(warps) if warp.exponent != 1]:
            exponent = torch.tensor([warps[b].exponent for b in bright], device=device).view(-1, 1, 1, 1)
            image_BCSS[bright] = (255 * (image_BCSS[bright] / 255) ** exponent).round().to(torch.uint8)
        for turned, padding in ((True, "zeros"), (False, "reflection")):
            moved = [b for b, warp in enumerate(warps) if warp.moves and (warp.angle != 0) == turned]
            if not moved:
                continue
            grid_BSS2 = _grid([_geometry(warps[b], image_BCSS.shape[-1]) for b in moved], device)
            at_places = partial(F.grid_sample, grid=grid_BSS2, padding_mode=padding, align_corners=False)
            image_BCSS[moved] = at_places(image_BCSS[moved].float(), mode="bilinear").round().to(torch.uint8)
            if seg_BSS is not None:
                seg_BSS[moved] = at_places(seg_BSS[moved, None].float(), mode="nearest")[:, 0].to(torch.uint8)
    return image_BCSS, seg_BSS


def _grid(found: Sequence[_Geometry], device: torch.device) -> Tensor:
    """`places` of several, in the coordinates of grid_sample: float32 (B, S, S, 2)."""
    x_BS, y_BS, field_B2PP, k_B, cos_B, sin_B = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*found, strict=True))
    side = x_BS.shape[1]
    field_B2SS = F.interpolate(field_B2PP, (side, side), mode="bicubic", align_corners=False)
    k, cos, sin = (part.view(-1, 1, 1) for part in (k_B, cos_B, sin_B))
    x, y = x_BS[:, None] + field_B2SS[:, 0], y_BS[:, :, None] + field_B2SS[:, 1]
    factor = (1 + k * (x * x + y * y)) / (1 + k)
    x, y = x * factor, y * factor
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
