"""The loop behind `pretrain.run`: build, resume, step, log, checkpoint, export."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base import storage
from base.config import parse, to_yaml
from base.errors import RequestError, WorkError
from base.paths import timestamp
from base.seeds import seed_of
from engine import checkpoint, norm, ranks
from engine.checkpoint import Snapshot
from engine.context import Context
from engine.step import Engine, rank_batch
from engine.throughput import Meter
from pretrain import health, methods, probes, publish
from pretrain.run import PRETRAIN_VERSION, PretrainConfig, Result
from shards import device_views
from shards.loader import Batch, Corpus, Targets, TrainLoader, eval_batches

SECONDS_BETWEEN_PUTS = 5.0
EMBED_BATCH = 256
STEPS_BETWEEN_CHECKS_ON_GPU = 10  # a check reads a number back from the GPU


class Run:
    """State of one call of `run`. Every rank holds one; collective calls happen in the same order on all."""

    def __init__(self, config: PretrainConfig, ctx: Context) -> None:
        self.config, self.ctx, self.recipe = config, ctx, config.recipe
        if config.threads:
            torch.set_num_threads(config.threads)
        ranks.start()
        if ranks.world() != ctx.world_size:
            raise WorkError(f"{ctx.world_size} workers were started, {ranks.world()} have met", where=f"pretrain {config.name}")
        self.first = ranks.rank() == 0
        self.rows: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.step = 0
        self.last_put = 0.0

    def finish(self) -> dict[str, Any] | None:
        """The whole run; see `pretrain.run.run`."""
        done = ranks.share(self._standing_result() if self.first else None)
        if done is not None:
            self._refuse_another(done["key"], "result")
            return dict(done)
        self.started = time.perf_counter()
        self.restarts = ranks.share(self._count_attempt() if self.first else None)
        self._build()
        self._resume()
        if not self._train():
            return None
        return self._conclude()

    def _at(self, *parts: str) -> str:
        return storage.join(self.config.out, *parts)

    def _standing_result(self) -> dict[str, Any] | None:
        return storage.read_json(self._at("result.json")) if storage.exists(self._at("result.json")) else None

    def _refuse_another(self, key: str, what: str) -> None:
        # By all ranks alike: one that raised alone would leave the others waiting.
        if key != self.config.key:
            raise RequestError(
                f"the {what} that stands here is that of run {key}, not of {self.config.key}", where=self.config.out, hint="use another out"
            )

    def _count_attempt(self) -> int:
        """Restarts so far. A file of its own: a worker killed before its first checkpoint counts too."""
        place = self._at("attempts.json")
        before = int(storage.read_json(place)["attempts"]) if storage.exists(place) else 0
        storage.put(place, json.dumps({"attempts": before + 1, "at": timestamp()}))
        if before == 0:
            storage.put(self._at("config.yaml"), to_yaml(self.config))
        return before

    def _build(self) -> None:
        config, recipe = self.config, self.recipe
        kind = methods.method_class(recipe.method)
        methods.check(recipe.method, recipe.options, views=recipe.views, architecture=config.architecture)
        size = rank_batch(recipe.global_batch, ranks.world())
        self.corpora = [Corpus(ref.shards, (ref.split,), config.cache_dir, ref.without) for ref in config.data]
        for ref, corpus in zip(config.data, self.corpora, strict=True):
            if corpus.manifest.digest != ref.digest:
                raise RequestError(
                    f"these shards of '{ref.dataset}' have the digest {corpus.manifest.digest[:12]}, the run asks for {ref.digest[:12]}",
                    where=ref.shards,
                    hint="run the study again: it plans with the shards that are there",
                )
            if corpus.channels != config.in_chans:
                raise RequestError(
                    f"'{ref.dataset}' has {corpus.channels} channels, the encoder takes {config.in_chans}",
                    where=ref.shards,
                    hint=f"in_chans={corpus.channels}",
                )
        self.labels = list(dict.fromkeys(label for corpus in self.corpora for label in corpus.labels))
        weights = [ref.weight for ref in config.data]
        self.loader = TrainLoader(
            self.corpora,
            None if len(set(weights)) == 1 else weights,
            recipe.views,
            recipe.global_batch,
            config.seed,
            rank=ranks.rank(),
            world=ranks.world(),
            workers=config.workers,
            labels=self.labels if kind.labelled else [],
            exact_epoch=kind.exact_epochs,
            quarantine_url=self._at(f"quarantine-{ranks.rank()}.jsonl"),
        )
        self.epoch_steps = self.loader.steps_per_epoch
        self.total = max(1, math.ceil(recipe.epochs * self.epoch_steps))
        if recipe.max_steps is not None:
            self.total = min(self.total, recipe.max_steps)
        encoder, self.parent = publish.begin(config)
        facts = methods.Facts(
            seed=config.seed,
            samples=sum(len(corpus) for corpus in self.corpora),
            global_batch=recipe.global_batch,
            sizes=tuple(recipe.views.sizes),
            labels=tuple(self.labels) if kind.labelled else (),
            rates=self._rates() if kind.labelled else (),
        )
        self.method = methods.build(recipe.method, encoder, recipe.options, facts)
        self.method.chunk = recipe.virtual_batch
        if recipe.virtual_batch and norm.batch_norms(encoder):
            raise RequestError(
                f"virtual_batch is exact only without batch norm, and {config.architecture} has it",
                where="recipe: virtual_batch",
                hint="virtual_batch=null, or layer norm, for instance vit_small_patch16_224",
            )
        for network in (self.method, *self.method.teachers.values()):
            norm.convert(network)
            network.train()
        warmup = round(recipe.optimizer.warmup_epochs * self.epoch_steps)
        self.engine = Engine(self.method, recipe.engine(), rank_batch=size, warmup_steps=min(warmup, self.total), total_steps=self.total)
        # Convolutions are faster with channels last, on CPUs too. After the engine: its broadcast of parameters needs rows.
        for network in (self.method, *self.method.teachers.values()):
            network.to(self.engine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(seed_of("train", config.seed, ranks.rank()))

    def _rates(self) -> tuple[float, ...]:
        """Positive rate of each label among the samples where it is known."""
        parts = []
        for corpus in self.corpora:
            resolve = Targets(corpus.card, self.labels, training=True, seed=self.config.seed)
            parts.append(resolve([record.labels for record in corpus.records()], corpus.keys()))
        target_NL, mask_NL = (np.concatenate(of_corpora) for of_corpora in zip(*parts, strict=True))
        return tuple(((target_NL * mask_NL).sum(axis=0) / np.maximum(mask_NL.sum(axis=0), 1)).tolist())

    def _resume(self) -> None:
        found = checkpoint.find_newest(self._at("checkpoints")) if self.recipe.checkpoint_every_steps else None
        if found is None:
            if self.first and self.restarts:
                storage.remove(self._at("metrics.jsonl"))
            return
        snapshot = checkpoint.load(found)
        self._refuse_another(snapshot.state["key"], "checkpoint")
        self.method.load_state_dict(snapshot.model, strict=True)
        for name, teacher in self.method.teachers.items():
            own = {key.removeprefix(f"{name}."): value for key, value in (snapshot.ema or {}).items() if key.startswith(f"{name}.")}
            teacher.load_state_dict(own, strict=True)
        self.engine.load_optimizer_state(snapshot.optimizer, snapshot.state["optimizer_values"])
        if snapshot.mine:
            checkpoint.restore_random_state(snapshot.mine)
            self.method.load_extra_state({name[6:]: value for name, value in snapshot.mine.items() if name.startswith("extra.")})
        self.step = found.step
        self.seconds_before = float(snapshot.state["seconds"])
        # Rows after the checkpoint will be logged again by the same steps.
        self.rows = ranks.share(self._kept_rows(found.step) if self.first else None)
        for reason in found.refused:
            self._report({"event": "checkpoint refused", "step": found.step, "why": reason})
        self._report({"event": "resumed", "step": found.step, "restarts": self.restarts, "workers": ranks.world()})
        self._put_rows(force=True)

    def _kept_rows(self, step: int) -> list[dict[str, Any]]:
        place = self._at("metrics.jsonl")
        lines = storage.read_bytes(place).decode().splitlines() if storage.exists(place) else []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a killed writer
                continue
            if row["step"] <= step:
                rows.append(row)
        return rows

    def _train(self) -> bool:
        """Steps to the end; False when asked to stop. A checkpoint stands at the end either way."""
        meter = Meter(self.recipe.global_batch)
        batches = iter(self.loader.batches(self.step))
        while self.step < self.total:
            self.method.clock = methods.Clock(self.step, self.total, self.epoch_steps)
            if self.step % self.epoch_steps == 0:
                self.method.on_epoch_start(self._embed)
            with meter.waiting():
                batch = self._place(next(batches))
            done = self.step + 1
            logged = done == 1 or done % self.recipe.log_every_steps == 0 or done == self.total
            output = self.engine.forward(batch)
            gradient = self.engine.step(output.loss, self.step, measure=logged)
            self.method.on_step_end()
            rate = self.engine.rate(self.step)
            self.step = done
            meter.tick()
            stop = self._agree(output.loss, logged)
            if logged:
                self._log(output, rate, gradient, meter)
            every = self.recipe.checkpoint_every_steps
            if every and (done % every == 0 or done == self.total or stop):
                self._save()
            if stop and done < self.total:
                self._put_rows(force=True)
                return False
        return True

    def _place(self, batch: Batch) -> Batch:
        """On this rank's device."""
        device = self.engine.device
        views = [view.to(device, non_blocking=True) for view in batch.views]
        if batch.draws_VBP is not None:
            views = device_views.apply(views[0], batch.draws_VBP)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value := getattr(batch, name), Tensor) else value
            for name in ("index_B", "target_BL", "mask_BL")
        }
        return batch._replace(views=views, **moved)

    def _agree(self, loss: Tensor, logged: bool) -> bool:
        """Whether to stop, decided together: a rank that stops alone would leave the others waiting in a collective."""
        if self.engine.device.type == "cuda" and not logged and self.step % STEPS_BETWEEN_CHECKS_ON_GPU:
            return False
        flags = torch.zeros(1 + ranks.world(), device=self.engine.device)
        flags[0] = float(self.ctx.should_stop() is not None)
        flags[1 + ranks.rank()] = float(not bool(torch.isfinite(loss.detach())))
        stop, *bad = ranks.all_sum(flags).tolist()
        if any(bad):
            named = [rank for rank, value in enumerate(bad) if value]
            raise WorkError(
                f"the loss is not finite at step {self.step} on rank {named}",
                where=f"pretrain {self.config.name}",
                hint="lower optimizer.lr",
            )
        return stop > 0

    def _log(self, output: methods.Output, rate: float, gradient: float | None, meter: Meter) -> None:
        scalars = {"loss": output.loss.detach().float(), **output.logs}
        summed = ranks.all_sum(torch.stack([value.float() for value in scalars.values()])) / ranks.world()
        row: dict[str, Any] = {"step": self.step, "steps": self.total, "epoch": round(self.step / self.epoch_steps, 4)}
        row |= {name: round(value, 6) for name, value in zip(scalars, summed.tolist(), strict=True)}
        row |= {"lr": rate} | ({"grad_norm": round(gradient, 6)} if gradient is not None else {})
        row |= probes.measure(output.features)
        if "contrastive_top1" in row:
            row["contrastive_chance"] = 1 / (2 * self.recipe.global_batch - 1)
        # Speeds are this rank's clock; rank 0's stand for all, so that every rank reports the same row.
        row |= ranks.share(meter.read() | {"seconds": round(self._seconds(), 2)})
        self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.ctx.report(row)
        self._put_rows()

    def _put_rows(self, force: bool = False) -> None:
        # Object stores cannot append: the whole file, at most every few seconds.
        if self.first and (force or time.perf_counter() - self.last_put > SECONDS_BETWEEN_PUTS):
            storage.put(self._at("metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in self.rows))
            self.last_put = time.perf_counter()

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self) -> None:
        tensors, values = self.engine.optimizer_state()
        mine = checkpoint.random_state() | {f"extra.{name}": value for name, value in self.method.extra_state().items()}
        state = {
            "key": self.config.key,
            "version": PRETRAIN_VERSION,
            "epoch": self.step / self.epoch_steps,
            "total_steps": self.total,
            "loader": {"next_step": self.step, "global_batch": self.recipe.global_batch, "seed": self.config.seed},
            "optimizer_values": values,
            "seconds": self._seconds(),
            "restarts": self.restarts,
            "configuration": self.config.model_dump(mode="json", by_alias=True),
        }
        self._put_rows(force=True)  # before COMMIT: a resumed run reads the rows up to its checkpoint
        ema = {
            f"{name}.{key}": value for name, teacher in self.method.teachers.items() for key, value in self.engine.whole(teacher).items()
        }
        snapshot = Snapshot(self.step, self.engine.model_state(), tensors, state, mine, ema or None)
        checkpoint.save(self._at("checkpoints"), snapshot, self.recipe.keep_checkpoints)

    @torch.no_grad()
    def _embed(self, network: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See methods.Embed. Ranks share the work; samples that cannot be read are left out."""
        modules = [self.method, *self.method.teachers.values()]
        for module in modules:
            module.eval()
        offset, indices, features = 0, [], []
        for corpus in self.corpora:
            for batch in eval_batches(corpus, self.recipe.views.size, EMBED_BATCH, ranks.rank(), ranks.world(), labels=[]):
                z_Bd = network(self._place(batch).views[0]).float()
                index_B = torch.where(batch.valid_B, batch.index_B + offset, -1).to(z_Bd.device)
                indices.append(ranks.all_gather(index_B).cpu())
                features.append(ranks.all_gather(z_Bd).cpu())
            offset += len(corpus)
        for module in modules:
            module.train()
        index_N, z_Nd = torch.cat(indices), torch.cat(features)
        order = torch.argsort(index_N)[(index_N < 0).sum() :]
        return index_N[order], z_Nd[order]

    def _result(self, state: dict[str, Tensor], verdict: health.Verdict) -> dict[str, Any]:
        speeds = [row["img_per_s"] for row in self.rows if "img_per_s" in row]
        licences = [str(corpus.manifest.card.licence) for corpus in self.corpora]
        facts = {
            "steps": self.total,
            "epochs": round(self.total / self.epoch_steps, 4),
            "images": self.total * self.recipe.global_batch,
            "image_size": self.recipe.views.size,
            "img_per_s": round(float(np.median(speeds)), 2),
            "seconds": round(self._seconds(), 2),
            "health": verdict.health,
            "why": verdict.why,
            "restarts": self.restarts,
            "workers": ranks.world(),
            "device": str(self.engine.device),
        }
        result = publish.publish(self.config, self.method, self.parent, state, licences, self.total) | facts
        return parse(result, Result, "result.json").model_dump(mode="json", by_alias=True)

    def _conclude(self) -> dict[str, Any]:
        """Judge, export, write the result last. Rank 0 writes; all ranks return the same."""
        measured = [row for row in self.rows if "loss" in row]
        labelled = self.method.labelled
        encoder: Any = self.method.encoder
        verdict = health.judge(
            measured, chance_loss=self.method.chance_loss(self.recipe.global_batch), width=encoder.num_features, labelled=labelled
        )
        state = self.engine.model_state()
        result = self._result(state, verdict) if self.first else None
        self._report({"event": "health", "step": self.step, "health": verdict.health, "why": verdict.why})
        self._put_rows(force=True)
        if self.first:
            storage.put(self._at("result.json"), json.dumps(result, indent=1))
        return dict(ranks.share(result))
