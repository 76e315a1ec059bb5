"""A rank that is slow has a name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.pace import IN_A_ROW, Pace, words

ROOT = Path(__file__).resolve().parent.parent
RANKS = """
import json, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from engine.pace import Pace

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=timedelta(seconds=60))
pace, events, rows, before = Pace(), [], [], dist.all_reduce
for step in range(5):
    with pace.measured(step > 0):
        time.sleep(0.25 if rank == 1 else 0.05)
        for _ in range(3):
            dist.all_reduce(torch.ones(4))
    if step > 0:
        rows.append(pace.read())
        events += pace.stragglers(rows[-1]["rank_s"])
if rank == 0:
    with open(f"{folder}/found.json", "w") as file:
        json.dump({"rows": rows, "events": events, "as before": dist.all_reduce is before}, file)
"""


def test_the_late_rank_is_named_although_all_steps_take_as_long(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["slowest_rank"] for row in found["rows"]] == [1] * 4
    for row in found["rows"]:
        assert row["rank_s"][1] > 0.24
        assert max(row["rank_s"][0], row["rank_s"][2]) < 0.2  # they wait for it, and waiting is not theirs
    assert found["as before"]
    (event,) = found["events"]
    assert event["rank"] == 1
    assert words({**event, "step": 30}).startswith(f"rank 1 on {event['host']} at step 30 took 0.2")


def test_alone_nothing_is_measured() -> None:
    pace = Pace()
    with pace.measured(True):
        pass
    assert pace.read() == {}


@pytest.mark.parametrize("own", [0.06, 0.12, 0.55])
def test_noise_is_not_slowness(own: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    pace._hosts = ["a", "b", "c"]
    usual = 0.05 if own < 0.1 else 0.1 if own < 0.2 else 0.4
    assert not any(pace.stragglers([usual, own, usual]) for _ in range(IN_A_ROW + 2))


def test_one_that_recovers_and_is_slow_again_is_said_again() -> None:
    pace = Pace()
    pace._hosts = ["a", "b", "c"]
    slow, sound = [0.2, 0.2, 0.5], [0.2, 0.2, 0.2]
    said = [bool(pace.stragglers(row)) for row in [*[slow] * 5, sound, *[slow] * 3]]
    assert said == [False, False, True, False, False, False, False, False, True]
