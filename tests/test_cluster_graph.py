"""Studies as graphs: what waits for what, what runs at once, what a failure takes with it, and that no more is held than there is."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from analysis import diary, results
from base import storage
from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster import leakage, pretraining, stages
from cluster.cells import Fanned, write_plan
from cluster.closing import closing
from cluster.events import Events
from cluster.graph import Graph, Node, Stopped
from cluster.load import load_study
from cluster.lock import DriverLock
from cluster.nodes import Making
from cluster.plan import Packed, settings
from cluster.progress import Progress
from cluster.ray_tasks import of_task
from cluster.run import Summary, _drive, _tried, remove_damaged, run
from cluster.searches import Searches
from cluster.standing import standing_corpora
from cluster.study import Champion, Study
from pretrain.run import PretrainConfig

FOUR = {"CPU": 4.0, "GPU": 0.0}


def graph(*nodes: Node, total: dict[str, float] | None = None) -> Graph:
    made = Graph(lambda: total or FOUR)
    for node in nodes:
        made.add(node)
    return made


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# -- the scheduler


def test_a_node_takes_what_those_before_it_made() -> None:
    made = graph(Node("a", lambda: 1), Node("b", lambda: 2))
    made.add(Node("sum", lambda: made.results["a"] + made.results["b"], needs=("a", "b")))
    made.run()
    assert made.results == {"a": 1, "b": 2, "sum": 3}


def test_storage_that_lets_a_node_down_fails_that_node_alone() -> None:
    made = graph(Node("a", fail(ConnectionResetError("the store hung up"))), Node("b", lambda: 1))
    made.run()
    assert made.results == {"b": 1}
    assert str(made.failed["a"]) == "ConnectionResetError: the store hung up"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayTaskError("pack", "traceback", WorkError("no usable image")), "no usable image"),
        (RayTaskError("pack", "traceback", OSError("no space left")), "OSError: no space left"),
        (RayTaskError("pack", "traceback", MemoryError()), "MemoryError"),
        (WorkerCrashedError(), "WorkerCrashedError: The worker died unexpectedly"),
        (OutOfMemoryError("killed\nand more"), "OutOfMemoryError: killed"),
        (NodeDiedError("the node died"), "NodeDiedError: the node died"),
    ],
)
def test_a_task_that_is_lost_fails_its_piece_of_work_and_not_the_study(error: RayError, said: str) -> None:
    found = of_task(error)
    assert isinstance(found, WorkError)
    assert str(found).startswith(said)


def test_a_task_that_finds_the_request_wrong_says_so() -> None:
    assert isinstance(of_task(RayTaskError("pack", "traceback", RequestError("no such card"))), RequestError)


def test_what_is_ready_runs_at_once() -> None:
    both = threading.Barrier(2, timeout=5)
    made = graph(*(Node(name, both.wait, holds={"CPU": 2}) for name in "ab"))
    made.run()
    assert not made.failed
    assert set(made.results) == {"a", "b"}


def test_what_does_not_fit_waits_and_what_is_smaller_goes_on() -> None:
    order: list[str] = []
    small = threading.Event()

    def act() -> None:
        order.append("small")
        small.set()

    made = graph(
        Node("first", lambda: small.wait(5), holds={"CPU": 3}),
        Node("large", lambda: order.append("large"), holds={"CPU": 2}),
        Node("small", act, holds={"CPU": 1}),
    )
    made.run()
    assert order == ["small", "large"]


def test_a_failure_takes_with_it_what_waits_for_it_and_nothing_else() -> None:
    made = graph(
        Node("a", fail(WorkError("the disk is full"))),
        Node("b", lambda: 1),
        Node("of a", lambda: 2, needs=("a",)),
        Node("of that", lambda: 3, needs=("of a", "b")),
        Node("of b", lambda: 4, needs=("b",)),
        Node("last", lambda: 5, after=("of that", "of b")),
    )
    made.run()
    assert made.results == {"b": 1, "of b": 4, "last": 5}
    assert {name: str(error) for name, error in made.failed.items()} == {"a": "the disk is full"}
    assert made.skipped == {"of a": "a", "of that": "a"}


@pytest.mark.parametrize("error", [RequestError("wrong"), KeyError("a bug")])
def test_a_wrong_request_ends_everything(error: Exception) -> None:
    ended: list[str] = []

    def work() -> None:
        while True:
            time.sleep(0.01)
            try:
                made.check()
            except Stopped:
                ended.append("work")
                raise

    made = graph(Node("work", work, shares=("CPU", "GPU")), Node("a", fail(error)), Node("b", lambda: ended.append("b"), needs=("a",)))
    with pytest.raises(type(error)):
        made.run()
    assert ended == ["work"]


def test_nodes_that_share_leave_room_for_those_that_wait() -> None:
    left: list[dict[str, float]] = []
    go = threading.Event()

    def share() -> None:
        for _ in range(2):
            left.append(made.left())
            go.set()
            until = time.monotonic() + 5
            while "first" not in made.results and time.monotonic() < until:
                time.sleep(0.01)
        left.append(made.left())
        last.set()

    last = threading.Event()
    made = graph(
        Node("share", share, shares=("CPU", "GPU")),
        Node("first", lambda: go.wait(5), holds={"CPU": 3}),
        Node("second", lambda: last.wait(5), holds={"CPU": 2}),
    )
    made.run()
    # While the first holds 3 of 4 the second waits for 2: nothing is left over. Then the second alone holds.
    assert left == [{"CPU": 0.0, "GPU": 0.0}, {"CPU": 2.0, "GPU": 0.0}, {"CPU": 2.0, "GPU": 0.0}]
    assert made.reserved() == {"CPU": 0.0, "GPU": 0.0}


def test_who_uses_no_gpu_leaves_all_of_them_to_others() -> None:
    left: list[dict[str, float]] = []
    both = threading.Barrier(2, timeout=5)

    def share() -> None:
        both.wait()
        left.append(made.left())
        both.wait()

    made = graph(Node("pack", share, shares=("CPU",)), Node("cells", share, shares=("CPU", "GPU")), total={"CPU": 4.0, "GPU": 1.0})
    made.run()
    assert not made.failed
    assert left == [{"CPU": 2.0, "GPU": 1.0}] * 2


@pytest.mark.parametrize("lost", [False, True])
def test_a_node_may_start_with_the_first_of_several(lost: bool) -> None:
    pool = threading.Event()
    made = graph(
        Node("early", fail(WorkError("lost")) if lost else lambda: 1),
        Node("late", fail(WorkError("lost")) if lost else lambda: pool.wait(5)),
    )
    made.add(Node("pool", pool.set, once=("early", "late")))
    made.run()
    assert "pool" in made.results
    assert made.results.get("late") == (None if lost else True)


def test_alone_a_node_may_ask_for_more_than_there_is() -> None:
    made = graph(Node("large", lambda: 1, holds={"GPU": 8}), Node("next", lambda: 2, holds={"CPU": 1}))
    made.run()
    assert made.results == {"large": 1, "next": 2}


def test_nodes_are_added_after_what_they_wait_for() -> None:
    with pytest.raises(ValueError, match="no such node: b"):
        graph(Node("a", lambda: 1, needs=("b",)))
    with pytest.raises(ValueError, match="added twice"):
        graph(Node("a", lambda: 1), Node("a", lambda: 1))


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[list[int], list[int], float, bool]]:
    """Of each node: what it needs and what it comes after, among those before it; what it holds of 4; whether it fails."""
    found = []
    for i in range(draw(st.integers(1, 10))):
        earlier = st.lists(st.integers(0, i - 1), max_size=3, unique=True) if i else st.just([])
        found.append((draw(earlier), draw(earlier), draw(st.sampled_from([0, 0.25, 1, 2, 3, 4])), draw(st.integers(0, 5)) == 0))
    return found


@given(plans())
def test_any_graph_runs_each_node_once_in_order_and_within_what_there_is(plan: list[tuple[list[int], list[int], float, bool]]) -> None:
    lock = threading.Lock()
    held, most = 0.0, 0.0
    begun: list[int] = []
    ended: list[int] = []

    def act(i: int) -> None:
        nonlocal held, most
        with lock:
            assert set(plan[i][0]) | set(plan[i][1]) - lost <= set(ended)
            begun.append(i)
            held += plan[i][2]
            most = max(most, held)
        time.sleep(0.001)
        with lock:
            held -= plan[i][2]
            ended.append(i)
        if plan[i][3]:
            raise WorkError("failed")

    lost: set[int] = set()  # by a failure before them
    for i, (needs, _, _, _) in enumerate(plan):
        if any(before in lost or plan[before][3] for before in needs):
            lost.add(i)
    made = Graph(lambda: FOUR)
    for i, (needs, after, cpus, _) in enumerate(plan):
        holds = {"CPU": cpus} if cpus else {}
        made.add(Node(str(i), partial(act, i), tuple(map(str, needs)), tuple(map(str, after)), holds=holds))
    made.run()
    assert sorted(begun) == [i for i in range(len(plan)) if i not in lost]
    assert set(made.failed) == {str(i) for i, one in enumerate(plan) if one[3] and i not in lost}
    assert set(made.skipped) == {str(i) for i in lost}
    assert set(made.results) | set(made.failed) | set(made.skipped) == set(map(str, range(len(plan))))
    assert most <= 4 + 1e-6


# -- a study


def making(study: Study, *nodes: Node) -> Making:
    """Of a study, with these nodes in place of its own."""
    found = Making(study, "", Progress(), Events(study.out))
    found.graph = graph(*nodes)
    return found


def keys(out: str) -> list[str]:
    return [row["key"] for row in storage.read_json(f"{out}/plan.json")]


@pytest.fixture
def packed(tmp_path: Path, phantom_chest: str) -> Study:
    """One in which nothing is to be packed or pretrained."""
    cells = {**tiny_study.SMALLER["cells"], "sources": ["random"], "architectures": ["test_resnet"], "seeds": [0, 1]}
    data = {"phantom-chest": {"shards": phantom_chest}}
    return load_study(tiny_study.write(tmp_path, {**tiny_study.SMALLER, "pretrain": [], "champion": None}, data=data, cells=cells))


def known(study: Study) -> Searches:
    """Its cells, once its data stand."""
    return Searches(settings(study, standing_corpora(study), {}))


def test_a_driver_that_lost_its_lock_leaves_the_plan_of_the_other(packed: Study) -> None:
    other = [{"key": "of the other"}]
    found = making(packed, Node("work", lambda: storage.put(f"{packed.out}/plan.json", json.dumps(other))))
    found.lost = lambda: True
    found.run()
    assert storage.read_json(f"{packed.out}/plan.json") == other
    assert not storage.exists(f"{packed.out}/leakage.json")


def test_a_report_knows_what_is_asked_for_while_the_study_goes_on(packed: Study) -> None:
    found: list[list[str]] = []
    making(packed, Node("look", lambda: found.append(keys(packed.out)))).run()
    assert found == [["", ""]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("a finding")])
def test_an_early_end_takes_no_keys_from_the_plan(packed: Study, error: BaseException) -> None:
    write_plan(packed.out, known(packed))
    before = storage.read_json(f"{packed.out}/plan.json")
    assert all(row["key"] for row in before)
    with pytest.raises(type(error)):
        making(packed, Node("early", fail(error))).run()
    assert storage.read_json(f"{packed.out}/plan.json") == before
    making(packed).run()  # to its end, in which no cell has come to be known: then the keys of earlier data hold no more
    assert keys(packed.out) == ["", ""]


def test_without_a_cluster_nothing_is_written(packed: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    before = {path.name for path in Path(packed.out).rglob("*") if path.is_file()} if Path(packed.out).exists() else set()
    with pytest.raises(RequestError, match="no Ray cluster"):
        run(packed, Progress())
    assert {path.name for path in Path(packed.out).rglob("*") if path.is_file()} == before


def test_a_study_that_ends_early_ends_its_view_and_its_lines(packed: Study, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.mlflow_store import connect

    progress, uri = Progress(), f"sqlite:///{packed.out}/mlflow.db"

    def runs() -> list[Any]:
        client = connect(uri)
        return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))

    def work(events: Events, lock: DriverLock) -> dict[str, Any]:
        progress.say("begun")
        deadline = time.monotonic() + 60
        while not (Path(packed.out, "mlflow.db").exists() and runs()) and time.monotonic() < deadline:
            time.sleep(0.2)
        raise RequestError("no more")

    with pytest.raises(RequestError, match="no more"):
        _drive(packed, uri, progress, work, cluster=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "mlflow-projection"]
    (parent,) = runs()
    assert parent.info.status == "FAILED"
    assert "begun" in capsys.readouterr().out
    progress.say("a thread of the study goes on")
    progress.line("and on", of="it")
    progress.gone("it")
    assert capsys.readouterr().out == ""


def test_only_cells_and_pretrainings_of_a_gpu_study_use_gpus(packed: Study) -> None:
    nodes = Making(packed, "", Progress(), Events(packed.out)).graph._nodes.values()
    assert {node.name for node in nodes if "GPU" in node.shares} == {"cells"}
    assert {node.name for node in nodes if node.shares == ("CPU",)} == {"pack phantom-chest", "leakage phantom-chest train"}


def test_what_a_lost_dataset_takes_with_it_is_said_once_for_each_result(tmp_path: Path) -> None:
    study = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER))
    found = Making(study, "", Progress(), Events(study.out))
    nodes = [replace(node, act=lambda: Fanned()) for node in found.graph._nodes.values()]
    found.graph = graph(replace(nodes[0], act=fail(WorkError("no usable image"))), *nodes[1:])
    found.run()
    assert found.failed() == {
        "pack phantom-chest": "no usable image",
        "pretrain simclr": "not tried: pack phantom-chest failed",
        "cells of phantom-chest random": "not tried: pack phantom-chest failed",
        "cells of phantom-chest simclr": "not tried: pack phantom-chest failed",
    }


def test_a_pretraining_that_failed_is_no_failed_cell(packed: Study, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"pretrain simclr": "not finite", "phantom-chest random linear seed 0 (0123)": "no memory"}
    counts = {"cells_kept": 0, "cells_new": 3, "cells_failed": 1, "restarts": 0, "deaths": 0}
    closing(packed, Summary(**counts, failed=failed, versions={}, champion=None, report="index.html", answer=""))
    assert "cells     0 kept, 3 new, 1 failed" in capsys.readouterr().out


def test_does_not_repeat_a_champion_of_a_study_without_pretrainings_that_nobody_mentions(
    packed: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"cells_kept": 1, "cells_new": 0, "cells_failed": 0, "restarts": 0, "deaths": 0}
    ended = Summary(**counts, failed={}, versions={}, champion=None, report="index.html", answer="")
    for champion, said in ((None, 0), (Champion(task="phantom-chest"), 1)):
        closing(packed.model_copy(update={"pretrain": [], "champion": champion}), ended)
        assert capsys.readouterr().out.count("champion  none: only pretrainings of the study are registered") == said


def test_whatever_the_registry_raises_the_report_is_written_first(packed: Study) -> None:
    trouble = _tried(fail(KeyError("no such run")), packed.out, "http://mlflow:5000")
    assert str(trouble).startswith("http://mlflow:5000: MLflow could not be written: KeyError: 'no such run'")


def test_a_comparison_ends_with_its_graph_and_asks_no_cluster(packed: Study) -> None:
    with pytest.raises(Stopped):
        leakage.compare_one(
            packed,
            standing_corpora(packed),
            ("phantom-chest", "train"),
            lambda test: pytest.fail("a cluster was asked"),
            Progress(),
            Events(packed.out),
            look=fail(Stopped()),
        )


def test_a_thread_that_outlives_the_session_starts_no_cluster_of_its_own() -> None:
    code = "import cluster, ray\ntry: ray.put(1)\nexcept Exception as error: print(type(error).__name__)\nprint(ray.is_initialized())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.splitlines()[-1] == "False"


def test_test_images_are_made_ready_once_for_all_who_ask_at_once(packed: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def slow(corpus: Packed) -> str:
        asked.append(corpus.url)
        time.sleep(0.1)
        return "reference"

    monkeypatch.setattr(leakage, "prepared", slow)
    found = making(packed)
    found.graph.results = {f"pack {name}": corpus for name, corpus in standing_corpora(packed).items()}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found._tests, ["phantom-chest"] * 4)) == ["reference"] * 4
    assert len(asked) == 1


def test_what_is_filled_in_replaces_the_keys_of_an_earlier_driver(packed: Study) -> None:
    now = known(packed)
    write_plan(packed.out, now)
    rows = storage.read_json(f"{packed.out}/plan.json")
    storage.put(f"{packed.out}/plan.json", json.dumps([{**row, "key": "earlier"} for row in rows]))
    write_plan(packed.out, now, ended=False)
    assert storage.read_json(f"{packed.out}/plan.json") == rows


def test_cells_without_a_key_are_no_plan_to_read_by(packed: Study) -> None:
    assert results.planned(packed.out) == set()  # a study without plan.json
    write_plan(packed.out, Searches(settings(packed, {}, {})))
    assert results.planned(packed.out) == set()
    write_plan(packed.out, known(packed))
    assert results.planned(packed.out)


def test_a_pretraining_that_fails_is_in_the_diary_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others go on: neither the report nor MLflow waits for the end of the study."""
    made = yaml.safe_load((Path(__file__).parent / "golden" / "pretrain.yaml").read_text())
    config = parse(made | {"out": f"{tmp_path}/out/pretrain/simclr-{made['key']}"}, PretrainConfig, "test")
    study = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER)).model_copy(update={"out": f"{tmp_path}/out"})

    def fail(config: PretrainConfig, resources: object) -> None:
        raise WorkError("the loss is not finite at step 4", where="pretrain simclr")

    monkeypatch.setattr(pretraining, "pretrain_on_ray", fail)
    with pytest.raises(WorkError):
        stages.pretrain(study, config, "pretrain simclr", Progress(), Events(study.out))
    assert diary.endings(study.out) == {made["key"]: ("FAILED", "the loss is not finite at step 4")}


def test_a_result_that_was_cut_in_half_is_removed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("whole", "{}"), ("half", '{"key": ')):
        storage.put(f"{tmp_path}/cells/{name}/result.json", text)
    remove_damaged(str(tmp_path), Progress())
    assert storage.holding(f"{tmp_path}/cells", "result.json") == ["whole"]
    assert f"{tmp_path}/cells/half/result.json was damaged and is removed: computed again" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("on_head")
def test_a_pretraining_that_fails_loses_nobody_elses_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.run import require_done

    broken = {**tiny_study.SIMCLR, "name": "broken", "settings": {"optimizer.lr": 1e30}}
    chain = {**tiny_study.CHAIN, "name": "chain", "start_from": "pretrain:broken"}
    sources = ["random", "pretrain:simclr", "pretrain:broken", "pretrain:chain"]
    cells = {**tiny_study.SMALLER["cells"], "sources": sources}
    study = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER, pretrain=[broken, chain, tiny_study.SIMCLR], cells=cells))
    summary = run(study)
    assert summary.cells_new == 2
    assert "not finite" in summary.failed["pretrain broken"]
    assert summary.failed["pretrain chain"] == "not tried: pretrain broken failed"
    assert {name for name in summary.failed if name.startswith("cells")} == {
        f"cells of phantom-chest {name}" for name in ("broken", "chain")
    }
    with pytest.raises(WorkError, match=r"1 piece of work failed, 3 not tried:\n  pretrain broken: .*not finite") as raised:
        require_done(summary)
    assert "pretrain broken: pretrain broken" not in str(raised.value)
    rows = storage.read_json(f"{study.out}/plan.json")
    assert [(row["source"], bool(row["key"])) for row in rows] == [("random", True), ("simclr", True), ("broken", False), ("chain", False)]
    events = [json.loads(line) for line in storage.read_bytes(f"{study.out}/events.jsonl").splitlines()]
    assert [event["name"] for event in events if event["event"] == "pretrained"] == ["simclr"]

    # The file is put right: what stood is kept, and said first.
    capsys.readouterr()
    mended = load_study(tiny_study.write(tmp_path, tiny_study.SMALLER, cells={**cells, "sources": sources[:2]}))
    again = run(mended)
    assert (again.cells_kept, again.cells_new, again.failed) == (2, 0, {})
    said = capsys.readouterr().out
    assert "the study file has changed: " in said
    assert "pretrainings: 1 kept" in said
    assert "cells: 2 kept" in said
