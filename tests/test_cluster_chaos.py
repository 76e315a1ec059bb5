"""A study whose newest checkpoint is cut off under a killed trainer and whose driver dies among its cells: nothing lost, nothing twice.

`benchmarks/chaos.py` draws such faults, and others, for as many seeds as one likes.
"""

import signal

import pytest
from faults import KINDS, Cluster, Fault, draw
from services import Services
from shared import TREE, Studied

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.mark.long
def test_a_disturbed_study_ends_as_the_undisturbed_one(as_user: Services, studied: Studied) -> None:
    cluster = Cluster(as_user)
    calm = cluster.look("tiny", [studied.ended.returncode])
    told = cluster.run(TREE, "disturbed", [Fault("truncated checkpoint", 0.2), Fault("driver", 0.6)])
    assert told.missed == []
    assert calm.differences(calm) == []
    assert told.differences(calm) == []
    assert told.codes == [-signal.SIGKILL, 0]
    assert len(told.written) == 6
    assert "restart(s) of its workers" in (as_user.folder / "disturbed" / "driver.log").read_text()


def test_faults_are_drawn_from_their_seed() -> None:
    drawn = [draw(seed) for seed in range(40)]
    assert drawn == [draw(seed) for seed in range(40)]
    assert {fault.kind for faults in drawn for fault in faults} == set(KINDS)
    assert all(len({fault.kind for fault in faults}) == len(faults) for faults in drawn)
