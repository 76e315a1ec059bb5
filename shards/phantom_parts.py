"""What chest and fundus phantoms share: planted labels, fine texture, opacities, smooth fields, exact histograms.

A label may show only in the *place* of grey values, never in which grey values there are. `specify` guarantees it: it replaces every
pixel by the value of equal rank in a distribution that was drawn without knowing the labels, so mean, variance and any histogram of
an image are independent of its labels by construction, not by tuning.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from base.seeds import rng

PHANTOM_VERSION = 2  # raised when a change moves a pixel or an answer: shards packed before are then packed again
LABELS: tuple[str, ...] = ("texture", "count", "arrangement")
FEW, MANY = (2, 3), (6, 8)  # opacities, ends included: label count = 0 and 1


class Phantom(NamedTuple):
    """One generated sample. image_HW u8 (or image_HWC, RGB), labels 0 or 1, mask_HW u8 of class indices or None."""

    image: np.ndarray
    labels: dict[str, int]
    mask: np.ndarray | None
    metadata: dict[str, str | int]


class Streams(NamedTuple):
    """Separate random streams, so that what the labels change cannot shift what the labels must not change."""

    anatomy: np.random.Generator
    pathology: np.random.Generator
    display: np.random.Generator
    labels: dict[str, int]
    metadata: dict[str, str | int]


def patient_of(seed: int, index: int) -> str:
    """The patient of an image: of three images in a row the first two are one patient's."""
    return f"{seed}-{index // 3}-{index % 3 // 2}"


def streams(kind: str, seed: int, index: int) -> Streams:
    """The streams, the labels (independent, each 1 in half of the images) and the metadata (independent of all) of image `index`."""
    draw, person = rng("phantom", kind, seed, index, "labels"), rng("phantom", kind, patient_of(seed, index), "person")
    bits = draw.integers(0, 2, len(LABELS))
    metadata: dict[str, str | int] = {
        "view": ("AP", "PA")[draw.integers(2)],
        "sex": ("F", "M")[person.integers(2)],
        "age": int(person.integers(18, 90)),
    }
    return Streams(
        rng("phantom", kind, seed, index, "anatomy"),
        rng("phantom", kind, seed, index, "pathology"),
        rng("phantom", kind, seed, index, "display"),
        {name: int(bit) for name, bit in zip(LABELS, bits, strict=True)},
        metadata,
    )


@cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x_HW, y_HW in [-1, 1], y downwards, float32."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    y_HW, x_HW = np.meshgrid(axis, axis, indexing="ij")
    return x_HW, y_HW


@cache
def _frequencies(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Radius (cycles a pixel) and angle of the real 2-D Fourier plane of a size x size image, float32."""
    fy, fx = np.fft.fftfreq(size).astype(np.float32)[:, None], np.fft.rfftfreq(size).astype(np.float32)[None, :]
    return np.hypot(fx, fy), np.arctan2(fy, fx)


def step(distance: np.ndarray, size: int, softness: float = 1.0) -> np.ndarray:
    """Smooth 0 to 1 where `distance` (in units of the half side) grows through 0; `softness` is the edge's width in pixels."""
    return 0.5 + 0.5 * np.tanh(distance * np.float32(size / (2 * max(softness, 1e-3))))


def texture(draw: np.random.Generator, size: int, label: int) -> np.ndarray:
    """Fine oriented noise of unit variance, HW: lines that run along y for label 1, along x for label 0 (within 20 degrees).

    Band-limited Gaussian noise with a period of about 4 pixels, so a patch of 8 x 8 shows it; mirroring keeps the label.
    """
    radius, angle = _frequencies(size)
    towards = draw.normal(0, np.pi / 18) + (0.0 if label else np.pi / 2)  # of the wave vector, across the lines
    frequency = draw.uniform(0.20, 0.28)
    band = np.exp(-(((radius - frequency) / 0.05) ** 2)) * np.exp((np.cos(2 * (angle - towards)) - 1) * 5)
    noise = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((size, size), dtype=np.float32)) * band, s=(size, size))
    return (noise / (noise.std() + 1e-6)).astype(np.float32)


def smooth_field(draw: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Slow Gaussian variation of about unit variance, HW, float32, `cells` knots a side."""
    return cv2.resize(draw.standard_normal((cells, cells), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


def place(draw: np.random.Generator, candidates_N2: np.ndarray, count: int) -> np.ndarray:
    """`count` of the candidate points, far from one another (each next one is the best of a few), shape (count, 2)."""
    chosen = [candidates_N2[0]]
    for _ in range(count - 1):
        trial_K2 = candidates_N2[draw.integers(0, len(candidates_N2), 12)]
        gap_K = np.min(np.linalg.norm(trial_K2[:, None] - np.array(chosen)[None], axis=2), axis=1)
        chosen.append(trial_K2[int(np.argmax(gap_K))])
    return np.array(chosen, dtype=np.float32)


def blobs(draw: np.random.Generator, size: int, centres_N2: np.ndarray, area: float) -> np.ndarray:
    """Soft round opacities of peak 1 at the centres, HW; they share `area` (units of the half side squared), however many they are."""
    x_HW, y_HW = grid(size)
    shares_N = draw.uniform(0.7, 1.3, len(centres_N2))
    radii_N = np.sqrt(area * shares_N / shares_N.sum() / np.pi)
    out_HW = np.zeros((size, size), np.float32)
    for (cx, cy), radius in zip(centres_N2, radii_N, strict=True):
        stretch, turn = draw.uniform(0.85, 1.18), draw.uniform(0, np.pi)
        c, s = np.cos(turn), np.sin(turn)
        u = ((x_HW - cx) * c + (y_HW - cy) * s) / np.float32(radius * stretch)
        v = ((y_HW - cy) * c - (x_HW - cx) * s) / np.float32(radius / stretch)
        np.maximum(out_HW, np.exp(-np.float32(0.69) * (u * u + v * v) ** 2), out=out_HW)
    return out_HW


def specify(field: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Exact histogram specification: the k-th smallest of `field` (any shape, N numbers) becomes the k-th of sorted `values` (N, u8)."""
    out = np.empty(field.size, np.uint8)
    out[np.argsort(field, axis=None, kind="stable")] = values
    return out.reshape(field.shape)


def grey_values(draw: np.random.Generator, count: int, knots: list[tuple[float, float]], spread: float) -> np.ndarray:
    """`count` sorted u8 values along a random monotone curve near the knots (rank, grey), both 0..1; `spread` is the knots' jitter."""
    rank, grey = np.array(knots).T
    grey = np.sort(grey + draw.uniform(-spread, spread, len(grey)))
    curve = np.clip(np.interp((np.arange(count) + 0.5) / count, rank, grey), 0, 1) ** np.exp(draw.uniform(-0.25, 0.25))
    return np.rint(curve * 255).astype(np.uint8)
