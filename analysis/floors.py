"""Trivial predictors that every result must beat: if a trained encoder does not, the pipeline is broken or the labels are confounded.

floors = classification(train, val, test)      {"pixels": {...}, "metadata": {...}, "record": {...}}
floors = segmentation(train, test)             {"mean_mask": {...}}
fits = of_shards(url, kind, labels)[0.1]       the same from packed shards, by share of the training labels, on each of its subsets
mean = average(fits)

Pixels: logistic regression on 32 x 32 standardized pixels. Metadata: the share of positives in training among images of the same
stratum, no image looked at. Record: logistic regression on all that is written beside the image, such as age, sex and view. Mean mask:
the mean training mask, cut where training Dice is best. Everything is fitted on training images; only the strength of the penalty is
chosen, on validation. Metrics are fractions: auroc_mean, auroc_within_mean with strata.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from analysis.metadata import regression
from analysis.metrics import dice_per_image, stratified
from analysis.replicates import Scores, metric_B
from base.seeds import rng

Array = NDArray[np.float64]
Floors = dict[str, dict[str, float]]
SIDE = 32
PENALTIES = (1e-3, 1e-2, 1e-1)  # scikit-learn's C: its inverse
DRAWS = 5  # subsets of the labels on which a floor at a share of them is fitted
MINIMUM = 8  # training images below which a regression is not fitted


@dataclass(frozen=True)
class Arrays:
    """One split as plain arrays: images u8 (N, C, H, W), target (N, L) of 0, 1 or NaN, N strata, masks (N, H, W) of indices, NOT_JUDGED
    where nobody judged, N rows of metadata."""

    images: NDArray[np.uint8]
    target_NL: Array | None = None
    strata: Sequence[object] | None = None
    masks: NDArray[np.uint8] | None = None
    meta: Sequence[Mapping[str, Any]] | None = None

    def take(self, at: NDArray[np.int64]) -> "Arrays":
        """The images at those positions."""
        strata, meta = (None if rows is None else [rows[i] for i in at] for rows in (self.strata, self.meta))
        target_NL = None if self.target_NL is None else self.target_NL[at]
        return Arrays(self.images[at], target_NL, strata, None if self.masks is None else self.masks[at], meta)


def scores_metrics(score_NL: Array, split: Arrays) -> dict[str, float]:
    """auroc_mean and, where at least two strata are known, auroc_within_mean of any scores."""
    assert split.target_NL is not None
    count = len(score_NL)
    strata = None
    if split.strata is not None and stratified(split.strata):
        strata = np.array([None if value is None else str(value) for value in split.strata], object)
    held = Scores(0, np.arange(count).astype(str), np.arange(count).astype(object), split.target_NL, score_NL, None, strata)
    names = ["auroc_mean"] + (["auroc_within_mean"] if strata is not None else [])
    return {name: float(metric_B(held, name, np.ones((1, count)))[0]) for name in names}


def small_pixels(images: NDArray[np.uint8]) -> Array:
    """(N, C, H, W) u8 to (N, C * SIDE * SIDE) in 0..1, by area."""
    rows = [cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images]
    return np.stack(rows).reshape(len(rows), -1).astype(float) / 255


def pixels(train: Arrays, val: Arrays | None, test: Arrays) -> dict[str, float]:
    """Logistic regression on standardized 32 x 32 pixels, one a label; the penalty is the best of three by validation AUROC."""
    from sklearn.linear_model import LogisticRegression

    assert train.target_NL is not None
    raw = small_pixels(train.images)
    centre, spread = raw.mean(0), raw.std(0) + 1e-6
    x_train, x_test = (raw - centre) / spread, (small_pixels(test.images) - centre) / spread
    choose = val is not None and len(val.images) >= MINIMUM
    x_val = (small_pixels(val.images) - centre) / spread if val is not None and choose else x_test[:0]
    best, kept = -math.inf, {"auroc_mean": math.nan}
    for penalty in PENALTIES if choose else PENALTIES[1:2]:
        scores_val, scores_test = [np.zeros((len(x), train.target_NL.shape[1])) for x in (x_val, x_test)]
        for label in range(train.target_NL.shape[1]):
            known = np.isfinite(train.target_NL[:, label])
            y = train.target_NL[known, label] > 0.5
            if len(y) < MINIMUM or y.all() or not y.any():
                continue  # constant scores: 0.5
            fitted = LogisticRegression(C=penalty, max_iter=300).fit(x_train[known], y)
            scores_test[:, label] = fitted.decision_function(x_test)
            if choose:
                scores_val[:, label] = fitted.decision_function(x_val)
        reached = 0.0
        if val is not None and choose:
            found = scores_metrics(scores_val, val)
            reached = found.get("auroc_within_mean", found["auroc_mean"])
        if reached > best:
            best, kept = reached, scores_metrics(scores_test, test)
    return kept


def metadata(train: Arrays, test: Arrays) -> dict[str, float]:
    """Score of a test image: the share of positives among the training images of its stratum, shrunk to the overall share by one image.

    An image of no known stratum gets the overall share.
    """
    assert train.strata is not None
    assert test.strata is not None
    assert train.target_NL is not None
    overall: Array = np.nanmean(train.target_NL, axis=0)
    groups: dict[str, list[int]] = {}
    for at, value in enumerate(train.strata):
        if value is not None:
            groups.setdefault(str(value), []).append(at)
    share = {}
    for name, members in groups.items():
        inside_NL = train.target_NL[members]
        share[name] = np.asarray((np.nansum(inside_NL, axis=0) + overall) / (np.isfinite(inside_NL).sum(axis=0) + 1), float)
    return scores_metrics(np.stack([(overall if value is None else share.get(str(value), overall)) for value in test.strata]), test)


def classification(train: Arrays, val: Arrays | None, test: Arrays) -> Floors:
    """Floors of a classification task; `metadata` only where the test images have at least two known strata, `record` where something is
    written beside the images that varies."""
    found = {"pixels": pixels(train, val, test)}
    if train.strata is not None and test.strata is not None and stratified(test.strata):
        found["metadata"] = metadata(train, test)
    if train.meta is not None and test.meta is not None and train.target_NL is not None:
        scores_NL = regression(train.meta, train.target_NL, test.meta)
        if scores_NL is not None:
            found["record"] = scores_metrics(scores_NL, test)
    return found


def segmentation(train: Arrays, test: Arrays) -> Floors:
    """The mean training mask, thresholded where its mean training Dice is best, as the prediction for every test image.

    Images without a mask (NOT_JUDGED everywhere) and pixels that nobody judged are left out, as the cells leave them out; empty where a
    split has no others.
    """
    (truth, known), (target, judged) = _masks(train), _masks(test)
    if not len(truth) or not len(target):
        return {}
    mean = truth.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    best, cut = -1.0, 0.5
    for threshold in np.linspace(0.05, 0.95, 19):
        reached = float(dice_per_image((mean >= threshold) & known, truth).mean())
        if reached > best:
            best, cut = reached, float(threshold)
    return {"mean_mask": {"dice": float(dice_per_image((mean >= cut) & judged, target).mean()), "threshold": cut}}


def _masks(split: Arrays) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What is outlined, and what was judged, of the images that have a mask."""
    from shards.card import NOT_JUDGED

    assert split.masks is not None
    judged = split.masks != NOT_JUDGED
    there = judged.reshape(len(judged), -1).any(axis=1)
    return (split.masks[there] > 0) & judged[there], judged[there]


def average(found: Sequence[Floors]) -> Floors:
    """Mean of each number over the fits that have it."""
    names = {(name, metric): None for held in found for name, values in held.items() for metric in values}
    result: Floors = {}
    for name, metric in names:
        held = [fit[name][metric] for fit in found if metric in fit.get(name, {})]
        result.setdefault(name, {})[metric] = float(np.mean(held))
    return result


def share(patients: Sequence[str], fraction: float, draw: int) -> NDArray[np.int64]:
    """Positions of about that share of the images, whole patients, drawn by a keyed shuffle."""
    names = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    place = rng("floor labels", draw).permutation(int(names.max()) + 1)[names]
    order = np.argsort(place, kind="stable")
    wanted = max(1, round(fraction * len(order)))
    return np.sort(np.flatnonzero(place <= place[order[wanted - 1]]))


def of_shards(
    url: str,
    kind: str,
    labels: Sequence[str],
    stratify_by: str | None = None,
    fractions: Sequence[float] = (1.0,),
    *,
    size: int = 64,
    mask_class: str | None = None,
) -> dict[float, list[Floors]]:
    """Floors of a packed dataset for each share of its training labels, scored on its test split; empty without both splits.

    A floor sees as many labels as the cells it stands beside, but not the same ones: under 1 there is one of each of DRAWS subsets.

    Args:
        url: shards with their manifest. kind: "segmentation", or anything else for classification.
        labels: names of the labels, in the order of the targets. stratify_by: a metadata column, or None.
        size: square pixels at which images and masks are decoded. mask_class: the only class of the masks that counts.
    """
    from shards.card import NOT_JUDGED
    from shards.corpus import Corpus
    from shards.decoded import decode_all

    splits: dict[str, Arrays] = {}
    patients: list[str] = []
    for split in ("train", "val", "test"):
        corpus = Corpus(url, (split,), None)
        if not len(corpus):
            continue
        held = decode_all(corpus, size, labels)
        strata = [meta.get(stratify_by) for meta in held.meta] if stratify_by else None
        target = None
        if labels:
            target = np.where(held.mask > 0, held.target, np.nan).astype(float)
        seg = None if held.seg is None else np.asarray(held.seg)
        if seg is not None and mask_class is not None:
            index = corpus.card.mask_index(mask_class, url)
            seg = np.where(seg == NOT_JUDGED, seg, seg == index).astype(np.uint8)
        splits[split] = Arrays(np.asarray(held.images), target, strata, seg, held.meta)
        if split == "train":
            patients = [patient or f"image {i}" for i, patient in enumerate(held.patients)]
    if "train" not in splits or "test" not in splits:
        return {}
    found = {}
    for fraction in fractions:
        fits = []
        for draw in range(1 if fraction >= 1 else DRAWS):
            train = splits["train"] if fraction >= 1 else splits["train"].take(share(patients, fraction, draw))
            if kind == "segmentation":
                fits.append(segmentation(train, splits["test"]))
            else:
                fits.append(classification(train, splits.get("val"), splits["test"]))
        found[fraction] = fits
    return found
