"""Views: the random (or evaluation) versions of an image that a network sees, uint8 in and uint8 out, one image at a time on the CPU.

    cfg = ViewsConfig(kind="two", size=224)
    views, _ = make(image_HWC, None, cfg, (seed, epoch, sample_id))            # two u8 HWC arrays of side 224
    image_BCHW, seg_BHW = augment(images_NCHW, seg_NHW, cfg_one, [(seed, epoch, i) for i in ids])

Every draw comes from (key, view index) alone, so pixels do not depend on workers, ranks or order. The distribution is that of SimCLR
(arXiv 2002.05709, appendix A): random resized crop, colour jitter, blur, flip; grey images skip what does nothing to them. What makes it
fast: grey stays one channel; a crop that shrinks by two or more is taken from a level halved before (an exact 2 x 2 mean, made once) and
resized bilinearly; brightness and contrast are one table of 256 entries, computed in float and rounded once; the blur is separable.
Normalisation is not here: it is the first layer of the encoder.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import cv2
import numpy as np
from pydantic import Field, model_validator

from base.config import Strict
from base.seeds import seed_of

VIEWS_VERSION = 1  # raised by whoever changes a pixel that the same key gives; it is part of what pretrainings and cells are keyed by

Share = Annotated[float, Field(ge=0, le=1)]
Key = tuple[int, ...]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
_CROP_TRIES = 10


class ViewsConfig(Strict):
    """What is done to an image.

    kind: `two` random views (contrastive), `one` random view (with the mask moved along), or `eval` (resized, nothing random).
    size: side of the square output, pixels. The image is never cropped for evaluation; an oblong one is squeezed.
    crop_scale: smallest and largest share of the image's area in the crop.
    crop_ratio: smallest and largest aspect of the crop, relative to the image's own aspect (for square images: width / height).
    flip: mirror left and right with probability 1/2. There is no vertical flip: nobody hangs a chest film upside down.
    jitter_p: probability that brightness, contrast, saturation and hue are changed at all.
    brightness, contrast, saturation: b draws a factor from [1 - b, 1 + b]. hue: h draws a shift from [-h, h] turns of the colour circle.
    grey_p: probability that a colour image is turned grey.
    blur_p: probability of a Gaussian blur; blur_sigma: smallest and largest standard deviation, pixels of the output.
    """

    kind: Literal["two", "one", "eval"]
    size: int = Field(ge=1, le=4096)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter_p: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    grey_p: Share = 0.0
    blur_p: Share = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> "ViewsConfig":
        for name, top in (("crop_scale", 1.0), ("crop_ratio", 10.0), ("blur_sigma", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must be 0 < low <= high <= {top:g}, got {low:g}, {high:g}")
        return self

    @property
    def views(self) -> int:
        """Views an image gives."""
        return 2 if self.kind == "two" else 1


def make(image_HWC: np.ndarray, seg_HW: np.ndarray | None, cfg: ViewsConfig, key: Key) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The views of one image.

    Args:
        image_HWC: u8, 1 or 3 channels.
        seg_HW: u8 mask of the same height and width, or None. It moves with the (only) view, by nearest neighbour.
        key: names the draws: (seed, epoch, sample id).
    Returns:
        cfg.views arrays u8 (size, size, C), and the mask u8 (size, size) or None (two views carry no mask).
    """
    if cfg.kind == "eval":
        return [resize(image_HWC, cfg.size)], None if seg_HW is None else resize_mask(seg_HW, cfg.size)
    levels = [image_HWC]
    views, moved = [], None
    for view in range(cfg.views):
        draw = random.Random(seed_of("views", *key, view))
        box, level = _to_level(_crop_box(image_HWC.shape[0], image_HWC.shape[1], cfg, draw), image_HWC.shape, cfg.size)
        pixels = _appearance(_crop(levels, box, level, cfg.size), cfg, draw)
        flip = cfg.flip and draw.random() < 0.5
        views.append(_with_channels(cv2.flip(pixels, 1)) if flip else pixels)
        if seg_HW is not None and cfg.kind == "one":
            x, y, width, height = box
            moved = resize_mask(seg_HW[y : y + height, x : x + width], cfg.size)
            moved = cv2.flip(moved, 1) if flip else moved
    return views, moved


def augment(
    image_NCHW: np.ndarray, seg_NHW: np.ndarray | None, cfg: ViewsConfig, keys: Sequence[Key]
) -> tuple[np.ndarray, np.ndarray | None]:
    """One view of each already decoded image: a training batch for fine-tuning, which reads each image many times.

    Returns:
        u8 (N, C, size, size) and the masks u8 (N, size, size) or None. Decode at about 1.25 times `size` (decode_all), so that crops keep
        detail.
    """
    out_NCHW = np.empty((len(image_NCHW), image_NCHW.shape[1], cfg.size, cfg.size), dtype=np.uint8)
    out_seg = None if seg_NHW is None else np.empty((len(image_NCHW), cfg.size, cfg.size), dtype=np.uint8)
    for i, key in enumerate(keys):
        image_HWC = np.ascontiguousarray(image_NCHW[i].transpose(1, 2, 0))
        views, moved = make(image_HWC, None if seg_NHW is None else seg_NHW[i], cfg, key)
        out_NCHW[i] = views[0].transpose(2, 0, 1)
        if out_seg is not None and moved is not None:
            out_seg[i] = moved
    return out_NCHW, out_seg


def resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The evaluation resize: u8 HWC to (size, size, C), averaging over areas where it shrinks, bilinear where it grows."""
    height, width = image_HWC.shape[:2]
    if (height, width) != (size, size) and (height > size or width > size):
        image_HWC = cv2.resize(image_HWC, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA)
    if image_HWC.shape[:2] != (size, size):
        image_HWC = cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_LINEAR)
    return _with_channels(image_HWC)


def resize_mask(seg_HW: np.ndarray, size: int) -> np.ndarray:
    """u8 HW to (size, size) by nearest neighbour at pixel centres: classes are never mixed."""
    if seg_HW.shape == (size, size):
        return seg_HW
    return np.asarray(cv2.resize(seg_HW, (size, size), interpolation=cv2.INTER_NEAREST_EXACT))


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, :, None] if pixels.ndim == 2 else pixels  # OpenCV drops a channel axis of length 1


def _crop_box(height: int, width: int, cfg: ViewsConfig, draw: random.Random) -> Box:
    """x, y, width, height: area uniform and aspect log-uniform, drawn again while it does not fit; the whole image at last."""
    log_low, log_high = math.log(cfg.crop_ratio[0]), math.log(cfg.crop_ratio[1])
    for _ in range(_CROP_TRIES):
        area = draw.uniform(*cfg.crop_scale)
        root = math.exp(0.5 * draw.uniform(log_low, log_high))
        share_w, share_h = math.sqrt(area) * root, math.sqrt(area) / root
        if share_w <= 1 and share_h <= 1:
            w, h = max(round(share_w * width), 1), max(round(share_h * height), 1)
            return int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1)), w, h
    return 0, 0, width, height


def _to_level(box: Box, shape: tuple[int, ...], size: int) -> tuple[Box, int]:
    """How often to halve before the crop, and the box moved (by less than an output pixel) onto whole pixels of that level.

    The mask is cut by the moved box too, so image and mask stay aligned.
    """
    x, y, width, height = box
    level = 0
    # A half of an odd side would not stand for whole pixel pairs, so the pyramid ends there and bilinear does the rest.
    while min(width, height) >> level >= 2 * size and not any((side >> level) % 2 for side in shape[:2]):
        level += 1
    x, y, width, height = (part >> level << level for part in box)
    return (x, y, width, height), level


def _crop(levels: list[np.ndarray], box: Box, level: int, size: int) -> np.ndarray:
    """The box, resized. `levels` are the image and its halves, which are made when a crop first needs them."""
    x, y, width, height = box
    if (height, width) == levels[0].shape[:2]:
        return resize(levels[0], size)
    while len(levels) <= level:
        half = (levels[-1].shape[1] // 2, levels[-1].shape[0] // 2)
        levels.append(cv2.resize(levels[-1], half, interpolation=cv2.INTER_AREA))
    crop = levels[level][y >> level : (y + height) >> level, x >> level : (x + width) >> level]
    return _with_channels(cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR))


def _appearance(pixels: np.ndarray, cfg: ViewsConfig, draw: random.Random) -> np.ndarray:
    if draw.random() < cfg.jitter_p:
        brightness, contrast = _factor(cfg.brightness, draw), _factor(cfg.contrast, draw)
        pixels = _light(pixels, brightness, contrast, brightness_first=draw.random() < 0.5)
        if pixels.shape[2] == 3:
            pixels = _colour(pixels, _factor(cfg.saturation, draw), draw.uniform(-cfg.hue, cfg.hue))
    if pixels.shape[2] == 3 and draw.random() < cfg.grey_p:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if draw.random() < cfg.blur_p:
        kernel = _kernel(round(draw.uniform(*cfg.blur_sigma), 2))
        pixels = _with_channels(cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101))
    return pixels


def _factor(strength: float, draw: random.Random) -> float:
    return draw.uniform(1 - strength, 1 + strength)


_RAMP = np.arange(256, dtype=np.float32)


def _light(pixels: np.ndarray, brightness: float, contrast: float, brightness_first: bool) -> np.ndarray:
    """Brightness multiplies; contrast scales about the mean luminance of what it is given. Both clip to 0..255."""
    if brightness == 1 and contrast == 1:
        return pixels
    table = _RAMP
    if brightness_first:
        table = np.clip(table * brightness, 0, 255)
        centre = _luminance(cv2.LUT(pixels, np.rint(table).astype(np.uint8)))
    else:
        centre = _luminance(pixels)
    table = np.clip((table - centre) * contrast + centre, 0, 255)
    if not brightness_first:
        table = np.clip(table * brightness, 0, 255)
    return _with_channels(cv2.LUT(pixels, np.rint(table).astype(np.uint8)))


def _luminance(pixels: np.ndarray) -> float:
    means = cv2.mean(pixels)
    return means[0] if pixels.ndim == 2 or pixels.shape[2] == 1 else 0.299 * means[0] + 0.587 * means[1] + 0.114 * means[2]


def _colour(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    if saturation != 1:
        grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        pixels = cv2.addWeighted(pixels, saturation, grey, 1 - saturation, 0)
    if hue != 0:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)  # FULL: hue is 0..255 and wraps as uint8 does
        hsv[:, :, 0] += np.uint8(round(hue * 256) % 256)
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return pixels


@lru_cache(maxsize=1024)
def _kernel(sigma: float) -> np.ndarray:
    """Gaussian cut off at 2 to 3 standard deviations and normalised, float32 column."""
    radius = max(math.ceil(2 * sigma), 1)
    return np.asarray(cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F))
