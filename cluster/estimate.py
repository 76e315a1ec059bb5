"""What a study takes: hours and bytes, by what its own finished work took where there is some, else by operations.

    speeds = Speeds(study.resources, gpus.get("h100-sxm"))
    speeds.learn(finished, seen)                       # from finished cells
    speeds.of(config, seen["nih-cxr14"])               # Estimate(seconds, basis)
    run = Run.of(study, entry, images, channels); run.estimate(study.resources, gpu, results.pretrainings(out))

Seconds are those of one cell or one pretraining with all of its workers.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from analysis.results import Pretraining, read_json
from base import storage
from base.config import canonical_json
from cluster.effort import effort, forward_of
from cluster.study import PretrainEntry, Resources, Study
from engine.gpus import Gpu
from finetune.cell import CellConfig
from pretrain.explain import Explained, explain
from pretrain.recipe import load_recipe
from shards.card import SPLITS, Card
from shards.manifest import Manifest
from shards.pack import ShardJob
from shards.phantoms import parse_raw

# Shares of what a device can do at most that are reached where nothing has been measured: large networks on large batches, small ones.
PRETRAIN_SHARE, CELL_SHARE = 0.5, 0.25
PROCESSOR = 30e9  # operations a second of one processor in fp32, as resnet18 was measured at (docs/benchmarks.md)
SIDE = 224  # pixels
SAMPLED = 200  # finished cells that are looked at
PICTURES = 350_000  # bytes of a cell's heat maps and samples, as measured
MAP = 0.35  # bytes a pixel of a kept map of probabilities, as PNG
ROW = 24  # bytes of predictions.parquet for an image and a label


class Estimate(NamedTuple):
    """seconds: of one worker. basis: in words."""

    seconds: float
    basis: str


class Seen(NamedTuple):
    """A dataset as far as it is known before it is packed: images and patients by split, the share of positive images of the test split by
    label, and the bytes of its raw files, where they are still to be packed."""

    card: Card
    images: Mapping[str, int]
    patients: Mapping[str, int]
    positive: Mapping[str, float]
    to_pack: int = 0

    @classmethod
    def packed(cls, manifest: Manifest) -> "Seen":
        """Of a dataset that stands."""
        counts = manifest.counts.get("test", 0)
        positive = {label: count / counts for label, count in manifest.positives.get("test", {}).items()} if counts else {}
        return cls(manifest.card, manifest.counts, manifest.patients, positive)

    @classmethod
    def planned(cls, jobs: Sequence[ShardJob]) -> "Seen":
        """Of one whose shards are still to be written."""
        records = {split: [record for job in jobs if job.split == split for record in job.records] for split in SPLITS}
        images = {split: len(held) for split, held in records.items() if held}
        patients = {split: len({record.patient for record in held}) for split, held in records.items() if held}
        test, card, raw = records["test"], jobs[0].card, jobs[0].raw
        told = test and any(record.labels for record in test)  # those of generated images come with the images
        positive = {label: sum(record.labels.get(label) == 1 for record in test) / len(test) for label in card.labels} if told else {}
        if card.phantom is not None:
            size = (parse_raw(raw).size or card.phantom.size) ** 2 * card.channels * sum(images.values())
        else:
            files = {os.path.join(raw, file) for held in records.values() for one in held for file in (one.file, *one.masks)}
            size = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
        return cls(card, images, patients, positive, size)


def devices(resources: Resources) -> tuple[str, float, float]:
    """What hours are counted of: its name, and how many of it a pretraining and a cell take."""
    share = resources.gpus_per_cell if isinstance(resources.gpus_per_cell, float | int) else 1.0
    if resources.gpus_per_pretrain_worker or share:
        return "GPU", resources.pretrain_range[0] * resources.gpus_per_pretrain_worker, share * resources.cell_ranks
    return "processor", float(resources.pretrain_range[0] * resources.threads), float(resources.cell_ranks * resources.threads)


# -- cells


@dataclass
class Speeds:
    """Operations a second that cells reach."""

    resources: Resources
    gpu: Gpu
    known: dict[tuple[Any, ...], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # operations and seconds
    forward: dict[tuple[str, str, str], float] = field(default_factory=dict)  # operations of one image and pixel, by network

    def learn(self, configs: Iterable[CellConfig], seen: Mapping[str, Seen]) -> None:
        """From finished cells, of many from some: what each took, and the operations that it was expected to take."""
        finished = list(configs)
        some = finished[:: -(-len(finished) // SAMPLED) or 1]
        held = [(config, read_json(storage.join(config.out, "result.json"))) for config in some]
        told = [(config, result) for config, result in held if result]
        for config, result in told:
            # The largest is the whole network: what a cut or a narrower copy leaves of it counts for its share of the time.
            macs = 2 * result["macs"] / config.resolution**2
            self.forward[_network(config)] = max(macs, self.forward.get(_network(config), 0.0))
        for config, result in told:
            for key in _alike(config):
                self.known[key].append((self.operations(config, seen[config.task.dataset]), float(result["seconds"])))

    def of(self, config: CellConfig, seen: Seen) -> Estimate:
        """What a cell takes, by the cells most like it."""
        work = self.operations(config, seen)
        for key in _alike(config):
            if held := self.known.get(key):
                speed = sum(done for done, _ in held) / sum(seconds for _, seconds in held)
                return Estimate(work / speed, f"measured on {len(held)} finished cells")
        if devices(self.resources)[0] == "GPU":
            peak = getattr(self.gpu, self.resources.cell_dtype) * 1e12
            return Estimate(work / (peak * CELL_SHARE), f"by operations, at {CELL_SHARE:.0%} of the GPU in {self.resources.cell_dtype}")
        return Estimate(work / (PROCESSOR * self.resources.threads), f"by operations, {PROCESSOR / 1e9:g} GFLOP/s a processor")

    def operations(self, config: CellConfig, seen: Seen) -> float:
        """Of a cell, see cluster.effort. Networks are counted at one resolution: operations go with the area."""
        slices = (seen.card.slab or 1) if config.task.volume else 1
        network = _network(config)
        if network not in self.forward:
            self.forward[network] = forward_of(config.model_copy(update={"resolution": SIDE}), seen.card.channels // slices) / SIDE**2
        return effort(config, seen.images, self.forward[network] * slices * config.resolution**2)


def _network(config: CellConfig) -> tuple[str, str, str]:
    """What networks share that take as many operations, but for the channels of their stem."""
    return config.architecture, config.task.kind, config.task.decoder


def _alike(config: CellConfig) -> list[tuple[Any, ...]]:
    """What cells share that reach the same speed, the closest first."""
    place = (config.architecture, config.resolution, config.dtype, config.task.recipe.batch)
    return [(*place, config.strategy["name"], config.task.task), (*place, config.task.kind), place]


def cell_bytes(config: CellConfig, seen: Seen, parameters: int) -> int:
    """What a cell leaves in storage. parameters: of its encoder."""
    images = sum(seen.images.get(split, 0) for split in ("val", "test"))
    maps = int(MAP * config.resolution**2) * images if config.task.kind == "segmentation" else 0
    pictures = PICTURES if seen.card.share_images else 0
    return ROW * images * max(1, len(config.task.labels)) + maps + pictures + (4 * parameters if config.keep == "encoder" else 0)


# -- pretrainings


@dataclass(frozen=True)
class Run:
    """A pretraining to be: its recipe gone through without values."""

    entry: PretrainEntry
    architecture: str
    explained: Explained

    @classmethod
    def of(cls, study: Study, entry: PretrainEntry, architecture: str, images: int, channels: int) -> "Run":
        """Raises RequestError for what a run would refuse."""
        workers = study.resources.pretrain_range[0]
        return cls(entry, architecture, _explained(canonical_json([entry.recipe, entry.settings]), architecture, images, channels, workers))

    def estimate(self, resources: Resources, gpu: Gpu, finished: Sequence[Pretraining]) -> Estimate:
        """By finished runs of the same method, architecture, views, batch and workers; else by operations."""
        recipe, cost = self.explained.recipe, self.explained.cost
        alike = [run.result for run in finished if run.result and self._like(run, resources)]
        if alike:
            # Of all that they took: `img_per_s` is the median of the steps, without the start, the probes and the clusterings.
            image_s = sum(held["seconds"] for held in alike) / sum(held["images"] for held in alike)
            return Estimate(self.explained.steps * recipe.global_batch * image_s, f"measured on {len(alike)} finished runs")
        if resources.gpus_per_pretrain_worker:
            seconds = self.explained.least_hours(gpu) * 3600 / PRETRAIN_SHARE
            return Estimate(seconds, f"by operations, at {PRETRAIN_SHARE:.0%} of the GPU's roofline in {recipe.precision}")
        work = self.explained.steps * (cost.flops + cost.images * cost.embed_flops)
        return Estimate(work / (PROCESSOR * resources.threads), f"by operations, {PROCESSOR / 1e9:g} GFLOP/s a processor")

    def _like(self, run: Pretraining, resources: Resources) -> bool:
        recipe, held = self.explained.recipe, run.result or {}
        then = run.config.get("recipe", {})
        same = then.get("method") == recipe.method and then.get("global_batch") == recipe.global_batch
        views = held.get("image_size") == recipe.views.size and held.get("architecture") == self.architecture
        return same and views and held.get("workers") == resources.pretrain_range[0]

    @property
    def bytes(self) -> int:
        """What it leaves in storage: checkpoints (weights, states, teachers, buffers) and the encoder."""
        memory = self.explained.cost.memory
        state = memory.weights + memory.optimizer + memory.teachers + memory.buffers
        return state * (self.explained.recipe.keep_checkpoints + 1) + memory.weights


@lru_cache(maxsize=64)
def _explained(recipe_json: str, architecture: str, images: int, channels: int, workers: int) -> Explained:
    name, settings = json.loads(recipe_json)
    return explain(load_recipe(name, settings), architecture, images=images, channels=channels, gpu_count=workers)
