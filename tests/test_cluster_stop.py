"""Ctrl-C or SIGTERM in the middle of work, and the death of Ray Train's own process: it ends cleanly, says how to go on, and goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow
COMMAND = [
    *(sys.executable, "-m", "cluster", "pretrain", "simclr/smoke", "data.phantom-chest.raw=phantom:300", "architecture=test_resnet"),
    *("resources.pretrain_workers=1", "settings.max_steps=null", "settings.epochs=400"),
]

# Threads of a study cannot be ended; these ask Ray for something all the time.
ASKING = """
import os, signal, sys, threading, time
from contextlib import suppress
from cluster.stopping import stoppable
from cluster.lock import DriverLock
from cluster.session import session

def ask():
    import ray
    nothing = ray.remote(num_cpus=0)(lambda: None)
    while True:
        with suppress(Exception):
            ray.get(nothing.remote())

with stoppable(), DriverLock(sys.argv[1]), session():
    for _ in range(8):
        threading.Thread(target=ask, daemon=True).start()
    time.sleep(3)
    os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    time.sleep(60)
"""


def test_ctrl_c_and_a_lost_controller_say_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted = subprocess.Popen(
        [*COMMAND, f"out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_hears_ctrl_c,
    )
    _wait(lambda: any((out / "pretrain").glob("*/checkpoints/*/COMMIT")), interrupted)
    of_ray = psutil.Process(interrupted.pid).children(recursive=True)
    interrupted.send_signal(signal.SIGINT)
    said = interrupted.communicate(timeout=60)[0]
    assert interrupted.returncode == 130, said
    assert of_ray
    assert not psutil.wait_procs(of_ray, timeout=30)[1]
    assert not (out / "driver.lock").exists()
    assert "stopped; the same command goes on from here" in said
    assert "Traceback" not in said
    again = subprocess.Popen([*COMMAND, f"out={out}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait(lambda: "resumed" in "".join(path.read_text() for path in (out / "pretrain").glob("*/metrics.jsonl")), again)
        (controller,) = [child for child in psutil.Process(again.pid).children(recursive=True) if "TrainController" in child.name()]
        controller.kill()
        said = again.communicate(timeout=90)[0]
    finally:
        again.kill()
    assert "goes on from step" in said
    assert again.returncode == 1, said
    assert "Ray lost the process that watches over the workers" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    rows = [json.loads(line) for path in (out / "pretrain").glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(("told", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_does_not_repeat_an_end_without_a_word_by_a_thread_that_still_calls_ray(tmp_path: Path, told: str, code: int) -> None:
    command = [sys.executable, "-c", ASKING, str(tmp_path), told]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=_hears_ctrl_c)
    assert said.returncode == code, said.stderr
    assert said.stderr.strip() == "stopped; the same command goes on from here"
    assert not (tmp_path / "driver.lock").exists()


def _hears_ctrl_c() -> None:
    """A test runner in the background ignores SIGINT, and its children would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 150
    while not done():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[0] if process.poll() is not None else 'too slow'}")
        time.sleep(0.3)
