"""What tracked runs say, and refusing a wrong tracking address: no server and no cluster needed."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from analysis.results import as_asked
from base import storage
from base.config import parse
from base.errors import RequestError, WorkError
from cluster import facts, observe, pages, projector
from cluster.mlflow_store import require_server
from cluster.projection import Projection
from cluster.registry import champion_score
from cluster.study import Study


def result(source: str, task: str = "t", seed: int = 0, value: float = 0.5, **changes: Any) -> dict[str, Any]:
    rows = [
        {"split": split, "class": label, "metric": metric, "unit": "fraction", "value": value, "n": 10}
        for split in ("val", "test")
        for label, metric in (("", "auroc_mean"), ("", "auprc_mean"), ("nodule", "auroc"))
    ]
    base = {"task": task, "strategy": "linear", "options": {}, "fraction": 1.0, "source": source, "seed": seed, "metrics": rows}
    base |= {"architecture": "resnet18", "resolution": 64}
    return {**base, "selection": {"metric": "auroc_mean", "epoch": 3}, "own_source": False, **changes}


def test_an_encoder_is_told_what_its_cells_reached_and_by_how_much_more_than_random() -> None:
    mine = [result("a", seed=0, value=0.7), result("a", seed=1, value=0.9)]
    other = [result("random", seed=0, value=0.5), result("random", seed=1, value=0.6)]
    told = facts.downstream(mine, mine + other, "random")
    assert told["t/linear/64 px/test_auroc_mean"] == pytest.approx(0.8)
    assert told["t/linear/64 px/test_auroc_mean_over_random"] == pytest.approx(0.25)
    assert told["t/linear/64 px/tested_cells"] == 2
    assert not any("auprc" in name or "nodule" in name for name in told)


@pytest.mark.parametrize("other", [{"architecture": "cbr_tiny"}, {"fraction": 0.1}, {"resolution": 224}, {"options": {"k": 5}}])
def test_random_weights_of_another_setting_are_no_baseline(other: dict[str, Any]) -> None:
    mine, like = [result("a", value=0.78)], result("random-a", value=0.70)
    unlike = result("random-a", value=0.90, **other)
    told = facts.downstream(mine, [*mine, like, unlike], "random-a")
    assert told["t/linear/64 px/test_auroc_mean_over_random"] == pytest.approx(0.08)
    assert not any("over_random" in name for name in facts.downstream(mine, [*mine, unlike], "random-a"))


def test_cuts_and_resolutions_of_one_encoder_are_not_averaged() -> None:
    mine = [
        result("a", value=value, strategy="truncated", options={"cut": cut, "head": "pooled"}, resolution=side)
        for cut, side, value in (("layer1", 64, 0.6), ("layer3", 64, 0.8), ("layer3", 224, 0.9))
    ]
    told = {name: value for name, value in facts.downstream(mine, mine, None).items() if name.endswith("test_auroc_mean")}
    assert told == {
        "t/truncated cut layer1 head pooled/64 px/test_auroc_mean": pytest.approx(0.6),
        "t/truncated cut layer3 head pooled/64 px/test_auroc_mean": pytest.approx(0.8),
        "t/truncated cut layer3 head pooled/224 px/test_auroc_mean": pytest.approx(0.9),
    }


def test_what_must_not_count_for_an_encoder_does_not() -> None:
    whole = result("a", value=0.7)
    others = [result("a", value=0.1, fraction=0.1), result("a", value=0.1, own_source=True), result("a", value=0.1, shuffle_labels=True)]
    assert facts.downstream([whole, *others], [whole, *others], None) == facts.downstream([whole], [whole], None)


def test_exposed_cells_count_where_the_study_ranks_them() -> None:
    plain, seen = result("a", seed=0, value=0.6), result("a", seed=1, value=0.8, exposed_to=["nih-cxr14"])
    assert facts.downstream([plain, seen], [plain, seen], None)["t/linear/64 px/test_auroc_mean"] == pytest.approx(0.6)
    assert facts.downstream([plain, seen], [plain, seen], None, "ranked")["t/linear/64 px/test_auroc_mean"] == pytest.approx(0.7)


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    rows = [{"split": "test", "class": "", "metric": "auroc_mean", "unit": "fraction", "value": None, "n": 0}]
    assert facts.headline(result("a", metrics=rows)) == {}
    assert facts.curves({"epoch": 1, "train_loss": float("nan"), "val_loss": 0.5, "event": "health"}) == {"training/val_loss": 0.5}


def test_what_a_search_ran_is_named_apart_from_cells() -> None:
    config = {"task": {"task": "t"}, "source": "a", "strategy": {"name": "full"}, "fraction": 1, "seed": 0}
    for role, kind, name in (("cell", "cell", "t"), ("trial", "trial", "trial of t"), ("similarity", "similarity", "similarity of t")):
        assert facts.kind("cells", config | {"role": role}) == kind
        assert facts.name("cells", config | {"role": role}) == f"{name} a full seed 0"


def test_pages_link_to_both_tables_and_choose_their_columns() -> None:
    note = pages.note("a beats b", "7", ["run2", "run1"])
    assert note.startswith("a beats b\n\n")
    assert "#/experiments/7/runs?viewStateShareKey=cells" in note
    tags = pages.views(["t/linear/test_dice"], ["test_dice"])
    assert json.loads(tags["mlflow.sharedViewState.cells"])["selectedColumns"][-1] == "metrics.`test_dice`"
    assert all(len(value) < 5000 for value in tags.values())


@pytest.fixture
def answering() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """A server that answers whatever the list holds."""
    answers: list[tuple[int, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[-1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (200, b"<html>", "is no MLflow server"),
        (403, b"", "allowed-hosts"),
        (404, b"", "status 404"),
        (200, b"{}", None),
        (401, b"", "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_what_answers_must_be_an_mlflow_server(
    answering: tuple[str, list[tuple[int, bytes]]], status: int, body: bytes, match: str | None
) -> None:
    address, answers = answering
    answers.append((status, body))
    if match is None:
        require_server(address)
    else:
        with pytest.raises(RequestError, match=match):
            require_server(address)


def test_a_closed_port_is_refused() -> None:
    with pytest.raises(RequestError, match="no MLflow server answers"):
        require_server("http://127.0.0.1:9")


def test_a_store_of_ones_own_needs_no_server() -> None:
    require_server("sqlite:////nowhere/mlflow.db")


def test_controls_own_sources_and_other_strategies_do_not_move_the_champion() -> None:
    study = parse(
        {
            "study": "s",
            "out": "/nowhere",
            "data": {"phantom-chest": {"raw": "phantom:60"}},
            "champion": {"task": "t", "metric": "auroc_mean"},
        },
        Study,
        "study",
    )
    shared: dict[str, Any] = {"encoder_sha256": "e", "role": "cell", "options": {}, "resolution": 32}
    cells = [result("a", seed=0, value=0.8, **shared), result("a", seed=1, value=0.6, **shared)]
    assert champion_score(study, "e", cells) == pytest.approx(0.7)
    others = [
        result("a", value=0.1, **{**shared, "strategy": "full"}),
        result("a", value=0.99, **shared, shuffle_labels=True),
        result("a", value=0.99, **{**shared, "own_source": True}),
        result("a", value=0.99, **{**shared, "encoder_sha256": "other"}),
    ]
    assert champion_score(study, "e", cells + others) == pytest.approx(0.7)
    assert champion_score(study, "e", others[1:]) is None
    diverged = result("a", seed=2, **shared)
    diverged["metrics"] = [{**row, "value": None} for row in diverged["metrics"]]
    assert champion_score(study, "e", [*cells, others[0], diverged]) == pytest.approx(0.1)  # two seeds of three are no mean


# -- the projection of a folder into a store


GOLDEN = Path(__file__).parent / "golden"
NODE = [{"time": 1e9 + i, "cpu_utilization_percentage": 10.0 * i} for i in range(3)]


def finished_out(folder: Path, cells: int) -> Path:
    """A study's folder with one finished pretraining, one that runs, finished cells of the former and one that was cut off."""
    out = folder / "out"
    cell, held = yaml.safe_load((GOLDEN / "cell.yaml").read_text()), json.loads((GOLDEN / "cell_result.json").read_text())
    made, result = yaml.safe_load((GOLDEN / "pretrain.yaml").read_text()), json.loads((GOLDEN / "pretrain_result.json").read_text())
    rows = "".join(json.dumps({"epoch": i, "train_loss": 0.5, "val_loss": 1 / (1 + i), "seconds": 1.0}) + "\n" for i in range(3))
    for name, done in (("simclr-00000000000000aa", True), ("simclr-00000000000000bb", False)):
        put(
            out / "pretrain" / name,
            {"config.yaml": yaml.safe_dump(made), "metrics.jsonl": '{"step": 1, "loss": 2.0, "seconds": 1.0}\n{"step"'},
        )
        put(out / "pretrain" / name, {"result.json": json.dumps(result), "export/config.json": "{}"} if done else {})
    for i in range(cells):
        files = {"config.yaml": yaml.safe_dump({**cell, "key": f"{i:016x}", "seed": i}), "metrics.jsonl": rows}
        files["result.json"] = json.dumps({**held, "key": f"{i:016x}", "seed": i, "encoder_sha256": result["encoder_sha256"]})
        put(out / "cells" / f"{i:016x}", files)
    put(out / "cells" / "cut", {"config.yaml": yaml.safe_dump(cell), "metrics.jsonl": rows})
    put(
        out / "nodes",
        {"host-1.jsonl": "".join(json.dumps(row) + "\n" for row in NODE), "ray.json": '{"dashboard": "http://127.0.0.1:8265"}'},
    )
    return out


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_projection_holds_what_stands_once_and_may_be_repeated(tmp_path: Path) -> None:
    """Runs, their curves and values, datasets, files, durations; the nodes' load and Ray's address on the study's run."""
    out = finished_out(tmp_path, 3)
    uri = f"sqlite:///{out}/mlflow.db"
    first = Projection(str(out), "tiny", uri)
    first.update()
    first.update()
    (out / "nodes" / "host-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*NODE, {**NODE[0], "time": 1e9 + 9}]))
    again = Projection(str(out), "tiny", uri)
    again.update()
    assert again.runs == first.runs
    assert again.finished == {"00000000000000aa", *(f"{i:016x}" for i in range(3))}
    runs = {run.data.tags["allograft.key"]: run for run in again.client.search_runs([again.experiment])}
    assert set(runs) == {"study:tiny", "00000000000000aa", "00000000000000bb", *(f"{i:016x}" for i in range(3))}
    cell, made = runs[f"{1:016x}"], runs["00000000000000aa"]
    assert (cell.info.status, made.info.status, runs["00000000000000bb"].info.status) == ("FINISHED", "FINISHED", "RUNNING")
    held = json.loads((out / "cells" / f"{1:016x}" / "result.json").read_text())
    assert cell.info.end_time - cell.info.start_time == int(held["seconds"] * 1000)
    assert cell.data.params["seed"] == "1"
    assert cell.data.tags["allograft.encoder_run"] == made.info.run_id
    assert cell.data.tags["allograft.kind"] == "cell"
    assert cell.inputs.dataset_inputs[0].dataset.name == held["dataset"]
    assert cell.data.metrics["seconds"] == held["seconds"]
    curve = again.client.get_metric_history(cell.info.run_id, "training/val_loss")
    assert [(point.step, point.value) for point in curve] == [(i, pytest.approx(1 / (1 + i))) for i in range(3)]
    assert {file.path for file in again.client.list_artifacts(cell.info.run_id)} == {"config.yaml", "result.json"}
    assert [file.path for file in again.client.list_artifacts(made.info.run_id, "encoder")] == ["encoder/config.json"]
    parent = runs["study:tiny"]
    assert "http://127.0.0.1:8265" in parent.data.tags["allograft.ray_dashboard"]
    load = again.client.get_metric_history(parent.info.run_id, "system/host-1/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in load] == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 0.0)]


BEGUN: list[dict[str, Any]] = [{"event": "start"}, {"event": "pretraining", "key": "00000000000000bb"}]
BROKE = {"event": "pretraining failed", "key": "00000000000000bb", "reason": "the loss is not finite at step 4"}


def write_diary(out: Path, *events: dict[str, Any]) -> None:
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def runs_of(out: Path) -> dict[str, Any]:
    """Of a replay, by key."""
    view = Projection(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    view.update()
    return by_key(view)


def by_key(view: Projection) -> dict[str, Any]:
    return {run.data.tags["allograft.key"]: run for run in view.client.search_runs([view.experiment])}


def test_runs_that_ended_early_say_how_and_why_and_go_on(tmp_path: Path) -> None:
    """A pretraining that fails, is begun again and finishes; a cell that failed; each seen by a replay that knows storage alone."""
    out = finished_out(tmp_path, 0)
    write_diary(out, *BEGUN)
    running = runs_of(out)["00000000000000bb"]
    assert (running.info.status, running.data.params["method"], running.data.params["recipe.optimizer.lr"]) == (
        "RUNNING",
        "simclr",
        "0.001",
    )
    assert running.data.params["data"] == "nih-cxr14 train"
    made = yaml.safe_load((GOLDEN / "cell.yaml").read_text())
    ended = [*BEGUN, BROKE, {"event": "cell failed", "key": "cut", "reason": "out of memory"}, {"event": "end", "failed": {"x": "y"}}]
    write_diary(out, *ended)
    runs = runs_of(out)
    failed, cut = runs["00000000000000bb"], runs["cut"]
    assert (failed.info.status, failed.data.tags["allograft.reason"]) == ("FAILED", BROKE["reason"])
    assert failed.info.end_time - failed.info.start_time == 1000  # of training, by its last row
    assert (cut.info.status, cut.data.tags["allograft.reason"], cut.data.params["task"]) == (
        "FAILED",
        "out of memory",
        made["task"]["task"],
    )
    write_diary(out, *ended, *BEGUN)
    again = runs_of(out)["00000000000000bb"]
    assert (again.info.status, again.data.tags["allograft.reason"]) == ("RUNNING", "")
    put(out / "pretrain" / "simclr-00000000000000bb", {"result.json": (GOLDEN / "pretrain_result.json").read_text()})
    write_diary(out, *ended, *BEGUN, {"event": "pretrained", "key": "00000000000000bb"}, {"event": "end", "failed": {}})
    assert runs_of(out)["00000000000000bb"].info.status == "FINISHED"


def test_a_study_that_is_interrupted_takes_its_pretrainings_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished_out(tmp_path, 0)
    write_diary(out, *BEGUN)
    monkeypatch.setattr(observe, "look", lambda url: None)
    view = projector.Projector(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    assert until(lambda: view._projection is not None and "00000000000000bb" in view._projection.rows)
    stopped = [*BEGUN, {"event": "stop", "error": "KeyboardInterrupt: "}]
    write_diary(out, *stopped)
    view.stop("KILLED")
    assert view._projection is not None
    live = by_key(view._projection)
    replayed = Projection(str(out), "tiny", f"sqlite:///{out}/replayed.db")
    replayed.update()
    replayed.close(ok=True)
    found = by_key(replayed)
    for runs in (live, found):
        assert {key: run.info.status for key, run in runs.items()} == {
            "study:tiny": "KILLED",
            "00000000000000aa": "FINISHED",
            "00000000000000bb": "KILLED",
        }
        assert runs["00000000000000bb"].data.tags["allograft.reason"] == "KeyboardInterrupt"
    write_diary(out, *stopped, *BEGUN)
    assert {run.info.status for key, run in runs_of(out).items() if key != "00000000000000aa"} == {"RUNNING"}


def test_a_result_that_was_cut_in_half_hides_no_other(tmp_path: Path) -> None:
    out = finished_out(tmp_path, 2)
    whole = out / "cells" / f"{0:016x}" / "result.json"
    half = whole.read_text()[:40]
    (out / "cells" / f"{1:016x}" / "result.json").write_text(half)
    view = Projection(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    view.update()
    assert view.finished == {"00000000000000aa", f"{0:016x}"}
    whole.write_text(half)
    again = Projection(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    assert again.cells() == {}


def test_cells_whose_cuts_a_search_chose_are_one_setting(tmp_path: Path) -> None:
    """Each seed may have got another cut: the study's own means, and the champion by them, are over all of them."""
    out = finished_out(tmp_path, 2)
    keys = [f"{i:016x}" for i in range(2)]
    for key, cut in zip(keys, ("layer1", "layer3"), strict=True):
        file = out / "cells" / key / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"strategy": "truncated", "options": {"cut": cut, "head": "pooled"}}))
    put(out, {"plan.json": json.dumps([{"key": key, "asked": {"cut": "auto"}} for key in keys])})
    view = Projection(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    view.update()
    assert [held["options"] for held in view.cells().values()] == [{"cut": "auto", "head": "pooled"}] * 2
    view.close(ok=True)
    (run,) = [run for run in view.client.search_runs([view.experiment]) if run.info.run_id in view.encoders.values()]
    (cells,) = [value for name, value in run.data.metrics.items() if name.endswith("tested_cells")]
    assert cells == 2


def test_names_of_long_options_fit_into_mlflow(tmp_path: Path) -> None:
    """A similarity for every cut of a ResNet-50 stands in the options: of it there is a digest, and a name has 250 letters at most."""
    cuts = {f"layer{i}.{j}": 0.123456789 for i in range(1, 5) for j in range(6)}
    put(tmp_path, {"plan.json": json.dumps([{"key": "a", "asked": {"cut": "auto", "search": "halving", "similarity": cuts}}])})
    (held,) = as_asked(str(tmp_path), {"a": result("a", strategy="truncated", options={"cut": "stem"})}).values()
    assert set(held["options"]) == {"cut", "search", "similarity"}
    assert len(held["options"]["similarity"]) == len("given 012345")
    long = [result("a", value=value, options={"note": 300 * letter}) for letter, value in (("x", 0.2), ("y", 0.8))]
    told = facts.downstream(long, long, None)
    assert sorted(value for value in told.values() if value < 1) == pytest.approx([0.2, 0.2, 0.8, 0.8])  # on validation and on test
    assert max(map(len, told)) <= 250


def test_a_run_whose_answer_was_lost_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    out = finished_out(tmp_path, 1)
    view = Projection(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    make = MlflowClient.create_run

    def lost(*given: Any, **more: Any) -> None:
        make(*given, **more)
        raise MlflowException("the server took too long")

    monkeypatch.setattr(MlflowClient, "create_run", lost)
    with pytest.raises(MlflowException):
        view.update()
    monkeypatch.setattr(MlflowClient, "create_run", make)
    view.update()
    keys = [run.data.tags["allograft.key"] for run in view.client.search_runs([view.experiment])]
    assert sorted(keys) == sorted({"study:tiny", "00000000000000aa", "00000000000000bb", f"{0:016x}"})


def until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_the_live_view_outlives_what_it_cannot_read_and_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a configuration, and nodes whose load Ray does not tell: later rounds make up for it, the last one names what is wrong."""
    out, looks = finished_out(tmp_path, 1), []

    def look(url: str) -> None:
        looks.append(url)
        raise RuntimeError("Ray has ended")

    monkeypatch.setattr(observe, "look", look)
    monkeypatch.setattr(projector, "PERIOD_S", 0.05)
    monkeypatch.setattr(projector, "LOOK_S", 0.05)
    monkeypatch.setattr(projector, "LAST_PAUSES_S", (0.0,))
    config = out / "cells" / f"{0:016x}" / "config.yaml"
    whole = config.read_text()
    config.write_text("task: [")
    view = projector.Projector(str(out), "tiny", f"sqlite:///{out}/mlflow.db")
    try:
        assert until(lambda: len(looks) > 2)
    finally:
        with pytest.raises(WorkError, match="MLflow could not be written: ParserError"):
            view.finish()
    config.write_text(whole)
    assert f"{0:016x}" in view.finish().finished


def test_an_exporter_that_talks_nonsense_hides_no_other_node(
    answering: tuple[str, list[tuple[int, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    address, answers = answering
    answers.append((200, b"<html>"))

    def exporters() -> Iterator[tuple[str, str]]:
        yield "broken", address
        answers.append((200, b"ray_node_cpu_utilization 12.0\n"))
        yield "whole", address

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(observe, "exporters", lambda: SimpleNamespace(items=exporters))
    observe.look(str(tmp_path))
    assert json.loads((tmp_path / "nodes" / "whole.jsonl").read_text())["cpu_utilization_percentage"] == 12
    assert not (tmp_path / "nodes" / "broken.jsonl").exists()


def test_a_replay_shows_what_is_planned_and_reads_each_result_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, tables and the champion are of the same cells: one that the plan no longer asks for is in none of them."""
    out = finished_out(tmp_path, 3)
    keys = [f"{i:016x}" for i in range(3)]
    put(out, {"study.yaml": "study: tiny", "plan.json": json.dumps([{"key": key} for key in (*keys[:2], "")])})
    uri, reads = f"sqlite:///{out}/mlflow.db", list[str]()
    Projection(str(out), "tiny", uri).update()
    read = storage.read_bytes

    def counted(url: str) -> bytes:
        reads.append(url)
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", counted)
    again = Projection(str(out), "tiny", uri)
    again.update()
    again.close(ok=True)
    table = again.client.load_table(again.experiment, "tables/results.json", extra_columns=["run_id"])
    assert sorted(table.loc[table["run_id"] == again.parent, "seed"]) == [0, 1]
    of_cells = [url for url in reads if "/cells/0" in url]
    assert sorted(url for url in of_cells if not url.endswith("config.yaml")) == [
        str(out / "cells" / key / "result.json") for key in keys[:2]
    ]
    assert sum(url.endswith("config.yaml") for url in of_cells) == 1  # of one source: is it of random weights?
    assert set(again.cells()) == set(keys[:2])
    (out / "plan.json").unlink()
    assert set(again.cells()) == set(keys)
