"""Cells of a tenth of a second: a dataset of noise with white squares in three splits, an encoder of two layers, a few epochs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_corpus
import torch

from encoders.build import build
from encoders.export import export
from engine.context import LocalContext
from finetune.cell import CellConfig, Selection
from finetune.run import plant
from finetune.task import load_task
from finetune.train import Trainer
from shards.manifest import read

LABELS = ["texture", "count", "arrangement"]
QUICK = {"recipe.epochs": 2, "recipe.batch": 16, "linear.epochs": 3}
CLASSES = {"uncertain": "zeros"}  # so that enough of the raw labels say exactly one class


def corpora(folder: Path, size: int = 40) -> dict[str, str]:
    """The shards of phantom-chest (one channel, labels) and phantom-fundus (three, masks); the paths of their folders."""
    found = {}
    for task, channels in (("phantom-chest", 1), ("phantom-vessels", 3)):
        resolved = load_task(task)
        masks = resolved.kind == "segmentation"
        of = {"dataset": resolved.dataset, "channels": channels, "masks": masks, "labels": LABELS, "splits": ["train", "val", "test"]}
        counts = (24, 12, 12) if masks else (96, 64, 64)
        found[resolved.dataset] = tiny_corpus.write(folder / resolved.dataset, counts, size=size, suffix="png", **of)
    return found


def config(
    shards: dict[str, str], out: Path, task: str = "phantom-chest", settings: dict[str, Any] | None = None, **fields: Any
) -> CellConfig:
    """A cell; `settings` change its task, `fields` the rest."""
    resolved = load_task(task, QUICK | (settings or {}))
    base: dict[str, Any] = {
        "key": "0" * 16,
        "architecture": "test_resnet",
        "source": "random",
        "source_kind": "random",
        "strategy": {"name": "full"},
        "task": resolved,
        "shards": shards[resolved.dataset],
        "manifest_digest": read(shards[resolved.dataset]).digest,
        "resolution": 32,
        "out": str(out / "cell"),
        "cache_dir": str(out / "cache"),
    }
    return CellConfig.model_validate(base | fields)


def exported(folder: Path, in_chans: int = 1) -> tuple[Path, str]:
    """An exported encoder with batch-norm statistics of its own: its folder and the hash of its tensors."""
    encoder = build("test_resnet", in_chans, seed=42).train()
    with torch.no_grad():
        encoder(torch.randint(0, 256, (8, in_chans, 32, 32), dtype=torch.uint8))
    facts: dict[str, Any] = {"name": "simclr", "method": "simclr", "lineage": [], "data": [], "revision": "abc", "image_size": 32}
    return folder, export(encoder, folder, **facts)


def weights(folder: Path, in_chans: int = 1) -> dict[str, Any]:
    """Fields of a cell whose source is an exported encoder."""
    at, sha256 = exported(folder / f"export-{in_chans}", in_chans)
    return {"source": "simclr", "source_kind": "weights", "encoder_dir": str(at), "encoder_sha256": sha256}


class Watching(LocalContext):
    """Calls back at the end of each epoch."""

    def __init__(self, folder: Path, see: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(dir=str(folder / "context"))
        self.see = see

    def report(self, row: dict[str, Any]) -> None:
        self.see(row)


def trained(
    cell: CellConfig, folder: Path, see: Callable[[dict[str, Any]], None] | None = None, change: Callable[[Any], Any] | None = None
) -> tuple[Trainer, Selection, list[dict[str, Any]]]:
    """The trainer after its training, what it selected, and the rows of its log. change: what becomes of the transplant before."""
    torch.set_num_threads(1)
    made = plant(cell, 1 if cell.task.dataset == "phantom-chest" else 3)[0]
    trainer = Trainer(cell, change(made) if change else made)
    log = folder / "log" / "metrics.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    selection, _ = trainer.fit(Watching(folder, see or (lambda row: None)), log)
    return trainer, selection, rows(log)


def rows(log: Path) -> list[dict[str, Any]]:
    """A log, without what differs from run to run."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in log.read_text().splitlines()]
