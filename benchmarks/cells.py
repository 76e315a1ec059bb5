"""What does the fan-out save? 24 cells on real radiographs, against each cell as its own process, and against one warm process.

    nice .venv/bin/python benchmarks/cells.py NIH MONTGOMERY     # folders of raw files; half an hour on two idle cores; --quick: 1 epoch

Cells: random and exported weights x full, linear, truncated x findings and lungs x two seeds, ResNet-18. Sides, two at a time on two cores
with one thread each, the same epochs:

    allograft     the fan-out of a study: Ray and its workers are started, images are decoded once a node, features of frozen encoders kept
    processes     benchmarks/cells_peer.py: a process a cell, PIL in a torch DataLoader, two at a time
    one process   finetune.run for one cell after the other in one warm process (one at a time, so half of the machine stays idle)

Packing is left out on our side, 12 s once a dataset. Wall times are of the whole side. Shares are of the two slots' time. The last line is
the ratio to processes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from base.config import canonical_json, parse
from base.paths import ROOT, revision

SLOTS = 2
METRIC = {"dxc14": "auroc_within_mean", "lxs": "dice"}
RESOLUTION = {"dxc14": [96], "lxs": [128]}
EPOCHS = {"dxc14": 2, "lxs": 3}
FROZEN_EPOCHS = {"dxc14": 6, "lxs": 12}


def study(folder: Path, nih: str, montgomery: str, quick: bool) -> Any:
    """The study's plan: its datasets packed, a source exported, its cells."""
    from cluster import plan
    from cluster.load import check_names
    from cluster.sources import read_weights
    from cluster.study import Study
    from encoders.build import build
    from encoders.export import export
    from shards.card import load_card
    from shards.pack import pack

    corpora = {}
    for name, raw in (("nih-cxr14", nih), ("montgomery", montgomery)):
        url = str(folder / "shards" / name)
        corpora[name] = plan.Packed(url, pack(load_card(name), raw, url))
    encoder = build("resnet18", 1, seed=7)
    export(encoder, folder / "made", name="made", method="none", lineage=[], data=[], revision=revision(), image_size=96)
    settings = {
        task: {"recipe.epochs": 1 if quick else EPOCHS[task], "linear.epochs": 1 if quick else FROZEN_EPOCHS[task]}
        | {"recipe.patience": 1000, "linear.patience": 1000}
        for task in METRIC
    }
    cells = {
        "sources": ["random", {"name": "made", "source": str(folder / "made")}],
        "strategies": ["full", "linear", {"name": "truncated", "cut": "layer2"}],
        "tasks": list(METRIC),
        "architectures": ["resnet18"],
        "resolutions": RESOLUTION,
        "seeds": [0, 1],
        "task_settings": settings,
    }
    data = {name: {"shards": corpus.url} for name, corpus in corpora.items()}
    made = parse({"schema": 1, "study": "cells", "out": str(folder / "out"), "data": data, "cells": cells}, Study, "benchmarks/cells.py")
    check_names(made, "benchmarks/cells.py")
    matrix = plan.settings(made, corpora, {"random": [], "made": [read_weights(str(folder / "made"))]})
    return made, [plan.cell(setting, seed) for setting in matrix for seed in setting.seeds]


def results(configs: list[Any]) -> list[dict[str, Any]]:
    return [json.loads((Path(config.out) / "result.json").read_text()) for config in configs]


def fan_out(made: Any, configs: list[Any]) -> dict[str, Any]:
    """Wall seconds from nothing to the last result, of Ray's start in that, and of the cells."""
    from cluster.fanout import run_cells
    from cluster.session import session

    began = time.perf_counter()
    with session():
        ray_s = time.perf_counter() - began
        tally = run_cells(configs, made.resources, lambda tally: None)
    wall_s = time.perf_counter() - began
    if tally.failed:
        raise SystemExit(f"cells failed: {tally.failed}")
    found = results(configs)
    epochs = [json.loads(line) for config in configs for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return {
        "wall_s": wall_s,
        "ray_s": ray_s,
        "cells_s": sum(row["seconds"] for row in found),
        "train_s": sum(row["seconds"] for row in epochs),
    }


def processes(folder: Path, configs: list[Any], raw: dict[str, str]) -> dict[str, Any]:
    """Each cell a process, SLOTS at a time."""
    rows = folder / "rows"
    rows.mkdir()

    def one(config: Any) -> None:
        cell, row = rows / f"{config.key}.cell.json", rows / f"{config.key}.json"
        cell.write_text(canonical_json(config))
        command = [sys.executable, str(ROOT / "benchmarks" / "cells_peer.py"), str(cell), raw[config.task.dataset], str(row)]
        subprocess.run(command, check=True, cwd=ROOT)

    began = time.perf_counter()
    with ThreadPoolExecutor(SLOTS) as slots:
        list(slots.map(one, configs))
    wall_s = time.perf_counter() - began
    found = [json.loads((rows / f"{config.key}.json").read_text()) for config in configs]
    sums = {name: sum(row[name] for row in found) for name in ("whole_s", "import_s", "decode_s", "train_s")}
    return {
        "wall_s": wall_s,
        "scores": [row["score"] for row in found],
        "shortest_s": min(row["train_s"] + row["decode_s"] for row in found),
    } | sums


def one_process(folder: Path, configs: list[Any]) -> dict[str, Any]:
    """All cells in turn in one fresh process with its own cache."""
    moved = [
        config.model_copy(update={"out": str(folder / "warm" / config.key), "cache_dir": str(folder / "warm-cache")}) for config in configs
    ]
    (folder / "cells.json").write_text(json.dumps([json.loads(canonical_json(config)) for config in moved]))
    began = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--in-turn", str(folder / "cells.json")], check=True, cwd=ROOT)
    return {"wall_s": time.perf_counter() - began}


def in_turn(file: str) -> None:
    from engine.context import LocalContext
    from finetune.cell import CellConfig
    from finetune.run import run

    for entry in json.loads(Path(file).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            run(parse(entry, CellConfig, file), LocalContext(dir=folder))


def agreement(configs: list[Any], theirs: list[float]) -> str:
    """Ours minus theirs by task and strategy, means over sources and seeds, beside the standard deviation over ours."""
    ours = [
        next(row["value"] for row in found["metrics"] if (row["split"], row["class"], row["metric"]) == ("test", "", METRIC[found["task"]]))
        for found in results(configs)
    ]
    lines = []
    for task in METRIC:
        for strategy in dict.fromkeys(config.strategy["name"] for config in configs):
            at = [i for i, config in enumerate(configs) if (config.task.task, config.strategy["name"]) == (task, strategy)]
            a, b = [ours[i] for i in at], [theirs[i] for i in at]
            spread = statistics.stdev(a + b)
            lines.append(f"{task} {strategy}: ours {statistics.mean(a):.3f}, theirs {statistics.mean(b):.3f}, spread of all {spread:.3f}")
    return "\n".join(lines)


def shares(side: str, parts: dict[str, float], slots_s: float) -> str:
    return f"{side}: " + ", ".join(f"{name} {seconds / slots_s:.0%}" for name, seconds in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="*", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--in-turn", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_turn:
        in_turn(options.in_turn)
        return
    nih, montgomery = options.raw
    with tempfile.TemporaryDirectory(prefix="cells-benchmark-") as name:
        folder = Path(name)
        made, configs = study(folder, nih, montgomery, options.quick)
        configs = [config.model_copy(update={"cache_dir": str(folder / "cache")}) for config in configs]
        print(f"{len(configs)} cells, {SLOTS} at a time", flush=True)
        ours = fan_out(made, configs)
        print(f"allograft: {ours['wall_s']:.0f} s", flush=True)
        warm = one_process(folder, configs)
        print(f"one process: {warm['wall_s']:.0f} s", flush=True)
        peer = processes(folder, configs, {"nih-cxr14": nih, "montgomery": montgomery})
        print(f"processes: {peer['wall_s']:.0f} s; the shortest cell trained {peer['shortest_s']:.0f} s", flush=True)
        print(agreement(configs, peer["scores"]))
    slots_s, peer_s = SLOTS * ours["wall_s"], SLOTS * peer["wall_s"]
    parts = {"training": ours["train_s"], "decode, features, evaluation": ours["cells_s"] - ours["train_s"]}
    print(shares("allograft", parts | {"start and idle": slots_s - ours["cells_s"]}, slots_s))
    parts = {"training": peer["train_s"], "decode and views": peer["decode_s"], "import": peer["import_s"]}
    print(shares("processes", parts | {"rest and idle": peer_s - sum(parts.values())}, peer_s))
    without = (peer["whole_s"] - peer["import_s"]) / ours["cells_s"]
    print(f"imports and starts left out on both sides, processes over allograft: {without:.1f}x")
    print(f"one process over allograft: {warm['wall_s'] / ours['wall_s']:.1f}x")
    print(f"processes over allograft: {peer['wall_s'] / ours['wall_s']:.1f}x")


if __name__ == "__main__":
    main()
