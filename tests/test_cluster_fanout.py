"""The fan-out: its line and its sizes as pure functions, then cells on real workers of a cluster with one GPU that is one in name only."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_cell
import yaml
from hypothesis import given
from hypothesis import strategies as st

from base.config import canonical_json, parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster import context, fanout, observe, places, pool, worker
from cluster import effort as effort_of
from cluster.effort import effort, estimated
from cluster.fanout import Tally, run_cells
from cluster.places import fitting, of_place
from cluster.pool import why
from cluster.study import Resources
from cluster.waiting import ATTEMPTS, LOSSES, Line
from cluster.worker import of_cuda, of_storage
from engine.context import LocalContext
from finetune.cell import CellConfig
from finetune.run import run

COUNTS = {"train": 700, "val": 100, "test": 200}
FAMILIES = ["resnet18", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_tiny_patch4_window7_224", "cbr_tiny", "test_vit"]


BASE = parse(yaml.safe_load((Path(__file__).parent / "golden" / "cell.yaml").read_text()), CellConfig, "cell")


def golden(**fields: Any) -> CellConfig:
    return BASE.model_copy(update={"encoder_dir": None, "encoder_sha256": None, **fields})


# -- estimated cost


def passes(strategy: str, **fields: Any) -> float:
    """Forward passes through the encoder, a training image."""
    return effort(golden(strategy={"name": strategy}, fraction=1.0, **fields), COUNTS, forward=1.0) / COUNTS["train"]


def test_effort_is_images_times_epochs_times_operations_times_what_the_strategy_trains() -> None:
    epochs = golden().task.recipe.epochs
    evaluated = (epochs * COUNTS["val"] + COUNTS["test"]) / COUNTS["train"]
    assert passes("full") == pytest.approx(3 * epochs + evaluated)
    assert passes("linear-aug") == pytest.approx(epochs + evaluated)
    assert passes("lwft") == pytest.approx(2 * epochs + evaluated)
    assert passes("knn") == pytest.approx(sum(COUNTS.values()) / COUNTS["train"])
    assert passes("knn") < passes("linear") < 1.2 * passes("knn")  # features once, whatever the epochs
    assert passes("lp-ft") > passes("full")
    assert passes("full", role="trial") == pytest.approx(passes("full") - COUNTS["test"] / COUNTS["train"])
    assert passes("full", role="similarity") == pytest.approx(2 * min(COUNTS["val"], 300) / COUNTS["train"])  # two networks, once
    whole = golden(fraction=1.0)
    assert effort(whole, COUNTS, 2.0) == 2 * effort(whole, COUNTS, 1.0)


@given(st.floats(0.01, 0.99))
def test_effort_grows_with_the_fraction(fraction: float) -> None:
    assert effort(golden(fraction=fraction), COUNTS, 1.0) < effort(golden(fraction=1.0), COUNTS, 1.0)


def test_an_estimate_reads_manifest_and_network(phantom_chest: str, phantom_fundus: str, tmp_path: Path) -> None:
    from shards.manifest import read

    shards = {"phantom-chest": phantom_chest, "phantom-fundus": phantom_fundus}
    small = tiny_cell.config(shards, tmp_path)
    large = tiny_cell.config(shards, tmp_path, resolution=64)
    masks = tiny_cell.config(shards, tmp_path, task="phantom-vessels")
    assert estimated(large) == pytest.approx(4 * estimated(small), rel=0.05)
    deeper = tiny_cell.config(shards, tmp_path, architecture="resnet18")
    forward = estimated(deeper) / effort(deeper, read(phantom_chest).counts, 1.0)
    assert forward == pytest.approx(2 * 1.82e9 * (32 / 224) ** 2, rel=0.15)  # He et al.: 1.8 billion multiply-adds at 224 px
    assert math.isfinite(estimated(masks))
    assert estimated(small.model_copy(update={"shards": str(tmp_path / "nowhere")})) == math.inf
    assert estimated(small.model_copy(update={"architecture": "resnet17"})) == math.inf


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_networks_of_every_family_are_estimated(
    architecture: str, task: str, phantom_chest: str, phantom_fundus: str, tmp_path: Path
) -> None:
    shards = {"phantom-chest": phantom_chest, "phantom-fundus": phantom_fundus}
    assert 0 < estimated(tiny_cell.config(shards, tmp_path, task=task, architecture=architecture, resolution=64)) < math.inf


def test_an_estimate_that_breaks_ends_no_study(phantom_chest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_cell.config({"phantom-chest": phantom_chest}, tmp_path)

    def breaks(*_: object) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(effort_of, "forward_of", breaks)
    line = Line(estimated)
    assert [waiting.cost for waiting in line.add([config])] == [math.inf]


# -- the line


def cost(config: CellConfig) -> float:
    return config.resolution


@given(st.lists(st.tuples(st.integers(16, 512), st.sampled_from(["cell", "trial"])), max_size=30))
def test_trials_go_first_then_the_longest(cells: list[tuple[int, str]]) -> None:
    line = Line(cost)
    line.add(golden(resolution=side, role=role, key=f"{i:016x}") for i, (side, role) in enumerate(cells))
    left = [line.next().config for _ in range(len(line))]
    assert [(config.role != "trial", -config.resolution) for config in left] == sorted((role != "trial", -side) for side, role in cells)
    same = [[config.key for config in left if (config.resolution, config.role) == cell] for cell in set(cells)]
    assert all(keys == sorted(keys) for keys in same)  # equal ones as they came


def test_a_cell_that_may_have_killed_goes_behind_the_others_and_has_three_attempts() -> None:
    line = Line(cost)
    line.add([golden(key="long", resolution=512), golden(key="short", resolution=32)])
    assert line.again(line.next(), "its worker died", guilty=True)
    assert [line.first.config.key, len(line)] == ["short", 2]
    line.next()
    poisoned = line.next()
    assert line.again(poisoned, "its worker died", guilty=True)
    assert not line.again(line.next(), "its worker died", guilty=True)
    assert len(poisoned.reasons) == ATTEMPTS
    assert not line


def test_a_cell_whose_node_died_keeps_its_turn_and_is_tried_more_often() -> None:
    line = Line(cost)
    line.add([golden(key="long", resolution=512), golden(key="short", resolution=32)])
    for _ in range(LOSSES - 1):
        assert line.first.config.key == "long"
        assert line.again(line.next(), "its node died", guilty=False)
    assert not line.again(line.next(), "its node died", guilty=False)


def test_a_cell_rests_until_its_time() -> None:
    line = Line(cost)
    line.add([golden()])
    assert line.again(line.next(), "storage", guilty=False, until=5.0)
    assert (len(line), line.resting) == (0, 1)
    line.wake(4.9)
    assert len(line) == 0
    line.wake(5.0)
    assert (len(line), line.resting) == (1, 0)


# -- sizes

GPU_NODE, CPU_NODE, HEAD = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 3.0}, {"memory": 1e9}


@pytest.mark.parametrize(
    ("resources", "nodes", "reserved", "expected"),
    [
        ({}, [CPU_NODE, CPU_NODE, HEAD], {}, 6),
        ({"threads": 2}, [CPU_NODE, CPU_NODE], {}, 2),  # a worker lies on one node
        ({"cell_ranks": 2}, [CPU_NODE, CPU_NODE], {}, 2),  # so does a team
        ({"gpus_per_cell": 0.3}, [GPU_NODE], {}, 12),  # three on each: no worker has parts of two GPUs
        ({"gpus_per_cell": 0.1}, [GPU_NODE], {}, 16),  # processors are the limit
        ({"gpus_per_cell": 1, "cell_ranks": 2}, [GPU_NODE, GPU_NODE, CPU_NODE], {}, 4),
        ({"gpus_per_cell": "measured"}, [GPU_NODE, GPU_NODE], {}, 8),  # whole GPUs
        ({}, [CPU_NODE, CPU_NODE], {"CPU": 2.0}, 4),
        ({}, [CPU_NODE], {"CPU": 3.0}, 0),
        ({"gpus_per_cell": 0.5}, [GPU_NODE], {"GPU": 3.0, "CPU": 3.0}, 2),
        ({"cell_workers": 9}, [CPU_NODE], {}, 9),
        ({"cell_workers": 2}, [CPU_NODE], {"CPU": 2.0}, 1),
        ({"gpus_per_cell": 1}, [CPU_NODE], {}, 1),  # who waits makes a cluster grow
    ],
)
def test_the_pool_is_as_large_as_the_cluster_holds(
    resources: dict[str, Any], nodes: Sequence[dict[str, float]], reserved: dict[str, float], expected: int
) -> None:
    assert fitting(nodes, Resources.model_validate(resources), reserved) == expected


def test_a_measured_gpu_is_had_whole_with_its_share_of_the_processors() -> None:
    measured = Resources(gpus_per_cell="measured")
    assert of_place(measured, [GPU_NODE, CPU_NODE]) == [{"CPU": 4.0, "GPU": 1.0}]
    assert of_place(measured, [{"CPU": 64.0, "GPU": 2.0}]) == [{"CPU": float(places.MOST), "GPU": 1.0}]
    assert of_place(measured, [{"CPU": 2.0, "GPU": 4.0}]) == [{"CPU": 1.0, "GPU": 1.0}]


@pytest.mark.parametrize("gpus", [0.5, "measured"])
def test_ranks_want_whole_gpus(gpus: float | str) -> None:
    with pytest.raises(ValueError, match="a GPU of its own"):
        Resources.model_validate({"cell_ranks": 2, "gpus_per_cell": gpus})


# -- reasons


def test_a_death_is_told_in_words() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    def died(text: str) -> Any:
        error = ActorDiedError()
        error.error_msg = text
        return error

    assert why(died("The actor died because its node has died. Node Id: 3f")) == ("its node died", False)
    assert why(ActorUnavailableError("cut", b"\0" * 16)) == ("its worker could not be reached", False)
    assert why(died("1 worker(s) were killed due to the node running low on memory."))[1]
    detail = (
        "Worker exit type: SYSTEM_ERROR Worker exit detail: connection error code 2. End of file. Some common causes include: (1) a, (2) b"
    )
    assert why(died(f"The actor died unexpectedly\n\tpid: 3\n{detail}")) == (
        "its worker died (connection error code 2. End of file.)",
        True,
    )


def test_what_storage_did_is_no_fault_of_a_cell() -> None:
    def chained(cause: BaseException) -> WorkError:
        error = WorkError("the object store cannot be used")
        error.__cause__ = cause
        return error

    assert of_storage(chained(TimeoutError()))
    assert of_storage(chained(OSError(28, "No space left on device")))
    assert not of_storage(chained(FileNotFoundError(2, "gone")))
    assert not of_storage(RequestError("unknown strategy"))


def test_a_broken_cuda_context_is_told_from_what_a_worker_survives() -> None:
    import torch

    assert of_cuda(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert of_cuda(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert of_cuda(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"))
    assert not of_cuda(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not of_cuda(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not of_cuda(WorkError("loss is not finite"))


def test_a_broken_cuda_context_does_not_hide_what_was_wrong(phantom_chest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "_peak_bytes", broken)
    made = worker.CellWorker()
    made.rank, made.world = 0, 1
    config = tiny_cell.config({"phantom-chest": phantom_chest}, tmp_path, architecture="resnet17")
    with pytest.raises(RequestError, match="resnet17"):
        made.run(canonical_json(config))


# -- on Ray


@pytest.fixture(scope="module")
def cluster(head: str) -> Iterator[None]:
    import ray

    from cluster.session import WORKER_SETTINGS

    variables = {"env_vars": {**WORKER_SETTINGS, "ALLOGRAFT_CACHE": os.environ["ALLOGRAFT_CACHE"]}}
    ray.init(address=head, log_to_driver=False, logging_level="ERROR", runtime_env=variables)
    yield
    ray.shutdown()


def quick() -> type[worker.CellWorker]:
    """Workers that import no torch and have nothing to compute. Made here, so that Ray sends the class itself."""

    class Quick(worker.CellWorker):
        def __init__(self) -> None:
            pass

        def start(self, rank: int, world: int, meeting: tuple[str, int] | None) -> worker.Room:
            return worker.Room("node", 100)

        def run(self, config_json: str) -> worker.Spent:
            return worker.Spent(0, 1, 1.0)

    return Quick


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_poisoned_cell_fails_alone(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker dies each time; one that was killed once is done; one that raises is not tried again; more come while it goes on."""

    class Poisoned(quick()):  # type: ignore[misc]
        def run(self, config_json: str) -> Any:
            name = json.loads(config_json)["key"]
            mark = tmp_path / f"{name}.tried"
            if name == "poisoned" or (name == "unlucky" and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "down" and not mark.exists():
                mark.touch()
                raise worker.StorageDown("the object store cannot be used")
            if name == "wrong":
                raise RequestError("unknown strategy")
            return super().run(config_json)

    monkeypatch.setattr(pool, "CellWorker", Poisoned)
    ended: dict[str, Exception | None] = {}
    arriving = [[golden(key="late")], [], None]

    def told(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        ended[config.key] = problem
        return []

    def more() -> Sequence[CellConfig] | None:
        return arriving.pop(0)

    cells = [golden(key=name) for name in ("poisoned", "a", "unlucky", "down", "wrong", "b")]
    tally = run_cells(cells, Resources(cell_workers=2), lambda tally: None, told, more)
    assert (tally.total, tally.done, tally.deaths) == (7, 5, ATTEMPTS + 1)
    assert set(tally.failed) == {"poisoned", "wrong"}
    assert "3 times" in tally.failed["poisoned"]
    assert len(tally.retried["unlucky"]) == 1
    assert "cannot be used" in tally.retried["down"][0]
    assert {key for key, problem in ended.items() if problem is None} == {"a", "b", "unlucky", "down", "late"}
    assert isinstance(ended["wrong"], RequestError)
    assert not arriving


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_cells_make_room_for_a_pretraining_while_many_of_them_wait(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretraining that is ready once held no processor until the last of the cells that were ready before it had ended."""
    from ray.util import placement_group, remove_placement_group

    class Slower(quick()):  # type: ignore[misc]
        def run(self, config_json: str) -> Any:
            time.sleep(0.05)
            return super().run(config_json)

    monkeypatch.setattr(pool, "CellWorker", Slower)
    waiting: list[Any] = []
    begun_at: list[int] = []  # how many cells were done when the pretraining had its place
    count = 200

    def report(tally: Any) -> None:
        if tally.done >= 4 and not waiting and not begun_at:
            waiting.append(placement_group([{"CPU": 2.0}] * 2))
        if waiting and waiting[0].wait(0.01):
            begun_at.append(tally.done)
            remove_placement_group(waiting.pop())

    cells = [golden(key=f"{i}") for i in range(count)]
    tally = run_cells(cells, Resources(cell_workers=4), report, reserved=lambda: {"CPU": 4.0} if waiting else {})
    assert tally.done == count
    assert 4 <= begun_at[0] < count / 2


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_worker_whose_cuda_context_broke_eats_no_more_cells(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asserting(quick()):  # type: ignore[misc]
        broken = False

        def run(self, config_json: str) -> Any:
            self.broken |= json.loads(config_json)["key"] == "poisoned"
            if self.broken:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return super().run(config_json)

    monkeypatch.setattr(pool, "CellWorker", Asserting)
    tally = run_cells([golden(key=name) for name in ("poisoned", "a", "b", "c")], Resources(cell_workers=1), lambda tally: None)
    assert (set(tally.failed), tally.done, tally.deaths) == ({"poisoned"}, 3, ATTEMPTS)
    assert "device-side assert triggered" in tally.failed["poisoned"]


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("outage", ["ends", "never ends", "of one cell"])
def test_an_outage_of_storage_fails_no_cell(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: str) -> None:
    """However often they are tried meanwhile; what never ends does end them, and so does one that others do not have."""

    class Down(quick()):  # type: ignore[misc]
        def run(self, config_json: str) -> Any:
            if not (tmp_path / "up").exists() and json.loads(config_json)["key"] in ("a", "b"):
                raise worker.StorageDown("the object store cannot be used")
            return super().run(config_json)

    monkeypatch.setattr(pool, "CellWorker", Down)
    monkeypatch.setattr(fanout, "LONGEST_REST_S", 0.01)
    monkeypatch.setattr(fanout, "LOOK_S", 0.02)
    if outage == "never ends":
        monkeypatch.setattr(fanout, "OUTAGE_S", 0.0)

    def report(tally: Tally) -> None:
        if outage == "ends" and {"a", "b"} == {key for key, reasons in tally.retried.items() if len(reasons) > LOSSES}:
            (tmp_path / "up").touch()

    lost: list[str] = []

    def told(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        lost.extend([config.key] if problem else [])
        return [golden(key="other")] if outage == "of one cell" and not lost else []

    first = [golden(key=key) for key in (("a", "other") if outage == "of one cell" else ("a", "b"))]
    tally = run_cells(first, Resources(cell_workers=2), report, told)
    if outage == "ends":
        assert (tally.done, tally.failed) == (2, {})
    else:
        assert set(tally.failed) == {"a", "b"} & {config.key for config in first}
        assert all(len(tally.retried[key]) >= LOSSES for key in tally.failed)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_does(cluster: None, tmp_path: Path) -> None:
    """Within what tests/test_finetune_run.py allows rounding; both ranks are processes of one team."""
    shards = tiny_cell.corpora(tmp_path / "corpora")
    settings = {"recipe.lr": 1e-3, "recipe.optimizer": "sgd", "recipe.warmup": 0, "recipe.batch": 15}
    one, two = (tiny_cell.config(shards, tmp_path / name, settings=settings) for name in ("one", "two"))
    run(one, LocalContext(dir=str(tmp_path)))
    tally = run_cells([two], Resources(cell_workers=1, cell_ranks=2), lambda tally: None)
    assert not tally.failed
    rows = [tiny_cell.rows(Path(config.out) / "metrics.jsonl") for config in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert [b[key] for key in a] == pytest.approx([a[key] for key in a], abs=1e-5)
    frames = [pd.read_parquet(Path(config.out) / "predictions.parquet") for config in (one, two)]
    pd.testing.assert_frame_equal(frames[0], frames[1], atol=1e-4, rtol=1e-4)
    assert "workers: 2" in (Path(two.out) / "config.yaml").read_text()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_gpu_holds_one_cell_until_its_memory_is_known(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then as many as fit: a GPU of 100 bytes, cells of 30 and of 80; one that ran out of memory beside others is tried alone."""

    class Sized(quick()):  # type: ignore[misc]
        def start(self, rank: int, world: int, meeting: tuple[str, int] | None) -> Any:
            (tmp_path / f"{os.getpid()}.started").touch()
            return super().start(rank, world, meeting)

        def run(self, config_json: str) -> Any:
            began, config = time.time(), json.loads(config_json)
            mark = tmp_path / f"{config['key']}.times"
            while config["key"] != "small0" and len(list(tmp_path.glob("*.started"))) < 3:
                time.sleep(0.05)
            if config["key"] == "greedy" and not mark.exists():
                mark.write_text("[]")
                raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
            time.sleep(1.0)  # much longer than a busy machine takes to hand out the next cell
            mark.write_text(json.dumps([began, time.time()]))
            return worker.Spent(80 if config["resolution"] == 64 else 30, 1, 1.0)

    monkeypatch.setattr(pool, "CellWorker", Sized)
    names = [*(f"small{i}" for i in range(4)), "greedy", *(f"small{i}" for i in range(4, 7))]
    cells = [golden(key=name, resolution=32) for name in names] + [golden(key=f"large{i}", resolution=64) for i in range(2)]
    tally = run_cells(cells, Resources(gpus_per_cell="measured"), lambda tally: None)
    assert (tally.done, tally.failed, tally.deaths) == (10, {}, 0)
    times = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.times")}
    beside = {name: sum(a < end and b > begin for other, (a, b) in times.items() if other != name) for name, (begin, end) in times.items()}
    assert beside["large0"] == beside["large1"] == beside["greedy"] == 0
    at_once = [sum(a <= begin < b for a, b in times.values()) for begin, _ in times.values()]
    assert max(at_once) == 3  # of 30 in 92 % of 100
    assert "no memory was left" in tally.retried["greedy"][0]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_worker_that_cannot_start_ends_the_fan_out(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(worker.CellWorker):
        def __init__(self) -> None:
            raise ImportError("no such library")

    monkeypatch.setattr(pool, "CellWorker", Broken)
    monkeypatch.setattr(fanout, "STARTS", 2)
    with pytest.raises(WorkError, match="could not start: ImportError: no such library"):
        run_cells([golden()], Resources(cell_workers=1), lambda tally: None)


def test_time_to_go_is_by_cost_and_not_by_count() -> None:
    tally = Tally(total=10, done=1, cost=100.0, cost_ended=50.0, started=time.monotonic() - 60)
    assert tally.eta_s == pytest.approx(60, abs=1)


# -- what is seen from outside


def drawn() -> set[str]:
    """Names of metrics in the panels of the Grafana dashboard."""
    board = json.loads((ROOT / "cluster" / "deploy" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return {name for expression in expressions for name in re.findall(r"ray_\w+", expression)}


def exported(name: str) -> str:
    """As Prometheus has one of ours."""
    return f"ray_allograft_{name}" + ("_total" if observe.METRICS[name].counts else "")


def test_the_dashboard_draws_what_is_exported_and_all_of_it() -> None:
    from ray.dashboard.modules.reporter import reporter_agent

    ours = {exported(name) for name in observe.METRICS}
    assert ours == {name for name in drawn() if "allograft" in name}
    of_ray = {f"ray_{name}" for name in re.findall(r'"(node_\w+)"', Path(reporter_agent.__file__).read_text())}
    assert drawn() - ours <= of_ray
    assert set(observe.NODE) <= of_ray


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_rays_exporter_tells_what_driver_and_workers_told(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 40, "steps": 100, "loss": 2.5, "img_per_s": 123.0, "data_wait": 0.25, "rankme": 3.0}

    class Telling(quick()):  # type: ignore[misc]
        def run(self, config_json: str) -> Any:
            context.WorkerContext(0, 1, str(tmp_path / "pretrain" / "simclr-1a2b")).report(row)
            context.WorkerContext(1, 2, str(tmp_path / "pretrain" / "other-1a2b")).report(row)  # ranks but the first say nothing
            context.WorkerContext(0, 1, str(tmp_path / "cells" / "1a2b")).report(row)
            return super().run(config_json)

    monkeypatch.setattr(pool, "CellWorker", Telling)
    observe.tell(cells_retried=0)
    seen: dict[str, Any] = {}

    def look_while_it_runs(config: CellConfig, problem: Exception | None) -> list[CellConfig]:
        """Workers are asked while they are there: what a process told goes with it."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not {exported(name) for name in observe.METRICS} <= set(seen):
            for address in observe.exporters().values():
                seen.update({name: (labels, value) for name, labels, value in observe.scrape(address)})
            time.sleep(0.5)
        return []

    run_cells([golden(), golden(key="1" * 16)], Resources(cell_workers=1), lambda tally: None, look_while_it_runs)
    assert {exported(name) for name in observe.METRICS} <= set(seen)
    labels, value = seen["ray_allograft_pretrain_step"]
    assert (labels["run"], value) == ("simclr-1a2b", 40)
    assert seen["ray_allograft_pretrain_data_wait"][1] == 0.25
    assert seen["ray_allograft_cell_images_total"][0]["task"] == BASE.task.task
    address = observe.note_dashboard(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "nodes" / "ray.json").read_text()) == {"dashboard": address}
    observe.look(str(tmp_path / "out"))
    host = next(iter(observe.exporters()))
    told = json.loads((tmp_path / "out" / "nodes" / f"{host}.jsonl").read_text())
    assert 0 <= told["cpu_utilization_percentage"] <= 100
    assert told["system_memory_usage_megabytes"] > 100
