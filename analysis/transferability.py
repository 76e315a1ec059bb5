"""Which source will do best on a task, guessed from frozen features and labels alone: nothing is trained.

    logme(features_ND, target)       h_score(features_ND, target)       leep(source_probabilities_NZ, target)
    leep(soft_clusters(features_ND, clusters=15), target)               for an encoder that has no classes of its own (N-LEEP)

Whether guesses order sources as their results do is analysis.correlation.

`target` is a class a row, int (N,), or labels that do not exclude each other, float (N, L) of 0, 1 and NaN for unknown: then each label is
a task of two classes over the rows that know it, and the score is the mean over labels that have both. Higher is better; only the order
means anything, and only among sources on one task. All in float64.

Legend: N images, D features, Z classes of the source, K classes of the task, L labels, R rank.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.errors import RequestError

Array = NDArray[np.float64]
STEPS = 10_000  # of the fixed point; it takes some ten, and many only where features say nothing


def logme(features_ND: NDArray[Any], target: NDArray[Any]) -> float:
    """Maximum over a prior and a noise precision of the log evidence of a linear model of the labels, by image, mean over classes.

    You et al., LogME, ICML 2021, eq. 2 and algorithm 1: features as they are, without an intercept, one 0/1 vector a class. The fixed
    point runs on the ratio t of the precisions, from 1 to the maximum that is nearest; the noise at a ratio is known in closed form.
    Infinite where a linear map gives the labels exactly.

    Raises:
        RequestError: no class is there beside another; shapes that do not fit; numbers that are not finite.
    """
    x_ND = _features(features_ND)

    def of(x_ND: Array, y_N: NDArray[np.int64]) -> float:
        u_NR, s_R, _ = np.linalg.svd(x_ND, full_matrices=False)
        return float(np.mean([_evidence(u_NR, s_R**2, (y_N == k).astype(np.float64)) for k in np.unique(y_N)]))

    return _over_labels(x_ND, target, of)


def _evidence(u_NR: Array, energy_R: Array, y_N: Array) -> float:
    """Log evidence by image at its maximum over the two precisions, from the singular vectors and squared singular values of the rows."""
    n, along_R = len(y_N), (u_NR.T @ y_N) ** 2
    off = float(y_N @ y_N - along_R.sum())  # of the labels, what no feature reaches
    if off < 4 * n * np.finfo(float).eps * float(y_N @ y_N):
        if len(energy_R) < n:
            return math.inf
        off = 0.0  # rounding

    def at(t: float) -> float:
        noise = (float((along_R * (t / (t + energy_R))).sum()) + off) / n
        if noise <= np.finfo(float).tiny:
            return math.inf
        return -0.5 * (math.log(2 * math.pi * noise) + 1) - 0.5 * float(np.log1p(energy_R / t).sum()) / n

    t, value = 1.0, at(1.0)
    for _ in range(STEPS):
        shrink_R = energy_R / (t + energy_R)
        used = float(shrink_R.sum())
        length = float((along_R * shrink_R / (t + energy_R)).sum())
        rest = float((along_R * (t / (t + energy_R)) ** 2).sum()) + off
        if length <= 0 or n - used <= 0 or rest <= 0:
            break
        t = used / length * rest / (n - used)
        before, value = value, at(t)
        if not math.isfinite(value) or abs(value - before) <= 1e-13 * (1 + abs(value)):
            break
    return value


def h_score(features_ND: NDArray[Any], target: NDArray[Any]) -> float:
    """Trace of the pseudo-inverse of the features' covariance times that of their class means: 0 to K - 1.

    Bao et al., An Information-Theoretic Approach to Transferability, ICIP 2019, definition 2. Directions without variance are left out.
    Features that say nothing reach D / (N - 1) of K - 1 on the average.

    Raises:
        RequestError: as `logme`, and images too few for features of a covariance that is not singular: then it tells of their ranks alone.
    """

    def of(x_ND: Array, y_N: NDArray[np.int64]) -> float:
        if len(x_ND) - 1 <= x_ND.shape[1]:
            of_what = f"{len(x_ND)} labelled images and {x_ND.shape[1]} features"
            raise RequestError(f"no H-score of {of_what}, whose covariance is singular", hint="more labelled images than features")
        u_NR, s_R, _ = np.linalg.svd(x_ND - x_ND.mean(0), full_matrices=False)
        u_NR = u_NR[:, s_R > s_R.max(initial=0.0) * np.finfo(float).eps * max(x_ND.shape)]
        # In orthonormal directions the covariance is the identity over N.
        return float(sum((y_N == k).sum() * float(np.square(u_NR[y_N == k].mean(0)).sum()) for k in np.unique(y_N)))

    return _over_labels(_features(features_ND), target, of)


def leep(probability_NZ: NDArray[Any], target: NDArray[Any]) -> float:
    """Mean log likelihood of the labels when each is drawn by way of the source's own classes: 0 at best.

    Nguyen et al., LEEP, ICML 2020, eq. 1 and 2.

    Args:
        probability_NZ: what the source's classifier gives each of its classes, rows adding to 1.

    Raises:
        RequestError: as `logme`, and rows that are no probabilities.
    """
    p_NZ = _features(probability_NZ)
    if (p_NZ < 0).any() or not np.allclose(p_NZ.sum(1), 1, atol=1e-4):
        raise RequestError("rows are not probabilities of the source's classes", hint="softmax of its logits, or soft_clusters(features)")

    def of(p_NZ: Array, y_N: NDArray[np.int64]) -> float:
        hot_NK = (y_N[:, None] == np.unique(y_N)).astype(np.float64)
        joint_ZK = p_NZ.T @ hot_NK
        given_ZK = joint_ZK / np.maximum(joint_ZK.sum(1, keepdims=True), np.finfo(float).tiny)
        return float(np.log(((p_NZ @ given_ZK) * hot_NK).sum(1)).mean())

    return _over_labels(p_NZ, target, of)


def soft_clusters(features_ND: NDArray[Any], clusters: int) -> Array:
    """Probabilities (N, clusters) of a Gaussian mixture over the features' leading directions, in the place of a source's classes.

    Li et al., Ranking Neural Checkpoints, CVPR 2021 (N-LEEP): directions that hold 80 % of the variance, five clusters a class.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    x_ND = _features(features_ND)
    if clusters > len(x_ND):
        raise RequestError(f"{clusters} clusters of {len(x_ND)} images", hint="more images")
    if not x_ND.std(0).any():
        raise RequestError("features that are the same for every image have no clusters")
    reduced = PCA(n_components=0.8, svd_solver="full").fit_transform(x_ND)
    mixture = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-3 * float(reduced.var(0).mean()), random_state=0)
    return np.asarray(mixture.fit(reduced).predict_proba(reduced), np.float64)


def _features(given: NDArray[Any]) -> Array:
    x_ND = np.asarray(given, np.float64)
    if x_ND.ndim != 2 or not len(x_ND) or not x_ND.shape[1]:
        raise RequestError(f"features of shape {x_ND.shape}", hint="images x features")
    if not np.isfinite(x_ND).all():
        raise RequestError("features hold a number that is not finite")
    return x_ND


def _over_labels(x_ND: Array, target: NDArray[Any], of: Callable[[Array, NDArray[np.int64]], float]) -> float:
    """The score of classes, or the mean of the scores of labels that have both values."""
    target = np.asarray(target)
    if target.ndim not in (1, 2) or len(target) != len(x_ND):
        raise RequestError(f"{len(x_ND)} rows of features and labels of shape {target.shape}")
    if target.ndim == 1:
        if len(np.unique(target)) < 2:
            raise RequestError("every image is of one class")
        return of(x_ND, np.unique(target, return_inverse=True)[1].astype(np.int64))
    values = []
    for label in range(target.shape[1]):
        known = np.isfinite(target[:, label].astype(float))
        y_N = (target[known, label] > 0.5).astype(np.int64)
        if 0 < y_N.sum() < len(y_N):
            values.append(of(x_ND[known], y_N))
    if not values:
        raise RequestError("no label has images with it and images without it")
    return float(np.mean(values))
