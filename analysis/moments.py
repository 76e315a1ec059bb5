"""Two representations of the same images as running sums: what all similarities are made of, with no activations kept.

    sums = Sums([(0, 1)], permuted=True)
    for maps in chunks: sums.add(maps)                  # one array a side: rows x channels, or maps N, C, h, w
    held = sums.pairs()[0, 1]                           # [(weight, Pair)]: one, or one a spatial frequency

Rows are shifted by the first chunk's median and summed in float64, so that chunks give what the whole gives. `exact` keeps the triangular
factor of [1 X Y] instead of covariances, whose condition number is the square: slower, and right to 1e-8 where channels nearly depend on
each other. The permuted side is the other images' activations (`Exchange`): same spectrum, nothing in common but what any two share.

Legend: N rows, P Q channels of the two sides, K L directions kept, C h w a map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import RequestError, WorkError
from base.seeds import rng

Spatial = Literal["fold", "pool", "interpolate", "dft"]
CUT = 1e-6  # of the largest singular value: below it, squared, a covariance holds rounding
SAME = 1e-13  # of a channel's variance: two channels that are further apart are two
HELD = 2**23  # bytes of a side's rows that wait in the shuffle buffer
LEAST = 16  # images that it holds however large they are


@dataclass(frozen=True)
class Basis:
    """The directions of one side: singular values s_K of the centred rows, in falling order, and their channels V_PK.

    channels: all; dead: those that never change; duplicates: those equal to an earlier one. Both are left out of the directions, and so are
    channels below the cut, which are among the directions that `rank` does not count.
    """

    s_K: Tensor
    v_PK: Tensor
    kept_P: Tensor
    channels: int
    dead: int
    duplicates: int

    @property
    def rank(self) -> int:
        return len(self.s_K)

    def leading(self, threshold: float, energy: str) -> int:
        """How many directions hold that share of the energy (of s, or of its square), the one that reaches it included."""
        held_K = self.s_K if energy == "s" else self.s_K**2
        share_K = held_K.cumsum(0) / held_K.sum()
        # The sum's own rounding must not cost or add a direction at the whole.
        return self.rank if threshold >= 1 else min(self.rank, int((share_K < threshold * (1 - 1e-12)).sum()) + 1)


@dataclass(frozen=True)
class Pair:
    """Everything that a similarity of X and Y is a function of.

    core_KL: products of the two sides' orthonormal directions; cross_PQ: of the centred channels; own: Frobenius norms of X'X and Y'Y;
    norms: sums over rows of |x|^2 |y|^2, |x|^2 and |y|^2, which debiasing needs, for xy, xx and yy.
    """

    n: int
    x: Basis
    y: Basis
    core_KL: Tensor
    cross_PQ: Tensor
    own: tuple[float, float]
    norms: tuple[tuple[float, float, float], ...]

    @cached_property
    def nuclear(self) -> float:
        """The nuclear norm of X'Y."""
        return float(torch.linalg.svdvals(self.cross_PQ).sum())

    @cached_property
    def canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        """The canonical vectors of x (K, R), the correlations R, and the canonical vectors of y (R, L), all directions kept."""
        u_KR, rho_R, vt_RL = torch.linalg.svd(self.core_KL, full_matrices=False)
        return u_KR, rho_R.clamp(0, 1), vt_RL


class Rows:
    """A chunk of rows, shifted, with their squared lengths."""

    def __init__(self, x_NP: Tensor) -> None:
        self.x_NP, self.length_N = x_NP, x_NP.square().sum(1)

    def __len__(self) -> int:
        return len(self.x_NP)

    def __getitem__(self, at: slice) -> "Rows":
        return Rows(self.x_NP[at])


def cycle(n: int) -> NDArray[np.int64]:
    """Which of n images takes the place of each: one random cycle through all, keyed by n, so that none keeps its own."""
    order_N = rng("exchange", n).permutation(n)
    partner_N = np.empty(n, np.int64)
    partner_N[order_N] = np.roll(order_N, -1)
    return partner_N


class Exchange:
    """Which image takes the place of which, image by image as they come: a shuffle buffer, whose draws are the same for every side.

    The first `size` images wait. Each later one is given an image drawn from the buffer and takes its slot there; at the end those that
    waited are given what the buffer holds, by `cycle`. So every image is used once on either side and none is its own partner, however the
    images are chunked; a stream that the buffer holds is permuted as a whole, and a longer one within about `size` images.
    """

    def __init__(self, size: int) -> None:
        self.size, self.held, self.draw = size, 0, rng("exchange")

    def step(self, images: int) -> tuple[int, list[int], list[int]]:
        """How many of the next images wait; the others' partners and what the buffer holds then, as places in the buffer and the images."""
        wait = min(self.size - self.held, images)
        kept, partners = list(range(self.held + wait)), []
        for at, slot in enumerate(self.draw.integers(self.size, size=images - wait), self.held + wait):
            partners.append(kept[slot])
            kept[slot] = at
        self.held += wait
        return wait, partners, kept


class Side:
    """Sums of one side, and the rows that wait for their permuted partner or to be one."""

    def __init__(self, first_NP: Tensor, images: int) -> None:
        # The median is one of the rows' own numbers: a channel that never changes becomes exactly 0, and no outlier moves the others.
        self.centre_P = first_NP.median(0).values
        channels = first_NP.shape[1]
        self.n = 0
        self.sum_P, self.gram_PP, self.length_P = (first_NP.new_zeros(shape) for shape in ((channels,), (channels, channels), (channels,)))
        self.length = self.square = 0.0
        self.per = len(first_NP) // images
        self.head: list[Tensor] = []
        self.buffer = first_NP.new_zeros(0, self.per, channels)
        self.solved: tuple[int, Basis, float] | None = None

    def add(self, x_NP: Tensor) -> Rows:
        """The rows, shifted."""
        rows = Rows(x_NP - self.centre_P)
        self.n += len(rows)
        self.sum_P += rows.x_NP.sum(0)
        self.gram_PP += rows.x_NP.T @ rows.x_NP
        self.length += float(rows.length_N.sum())
        self.square += float(rows.length_N.square().sum())
        self.length_P += rows.length_N @ rows.x_NP
        return rows

    def waiting(self, rows: Rows, images: int) -> Rows:
        """The rows without those of the first images, which are given their partners at the end."""
        if images:
            self.head.append(rows.x_NP[: images * self.per])
        return rows[images * self.per :]

    def partners(self, rows: Rows, partners: list[int], kept: list[int]) -> Rows:
        """The partners that this side offers now; see `Exchange.step`."""
        pool = torch.cat([self.buffer, rows.x_NP.view(len(rows) // self.per, *self.buffer.shape[1:])])
        self.buffer = pool[kept]
        return Rows(pool[partners].flatten(0, 1))

    @property
    def mean_P(self) -> Tensor:
        return self.sum_P / self.n

    def basis(self) -> tuple[Basis, float]:
        """The directions of the rows so far, and the Frobenius norm of X'X: solved once for all pairs that this side is in."""
        if self.solved is None or self.solved[0] != self.n:
            xx_PP = self.gram_PP - self.n * torch.outer(self.mean_P, self.mean_P)
            self.solved = (self.n, _of_covariance(xx_PP), float(xx_PP.norm()))
        return self.solved[1:]

    def norms(self) -> tuple[float, float, float]:
        """As `Cross.norms`, of this side with itself."""
        mu_P = self.mean_P
        m = float(mu_P @ mu_P)
        # |x - mu|^2 = a - 2 x mu + m, squared and summed.
        own = self.square - 4 * float(self.length_P @ mu_P) + 2 * m * self.length
        own += 4 * float(mu_P @ self.gram_PP @ mu_P) - 3 * m * m * self.n
        spread = self.length - self.n * m
        return own, spread, spread


class Cross:
    """Sums of two sides together: covariances, or with `exact` the triangular factor of [1 X Y]."""

    def __init__(self, x: Side, y: Side, exact: bool) -> None:
        p, q = len(x.sum_P), len(y.sum_P)
        self.x, self.y, self.exact = x, y, exact
        self.xy_PQ = x.sum_P.new_zeros(p, q)
        self.ay_Q, self.bx_P, self.ab = x.sum_P.new_zeros(q), x.sum_P.new_zeros(p), 0.0
        self.triangle = x.sum_P.new_zeros(0, 1 + p + q)

    def add(self, x: Rows, y: Rows) -> None:
        self.xy_PQ += x.x_NP.T @ y.x_NP
        self.ay_Q += x.length_N @ y.x_NP
        self.bx_P += y.length_N @ x.x_NP
        self.ab += float(x.length_N @ y.length_N)
        if self.exact:
            joint = torch.cat([torch.ones_like(x.length_N)[:, None], x.x_NP, y.x_NP], 1)
            self.triangle = torch.linalg.qr(torch.cat([self.triangle, joint]), mode="r")[1]

    def norms(self) -> tuple[float, float, float]:
        """Sums over rows of |x|^2 |y|^2, |x|^2 and |y|^2, centred."""
        mu_P, nu_Q, n = self.x.mean_P, self.y.mean_P, self.x.n
        m, k = float(mu_P @ mu_P), float(nu_Q @ nu_Q)
        both = self.ab - 2 * float(nu_Q @ self.ay_Q) - 2 * float(mu_P @ self.bx_P) + k * self.x.length + m * self.y.length
        both += 4 * float(mu_P @ self.xy_PQ @ nu_Q) - 3 * n * m * k
        return both, self.x.length - n * m, self.y.length - n * k

    def pair(self) -> Pair:
        norms = (self.norms(), self.x.norms(), self.y.norms())
        if self.exact:
            p = len(self.x.sum_P)
            x, y = self.triangle[1:, 1 : 1 + p], self.triangle[1:, 1 + p :]
            return pair_of_rows(x, y, self.x.n, norms)
        n, mu_P, nu_Q = self.x.n, self.x.mean_P, self.y.mean_P
        xy_PQ = self.xy_PQ - n * torch.outer(mu_P, nu_Q)
        (x_basis, xx), (y_basis, yy) = self.x.basis(), self.y.basis()
        core_KL = _whitener(x_basis).T @ xy_PQ[x_basis.kept_P][:, y_basis.kept_P] @ _whitener(y_basis)
        return Pair(n, x_basis, y_basis, core_KL, xy_PQ, (xx, yy), norms)


def _whitener(basis: Basis) -> Tensor:
    return basis.v_PK / basis.s_K


def _kept(variance_P: Tensor, apart_PP: Tensor, dead: float, cut: float, same: float) -> tuple[Tensor, int, int]:
    """Channels above the cut that are not a copy of an earlier one, and how many of all are dead and copies. `apart`: squared distances."""
    live_P = variance_P > cut * variance_P.max()
    if not bool(live_P.any()):
        raise WorkError("no channel ever changes over these images: there is nothing to compare")
    close_PP = (apart_PP <= same * variance_P) & live_P[:, None] & live_P
    copy_P = close_PP.triu(1).any(0)
    return (live_P & ~copy_P).nonzero()[:, 0], int((variance_P <= dead * variance_P.max()).sum()), int(copy_P.sum())


def _of_covariance(xx_PP: Tensor) -> Basis:
    variance_P = xx_PP.diagonal()
    apart_PP = variance_P[:, None] + variance_P - 2 * xx_PP
    kept_P, dead, duplicates = _kept(variance_P, apart_PP, 0.0, CUT**2, SAME)  # shifted by its median, a constant is exactly 0
    values_P, v_PP = torch.linalg.eigh(xx_PP[kept_P][:, kept_P])
    s_P, v_PP = values_P.flip(0).clamp(min=0).sqrt(), v_PP.flip(1)
    some_P = s_P > CUT * s_P[0]
    return Basis(s_P[some_P], v_PP[:, some_P], kept_P, len(xx_PP), dead, duplicates)


def _of_rows(x_NP: Tensor, n: int) -> tuple[Basis, Tensor]:
    """The basis of centred rows, and the orthonormal u_NK."""
    cut = torch.finfo(x_NP.dtype).eps * max(n, x_NP.shape[1])
    apart_PP = torch.cdist(x_NP.T, x_NP.T, compute_mode="donot_use_mm_for_euclid_dist").square()
    kept_P, dead, duplicates = _kept(x_NP.square().sum(0), apart_PP, cut**2, cut**2, cut**2)
    u_NP, s_P, vt_PP = torch.linalg.svd(x_NP[:, kept_P], full_matrices=False)
    some_P = s_P > cut * s_P[0]
    return Basis(s_P[some_P], vt_PP[some_P].T, kept_P, x_NP.shape[1], dead, duplicates), u_NP[:, some_P]


def pair_of_rows(x_NP: Tensor, y_NQ: Tensor, n: int, norms: tuple[tuple[float, float, float], ...]) -> Pair:
    """Of centred rows, or of anything with the same products between columns, such as a triangular factor of them."""
    x, u_NK = _of_rows(x_NP, n)
    y, u_NL = _of_rows(y_NQ, n)
    own = (float((x_NP.T @ x_NP).norm()), float((y_NQ.T @ y_NQ).norm()))
    return Pair(n, x, y, u_NK.T @ u_NL, x_NP.T @ y_NQ, own, norms)


class Sums:
    """Sums of some sides and of pairs of them, fed chunk by chunk.

    Args:
        wanted: pairs of sides by their numbers.
        spatial: what becomes of maps: every position a row (fold), their mean (pool), the smaller map interpolated to the larger and
            folded, or each spatial frequency apart (dft; real and imaginary parts are channels).
        positions: at most so many positions of a map are folded, the same of every image, drawn from the map's size alone; None is all.
        permuted: also sums of each pair whose second side belongs to other images, exchanged within HELD bytes of its rows.
    """

    def __init__(
        self,
        wanted: Sequence[tuple[int, int]],
        *,
        spatial: Spatial = "fold",
        positions: int | None = None,
        exact: bool = False,
        permuted: bool = False,
    ) -> None:
        self.wanted, self.spatial, self.positions, self.exact = list(wanted), spatial, positions, exact
        self.permuted = permuted
        self.exchange: Exchange | None = None
        self.images = 0
        self.sides: list[list[Side]] = []  # by view (one, or one a frequency), then by side
        self.crosses: list[dict[tuple[int, int], Cross]] = []
        self.others: list[dict[tuple[int, int], Cross]] = []
        self.weights: list[float] = []
        self.closed = False

    def add(self, maps: Sequence[Tensor]) -> None:
        """One array a side, of the same images in the same order.

        Raises:
            RequestError: other than rows of channels or maps, sides of different numbers of images, maps of two sizes that are folded, and
                in the permuted side another number of positions than before.
            WorkError: a number that is not finite.
        """
        maps = [_checked(one) for one in maps]
        counts = {len(one) for one in maps}
        if len(counts) > 1:
            told = " and ".join(map(str, sorted(counts)))
            raise RequestError(f"the sides have {told} images", hint="give all the same images, in one order")
        views, self.weights = self._views(maps)
        if not self.sides:
            if len(maps[0]) < 2:
                raise RequestError("the first chunk holds one image", hint="give at least two at a time")
            self.sides = [[Side(rows, len(maps[0])) for rows in view] for view in views]
            for made in (self.crosses, self.others) if self.permuted else (self.crosses,):
                made += [{(i, j): Cross(view[i], view[j], self.exact) for i, j in self.wanted} for view in self.sides]
            image = max(sum(rows.nbytes for rows in side) for side in zip(*views, strict=True)) // len(maps[0])
            self.exchange = Exchange(max(LEAST, HELD // image)) if self.permuted else None
        self.images += len(maps[0])
        wait, partners, kept = self.exchange.step(len(maps[0])) if self.exchange else (0, [], [])
        for at, view in enumerate(views):
            for side, rows in zip(self.sides[at], view, strict=True):
                if rows.shape[1] != len(side.sum_P):
                    raise RequestError(f"{rows.shape[1]} channels after {len(side.sum_P)} in the chunks before")
                if self.permuted and len(rows) != side.per * len(maps[0]):
                    now = f"{len(rows) // len(maps[0])} positions an image after {side.per} in the chunks before"
                    raise RequestError(f"{now}: these images cannot be exchanged", hint="spatial=pool")
            added = [side.add(rows) for side, rows in zip(self.sides[at], view, strict=True)]
            for (i, j), cross in self.crosses[at].items():
                cross.add(added[i], added[j])
            if self.permuted:
                ready = {i: self.sides[at][i].waiting(added[i], wait) for i in {i for i, _ in self.wanted}}
                late = {j: self.sides[at][j].partners(added[j], partners, kept) for j in {j for _, j in self.wanted}}
                for (i, j), cross in self.others[at].items():
                    cross.add(ready[i], late[j])

    def _views(self, maps: list[Tensor]) -> tuple[list[list[Tensor]], list[float]]:
        """Rows of every side, by view, and the views' weights."""
        flat = [one.ndim == 2 for one in maps]
        if all(flat):
            return [maps], [1.0]
        if any(flat) or self.spatial == "pool":
            return [[one if one.ndim == 2 else one.mean((2, 3)) for one in maps]], [1.0]
        sizes = sorted({(int(one.shape[2]), int(one.shape[3])) for one in maps})
        if self.spatial == "dft":
            return _frequencies(maps, min(size[0] for size in sizes), min(size[1] for size in sizes))
        if self.spatial == "interpolate":
            size = (max(size[0] for size in sizes), max(size[1] for size in sizes))
            maps = [torch.nn.functional.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps]
        elif len(sizes) > 1:
            listed = " and ".join(f"{h} x {w}" for h, w in sizes)
            raise RequestError(f"maps of {listed} cannot be folded position by position", hint="spatial=pool, interpolate or dft")
        return [[_fold(one, self.positions) for one in maps]], [1.0]

    def pairs(self) -> dict[tuple[int, int], list[tuple[float, Pair]]]:
        """The pairs as they stand: a weight and a Pair for each view, weights adding to 1."""
        return self._pairs(self.crosses)

    def permuted_pairs(self) -> dict[tuple[int, int], list[tuple[float, Pair]]]:
        """The same with the second side's images permuted. Nothing can be added afterwards."""
        if self.exchange and not self.closed:
            self.closed = True
            for view, crosses in zip(self.sides, self.others, strict=True):
                for (i, j), cross in crosses.items():
                    cross.add(Rows(torch.cat(view[i].head)), Rows(view[j].buffer[cycle(self.exchange.held)].flatten(0, 1)))
        return self._pairs(self.others)

    def _pairs(self, crosses: list[dict[tuple[int, int], Cross]]) -> dict[tuple[int, int], list[tuple[float, Pair]]]:
        if not crosses:
            raise RequestError("no images were given")
        found: dict[tuple[int, int], list[tuple[float, Pair]]] = {}
        for names in self.wanted:
            views = [(weight, cross[names]) for weight, cross in zip(self.weights, crosses, strict=True)]
            # A frequency that a side has nothing of but rounding compares nothing.
            least = [CUT**2 * max(spread(cross) for _, cross in views) for spread in (_x_spread, _y_spread)]
            live = [(weight, cross) for weight, cross in views if _x_spread(cross) >= least[0] and _y_spread(cross) >= least[1]]
            whole = math.fsum(weight for weight, _ in live)
            found[names] = [(weight / whole, cross.pair()) for weight, cross in live]
        return found


def _x_spread(cross: Cross) -> float:
    return cross.norms()[1]


def _y_spread(cross: Cross) -> float:
    return cross.norms()[2]


def _checked(one: Tensor) -> Tensor:
    if one.ndim not in (2, 4) or not one.shape[1]:
        raise RequestError(
            f"activations of shape {tuple(one.shape)} are neither rows of channels nor maps",
            hint="give images x channels, or images x channels x height x width; one channel is x[:, None]",
        )
    held = one.double()
    if not bool(torch.isfinite(held).all()):
        raise WorkError("an activation is not finite")
    return held


def _fold(map_NChw: Tensor, positions: int | None) -> Tensor:
    """Rows (image, position) x C, an image's positions together."""
    flat_NSC = map_NChw.flatten(2).transpose(1, 2)
    places = flat_NSC.shape[1]
    if positions is not None and positions < places:
        drawn = rng("positions", *map_NChw.shape[2:]).permutation(places)[:positions]
        flat_NSC = flat_NSC[:, torch.from_numpy(drawn).to(flat_NSC.device)]
    return flat_NSC.reshape(-1, flat_NSC.shape[2])


def _frequencies(maps: list[Tensor], h: int, w: int) -> tuple[list[list[Tensor]], list[float]]:
    """Each spatial frequency that all maps have: rows N x 2C. One that is the mirror image of another in every map is counted with it: the
    smaller map's highest frequency has its mirror image outside of what the larger one shares, and stands for itself."""
    spectra = [torch.fft.fft2(one, norm="ortho") for one in maps]
    views: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
    weights: dict[tuple[tuple[int, int], ...], float] = {}
    for fy in range(-((h - 1) // 2), h // 2 + 1):
        for fx in range(-((w - 1) // 2), w // 2 + 1):
            at, mirror = (tuple((sign * fy % one.shape[2], sign * fx % one.shape[3]) for one in maps) for sign in (1, -1))
            if mirror in weights and mirror != at:
                weights[mirror] += 1
                continue
            parts = [s[:, :, y, x] for s, (y, x) in zip(spectra, at, strict=True)]
            views[at], weights[at] = [torch.cat([part.real, part.imag], 1) for part in parts], 1.0
    return list(views.values()), list(weights.values())
