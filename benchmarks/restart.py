"""How long from `kill -9` of a trainer to the next step, and what share of the work is useful at one failure in ten minutes?

    nice .venv/bin/python benchmarks/restart.py --out runs/restart        # some four minutes on 2 idle cores

A pretraining (SimCLR, ResNet-18 at 64 px, batch 32, two trainers, under Ray Train as a study runs it) on a cluster of this machine; after
some steps one trainer gets SIGKILL, three times, the last and the first of them in turn. From the kill to

    gone       the survivors' processes and the dead one's place are given up, and new processes begin
    loaded     the new trainers have imported everything and met: the run begins to look for its newest checkpoint
    next step  a step is done that was not part of that checkpoint

and the processor seconds that all processes of the cluster took until `loaded`: on two idle cores it takes half of them at least, on a
busy machine the times belong to its load.

The share of useful work follows from these times: 600 s, less one restart, less half of the time between two checkpoints (what is done
again), less what saving costs. Goals: next step within 30 s, share at least 85 %.
"""

import argparse
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil

FAILURE_S = 600.0
PATIENCE_S = 300.0


def trainers() -> list[psutil.Process]:
    """Ray Train's workers of this process's cluster, the oldest first."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def rows(out: Path) -> list[dict[str, Any]]:
    """Of the run's metrics, as far as they stand."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processor() -> float:
    """Seconds that this process's cluster has taken so far, of processes that still live."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def until(ready: Any) -> Any:
    """The first true answer."""
    deadline = time.time() + PATIENCE_S
    while not (answer := ready()):
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.05)
    return answer


def resumed(out: Path, times: int) -> tuple[int, float] | None:
    """The step from which the run has gone on for the n-th time, and seconds from there to the next, once that is logged."""
    held = rows(out)
    events = [place for place, row in enumerate(held) if row.get("event") == "resumed"]
    if len(events) < times:
        return None
    step = int(held[events[times - 1]]["step"])
    at = {row["step"]: row["seconds"] for row in held if "loss" in row}
    return (step, at[step + 1] - at[step]) if step + 1 in at and held[-1].get("event") != "resumed" else None


def kill_one(out: Path, number: int, every: int) -> dict[str, float]:
    """Kill a trainer some steps after a checkpoint; seconds from then on."""
    newest = max([0, *(row["step"] for row in rows(out) if "loss" in row)])
    wanted = (newest // every + 1) * every + every // 4
    until(lambda: any(row["step"] >= wanted for row in rows(out) if "loss" in row))
    before = trainers()
    victim = before[-1 if number % 2 else 0]
    taken, killed = processor() - sum(process.cpu_times().user + process.cpu_times().system for process in before), time.time()
    os.kill(victim.pid, signal.SIGKILL)
    pids = {process.pid for process in before}
    new = until(lambda: [process for process in trainers() if process.pid not in pids])
    began = new[0].create_time()
    attempts = out / "attempts.json"
    until(lambda: attempts.stat().st_mtime > killed)
    loaded, taken = attempts.stat().st_mtime, processor() - taken
    step, took = until(lambda: resumed(out, number))
    return {"gone": began - killed, "loaded": loaded - killed, "next step": loaded + took - killed, "processor": taken, "from": step}


def saving(out: Path, every: int) -> tuple[float, float]:
    """Seconds of a step, and what a checkpoint adds to the one after it."""
    held = [row for row in rows(out) if "s_per_step" in row and row["step"] > 2]
    after = [row["s_per_step"] for row in held if row["step"] % every == 1]
    usual = statistics.median(row["s_per_step"] for row in held if row["step"] % every not in (0, 1))
    return usual, max(0.0, statistics.median(after) - usual) if after else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/restart")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--every", type=int, default=40, help="steps between checkpoints")
    options = parser.parse_args()
    from cluster.pretraining import pretrain_on_ray
    from cluster.session import session
    from cluster.study import Resources
    from pretrain.recipe import load_recipe
    from pretrain.run import DataRef, PretrainConfig
    from shards.card import load_card
    from shards.manifest import read
    from shards.pack import pack

    root = Path(options.out).absolute()
    shards, out = root / "shards", root / f"run-{time.time_ns()}"
    if not (shards / "manifest.json").exists():
        pack(load_card("phantom-chest"), "phantom:240", str(shards))
    settings = {"views.size": 64, "global_batch": 32, "epochs": 10_000, "log_every_steps": 1, "checkpoint_every_steps": options.every}
    recipe = load_recipe("simclr/small", settings | {"stop_when_collapsed": False})
    data = [DataRef(dataset="phantom-chest", shards=str(shards), digest=read(str(shards)).digest)]
    config = PretrainConfig(name="restart", key="0", recipe=recipe, architecture="resnet18", in_chans=1, data=data, out=str(out), threads=1)
    found = []
    with session():
        run = threading.Thread(target=pretrain_on_ray, args=(config, Resources(pretrain_workers=2)), daemon=True)
        run.start()
        for number in range(1, options.kills + 1):
            found.append(kill_one(out, number, options.every))
            print(json.dumps(found[-1]), flush=True)
        usual, save = saving(out, options.every)
    for what in ("gone", "loaded", "next step"):
        values = [one[what] for one in found]
        print(f"kill -9 to {what:10} {statistics.median(values):5.1f} s ({min(values):.1f} to {max(values):.1f})")
    taken = statistics.median(one["processor"] for one in found)
    print(f"processor seconds from the kill until loaded {taken:.1f}; load of the machine {os.getloadavg()[0]:.0f}")
    interval = options.every * usual
    lost = statistics.median(one["next step"] for one in found) + interval / 2 + FAILURE_S / (interval + save) * save
    print(f"step {usual:.2f} s, a checkpoint each {options.every} steps ({interval:.0f} s) adds {save:.2f} s")
    print(f"useful at one failure in {FAILURE_S / 60:.0f} minutes: {1 - lost / FAILURE_S:.1%}")


if __name__ == "__main__":
    main()
