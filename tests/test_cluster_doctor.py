"""What the doctor finds, on made-up nodes and on this machine; whole clusters are in test_cluster_hosts.py."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from hypothesis import given
from hypothesis import strategies as st

from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster import doctor, places
from cluster.hosts import Host, look
from cluster.load import load_study
from cluster.study import Resources, Study
from engine.saved import Commit

SHM = 8 << 30


def node(name: str = "a", **changes: Any) -> Host:
    facts = Host(
        host=name,
        address=f"10.0.0.{len(name)}",
        versions={"Python": "3.11.2", "ray": "2.60.0"},
        shm=SHM,
        memory=64 << 30,
        free={"TMPDIR": 1 << 40},
        seen={},
        gpus=["H100", "H100"],
        interfaces={"lo": "127.0.0.1", "eth0": f"10.0.0.{len(name)}"},
        infiniband=["mlx5_0"],
        environment={},
        credentials="iam-role",
        locked_memory=-1,
        resources={"CPU": 8.0, "GPU": 2.0},
    )
    return dataclasses.replace(facts, **changes)


def study(folder: Path, **resources: Any) -> Study:
    return load_study(tiny_study.write(folder, tiny_study.STUDY, resources=resources))


def refused(findings: Any) -> list[str]:
    return [f"{finding.what}: {finding.said}" for finding in findings if finding.level == "refused"]


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"pretrain_workers": 8, "gpus_per_pretrain_worker": 1}, "pretraining wants 8 workers of 1 CPU and 1 GPU (8 CPUs, 8 GPUs), 4 fit"),
        ({"pretrain_workers": [8, 16], "gpus_per_pretrain_worker": 1}, "pretraining wants 8 workers"),
        ({"gpus_per_cell": 3}, "a cell wants 1 CPU and 3 GPU, which no node has: the cluster has 16 CPUs, 4 GPUs"),
        ({"threads": 9}, "a cell wants 9 CPU, which no node has"),
    ],
)
def test_too_little_room_says_what_is_missing(resources: dict[str, Any], message: str, tmp_path: Path) -> None:
    rooms = [node().resources, node("bb").resources]
    assert message in "; ".join(refused(doctor.room(study(tmp_path, **resources), rooms)))


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    rooms = [node().resources, node("bb").resources]
    asked = study(tmp_path, pretrain_workers=[2, 8], gpus_per_pretrain_worker=1, gpus_per_cell=0.25)
    (finding,) = doctor.room(asked, rooms)
    assert finding.said == "pretraining: 4 of at most 8 workers fit"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=4), st.integers(1, 4), st.sampled_from([0, 0.25, 0.5, 1, 2]))
def test_a_worker_is_never_cut_over_two_nodes(sizes: list[tuple[int, int]], cpus: int, gpus: float) -> None:
    rooms = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in sizes]
    fit = places.room_for(rooms, [{"CPU": float(cpus), "GPU": gpus}])
    by_hand = 0
    for cpu, gpu in sizes:
        count = 0
        while (count + 1) * cpus <= cpu and (count + 1) * gpus <= gpu:
            count += 1
        by_hand += count
    assert fit == by_hand


@pytest.mark.parametrize("gpus", [0, 0.1, 0.3, 0.5, 1, 2, "measured"])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=3), st.integers(1, 2))
def test_cells_are_refused_where_the_pool_has_no_place_for_one(gpus: float | str, sizes: list[tuple[int, int]], ranks: int) -> None:
    if ranks > 1 and (gpus == "measured" or 0 < float(gpus) < 1):
        return  # no study may ask for that
    rooms = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in sizes]
    asked = Resources.model_validate({"gpus_per_cell": gpus, "cell_ranks": ranks, "threads": 2})
    made = parse({**tiny_study.STUDY, "out": "out", "resources": asked.model_dump(), "pretrain": []}, Study, "study")
    enough = places.fitting(rooms, asked, {"memory": 1.0}) > 0  # something is held back, so that none is none
    assert bool(refused(doctor.room(made, rooms))) is not enough


def test_another_version_on_a_node_is_refused() -> None:
    here = node()
    other = node("bb", versions={"Python": "3.12.1", "ray": "2.60.0"})
    assert doctor.versions([here], here).level == "ok"
    assert refused([doctor.versions([here, other], here)]) == ["versions: bb (10.0.0.2) has Python 3.12.1, the driver 3.11.2"]


@pytest.mark.parametrize(
    ("skew", "error", "level"), [(0.5, 0.1, "ok"), (5, 0.1, "mend"), (30, 0.5, "refused"), (-30, 0.5, "refused"), (30, 40, "ok")]
)
def test_clocks_that_differ(skew: float, error: float, level: str) -> None:
    assert doctor._clocks([node(), node("bb", skew_s=skew, skew_error_s=error)]).level == level


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"NCCL_IB_DISABLE": "1"}}, "has mlx5_0 and NCCL_IB_DISABLE=1"),
        ({"locked_memory": 8 << 20}, "InfiniBand with 8 MiB of locked memory"),
        ({"infiniband": []}, "InfiniBand only on a (10.0.0.1)"),
        ({"environment": {"NCCL_SOCKET_IFNAME": "ens5"}}, "NCCL_SOCKET_IFNAME=ens5 names no interface"),
        ({"interfaces": {"lo": "127.0.0.1"}}, "no interface has the address by which Ray knows it"),
        ({"resources": {"CPU": 8.0}}, "Ray was started without those of bb"),
    ],
)
def test_settings_of_nccl_between_nodes(changes: dict[str, Any], message: str) -> None:
    found = list(doctor._network([node(), node("bb", **changes)]))
    (wrong,) = [finding for finding in found if finding.level == "mend"]
    assert message in wrong.said
    assert wrong.mend
    assert all(finding.level == "ok" for finding in doctor._network([node(), node("bb")]))


def test_storage_that_a_node_does_not_see_is_refused(tmp_path: Path) -> None:
    asked = study(tmp_path)
    token = {f"{asked.out}/.doctor-1": "word"}
    seen = [node(seen=dict(token)), node("bb", seen=dict.fromkeys(token, "not there"))]
    (said,) = refused(doctor.shared(asked, seen, token))
    assert "is not shared: not seen by bb (10.0.0.2) (not there)" in said
    assert not refused(doctor.shared(asked, seen[:1], token))


def test_small_shared_memory_and_full_disks_are_said() -> None:
    found = list(doctor._machines([node(), node("bb", shm=64 << 20, free={"TMPDIR": 1 << 30})]))
    assert [finding.level for finding in found] == ["mend", "mend"]
    assert "bb (10.0.0.2) 64 MiB" in found[0].said
    assert "TMPDIR 1024 MiB" in found[1].said


def test_a_node_is_looked_at_without_reading_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "who")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-eight")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("base.storage.ATTEMPTS", 1)
    (tmp_path / "file").write_text("word")
    facts = look([str(tmp_path / "file"), str(tmp_path), str(tmp_path / "nothing"), "s3://bucket/file"], "127.0.0.1")
    assert list(facts.seen.values())[:3] == ["word", "a folder", "not there"]
    assert "cannot be used" in facts.seen["s3://bucket/file"]
    assert facts.credentials == "env"
    assert "a-secret-of-eight" not in str(facts)
    assert facts.versions["ray"] == "2.60.0"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_exit_codes_on_this_machine(tmp_path: Path) -> None:
    path = tiny_study.write(tmp_path, tiny_study.STUDY)
    sound = run(path)
    assert sound.returncode == (1 if "mend" in sound.stdout else 0), sound.stdout + sound.stderr
    assert "a study starts a cluster of its own" in sound.stdout
    large = run(path, "resources.gpus_per_pretrain_worker=1", "resources.pretrain_workers=32")
    assert large.returncode == 2, large.stdout + large.stderr
    assert "pretraining wants 32 workers of 1 CPU and 1 GPU" in large.stdout
    unknown = run("nothing-of-the-kind")
    assert unknown.returncode == 2
    assert "unknown study" in unknown.stderr


def test_no_cluster_and_no_mlflow_are_said_together(tmp_path: Path) -> None:
    path = tiny_study.write(tmp_path, tiny_study.STUDY, tracking="http://127.0.0.1:9")
    nothing = run(path, RAY_ADDRESS="127.0.0.1:9")
    assert nothing.returncode == 2
    assert "no Ray cluster at 127.0.0.1:9" in nothing.stdout
    assert "no MLflow server answers" in nothing.stdout
    assert "Traceback" not in nothing.stdout + nothing.stderr
    assert run("--address", "http://127.0.0.1:9").returncode == 2


def test_a_range_of_workers_is_checked(tmp_path: Path) -> None:
    assert Resources(pretrain_workers=4).pretrain_range == (4, 4)
    assert study(tmp_path, pretrain_workers=[1, 4]).resources.pretrain_range == (1, 4)
    with pytest.raises(RequestError, match="4 is more than 1"):
        study(tmp_path, pretrain_workers=[4, 1])
    with pytest.raises(RequestError, match="does not divide over 3 workers"):
        study(tmp_path, pretrain_workers=[1, 3])


class TestPatience:
    """The retry budget counts progress and not mere restarts."""

    @staticmethod
    def commit(folder: Path, step: int) -> None:
        place = folder / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "COMMIT").write_text(Commit(step=step, sha256={}, score=None, sound=True).model_dump_json(by_alias=True))

    def test_a_run_that_gets_further_may_die_for_ever_and_one_that_does_not_may_not(self, tmp_path: Path) -> None:
        from ray.train.v2._internal.execution.failure_handling import FailureDecision
        from ray.train.v2.api.exceptions import WorkerGroupError

        from cluster.trainer import MAX_FAILURES, Patience

        death = WorkerGroupError("killed", {0: RuntimeError("killed")})
        patience = Patience(str(tmp_path))
        for step in range(1, 20):
            self.commit(tmp_path, step)
            assert patience.make_decision(death) == FailureDecision.RETRY
        (tmp_path / "step-00000099").mkdir()  # cut off while it was saved: no progress
        decisions = [patience.make_decision(death) for _ in range(MAX_FAILURES)]
        assert decisions == [FailureDecision.RETRY] * (MAX_FAILURES - 1) + [FailureDecision.RAISE]

    def test_waiting_for_room_and_notices_cost_nothing_and_bugs_are_not_retried(self, tmp_path: Path) -> None:
        from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
        from ray.train.v2._internal.execution.failure_handling import FailureDecision
        from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

        from cluster.trainer import MAX_FAILURES, Final, Noticed, Patience

        patience = Patience(str(tmp_path))
        free = [ControllerError(WorkerGroupStartupTimeoutError(num_workers=3)), WorkerGroupError("", {1: Noticed("SIGTERM")})]
        for error in free * 10:
            assert patience.make_decision(error) == FailureDecision.RETRY
        assert patience.make_decision(ControllerError(ValueError("a bug"))) == FailureDecision.RAISE
        assert patience.make_decision(WorkerGroupError("", {1: Final("a batch that does not divide")})) == FailureDecision.RAISE
        failed = ControllerError(WorkerGroupStartupFailedError("no module named cluster"))
        decisions = [patience.make_decision(failed) for _ in range(MAX_FAILURES + 1)]
        assert decisions[-2:] == [FailureDecision.RETRY, FailureDecision.RAISE]

    @given(st.integers(1, 4096), st.integers(0, 600))
    def test_an_elastic_run_takes_divisors_of_its_batch(self, batch: int, room: int) -> None:
        from cluster.trainer import divisor

        count = divisor(batch, room)
        assert count == max((n for n in range(1, min(batch, room) + 1) if batch % n == 0), default=0)


@pytest.mark.ray
@pytest.mark.usefixtures("on_head")
def test_a_study_too_large_for_its_cluster_is_refused_before_anything_starts(tmp_path: Path) -> None:
    from cluster.run import run as run_study

    asked = load_study(tiny_study.write(tmp_path, tiny_study.STUDY, resources={"pretrain_workers": 32}))
    with pytest.raises((RequestError, WorkError), match="pretraining wants 32 workers of 1 CPU"):
        run_study(asked)
    assert not list((tmp_path / "out").iterdir())
