"""How alike two representations of the same images are: CCA, SVCCA, PWCCA, linear CKA, Procrustes, and what unrelated ones would score.

    svcca(x_NP, y_NQ), pwcca(x, y, side="x"), cka(x, y, debiased=True), procrustes(x, y), cca(x, y)
    found = similarity((encoder, loader), (other, loader))     # all of them with both baselines: a Similarity
    found.values["svcca"], found.permuted["svcca"], found.gaussian["svcca"]

A side is an array or tensor, images x channels or images x channels x height x width, or (encoder, loader): anything callable that gives
one of these for a batch, and a list or DataLoader of batches, read in evaluation mode without gradients. Float64 on the device of the
activations, in chunks (analysis.moments), so that no side is ever in memory whole unless it was given so.

Definitions, of centred columns:
* CCA (Hotelling 1936): correlations rho of the two sides' orthonormal directions; `cca` is their mean over min(rank) directions.
* SVCCA (Raghu et al. 2017): the mean after each side is cut to the leading directions that hold 99 % of its energy, of s squared unless
  `energy="s"`; the direction that reaches the share is kept.
* PWCCA (Morcos et al. 2018): sum a_i rho_i / sum a_i, a_i = sum_j |<h_i, x_j>| with the canonical vectors h and channels x of one side,
  which must be named: the two sides' values differ.
* Linear CKA (Kornblith et al. 2019): |X'Y|^2 / (|X'X| |Y'Y|); debiased by the unbiased HSIC of Song et al. 2012: 0 for unrelated sides.
* Procrustes: 1 - |X'Y|_* / (|X| |Y|), a distance; here the similarity |X'Y|_* / (|X| |Y|).

Channels that never change are left out and counted; copies of a channel are counted and left out of the directions (CCA, SVCCA, PWCCA),
while CKA and Procrustes weigh a channel that stands twice twice, as they are defined. CCA of few rows is 1 whatever they hold: refused.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.evaluating import evaluating
from analysis.moments import Basis, Pair, Spatial, Sums, cycle
from base.errors import RequestError
from base.seeds import rng

Array = NDArray[np.float64]
Given = NDArray[Any] | Tensor | tuple[Callable[[Tensor], Tensor], Iterable[Tensor]]
THRESHOLD = 0.99
TIED = 1e-6  # correlations that are closer have no directions of their own that rounding would not turn
CHUNK = 4096  # images of a plain array that are summed at a time
MEASURES = ("svcca", "cca", "pwcca_x", "pwcca_y", "cka", "cka_debiased", "procrustes")
OF_CCA = MEASURES[:4]
FEWEST = 200  # coefficients that the Gaussian baseline averages over, from as many draws as that takes


def correlations(pair: Pair, threshold: float = 1.0, energy: str = "s2") -> Array:
    """The canonical correlations in falling order, after truncation to the leading directions that hold `threshold` of the energy."""
    k, m = pair.x.leading(threshold, energy), pair.y.leading(threshold, energy)
    whole = (k, m) == (pair.x.rank, pair.y.rank)
    rho_R = pair.canonical[1] if whole else torch.linalg.svdvals(pair.core_KL[:k, :m]).clamp(0, 1)
    return np.asarray(rho_R.cpu().numpy(), np.float64)


def too_few(pair: Pair, threshold: float = 1.0, energy: str = "s2") -> str | None:
    """Why canonical correlations of so few rows say nothing, or None."""
    k, m = pair.x.leading(threshold, energy), pair.y.leading(threshold, energy)
    for name, basis in (("first", pair.x), ("second", pair.y)):
        if basis.rank >= pair.n - 1:
            return f"{pair.n} rows span {pair.n - 1} directions and the {name} side fills them all"
    return (
        f"{pair.n} rows for {k} and {m} directions: at least {k + m - pair.n + 1} correlations are 1 whatever the images"
        if k + m >= pair.n
        else None
    )


def require_enough(pair: Pair, threshold: float = 1.0, energy: str = "s2") -> None:
    """Raises RequestError where `too_few` has a reason."""
    why = too_few(pair, threshold, energy)
    if why:
        hint = "give more images, or use cka(debiased=True), which needs fewer; allow_small_n=True computes it all the same"
        raise RequestError(f"too few rows for CCA: {why}", hint=hint)


def pwcca_of(pair: Pair, side: str) -> float:
    """PWCCA with the weights of that side, "x" or "y".

    Directions of equal correlation can be turned into one another, and |<h, x>| summed over them depends on the turn: there the definition
    has no value. Correlations closer than TIED are one, and weigh what they weigh on the mean over all turns.
    """
    u_KR, rho_R, vt_RL = pair.canonical
    if side not in ("x", "y"):
        raise RequestError(f"PWCCA weighs with the channels of side x or y, not of '{side}'")
    basis, canonical_KR = (pair.x, u_KR) if side == "x" else (pair.y, vt_RL.T)
    # <h_r, x_j> with h = U canonical and X = U s V': the rows themselves are not needed.
    along_RP = (canonical_KR.T * basis.s_K) @ basis.v_PK.T
    group_R = torch.nn.functional.pad((rho_R[:-1] - rho_R[1:] > TIED).cumsum(0), (1, 0))
    size_G = torch.bincount(group_R).to(rho_R.dtype)
    square_GP = along_RP.new_zeros(len(size_G), along_RP.shape[1]).index_add_(0, group_R, along_RP.square())
    # The mean of |cos| between a vector and the axes of a space of g dimensions, times g: 1 for a direction on its own.
    share_G = size_G * (torch.lgamma(size_G / 2) - torch.lgamma((size_G + 1) / 2)).exp() / math.sqrt(math.pi)
    weight_G = share_G * square_GP.sqrt().sum(1)
    rho_G = rho_R.new_zeros(len(size_G)).index_add_(0, group_R, rho_R) / size_G
    return float((weight_G * rho_G).sum() / weight_G.sum())


def cka_of(pair: Pair, debiased: bool) -> float:
    """Linear CKA. Debiased: ratio of unbiased estimates, so it can fall below 0; NaN for fewer than 4 rows."""
    cross = float(pair.cross_PQ.square().sum())
    if not debiased:
        return cross / (pair.own[0] * pair.own[1])
    if pair.n < 4:
        return math.nan
    squares = (cross, pair.own[0] ** 2, pair.own[1] ** 2)
    both, own_x, own_y = (_unbiased(square, norms, pair.n) for square, norms in zip(squares, pair.norms, strict=True))
    return both / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else math.nan


def _unbiased(square: float, norms: tuple[float, float, float], n: int) -> float:
    """Song et al. 2012, eq. 5, of linear kernels of centred rows, without the n x n matrices; times n (n - 3)."""
    both, of_x, of_y = norms
    return square - n / (n - 2) * both + of_x * of_y / ((n - 1) * (n - 2))


def procrustes_of(pair: Pair) -> float:
    """1 for sides that are rotations of one another, up to scale."""
    return pair.nuclear / math.sqrt(pair.norms[0][1] * pair.norms[0][2])


def measures(pair: Pair, threshold: float = THRESHOLD, energy: str = "s2", allow_small_n: bool = False) -> dict[str, float]:
    """All of MEASURES. Those of CCA are NaN where the rows are too few for them."""
    svcca = math.nan if too_few(pair, threshold, energy) and not allow_small_n else float(correlations(pair, threshold, energy).mean())
    whole = allow_small_n or not too_few(pair)
    return {
        "svcca": svcca,
        "cca": float(correlations(pair).mean()) if whole else math.nan,
        "pwcca_x": pwcca_of(pair, "x") if whole else math.nan,
        "pwcca_y": pwcca_of(pair, "y") if whole else math.nan,
        "cka": cka_of(pair, debiased=False),
        "cka_debiased": cka_of(pair, debiased=True),
        "procrustes": procrustes_of(pair),
    }


# -- what unrelated sides score


def gaussian_correlations(n: int, k: int, m: int, seed: int = 0) -> Array:
    """Canonical correlations of two independent Gaussian samples of n rows with k and m channels, each centred by column.

    Drawn from their exact distribution without the rows: rotated so that the first side spans the first k axes, the second side is k x m
    normal numbers over the triangular factor of a Wishart matrix (Bartlett 1933).
    """
    draw, freedom = rng("gaussian", n, k, m, seed), n - 1
    k, m = min(k, freedom), min(m, freedom)
    if freedom - k < m:  # no room for the Wishart matrix: the rows are few, and drawn
        x, y = (np.linalg.qr(draw.normal(size=(freedom, width)))[0] for width in (k, m))
        return np.clip(np.linalg.svd(x.T @ y, compute_uv=False), 0, 1)
    lower = _wishart_factor(draw, freedom - k, m)
    q = np.linalg.qr(np.concatenate([draw.normal(size=(k, m)), lower]))[0]
    return np.clip(np.linalg.svd(q[:k], compute_uv=False), 0, 1)


def _wishart_factor(draw: np.random.Generator, freedom: int, channels: int) -> Array:
    """Upper triangular T with T'T a Wishart matrix."""
    upper = np.triu(draw.normal(size=(channels, channels)), 1)
    return np.asarray(upper + np.diag(np.sqrt(draw.chisquare(freedom - np.arange(channels)))), np.float64)


def gaussian_baseline(pair: Pair, threshold: float = THRESHOLD, energy: str = "s2", allow_small_n: bool = False) -> dict[str, float]:
    """MEASURES of independent Gaussian rows of this pair's shape: as many rows and, for CCA, as many directions as were kept.

    Debiased CKA is 0 in expectation by construction, and is given as 0.
    """
    found = dict.fromkeys(MEASURES, math.nan)
    if allow_small_n or not too_few(pair, threshold, energy):
        found["svcca"] = _mean_gaussian(pair.n, pair.x.leading(threshold, energy), pair.y.leading(threshold, energy))
    if allow_small_n or not too_few(pair):
        # Weights of isotropic channels are about equal, so PWCCA's baseline is the mean, too.
        found["cca"] = found["pwcca_x"] = found["pwcca_y"] = _mean_gaussian(pair.n, pair.x.rank, pair.y.rank)
    cka, procrustes = _gaussian_products(pair.n, len(pair.x.kept_P), len(pair.y.kept_P))
    return {**found, "cka": cka, "cka_debiased": 0.0, "procrustes": procrustes}


@lru_cache(maxsize=1024)
def _mean_gaussian(n: int, k: int, m: int) -> float:
    draws = math.ceil(FEWEST / min(k, m))
    return float(np.mean([gaussian_correlations(n, k, m, seed).mean() for seed in range(draws)]))


@lru_cache(maxsize=1024)
def _gaussian_products(n: int, p: int, q: int) -> tuple[float, float]:
    """CKA and Procrustes of independent Gaussian rows of p and q channels, from the factors of their products."""
    draw, freedom = rng("gaussian products", n, p, q), n - 1
    if freedom < p + q:
        x, y = draw.normal(size=(freedom, p)), draw.normal(size=(freedom, q))
    else:
        x = np.concatenate([_wishart_factor(draw, freedom, p), np.zeros((q, p))])
        y = np.concatenate([draw.normal(size=(p, q)), _wishart_factor(draw, freedom - p, q)])
    cross = x.T @ y
    cka = float((cross**2).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))
    return cka, float(np.linalg.norm(cross, "nuc") / (np.linalg.norm(x) * np.linalg.norm(y)))


# -- all of it


@dataclass(frozen=True)
class Similarity:
    """MEASURES of two sides, and of unrelated ones beside them.

    n: rows; images: of which they come; kept: directions after SVCCA's truncation, x then y; rank: before it; channels, dead, duplicates:
    x then y (of the first spatial frequency with dft, where the numbers are means over frequencies and `coefficients` are all of them).
    few: why CCA's measures are NaN, or None. area: of the coefficients over the permuted ones, both in falling order over 0..1.
    """

    values: dict[str, float]
    gaussian: dict[str, float]
    permuted: dict[str, float]
    coefficients: Array
    permuted_coefficients: Array
    n: int
    images: int
    kept: tuple[int, int]
    rank: tuple[int, int]
    channels: tuple[int, int]
    dead: tuple[int, int]
    duplicates: tuple[int, int]
    few: str | None
    threshold: float
    energy: str
    exact: bool

    @property
    def area(self) -> float:
        return float(self.coefficients.mean() - self.permuted_coefficients.mean()) if len(self.coefficients) else math.nan


def summarise(
    views: Sequence[tuple[float, Pair]],
    permuted: Sequence[tuple[float, Pair]],
    images: int,
    *,
    threshold: float = THRESHOLD,
    energy: str = "s2",
    allow_small_n: bool = False,
    exact: bool = False,
) -> Similarity:
    """A Similarity of what `Sums` holds of two sides."""
    options = (threshold, energy, allow_small_n)
    few = None if allow_small_n else next((why for _, pair in views if (why := too_few(pair, threshold, energy))), None)

    def coefficients(held: Sequence[tuple[float, Pair]]) -> Array:
        return np.concatenate([np.zeros(0) if few else correlations(pair, threshold, energy) for _, pair in held])

    def both(get: Callable[[Basis], int]) -> tuple[int, int]:
        return get(views[0][1].x), get(views[0][1].y)

    return Similarity(
        values=_mean([(weight, measures(pair, *options)) for weight, pair in views]),
        gaussian=_mean([(weight, gaussian_baseline(pair, *options)) for weight, pair in views]),
        permuted=_mean([(weight, measures(pair, *options)) for weight, pair in permuted]),
        coefficients=coefficients(views),
        permuted_coefficients=coefficients(permuted),
        n=views[0][1].n,
        images=images,
        kept=both(lambda basis: basis.leading(threshold, energy)),
        rank=both(lambda basis: basis.rank),
        channels=both(lambda basis: basis.channels),
        dead=both(lambda basis: basis.dead),
        duplicates=both(lambda basis: basis.duplicates),
        few=few,
        threshold=threshold,
        energy=energy,
        exact=exact,
    )


def _mean(rows: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    return {name: math.fsum(weight * row[name] for weight, row in rows) for name in MEASURES}


def chunks(given: Given, chunk: int = CHUNK) -> Iterator[Tensor]:
    """A side's activations, chunk by chunk.

    Raises:
        RequestError: a loader that can be read only once, which two sides would share batch by batch.
    """
    if isinstance(given, tuple):
        encoder, loader = given
        if isinstance(loader, Iterator):
            raise RequestError("this loader can be read once only", hint="give a list of batches or a DataLoader")
        for batch in loader:
            with evaluating(encoder):  # by batch: two sides take turns, and the caller's own mode is not theirs
                given = encoder(batch)
            yield given
        return
    held = torch.as_tensor(given)
    if held.ndim == 0:
        raise RequestError("a single number is no representation", hint="give images x channels")
    yield from held.split(chunk)


def _sums(x: Given, y: Given, *, spatial: Spatial, positions: int | None, exact: bool, permuted: bool = False, chunk: int = CHUNK) -> Sums:
    sums = Sums([(0, 1)], spatial=spatial, positions=positions, exact=exact, permuted=permuted)
    sources = (chunks(x, chunk), chunks(y, chunk))
    held: list[Tensor | None] = [None, None]
    while True:
        for i, source in enumerate(sources):
            if held[i] is None:
                held[i] = next(source, None)
        one, other = held
        if one is None and other is None:
            return sums
        if one is None or other is None:
            raise RequestError("one side has more images than the other", hint="give both the same images, in one order")
        size = min(len(one), len(other))  # the sides may come in chunks of different sizes
        sums.add([one[:size], other[:size]])
        held = [rest[size:] if len(rest) > size else None for rest in (one, other)]


def pair(x: Given, y: Given, *, exact: bool = False) -> Pair:
    """Two sides as one Pair, maps folded."""
    return _sums(x, y, spatial="fold", positions=None, exact=exact).pairs()[0, 1][0][1]


def similarity(
    x: Given,
    y: Given,
    *,
    spatial: Spatial = "fold",
    positions: int | None = None,
    threshold: float = THRESHOLD,
    energy: str = "s2",
    exact: bool = False,
    allow_small_n: bool = False,
    chunk: int = CHUNK,
) -> Similarity:
    """All measures of two sides with both baselines.

    Args:
        spatial, positions, exact: see `Sums`.
        chunk: images of plain arrays that are summed at a time.

    Raises:
        RequestError: sides that do not fit; too few rows for CCA.
        WorkError: no channel changes, or a number is not finite.
    """
    whole = not isinstance(x, tuple) and not isinstance(y, tuple)
    sums = _sums(x, y, spatial=spatial, positions=positions, exact=exact, permuted=not whole, chunk=chunk)
    views = sums.pairs()[0, 1]
    if not allow_small_n:
        for _, held in views:
            require_enough(held, threshold, energy)
    if whole:
        # All is at hand: the images of one side are exchanged over the whole, where a stream has a bounded buffer.
        held_y = torch.as_tensor(y)
        exchanged = (held_y.__getitem__, torch.from_numpy(cycle(sums.images)).split(chunk))
        permuted = _sums(x, exchanged, spatial=spatial, positions=positions, exact=exact, chunk=chunk).pairs()[0, 1]
    else:
        permuted = sums.permuted_pairs()[0, 1]
    options: dict[str, Any] = {"threshold": threshold, "energy": energy, "allow_small_n": allow_small_n, "exact": exact}
    return summarise(views, permuted, sums.images, **options)


def cca(x: Given, y: Given, *, exact: bool = False, allow_small_n: bool = False) -> float:
    """Mean canonical correlation."""
    return svcca(x, y, threshold=1.0, exact=exact, allow_small_n=allow_small_n)


def svcca(
    x: Given, y: Given, *, threshold: float = THRESHOLD, energy: str = "s2", exact: bool = False, allow_small_n: bool = False
) -> float:
    """SVCCA. Raises RequestError for too few rows."""
    held = pair(x, y, exact=exact)
    if not allow_small_n:
        require_enough(held, threshold, energy)
    return float(correlations(held, threshold, energy).mean())


def pwcca(x: Given, y: Given, *, side: str, exact: bool = False, allow_small_n: bool = False) -> float:
    """PWCCA with the weights of one side. Raises RequestError for too few rows."""
    held = pair(x, y, exact=exact)
    if not allow_small_n:
        require_enough(held)
    return pwcca_of(held, side)


def cka(x: Given, y: Given, *, debiased: bool = False) -> float:
    """Linear CKA."""
    return cka_of(pair(x, y), debiased)


def procrustes(x: Given, y: Given) -> float:
    """Procrustes similarity, 1 minus the distance."""
    return procrustes_of(pair(x, y))
