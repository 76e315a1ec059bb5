"""A study on three Ray nodes while things break, and whether it ended as if nothing had.

    with running(folder, proxied=True, TMPDIR=...) as services:
        here = Cluster(services, scratch)
        calm = here.run(TREE, "calm", [])
        told = here.run(TREE, "seed-7", draw(7))
        assert told.differences(calm) == []

A driver that ends is started again, as KubeRay's backoffLimit does it; so are nodes and servers. How far a study is is read from what the
store has taken: the share of its checkpoints, of its cells, or the mean of the two.
"""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faulty_s3
import pandas as pd
import psutil
import tiny_study
from services import NODES, Services, end, node_answers, start_mlflow, start_node

from base import storage
from base.paths import ROOT
from base.seeds import rng

PASSING = ["run_id", "seconds", "study"]  # what results may differ in; each run has a study of its own name
MOST_STARTS = 30
PATIENCE_S = 900.0
OUTAGE_S, REFUSED_S, REFUSED, FULL_S = 30.0, 15.0, 0.5, 10.0
# When each may strike, by its clock.
KINDS = {
    "trainer": (0.05, 0.8),
    "truncated checkpoint": (0.15, 0.8),
    "cell worker": (0.05, 0.9),
    "raylet": (0.02, 0.9),
    "driver": (0.01, 0.9),
    "mlflow": (0.0, 0.8),
    "store": (0.0, 0.9),
    "disk": (0.0, 0.9),
}
CLOCKS = {"trainer": "checkpoints", "truncated checkpoint": "checkpoints", "cell worker": "cells"}


@dataclass(frozen=True)
class Fault:
    """Something that breaks once its clock has come to `at`, of 1. node: which raylet, of those in services.NODES."""

    kind: str
    at: float
    node: int = 1

    def __str__(self) -> str:
        return f"{NODES[self.node]}'s raylet" if self.kind == "raylet" else self.kind


def draw(seed: int, count: int = 4) -> list[Fault]:
    """`count` different faults at random moments."""
    numbers = rng("chaos", seed)
    kinds = [str(kind) for kind in numbers.permutation(sorted(KINDS))[:count]]
    return [Fault(kind, float(numbers.uniform(*KINDS[kind])), int(numbers.integers(len(NODES)))) for kind in kinds]


@dataclass
class Told:
    """How a study ended. `written`: how often the store took each cell's result; `codes`: of the drivers, in their order."""

    name: str
    codes: list[int]
    rows: pd.DataFrame
    files: dict[str, str]
    written: dict[str, int]
    troubles: list[str]
    happened: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def differences(self, calm: "Told") -> list[str]:
        """In words, what is not as in the undisturbed study."""
        found = list(self.troubles)
        if not self.codes or self.codes[-1] != 0:
            found.append(f"the drivers ended with {self.codes}")
        found += [f"{path} was computed {count} times" for path, count in self.written.items() if count != 1]
        if set(self.written) != set(calm.written):
            found.append(f"{len(self.written)} cells, {len(set(self.written) ^ set(calm.written))} of them other ones")
        found += [f"{path} differs" for path in calm.files if self.files.get(path) != calm.files[path]]
        if not self.rows.equals(calm.rows):
            found.append("result rows differ")
        return found


@dataclass
class Cluster:
    """The services and the scratch volume that its nodes write to, which is a file system of its own or None."""

    services: Services
    scratch: Path | None = None
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def proxy(self) -> str:
        return self.services.environment["AWS_ENDPOINT_URL"]

    def run(self, tree: dict[str, Any], name: str, faults: Sequence[Fault]) -> Told:
        """The study, to its end, over these faults."""
        folder = self.services.folder / name
        folder.mkdir()
        out = f"s3://allograft/{name}"
        path = tiny_study.write(folder, tree, study=name, out=out, tracking=self.services.tracking)
        settings = tree["pretrain"][0]["settings"]
        steps = int(settings["max_steps"]) // int(settings["checkpoint_every_steps"])
        cells = len(tree["cells"]["sources"]) * len(tree["cells"]["strategies"]) * len(tree["cells"]["seeds"])
        began, codes, happened = time.monotonic(), [], []
        waiting = sorted(faults, key=lambda fault: fault.at)
        driver = self._drive(path, folder)
        troubles: list[str] = []
        try:
            while True:
                clocks = self._clocks(name, steps, cells)
                for fault in [fault for fault in waiting if fault.at <= clocks[CLOCKS.get(fault.kind, "all")]]:
                    if self._strike(fault, out, driver):
                        waiting.remove(fault)
                        happened.append(f"{fault} at {clocks['checkpoints']:.2f} of the checkpoints, {clocks['cells']:.2f} of the cells")
                if (code := driver.poll()) is not None:
                    codes.append(code)
                    if code == 0 or len(codes) == MOST_STARTS:
                        break
                    time.sleep(2)
                    driver = self._drive(path, folder)
                if time.monotonic() - began > PATIENCE_S:
                    troubles.append(f"not done after {PATIENCE_S:.0f} s")
                    driver.kill()
                    codes.append(driver.wait())
                    break
                time.sleep(0.1)
        finally:
            driver.kill()  # nothing where it has ended
        seconds = time.monotonic() - began
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        told = self.look(name, codes)
        told.happened, told.missed, told.seconds = happened, [str(fault) for fault in waiting], round(seconds, 1)
        told.troubles += troubles
        return told

    def look(self, name: str, codes: list[int]) -> Told:
        """What stands of a study whose drivers ended so."""
        out = f"s3://allograft/{name}"
        complete = codes[-1] == 0
        written = {
            path: count for path, count in self._written(name).items() if path.startswith("/cells/") and path.endswith("/result.json")
        }
        rows = self._rows(out) if complete else pd.DataFrame()
        return Told(name, codes, rows, self._files(out), written, self._view(name, len(written)) if complete else [])

    def _drive(self, path: str, folder: Path) -> subprocess.Popen[bytes]:
        environment = {**self.services.environment, "RAY_ADDRESS": self.services.ray}
        with open(folder / "driver.log", "ab") as log:
            command = [sys.executable, "-m", "cluster", "run", path]
            return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _written(self, name: str) -> dict[str, int]:
        """By its path below OUT, how often the store took each file."""
        start = f"/allograft/{name}/"
        return {path.removeprefix(start.rstrip("/")): n for path, n in faulty_s3.written(self.proxy).items() if path.startswith(start)}

    def _clocks(self, name: str, steps: int, cells: int) -> dict[str, float]:
        paths = self._written(name)
        committed = sum(path.endswith("/COMMIT") for path in paths)
        done = sum(path.startswith("/cells/") and path.endswith("/result.json") for path in paths)
        clocks = {"checkpoints": min(committed / steps, 1.0), "cells": done / cells}
        return clocks | {"all": sum(clocks.values()) / 2}

    def _strike(self, fault: Fault, out: str, driver: subprocess.Popen[bytes]) -> bool:
        """Let it happen; False while there is nobody whom it could happen to."""
        if fault.kind == "driver":
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
        elif fault.kind in ("trainer", "cell worker"):
            return self._kill("RayTrainWorker" if fault.kind == "trainer" else "CellWorker")
        elif fault.kind == "truncated checkpoint":
            return self._truncate(out) and self._kill("RayTrainWorker")
        elif fault.kind == "raylet":
            self._kill_raylet(NODES[fault.node])
        elif fault.kind == "mlflow":
            uri = self._database()
            end(self.services.running["mlflow"].pid)
            self._later(OUTAGE_S, lambda: start_mlflow(self.services, uri))
        elif fault.kind == "store":
            faulty_s3.refuse(self.proxy, REFUSED)
            self._later(REFUSED_S, lambda: faulty_s3.refuse(self.proxy, 0.0))
        else:
            self._fill()
        return True

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def work() -> None:
            time.sleep(seconds)
            act()

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def _processes(self, name: str) -> list[psutil.Process]:
        found = []
        for node in NODES:
            with suppress(psutil.Error):
                found += psutil.Process(self.services.running[node].pid).children(recursive=True)
        named = []
        for process in found:
            with suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    named.append(process)
        return named

    def _kill(self, name: str) -> bool:
        victims = self._processes(name)
        if victims:
            with suppress(psutil.NoSuchProcess):
                victims[-1].kill()
        return bool(victims)

    def _truncate(self, out: str) -> bool:
        """Half of the newest checkpoint's model is gone. Only while the run still needs it."""
        for run in storage.listing(f"{out}/pretrain"):
            place = f"{out}/pretrain/{run}/checkpoints"
            committed = [step for step in storage.listing(place) if storage.exists(f"{place}/{step}/COMMIT")]
            if committed and self._processes("RayTrainWorker"):
                whole = storage.read_bytes(f"{place}/{committed[-1]}/model.safetensors")
                storage.put(f"{place}/{committed[-1]}/model.safetensors", whole[: len(whole) // 2])
                return True
        return False

    def _kill_raylet(self, name: str) -> None:
        """The node's other processes follow by themselves; then it is started again. A head takes the whole cluster with it."""
        node = self.services.running[name]
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    process.kill()
        node.wait(60)
        again = NODES if name == "head" else (name,)
        cpus = {other: int(self._option(other, "--num-cpus")) for other in again}

        def restart() -> None:
            end(*(self.services.running[other].pid for other in again))
            for other in again:
                start_node(self.services, other, cpus[other])
                self.services.wait(other, lambda other=other: node_answers(self.services, other))  # type: ignore[misc]

        self._later(1.0, restart)

    def _option(self, name: str, option: str) -> str:
        words = [str(word) for word in self.services.running[name].args]  # type: ignore[union-attr]
        return words[words.index(option) + 1]

    def _database(self) -> str:
        return self._option("mlflow", "--backend-store-uri")

    def _fill(self) -> None:
        assert self.scratch is not None
        scratch = self.scratch

        def work() -> None:
            ballast = scratch / "ballast"
            until = time.monotonic() + FULL_S
            with open(ballast, "wb", buffering=0) as file:
                while time.monotonic() < until:  # others remove files meanwhile
                    with suppress(OSError):
                        file.write(bytes(1 << 16))
                        continue
                    time.sleep(0.05)
            ballast.unlink()

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def _rows(self, out: str) -> pd.DataFrame:
        return pd.read_csv(io.BytesIO(storage.read_bytes(f"{out}/report/results.csv"))).drop(columns=PASSING)

    def _files(self, out: str) -> dict[str, str]:
        """sha256 of what has to be the same to the bit: predictions of the cells, exported encoders."""
        paths = [f"cells/{key}/predictions.parquet" for key in storage.listing(f"{out}/cells")]
        paths += [f"pretrain/{run}/export/model.safetensors" for run in storage.listing(f"{out}/pretrain")]
        there = [path for path in paths if storage.exists(f"{out}/{path}")]
        return {path: hashlib.sha256(storage.read_bytes(f"{out}/{path}")).hexdigest() for path in there}

    def _view(self, name: str, cells: int) -> list[str]:
        """What is wrong in MLflow: a cell that is missing or stands twice, a run that is not finished."""
        from mlflow import MlflowClient

        self.services.wait("mlflow", lambda: True)
        client = MlflowClient(tracking_uri=self.services.tracking)
        runs = client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000)
        keys = [run.data.tags["allograft.key"] for run in runs]
        found = [f"MLflow: {run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED"]
        if len(keys) != len(set(keys)) or len(keys) != cells + 2:
            found.append(f"MLflow: {len(keys)} runs, {len(set(keys))} different ones, expected {cells + 2}")
        if storage.exists(f"s3://allograft/{name}/driver.lock"):
            found.append("the lock of the driver stands")
        return found
