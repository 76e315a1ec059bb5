"""One picture laid over another: shift and scale of each axis, and how much alike the two then are beyond what all images share.

    target = Target.of(fixed_HW, mean_HW)
    whole, local = target.compare(moving_HW, start)      # correlations in -1..1, or None where they are clearly not one picture

`whole` is of what is left of both images without the mean image. A black border or a collimator's edge that two pictures share can carry it
alone, so `local` asks for agreement everywhere: fine structure is correlated in each of 49 places, and the lower quartile counts.

Gauss-Newton on the correlation, inverse compositional (Baker and Matthews, IJCV 56, 2004): gradients are taken of the fixed image once, so
that an image is compared with many for little more than a warp each. A placement (sx, tx, sy, ty) says that the fixed image's (x, y),
counted from its centre in shares of the side, is the moving image's (sx x + tx, sy y + ty).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Placement = tuple[float, float, float, float]

# Side, steps of alignment, and the residual correlation under which no more is done: most pairs end after the first three steps.
STAGES = ((64, 3, 0.5), (64, 5, 0.85), (128, 4, 0.85))
INNER = 0.05  # cut from each side before anything is compared: a copy may have been cropped that far
FURTHEST = 0.12  # shift, as a share of the side; scale within 0.8 to 1.25
SMOOTH = 1.0  # pixels: standard deviation of the blur before gradients
FINE = (1.0, 4.0)  # pixels at 128: the band of fine structure
PLACE = 16  # pixels: side of a place; 7 x 7 of them lie in the middle
CONTRAST = 3.0  # grey levels of fine structure below which a place says nothing: compression removes it
FEWEST = 6  # places of contrast that a comparison needs
TINY = 1e-6


def unit(values: Floats) -> Floats:
    """Rows without their mean, of length 1 (0 where a row is constant)."""
    centred = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.asarray(centred / np.maximum(length, TINY), np.float32)


def without(values: Floats, shared: Floats) -> Floats:
    """Unit rows from which the unit vector `shared` is projected out: nothing is left of a multiple of it, inverted or not."""
    rows = unit(values)
    return unit(rows - (rows @ shared)[..., None] * shared)


def blur(image_HW: Floats, sigma: float) -> Floats:
    """Gaussian, float32."""
    return np.asarray(cv2.GaussianBlur(image_HW, (0, 0), sigma), np.float32)


def resized(image_HW: Pixels | Floats, side: int) -> Floats:
    """By area, float32."""
    same = image_HW.shape == (side, side)
    return np.asarray(image_HW if same else cv2.resize(image_HW, (side, side), interpolation=cv2.INTER_AREA), np.float32)


def warp(image_HW: Floats, placement: Placement) -> Floats:
    """The image seen through a placement, of the same side; its border is repeated outside."""
    side = image_HW.shape[0]
    sx, tx, sy, ty = placement
    centre = (side - 1) / 2
    matrix = np.array([[sx, 0, centre * (1 - sx) + tx * side], [0, sy, centre * (1 - sy) + ty * side]])
    seen = cv2.warpAffine(image_HW, matrix, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(seen, np.float32)


def inner(image_HW: Floats) -> Floats:
    """The middle that a crop leaves, flat."""
    cut = round(image_HW.shape[0] * INNER)
    return np.ascontiguousarray(image_HW[cut:-cut, cut:-cut]).reshape(-1)


@dataclass(frozen=True)
class _Level:
    """The fixed image at one side: what a step of alignment and a comparison need."""

    fixed_D: Floats  # unit
    slope_4D: Floats  # derivative of fixed_D by the four numbers of a placement
    inverse_44: NDArray[np.float64]
    shared_D: Floats  # the mean image, unit
    rest_D: Floats  # residual of the fixed image

    @classmethod
    def of(cls, fixed_HW: Pixels, mean_HW: Floats, side: int) -> "_Level":
        plain_HW, mean = resized(fixed_HW, side), unit(inner(resized(mean_HW, side)))
        smooth_HW = blur(plain_HW, SMOOTH)
        dy_HW, dx_HW = (np.asarray(slope, np.float32) * side for slope in np.gradient(smooth_HW))
        place = ((np.arange(side) - (side - 1) / 2) / side).astype(np.float32)
        fixed_D = inner(smooth_HW) - inner(smooth_HW).mean()
        length = max(float(np.linalg.norm(fixed_D)), TINY)
        fixed_D = fixed_D / length
        slopes = [dx_HW * place[None, :], dx_HW, dy_HW * place[:, None], dy_HW]
        slope_4D = np.stack([inner(slope) for slope in slopes]) / length
        slope_4D -= slope_4D.mean(1, keepdims=True)
        slope_4D -= np.outer(slope_4D @ fixed_D, fixed_D)  # the step is taken on the sphere of unit images
        inverse_44 = np.asarray(np.linalg.inv((slope_4D @ slope_4D.T).astype(np.float64) + TINY * np.eye(4)), np.float64)
        return cls(fixed_D, slope_4D, inverse_44, mean, without(inner(plain_HW), mean))

    def align(self, moving_HW: Floats, start: Placement, steps: int) -> Placement:
        """The placement of highest correlation that the steps come by, the start included."""
        smooth_HW = blur(moving_HW, SMOOTH)
        best, place, at = -2.0, start, start
        for step in range(steps + 1):
            seen_D = unit(inner(warp(smooth_HW, at)))
            correlation = float(seen_D @ self.fixed_D)
            if correlation > best:
                best, place = correlation, at
            if step == steps:
                break
            ax, bx, ay, by = self.inverse_44 @ (self.slope_4D @ (seen_D - self.fixed_D))
            sx, sy = at[0] / (1 + ax), at[2] / (1 + ay)
            at = (sx, at[1] - sx * bx, sy, at[3] - sy * by)
            if not (0.8 < sx < 1.25 and 0.8 < sy < 1.25 and max(abs(at[1]), abs(at[3])) < FURTHEST):
                break
        return place


@dataclass(frozen=True)
class Target:
    """A fixed image, prepared to be compared with many."""

    levels: dict[int, _Level]
    places_PD: Floats

    @classmethod
    def of(cls, fixed_HW: Pixels, mean_HW: Floats) -> "Target":
        """Of a u8 image and the float32 mean image of its dataset, both (128, 128)."""
        levels = {side: _Level.of(fixed_HW, mean_HW, side) for side in {side for side, _, _ in STAGES}}
        return cls(levels, _places(fixed_HW.astype(np.float32)))

    def compare(self, moving_HW: Pixels, start: Placement) -> tuple[float, float] | None:
        """Correlations after alignment, whole and local; None where a stage says no, or too little of the images has any contrast."""
        place = start
        for side, steps, enough in STAGES:
            level = self.levels[side]
            plain_HW = resized(moving_HW, side)
            place = level.align(plain_HW, place, steps)
            seen_HW = warp(plain_HW, place)
            whole = float(without(inner(seen_HW), level.shared_D) @ level.rest_D)
            if whole < enough:
                return None
        seen_PD = _places(seen_HW)
        clear_P = (seen_PD.std(1) > CONTRAST) & (self.places_PD.std(1) > CONTRAST)
        if clear_P.sum() < FEWEST:
            return None
        return whole, float(np.quantile((unit(seen_PD[clear_P]) * unit(self.places_PD[clear_P])).sum(1), 0.25))


def _places(image_HW: Floats) -> Floats:
    """Fine structure of the middle in places: (49, 256)."""
    fine_HW = blur(image_HW, FINE[0]) - blur(image_HW, FINE[1])
    count = fine_HW.shape[0] // PLACE - 1
    cut = (fine_HW.shape[0] - count * PLACE) // 2
    middle = fine_HW[cut:-cut, cut:-cut].reshape(count, PLACE, count, PLACE)
    return middle.transpose(0, 2, 1, 3).reshape(count * count, PLACE * PLACE)
