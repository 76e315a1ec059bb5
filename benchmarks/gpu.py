"""How fast does the engine train on this GPU, against what the GPU can do?

    .venv/bin/python benchmarks/gpu.py                # a few minutes on one GPU; --only NAME for one row; needs neither Ray nor MLflow
    .venv/bin/python benchmarks/gpu.py --cpu          # tiny networks, on a machine without one: shows that it runs, measures nothing

Each row is a pretraining as `pretrain.run` runs it, in a process of its own: real shards of grey 512 px JPEGs (benchmarks/xrays.py) through
the real loader, the paper's preset at the batch below, bf16, channels last. Columns: views a second; of the roofline (the larger of
operations over speed and bytes over bandwidth, pretrain/explain.py); of the operations alone (MFU); time waiting for data; peak memory, and
what `allograft explain` expects of it. The first twenty steps are left out. Compiled rows (`compile: true`) are the first two again.

Goals on one H100: ResNet-50 at 75 % of its roofline (50 to 60 % is what good code reaches), ViT-B/16 at 45 % MFU, data wait under 5 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

LOGGED, STEPS = 20, 100
IMAGES = 2048
COPIES = 32  # of the shards, as one corpus: with fewer images than DINO's 65536 prototypes a run is refused


class Row(NamedTuple):
    recipe: str
    architecture: str
    batch: int
    compiled: bool = False


ROWS = {
    "ResNet-50 SimCLR": Row("simclr/paper", "resnet50", 256),
    "ViT-B/16 DINO": Row("dino/paper", "vit_base_patch16_224", 128),
    "ViT-B/16 MAE": Row("mae/paper", "vit_base_patch16_224", 512),
    "ResNet-50 compiled": Row("simclr/paper", "resnet50", 256, True),
    "ViT-B/16 compiled": Row("dino/paper", "vit_base_patch16_224", 128, True),
}
TINY = {
    "ResNet-50 SimCLR": Row("simclr/smoke", "test_resnet", 8),
    "ViT-B/16 DINO": Row("dino/smoke", "test_vit", 8),
    "ViT-B/16 MAE": Row("mae/smoke", "test_vit", 8),
}


def measure(row: Row, shards: str, out: str, workers: int, steps: int, logged: int) -> dict[str, Any]:
    """Train, and read what the run says of itself."""
    from engine import gpus
    from engine.context import LocalContext
    from pretrain.explain import explain
    from pretrain.recipe import load_recipe
    from pretrain.run import DataRef, PretrainConfig, run
    from shards.corpus import Corpus

    corpus = Corpus(shards)
    changes: dict[str, Any] = {"global_batch": row.batch, "epochs": 1e6, "max_steps": steps, "log_every_steps": logged, "precision": "bf16"}
    changes |= {"checkpoint_every_steps": 0, "stop_when_collapsed": False, "compile": row.compiled}
    recipe = load_recipe(row.recipe, changes)
    config = PretrainConfig(
        name="gpu",
        key="0",
        recipe=recipe,
        architecture=row.architecture,
        in_chans=1,
        data=[DataRef(dataset="bench", shards=shards, digest=corpus.manifest.digest)] * COPIES,
        out=out,
        workers=workers,
    )
    run(config, LocalContext(dir=os.path.join(out, "context")))
    written = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    rows = [found for found in written if "img_per_s" in found and found["step"] > logged]

    def median(key: str) -> float | None:
        return statistics.median(found[key] for found in rows) if key in rows[0] else None

    expected = explain(recipe, row.architecture, images=len(corpus) * COPIES, channels=1, gpu_count=1).cost
    speed = median("img_per_s") or 0.0
    gpu = gpus.find(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "views_per_s": speed * len(recipe.views.sizes),
        "roofline": median("roofline"),
        "mfu": speed * expected.flops / expected.images / (gpu.bf16 * 1e12) if gpu else None,
        "data_wait": median("data_wait"),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "expected_gib": sum(expected.memory) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tiny networks, on any machine")
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of a row: folder of the shards
    options = parser.parse_args()
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows, steps, logged = (TINY, 4, 2) if options.cpu else (ROWS, STEPS, LOGGED)
    if options.one:
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(measure(rows[options.only], options.one, out, options.workers, steps, logged)))
        return
    if not torch.cuda.is_available() and not options.cpu:
        print("no GPU here: nothing is measured (--cpu runs tiny networks, to show that the benchmark works)")
        return
    import xrays

    device = "CPU, tiny networks: no measurement" if options.cpu else torch.cuda.get_device_name()
    print(f"{device}; {options.workers} loader workers")
    print(f"{'':18s}{'batch':>7s}{'views/s':>9s}{'roofline':>10s}{'MFU':>7s}{'wait':>7s}{'peak GiB':>10s}{'expected':>10s}")
    with tempfile.TemporaryDirectory() as name:
        xrays.write(Path(name), 8, (64 if options.cpu else IMAGES) // 8)
        for title, row in rows.items():
            if options.only in (None, title):
                command = [sys.executable, __file__, "--one", name, "--only", title, "--workers", str(options.workers)]
                done = subprocess.run(command + ["--cpu"] * options.cpu, stdout=subprocess.PIPE, text=True, check=True)
                show(title, row, json.loads(done.stdout.splitlines()[-1]))


def show(title: str, row: Row, found: dict[str, Any]) -> None:
    def share(key: str) -> str:
        return "-" if found[key] is None else f"{found[key]:.1%}"

    peak = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
    print(
        f"{title:18s}{row.batch:7d}{found['views_per_s']:9.0f}{share('roofline'):>10s}{share('mfu'):>7s}{share('data_wait'):>7s}"
        f"{peak:>10s}{found['expected_gib']:10.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
