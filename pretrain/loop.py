"""The loop behind `pretrain.run`: build, resume, step, log, checkpoint, export."""

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base import storage
from base.config import parse, to_yaml
from base.errors import RequestError, WorkError
from base.paths import timestamp
from base.seeds import seed_of
from engine import checkpoint, ema, gpus, norm, ranks
from engine.checkpoint import Snapshot
from engine.context import Context
from engine.pace import Pace, words
from engine.step import Engine, rank_batch
from engine.throughput import Meter
from pretrain import corpora, explain, health, methods, probes, publish, source_probes
from pretrain.capture import dump
from pretrain.economy import economise
from pretrain.record import Record
from pretrain.run import PRETRAIN_VERSION, PretrainConfig, Result, SourceProbe, differing
from shards import device_views
from shards.loader import Batch, TrainLoader, eval_batches

EMBED_BATCH = 256
LOGS_BETWEEN_LABEL_PROBES = 5
MOST_NOT_FINITE = 3  # steps in a row
NOT_FINITE = "not-finite"
ROWS_TO_STOP = 3
STEPS_BETWEEN_CHECKS_ON_GPU = 10


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
        self.record = Record(self._at("metrics.jsonl"), ctx)
        self.window, self.pace = probes.Window(), Pace()
        self.epoch_loss = torch.zeros(2)  # of this rank: sum and number of losses
        self.seconds_before = 0.0
        self.step = 0

    def finish(self) -> dict[str, Any] | None:
        """The whole run; see `pretrain.run.run`."""
        done = ranks.share(self._standing_result() if self.first else None)
        if done is not None:
            self._refuse_another(done["key"], "result")
            return dict(done)
        self.started = time.perf_counter()
        self.restarts = ranks.share(self._count_attempt() if self.first else None)
        self._build()
        snapshot = self._found()
        self._start(snapshot)
        try:
            finished = self._train()
        finally:
            self.saver.finish()
        return self._conclude() if finished else None

    def _at(self, *parts: str) -> str:
        return storage.join(self.config.out, *parts)

    def _standing_result(self) -> dict[str, Any] | None:
        return storage.read_json(self._at("result.json")) if storage.exists(self._at("result.json")) else None

    def _refuse_another(self, key: str, what: str, held: Mapping[str, Any] | None = None) -> None:
        # By all ranks alike: one that raised alone would leave the others waiting.
        if key != self.config.key:
            keys = differing(held, self.config.model_dump(mode="json", by_alias=True)) if held else []
            raise RequestError(
                f"the {what} that stands here is that of run {key}, not of {self.config.key}" + (f": {', '.join(keys)}" if keys else ""),
                where=self.config.out,
                hint="use another out",
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
        rank_batch(recipe.global_batch, ranks.world())
        self.corpora = corpora.opened(config)
        self.labels = corpora.all_labels(self.corpora)
        weights = [ref.weight for ref in config.data]
        self.loader = TrainLoader(
            self.corpora,
            None if set(weights) == {1.0} else weights,
            recipe.views,
            recipe.global_batch,
            config.seed,
            rank=ranks.rank(),
            world=ranks.world(),
            workers=config.workers,
            labels=self.labels,  # the probes look at them, whoever does not train on them
            exact_epoch=kind.exact_epochs,
            quarantine_url=self._at(f"quarantine-{ranks.rank()}.jsonl"),
        )
        self.epoch_steps = self.loader.steps_per_epoch
        if config.replay is not None:
            # One pass over the run's own data, which come first: a large corpus replayed must not stretch the schedule.
            self.epoch_steps = math.ceil(len(self.corpora[0]) / weights[0] / recipe.global_batch)
        self.total = recipe.steps(self.epoch_steps)
        encoder, self.parent = publish.begin(config)
        facts = corpora.facts_of(self.corpora, self.labels, config, labelled=kind.labelled)
        self.method = methods.build(recipe.method, encoder, recipe.options, facts)
        self.method.chunk = recipe.virtual_batch
        economise(recipe, encoder)
        if recipe.compile:
            encoder.net.compile()
        for network in (self.method, *self.method.teachers.values()):
            norm.convert(network)
            network.train()

    def _start(self, snapshot: Snapshot | None) -> None:
        """The engine around the method, with the checkpoint's weights in it from the start: at ZeRO 3 they are cut in pieces there."""
        recipe, networks = self.recipe, (self.method, *self.method.teachers.values())
        if snapshot is not None:
            self.method.load_state_dict(snapshot.model, strict=True)
            for name, teacher in self.method.teachers.items():
                own = {key.removeprefix(f"{name}."): value for key, value in (snapshot.ema or {}).items() if key.startswith(f"{name}.")}
                teacher.load_state_dict(own, strict=True)
        size, warmup = rank_batch(recipe.global_batch, ranks.world()), round(recipe.optimizer.warmup_epochs * self.epoch_steps)
        self.engine = Engine(self.method, recipe.engine(), rank_batch=size, warmup_steps=min(warmup, self.total), total_steps=self.total)
        # Convolutions are faster with channels last, on CPUs too. After the engine: its broadcast of parameters needs rows.
        # Not under ZeRO, which flattens weights as they lie.
        layout = torch.contiguous_format if recipe.zero_stage else torch.channels_last
        for network in networks:
            network.to(self.engine.device, memory_format=layout)  # type: ignore[call-overload]
        torch.manual_seed(seed_of("train", self.config.seed, ranks.rank()))
        if snapshot is not None:
            self._go_on(snapshot)

    def _found(self) -> Snapshot | None:
        """The newest checkpoint of this run, and what was logged up to it."""
        self.saver = checkpoint.Saver(self._at("checkpoints"), self.recipe.keep_checkpoints)
        found = checkpoint.find_newest(self.saver.url) if self.recipe.checkpoint_every_steps else None
        if found is None:
            if self.first and self.restarts:
                storage.remove(self._at("metrics.jsonl"))
            return None
        snapshot = checkpoint.load(found)
        self._refuse_another(snapshot.state["key"], "checkpoint", snapshot.state["configuration"])
        self.record.take_up(found.step)
        for reason in found.refused:
            self.record.add({"event": "checkpoint refused", "step": found.step, "why": reason})
        self.record.add({"event": "resumed", "step": found.step, "restarts": self.restarts, "workers": ranks.world()})
        self.record.put()
        return snapshot

    def _go_on(self, snapshot: Snapshot) -> None:
        """Everything of the checkpoint but the weights."""
        self.engine.load_optimizer_state(snapshot.optimizer, snapshot.state["optimizer_values"])
        self.engine.plateau.state = list(snapshot.state["plateau"])
        self.step, self.seconds_before = snapshot.step, float(snapshot.state["seconds"])
        if snapshot.mine:
            checkpoint.restore_random_state(snapshot.mine)
            self.method.load_extra_state(_of("extra", snapshot.mine))
            self.window.state = _of("window", snapshot.mine)
            self.epoch_loss = snapshot.mine["epoch_loss"]

    def _train(self) -> bool:
        """Steps to the end; False when asked to stop. A checkpoint stands at the end either way."""
        if self.step == 0:
            self._probe_sources("before")
        meter, not_finite = Meter(self.recipe.global_batch, self._least_seconds()), 0
        batches = iter(self.loader.batches(self.step))
        while self.step < self.total:
            self.method.clock = methods.Clock(self.step, self.total, self.epoch_steps)
            if self.step % self.epoch_steps == 0:
                self.method.on_epoch_start(self._embed)
            done = self.step + 1
            logged = done == 1 or done % self.recipe.log_every_steps == 0 or done == self.total
            with self.pace.measured(logged):
                with meter.waiting():
                    batch = self._place(next(batches))
                output, measured = self._update(batch, logged)
            not_finite = 0 if output else not_finite + 1
            if not_finite == MOST_NOT_FINITE:
                raise WorkError(
                    f"the loss is not finite at step {done} on rank {measured['ranks']}, {MOST_NOT_FINITE} steps in a row",
                    where=f"pretrain {self.config.name}",
                    hint=f"lower optimizer.lr; the batches and the state are in {self._at(NOT_FINITE)}",
                )
            self.step = done
            meter.tick()
            stop = self._stop(logged)
            if output and logged:
                self._log(output, measured, batch, meter)
            every = self.recipe.checkpoint_every_steps
            if every and not not_finite and (done % every == 0 or done == self.total or stop):
                self._save()
            if stop and done < self.total:
                self.record.put()
                return False
        self._probe_sources("after")
        return True

    def _probe_sources(self, when: str) -> None:
        """Rows of what the encoder knows of earlier corpora; those that stand were written before the run was stopped."""
        standing = [(row["dataset"], row["when"]) for row in self.record.of("source probe")]
        for ref in [ref for ref in self.config.earlier if (ref.dataset, when) not in standing]:
            scores = source_probes.measure(
                self.method.encoder, ref, size=self.recipe.views.size, place=self._place, cache_dir=self.config.cache_dir
            )
            self.record.add({"event": "source probe", "step": self.step, "dataset": ref.dataset, "when": when, **scores})

    def _least_seconds(self) -> float | None:
        """Of a step, by what this GPU can do at best; None on a CPU, and on a GPU that is not in the table."""
        gpu = gpus.find(torch.cuda.get_device_name()) if self.engine.device.type == "cuda" else None
        if gpu is None or not self.first:  # rank 0's speeds stand for all
            return None
        recipe, config = self.recipe, self.config
        sketch = explain.sketch(recipe, config.architecture, config.in_chans, self.method.facts, self.epoch_steps)
        cost = explain.cost(recipe, sketch, config.in_chans, ranks.world())
        return gpus.least_seconds(gpu, recipe.precision, cost.flops, cost.moved)

    def _update(self, batch: Batch, logged: bool) -> tuple[methods.Output | None, dict[str, Any]]:
        """One update, and what was measured of it; None where a loss is not finite: then nothing was updated."""
        rate, outputs, gradient = self.engine.rate(self.step), [], None
        for part in _micro(batch, self.recipe.accumulate):
            output = self.engine.forward(part)
            if named := self._not_finite(output.loss, part, logged):
                return None, {"ranks": named}
            gradient = self.engine.step(output.loss, self.step, measure=logged)
            outputs.append(output)
        followed = {name: student for name in self.method.teachers if logged and (student := self.method.followed(name)) is not None}
        before = {name: list(self.method.teachers[name].parameters())[ema.largest(self.method.teachers[name])].clone() for name in followed}
        self.method.on_step_end()
        output = _joined(outputs)
        self.window.count(output.features)
        if self.recipe.optimizer.schedule == "plateau":
            self._observe(output.loss)
        measured = {"lr": rate} | ({"grad_norm": round(gradient, 6)} if gradient is not None else {})
        for name, student in followed.items():
            measured[f"{name}_lag"] = round(ema.lag(self.method.teachers[name], student), 6)
            measured["teacher_moved"] = round(ema.moved(before[name], self.method.teachers[name], student), 6)
        return output, measured

    def _observe(self, loss: Tensor) -> None:
        self.epoch_loss += torch.tensor([float(loss.detach()), 1.0])
        if (self.step + 1) % self.epoch_steps == 0:
            total, count = ranks.all_sum(self.epoch_loss.to(self.engine.device)).tolist()
            self.engine.plateau.observe(total / count)
            self.epoch_loss = torch.zeros(2)

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
        return batch._replace(views=views, draws_VBP=None, **moved)

    def _rarely(self, logged: bool) -> bool:
        # On a GPU a check reads a number back and makes the device wait.
        return self.engine.device.type == "cuda" and not logged and (self.step + 1) % STEPS_BETWEEN_CHECKS_ON_GPU != 0

    def _not_finite(self, loss: Tensor, batch: Batch, logged: bool) -> list[int]:
        """The ranks whose loss is not finite; then the batches and the state are written down. The same on every rank."""
        if self._rarely(logged):
            return []
        flags = torch.zeros(ranks.world(), device=self.engine.device)
        flags[ranks.rank()] = float(not bool(torch.isfinite(loss.detach())))
        named = [rank for rank, bad in enumerate(ranks.all_sum(flags).tolist()) if bad]
        if not named:
            return []
        if self.recipe.accumulate > 1:  # the micro-batches before have left their gradients
            raise WorkError(f"the loss is not finite at step {self.step + 1} on rank {named}", where=f"pretrain {self.config.name}")
        state = self.engine.model_state() if self.engine.config.zero_stage == 3 or self.first else None
        place = dump(self._at(NOT_FINITE), self.step + 1, batch, state if self.first else None, float(loss.detach()))
        self.record.add({"event": "not finite", "step": self.step + 1, "why": f"the loss on rank {named}", "dump": place})
        return named

    def _stop(self, logged: bool) -> bool:
        """Whether to stop, decided together: a rank that stops alone would leave the others waiting in a collective."""
        if self._rarely(logged):
            return False
        asked = torch.tensor([float(self.ctx.should_stop() is not None)], device=self.engine.device)
        return float(ranks.all_sum(asked)) > 0

    def _log(self, output: methods.Output, measured: dict[str, Any], batch: Batch, meter: Meter) -> None:
        scalars = {"loss": output.loss.detach().float(), **output.logs}
        summed = ranks.all_sum(torch.stack([value.detach().float() for value in scalars.values()])) / ranks.world()
        row: dict[str, Any] = {"step": self.step, "steps": self.total, "epoch": round(self.step / self.epoch_steps, 4)}
        row |= {name: round(value, 6) for name, value in zip(scalars, summed.tolist(), strict=True)}
        by_labels = self.step in (1, self.total) or self.step // self.recipe.log_every_steps % LOGS_BETWEEN_LABEL_PROBES == 0
        row |= measured | self.window.measure(output.features, batch, by_labels=by_labels)
        if "contrastive_top1" in row:
            row["contrastive_chance"] = 1 / (2 * self.recipe.global_batch - 1)
        # Speeds are this rank's clock; rank 0's stand for all, so that every rank reports the same row.
        row |= ranks.share(meter.read() | {"seconds": round(self._seconds(), 2)}) | self.pace.read()
        verdict = self._verdict([*self.record.measured, row])
        self.record.add(row | {"health": verdict.health})
        for slow in self.pace.stragglers(row["rank_s"]) if "rank_s" in row else ():
            self.record.add({"event": "straggler", "step": self.step, **slow})
        self._stop_collapsed(verdict)

    def _verdict(self, rows: list[dict[str, Any]]) -> health.Verdict:
        chance, width = self.method.chance_loss(self.recipe.global_batch), self.method.width
        return health.judge(rows, chance_loss=chance, width=width, labelled=self.method.labelled)

    def _stop_collapsed(self, verdict: health.Verdict) -> None:
        recent = [row["health"] for row in self.record.measured[-ROWS_TO_STOP:]]
        if not self.recipe.stop_when_collapsed or recent != ["collapsed"] * ROWS_TO_STOP or self.step < health.FEWEST_STEPS:
            return
        self.record.put()
        self.saver.finish()
        sound = ranks.share(checkpoint.newest_sound(self.saver.url) if self.first else None)
        raise WorkError(
            f"{verdict.why}; the last checkpoint before: {sound or 'none'}",
            where=f"pretrain {self.config.name}",
            hint="stop_when_collapsed=false lets it go on",
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self) -> None:
        tensors, values = self.engine.optimizer_state()
        mine = checkpoint.random_state() | {f"extra.{name}": value for name, value in self.method.extra_state().items()}
        mine |= {f"window.{name}": value for name, value in self.window.state.items()} | {"epoch_loss": self.epoch_loss}
        newest: dict[str, Any] = next(iter(self.record.measured[-1:]), {})
        score = next((row["knn_auroc"] for row in reversed(self.record.measured) if "knn_auroc" in row), None)
        state = {
            "key": self.config.key,
            "version": PRETRAIN_VERSION,
            "epoch": self.step / self.epoch_steps,
            "total_steps": self.total,
            "loader": {"next_step": self.step, "global_batch": self.recipe.global_batch, "seed": self.config.seed},
            "optimizer_values": values,
            "plateau": self.engine.plateau.state,
            "score": score,
            "sound": newest.get("health") in ("healthy", "too short"),
            "seconds": self._seconds(),
            "restarts": self.restarts,
            "configuration": self.config.model_dump(mode="json", by_alias=True),
        }
        self.record.put()  # before COMMIT: a resumed run reads the rows up to its checkpoint
        teachers = {name: self.engine.whole(teacher) for name, teacher in self.method.teachers.items()}
        ema = {f"{name}.{key}": value for name, teacher in teachers.items() for key, value in teacher.items()}
        copied = {name: value.detach().cpu().clone().contiguous() for name, value in mine.items()}
        self.saver.save(Snapshot(self.step, self.engine.model_state(), tensors, state, copied, ema or None))

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
        speeds = [row["img_per_s"] for row in self.record.rows if "img_per_s" in row]
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
            "stragglers": [words(row) for row in self.record.of("straggler")],
            "source_probes": [{name: row[name] for name in SourceProbe.model_fields} for row in self.record.of("source probe")],
            "restarts": self.restarts,
            "workers": ranks.world(),
            "device": str(self.engine.device),
        }
        result = publish.publish(self.config, self.method, self.parent, state, licences, self.total) | facts
        return parse(result, Result, "result.json").model_dump(mode="json", by_alias=True)

    def _conclude(self) -> dict[str, Any]:
        """Judge, export, write the result last. Rank 0 writes; all ranks return the same."""
        verdict = self._verdict(self.record.measured)
        state = self.engine.model_state()
        result = self._result(state, verdict) if self.first else None
        self.record.add({"event": "health", "step": self.step, "health": verdict.health, "why": verdict.why})
        self.record.put()
        if self.first:
            storage.put(self._at("result.json"), json.dumps(result, indent=1))
        return dict(ranks.share(result))


def _of(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}


def _micro(batch: Batch, count: int) -> list[Batch]:
    """The batch in equal parts, in order."""
    if count == 1:
        return [batch]
    cut: dict[str, Any] = {name: value.chunk(count) for name in batch._fields if isinstance(value := getattr(batch, name), Tensor)}
    views = list(zip(*(view.chunk(count) for view in batch.views), strict=True))
    parts: list[dict[str, Any]] = [{name: pieces[i] for name, pieces in cut.items()} for i in range(count)]
    return [batch._replace(views=list(views[i]), **parts[i]) for i in range(count)]


def _joined(outputs: list[methods.Output]) -> methods.Output:
    """Micro-batches' outputs as one: means of the scalars, all features."""
    if len(outputs) == 1:
        return outputs[0]
    loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    features = {name: torch.cat([output.features[name] for output in outputs]) for name in outputs[0].features}
    logs = {name: torch.stack([output.logs[name] for output in outputs]).mean() for name in outputs[0].logs}
    return methods.Output(loss, features, logs)
