"""What a cell reads: each split decoded once a node and mapped, label fractions, the shuffled-label control, training views.

    train = load(url, digest, "train", size, task, cache_dir)
    train = train.take(fraction_of(train, 0.1, seed))

Maps of decoded splits stay in the process (a few, newest first), so that the cells of a warm worker open them once.

Legend: N images, C channels, H W pixels, L labels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import RequestError, WorkError
from base.seeds import rng, seed_of
from finetune.task import Augmentation, Task
from shards import views
from shards.loader import NO_MASK, Corpus, Decoded, Targets, decode_all


@dataclass(frozen=True)
class Arrays:
    """One split: image_NCHW u8; target_NL and known_NL f32 for labels, or target_NHW f32 (0, 1, NOT_JUDGED) for masks; who, and of which
    stratum (None: not known). meta: the card's allow-listed metadata of each image, which `aggregate` and `stratify_by` read."""

    split: str
    image: NDArray[np.uint8]
    target: NDArray[np.float32]
    known: NDArray[np.float32]
    patients: tuple[str, ...]
    strata: tuple[str | None, ...]
    ids: tuple[str, ...]
    meta: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: NDArray[np.int64]) -> "Arrays":
        """The images at those positions. All of them in their order are these arrays themselves: what is mapped stays mapped."""
        if np.array_equal(index, np.arange(len(self))):
            return self
        return replace(
            self,
            image=self.image[index],
            target=self.target[index],
            known=self.known[index],
            patients=tuple(self.patients[i] for i in index),
            strata=tuple(self.strata[i] for i in index),
            ids=tuple(self.ids[i] for i in index),
            meta=tuple(self.meta[i] for i in index) if self.meta else (),
        )


@lru_cache(maxsize=8)
def _corpus(url: str, digest: str, split: str, cache_dir: str | None) -> Corpus:
    corpus = Corpus(url, (split,), cache_dir)
    if corpus.manifest.digest != digest:
        raise WorkError("these shards are not those that the cell was planned for", where=url, hint="plan the study again")
    return corpus


# Six: a full cell holds train (enlarged), val and test; a worker alternates between two datasets at most.
@lru_cache(maxsize=6)
def _decoded(url: str, digest: str, split: str, size: int, cache_dir: str | None) -> Decoded:
    return decode_all(_corpus(url, digest, split, cache_dir), size)


def describe(url: str, digest: str, cache_dir: str | None) -> Corpus:
    """The training corpus, for its manifest and card. Raises WorkError when the manifest is not the planned one."""
    return _corpus(url, digest, "train", cache_dir)


NOT_JUDGED = NO_MASK  # a pixel outside the field of view, where a target is neither 0 nor 1


def load(url: str, digest: str, split: str, size: int, task: Task, cache_dir: str | None = None) -> Arrays:
    """A split under the task's view of labels, at `size` pixels (antialiased resize). Nothing is copied that is not changed.

    Raises:
        RequestError: the dataset lacks labels or masks that the task needs.
        WorkError: other shards than planned.
    """
    corpus = _corpus(url, digest, split, cache_dir)
    card = corpus.manifest.card
    decoded = _decoded(url, digest, split, size, cache_dir)
    strata = tuple(_stratum(meta, card.stratify_by) for meta in decoded.meta)
    ids, image = tuple(decoded.ids), decoded.images
    if task.kind == "segmentation":
        if decoded.seg is None:
            raise RequestError(f"{corpus.manifest.dataset} has no masks", where=f"task {task.task}")
        inside = decoded.seg > 0 if task.mask_class is None else decoded.seg == card.mask_index(task.mask_class, f"task {task.task}")
        target = np.where(decoded.seg == NO_MASK, NOT_JUDGED, inside).astype(np.float32)
        arrays = Arrays(split, image, target, np.ones((len(ids), 1), np.float32), tuple(decoded.patients), strata, ids, tuple(decoded.meta))
        masked = (decoded.seg != NO_MASK).any(axis=(1, 2))
        return arrays if masked.all() else arrays.take(np.flatnonzero(masked))
    absent = [label for label in task.labels if label not in corpus.labels and label not in card.derived]
    if absent:
        raise RequestError(f"{corpus.manifest.dataset} has no label {', '.join(absent)}", where=f"task {task.task}: labels")
    target, known = Targets(card, task.labels, task.uncertain, training=split == "train")(decoded.raw, ids)
    arrays = Arrays(split, image, target, known, tuple(decoded.patients), strata, ids, tuple(decoded.meta))
    if task.kind in ("multiclass", "ordinal"):
        return arrays.take(np.flatnonzero((known.min(1) > 0) & (target.sum(1) == 1)))
    return arrays.take(np.flatnonzero(known.max(1) > 0)) if not known.max(1).all() else arrays


def _stratum(meta: Mapping[str, Any], column: str | None) -> str | None:
    # Not str(None): a layout without the column would make one stratum of all images, in which "within" compares everything.
    value = None if column is None else meta.get(column)
    return None if value is None else str(value)


def fraction_of(arrays: Arrays, fraction: float, seed: int) -> NDArray[np.int64]:
    """Positions of a labelled subset: whole patients, about the same mix of label combinations, the smaller inside the larger.

    Patients of one combination of labels (union over their images) are ordered by a keyed hash and spread evenly over [0, 1), from a
    random start; the subset is a prefix of that order. It depends on the seed and on the patients, not on the order of files.
    Different seeds draw different subsets, so that the variation between seeds includes that of the choice of patients.
    """
    if fraction >= 1:
        return np.arange(len(arrays))
    groups: dict[str, list[int]] = {}
    for position, patient in enumerate(arrays.patients):
        groups.setdefault(patient or f"image {arrays.ids[position]}", []).append(position)
    combination: dict[str, list[str]] = {}
    for patient, positions in groups.items():
        labels = (
            "mask" if arrays.target.ndim == 3 else "".join("1" if any(column) else "0" for column in (arrays.target[positions] > 0.5).T)
        )
        combination.setdefault(labels, []).append(patient)
    place: dict[str, tuple[float, float]] = {}
    for labels, patients in combination.items():
        start = rng("fraction", seed, labels).random()
        draws = {patient: float(rng("fraction", seed, labels, patient).random()) for patient in patients}
        for rank, patient in enumerate(sorted(patients, key=draws.__getitem__)):
            place[patient] = ((rank + start) / len(patients), draws[patient])
    wanted = max(1, round(fraction * len(arrays)))
    chosen: list[int] = []
    for patient in sorted(groups, key=place.__getitem__):
        if len(chosen) >= wanted:
            break
        chosen += groups[patient]
    return np.asarray(sorted(chosen), dtype=np.int64)


def shuffled(arrays: Arrays, seed: int) -> Arrays:
    """The control: targets permuted over the images of this split, everything else in place.

    The permutation is drawn at random and then rid of the correlation with the true labels that is left by chance (about 0.03 for a
    thousand images): a network that sees an easy label learns even that, and its test AUROC strays from 0.5 far beyond the error of the
    test set.
    """
    draw = rng("shuffled labels", seed, arrays.split)
    givers = draw.permutation(len(arrays))
    if arrays.target.ndim == 2:
        givers = _uncorrelated(arrays.target, givers, draw)
    return replace(arrays, target=arrays.target[givers], known=arrays.known[givers])


SWAPS = 20_000  # tried; enough to bring correlations of 14 labels over a few thousand images under 0.01


def _uncorrelated(target_NL: NDArray[np.float32], givers_N: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
    """Swap two targets whenever that lowers the sum of squared correlations between true and permuted labels."""
    spread = target_NL.std(0)
    unit_NL = (target_NL - target_NL.mean(0)) / np.where(spread > 0, spread, 1)
    cross_LL = unit_NL.T @ unit_NL[givers_N]
    for i, j in draw.integers(len(unit_NL), size=(SWAPS, 2)):
        change = np.outer(unit_NL[i] - unit_NL[j], unit_NL[givers_N[j]] - unit_NL[givers_N[i]])
        if (change * (2 * cross_LL + change)).sum() < 0:
            cross_LL += change
            givers_N[[i, j]] = givers_N[[j, i]]
    return givers_N


def batches(order: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Consecutive batches; a last batch of one image joins the one before, since batch norm needs two values."""
    starts = list(range(0, len(order), size))
    if len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for i, start in enumerate(starts):
        yield order[start : starts[i + 1] if i + 1 < len(starts) else len(order)]


def enlarged(size: int, augmentation: Augmentation) -> int:
    """The side at which training images are decoded, so that the smallest crop still has `size` pixels a side of its own."""
    return math.ceil(size / math.sqrt(augmentation.crop_scale[0]))


class TrainingViews:
    """Augmented training batches. A view is a function of (seed, epoch, sample's key); the mask moves with its image."""

    def __init__(self, arrays: Arrays, size: int, augmentation: Augmentation, seed: int, masks: bool) -> None:
        self.arrays, self.seed, self.masks = arrays, seed, masks
        self.keys = [seed_of(name) for name in arrays.ids]
        self.config = views.ViewsConfig(
            kind="one",
            size=size,
            crop_scale=augmentation.crop_scale,
            crop_ratio=augmentation.crop_ratio,
            flip=augmentation.flip,
            jitter_p=1.0,
            brightness=augmentation.brightness,
            contrast=augmentation.contrast,
            saturation=0.0,
            hue=0.0,
            blur_p=0.0,
        )

    def batch(self, index: NDArray[np.int64], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image u8 BCHW, target and known f32, as `losses.loss_of` takes them."""
        arrays = self.arrays
        keys = [(self.seed, epoch, self.keys[i]) for i in index]
        seg = arrays.target[index].astype(np.uint8) if self.masks else None
        image, moved = views.augment(arrays.image[index], seg, self.config, keys)
        target = arrays.target[index] if moved is None else moved.astype(np.float32)
        return torch.from_numpy(image), torch.from_numpy(target), torch.from_numpy(arrays.known[index])
