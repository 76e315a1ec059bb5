"""A pretraining with a range of workers on a cluster whose nodes come and go: it goes on with what is left, and grows back."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from namespaces import HEAD
from services import end
from test_pretrain_run import tree
from tiny_corpus import write

from base import storage
from base.paths import ROOT

PATIENCE_S = 300.0
# No end within the test, however fast the machine.
SETTINGS = {"max_steps": 100_000, "epochs": 100_000, "checkpoint_every_steps": 20, "log_every_steps": 10}
DRIVER = """
import json, sys
from base.config import parse
from cluster import pretraining
from cluster.session import session
from cluster.study import Resources
from pretrain.run import PretrainConfig
pretraining.RESIZE_S = 2.0
with session():
    pretraining.pretrain_on_ray(parse(json.loads(sys.argv[1]), PretrainConfig, "test"), Resources(pretrain_workers=[1, 2]))
"""


def test_a_node_that_drains_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts it and places nothing on it: a run that was noticed asked for three workers again and again while two fitted."""
    from ray._private.state import state
    from ray.train import ScalingConfig

    from cluster.trainer import Divisors

    policy = Divisors(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}), 24)
    rooms = {node: {"CPU": 1.0} for node in ("a", "b", "c")}
    monkeypatch.setattr(state, "get_draining_nodes", dict)
    assert policy._count_possible_workers(rooms) == 3
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"b": 1})
    assert policy._count_possible_workers(rooms) == 2


def test_workers_share_each_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four divide the batch of 24, and not the four micro-batches of 6 that it is made of."""
    import ray
    from ray._private.state import state

    from base.config import parse
    from cluster import pretraining, trainer
    from cluster.study import Resources
    from pretrain.run import PretrainConfig

    given: dict[str, Any] = {}
    monkeypatch.setattr(trainer, "Trainer", lambda *_, **named: given.update(named))
    monkeypatch.setattr(pretraining, "_fit", lambda _: None)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(state, "get_draining_nodes", dict)
    plan = tree("simclr", write(tmp_path / "shards"), "elastic", global_batch=24, accumulate=4) | {"out": str(tmp_path / "out")}
    storage.put(str(tmp_path / "out" / "result.json"), "{}")
    pretraining.pretrain_on_ray(parse(plan, PretrainConfig, "test"), Resources(pretrain_workers=[1, 4]))
    policy = trainer.Divisors(given["scaling_config"], given["micro_batch"])
    assert policy._count_possible_workers({node: {"CPU": 1.0} for node in ("a", "b", "c", "d")}) == 3


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_follows_the_nodes_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(create_token_if_missing=True)
    for name, value in HEAD.items():
        monkeypatch.setenv(name, value)
    config = tree("simclr", write(tmp_path / "shards"), "elastic", **SETTINGS) | {"out": str(tmp_path / "out")}

    def seen() -> list[dict[str, Any]]:
        return storage.read_rows(str(tmp_path / "out" / "metrics.jsonl"))

    def resumes() -> list[int]:
        return [row["workers"] for row in seen() if row.get("event") == "resumed"]

    def until(what: str, ready: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not ready():
            assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() - began < PATIENCE_S, what
            time.sleep(0.1)
        print(f"{time.monotonic() - began:5.1f} s until {what}", flush=True)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    _, second = [cluster.add_node(num_cpus=1) for _ in range(2)]
    with open(tmp_path / "log", "wb") as log:
        command, environment = [sys.executable, "-c", DRIVER, json.dumps(config)], {**os.environ, "RAY_ADDRESS": cluster.address}
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until("steps on two nodes", lambda: any(len(row.get("rank_s", [])) == 2 and row["step"] > 20 for row in seen()))
        cluster.remove_node(second, allow_graceful=False)
        until("steps on the one that is left", lambda: resumes() == [1] and "loss" in seen()[-1])
        logged = [row["step"] for row in seen() if "loss" in row]
        cluster.add_node(num_cpus=1)
        until("steps on two again", lambda: resumes() == [1, 2] and len(seen()[-1].get("rank_s", [])) == 2)
    finally:
        end(driver.pid)
        cluster.shutdown()
    # From checkpoints on, and what was done after them once more: no step is left out.
    steps = [row["step"] for row in seen() if "loss" in row]
    assert set(range(10, logged[-1], 10)) <= set(steps)
    assert json.loads((tmp_path / "out" / "attempts.json").read_text())["attempts"] == 3
