"""What a cell's network is shown and what it answers: the arrays of its splits, features of a frozen encoder, logits.

    evaluator = Evaluator(config, transplant)
    arrays = evaluator.arrays("val")                     # the split on the evaluation view
    logits = evaluator.logits("val")                     # with the weights that stand in the network

The features of a frozen encoder are computed once: for a source of given weights in the node's cache, where other cells find them, for
random ones, which no other seed has, in memory.

Legend: N images, B batch, V views, C channels, L labels, H W pixels.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from base.config import digest
from base.errors import Diverged, RequestError
from encoders.weights import sha256_of
from finetune import data, features
from finetune.augment import TrainingViews, enlarged
from finetune.cell import CellConfig
from finetune.features import Features, chunks
from finetune.network import Network
from finetune.task import Kind
from finetune.transplant import Transplant
from shards import cache
from shards.views import VIEWS_VERSION

EVAL_BATCH, EVAL_PIXELS = 64, 64 * 224**2  # images and pixels that are evaluated at once
SHARED_FRACTION = 0.1  # from here on features are those of all training images, which cells of other seeds and fractions read, too


class Evaluator:
    """Holds one cell's arrays, and its network on the device.

    Attributes:
        frozen: the encoder does not move, so that its features may be kept.
        rate: the setting of the task that numbers which are not finite call for a lower value of.

    Raises:
        RequestError: images under the least size that the network takes.
    """

    def __init__(self, config: CellConfig, transplant: Transplant) -> None:
        self.config, self.task = config, config.task
        least = transplant.module.encoder.smallest
        if config.resolution < least:
            what = f"{config.architecture} takes images of at least {least} px, not of {config.resolution}"
            raise RequestError(what, where=f"cell {config.key}: resolution")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.module: Network = transplant.module.to(self.device)
        self.network: Callable[[Tensor], Tensor] = self.module  # what training calls: an engine around it, where there are several workers
        for tensor in self.module.parameters():
            tensor.data = _in_layout(tensor.data)
        self.frozen = self.module.frozen
        self.rate = "linear.lr" if transplant.views == "evaluation" else "recipe.lr"
        self.trains = bool(transplant.groups)  # of kNN nothing does
        self.size = (config.resolution, config.resolution)
        self._arrays: dict[str, data.Arrays] = {}
        self._features: dict[str, Features | None] = {}  # None: they would take too much room

    # -- data

    def arrays(self, split: str) -> data.Arrays:
        """A split on the evaluation view; training and validation with their targets permuted in the shuffled-label control."""
        if split not in self._arrays:
            whole = self.load(split, self.config.resolution)
            self._arrays[split] = self._of_cell(whole, self._rows(whole))
        return self._arrays[split]

    def load(self, split: str, size: int, whole: bool = False) -> data.Arrays:
        """A whole split, see data.load. Raises RequestError for one without images."""
        config = self.config
        arrays = data.load(config.shards, config.manifest_digest, split, size, self.task, config.cache_dir, whole)
        if not len(arrays):
            raise RequestError(f"no image of split {split} has a label of this task", where=f"task {self.task.task}")
        return arrays

    def _rows(self, arrays: data.Arrays) -> NDArray[np.int64]:
        """Which images of a split are the cell's: all of them, or of training the fraction."""
        if arrays.split != "train":
            return np.arange(len(arrays))
        rows = data.fraction_of(arrays, self.config.fraction, self.config.seed)
        if len(rows) < 2:
            where = f"task {self.task.task}, fraction {self.config.fraction:g}"
            raise RequestError(f"{len(rows)} training image is too few", where=where)
        return rows

    def _of_cell(self, arrays: data.Arrays, rows: NDArray[np.int64]) -> data.Arrays:
        arrays = arrays.take(rows)
        if not self.config.shuffle_labels or arrays.split == "test":
            return arrays
        studies = self.task.aggregate
        return data.shuffled(arrays, self.config.seed, studies.by if studies else None)

    def training_views(self) -> TrainingViews:
        """Augmented batches of the training images, of which `arrays("train")` are those enlarged ones from now on."""
        views = self.task.recipe.views
        large = self.load("train", enlarged(self.config.resolution, views), whole=True)
        self._arrays["train"] = self._of_cell(large, self._rows(large))
        masks = self.task.kind == "segmentation"
        return TrainingViews(self._arrays["train"], self.config.resolution, views, self.config.seed, masks, self.device)

    # -- features of a frozen encoder

    def keep(self, split: str) -> None:
        """Compute or map the features of a split's evaluation view, if they are worth it."""
        if split in self._features:
            return
        whole = self.load(split, self.config.resolution) if split == "train" else self.arrays(split)
        rows = self._rows(whole)
        images = whole if self.config.source_kind == "weights" and len(rows) >= SHARED_FRACTION * len(whole) else whole.take(rows)
        maps = self._mapped(split, images)
        if maps is None and images is whole and len(rows) < len(whole):  # what all cells could share has no room, this one's may
            images = whole.take(rows)
            maps = self._mapped(split, images)
        self._features[split] = None if maps is None else Features(maps, rows if images is whole else np.arange(len(rows)))
        if split == "train":
            # Pixels that are not read again are not copied either.
            self._arrays[split] = self._of_cell(whole if maps is None else dataclasses.replace(whole, image=whole.image[:, :0]), rows)

    def _mapped(self, split: str, images: data.Arrays) -> list[Tensor] | None:
        folder = self._folder(images) if self.config.source_kind == "weights" else None
        self.module.eval()
        if folder is None and split == "test":  # that of a source that no other cell has is read once
            return None
        return features.keep(lambda index: [x.float().cpu() for x in self._embed(images, index)], len(images), self.chunk, folder)

    def _folder(self, images: data.Arrays) -> Path:
        """Where in the node's cache: named by all that decides the numbers, to the bit."""
        config, task, encoder = self.config, self.task, self.module.encoder
        network = [getattr(encoder, name, None) for name in ("architecture", "mean", "std", "image_size", "widths", "cut", "flat", "depth")]
        maps = [self.module.pyramid, self.module.stride]
        pixels = [config.manifest_digest, images.split, images.ids, config.resolution, task.evaluation, task.pad, task.volume]
        bits = [VIEWS_VERSION, config.dtype, config.threads, self.device_name, torch.__version__, self.chunk]
        key = digest([features.FORMAT, type(encoder).__name__, network, maps, self._encoder_sha256, pixels, bits])[:32]
        return Path(config.cache_dir or cache.default_dir()) / "features" / key

    @cached_property
    def _encoder_sha256(self) -> str:
        """Of the encoder as it came: only then are its features kept."""
        return sha256_of(self.module.encoder.state_dict())

    @property
    def chunk(self) -> int:
        """How many images, or volumes, are evaluated at once."""
        pixels = self.config.resolution**2 * (self.arrays("val").slices or 1)
        return max(1, min(EVAL_BATCH, EVAL_PIXELS // pixels))

    def inputs(self, split: str, index: NDArray[np.int64]) -> list[Tensor]:
        """What `forward` takes: the kept maps of these images, or the images."""
        kept = self._features[split]
        return list(data.seen(self.arrays(split), index)) if kept is None else kept.at(index)

    def forget(self) -> None:
        """Drop all features: the encoder is about to move."""
        self._features.clear()

    @torch.no_grad()
    def _embed(self, arrays: data.Arrays, index: NDArray[np.int64]) -> list[Tensor]:
        """What the head reads of these images, view after view."""
        with self.precision():
            return [x for view in data.seen(arrays, index) for x in self.module.embed(self.on_device(view))]

    def standardise(self) -> None:
        """Give the head the mean and standard deviation, per channel, of the training images' features, where it asks for them."""
        norms: Any = getattr(self.module.head, "norms", [])
        totals: list[list[Any]] = [[0.0, 0.0, 0] for _ in norms]
        for index in chunks(len(self.arrays("train")), self.chunk) if totals else ():
            for total, x in zip(totals, self.maps("train", index), strict=True):
                flat = x.double().transpose(0, 1).flatten(1)
                total[0] = total[0] + flat.sum(1)
                total[1] = total[1] + flat.square().sum(1)
                total[2] += flat.shape[1]
        for norm, (sums, squares, count) in zip(norms, totals, strict=True):
            norm.fit(sums, squares, count)

    def maps(self, split: str, index: NDArray[np.int64]) -> list[Tensor]:
        """What the head reads of these images on the evaluation view, on the device; of ten crops one after the other."""
        kept = self._features.get(split)
        return self._embed(self.arrays(split), index) if kept is None else [x.to(self.device) for x in kept.at(index)]

    # -- evaluation

    @torch.inference_mode()
    def logits(self, split: str) -> NDArray[np.float32]:
        """f32 NL or NHW on the evaluation view, in the split's order, with the weights that stand in the network; of ten crops see
        `over_views`.

        Raises:
            WorkError: one is not finite. A mask cut from such numbers would look like any other.
        """
        self.train(False)
        if self.frozen:
            self.keep(split)
        arrays = self.arrays(split)
        parts = [self._answers(self.maps(split, index)) for index in chunks(len(arrays), self.chunk)]
        logits: NDArray[np.float32] = np.concatenate([part.cpu().numpy() for part in parts])
        if not np.isfinite(logits).all():
            raise self.diverged(f"the network's output is not finite on split {split}")
        return logits

    def diverged(self, what: str) -> Diverged:
        """The error for numbers that are not finite."""
        return Diverged(what, where=f"cell {self.config.key}, task {self.task.task}", hint=f"lower {self.rate}" if self.trains else None)

    def _answers(self, maps: list[Tensor]) -> Tensor:
        levels = len(self.module.encoder.pyramid_channels) if self.module.pyramid else 1
        with self.precision():
            views = [self.module.head(maps[start : start + levels], self.size).float() for start in range(0, len(maps), levels)]
        return over_views(self.task.kind, torch.stack(views))

    # -- the network

    def train(self, mode: bool) -> None:
        """Training or evaluation mode, of the head alone where the encoder is frozen: that is in evaluation mode whatever is said."""
        (self.module.head if self.frozen else self.module).train(mode)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Logits of one batch of u8 images, or of the float maps that the head reads of them."""
        x = [self.on_device(part) for part in x]
        with self.precision():
            return self.network(x[0]) if x[0].dtype == torch.uint8 else self.module.head(x, self.size)

    def precision(self) -> torch.autocast:
        """The context that networks compute in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def on_device(self, x: Tensor) -> Tensor:
        """Where and in which layout the network computes."""
        return _in_layout(x.to(self.device))


def over_views(kind: Kind, views_VBL: Tensor) -> Tensor:
    """Logits of the mean over V views of what a network says after its sigmoid (of grades, of each P(grade > k)) or softmax: what the
    transfer benchmark averages (Hosseinzadeh Taher et al., arXiv 2108.05930). float VBL -> float32 BL; one view to the bit, of any shape.

    They are finite where those of all views are, and nowhere else.
    """
    if len(views_VBL) == 1:
        return views_VBL[0]
    x = views_VBL.double()
    if kind == "multiclass":
        mean_BL = x.log_softmax(2).logsumexp(0) - math.log(len(x))
    else:  # log p - log(1 - p), each from logits: neither is rounded to 0 first
        mean_BL = F.logsigmoid(x).logsumexp(0) - F.logsigmoid(-x).logsumexp(0)
    return torch.where(x.isfinite().all(0), mean_BL, torch.nan).float()


def _in_layout(x: Tensor) -> Tensor:
    """Channels last: 1.15 times as fast on a CPU (ResNet-18 at 96 px and its U-Net at 128, batch 32 and 8, one thread)."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=layouts[x.ndim]) if x.ndim in layouts else x
