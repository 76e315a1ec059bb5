"""Training of one cell: epochs, validation after each, the best kept, early stopping.

    trainer = Trainer(config, transplant)
    selection, images = trainer.fit(ctx, "metrics.jsonl")      # the best epoch's weights are in place afterwards
    logits = trainer.logits("test")

What trains is the transplant's: augmented views by the task's `recipe`; or, with a frozen encoder, the evaluation view by its `linear`; or,
with a probe, the head by the latter and then everything by the former; or, without groups, nothing. Optimiser, rates and stopping are in
finetune.optimize, losses in finetune.losses, data and evaluation in finetune.evaluate.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from base.errors import RequestError, WorkError
from base.seeds import rng, seed_of
from engine import ranks
from engine.ahead import ahead, to_device
from engine.context import Context
from finetune import data, predict
from finetune.auxiliary import WEIGHT, Auxiliary, Beside, attach
from finetune.cell import CellConfig, Selection
from finetune.evaluate import Evaluator
from finetune.features import chunks
from finetune.losses import class_weights, loss_of
from finetune.measure import headline
from finetune.optimize import Best, Rate, optimizer_of, set_rates
from finetune.task import Training
from finetune.transplant import Group, Transplant

Batch = tuple[list[Tensor], Tensor, Tensor]  # a batch of u8 images, or the float maps that the head reads of them; target; known
Index = NDArray[np.int64]
SURE = 20.0  # a logit


class Trainer:
    """Trains one cell's network. Raises as Evaluator.

    Attributes:
        probe: what the probe chose, once it has run.
    """

    def __init__(self, config: CellConfig, transplant: Transplant) -> None:
        self.config, self.task, self.transplant = config, config.task, transplant
        self.evaluator = Evaluator(config, transplant)
        self.module, self.arrays, self.logits = self.evaluator.module, self.evaluator.arrays, self.evaluator.logits
        self.device_name = self.evaluator.device_name
        self.probe: Selection | None = None
        self._auxiliary: Auxiliary | None = None

    def fit(self, ctx: Context, log: str | Path) -> tuple[Selection, int]:
        """Train, append a row an epoch to `log` and report it, and put the best epoch's weights back. Returns also how many images trained.

        The epochs of a probe go to `probe.jsonl` beside the log, and no further. Without groups the head is given the training features,
        which is epoch 0.

        Raises:
            RequestError: one training image, or a split without.
            WorkError: a loss or an output that is not finite; the context asked to stop.
        """
        torch.manual_seed(seed_of("train", self.config.seed))  # for whatever a layer draws; order and views have keys of their own
        self.arrays("val")  # a split without images ends the cell before it has trained
        kept = self.transplant.views == "evaluation"
        if kept or self.transplant.probe:
            self.evaluator.keep("train")
        if self.transplant.probe:
            self.probe = self._fit_probe(ctx, Path(log).with_name("probe.jsonl"))
        groups = self.transplant.groups
        if not groups:
            selection = self._fit_head(ctx, log)
        elif kept:
            self.evaluator.standardise()
            selection = self._descend(self.task.linear, groups, self._kept_batches, ctx, log)
        else:
            views = self.evaluator.training_views()

            def batches(parts: Iterable[Index], epoch: int) -> Iterator[Batch]:
                for image, target, known in ahead(lambda index: views.batch(index, epoch), parts, self.evaluator.device):
                    yield [image], target, known

            self._auxiliary = attach(self.module, self.task, self.config.resolution, seed_of("auxiliary", self.config.seed))
            if self._auxiliary is not None:
                beside = list(self._auxiliary.to(self.evaluator.device).parameters())
                parts = [("auxiliary", [p for p in beside if p.ndim > 1]), ("auxiliary, no decay", [p for p in beside if p.ndim == 1])]
                groups = [*groups, *(Group(name, params, decay=name == "auxiliary") for name, params in parts)]
            selection = self._descend(self.task.recipe, groups, batches, ctx, log, part=(ctx.rank, ctx.world_size))
        return selection, len(self.arrays("train"))

    def _fit_probe(self, ctx: Context, log: Path) -> Selection:
        """The head alone, by the linear recipe, on the features of the encoder as it came."""
        encoder = [parameter for parameter in self.module.encoder.parameters() if parameter.requires_grad]
        head = {id(parameter) for parameter in self.module.head.parameters()}
        groups = [dataclasses.replace(group, params=[p for p in group.params if id(p) in head]) for group in self.transplant.groups]
        for parameter in encoder:
            parameter.requires_grad_(False)
        rate, self.evaluator.frozen, self.evaluator.rate = self.evaluator.rate, True, "linear.lr"
        self.evaluator.standardise()
        selection = self._descend(self.task.linear, [group for group in groups if group.params], self._kept_batches, ctx, log, probe=True)
        for parameter in encoder:
            parameter.requires_grad_(True)
        self.evaluator.frozen, self.evaluator.rate = False, rate
        self.evaluator.forget()
        return selection

    def _fit_head(self, ctx: Context, log: str | Path) -> Selection:
        """A head that nothing trains is given the training features."""
        train, started = self.arrays("train"), time.perf_counter()
        z_ND = torch.cat([self.evaluator.maps("train", index)[0] for index in chunks(len(train), self.evaluator.chunk)])
        target_NL, known_NL = (torch.from_numpy(x).to(z_ND.device) for x in (train.target, train.known))
        self.module.head.fit(z_ND, target_NL, known_NL)  # type: ignore[operator]
        row = {"epoch": 0, "step": 0} | self._validate() | {"seconds": round(time.perf_counter() - started, 3)}
        if ctx.rank == 0:
            _write(row, log)
        ctx.report(row)
        by_loss = not self._measurable
        return self._selection(row["val_loss" if by_loss else f"val_{self.task.metric}"], by_loss=by_loss, epoch=0, epochs=0)

    def _kept_batches(self, parts: Iterable[Index], epoch: int) -> Iterator[Batch]:
        # Not ahead: to hand kept features over costs more than to gather them, 1.5 times an epoch of a linear head.
        arrays, device = self.arrays("train"), self.evaluator.device
        for index in parts:
            x = [to_device(part, device) for part in self.evaluator.inputs("train", index)]
            target, known = (to_device(torch.from_numpy(of_all[index]), device) for of_all in (arrays.target, arrays.known))
            yield x, target, known

    def _descend(
        self,
        recipe: Training,
        groups: Sequence[Group],
        make_batches: Callable[[Iterable[Index], int], Iterator[Batch]],
        ctx: Context,
        log: str | Path,
        probe: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Selection:
        """Epochs of a recipe; the best one's weights are in place afterwards.

        part: which of how many workers this one is, where each trains on its part of every batch. What trains on kept features, and
            evaluation, takes too little time to be worth sharing: each does all of it, to the same result.
        """
        images, penalty = len(self.arrays("train")), None if probe else self.transplant.penalty
        steps = sum(1 for _ in data.batches(np.arange(images), recipe.batch))
        optimizer, rate, best = optimizer_of(recipe, groups), Rate(recipe, steps), Best(recipe.patience)
        update = self._together(optimizer, images, recipe.batch) if part[1] > 1 else None
        best_state, by_loss, epoch = dict[str, Tensor](), recipe.select == "loss" or not self._measurable, 0
        for epoch in range(1, recipe.epochs + 1):
            if reason := ctx.should_stop():
                raise WorkError(f"stopped ({reason})", where=f"cell {self.config.key}", hint="the same command computes the cell again")
            started = time.perf_counter()
            share = 1.0 if epoch == recipe.epochs else (epoch - 1) / recipe.epochs  # the last epoch trains all, however few there are
            if _release(groups, share):
                best.begins(epoch)
                rate.begins()
            self.evaluator.train(True)
            order = rng("order", self.config.seed, epoch).permutation(images)
            losses: list[Tensor] = []
            indices = list(data.batches(order, recipe.batch))
            mine = [np.array_split(index, part[1])[part[0]] for index in indices]
            for step, batch in enumerate(make_batches(mine, epoch)):
                set_rates(optimizer, groups, rate.at((epoch - 1) * steps + step))
                # A mean over this worker's images, that the mean over workers be the one over the whole batch; of labels it is already.
                weight = 1.0 if self.task.kind == "multilabel" else len(mine[step]) * part[1] / len(indices[step])
                with nullcontext() if update else ranks.alone():
                    loss, added = self._losses(*batch)
                losses.append(weight * loss.detach())
                optimizer.zero_grad(set_to_none=True)
                total = weight * (loss + added) + (0.0 if penalty is None else penalty())
                if update:
                    update(total)
                else:
                    total.backward()
                    optimizer.step()
            of_worker = torch.stack(losses).double().mean()
            train_loss = float(ranks.all_sum(of_worker) / part[1] if update else of_worker)
            if not math.isfinite(train_loss):
                raise self.evaluator.diverged(f"the training loss is not finite in epoch {epoch}")
            row: dict[str, Any] = {"epoch": epoch, "step": epoch * steps, "train_loss": train_loss} | self._validate()
            row |= {"lr": rate.at(epoch * steps - 1), "seconds": round(time.perf_counter() - started, 3)}
            if ctx.rank == 0:
                _write(row, log)
            if not probe:
                ctx.report(row)
            if best.observe(epoch, -row["val_loss"] if by_loss else row[f"val_{self.task.metric}"]):
                best_state = self._moved(groups)
            rate.observe(row["val_loss"])
            if (rate.spent or best.waited(epoch)) and all(group.start <= share for group in groups):
                break
        if not best_state:
            raise self.evaluator.diverged("the validation loss was never finite")
        self.module.load_state_dict(best_state, strict=False)
        return self._selection(-best.score if by_loss else best.score, by_loss=by_loss, epoch=best.epoch, epochs=epoch)

    def _together(self, optimizer: torch.optim.Optimizer, images: int, batch: int) -> Callable[[Tensor], object]:
        """DeepSpeed's average of the gradients over the workers, whose batch norms have the statistics of the whole batch; its update.

        Raises:
            RequestError: a batch that has not an image for each worker.
        """
        from engine import norm
        from engine.config import EngineConfig, OptimizerConfig
        from engine.step import Engine

        least = min(len(index) for index in data.batches(np.arange(images), batch))
        if least < ranks.world():
            where = f"cell {self.config.key}: workers"
            raise RequestError(f"{ranks.world()} workers for a batch of {least} images", where=where, hint="workers=1")
        whole: nn.Module = self.module if self._auxiliary is None else Beside(self.module, self._auxiliary)
        norm.convert(whole)
        for parameter in whole.parameters():
            parameter.data = parameter.data.contiguous()  # DeepSpeed broadcasts bytes, which it finds in rows alone
        config = EngineConfig(optimizer=OptimizerConfig(lr=1.0), precision=self.config.dtype)
        engine = Engine(whole, config, rank_batch=1, warmup_steps=0, total_steps=1, optimizer=optimizer)
        self.evaluator.network = engine.forward
        return engine.update

    def _selection(self, value: float, *, by_loss: bool, epoch: int, epochs: int) -> Selection:
        return Selection(metric="loss" if by_loss else self.task.metric, value=value, epoch=epoch, epochs=epochs)

    def _moved(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """A copy of what training changes: trained parameters, and buffers, of the head alone where the encoder is frozen."""
        trained = {id(parameter) for group in groups for parameter in group.params}
        still = {name for name, parameter in self.module.named_parameters() if id(parameter) not in trained}
        head_alone = self.evaluator.frozen
        state: dict[str, Tensor] = self.module.state_dict()
        return {
            name: tensor.clone() for name, tensor in state.items() if name not in still and not (head_alone and name.startswith("encoder."))
        }

    def _losses(self, x: list[Tensor], target: Tensor, known: Tensor) -> tuple[Tensor, Tensor | float]:
        """Of one batch of training: that of the network's answers, and what an auxiliary classifier adds to it."""
        logits = self.evaluator.forward(x)
        loss = loss_of(self.task, logits, target, known, self._weights)
        if self._auxiliary is None:
            return loss, 0.0
        with self.evaluator.precision():
            second = self._auxiliary()
        if second is None:
            return loss, 0.0
        return loss, WEIGHT * loss_of(self.task, second, target, known, self._weights)

    @cached_property
    def _weights(self) -> Tensor | None:
        train = self.arrays("train")
        return class_weights(self.task, train.target, train.known)

    @cached_property
    def _measurable(self) -> bool:
        """Whether the metric is defined on validation: of answers that are all right, since of others kappa is 0 where that is not."""
        arrays = self.arrays("val")
        target = arrays.target
        if self.task.kind == "ordinal":
            target = target.argmax(1)[:, None] > np.arange(target.shape[1] - 1)
        right = np.where(target > 0.5, SURE, -SURE).astype(np.float32)
        return not math.isnan(headline(self.task, predict.measure(self.task, arrays, right)))

    def _validate(self) -> dict[str, Any]:
        """The loss, without what is added to it in training, and the task's metric on the validation split."""
        arrays, logits = self.arrays("val"), self.logits("val")
        value = headline(self.task, predict.measure(self.task, arrays, logits))
        with torch.inference_mode(), ranks.alone():
            target, known = torch.from_numpy(arrays.target), torch.from_numpy(arrays.known)
            loss = loss_of(self.task, torch.from_numpy(logits), target, known, self._weights)
        return {"val_loss": float(loss), f"val_{self.task.metric}": None if math.isnan(value) else value}


def _release(groups: Sequence[Group], share: float) -> bool:
    """Let those groups train whose time has come at this share of the epochs, and no others; whether that is news."""
    changed = False
    for group in groups:
        for parameter in group.params:
            changed |= parameter.requires_grad != (group.start <= share)
            parameter.requires_grad_(group.start <= share)
    return changed


def _write(row: dict[str, Any], log: str | Path) -> None:
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")
