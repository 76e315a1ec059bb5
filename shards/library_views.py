"""Views by other libraries behind our call: lightly's transforms (views.library: lightly) and timm's RandAugment (views.rand_augment).

Both draw from the global random states of Python, NumPy and torch. These are set from the sample's key for the length of a call and put
back, so here too a view hangs on its key alone.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from base.errors import RequestError
from base.seeds import seed_of
from shards.draws import Key, View, ViewsConfig


def lightly(image_HWC: np.ndarray, cfg: ViewsConfig, key: Key) -> list[np.ndarray]:
    """The views of a u8 image of 1 or 3 channels by lightly's transforms, with the ranges of cfg: u8 (size, size, C) for cfg.sizes."""
    with _seeded(seed_of("views", *key)):
        views = _lightly_transform(cfg)(_to_pil(image_HWC))
    # ToTensor divides by 255: this is exact.
    return [np.ascontiguousarray((view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for view in views]


def rand_augment(pixels_HWC: np.ndarray, operations: int, magnitude: float, seed: int) -> np.ndarray:
    """timm's RandAugment with magnitudes of standard deviation 0.5, u8 HWC of 1 or 3 channels to the same shape; grey keeps one channel."""
    with _seeded(seed):
        changed = np.asarray(_timm_transform(operations, magnitude, pixels_HWC.shape[1], pixels_HWC.shape[2])(_to_pil(pixels_HWC)))
    return np.ascontiguousarray(changed.reshape(pixels_HWC.shape))


@lru_cache(maxsize=8)
def _lightly_transform(cfg: ViewsConfig) -> Callable[[Image.Image], list[torch.Tensor]]:
    from lightly.transforms.multi_view_transform import MultiViewTransform

    transform: Callable[[Image.Image], list[torch.Tensor]] = MultiViewTransform([_lightly_view(view, cfg) for view in cfg.wholes])
    return transform


def _lightly_view(view: View, cfg: ViewsConfig) -> Any:
    from lightly.transforms.dino_transform import DINOViewTransform
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    ranges: dict[str, Any] = {
        "hf_prob": 0.5 if cfg.flip else 0.0,
        "cj_prob": cfg.jitter_p,
        "cj_strength": 1.0,
        "cj_bright": cfg.brightness,
        "cj_contrast": cfg.contrast,
        "cj_sat": cfg.saturation,
        "cj_hue": cfg.hue,
        "random_gray_scale": cfg.grey_p,
        "gaussian_blur": view.blur_p,
        "sigmas": cfg.blur_sigma,
        "normalize": None,
    }
    if cfg.kind == "multi" or view.solarize_p or view.crop_scale[1] < 1:  # which lightly's SimCLR transform cannot
        return DINOViewTransform(crop_size=view.size, crop_scale=view.crop_scale, solarization_prob=view.solarize_p, **ranges)
    return SimCLRViewTransform(input_size=view.size, min_scale=view.crop_scale[0], **ranges)


@lru_cache(maxsize=8)
def _timm_transform(operations: int, magnitude: float, side: int, channels: int) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    # What a shear uncovers is mid-grey, and shifts reach 45 % of the side, as in InfoMin's official code.
    hparams = {"translate_const": int(0.45 * side), "img_mean": (128,) * 3 if channels == 3 else 128}
    transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(f"rand-n{operations}-m{magnitude:g}-mstd0.5", hparams)
    return transform


def _to_pil(pixels_HWC: np.ndarray) -> Image.Image:
    if pixels_HWC.shape[2] not in (1, 3):
        raise RequestError(f"lightly and RandAugment take images of 1 or 3 channels, not {pixels_HWC.shape[2]}", where="views")
    return Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
