"""Views: their distribution, their masks, and that the key alone decides."""

import math
import random
import re

import cv2
import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from tiny_corpus import picture

from base.paths import ROOT
from shards.draws import Draw, ViewsConfig, crop_box, draw, to_level
from shards.views import _crop, _kernel, _light, augment, make, resize, resize_mask

PLAIN = {"jitter_p": 0.0, "blur_p": 0.0, "flip": False}
IDENTITY = ViewsConfig(kind="one", size=32, crop_scale=(1, 1), crop_ratio=(1, 1), jitter_p=0.0, blur_p=0.0, flip=False)


@pytest.mark.parametrize("shape", [(64, 64), (100, 70), (32, 32), (20, 20), (40, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_randomness_a_view_is_the_evaluation_resize(shape: tuple[int, int], channels: int) -> None:
    image = cv2.resize(picture(1, 128, channels), shape).reshape(shape[1], shape[0], channels)
    expected = resize(image, 32)
    assert expected.shape == (32, 32, channels)
    assert np.array_equal(make(image, None, IDENTITY, (0,))[0][0], expected)
    assert np.array_equal(make(image, None, IDENTITY.model_copy(update={"kind": "eval"}), (9,))[0][0], expected)


def test_the_evaluation_resize_averages_areas() -> None:
    checks = np.indices((64, 64)).sum(0).astype(np.uint8)[:, :, None] % 2 * 255
    assert np.unique(resize(checks, 16)).size == 1  # an aliasing resize shows black, white or stripes
    assert abs(int(resize(checks, 16)[0, 0, 0]) - 127) <= 1


def test_crops_have_the_promised_areas_aspects_and_places() -> None:
    boxes = np.array([crop_box(1000, 1000, (0.2, 0.8), (0.75, 4 / 3), random.Random(i)) for i in range(4000)], dtype=float)
    x, y, w, h = boxes.T
    area, aspect = w * h / 1e6, w / h
    assert area.min() >= 0.199
    assert area.max() <= 0.801
    # A share is uniform: its deciles are evenly spaced. Near the upper end an aspect of 4/3 still fits (0.8 * 4/3 > 1 does not by 3 %).
    assert np.abs(np.quantile(area, np.linspace(0.1, 0.9, 9)) - np.linspace(0.26, 0.74, 9)).max() < 0.02
    assert abs(np.log(aspect).mean()) < 0.01
    assert aspect.min() >= 0.749
    assert aspect.max() <= 1.336
    free_x, free_y = x / np.maximum(1000 - w, 1), y / np.maximum(1000 - h, 1)
    assert abs(free_x.mean() - 0.5) < 0.02
    assert abs(free_y.mean() - 0.5) < 0.02
    assert np.all((x >= 0) & (y >= 0) & (x + w <= 1000) & (y + h <= 1000))


def test_aspect_is_relative_to_the_image() -> None:
    for i in range(20):
        _, _, w, h = crop_box(400, 800, (0.5, 0.5), (1, 1), random.Random(i))
        assert abs(w / h - 2) < 0.02


def test_a_crop_from_a_halved_level_shows_the_same_place() -> None:
    image = cv2.GaussianBlur(picture(3, 512)[:, :, 0], (0, 0), 4)[:, :, None]
    random_ = random.Random(0)
    for _ in range(20):
        wanted = crop_box(512, 512, (0.3, 0.9), (0.75, 4 / 3), random_)
        (x, y, w, h), level = to_level(wanted, 512, 512, 64)
        assert level == (1 if min(wanted[2:]) < 256 else 2)
        assert all(0 <= a - b < 4 for a, b in zip(wanted, (x, y, w, h), strict=True))
        fast = _crop([image], Draw(x, y, w, h, level, 64, 0, 0, 64, False))[:, :, 0].astype(float)
        true = cv2.resize(image[y : y + h, x : x + w], (64, 64), interpolation=cv2.INTER_AREA).astype(float)
        assert np.sqrt(((fast - true) ** 2).mean()) < 2.5


def test_the_mask_moves_with_the_image() -> None:
    cfg = ViewsConfig(kind="one", size=48, crop_scale=(0.3, 1.0), **PLAIN).model_copy(update={"flip": True})
    inside = outside = checked = 0.0
    for i in range(60):
        draw = np.random.default_rng(i)
        seg = np.zeros((128, 128), dtype=np.uint8)
        x, y = draw.integers(10, 80, 2)
        seg[y : y + 35, x : x + 35] = 7
        image = np.where(seg == 7, np.uint8(250), np.uint8(20))[:, :, None]
        views, moved = make(image, seg, cfg, (i,))
        assert moved is not None
        assert set(np.unique(moved)) <= {0, 7}
        bright = views[0][:, :, 0] > 135
        if moved.any():
            checked += 1
            inside += (bright & (moved == 7)).sum() / (bright | (moved == 7)).sum()
        outside += abs(float(bright.sum()) - float((moved == 7).sum()))
    assert checked > 40
    assert inside / checked > 0.95


def test_mirroring_happens_half_of_the_time_and_whole() -> None:
    image = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 1))
    cfg = IDENTITY.model_copy(update={"flip": True})
    flipped = [bool(make(image, None, cfg, (i,))[0][0][0, 0, 0]) for i in range(400)]
    assert 160 < sum(flipped) < 240
    assert np.array_equal(make(image, None, cfg, (flipped.index(True),))[0][0], image[:, ::-1])


def test_the_key_alone_decides_and_views_differ() -> None:
    cfg, image = ViewsConfig(kind="two", size=32), picture(0, 80)
    one, two = make(image, None, cfg, (1, 2, 3))[0]
    make(picture(5, 60), None, cfg, (7,))
    again = make(image, None, cfg, (1, 2, 3))[0]
    assert np.array_equal(one, again[0])
    assert np.array_equal(two, again[1])
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, make(image, None, cfg, (1, 2, 4))[0][0])


def test_light_is_computed_in_float_and_rounded_once() -> None:
    image = picture(2, 64)
    exact = image.astype(np.float64)
    for brightness, contrast, first in ((1.3, 0.7, True), (0.8, 1.4, False), (1.0, 1.2, True)):
        step = np.clip(exact * brightness, 0, 255) if first else exact
        step = np.clip((step - step.mean()) * contrast + step.mean(), 0, 255)
        step = step if first else np.clip(step * brightness, 0, 255)
        assert np.abs(_light(image, brightness, contrast, first) - step).max() <= 0.75  # half a grey level, and the mean's own rounding


def test_the_blur_keeps_the_mean_and_reaches_its_sigma() -> None:
    for sigma in (0.5, 1.0, 2.0):
        kernel = _kernel(sigma)[:, 0]
        place = np.arange(len(kernel)) - len(kernel) // 2
        assert math.isclose(kernel.sum(), 1, abs_tol=1e-6)
        assert 0.8 * sigma < math.sqrt((kernel * place**2).sum()) <= 1.02 * sigma
    cfg = IDENTITY.model_copy(update={"blur_p": 1.0, "blur_sigma": (2.0, 2.0)})
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    blurred = make(noise, None, cfg, (0,))[0][0]
    assert blurred.std() < 0.3 * noise.std()
    assert abs(blurred.mean() - noise.mean()) < 3


def test_colour_jitter_changes_colours_and_grey_removes_them() -> None:
    image = picture(4, 32, 3)
    update = {"jitter_p": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5}
    turned = make(image, None, IDENTITY.model_copy(update=update), (3,))[0][0]
    assert np.abs(turned.astype(int) - image).mean() > 5
    assert np.abs(turned.max(2).astype(int) - image.max(2)).mean() < 2  # hue leaves the value of HSV alone
    grey = make(image, None, IDENTITY.model_copy(update={"grey_p": 1.0}), (0,))[0][0]
    assert (np.ptp(grey, axis=2) == 0).all()


def test_augmenting_decoded_arrays_is_making_views() -> None:
    images = np.stack([picture(i, 40, 3).transpose(2, 0, 1) for i in range(5)])
    seg = np.random.default_rng(0).integers(0, 3, (5, 40, 40), dtype=np.uint8)
    cfg = ViewsConfig(kind="one", size=32)
    keys = [(0, 1, i) for i in range(5)]
    out, moved = augment(images, seg, cfg, keys)
    assert out.shape == (5, 3, 32, 32)
    assert moved is not None
    for i in range(5):
        views, mask = make(np.ascontiguousarray(images[i].transpose(1, 2, 0)), seg[i], cfg, keys[i])
        assert np.array_equal(out[i], views[0].transpose(2, 0, 1))
        assert mask is not None
        assert np.array_equal(moved[i], mask)
    assert augment(images[:, :1], None, cfg, keys)[0].shape == (5, 1, 32, 32)


def test_masks_keep_their_classes() -> None:
    seg = np.random.default_rng(1).integers(0, 4, (37, 53), dtype=np.uint8)
    assert set(np.unique(resize_mask(seg, 16))) <= {0, 1, 2, 3}
    assert np.array_equal(resize_mask(np.kron(seg[:16, :16], np.ones((3, 3), dtype=np.uint8)), 16), seg[:16, :16])


DINO = ViewsConfig.model_validate(
    {
        "kind": "multi",
        "size": 32,
        "crop_scale": (0.4, 1.0),
        "crops": [{"blur_p": 1.0}, {"blur_p": 0.1, "solarize_p": 0.2}, {"count": 6, "size": 16, "crop_scale": (0.05, 0.4)}],
    }
)


def test_several_crops_have_their_own_sizes_and_ranges() -> None:
    assert DINO.sizes == [32, 32] + [16] * 6
    image = picture(0, 100, 3)
    views, moved = make(image, np.zeros((100, 100), dtype=np.uint8), DINO, (0,))
    assert [view.shape for view in views] == [(side, side, 3) for side in DINO.sizes]
    assert moved is None
    drawn = [draw(DINO, (i,), 1000, 1000, rgb=False) for i in range(1500)]
    share = np.array([[view.width * view.height / 1e6 for view in views] for views in drawn])
    assert 0.38 < share[:, :2].min() < 0.42
    assert 0.045 < share[:, 2:].min() < 0.052  # cut on whole pixels of a halved level
    assert 0.38 < share[:, 2:].max() < 0.401
    blurred = np.array([[view.sigma > 0 for view in views] for views in drawn]).mean(0)
    assert blurred[0] == 1
    assert abs(blurred[1] - 0.1) < 0.03
    assert np.abs(blurred[2:] - 0.5).max() < 0.05
    solarized = np.array([[view.solarize for view in views] for views in drawn]).mean(0)
    assert abs(solarized[1] - 0.2) < 0.04
    assert solarized[[0, 2, 3, 4, 5, 6, 7]].sum() == 0


def test_two_views_may_differ() -> None:
    byol = ViewsConfig.model_validate({"kind": "two", "size": 16, "crops": [{"blur_p": 1.0}, {"blur_p": 0.0, "solarize_p": 1.0}]})
    one, two = draw(byol, (3,), 64, 64, rgb=True)
    assert (one.sigma > 0, one.solarize, two.sigma > 0, two.solarize) == (True, False, False, True)


def test_solarising_inverts_the_bright() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    cfg = IDENTITY.model_copy(update={"size": 16, "solarize_p": 1.0})
    assert np.array_equal(make(image, None, cfg, (0,))[0][0], np.where(image < 128, image, 255 - image))


def test_jigsaw_patches_are_the_cells_of_one_crop_in_random_order() -> None:
    cfg = ViewsConfig.model_validate({"kind": "jigsaw", "size": 48, "jigsaw": {"size": 90, "patch": 22, "crop_scale": (1, 1)}})
    cfg = cfg.model_copy(update={"crop_ratio": (1, 1)})
    assert cfg.sizes == [48] + [22] * 9
    y, x = np.indices((90, 90))
    image = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)  # a pixel says where it is
    orders, places, flips = set(), [], []
    for i in range(60):
        views = make(image, None, cfg, (i,))[0]
        corners = [(int(patch[0, 0, 0]), int(patch[0, 0, 1])) for patch in views[1:]]
        flips.append(bool(views[1][0, 0, 0] > views[1][0, 1, 0]))
        corners = [(89 - left if flips[-1] else left, top) for left, top in corners]
        assert sorted((top // 30, left // 30) for left, top in corners) == [(row, column) for row in range(3) for column in range(3)]
        assert all(left % 30 + 22 <= 30 and top % 30 + 22 <= 30 for left, top in corners)
        orders.add(tuple((left // 30, top // 30) for left, top in corners))
        places += [left % 30 for left, _ in corners]
    assert len(orders) == 60
    assert set(places) == set(range(9))
    assert 15 < sum(flips) < 45


def test_windows_of_a_scan_are_not_colours() -> None:
    image = picture(4, 32, 3)
    cfg = IDENTITY.model_copy(update={"jitter_p": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.9, "hue": 0.5, "grey_p": 1.0})
    assert np.array_equal(make(image, None, cfg, (0,), rgb=False)[0][0], image)
    assert not np.array_equal(make(image, None, cfg, (0,))[0][0], image)


@pytest.mark.parametrize("channels", [2, 5, 9])
def test_any_number_of_channels_is_one_image(channels: int) -> None:
    plane = picture(1, 300)
    image = np.repeat(plane, channels, axis=2)
    cfg = ViewsConfig(kind="two", size=32, crop_scale=(0.1, 1.0), solarize_p=0.5)
    for i in range(10):
        for many, one in zip(make(image, None, cfg, (i,))[0], make(plane, None, cfg, (i,))[0], strict=True):
            assert many.shape == (32, 32, channels)
            assert np.abs(many.astype(int) - one).max() <= 3  # a mean of two roundings, spread by the contrast


def test_pixels_are_pinned() -> None:
    # Whoever changes this changes what every recipe computes: raise VIEWS_VERSION in the same commit.
    ramp = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)[:, :, None]
    colour = np.concatenate([ramp, 255 - ramp, ramp.transpose(1, 0, 2)], axis=2)
    strong = {"crop_scale": (0.08, 1.0), "saturation": 0.8, "hue": 0.2, "grey_p": 0.2, "size": 8}
    pinned = [
        (ViewsConfig(kind="two", size=8), ramp[:32, :32], [2158, 3802]),
        (ViewsConfig(kind="two", **strong), colour, [18669, 26870]),
        (ViewsConfig(kind="one", size=8), colour[:, :40], [17112]),
        (DINO, ramp, [82384, 143094, 31591, 47326, 36432, 46789, 51141, 19956]),
        (
            ViewsConfig.model_validate({"kind": "jigsaw", "size": 8, "jigsaw": {"size": 30, "patch": 8}}),
            ramp,
            [4418, 5824, 4672, 8712, 3704, 7304, 11528, 6208, 11128, 8968],
        ),
    ]
    for cfg, image, sums in pinned:
        found = [int(view.sum()) for view in make(np.ascontiguousarray(image), None, cfg, (0, 0, 0))[0]]
        assert found == pytest.approx(sums, rel=2e-3)  # OpenCV may round a pixel otherwise on another CPU


def test_a_wrong_configuration_is_refused() -> None:
    wrong: list[dict[str, object]] = [{"crop_scale": (0.5, 0.2)}, {"crop_scale": (0.0, 1.0)}, {"blur_p": 1.5}, {"croop": 1}, {"size": 0}]
    wrong += [
        {"crops": [{}]},
        {"crops": [{"count": 3}]},
        {"kind": "multi"},
        {"kind": "one", "crops": [{}]},
        {"kind": "jigsaw", "crops": [{}] * 3},
    ]
    wrong += [{"crops": [{"crop_scale": (0.9, 0.1)}, {}]}, {"kind": "jigsaw", "jigsaw": {"size": 90, "patch": 31}}]
    wrong += [{"kind": "eval", "device_side": 64}, {"library": "lightly", "device_side": 64}, {"rand_augment": (2, 10), "device_side": 64}]
    wrong += [{"kind": "jigsaw", "library": "lightly"}, {"library": "lightly", "crop_ratio": (1, 1)}, {"rand_augment": (2, 11)}]
    for settings in wrong:
        with pytest.raises(ValidationError):
            ViewsConfig.model_validate({"kind": "two", "size": 32} | settings)
    with pytest.raises(ValidationError, match=r"views.library: lightly"):
        ViewsConfig.model_validate("lightly")


def official_views() -> dict[str, ViewsConfig]:
    """The blocks of docs/views.md, by their names."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "views.md").read_text(), flags=re.DOTALL)
    return {name: ViewsConfig.model_validate(tree) for block in blocks for name, tree in yaml.safe_load(block).items()}


@pytest.mark.parametrize(("name", "cfg"), official_views().items())
def test_official_views_are_those_of_the_papers_recipe(name: str, cfg: ViewsConfig) -> None:
    recipe = yaml.safe_load((ROOT / "pretrain" / "recipes" / name / "paper.yaml").read_text())
    assert ViewsConfig.model_validate(recipe["views"]) == cfg


@pytest.mark.parametrize(("name", "cfg"), official_views().items())
@pytest.mark.parametrize("channels", [1, 3])
def test_official_views_are_made_of_grey_and_colour(name: str, cfg: ViewsConfig, channels: int) -> None:
    expected = {"swav": [224] * 2 + [96] * 6, "dino": [224] * 2 + [96] * 8, "mae": [224], "pirl": [224] + [64] * 9}
    expected |= {"infomin": [224] * 2 + [64] * 9}
    views, _ = make(picture(0, 320, channels), None, cfg, (0, 0, 0))
    assert [view.shape for view in views] == [(side, side, channels) for side in expected.get(name, [224, 224])]
    assert all(view.dtype == np.uint8 for view in views)
