"""First-layer filters: what they look like, how far training moved each, and how much of it is a Gabor function.

    before, after = first_filters(a.net), first_filters(b.net)           # (K, C, h, w)
    rows = table(before, after)                                          # a dict a filter
    gabor_scores(before), gabor_noise(before.shape)                      # share of variance in 0..1, and what noise scores

The Gabor score of a filter is the largest share of its variance over the kernel that one Gabor function explains (any direction, frequency,
width and centre of a grid, phase and amplitude by least squares), of the filter's first principal component over its input channels.
A grid finds something in noise, too: `gabor_noise` is the score that 95 % of Gaussian filters of the same shape stay under.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from base.errors import RequestError
from base.seeds import rng

Array = NDArray[np.float64]
SMALLEST = 5  # pixels: a kernel below that has no room for a wave
NOISE = 400  # Gaussian filters that the score's level in noise is taken of


def first_filters(net: nn.Module) -> Array:
    """The weights of the first convolution, K filters of C channels: (K, C, h, w).

    Raises:
        RequestError: no two-dimensional convolution.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.detach().cpu().double().numpy()
    raise RequestError("the network has no convolution")


def movement(before: Array, after: Array) -> tuple[Array, Array]:
    """How far each filter moved, as a share of its own length before, and the cosine between before and after.

    Raises:
        RequestError: filters of two shapes.
    """
    if before.shape != after.shape:
        raise RequestError(f"first filters of shapes {before.shape} and {after.shape} cannot be compared")
    one, two = (filters.reshape(len(filters), -1) for filters in (before, after))
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.linalg.norm(two - one, axis=1) / lengths[0]
        cosine = (one * two).sum(1) / (lengths[0] * lengths[1])
    same = (one == two).all(1)  # exactly: a filter that did not move has moved by 0, one without weights too
    return np.where(same, 0.0, moved), np.where(same, 1.0, np.clip(cosine, -1, 1))


def gabor_scores(filters: Array) -> Array:
    """Of each filter, in 0..1; NaN for kernels under 5 x 5 and for filters that are constant."""
    k, _, h, w = filters.shape
    if min(h, w) < SMALLEST:
        return np.full(k, np.nan)
    plane = np.stack([_component(one) for one in filters])
    plane = plane - plane.mean(1, keepdims=True)
    spread = (plane**2).sum(1)
    explained = np.zeros(k)
    for pair in _atoms(h, w):  # (2, h w): the orthonormal sine and cosine of one place, direction, frequency and width
        explained = np.maximum(explained, ((plane @ pair.T) ** 2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12 * (filters**2).sum((1, 2, 3)), np.minimum(1, explained / spread), np.nan)


def _component(one: Array) -> Array:
    """The first principal component of a filter's channels, C x (h w) -> h w."""
    flat = one.reshape(len(one), -1)
    _, s, vt = np.linalg.svd(flat - flat.mean(1, keepdims=True), full_matrices=False)
    return np.asarray(s[0] * vt[0], np.float64)


@lru_cache(maxsize=8)
def _atoms(h: int, w: int) -> tuple[Array, ...]:
    """Gabor functions of the kernel, each as an orthonormal pair without mean."""
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    size = min(h, w)
    found = []
    for angle in np.arange(12) * math.pi / 12:
        for cycles in (0.5, 0.75, 1.0, 1.5, 2.0, 2.5):  # over the kernel
            if cycles > size / 2:
                continue
            for width in (0.15, 0.25, 0.4):  # standard deviation of the envelope as a share of the kernel
                for shift in (-0.2, 0.0, 0.2):
                    for along in (-0.2, 0.0, 0.2):
                        u = (x - shift * size) * math.cos(angle) + (y - along * size) * math.sin(angle)
                        distance = (x - shift * size) ** 2 + (y - along * size) ** 2
                        envelope = np.exp(-distance / (2 * (width * size) ** 2))
                        phase = 2 * math.pi * cycles / size * u
                        pair = np.stack([(envelope * wave(phase)).reshape(-1) for wave in (np.cos, np.sin)])
                        pair -= pair.mean(1, keepdims=True)
                        found.append(np.linalg.qr(pair.T)[0].T)
    return tuple(found)


@lru_cache(maxsize=8)
def gabor_noise(shape: tuple[int, ...]) -> float:
    """The score that 95 % of Gaussian filters of this (K, C, h, w) shape stay under."""
    scores = gabor_scores(rng("gabor noise", *shape[1:]).normal(size=(NOISE, *shape[1:])))
    return float(np.quantile(scores, 0.95))


def table(before: Array, after: Array | None = None) -> list[dict[str, Any]]:
    """A row a filter: number, length, Gabor score; and with `after` how far it moved, cosine, length and score then."""
    rows: list[dict[str, Any]] = [
        {"filter": i, "norm": float(np.linalg.norm(one)), "gabor": float(score)}
        for i, (one, score) in enumerate(zip(before, gabor_scores(before), strict=True))
    ]
    if after is not None:
        moved, cosine = movement(before, after)
        scores = gabor_scores(after)
        for i, row in enumerate(rows):
            row |= {"movement": float(moved[i]), "cosine": float(cosine[i])}
            row |= {"norm_after": float(np.linalg.norm(after[i])), "gabor_after": float(scores[i])}
    return rows


def pictures(filters: Array, others: Array | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Filters as pictures, u8 (K, h, w, 3) with grey at 0: three channels as red, green and blue, others by their mean.

    A filter has one scale before and after, so that one which faded looks faded.
    """

    def channels(given: Array) -> Array:
        shown = given if given.shape[1] == 3 else np.repeat(given.mean(1, keepdims=True), 3, axis=1)
        return np.asarray(shown.transpose(0, 2, 3, 1))

    one, two = channels(filters), None if others is None else channels(others)
    largest = np.abs(one).max((1, 2, 3)) if two is None else np.maximum(np.abs(one).max((1, 2, 3)), np.abs(two).max((1, 2, 3)))
    scale = np.where(largest > 0, largest, 1)[:, None, None, None]

    def pixels(given: Array) -> NDArray[np.uint8]:
        return np.asarray(np.round(127.5 + 127.5 * given / scale), np.uint8)

    return pixels(one), None if two is None else pixels(two)
