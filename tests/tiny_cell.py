"""Cells of a tenth of a second: a dataset of noise with white squares in three splits, an encoder of two layers, a few epochs.

python tests/tiny_cell.py CONFIG.json...        # as one of several workers, under torchrun's environment variables
"""

import atexit
import json
import os
import socket
import subprocess
import sys
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
        of: dict[str, Any] = {"dataset": resolved.dataset, "channels": channels, "masks": masks, "labels": LABELS}
        of["splits"] = ["train", "val", "test"]
        counts = (24, 12, 12) if masks else (96, 64, 64)
        found[resolved.dataset] = tiny_corpus.write(folder / resolved.dataset, counts, size=size, suffix="png", **of)
    return found


def config(
    shards: dict[str, str], out: Path, /, task: str = "phantom-chest", settings: dict[str, Any] | None = None, **fields: Any
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


def exported(folder: Path, in_chans: int = 1, architecture: str = "test_resnet", size: int = 32) -> tuple[Path, str]:
    """An exported encoder with batch-norm statistics of its own: its folder and the hash of its tensors."""
    encoder = build(architecture, in_chans, seed=42, image_size=size).train()
    with torch.no_grad():
        encoder(torch.randint(0, 256, (8, in_chans, size, size), dtype=torch.uint8))
    facts: dict[str, Any] = {"name": "simclr", "method": "simclr", "lineage": [], "data": [], "revision": "abc", "image_size": size}
    return folder, export(encoder, folder, **facts)


def weights(folder: Path, in_chans: int = 1, architecture: str = "test_resnet", size: int = 32) -> dict[str, Any]:
    """Fields of a cell whose source is an exported encoder."""
    at, sha256 = exported(folder / f"export-{in_chans}", in_chans, architecture, size)
    return {"architecture": architecture, "source": "simclr", "source_kind": "weights", "encoder_dir": str(at), "encoder_sha256": sha256}


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


def together(cells: list[CellConfig], folder: Path, workers: int) -> str:
    """Run the cells one after the other in that many processes; what they printed."""
    files = []
    for number, cell in enumerate(cells):
        files.append(folder / f"{number}.json")
        files[-1].write_text(cell.model_dump_json(by_alias=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    shared |= {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, *map(str, files)]
    running = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(workers)
    ]
    try:
        said = "".join(process.communicate(timeout=240)[0] for process in running)
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), said
    return said


if __name__ == "__main__":
    from finetune.run import run

    atexit.register(lambda: print("group left:", torch.distributed.is_initialized()))  # comes after whatever the run registers
    for file in sys.argv[1:]:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        run(CellConfig.model_validate_json(Path(file).read_text()), LocalContext(rank, world, file + f".{rank}"))
