"""First filters: exact movement, Gabor scores that tell waves from noise, and the command."""

import math
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_cluster_cli import Allograft, allograft
from torch import nn

from analysis.filters import first_filters, gabor_noise, gabor_scores, movement, pictures, table
from base.errors import RequestError
from base.seeds import rng
from encoders.build import build
from encoders.cuts import FAMILIES
from encoders.export import export

__all__ = ["allograft"]  # a fixture


def gabor(h: int, angle: float, cycles: float, width: float, phase: float) -> np.ndarray:
    y, x = np.mgrid[:h, :h] - (h - 1) / 2
    u = x * math.cos(angle) + y * math.sin(angle)
    held = np.exp(-(x**2 + y**2) / (2 * (width * h) ** 2)) * np.cos(2 * math.pi * cycles / h * u + phase)
    return np.asarray(held - held.mean(), np.float64)


def test_movement_is_exact_and_none_for_what_was_not_touched() -> None:
    before = rng("filters").normal(size=(6, 3, 5, 5))
    after = before.copy()
    after[1] *= 1.5
    after[2] *= -1
    after[3] = 0
    before[4] = after[4] = 0
    moved, cosine = movement(before, after)
    assert moved == pytest.approx([0, 0.5, 2, 1, 0, 0])
    assert cosine[[0, 1, 2, 4, 5]] == pytest.approx([1, 1, -1, 1, 1])
    assert moved[0] == 0.0
    assert math.isnan(cosine[3])
    with pytest.raises(RequestError, match=r"\(6, 3, 5, 5\) and \(6, 1, 5, 5\)"):
        movement(before, after[:, :1])


@pytest.mark.parametrize("h", [5, 7, 11])
@pytest.mark.parametrize("phase", [0.0, 1.0, math.pi / 2])
def test_planted_waves_score_high_and_noise_low(h: int, phase: float) -> None:
    draw = rng("planted waves", h)
    planted = np.stack([gabor(h, angle, cycles, 0.25, phase) for angle in (0, 0.6, 1.8) for cycles in (1.0, 1.5)])
    colour = planted[:, None] * np.array([0.2, -0.5, 1.0])[:, None, None]  # of opponent colours: the component finds it
    level = gabor_noise((64, 3, h, h))
    assert (gabor_scores(colour) > max(0.9, level)).all()
    noisy = planted[:, None] + 0.3 * planted.std() * draw.normal(size=(len(planted), 1, h, h))
    assert (gabor_scores(noisy) > 0.75).all()
    noise = gabor_scores(draw.normal(size=(300, 3, h, h)))
    assert np.mean(noise < level) == pytest.approx(0.95, abs=0.04)


def test_kernels_too_small_for_a_wave_have_no_score_and_constant_ones_neither() -> None:
    assert np.isnan(gabor_scores(np.ones((4, 3, 3, 3)))).all()
    flat = rng("flat").normal(size=(3, 1, 7, 7))
    flat[1] = 2.0
    assert np.isnan(gabor_scores(flat)).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["test_resnet", "densenet121", "cbr_tiny", "test_vit", "efficientnet_b0"])
def test_every_kind_of_network_has_first_filters(name: str) -> None:
    net = build(name, 1).net
    found = first_filters(net)
    assert found.shape[1] == 1
    assert found.ndim == 4
    assert name in [one for family in FAMILIES.values() for one in family.architectures]
    with pytest.raises(RequestError, match="no convolution"):
        first_filters(nn.Linear(2, 2))


def test_pictures_share_a_scale_before_and_after() -> None:
    before = rng("pictures").normal(size=(2, 3, 5, 5))
    one, two = pictures(before, before / 2)
    assert two is not None
    assert one.shape == (2, 5, 5, 3)
    assert abs(one.astype(int) - 127).max() >= 127
    assert abs(two.astype(int) - 127).max() < 66
    assert pictures(before[:, :2])[0].shape == (2, 5, 5, 3)


def test_a_row_a_filter() -> None:
    before = rng("rows").normal(size=(4, 1, 7, 7))
    rows = table(before, before)
    assert [row["movement"] for row in rows] == [0.0] * 4
    assert [row["filter"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["norm"] == pytest.approx(np.linalg.norm(before[0]))


def exported(folder: Path, channels: int = 1, nudge: float = 0.0, architecture: str = "resnet18", seed: int = 0) -> str:
    encoder = build(architecture, channels, seed=seed, widths=(8, 8, 8, 8) if architecture == "resnet18" else None)
    if nudge:
        with torch.no_grad():
            next(encoder.net.parameters()).mul_(1 + nudge)
    export(encoder, folder, name="x", method="none", lineage=[], data=[], revision="none", image_size=32)
    return str(folder)


def test_the_command_writes_table_and_figures(tmp_path: Path, allograft: Allograft) -> None:
    one, two = exported(tmp_path / "before"), exported(tmp_path / "after", nudge=0.25)
    said = allograft("analyze", "filters", one, two, "--out", str(tmp_path / "out"))
    assert said.code == 0, said.err
    assert "median 0.25, 0.25 to 0.25" in said.out
    frame = pd.read_csv(tmp_path / "out" / "filters.csv")
    assert len(frame) == 64
    assert frame["movement"].to_numpy() == pytest.approx(0.25, abs=1e-6)
    for name in ("filters.png", "movement.png"):
        held = cv2.imread(str(tmp_path / "out" / name))
        assert held is not None
        assert held.std() > 5
    alone = allograft("analyze", "filters", one, "--out", str(tmp_path / "alone"))
    assert alone.code == 0
    assert "Gaussian noise under" in alone.out
    assert not (tmp_path / "alone" / "movement.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["random"], "random weights of which architecture?"),
        (["/nowhere"], "no exported encoder here"),
        (["{one}", "random:x"], "'x' is no seed"),
        (["{one}", "{other}"], "cannot be compared"),
    ],
)
def test_bad_requests_end_with_2_and_one_line(words: list[str], says: str, tmp_path: Path, allograft: Allograft) -> None:
    places = {"one": tmp_path / "one", "other": tmp_path / "other"}
    if any("{" in word for word in words):
        exported(places["one"])
        exported(places["other"], architecture="test_resnet")
    said = allograft("analyze", "filters", *(word.format(**places) for word in words), "--out", str(tmp_path / "out"))
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1
