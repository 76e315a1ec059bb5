"""What a cell reads: each split decoded once a node and mapped, label fractions, the shuffled-label control.

    train = load(url, digest, "train", size, task, cache_dir)
    train = train.take(fraction_of(train, 0.1, seed))
    for view_BCHW in seen(test, index): ...                    # what evaluation shows the network of these images
    for mask_HW in original_masks(test): ...                   # true masks as packed, not as resized

Maps of decoded splits stay in the process (a few, newest first), so that the cells of a warm worker open them once.

Legend: N images, C channels, H W pixels, L labels.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import RequestError, WorkError
from base.seeds import rng
from finetune.task import Task
from shards.card import NOT_JUDGED
from shards.corpus import Corpus
from shards.decoded import Decoded, Pad, decode_all
from shards.labels import Targets


@dataclass(frozen=True)
class Origin:
    """The masks of some samples in their shards. inside: the value that means inside; None: any but 0. pad: the task's."""

    corpus: Corpus
    at: NDArray[np.int64]
    inside: int | None
    pad: bool

    def take(self, index: NDArray[np.int64]) -> "Origin":
        """Those at the positions."""
        return replace(self, at=self.at[index])


@dataclass(frozen=True)
class Arrays:
    """One split: image_NCHW u8; target_NL and known_NL f32 for labels, or target_NHW f32 (0, 1, NOT_JUDGED) for masks; who, and of which
    stratum (None: not known). meta: the card's allow-listed metadata of each image, which `aggregate` and `stratify_by` read.

    large: the enlarged images that ten crops are cut of, where the task asks for them and the split is test; `image` are their centres.
    slices: of the volumes that the channels are, slice by slice; None where they are channels.
    origin: where the masks lie as they were packed.
    """

    split: str
    image: NDArray[np.uint8]
    target: NDArray[np.float32]
    known: NDArray[np.float32]
    patients: tuple[str, ...]
    strata: tuple[str | None, ...]
    ids: tuple[str, ...]
    meta: tuple[Mapping[str, Any], ...] = ()
    large: NDArray[np.uint8] | None = None
    slices: int | None = None
    origin: "Origin | None" = None

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
            large=None if self.large is None else self.large[index],
            origin=self.origin and self.origin.take(index),
        )


@lru_cache(maxsize=8)
def _corpus(url: str, digest: str, split: str, cache_dir: str | None) -> Corpus:
    corpus = Corpus(url, (split,), cache_dir)
    if corpus.manifest.digest != digest:
        raise WorkError("these shards are not those that the cell was planned for", where=url, hint="plan the study again")
    return corpus


# Six: a full cell holds train (enlarged), val and test; a worker alternates between two datasets at most.
@lru_cache(maxsize=6)
def _decoded(url: str, digest: str, split: str, size: int, cache_dir: str | None, pad: Pad = None) -> Decoded:
    return decode_all(_corpus(url, digest, split, cache_dir), size, pad=pad)


def describe(url: str, digest: str, cache_dir: str | None) -> Corpus:
    """The training corpus, for its manifest and card. Raises WorkError when the manifest is not the planned one."""
    return _corpus(url, digest, "train", cache_dir)


def load(url: str, digest: str, split: str, size: int, task: Task, cache_dir: str | None = None, whole: bool = False) -> Arrays:
    """A split under the task's view of labels, at `size` pixels (antialiased resize). Nothing is copied that is not changed.

    Args:
        whole: images as training views are made of them: whole, whatever the task's `evaluation` says.
    Raises:
        RequestError: the dataset lacks labels, masks or slices that the task needs.
        WorkError: other shards than planned; targets that are not finite.
    """
    corpus = _corpus(url, digest, split, cache_dir)
    card = corpus.manifest.card
    where = f"task {task.task}"
    cropped = task.evaluation != "whole" and not whole
    decoded = _decoded(url, digest, split, around(size) if cropped else size, cache_dir, task.pad)
    if task.volume and card.slab is None:
        raise RequestError(f"{corpus.manifest.dataset} has no slabs of slices, its channels are no volume", where=f"{where}: volume")
    arrays = Arrays(
        split,
        centre(decoded.images, size) if cropped else decoded.images,
        target=np.empty(0, np.float32),
        known=np.ones((len(decoded.ids), 1), np.float32),
        patients=tuple(decoded.patients),
        strata=tuple(_stratum(meta, card.stratify_by) for meta in decoded.meta),
        ids=tuple(decoded.ids),
        meta=tuple(decoded.meta),
        large=decoded.images if cropped and task.evaluation == "ten-crop" and split == "test" else None,
        slices=card.slab if task.volume else None,
    )
    if task.kind == "segmentation":
        if decoded.seg is None:
            raise RequestError(f"{corpus.manifest.dataset} has no masks", where=where)
        inside = None if task.mask_class is None else card.mask_index(task.mask_class, where)
        target = _inside(decoded.seg, inside).astype(np.float32)
        origin = Origin(corpus, np.arange(len(arrays)), inside, task.pad is not None)
        arrays = replace(arrays, target=target, origin=origin)
        masked = (decoded.seg != NOT_JUDGED).any(axis=(1, 2))
        return arrays if masked.all() else arrays.take(np.flatnonzero(masked))
    absent = [label for label in task.labels if label not in corpus.labels and label not in card.derived]
    if absent:
        raise RequestError(f"{corpus.manifest.dataset} has no label {', '.join(absent)}", where=f"{where}: labels")
    target, known = Targets(card, task.labels, task.uncertain, training=split == "train")(decoded.raw, arrays.ids)
    if not np.isfinite(target[known > 0]).all():  # before those are left out that do not sum to one label
        raise WorkError(f"targets of split {split} that are not finite", where=url, hint="pack the dataset again")
    arrays = replace(arrays, target=target, known=known)
    if task.kind in ("multiclass", "ordinal"):
        return arrays.take(np.flatnonzero((known.min(1) > 0) & (target.sum(1) == 1)))
    return arrays.take(np.flatnonzero(known.max(1) > 0)) if not known.max(1).all() else arrays


def _inside(seg: NDArray[np.uint8], value: int | None) -> NDArray[np.uint8]:
    """Class indices -> 0, 1 or NOT_JUDGED."""
    inside = seg > 0 if value is None else seg == value
    return np.where(seg == NOT_JUDGED, np.uint8(NOT_JUDGED), inside.astype(np.uint8))


def _stratum(meta: Mapping[str, Any], column: str | None) -> str | None:
    # Not str(None): a layout without the column would make one stratum of all images, in which "within" compares everything.
    value = None if column is None else meta.get(column)
    return None if value is None else str(value)


def channels(corpus: Corpus, task: Task) -> int:
    """Of what the encoder is given: the card's, or its windows where slices are an axis of their own."""
    card = corpus.manifest.card
    return card.channels // (card.slab or 1) if task.volume else card.channels


# -- what evaluation sees


def around(size: int) -> int:
    """The side of the image of which evaluation sees the centre: 256 for 224, as Krizhevsky et al. 2012 had it."""
    return round(size * 256 / 224)


def centre(image_NCHW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle size x size pixels; nothing is copied."""
    top, left = (round((side - size) / 2) for side in image_NCHW.shape[2:])
    return image_NCHW[:, :, top : top + size, left : left + size]


def seen(arrays: Arrays, index: NDArray[np.int64]) -> Iterator[Tensor]:
    """What evaluation shows the network of these images, u8 BCHW, or B windows slices H W of volumes: one view, or ten.

    An image's probabilities are the mean over the views (evaluate.over_views). Ten are the centre and the corners of `large` and the mirror
    images of these.
    """
    if arrays.large is None:
        yield as_input(arrays.image[index], arrays.slices)
        return
    side = arrays.image.shape[-1]
    for large_BCHW in (arrays.large[index], arrays.large[index][..., ::-1]):
        yield as_input(centre(large_BCHW, side), arrays.slices)
        for rows, columns in itertools.product((slice(side), slice(-side, None)), repeat=2):
            yield as_input(large_BCHW[:, :, rows, columns], arrays.slices)


def as_input(image_BCHW: NDArray[np.uint8] | Tensor, slices: int | None) -> Tensor:
    """u8 BCHW; where the channels are `slices` slices in some windows, slice by slice (shards.decode), B windows slices H W."""
    image = image_BCHW if isinstance(image_BCHW, Tensor) else torch.from_numpy(np.ascontiguousarray(image_BCHW))
    return image if slices is None else image.unflatten(1, (slices, -1)).transpose(1, 2)


def original_masks(arrays: Arrays) -> Iterator[NDArray[np.uint8]]:
    """The true masks in the order of `arrays`, u8 HW, 0, 1 or NOT_JUDGED, each of the size at which it was drawn. Read
    from the shards one by one, since together they may not fit into memory.

    A prediction is brought to that size by `at_origin`, never the mask to the prediction's: Dice is measured where it was drawn.
    """
    assert arrays.origin is not None, "only segmentation tasks have masks"
    for i in arrays.origin.at:
        seg_HW = arrays.origin.corpus.read(int(i), image=False, text=False).seg
        assert seg_HW is not None  # `load` leaves out samples without
        yield _inside(seg_HW, arrays.origin.inside)


def at_origin(logits_HW: NDArray[np.float32], shape: tuple[int, int], pad: bool) -> NDArray[np.float32]:
    """Logits at the resolution -> f32 of that height and width, bilinear; pad: the image had been made square (`Arrays.origin.pad`)."""
    height, width = (max(shape), max(shape)) if pad else shape
    large_HW = cv2.resize(logits_HW, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    return np.asarray(large_HW[top : top + shape[0], left : left + shape[1]])


# -- what training sees


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


def studies_of(arrays: Arrays, by: str) -> dict[str, list[int]]:
    """Positions of the images of each study, in order of first appearance: of one patient, or of one value of the card's metadata.

    An image without a value is a study of its own.

    Raises:
        RequestError: no image has that metadata.
    """
    if by == "patient":
        named: list[Any] = [patient or None for patient in arrays.patients]
    else:
        if not any(by in meta for meta in arrays.meta):
            raise RequestError(f"the dataset keeps no metadata '{by}'", where="aggregate.by")
        named = [meta.get(by) for meta in arrays.meta]
    studies: dict[str, list[int]] = {}
    for position, value in enumerate(named):
        studies.setdefault(arrays.ids[position] if value is None else str(value), []).append(position)
    return studies


def shuffled(arrays: Arrays, seed: int, by: str | None = None) -> Arrays:
    """The control: targets permuted over the images of this split, everything else in place; with `by` over its studies.

    The permutation is drawn at random and then rid of the correlation with the true labels that is left by chance (about 0.03 for a
    thousand images): a network that sees an easy label learns even that, and its test AUROC strays from 0.5 far beyond the error of the
    test set.

    A study's images are given those of another study, again from the first where they are more; where they are fewer the first stands for
    the whole study, so that what is positive, negative or not known of a study stays so.
    """
    draw = rng("shuffled labels", seed, arrays.split)
    if by is not None:
        return _shuffled_studies(arrays, list(studies_of(arrays, by).values()), draw)
    givers = draw.permutation(len(arrays))
    if arrays.target.ndim == 2:
        givers = _uncorrelated(arrays.target, givers, draw)
    origin = arrays.origin and arrays.origin.take(givers)
    return replace(arrays, target=arrays.target[givers], known=arrays.known[givers], origin=origin)


def _shuffled_studies(arrays: Arrays, studies: list[list[int]], draw: np.random.Generator) -> Arrays:
    target, known = arrays.target.copy(), arrays.known.copy()
    positive = [((arrays.known[at] > 0) & (arrays.target[at] == 1)).any(0) for at in studies]
    whole_SL = np.stack(positive).astype(np.float32)
    for to, giver in enumerate(_uncorrelated(whole_SL, draw.permutation(len(studies)), draw)):
        rows = np.resize(studies[giver], len(studies[to]))
        target[studies[to]], known[studies[to]] = arrays.target[rows], arrays.known[rows]
        if len(rows) < len(studies[giver]):
            all_known = arrays.known[studies[giver]].min(0)
            target[studies[to][0]] = np.where(all_known > 0, arrays.target[studies[giver]].max(0), whole_SL[giver])
            known[studies[to][0]] = np.maximum(all_known, whole_SL[giver])
    return replace(arrays, target=target, known=known)


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
