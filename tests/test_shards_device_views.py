"""Views made in batches: the same key gives the view of the CPU, and other keys give views of the same distribution."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from tiny_corpus import picture, write

from base.errors import RequestError
from shards.corpus import Corpus
from shards.device_views import apply, table
from shards.draws import ViewsConfig
from shards.loader import TrainLoader
from shards.views import make, resize

PLAIN: dict[str, Any] = {"kind": "one", "size": 32, "jitter_p": 0.0, "blur_p": 0.0}
MULTI = [{"blur_p": 1.0}, {"blur_p": 0.1, "solarize_p": 0.5}, {"count": 3, "size": 16, "crop_scale": (0.05, 0.4)}]
CASES: dict[str, tuple[dict[str, Any], int]] = {  # settings, and how far a pixel may be off: hue is rounded to 1/256 turn on the CPU
    "crop": (PLAIN, 1),
    "whole image": (PLAIN | {"crop_scale": (1, 1), "crop_ratio": (1, 1)}, 1),
    "light": (PLAIN | {"jitter_p": 1.0, "saturation": 0.0, "hue": 0.0}, 3),
    "colour": (PLAIN | {"jitter_p": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.8, "hue": 0.5}, 12),
    "grey": (PLAIN | {"grey_p": 0.5}, 2),
    "blur": (PLAIN | {"blur_p": 1.0}, 2),
    "multi-crop": ({"kind": "multi", "size": 48, "crops": MULTI, "saturation": 0.0, "hue": 0.0}, 255),  # 127 and 128 solarise apart
    "jigsaw": ({"kind": "jigsaw", "size": 48, "jigsaw": {"size": 60, "patch": 17}, "hue": 0.0}, 4),
}


def on_device(image_BCHW: torch.Tensor, cfg: ViewsConfig, keys: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """As workers and training do it together."""
    channels, height, width = image_BCHW.shape[1:]
    return apply(image_BCHW, table(cfg, keys, height, width, rgb=channels == 3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("channels", "shape"), [(1, (64, 64)), (3, (65, 97)), (2, (256, 200))])
def test_the_same_key_gives_the_view_of_the_cpu(case: str, channels: int, shape: tuple[int, int]) -> None:
    settings, tolerance = CASES[case]
    cfg = ViewsConfig.model_validate(settings)
    keys: list[tuple[int, ...]] = [(1, 2, i) for i in range(12)]
    images = np.stack([picture(i, max(shape), channels)[: shape[0], : shape[1]] for i in range(12)])
    views = on_device(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), cfg, keys)
    assert [view.shape for view in views] == [(12, channels, side, side) for side in cfg.sizes]
    for i, key in enumerate(keys):
        for device_BCHW, cpu_HWC in zip(views, make(images[i], None, cfg, key)[0], strict=True):
            off = np.abs(device_BCHW[i].numpy().transpose(1, 2, 0).astype(int) - cpu_HWC)
            assert off.max() <= tolerance
            assert off.mean() < 1


def test_other_keys_give_views_of_the_same_distribution() -> None:
    cfg = ViewsConfig(kind="two", size=32, crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, solarize_p=0.2, grey_p=0.2)
    images, count = np.stack([picture(i, 96, 3) for i in range(8)]), 400
    batch_BCHW = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).repeat(count // 8, 1, 1, 1)
    device = torch.cat(on_device(batch_BCHW, cfg, [(7, i) for i in range(count)])).permute(0, 2, 3, 1).numpy()
    cpu = np.concatenate([np.stack([make(images[i % 8], None, cfg, (8, i))[0][v] for i in range(count)]) for v in range(2)])
    for name, found in {name: (statistic(device), statistic(cpu)) for name, statistic in STATISTICS.items()}.items():
        assert ks_2samp(*found).pvalue > 1e-3, name


STATISTICS = {
    "mean": lambda views: views.mean((1, 2, 3)),
    "contrast": lambda views: views.std((1, 2, 3)),
    "sharpness": lambda views: np.abs(np.diff(views.astype(float), axis=2)).mean((1, 2, 3)),
    "colour": lambda views: np.ptp(views.astype(float), axis=3).mean((1, 2)),
    "mirror": lambda views: (views[:, :, :16].astype(float) - views[:, :, 16:]).mean((1, 2, 3)),
    "top": lambda views: (views[:, :16].astype(float) - views[:, 16:]).mean((1, 2, 3)),
    "brightest": lambda views: np.quantile(views, 0.95, axis=(1, 2, 3)),
}


def test_a_view_hangs_on_its_key_and_not_on_its_batch() -> None:
    cfg = ViewsConfig(kind="two", size=24, solarize_p=0.5)
    batch_BCHW = torch.from_numpy(np.stack([picture(i, 40).transpose(2, 0, 1) for i in range(6)]))
    keys: list[tuple[int, ...]] = [(3, i) for i in range(6)]
    together = on_device(batch_BCHW, cfg, keys)
    for part in (slice(0, 1), slice(1, 6)):
        for whole, alone in zip(together, on_device(batch_BCHW[part], cfg, keys[part]), strict=True):
            assert (whole[part].int() - alone.int()).abs().max() <= 1


def test_autocast_does_not_touch_pixels() -> None:
    batch_BCHW, cfg = torch.from_numpy(picture(0, 40).transpose(2, 0, 1))[None], ViewsConfig(kind="one", size=24)
    plain = on_device(batch_BCHW, cfg, [(1,)])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(on_device(batch_BCHW, cfg, [(1,)])[0], plain)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_hand_over_whole_images_and_draws(tmp_path: Path, workers: int) -> None:
    corpus = Corpus(write(tmp_path / "tiny", size=40))
    cfg = ViewsConfig.model_validate({"kind": "multi", "size": 24, "crops": MULTI, "device_side": 40})
    batch = next(TrainLoader([corpus], None, cfg, 8, seed=5, workers=workers).batches(2))
    assert [view.shape for view in batch.views] == [(8, 1, 40, 40)]
    assert batch.draws_VBP is not None
    views = apply(batch.views[0], batch.draws_VBP)
    on_cpu = next(TrainLoader([corpus], None, cfg.model_copy(update={"device_side": None}), 8, seed=5).batches(2))
    assert torch.equal(on_cpu.index_B, batch.index_B)
    assert on_cpu.draws_VBP is None
    assert [view.shape for view in on_cpu.views] == [view.shape for view in views]
    assert all((a.float() - b.float()).abs().mean() < 1 for a, b in zip(on_cpu.views, views, strict=True))
    stored = corpus.read(int(batch.index_B[0]), seg=False, text=False).image
    assert np.array_equal(batch.views[0][0].numpy().transpose(1, 2, 0), resize(stored, 40))


def test_what_has_no_device_code_is_refused() -> None:
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for settings in ({"kind": "eval"}, {"library": "lightly"}, {"rand_augment": (2, 10)}):
        with pytest.raises(RequestError, match="no device code"):
            on_device(images, ViewsConfig.model_validate({"kind": "one", "size": 8} | settings), [(0,)])
