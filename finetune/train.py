"""Training of one cell: epochs, validation after each, the best kept, early stopping. Frozen encoders are run once and their features kept.

    trainer = Trainer(config, transplant)
    selection = trainer.fit(ctx, "metrics.jsonl")      # the best epoch's weights are in place afterwards
    logits = trainer.logits("test")

Legend: N images, B batch, C channels, L labels, H W pixels.
"""

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.errors import RequestError, WorkError
from base.seeds import rng, seed_of
from engine.context import Context
from engine.schedules import factor
from finetune import data, predict
from finetune.cell import CellConfig, Selection
from finetune.heads import PooledHead, PyramidHead
from finetune.losses import loss_of
from finetune.network import Network
from finetune.transplant import Transplant

CACHE_BYTES = 2 << 30  # features above this are computed again for each batch instead of kept
EVAL_BATCH = 64


class Trainer:
    """Holds one cell's arrays, network and optimiser."""

    def __init__(self, config: CellConfig, transplant: Transplant) -> None:
        self.config, self.task = config, config.task
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        # Channels last: 1.15 times as fast on a CPU (ResNet-18 at 96 px and its U-Net at 128, batch 32 and 8, one thread).
        self.module: Network = transplant.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.groups = transplant.groups
        self.recipe = config.task.linear if self.module.frozen else config.task.recipe
        self._arrays: dict[str, data.Arrays] = {}
        self._features: dict[str, list[Tensor]] = {}

    # -- data

    def arrays(self, split: str) -> data.Arrays:
        """A split on the evaluation view; training and validation with their targets permuted in the shuffled-label control."""
        if split not in self._arrays:
            self._arrays[split] = self._load(split, self.config.resolution)
        return self._arrays[split]

    def _load(self, split: str, size: int, whole: bool = False) -> data.Arrays:
        config = self.config
        arrays = data.load(config.shards, config.manifest_digest, split, size, self.task, config.cache_dir, whole)
        if split == "train":
            arrays = arrays.take(data.fraction_of(arrays, config.fraction, config.seed))
        if not len(arrays):
            raise RequestError(f"no image of split {split} has a label of this task", where=f"task {self.task.task}")
        if config.shuffle_labels and split != "test":
            arrays = data.shuffled(arrays, config.seed)
        return arrays

    # -- features of a frozen encoder

    def _embed(self, split: str, index: NDArray[np.int64]) -> list[Tensor]:
        """What the head reads for these images; cached when the encoder is frozen and there is room."""
        if split in self._features:
            chosen = torch.from_numpy(index)
            return [x[chosen].to(self.device) for x in self._features[split]]
        x = torch.from_numpy(self.arrays(split).image[index])
        return self.module.embed(x.to(self.device, memory_format=torch.channels_last))

    def _cache(self, split: str) -> None:
        n = len(self.arrays(split))
        parts: list[list[Tensor]] = []
        for start in range(0, n, EVAL_BATCH):
            maps = [x.cpu() for x in self._embed(split, np.arange(start, min(start + EVAL_BATCH, n)))]
            if sum(x.nbytes for x in maps) / len(maps[0]) * n > CACHE_BYTES:
                return
            parts.append(maps)
        self._features[split] = [torch.cat(level) for level in zip(*parts, strict=True)]

    def _standardise(self) -> None:
        """Give the head the mean and standard deviation, per channel, of the training images' features."""
        assert isinstance(self.module.head, PooledHead | PyramidHead)
        norms: Any = self.module.head.norms
        totals: list[list[Any]] = [[0.0, 0.0, 0] for _ in norms]
        for index in np.array_split(np.arange(len(self.arrays("train"))), math.ceil(len(self.arrays("train")) / EVAL_BATCH)):
            for total, x in zip(totals, self._embed("train", index), strict=True):
                flat = x.double().transpose(0, 1).flatten(1)
                total[0] = total[0] + flat.sum(1)
                total[1] = total[1] + flat.square().sum(1)
                total[2] += flat.shape[1]
        for norm, (sums, squares, count) in zip(norms, totals, strict=True):
            norm.fit(sums, squares, count)

    # -- training

    def fit(self, ctx: Context, log: str | Path) -> tuple[Selection, int]:
        """Train, append a row an epoch to `log` and report it, and put the best epoch's weights back. Returns also how many images trained.

        Raises:
            RequestError: one training image.
            WorkError: a loss or an output that is not finite; the context asked to stop.
        """
        torch.manual_seed(seed_of("train", self.config.seed))  # for whatever a layer draws; order and views have keys of their own
        recipe, frozen = self.recipe, self.module.frozen
        if frozen:
            self._cache("train")
            self._cache("val")
            self._standardise()
            images = len(self.arrays("train"))
        else:
            size = data.enlarged(self.config.resolution, self.task.recipe.views)
            large = self._load("train", size, whole=True)
            images = len(large)
            self._views = data.TrainingViews(
                large, self.config.resolution, self.task.recipe.views, self.config.seed, masks=self.task.kind == "segmentation"
            )
        if images < 2:
            raise RequestError(f"{images} training image is too few", where=f"task {self.task.task}, fraction {self.config.fraction}")
        optimizer = torch.optim.AdamW(
            [{"params": group.params, "weight_decay": recipe.weight_decay if group.decay else 0.0, "lr": 0.0} for group in self.groups]
        )
        steps = len(list(data.batches(np.arange(images), recipe.batch)))
        best, best_epoch, best_state = -math.inf, 0, {}
        metric = f"val_{self.task.metric}"
        undefined = False
        epoch = 0
        for epoch in range(1, recipe.epochs + 1):
            reason = ctx.should_stop()
            if reason:
                raise WorkError(f"stopped ({reason})", where=f"cell {self.config.key}", hint="the same command computes the cell again")
            started = time.perf_counter()
            order = rng("order", self.config.seed, epoch).permutation(images)
            self.module.train()
            losses: list[float] = []
            rate = 0.0
            for step, index in enumerate(data.batches(order, recipe.batch)):
                rate = recipe.lr * factor((epoch - 1) * steps + step, recipe.epochs * steps, round(recipe.warmup * steps))
                for group, settings in zip(self.groups, optimizer.param_groups, strict=True):
                    settings["lr"] = rate * group.lr_scale
                loss = self._loss(index, epoch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            if not all(map(math.isfinite, losses)):
                raise self._diverged(f"the training loss is not finite in epoch {epoch}")
            logits = self.logits("val")
            value = predict.headline(self.task, predict.measure(self.task, self.arrays("val"), logits))
            val_loss = self._validation_loss(logits)
            row = {
                "epoch": epoch,
                "train_loss": float(np.mean(losses)),
                "val_loss": val_loss,
                metric: None if math.isnan(value) else value,
                "lr": rate,
                "seconds": round(time.perf_counter() - started, 3),
            }
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            ctx.report(row)
            undefined = math.isnan(value)  # the same in every epoch: it depends on the targets alone
            score = -val_loss if undefined else value
            if score > best:
                best, best_epoch = score, epoch
                best_state = copy.deepcopy(self._trained())
            elif epoch - best_epoch >= recipe.patience:
                break
        if not best_epoch:
            raise self._diverged("the validation loss was never finite")
        self.module.load_state_dict(best_state, strict=False)
        metric, value = ("loss", -best) if undefined else (self.task.metric, best)
        return Selection(metric=metric, value=value, epoch=best_epoch, epochs=epoch), images

    def _diverged(self, what: str) -> WorkError:
        rate = "linear.lr" if self.module.frozen else "recipe.lr"
        return WorkError(what, where=f"cell {self.config.key}, task {self.task.task}", hint=f"lower {rate}")

    def _trained(self) -> dict[str, Tensor]:
        """State that training changes: all of it, or the head when the encoder is frozen."""
        state: dict[str, Tensor] = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if not (self.module.frozen and name.startswith("encoder."))}

    def _loss(self, index: NDArray[np.int64], epoch: int) -> Tensor:
        if self.module.frozen:
            arrays = self.arrays("train")
            maps = self._embed("train", index)
            logits = self.module.head(maps, (self.config.resolution, self.config.resolution))
            target, known = torch.from_numpy(arrays.target[index]), torch.from_numpy(arrays.known[index])
        else:
            image, target, known = self._views.batch(index, epoch)
            logits = self.module(image.to(self.device, memory_format=torch.channels_last))
        return loss_of(self.task, logits, target.to(self.device), known.to(self.device))

    # -- evaluation

    @torch.inference_mode()
    def logits(self, split: str) -> NDArray[np.float32]:
        """f32 NL or NHW on the evaluation view, in the split's order, with the weights that stand in the network.

        Raises:
            WorkError: one is not finite. A mask cut from such numbers would look like any other.
        """
        self.module.eval()
        size = (self.config.resolution, self.config.resolution)
        chunks = [
            np.arange(start, min(start + EVAL_BATCH, len(self.arrays(split)))) for start in range(0, len(self.arrays(split)), EVAL_BATCH)
        ]
        logits = np.concatenate([self.module.head(self._embed(split, index), size).float().cpu().numpy() for index in chunks])
        if not np.isfinite(logits).all():
            raise self._diverged(f"the network's output is not finite on split {split}")
        return logits

    def _validation_loss(self, logits: NDArray[np.float32]) -> float:
        arrays = self.arrays("val")
        with torch.inference_mode():
            return float(loss_of(self.task, torch.from_numpy(logits), torch.from_numpy(arrays.target), torch.from_numpy(arrays.known)))


def cost(module: Network, in_chans: int, size: int) -> tuple[int, int]:
    """Parameters of the whole network, and its multiply-accumulates for one image of that size (convolutions and matrix products)."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(module.parameters()).device
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, in_chans, size, size, dtype=torch.uint8, device=device))
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2
