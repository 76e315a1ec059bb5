"""Augmented training batches: crops, mirror images, light, turns and bends, drawn for each sample and epoch.

    views = TrainingViews(train, 96, recipe.views, seed, masks=False)        # of images decoded at enlarged(96, recipe.views)
    image_BCHW, target, known = views.batch(index, epoch)

The draws beside crop, light and mirror image are made here; those and the pixels are `shards.views`' and `shards.warp`'s.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.seeds import seed_of
from finetune.data import Arrays, as_input
from finetune.task import Augmentation
from shards import device_views, views
from shards.draws import draw
from shards.warp import BENDS, Warp, apply, apply_on_device

MOST_ENLARGED = 2  # times the side: the smallest crops of [0.08, 1] would want 3.5, and 12 times the room of a node's cache


def enlarged(size: int, augmentation: Augmentation) -> int:
    """The side at which training images are decoded, so that the smallest crop still has `size` pixels a side of its own, or half of it."""
    return min(math.ceil(size / math.sqrt(augmentation.crop_scale[0])), MOST_ENLARGED * size)


class TrainingViews:
    """Augmented training batches. A view is a function of (seed, epoch, sample's key); the mask moves with its image.

    device: where views are made, whole images being sent there; the CPU's are OpenCV's. The draws are the same, pixels but for rounding.
    """

    def __init__(
        self, arrays: Arrays, size: int, augmentation: Augmentation, seed: int, masks: bool, device: torch.device | None = None
    ) -> None:
        self.arrays, self.augmentation, self.seed, self.masks = arrays, augmentation, seed, masks
        self.device = None if device is None or device.type == "cpu" else device
        self.keys = [seed_of(name) for name in arrays.ids]
        self.configs = {(cropped, lit): _config(size, augmentation, cropped, lit) for cropped in (False, True) for lit in (False, True)}

    def batch(self, index: NDArray[np.int64], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image u8 BCHW (volumes: B windows slices H W), target and known f32, as `losses.loss_of` takes them, on the device."""
        arrays = self.arrays
        keys = [(self.seed, epoch, self.keys[i]) for i in index]
        configs, warps = zip(*map(self._draw, keys), strict=True)
        seg = arrays.target[index].astype(np.uint8) if self.masks else None
        asked = (arrays.image[index], seg, configs, keys, warps)
        image, moved = _on_cpu(*asked) if self.device is None else _on_device(*asked, self.device)
        target = torch.from_numpy(arrays.target[index]) if moved is None else moved.float()
        known = torch.from_numpy(arrays.known[index])
        return as_input(image, arrays.slices), target.to(image.device), known.to(image.device)

    def _draw(self, key: views.Key) -> tuple[views.ViewsConfig, Warp]:
        """What is drawn beside crop, light and mirror image, which shards.draws draws from the same key."""
        ask, stream = self.augmentation, random.Random(seed_of("warp", *key))
        cropped, lit = stream.random() < ask.resized_crop_p, stream.random() < ask.light_p
        by_gamma = ask.gamma > 0 and (not (ask.brightness or ask.contrast) or stream.random() < 0.5)
        exponent = 2 ** stream.uniform(-ask.gamma, ask.gamma) if lit and by_gamma else 1.0
        angle = stream.uniform(-ask.rotate, ask.rotate) if ask.rotate else 0.0
        bend = stream.choice(BENDS) if stream.random() < ask.distort_p else None
        warp = Warp(angle, bend, stream.getrandbits(31) if bend else 0, exponent)
        return self.configs[cropped, lit and not by_gamma], warp


def _on_cpu(
    image: NDArray[np.uint8],
    seg: NDArray[np.uint8] | None,
    configs: Sequence[views.ViewsConfig],
    keys: Sequence[views.Key],
    warps: Sequence[Warp],
) -> tuple[Tensor, Tensor | None]:
    image, seg = views.augment(image, seg, configs, keys)
    for b, warp in enumerate(warps):
        if warp != Warp():
            image_HWC, seg_HW = apply(np.ascontiguousarray(image[b].transpose(1, 2, 0)), None if seg is None else seg[b], warp)
            image[b] = image_HWC.transpose(2, 0, 1)
            if seg is not None and seg_HW is not None:
                seg[b] = seg_HW
    return torch.from_numpy(image), None if seg is None else torch.from_numpy(seg)


def _on_device(
    image: NDArray[np.uint8],
    seg: NDArray[np.uint8] | None,
    configs: Sequence[views.ViewsConfig],
    keys: Sequence[views.Key],
    warps: Sequence[Warp],
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    height, width = image.shape[2:]
    drawn = [draw(config, key, height, width, rgb=image.shape[1] == 3)[0] for config, key in zip(configs, keys, strict=True)]
    (view,) = device_views.apply(torch.from_numpy(image).to(device), np.array([drawn], dtype=np.float32))
    moved = None if seg is None else device_views.crop_masks(torch.from_numpy(seg).to(device), drawn)
    return apply_on_device(view, moved, warps)


def _config(size: int, augmentation: Augmentation, cropped: bool, lit: bool) -> views.ViewsConfig:
    return views.ViewsConfig(
        kind="one",
        size=size,
        crop_scale=augmentation.crop_scale if cropped else (1.0, 1.0),
        crop_ratio=augmentation.crop_ratio if cropped else (1.0, 1.0),
        flip=augmentation.flip,
        jitter_p=float(lit),
        brightness=augmentation.brightness,
        contrast=augmentation.contrast,
        saturation=0.0,
        hue=0.0,
        blur_p=0.0,
    )
