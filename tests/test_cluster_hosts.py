"""Three hosts on one machine, each a network namespace with its own address and name: Ray meets on them, the doctor knows them apart, and a
study over them ends complete though one loses its network and another its power. The same at length: benchmarks/hosts.py.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_study
from namespaces import Hosts, hosts, why_not
from three_hosts import disturbed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

STEPS = 200  # that not all are made before the cable is pulled
ALIVE = """
import json, os, ray
os.environ.setdefault("RAY_AUTH_MODE", "token")
ray.init(address="auto", log_to_driver=False)
print("ALIVE " + json.dumps(sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])))
"""
# What a head that was started with another Ray and another Python says of itself.
OTHERS = """
import json, os, ray
os.environ.setdefault("RAY_AUTH_MODE", "token")
ray.init(address="auto", log_to_driver=False)
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY as key
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
said = json.loads(_internal_kv_get(key, namespace=b"cluster")) | {"ray_version": "2.41.0", "python_version": "3.10.4"}
_internal_kv_put(key, json.dumps(said).encode(), overwrite=True, namespace=b"cluster")
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    private = folder / "private"
    private.mkdir()
    with hosts(folder, 3, private={2: str(private)}) as found:
        yield found


def study(three: Hosts, **changes: object) -> str:
    folder = three.folder / f"study-{time.time_ns()}"
    folder.mkdir()
    return tiny_study.write(folder, tiny_study.STUDY, resources={"pretrain_workers": 2}, **changes)


def alive(three: Hosts) -> list[str]:
    said = three.run(0, [sys.executable, "-c", ALIVE]).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("ALIVE ")]
    return list(json.loads(line.removeprefix("ALIVE ")))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_ends_complete_though_one_host_is_cut_off_and_another_killed(tmp_path: Path) -> None:
    """Comes first: the other tests' hosts are up until the last of them has ended."""
    ended = disturbed(tmp_path, steps=STEPS, every=20, cells=4, killed_after=1)
    assert (ended.code, ended.stand, ended.computed) == (0, 4, 4)
    assert [workers for _, workers in ended.resumes] == [2]
    assert 0 < ended.resumes[0][0] <= ended.logged < STEPS


def test_the_doctor_sees_three_hosts_and_storage_that_they_share(three: Hosts) -> None:
    done = three.run(0, [sys.executable, "-m", "cluster", "doctor", study(three)])
    assert done.returncode in (0, 1), done.stdout  # 1: this machine's disk or shared memory may be small
    assert "refused" not in done.stdout
    for host in range(3):
        assert f"host-{host} ({three.address(host)})" in done.stdout
    assert "is seen by every node" in done.stdout


def test_an_out_that_one_host_does_not_share_is_refused_before_anything_starts(three: Hosts) -> None:
    out = f"{three.private[2]}/out"
    path = study(three)
    done = three.run(0, [sys.executable, "-m", "cluster", "run", path, f"out={out}"])
    assert done.returncode == 2, done.stdout
    assert f"{out} is not shared: not seen by host-2 ({three.address(2)}) (not there)" in done.stdout
    assert "out=s3://BUCKET/..." in done.stdout
    assert not Path(out, "pretrain").exists()
    assert not Path(out, "shards").exists()


def test_a_host_whose_cable_is_cut_is_given_up(three: Hosts) -> None:
    assert alive(three) == ["host-0", "host-1", "host-2"]
    three.cut(1)
    began = time.monotonic()
    while (left := alive(three)) == ["host-0", "host-1", "host-2"]:
        assert time.monotonic() - began < 60
    assert left == ["host-0", "host-2"]


def test_a_cluster_of_another_version_is_refused(three: Hosts) -> None:
    told = three.run(0, [sys.executable, "-c", OTHERS])
    assert told.returncode == 0, told.stdout
    path = study(three)
    for command in ("doctor", "run"):
        done = three.run(0, [sys.executable, "-m", "cluster", command, path])
        assert done.returncode == 2, done.stdout
        assert "the cluster has Ray 2.41.0 and Python 3.10.4, this command Ray 2.60.0 and Python 3.11" in done.stdout
        assert "Traceback" not in done.stdout
