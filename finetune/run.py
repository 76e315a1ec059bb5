"""One cell: transplant, train, select on validation, open the test split once, write the result.

    result = run(config, LocalContext(dir="/tmp/cell"))

A plain function of its configuration: a warm worker calls it many times. Where a result stands already it is returned.
Files go to a temporary folder and then to `config.out`, `result.json` last.
"""

import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from base import paths, storage
from base.config import parse, to_yaml
from base.errors import RequestError, WorkError
from base.seeds import seed_of
from encoders.build import NORMALISATIONS, Encoder, build, in_channels
from encoders.export import read_export
from encoders.local import local_encoder
from encoders.weights import State, load_local, sha256_of
from engine import ranks
from engine.context import Context
from finetune import data, keep, predict
from finetune.cell import CELL_VERSION, CellConfig, Result, Selection, kept_all
from finetune.efficiency import cost
from finetune.explain import heat_maps
from finetune.jackknife import error_row
from finetune.measure import Row, rows_of
from finetune.similarity import METRIC, similarity_rows
from finetune.strategies import resolve
from finetune.train import Trainer
from finetune.transplant import EncoderSpec, Transplant, verify

RESULT = "result.json"
OF_CONFIG = set(CellConfig.model_fields) & set(Result.model_fields) - {"schema_", "strategy", "task", "encoder_sha256"}


def run(config: CellConfig, ctx: Context) -> dict[str, Any]:
    """The cell's result (Result as plain data), computed or found standing. Of a cell with several workers each calls it with its own rank
    and gets the same; the first writes.

    Raises:
        RequestError: another number of workers than the cell asks for, the task does not fit the dataset, unknown strategy or option, no
            such encoder, another cell's result at `out`.
        WorkError: shards or weights are not those planned, loss or output not finite, or the context asked to stop.
    """
    if config.workers != ctx.world_size:
        asked = f"the cell asks for {config.workers} workers, {ctx.world_size} run"
        raise RequestError(asked, where=f"cell {config.key}: workers")
    if config.workers > 1:
        ranks.start()
    if standing := _standing(config):
        return standing
    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    task = config.task
    corpus = data.describe(config.shards, config.manifest_digest, config.cache_dir)
    if corpus.manifest.dataset != task.dataset:
        raise RequestError(f"task {task.task} is about {task.dataset}, these shards are {corpus.manifest.dataset}", where=config.shards)
    if config.role == "cell" and not corpus.manifest.counts.get("test"):
        raise RequestError(f"{task.dataset} has no test split to measure on", where=config.shards)
    transplant, encoder_sha256, options = plant(config, data.channels(corpus, task))
    if config.keep == "encoder":
        keep.check(transplant.module.encoder, config.key)
    trainer = Trainer(config, transplant)
    with tempfile.TemporaryDirectory(prefix="cell-") as folder:
        local = Path(folder)
        if config.role == "similarity":
            selection, train_images = Selection(metric=METRIC, value=None, epoch=0, epochs=0), 0
            rows = similarity_rows(trainer.evaluator, _random(config, data.channels(corpus, task)))
        else:
            selection, train_images = trainer.fit(ctx, local / "metrics.jsonl")
            rows = _measured(trainer, local, share_images=corpus.manifest.card.share_images)
        params, macs = cost(transplant.module, data.as_input(trainer.arrays("val").image[:1], trainer.arrays("val").slices).shape[1:])
        result = Result(
            **config.model_dump(include=OF_CONFIG),
            **task.model_dump(include={"task", "preset", "dataset", "metric"}),
            strategy=str(config.strategy["name"]),
            options=options,
            metrics=rows,
            selection=selection,
            probe=trainer.probe,
            train_images=train_images,
            params=params,
            macs=macs,
            seconds=round(time.perf_counter() - started, 3),
            encoder_sha256=encoder_sha256,
            transplanted_sha256=transplant.sha256,
            cell_version=CELL_VERSION,
            revision=paths.revision(),
            host=platform.node(),
            device=trainer.device_name,
        )
        (local / "config.yaml").write_text(to_yaml(config))
        (local / RESULT).write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
        if ctx.rank == 0:
            if config.keep == "encoder":
                keep.keep(config, transplant.module, corpus, local / "encoder")
            storage.put_dir(local, config.out, last=(RESULT,))
    return dict(ranks.share(_plain(result)))  # which no worker has before it is written


def _standing(config: CellConfig) -> dict[str, Any] | None:
    """The result that stands at its place, with all that the cell keeps; None where there is none. Raises RequestError: another cell's."""
    where = storage.join(config.out, RESULT)
    if not ranks.share(storage.exists(where)):
        return None
    standing = parse(storage.read_json(where), Result, where)
    if standing.key != config.key:
        raise RequestError(f"the result that stands here is that of cell {standing.key}, not of {config.key}", where=where)
    return _plain(standing) if ranks.share(kept_all(config)) else None


def _measured(trainer: Trainer, folder: Path, share_images: bool) -> list[Row]:
    """The rows of validation and, but for a trial, of the test split; what they are made of is written to the folder.

    The test split is read here for the first time, with the chosen epoch's weights in place.
    """
    task, trial = trainer.task, trainer.config.role == "trial"
    tables: list[pd.DataFrame] = []
    for split in ["val"] if trial else ["val", "test"]:
        arrays = trainer.arrays(split)
        logits = trainer.logits(split)
        tables.append(predict.predictions(task, arrays, logits, tables[0] if tables else None))
        if split == "test" and share_images:
            if task.kind == "segmentation":
                np.savez_compressed(folder / "samples.npz", **predict.shown(arrays, logits))  # type: ignore[arg-type]
            if not task.volume:
                np.savez_compressed(folder / "heat.npz", **heat_maps(trainer.module, task, arrays))  # type: ignore[arg-type]
    table = pd.concat(tables, ignore_index=True)
    table.to_parquet(folder / "predictions.parquet", index=False)
    return rows_of(task, table) + ([error_row(task, table)] if trial else [])


def _plain(result: Result) -> dict[str, Any]:
    return result.model_dump(mode="json", by_alias=True)


def plant(config: CellConfig, channels: int) -> tuple[Transplant, str, dict[str, Any]]:
    """The transplant, the sha256 of the source's tensors, and the strategy's resolved options.

    Raises:
        RequestError: as `run`.
        WorkError: the encoder is not the planned one, or what stands in the network is not what was exported.
    """
    make, options = resolve(config.strategy, f"cell {config.key}: strategy")
    spec, weights = source(config, channels)
    sha256 = sha256_of(weights)
    if config.encoder_sha256 not in (None, sha256):
        raise WorkError(f"the weights of '{config.source}' are not those that the cell was planned for", where=config.encoder_dir)
    transplant = make.transplant(spec, weights, config.task, options, seed_of("cell", config.seed))
    verify(transplant, weights)
    return transplant, sha256, options.model_dump(mode="json")


def _random(config: CellConfig, channels: int) -> Encoder:
    """The network of the cell's source with random weights, drawn from the cell's seed alone."""
    make, options = resolve(config.strategy)
    spec, _ = source(config, channels)
    return make.transplant(spec, None, config.task, options, seed_of("similarity", config.seed)).module.encoder


def source(config: CellConfig, channels: int) -> tuple[EncoderSpec, State]:
    """Network and weights of the cell's source. Random weights are drawn from the source's name and the cell's seed alone."""
    asked = config.task.normalise
    if config.source_kind == "random":
        encoder = build(config.architecture, channels, seed=seed_of("source", config.source, config.seed), image_size=config.resolution)
        side, (mean, std) = config.resolution, in_channels(*NORMALISATIONS[asked or "neutral"], channels)
        spec = EncoderSpec(architecture=config.architecture, in_chans=channels, mean=mean, std=std, image_size=side, resolution=side)
        return spec, dict(encoder.net.state_dict())
    if config.encoder_dir is None:
        raise RequestError("source_kind weights needs encoder_dir", where=f"cell {config.key}")
    place = local_encoder(config.encoder_dir, config.encoder_sha256)
    info = read_export(place, verify=False)  # `plant` hashes the tensors
    if info.architecture != config.architecture:
        raise RequestError(f"'{config.source}' is a {info.architecture}, the cell asks for {config.architecture}", where=config.encoder_dir)
    mean, std = in_channels(*NORMALISATIONS[asked], channels) if asked else info.normalisation(channels)
    spec = EncoderSpec(
        architecture=info.architecture,
        in_chans=channels,
        mean=mean,
        std=std,
        image_size=info.image_size,
        widths=info.widths,
        cut=info.cut,
        flat=info.flat,
        resolution=config.resolution,
    )
    return spec, load_local(place)
