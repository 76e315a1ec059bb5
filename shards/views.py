"""Views: the random (or evaluation) versions of an image that a network sees, uint8 in and uint8 out, one image at a time on the CPU.

    cfg = ViewsConfig(kind="two", size=224)
    views, _ = make(image_HWC, None, cfg, (seed, epoch, sample_id))            # two u8 HWC arrays of side 224
    image_BCHW, seg_BHW = augment(images_NCHW, seg_NHW, cfg_one, [(seed, epoch, i) for i in ids])

What is drawn is in shards.draws; the same draws in batches on a device are in shards.device_views. What makes this fast: grey stays one
channel; a crop that shrinks by two or more is taken from a level halved before (an exact 2 x 2 mean, made once for all views) and resized
bilinearly; brightness and contrast are one table of 256 entries, computed in float and rounded once; the blur is separable. Official codes
differ in the filter of the resize alone: bicubic in MAE and DINO. Normalisation is not here: it is the first layer of the encoder.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from shards.draws import Draw, Key, ViewsConfig, draw

VIEWS_VERSION = 1  # raised by whoever changes a pixel that the same key gives; it is part of what pretrainings and cells are keyed by


def make(
    image_HWC: np.ndarray, seg_HW: np.ndarray | None, cfg: ViewsConfig, key: Key, rgb: bool = True
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The views of one image.

    Args:
        image_HWC: u8, any number of channels.
        seg_HW: u8 mask of the same height and width, or None. It moves with the (only) view, by nearest neighbour.
        key: names the draws: (seed, epoch, sample id).
        rgb: whether three channels are red, green and blue (the windows of a CT are not), so that colours can be jittered.
    Returns:
        u8 (size, size, C) for each of cfg.handed_sizes, and the mask u8 (size, size) or None (several views carry no mask).
    """
    if cfg.kind == "eval":
        return [resize(image_HWC, cfg.size)], None if seg_HW is None else resize_mask(seg_HW, cfg.size)
    if cfg.device_side:
        return [resize(image_HWC, cfg.device_side)], None
    if cfg.library == "lightly":
        from shards.library_views import lightly

        return lightly(image_HWC, cfg, key), None
    levels, views, cut = [image_HWC], [], None
    for drawn in draw(cfg, key, image_HWC.shape[0], image_HWC.shape[1], rgb and image_HWC.shape[2] == 3):
        if drawn.size < drawn.side:  # a patch: all are cut from one crop
            cut = _mirrored(_crop(levels, drawn), drawn.flip) if cut is None else cut
            views.append(cut[drawn.top : drawn.top + drawn.size, drawn.left : drawn.left + drawn.size])
        else:
            views.append(_mirrored(_appearance(_crop(levels, drawn), drawn, cfg), drawn.flip))
    if seg_HW is None or cfg.kind != "one":
        return views, None
    moved = resize_mask(seg_HW[drawn.y : drawn.y + drawn.height, drawn.x : drawn.x + drawn.width], cfg.size)
    return views, cv2.flip(moved, 1) if drawn.flip else moved


def augment(
    image_NCHW: np.ndarray, seg_NHW: np.ndarray | None, cfg: ViewsConfig | Sequence[ViewsConfig], keys: Sequence[Key]
) -> tuple[np.ndarray, np.ndarray | None]:
    """One view of each already decoded image: a training batch for fine-tuning, which reads each image many times.

    Args:
        cfg: for all images, or one for each; their `size` is the same.
    Returns:
        u8 (N, C, size, size) and the masks u8 (N, size, size) or None. Decode at about 1.25 times `size` (decode_all), so that crops keep
        detail.
    """
    cfgs = [cfg] * len(keys) if isinstance(cfg, ViewsConfig) else cfg
    out_NCHW = np.empty((len(image_NCHW), image_NCHW.shape[1], cfgs[0].size, cfgs[0].size), dtype=np.uint8)
    out_seg = None if seg_NHW is None else np.empty((len(image_NCHW), cfgs[0].size, cfgs[0].size), dtype=np.uint8)
    for i, (key, each) in enumerate(zip(keys, cfgs, strict=True)):
        image_HWC = np.ascontiguousarray(image_NCHW[i].transpose(1, 2, 0))
        views, moved = make(image_HWC, None if seg_NHW is None else seg_NHW[i], each, key)
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


def _mirrored(pixels: np.ndarray, flip: bool) -> np.ndarray:
    return _with_channels(cv2.flip(pixels, 1)) if flip else pixels


def _crop(levels: list[np.ndarray], drawn: Draw) -> np.ndarray:
    """The crop, resized. `levels` are the image and its halves, which are made when a crop first needs them."""
    if (drawn.height, drawn.width) == levels[0].shape[:2]:
        return resize(levels[0], drawn.side)
    level = drawn.level
    while len(levels) <= level:
        half = (levels[-1].shape[1] // 2, levels[-1].shape[0] // 2)
        levels.append(_with_channels(cv2.resize(levels[-1], half, interpolation=cv2.INTER_AREA)))
    x, y, width, height = (part >> level for part in drawn[:4])
    crop = levels[level][y : y + height, x : x + width]
    return _with_channels(cv2.resize(crop, (drawn.side, drawn.side), interpolation=cv2.INTER_LINEAR))


def _appearance(pixels: np.ndarray, drawn: Draw, cfg: ViewsConfig) -> np.ndarray:
    pixels = _light(pixels, drawn.brightness, drawn.contrast, drawn.brightness_first)
    if drawn.saturation != 1 or drawn.hue != 0:
        pixels = _colour(pixels, drawn.saturation, drawn.hue)
    if drawn.grey:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if drawn.sigma:
        kernel = _kernel(drawn.sigma)
        pixels = _with_channels(cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101))
    if drawn.solarize:
        pixels = _with_channels(cv2.LUT(pixels, _SOLARIZED))
    if cfg.rand_augment:
        from shards.library_views import rand_augment

        pixels = rand_augment(pixels, *cfg.rand_augment, drawn.rand_augment)
    return pixels


_RAMP = np.arange(256, dtype=np.float32)
_SOLARIZED = np.where(_RAMP < 128, _RAMP, 255 - _RAMP).astype(np.uint8)


def _light(pixels: np.ndarray, brightness: float, contrast: float, brightness_first: bool) -> np.ndarray:
    """Brightness multiplies; contrast scales about the mean luminance of what it is given. Both clip to 0..255."""
    if brightness == 1 and contrast == 1:
        return pixels
    table = _RAMP
    if brightness_first:
        table = np.minimum(table * brightness, 255)
        centre = _luminance(cv2.convertScaleAbs(pixels, alpha=brightness))  # what a table lookup of it would give, in less time
    else:
        centre = _luminance(pixels)
    table = np.minimum(np.maximum((table - centre) * contrast + centre, 0), 255)
    if not brightness_first:
        table = np.minimum(table * brightness, 255)
    return _with_channels(cv2.LUT(pixels, np.rint(table).astype(np.uint8)))


def _luminance(pixels: np.ndarray) -> float:
    """Of three channels weighted as colours, as the official codes do; windows of one scan differ little in it."""
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
        return float(pixels.mean())
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
