"""Similarities against planted correlations, invariances and code written from the definitions; and no mistake of the known packages."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from analysis import moments
from analysis import similarity as sim
from analysis.evaluating import evaluating
from analysis.moments import Sums
from base.errors import RequestError, WorkError
from base.seeds import rng

Array = np.ndarray[Any, Any]


def planted(n: int, p: int, q: int, rho: float, shared: int, seed: int = 0) -> tuple[Array, Array]:
    """Two sides with `shared` directions of correlation rho, and noise; mixed, so that no channel shows it."""
    draw = rng("planted", seed)
    z = draw.normal(size=(n, shared))
    x = np.concatenate([z, draw.normal(size=(n, p - shared))], 1)
    y = np.concatenate([rho * z + math.sqrt(1 - rho**2) * draw.normal(size=(n, shared)), draw.normal(size=(n, q - shared))], 1)
    return x @ mixing(draw, p) + 3, y @ mixing(draw, q) - 7


def mixing(draw: np.random.Generator, p: int) -> Array:
    """Invertible, with a condition number of 10."""
    u, v = (np.linalg.qr(draw.normal(size=(p, p)))[0] for _ in range(2))
    return u * np.geomspace(1, 10, p) @ v


# -- the definitions, in numpy alone, of whole arrays


def bases(x: Array, threshold: float = 1.0, energy: int = 2) -> tuple[Array, Array]:
    """Centred rows and their orthonormal directions, truncated."""
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u, s = u[:, s > s[0] * 1e-13 * max(x.shape)], s[s > s[0] * 1e-13 * max(x.shape)]
    share = np.cumsum(s**energy) / (s**energy).sum()
    return x, u[:, : 1 + int(np.sum(share < threshold - 1e-14))] if threshold < 1 else u


def rho_of(x: Array, y: Array, threshold: float = 1.0, energy: int = 2) -> Array:
    return np.linalg.svd(bases(x, threshold, energy)[1].T @ bases(y, threshold, energy)[1], compute_uv=False)


def pwcca_by_definition(x: Array, y: Array, turns: int = 1, tied: float = 1e-6) -> float:
    """Morcos et al. 2018. Where correlations are equal the definition gives another number for every choice of their directions: the mean
    weight over many choices is meant, by its closed form, or by so many drawn ones."""
    centred, u = bases(x)
    left, rho, _ = np.linalg.svd(u.T @ bases(y)[1], full_matrices=False)
    along = (u @ left).T @ centred
    weight = np.abs(along).sum(1)
    draw = rng("turns")
    for group in np.split(np.arange(len(rho)), 1 + np.flatnonzero(rho[:-1] - rho[1:] > tied)):
        g = len(group)
        if turns > 1:
            drawn = [np.linalg.qr(draw.normal(size=(g, g)))[0] @ along[group] for _ in range(turns)]
            weight[group] = np.abs(drawn).sum(2).mean(0)
        elif g > 1:
            weight[group] = np.linalg.norm(along[group], axis=0).sum() * math.gamma(g / 2) / math.gamma((g + 1) / 2) / math.sqrt(math.pi)
    return float((weight * rho).sum() / weight.sum())


def cka_by_definition(x: Array, y: Array, debiased: bool) -> float:
    """By the n x n Gram matrices; debiased: Song et al. 2012, eq. 5."""
    n = len(x)
    if not debiased:
        x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    if debiased:
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)

    def hsic(a: Array, b: Array) -> float:
        if not debiased:
            return float((a * b).sum())
        one = np.ones(n)
        return float(np.trace(a @ b) + one @ a @ one * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ a @ b @ one))

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def procrustes_by_definition(x: Array, y: Array) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(x.T @ y, "nuc") / np.linalg.norm(x) / np.linalg.norm(y))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.floats(0, 1), st.booleans())
@example(3, 3, 3, 1.0, False)
@example(0, 3, 3, 1.0, True)
@settings(max_examples=40, deadline=None)
def test_all_measures_are_their_definitions(seed: int, p: int, q: int, rho: float, exact: bool) -> None:
    x, y = planted(60, p, q, rho, min(p, q, 2), seed)
    found = sim.similarity(x, y, exact=exact, chunk=13).values
    assert found["svcca"] == pytest.approx(rho_of(x, y, 0.99).mean(), abs=1e-8)
    assert found["cca"] == pytest.approx(rho_of(x, y).mean(), abs=1e-8)
    assert found["pwcca_x"] == pytest.approx(pwcca_by_definition(x, y), abs=1e-8)
    assert found["pwcca_y"] == pytest.approx(pwcca_by_definition(y, x), abs=1e-8)
    assert found["cka"] == pytest.approx(cka_by_definition(x, y, False), abs=1e-8)
    assert found["cka_debiased"] == pytest.approx(cka_by_definition(x, y, True), abs=1e-8)
    assert found["procrustes"] == pytest.approx(procrustes_by_definition(x, y), abs=1e-8)


@given(st.integers(0, 10_000), st.integers(2, 50), st.booleans())
@settings(max_examples=25, deadline=None)
def test_chunks_give_what_the_whole_gives(seed: int, chunk: int, exact: bool) -> None:
    x, y = planted(90, 6, 4, 0.7, 2, seed)
    whole, parts = (sim.similarity(x + 100, y, exact=exact, chunk=size) for size in (90, chunk))
    for name in sim.MEASURES:
        assert parts.values[name] == pytest.approx(whole.values[name], abs=1e-8), name


@pytest.mark.parametrize("shared", [2, 3, 4])
def test_directions_of_equal_correlation_weigh_their_mean_over_all_turns(shared: int) -> None:
    """Sides that share directions exactly: any turn of these is canonical, and PWCCA's sums of absolute values differ between turns."""
    x, y = planted(60, 5, 6, 1.0, shared, seed=4)
    found = sim.pwcca(x, y, side="x")
    assert found == pytest.approx(pwcca_by_definition(x, y, turns=5_000), abs=4e-3)
    order = rng("order of tied").permutation(60)
    for exact in (False, True):
        assert sim.pwcca(x[order], y[order] @ mixing(rng("mix of tied"), 6), side="x", exact=exact) == pytest.approx(found, abs=1e-8)


def test_a_planted_correlation_is_found_and_the_rest_is_the_noise_floor() -> None:
    n, p, q = 20 * 30, 30, 30
    x, y = planted(n, p, q, 0.9, 5)
    rho = sim.correlations(sim.pair(x, y))
    # A planted correlation is estimated high, as the sides' own noise fits: for rho of 0.9 by about (1 - rho^2)^2 (p + q) / (2 rho n).
    assert rho[:5] == pytest.approx(np.full(5, 0.9), abs=0.03)
    assert rho[5] < 0.5
    floor = sim.gaussian_correlations(n, p - 5, q - 5)
    assert np.mean(rho[5:]) == pytest.approx(floor.mean(), abs=0.03)
    assert np.mean(rho[5:]) > 0.1  # not 0: reading it as similarity would be a mistake


@pytest.mark.parametrize(("n", "k", "m"), [(60, 5, 9), (40, 20, 20), (30, 18, 20)])
def test_the_gaussian_baseline_has_the_distribution_of_gaussian_rows(n: int, k: int, m: int) -> None:
    draw = rng("direct", n)
    direct = [rho_of(draw.normal(size=(n, k)), draw.normal(size=(n, m)))[: min(k, m)] for _ in range(120)]
    drawn = [sim.gaussian_correlations(n, k, m, seed) for seed in range(120)]
    for at in (0, min(k, m) // 2):
        one, other = ([row[at] for row in rows] for rows in (direct, drawn))
        error = math.sqrt((np.var(one) + np.var(other)) / 120)
        assert abs(np.mean(one) - np.mean(other)) < 4 * error + 1e-12


def test_baselines_of_cka_and_procrustes_have_the_gaussians_values() -> None:
    x, y = planted(400, 20, 12, 0.5, 3)
    draw = rng("direct products")
    direct = [(draw.normal(size=(400, 20)), draw.normal(size=(400, 12))) for _ in range(20)]
    found = sim.gaussian_baseline(sim.pair(x, y))
    assert found["cka"] == pytest.approx(np.mean([cka_by_definition(*sides, False) for sides in direct]), rel=0.15)
    assert found["procrustes"] == pytest.approx(np.mean([procrustes_by_definition(*sides) for sides in direct]), rel=0.05)


@given(st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_invariances(seed: int) -> None:
    x, y = planted(80, 5, 7, 0.8, 3, seed)
    draw = rng("invariance", seed)
    rotation = np.linalg.qr(draw.normal(size=(5, 5)))[0]
    before = sim.similarity(x, y).values
    rotated = sim.similarity(2.5 * x @ rotation + 4, y).values
    for name in ("svcca", "cca", "pwcca_y", "cka", "cka_debiased", "procrustes"):
        assert rotated[name] == pytest.approx(before[name], abs=1e-8), name
    mixed = sim.similarity(x @ mixing(draw, 5), y).values
    assert mixed["cca"] == pytest.approx(before["cca"], abs=1e-8)
    order = draw.permutation(80)
    shuffled = sim.similarity(x[order], y[order]).values
    swapped = sim.similarity(y, x).values
    for name in sim.MEASURES:
        assert shuffled[name] == pytest.approx(before[name], abs=1e-8), name
        assert swapped[{"pwcca_x": "pwcca_y", "pwcca_y": "pwcca_x"}.get(name, name)] == pytest.approx(before[name], abs=1e-8), name
    own = sim.similarity(x, x).values
    assert [own[name] for name in sim.MEASURES] == pytest.approx([1.0] * len(sim.MEASURES), abs=1e-8)


def test_independent_noise_falls_with_rows_and_both_baselines_say_where_it_stands() -> None:
    draw = rng("noise")
    values = []
    for n in (100, 1000, 10000):
        found = sim.similarity(draw.normal(size=(n, 20)), draw.normal(size=(n, 20)))
        values.append(found.values["svcca"])
        assert found.gaussian["svcca"] == pytest.approx(found.values["svcca"], abs=0.05)
        assert found.permuted["svcca"] == pytest.approx(found.values["svcca"], abs=0.06)
        assert abs(found.area) < 0.06
        assert abs(found.values["cka_debiased"]) < 0.02
    assert values[0] > 0.3 > values[1] > 0.05 > values[2] / 2


def placed(n: int, chunk: int) -> Array:
    """Which image takes the place of each of n, read from sums of maps that name image and position: rows x rows, ones and zeros."""
    maps = torch.eye(3 * n, dtype=torch.float64).view(n, 3, 3 * n).transpose(1, 2)[..., None]
    sums = Sums([(0, 1)], permuted=True)
    for part in maps.split(chunk):
        sums.add([part, part])
    found = np.rint((sums.permuted_pairs()[0, 1][0][1].cross_PQ + 1 / (3 * n)).numpy())
    assert np.kron(found[::3, ::3], np.eye(3)) == pytest.approx(found)  # whole images: each position is met by the same of another
    return np.asarray(found[::3, ::3])


@pytest.mark.parametrize("buffered", [60, 24, 16])
def test_the_permuted_side_is_a_permutation_of_whole_images(buffered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 60
    monkeypatch.setattr(moments, "HELD", buffered * 3 * 3 * n * 8)
    found = placed(n, 60)
    assert found.sum(0).tolist() == found.sum(1).tolist() == [1] * n
    assert not found.diagonal().any()
    assert all(np.array_equal(placed(n, chunk), found) for chunk in (2, 7, 16, 31))
    shift = found.argmax(1) - np.arange(n)
    assert len(set(shift.tolist())) > 20  # no shift of the order


def by_class(classes: int, each: int) -> tuple[Array, Array]:
    """Two sides whose images come class by class."""
    draw = rng("sorted classes")
    label = np.repeat(np.arange(classes), each)
    x, y = (2 * draw.normal(size=(classes, width))[label] + draw.normal(size=(len(label), width)) for width in (12, 8))
    return x, y


def test_images_in_the_order_of_their_classes_have_a_baseline() -> None:
    """Ten classes of 200: exchanged within the class, as by a shift of the order, the sides would stay as alike as they are."""
    x, y = by_class(10, 200)
    batches = [[torch.from_numpy(side[at : at + 32]) for at in range(0, 2000, 32)] for side in (x, y)]
    arrays, parts = sim.similarity(x, y), sim.similarity(x, y, chunk=13)
    streams = sim.similarity((nn.Identity(), batches[0]), (nn.Identity(), batches[1]))
    mixed = sim.similarity(x, (nn.Identity(), batches[1]))
    for found in (arrays, parts, streams, mixed):
        assert found.values["cka_debiased"] > 0.4
        assert abs(found.permuted["cka_debiased"]) < 0.01
        assert found.permuted["svcca"] == pytest.approx(found.gaussian["svcca"], abs=0.02)
        for name in sim.MEASURES:
            assert found.permuted[name] == pytest.approx(arrays.permuted[name], abs=1e-8), name


def test_a_stream_longer_than_the_buffer_is_exchanged_within_about_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/analysis.md says of the order of a loader: sorted classes need a buffer of about the stream, shuffled ones none."""
    x, y = by_class(10, 200)
    order = rng("order of classes").permutation(2000)
    found = {}
    for buffered in (16, 200, 1000):
        monkeypatch.setattr(moments, "HELD", buffered * 12 * 8)
        for name, rows in (("sorted", np.arange(2000)), ("shuffled", order)):
            sides = [(nn.Identity(), torch.from_numpy(side[rows]).split(32)) for side in (x, y)]
            found[name, buffered] = sim.similarity(sides[0], sides[1]).permuted["cka_debiased"]
    assert found["sorted", 16] > 0.3 > found["sorted", 200] > 0.05 > found["sorted", 1000]
    assert all(abs(found["shuffled", buffered]) < 0.01 for buffered in (16, 200, 1000))


def test_exchanged_frequencies_are_those_of_one_image() -> None:
    draw = rng("exchanged frequencies")
    x = torch.from_numpy(draw.normal(size=(40, 2, 4, 4)))
    streams = sim.similarity((nn.Identity(), x.split(7)), (nn.Identity(), x.split(7)), spatial="dft")
    arrays = sim.similarity(x, x, spatial="dft")
    for name in sim.MEASURES:
        assert streams.permuted[name] == pytest.approx(arrays.permuted[name], abs=1e-8), name
    assert arrays.permuted["cka"] < 0.2


def test_maps_of_changing_size_cannot_be_exchanged() -> None:
    draw = rng("changing size")
    parts = [torch.from_numpy(draw.normal(size=(20, 2, side, side))) for side in (4, 5)]
    stream = (nn.Identity(), parts)
    with pytest.raises(RequestError, match=r"25 positions an image after 16.*spatial=pool"):
        sim.similarity(stream, stream)
    assert sim.similarity(stream, stream, spatial="pool").values["cka"] == pytest.approx(1)
    assert sim.cka(stream, stream) == pytest.approx(1)


def test_a_shared_spectrum_is_no_similarity() -> None:
    """Strong directions that both sides have of their own: CKA of unrelated sides is far from the Gaussian's and near the permuted."""
    draw = rng("spectrum")
    scale = np.geomspace(1, 1e-2, 30)
    x, y = draw.normal(size=(200, 30)) * scale, draw.normal(size=(200, 30)) * scale
    found = sim.similarity(x, y)
    assert found.kept[0] < 25
    assert abs(found.values["svcca"] - found.permuted["svcca"]) < 0.05
    assert abs(found.values["cka"] - found.permuted["cka"]) < 0.05


# -- channels that are dead, doubled, or nearly dependent


@pytest.mark.parametrize("exact", [False, True])
def test_dead_and_doubled_channels_are_counted_and_change_no_correlation(exact: bool) -> None:
    x, y = planted(100, 6, 5, 0.6, 2)
    wide = np.concatenate([x, np.full((100, 3), 1e4), x[:, :2], np.zeros((100, 1))], 1)
    plain, found = sim.similarity(x, y, exact=exact), sim.similarity(wide, y, exact=exact)
    assert found.channels == (12, 5)
    assert found.dead == (4, 0)
    assert found.duplicates == (2, 0)
    assert found.kept == plain.kept
    assert all(math.isfinite(found.values[name]) for name in sim.MEASURES)
    for name in sim.OF_CCA:
        assert found.values[name] == pytest.approx(plain.values[name], abs=1e-8), name
    live = np.delete(wide, [6, 7, 8, 11], 1)
    assert found.values["cka_debiased"] == pytest.approx(cka_by_definition(live, y, True), abs=1e-8)


def test_a_constant_channel_is_dead_however_large_beside_small_ones() -> None:
    x, y = planted(50, 3, 3, 0.5, 1)
    wide = np.concatenate([(x - x.mean(0)) * 1e-9, np.full((50, 1), 1e5 / 3)], 1)
    found = sim.similarity(wide, y, chunk=7)
    assert found.dead == (1, 0)
    assert found.values["cca"] == pytest.approx(sim.cca(x, y), abs=1e-8)


def test_a_channel_below_the_cut_is_no_direction_and_not_dead() -> None:
    x, y = planted(100, 4, 3, 0.5, 1)
    tiny = np.concatenate([x, rng("tiny").normal(size=(100, 1)) * 1e-7], 1)
    found = sim.similarity(tiny, y)
    assert (found.dead, found.rank) == ((0, 0), (4, 3))
    assert found.values["cca"] == pytest.approx(sim.cca(x, y), abs=1e-8)
    exact = sim.similarity(tiny, y, exact=True)
    assert (exact.dead, exact.rank) == ((0, 0), (5, 3))


def test_no_live_channel_is_an_error() -> None:
    with pytest.raises(WorkError, match="no channel ever changes"):
        sim.cka(np.ones((20, 3)), planted(20, 2, 2, 0, 1)[0])


def test_near_dependence_needs_the_triangular_factor() -> None:
    """Singular values down to 1e-8 of the largest: covariances hold directions down to 1e-6 and say how many; exact holds all."""
    x, y = planted(400, 20, 10, 0.9, 4)
    u, v = (np.linalg.qr(rng("near", i).normal(size=(20, 20)))[0] for i in (0, 1))
    steep = (x - x.mean(0)) @ np.linalg.inv(np.linalg.qr(x - x.mean(0))[1]) @ u * np.geomspace(1, 1e-8, 20) @ v
    expected = rho_of(steep, y).mean()
    assert sim.cca(steep, y, exact=True) == pytest.approx(expected, abs=1e-8)
    found = sim.similarity(steep, y)
    assert found.rank == (15, 10)
    assert sim.similarity(steep, y, exact=True).rank == (20, 10)


# -- maps


def test_fold_is_the_explicit_loop() -> None:
    draw = rng("fold")
    x, y = draw.normal(size=(9, 3, 4, 5)), draw.normal(size=(9, 2, 4, 5))
    rows_x = np.array([x[i, :, r, c] for i in range(9) for r in range(4) for c in range(5)])
    rows_y = np.array([y[i, :, r, c] for i in range(9) for r in range(4) for c in range(5)])
    found = sim.similarity(x, y, chunk=4)
    assert found.n == 180
    assert found.images == 9
    assert found.values["cca"] == pytest.approx(rho_of(rows_x, rows_y).mean(), abs=1e-10)
    some = sim.similarity(x, y, chunk=4, positions=7)
    assert some.n == 63


def test_pooled_and_interpolated_maps_of_two_sizes() -> None:
    draw = rng("sizes")
    x, y = draw.normal(size=(120, 3, 6, 6)), draw.normal(size=(120, 2, 3, 3))
    pooled = sim.similarity(x, y, spatial="pool")
    assert pooled.values["cca"] == pytest.approx(rho_of(x.mean((2, 3)), y.mean((2, 3))).mean(), abs=1e-10)
    large = torch.nn.functional.interpolate(torch.from_numpy(y), size=(6, 6), mode="bilinear").numpy()
    expected = sim.similarity(x, large).values["cca"]
    assert sim.similarity(x, y, spatial="interpolate").values["cca"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(RequestError, match=r"3 x 3 and 6 x 6 cannot be folded.*pool, interpolate or dft"):
        sim.similarity(x, y)


@pytest.mark.parametrize("size", [(4, 4), (3, 3), (4, 5), (1, 1)])
def test_frequencies_make_up_the_plane(size: tuple[int, int]) -> None:
    maps = torch.from_numpy(rng("plane").normal(size=(6, 2, *size)))
    sums = Sums([(0, 1)], spatial="dft")
    views, weights = sums._views([maps, maps])
    assert sum(weights) == size[0] * size[1]
    energy = sum(weight * float(view[0].square().sum()) for view, weight in zip(views, weights, strict=True))
    assert energy == pytest.approx(float(maps.square().sum()))


@pytest.mark.parametrize(("large", "small"), [((6, 6), (3, 4)), ((6, 6), (4, 3)), ((6, 6), (4, 4)), ((4, 8), (4, 4)), ((5, 6), (6, 5))])
def test_frequencies_of_maps_of_two_sizes_are_those_of_the_whole_plane(large: tuple[int, int], small: tuple[int, int]) -> None:
    """Each frequency from minus to plus half of the smaller sides by itself, by definition."""
    draw = rng("two sizes", *large, *small)
    x, y = (draw.normal(size=(60, 3, *size)) for size in (large, small))
    h, w = min(large[0], small[0]), min(large[1], small[1])
    spectra = [np.fft.fft2(one) for one in (x, y)]
    found = []
    for fy in range(-((h - 1) // 2), h // 2 + 1):
        for fx in range(-((w - 1) // 2), w // 2 + 1):
            sides = [one[:, :, fy % one.shape[2], fx % one.shape[3]] for one in spectra]
            one, other = (np.concatenate([side.real, side.imag], 1) for side in sides)
            found.append(cka_by_definition(one, other, False))
    assert len(found) == h * w
    assert sim.similarity(x, y, spatial="dft").values["cka"] == pytest.approx(np.mean(found), abs=1e-10)


def test_dft_does_not_mind_a_shifted_network() -> None:
    """Every map rolled, as by a network that is the same up to a shift: folded it looks like another, by frequency it does not."""
    draw = rng("dft")
    x = draw.normal(size=(200, 2, 4, 4))
    y = np.roll(x, 1, axis=3)
    assert sim.similarity(x, y, spatial="dft").values["cca"] == pytest.approx(1, abs=1e-8)
    assert sim.similarity(x, y).values["cca"] < 0.2
    smaller = sim.similarity(x, draw.normal(size=(200, 3, 2, 2)), spatial="dft")
    assert 0 < smaller.values["cca"] < 0.4


# -- encoders


class Leaky(nn.Module):
    """A network whose features depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.norm.eval()  # one part rests while the whole trains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.norm(self.conv(x)))
        return out


def test_an_encoder_and_a_loader_are_what_its_activations_are() -> None:
    torch.manual_seed(0)
    net = Leaky().train()
    net.norm.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [torch.rand(5, 1, 6, 6) for _ in range(4)]
    found = sim.similarity((net, batches), (net, batches))
    assert found.values["cca"] == pytest.approx(1)  # no dropout: evaluation mode
    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not torch.is_inference_mode_enabled()
    with evaluating(net):
        maps = torch.cat([net(batch) for batch in batches])
    assert sim.similarity(maps, (net, batches)).values["cka"] == pytest.approx(1)
    with pytest.raises(RequestError, match="read once only"):
        sim.cka((net, iter(batches)), (net, batches))
    with pytest.raises(RequestError, match="one side has more images"):
        sim.cka((net, batches), (net, batches[:3]))


def test_nothing_that_is_not_finite_passes() -> None:
    x, y = planted(30, 3, 3, 0.5, 1)
    x[4, 1] = np.nan
    with pytest.raises(WorkError, match="not finite"):
        sim.cka(x, y)


# -- what other packages get wrong: reference/transfer-learning.md, section 4


def test_does_not_repeat_pf1_options_by_position() -> None:
    """A threshold given by position landed on another argument, and the loop ran five times whatever happened."""
    x, y = planted(60, 4, 4, 0.5, 1)
    for name in ("cca", "svcca", "pwcca", "cka", "similarity", "pair"):
        options = list(inspect.signature(getattr(sim, name)).parameters.values())[2:]
        assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options), name
    with pytest.raises(TypeError):
        sim.svcca(x, y, 0.98)  # type: ignore[call-arg]
    assert sim.svcca(x, y, threshold=0.9) == sim.svcca(x, y, threshold=0.9)


def test_does_not_repeat_pf2_weights_of_the_wrong_side() -> None:
    x, y = planted(200, 4, 9, 0.7, 3)
    assert sim.pwcca(x, y, side="y") == pytest.approx(pwcca_by_definition(y, x), abs=1e-8)
    assert sim.pwcca(y, x, side="x") == pytest.approx(sim.pwcca(x, y, side="y"), abs=1e-10)
    assert sim.pwcca(x, y, side="x") != pytest.approx(sim.pwcca(x, y, side="y"), abs=1e-3)


def test_does_not_repeat_pf3_one_side_unchecked() -> None:
    """Only the first side's channels were counted against the rows; a rank-deficient side gave NaN."""
    draw = rng("pf3")
    for shapes in ((40, 5), (5, 40)):
        x, y = (draw.normal(size=(30, width)) for width in shapes)
        with pytest.raises(RequestError, match="too few rows"):
            sim.cca(x, y)
    low = draw.normal(size=(80, 3)) @ draw.normal(size=(3, 12))
    assert math.isfinite(sim.cca(low, draw.normal(size=(80, 6))))


def test_does_not_repeat_pf4_no_number_at_the_whole() -> None:
    x, y = planted(100, 5, 5, 0.5, 2)
    assert sim.svcca(x, y, threshold=1.0) == pytest.approx(rho_of(x, y).mean(), abs=1e-10)
    held = sim.pair(x, y)
    assert held.x.leading(1.0, "s2") == 5
    # The direction that reaches the share is kept; energies of s and of s squared are told apart.
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert held.x.leading(float(s[0] ** 2 / (s**2).sum()), "s2") == 1
    assert held.x.leading(float(s[0] ** 2 / (s**2).sum()) + 1e-9, "s2") == 2
    assert sim.svcca(x, y, threshold=0.7, energy="s") == pytest.approx(rho_of(x, y, 0.7, 1).mean(), abs=1e-10)


def test_does_not_repeat_pf5_baseline_centred_along_the_wrong_axis() -> None:
    """Centred by row, Gaussian rows lose no column mean, and a shifted side would correlate with a shifted side."""
    x, y = planted(500, 10, 10, 0.0, 1)
    plain, shifted = sim.similarity(x, y), sim.similarity(x + 1000, y + 1000)
    for found in (plain, shifted):
        direct = [[rng("pf5", i, side).normal(size=(500, 10)) for side in "xy"] for i in range(30)]
        expected = np.mean([rho_of(sides[0], sides[1]).mean() for sides in direct])
        assert found.gaussian["cca"] == pytest.approx(expected, abs=0.01)
        assert found.permuted["cca"] == pytest.approx(expected, abs=0.05)


def test_does_not_repeat_pf6_channels_as_samples() -> None:
    draw = rng("pf6")
    x = draw.normal(size=(40, 5, 3, 3))
    y = x[:, :, ::-1, ::-1].copy()  # every image turned: as channels x (images, positions) almost nothing would change
    found = sim.similarity(x, y)
    assert found.n == 40 * 9
    assert found.channels == (5, 5)
    assert found.values["cka"] < 0.4


def test_does_not_repeat_pf7_division_by_nothing() -> None:
    x, y = planted(100, 4, 4, 0.5, 2)
    for wide in (np.concatenate([x, x], 1), np.concatenate([x, x @ np.ones((4, 1))], 1), np.concatenate([x, 0 * x], 1)):
        for exact in (False, True):
            assert sim.cca(wide, y, exact=exact) == pytest.approx(sim.cca(x, y, exact=exact), abs=1e-8)


def test_does_not_repeat_pf8_uncentred_weights() -> None:
    x, y = planted(200, 6, 6, 0.7, 3)
    assert sim.pwcca(x + 1e3, y, side="x") == pytest.approx(sim.pwcca(x, y, side="x"), abs=1e-8)


def test_does_not_repeat_pf9_everything_alike_for_few_rows() -> None:
    """Fewer rows than channels make any two sides identical to CCA."""
    draw = rng("pf9")
    x, y = draw.normal(size=(20, 50)), draw.normal(size=(20, 50))
    with pytest.raises(RequestError, match=r"too few rows for CCA.*cka\(debiased=True\)"):
        sim.svcca(x, y)
    assert sim.svcca(x, y, threshold=1.0, allow_small_n=True) == pytest.approx(1)
    with pytest.raises(RequestError, match="correlations are 1 whatever the images"):
        sim.cca(draw.normal(size=(30, 20)), draw.normal(size=(30, 12)))
    assert abs(sim.cka(x, y, debiased=True)) < 0.2


@pytest.mark.parametrize("shape", [(30,), (), (3, 4, 5), (20, 0)])
def test_does_not_repeat_pf10_errors_that_do_not_say_what_to_do(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="give images x channels"):
        sim.cka(np.zeros(shape), np.zeros(shape))
    with pytest.raises(RequestError, match="PWCCA weighs with the channels of side x or y"):
        sim.pwcca(*planted(50, 3, 3, 0.5, 1), side="z")
