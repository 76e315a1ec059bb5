"""Near-duplicates: one picture stored twice, re-encoded, resized, with another gamma, inverted, or cropped by up to 5 % a side.

    looks = look(images)                                   # u8 (H, W) or (H, W, C), of any sizes
    test = Reference.of(looks, mean_image(looks.small_NHW))
    for pair in duplicates(test, look(other_images)):
        pair.test, pair.corpus, pair.correlation, pair.inverted

Images become squares of 128 px with equalised histograms, so that no monotone change of grey values is left and an inverted picture is 255
minus itself. What all images of a dataset share, its mean image, is projected out: two chests are alike, two residuals are not, unless
they are one picture's.

First stage: hashes propose. 256 bits, the signs of the band-passed residual at 16 x 16; an inverted picture has every bit flipped, so the
absolute product of two hashes serves both polarities. A hash does not survive a crop, so each image has eleven: of the whole, and of ten
windows to one of which any crop of up to 5 % a side is near. All against all is a product of matrices.

Second stage: correlation decides, at 128 px after alignment (`analysis.alignment`): of the residuals as a whole, and of their fine
structure place by place, since pictures that share a black border agree as a whole. docs/leakage.md has what was measured.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from analysis.alignment import Floats, Pixels, Placement, Target, blur, resized, unit, warp

NEAR_DUPLICATES_VERSION = 2  # part of the name under which results are kept
SIDE = 128
HASH = 16
BITS = HASH * HASH
AGREE = 0.625  # of the absolute product of two hashes, 1 where all bits agree: at most 48 of 256 differ
MOST = 64  # proposals a test image and a part of the corpus, the best: bounds the work where all images of a dataset are alike
ENOUGH = 0.93  # correlation of the residuals
ENOUGH_LOCAL = 0.72  # of their fine structure, in three places out of four
MOST_OF_ONE_VALUE = 0.05  # share of the image
FLAT = 1.0  # grey levels of standard deviation below which an image has nothing to compare
ROWS = 512  # test images in a block of products

_HALF, _FULL = 0.025, 0.05
# Cut from left, top, right, bottom, as shares of the side.
WINDOWS: tuple[tuple[float, float, float, float], ...] = (
    (0, 0, 0, 0),
    (_HALF, _HALF, _HALF, _HALF),
    (0.04, 0.04, 0.04, 0.04),
    *((x, y, _FULL - x, _FULL - y) for x in (0, _FULL) for y in (0, _FULL)),
    *((_FULL, 0, 0, 0), (0, _FULL, 0, 0), (0, 0, _FULL, 0), (0, 0, 0, _FULL)),
)
Hashes = NDArray[np.int8]


@dataclass(frozen=True)
class Looks:
    """N images as they are compared: u8 (N, 128, 128), and the sha256 (hex) of each image's own pixels and shape."""

    small_NHW: Pixels
    content: list[str]


@dataclass(frozen=True)
class Reference:
    """Test images, prepared once for all parts of all corpora that they are compared with."""

    looks: Looks
    mean_HW: Floats
    hash_NWD: Hashes

    @classmethod
    def of(cls, looks: Looks, mean_HW: Floats) -> "Reference":
        """`mean_HW`: the mean image of the test images' dataset, float32 (128, 128)."""
        return cls(looks, mean_HW, hashes(looks.small_NHW, mean_HW))


class Pair(NamedTuple):
    """A test image and a corpus image, by number, that show one picture; `correlation` of their residuals after alignment."""

    test: int
    corpus: int
    correlation: float
    inverted: bool


def look(images: Iterable[Pixels]) -> Looks:
    """What is kept of images: 16 KB each. Of three channels the luminance, of any other number the middle one."""
    cv2.setNumThreads(0)
    small, content = [], []
    for image in images:
        content.append(hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest())
        small.append(_equalised(cv2.resize(_grey(image), (SIDE, SIDE), interpolation=cv2.INTER_AREA)))
    return Looks(np.stack(small) if small else np.empty((0, SIDE, SIDE), np.uint8), content)


def _equalised(image_HW: Pixels) -> Pixels:
    """Grey values by their mid-rank, which inversion mirrors exactly. A value that fills much of the image counts as less, or the
    noise beside a black border would be stretched over half of the scale."""
    share_G = np.minimum(np.bincount(image_HW.reshape(-1), minlength=256) / image_HW.size, MOST_OF_ONE_VALUE)
    rank_G = (np.cumsum(share_G) - share_G / 2) / share_G.sum()
    return np.rint(255 * rank_G).astype(np.uint8)[image_HW]


def _grey(image: Pixels) -> Pixels:
    if image.ndim == 2:
        return image
    if image.shape[2] == 3:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    return np.ascontiguousarray(image[:, :, image.shape[2] // 2])


def mean_image(small_NHW: Pixels) -> Floats:
    """The mean (128, 128) of looks, float32."""
    return np.asarray(small_NHW.mean(0, dtype=np.float32), np.float32)


def duplicates(test: Reference, corpus: Looks) -> list[Pair]:
    """Every pair of a test image and a corpus image that shows one picture, by test image."""
    cv2.setNumThreads(0)
    hash_MWD = hashes(corpus.small_NHW, test.mean_HW)
    found: list[Pair] = []
    last, target = -1, None
    for i, j in proposals(test.hash_NWD, hash_MWD):
        if i != last or target is None:
            last, target = i, Target.of(test.looks.small_NHW[i], test.mean_HW)
        agreement, start = _closest(test.hash_NWD[i], hash_MWD[j])
        image_HW = corpus.small_NHW[j]
        alike = target.compare(255 - image_HW if agreement < 0 else image_HW, start)
        if alike is not None and alike[0] >= ENOUGH and alike[1] >= ENOUGH_LOCAL:
            found.append(Pair(i, j, alike[0], agreement < 0))
    return found


def hashes(small_NHW: Pixels, mean_HW: Floats) -> Hashes:
    """Signs int8 (N, windows, 256), 1 and -1; all 0 for an image with nothing in it."""
    shared_D = unit(_banded(mean_HW)[0])
    found = np.zeros((len(small_NHW), len(WINDOWS), BITS), np.int8)
    for i, image_HW in enumerate(small_NHW):
        if image_HW.std() >= FLAT:
            band_WD = _banded(image_HW)
            found[i] = np.where(band_WD - np.outer(band_WD @ shared_D, shared_D) > 0, 1, -1)
    return found


def _banded(image_HW: Pixels | Floats) -> Floats:
    """Every window at 16 x 16 less its own blur and its mean: (windows, 256)."""
    half_HW = resized(image_HW, 2 * HASH)
    rows = []
    for number in range(len(WINDOWS)):
        band_HW = resized(warp(half_HW, placement(number)), HASH)
        band_HW = band_HW - blur(band_HW, 1.0)
        rows.append(band_HW.reshape(-1) - band_HW.mean())
    return np.stack(rows)


def placement(window: int, inverse: bool = False) -> Placement:
    """Where a window lies in its image: the placement that shows it; inverted, that of the whole image seen from the window."""
    left, top, right, bottom = WINDOWS[window]
    sx, sy, tx, ty = 1 - left - right, 1 - top - bottom, (left - right) / 2, (top - bottom) / 2
    return (1 / sx, -tx / sx, 1 / sy, -ty / sy) if inverse else (sx, tx, sy, ty)


def proposals(test_NWD: Hashes, corpus_MWD: Hashes) -> Iterator[tuple[int, int]]:
    """Pairs worth a closer look, by test image: the whole of one agrees with the whole or a window of the other, in either polarity."""
    corpus_WDM = np.ascontiguousarray(corpus_MWD.transpose(1, 2, 0), dtype=np.float32)
    for row in range(0, len(test_NWD), ROWS):
        test_WRD = np.ascontiguousarray(test_NWD[row : row + ROWS].transpose(1, 0, 2), dtype=np.float32)
        best_RM = np.abs(test_WRD[0] @ corpus_WDM[0])
        product_RM = np.empty_like(best_RM)
        for window in range(1, len(WINDOWS)):
            for one, other in ((0, window), (window, 0)):
                np.matmul(test_WRD[one], corpus_WDM[other], out=product_RM)
                np.maximum(best_RM, np.abs(product_RM, out=product_RM), out=best_RM)
        for i in np.flatnonzero(best_RM.max(1, initial=0) >= AGREE * BITS):
            close = np.flatnonzero(best_RM[i] >= AGREE * BITS)
            close = close[np.argsort(-best_RM[i, close], kind="stable")[:MOST]]
            yield from ((row + int(i), int(j)) for j in close)


def _closest(test_WD: Hashes, corpus_WD: Hashes) -> tuple[float, Placement]:
    """The product of the two hashes that agree best (negative: inverted), and where the corpus image then lies over the test image."""
    whole_W = corpus_WD.astype(np.int32) @ test_WD[0]  # a window of the corpus image is the whole test image
    part_W = test_WD.astype(np.int32) @ corpus_WD[0]
    a, b = int(np.abs(whole_W).argmax()), int(np.abs(part_W).argmax())
    if abs(whole_W[a]) >= abs(part_W[b]):
        return float(whole_W[a]), placement(a)
    return float(part_W[b]), placement(b, inverse=True)
