"""The loop behind `pretrain.run`: build, resume, step, log, checkpoint, export."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
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
from engine.ahead import ahead, to_device
from engine.checkpoint import Snapshot
from engine.context import Context
from engine.pace import Pace, words
from engine.step import Engine, rank_batch
from engine.throughput import Meter
from pretrain import corpora, ends, explain, health, methods, micro, probes, source_probes, state
from pretrain.economy import economise
from pretrain.record import Record
from pretrain.run import PretrainConfig, Result, SourceProbe, differing
from pretrain.watch import IN_A_ROW, Watch
from shards import device_views
from shards.batches import Batch
from shards.evaluate import eval_batches
from shards.loader import TrainLoader

EMBED_BATCH = 256
LOGS_BETWEEN_LABEL_PROBES = 5
ROWS_TO_STOP = 3


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
            self.refuse_another(done["key"], "result")
            return dict(done)
        self.started = time.perf_counter()
        self.restarts = ranks.share(self._count_attempt() if self.first else None)
        self._build()
        self.saver = checkpoint.Saver(self._at("checkpoints"), self.recipe.keep_checkpoints)
        self._start(state.find(self))
        try:
            finished = self._train()
        finally:
            self.saver.finish()
        return self._conclude() if finished else None

    def _at(self, *parts: str) -> str:
        return storage.join(self.config.out, *parts)

    def _standing_result(self) -> dict[str, Any] | None:
        return storage.read_json(self._at("result.json")) if storage.exists(self._at("result.json")) else None

    def refuse_another(self, key: str, what: str, held: Mapping[str, Any] | None = None) -> None:
        """What stands in `out` must be of this configuration."""
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
        if not storage.exists(self._at("config.yaml")):  # first: who counts is known
            storage.put(self._at("config.yaml"), to_yaml(self.config))
        storage.put(place, json.dumps({"attempts": before + 1, "at": timestamp()}))
        return before

    def _build(self) -> None:
        config, recipe = self.config, self.recipe
        kind = methods.method_class(recipe.method)
        methods.check(recipe.method, recipe.options, views=recipe.views, architecture=config.architecture)
        rank_batch(recipe.global_batch, ranks.world(), recipe.accumulate)
        self.corpora = corpora.opened(config)
        self.labels = config.labels or corpora.all_labels(self.corpora)
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
        encoder, self.parent = ends.begin(config)
        facts = corpora.facts_of(self.corpora, self.labels, config, labelled=kind.labelled)
        self.method = methods.build(recipe.method, encoder, recipe.options, facts)
        self.method.chunk = recipe.virtual_batch
        economise(recipe, encoder)
        if recipe.compile:
            self.method.compile_encoder()
        for network in (self.method, *self.method.teachers.values()):
            norm.convert(network)
            network.train()

    def _start(self, snapshot: Snapshot | None) -> None:
        """The engine around the method, with the checkpoint's weights in it from the start: at ZeRO 3 they are cut in pieces there."""
        recipe, networks = self.recipe, (self.method, *self.method.teachers.values())
        if snapshot is not None:
            state.load_weights(self.method, snapshot)
        size, warmup = recipe.global_batch // ranks.world(), round(recipe.optimizer.warmup_epochs * self.epoch_steps)
        self.engine = Engine(self.method, recipe.engine(), rank_batch=size, warmup_steps=min(warmup, self.total), total_steps=self.total)
        # Convolutions are faster with channels last, on CPUs too. After the engine: its broadcast of parameters needs rows.
        # Not under ZeRO, which flattens weights as they lie.
        layout = torch.contiguous_format if recipe.zero_stage else torch.channels_last
        for network in networks:
            network.to(self.engine.device, memory_format=layout)  # type: ignore[call-overload]
        # The gradients of micro-batches cannot be taken back, so that the first ends a run that accumulates.
        most = 1 if recipe.accumulate > 1 else IN_A_ROW
        self.watch = Watch(self.config.name, self._at("not-finite"), self.record, self.method, most)
        self.least_seconds = self._least_seconds()  # before the random state: it builds the method once more, which seeds
        torch.manual_seed(seed_of("train", self.config.seed, ranks.rank()))
        if snapshot is not None:
            state.go_on(self, snapshot)

    def _train(self) -> bool:
        """Steps to the end; False when asked to stop. A checkpoint stands at the end either way, where the recipe asks for any."""
        if self.step == 0:
            self._probe_sources("before")
        meter = Meter(self.recipe.global_batch, self.least_seconds)
        batches = self._batches()
        while self.step < self.total:
            self.method.clock = methods.Clock(self.step, self.total, self.epoch_steps)
            if self.step % self.epoch_steps == 0:
                self.method.on_epoch_start(self._embed)
            done = self.step + 1
            logged = done == 1 or done % self.recipe.log_every_steps == 0 or done == self.total
            with self.pace.measured(logged):
                with meter.waiting():
                    batch = next(batches)
                batch = self._place(batch)
                output, measured = self._update(batch, logged)
            if self.recipe.optimizer.schedule == "plateau":
                self._observe(output)
            self.step = done
            meter.tick()
            if output and logged:
                self._log(output, measured, batch, meter)
            every = self.recipe.checkpoint_every_steps
            if every and (self.watch.stop or (output and (done % every == 0 or done == self.total))):
                state.save(self)
            if self.watch.stop and done < self.total:
                self.record.put()
                return False
        self._probe_sources("after")
        return True

    def _batches(self) -> Iterator[Batch]:
        """Those of the steps that are left."""
        read = islice(self.loader.batches(self.step), self.total - self.step)
        # On a CPU nothing is copied, and a batch ahead would only hold memory.
        return ahead(self._sent, read, self.engine.device) if self.engine.device.type == "cuda" else read

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
        on_gpu = self.engine.device.type == "cuda" and self.first  # rank 0's speeds stand for all
        gpu = gpus.find(torch.cuda.get_device_name()) if on_gpu else None
        sizes = self.config.architecture, self.config.in_chans, self.method.facts, self.epoch_steps, ranks.world()
        return None if gpu is None else explain.least_step(gpu, self.recipe, *sizes)

    def _update(self, batch: Batch, logged: bool) -> tuple[methods.Output | None, dict[str, Any]]:
        """One update, and what was measured of it; None where a loss is not finite: then nothing was updated."""
        rate, outputs, gradient = self.engine.rate(self.step), [], None
        asked = self.ctx.should_stop() is not None
        self.watch.keep()
        for part in micro.parts(batch, self.recipe.accumulate):
            output = self.engine.forward(part)
            if not self.watch.finite(output.loss, part, self.step + 1, lambda: state.held(self), asked):
                return None, {}
            gradient = self.engine.step(output.loss, self.step, measure=logged)
            outputs.append(output)
        followed = {name: student for name in self.method.teachers if logged and (student := self.method.followed(name)) is not None}
        before = {name: list(self.method.teachers[name].parameters())[ema.largest(self.method.teachers[name])].clone() for name in followed}
        self.method.on_step_end()
        output = micro.joined(outputs)
        self.window.count(output.features)
        measured = {"lr": rate} | ({"grad_norm": round(gradient, 6)} if gradient is not None else {})
        for name, student in followed.items():
            measured[f"{name}_lag"] = round(ema.lag(self.method.teachers[name], student), 6)
            measured["teacher_moved"] = round(ema.moved(before[name], self.method.teachers[name], student), 6)
        return output, measured

    def _observe(self, output: methods.Output | None) -> None:
        """The mean loss of an epoch, whichever of its steps were skipped."""
        if output is not None:
            self.epoch_loss += torch.tensor([float(output.loss.detach()), 1.0])
        if (self.step + 1) % self.epoch_steps == 0:
            total, count = ranks.all_sum(self.epoch_loss.to(self.engine.device)).tolist()
            if count:
                self.engine.plateau.observe(total / count)
            self.epoch_loss = torch.zeros(2)

    def _sent(self, batch: Batch) -> Batch:
        """Its views and targets on this rank's device."""
        device = self.engine.device
        moved: dict[str, Any] = {
            name: None if (value := getattr(batch, name)) is None else to_device(value, device) for name in ("target_BL", "mask_BL")
        }
        return batch._replace(views=[to_device(view, device) for view in batch.views], **moved)

    def _place(self, batch: Batch) -> Batch:
        """`_sent`, as methods take it."""
        batch = self._sent(batch)
        views = batch.views if batch.draws_VBP is None else device_views.apply(batch.views[0], batch.draws_VBP)
        return batch._replace(views=[view.contiguous(memory_format=torch.channels_last) for view in views], draws_VBP=None)

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
        row |= ranks.share(meter.read() | {"seconds": round(self.seconds(), 2)}) | self.pace.read()
        verdict = self._verdict([*self.record.measured, row])
        self.record.add(row | {"health": verdict.health})
        for slow in self.pace.stragglers(row["rank_s"]) if "rank_s" in row else ():
            self.record.add({"event": "straggler", "step": self.step, **slow})
        self._stop_collapsed(verdict)

    def _verdict(self, rows: list[dict[str, Any]]) -> health.Verdict:
        chance, width = self.method.chance_loss(self.recipe.global_batch // self.recipe.accumulate), self.method.width
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
            hint="with settings.stop_when_collapsed=false a run, another one, trains on",
        )

    def seconds(self) -> float:
        """Of training so far, those before a restart too."""
        return self.seconds_before + time.perf_counter() - self.started

    @torch.no_grad()
    def _embed(self, network: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See methods.Embed. Ranks share the work; samples that cannot be read are left out."""
        modules = [self.method, *self.method.teachers.values()]
        for module in modules:
            module.eval()
        offset, indices, features = 0, [], []
        for corpus in self.corpora:
            given = (self.recipe.views.size, EMBED_BATCH, ranks.rank(), ranks.world())
            for batch in eval_batches(corpus, *given, workers=self.config.workers, labels=[]):
                with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
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

    def _result(self, model: dict[str, Tensor], verdict: health.Verdict) -> dict[str, Any]:
        speeds = [row["img_per_s"] for row in self.record.rows if "img_per_s" in row]
        licences = [str(corpus.manifest.card.licence) for corpus in self.corpora]
        facts = {
            "steps": self.total,
            "epochs": round(self.total / self.epoch_steps, 4),
            "images": self.total * self.recipe.global_batch,
            "image_size": self.recipe.views.size,
            "img_per_s": round(float(np.median(speeds)), 2),
            "seconds": round(self.seconds(), 2),
            "health": verdict.health,
            "why": verdict.why,
            "stragglers": [words(row) for row in self.record.of("straggler")],
            "source_probes": [{name: row[name] for name in SourceProbe.model_fields} for row in self.record.of("source probe")],
            "restarts": self.restarts,
            "workers": ranks.world(),
            "device": str(self.engine.device),
        }
        result = ends.finish(self.config, self.method, self.parent, model, licences, self.total) | facts
        return parse(result, Result, "result.json").model_dump(mode="json", by_alias=True)

    def _conclude(self) -> dict[str, Any]:
        """Judge, export, write the result last. Rank 0 writes; all ranks return the same."""
        verdict = self._verdict(self.record.measured)
        model, _ = state.whole(self)
        result = self._result(model, verdict) if self.first else None
        self.record.add({"event": "health", "step": self.step, "health": verdict.health, "why": verdict.why})
        self.record.put()
        if self.first:
            storage.put(self._at("result.json"), json.dumps(result, indent=1))
        return dict(ranks.share(result))
