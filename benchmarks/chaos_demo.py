"""The demo with a trainer and a cell worker killed in the middle: is every result the undisturbed run's?

    make demo-chaos            # or: .venv/bin/python benchmarks/chaos_demo.py [OUT] [OUT_CHAOS] [KEY=VALUE ...]

Runs `studies/demo.yaml` undisturbed into OUT (default runs/demo; kept when it stands there already) and again into OUT_CHAOS
(default runs/demo-chaos, which is emptied first), where this script ends one training process and one cell worker with SIGKILL. Ends by
saying whether every result row of the two studies is equal, but for run_id and seconds. Exit code 0 if so.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil

from base import storage
from base.paths import ROOT

PASSING = ["run_id", "seconds"]


def command(out: str, settings: list[str]) -> list[str]:
    """The study as a user starts it."""
    return [sys.executable, "-m", "cluster", "run", str(ROOT / "studies" / "demo.yaml"), f"out={out}", *settings]


def workers(driver: psutil.Process, name: str) -> list[psutil.Process]:
    """Ray's processes under this driver, by the name that Ray gives them."""
    found = []
    for child in driver.children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def logged_steps(out: str) -> int:
    """Steps in the newest metrics of any pretraining."""
    steps = [0]
    for run in storage.listing(f"{out}/pretrain"):
        path = f"{out}/pretrain/{run}/metrics.jsonl"
        if storage.exists(path):
            steps.append(storage.read_bytes(path).count(b'"loss"'))
    return max(steps)


def disturb(out: str, driver: psutil.Process) -> list[str]:
    """Kill a trainer once it has logged some steps, and a cell worker once a cell is done; returns what was killed."""
    killed: list[str] = []
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE and len(killed) < 2:
        victims: list[psutil.Process] = []
        if not killed and logged_steps(out) >= 4:
            victims = workers(driver, "RayTrainWorker")
        elif killed and any(storage.exists(f"{out}/cells/{key}/result.json") for key in storage.listing(f"{out}/cells")):
            victims = workers(driver, "CellWorker")
        if victims:
            os.kill(victims[-1].pid, signal.SIGKILL)
            killed.append("a trainer" if len(killed) == 0 else "a cell worker")
            print(f"*** killed {killed[-1]} (process {victims[-1].pid})", flush=True)
        time.sleep(0.3)
    return killed


def rows(out: str) -> pd.DataFrame:
    """Result rows of a study without what may differ."""
    return pd.read_csv(io.BytesIO(storage.read_bytes(f"{out}/report/results.csv"))).drop(columns=PASSING)


def main() -> int:
    """Run both, compare."""
    places = [word for word in sys.argv[1:] if "=" not in word]
    settings = [word for word in sys.argv[1:] if "=" in word]
    calm = os.path.abspath(places[0] if places else "runs/demo")
    chaos = os.path.abspath(places[1] if len(places) > 1 else "runs/demo-chaos")
    shutil.rmtree(chaos, ignore_errors=True)
    subprocess.run(command(calm, settings), check=True)
    driver = subprocess.Popen(command(chaos, settings))
    killed = disturb(chaos, psutil.Process(driver.pid))
    if driver.wait() != 0:
        print(f"the disturbed study ended with exit code {driver.returncode}")
        return 1
    undisturbed, disturbed = rows(calm), rows(chaos)
    equal = undisturbed.equals(disturbed)
    verdict = "every one equal to" if equal else "NOT equal to"
    print(f"killed {' and '.join(killed) or 'nothing'}; {len(disturbed)} result rows, {verdict} the undisturbed run's")
    return 0 if equal and len(killed) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
