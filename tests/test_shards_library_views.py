"""Views by lightly's transforms and by timm's RandAugment, behind our call."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_corpus import picture

from base.errors import RequestError
from shards.draws import ViewsConfig
from shards.views import make

MULTI = [{"blur_p": 1.0}, {"solarize_p": 0.5}, {"count": 2, "size": 16, "crop_scale": (0.05, 0.4)}]
CASES: list[dict[str, Any]] = [
    {"kind": "two", "library": "lightly"},
    {"kind": "one", "library": "lightly", "crop_scale": (0.3, 0.9)},
    {"kind": "multi", "library": "lightly", "crops": MULTI},
    {"kind": "two", "rand_augment": (2, 10)},
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", CASES, ids=lambda settings: f"{settings['kind']}-{settings.get('library', 'randaugment')}")
def test_the_key_alone_decides_and_global_random_states_stay(settings: dict[str, Any], channels: int) -> None:
    cfg, image = ViewsConfig.model_validate({"size": 24} | settings), picture(0, 60, channels)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    views = make(image, None, cfg, (1, 2, 3))[0]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [view.shape for view in views] == [(side, side, channels) for side in cfg.sizes]
    assert all(view.dtype == np.uint8 for view in views)
    torch.rand(3)
    np.random.rand(3)
    assert all(np.array_equal(a, b) for a, b in zip(views, make(image, None, cfg, (1, 2, 3))[0], strict=True))
    others = [make(image, None, cfg, (1, 2, i))[0] for i in range(8)]
    assert not all(np.array_equal(a, b) for other in others for a, b in zip(views, other, strict=True))
    assert not np.array_equal(views[0], views[-1]) or len(views) == 1


def test_lightly_has_our_ranges() -> None:
    plain: dict[str, Any] = {"kind": "one", "size": 32, "crop_scale": (1, 1), "jitter_p": 0.0, "blur_p": 0.0, "flip": False}
    image = picture(3, 32)
    off = [make(image, None, ViewsConfig(**plain | {"library": "lightly"}), (i,))[0][0].astype(int) - image for i in range(8)]
    assert min(np.abs(difference).mean() for difference in off) < 1  # an aspect is drawn too, which does not fit
    bright = ViewsConfig(
        **plain | {"library": "lightly", "jitter_p": 1.0, "brightness": 0.5, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    )
    factors = [make(image, None, bright, (i,))[0][0].mean() / image.mean() for i in range(60)]
    assert 0.45 < min(factors) < 0.65
    assert 1.3 < max(factors) < 1.55


def test_grey_stays_grey_under_rand_augment() -> None:
    cfg = ViewsConfig(kind="one", size=24, rand_augment=(2, 10))
    views = [make(picture(0, 60), None, cfg, (i,))[0][0] for i in range(30)]
    assert all(view.shape == (24, 24, 1) for view in views)
    plain = [make(picture(0, 60), None, cfg.model_copy(update={"rand_augment": None}), (i,))[0][0] for i in range(30)]
    assert sum(not np.array_equal(a, b) for a, b in zip(views, plain, strict=True)) > 20


def test_windows_are_refused() -> None:
    for settings in ({"library": "lightly"}, {"rand_augment": (1, 5)}):
        with pytest.raises(RequestError, match="1 or 3 channels, not 2"):
            make(picture(0, 40, 2), None, ViewsConfig.model_validate({"kind": "one", "size": 16} | settings), (0,))
