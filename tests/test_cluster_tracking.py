"""What tracked runs say, and refusing a wrong tracking address: no server and no cluster needed."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from base.config import parse
from base.errors import RequestError
from cluster import facts, pages
from cluster.registry import champion_score
from cluster.study import Study
from cluster.tracking import require_server


def result(source: str, task: str = "t", seed: int = 0, value: float = 0.5, **changes: Any) -> dict[str, Any]:
    rows = [
        {"split": split, "class": label, "metric": metric, "unit": "fraction", "value": value, "n": 10}
        for split in ("val", "test")
        for label, metric in (("", "auroc_mean"), ("", "auprc_mean"), ("nodule", "auroc"))
    ]
    base = {"task": task, "strategy": "linear", "fraction": 1.0, "source": source, "seed": seed, "metrics": rows}
    return {**base, "selection": {"metric": "auroc_mean", "epoch": 3}, "own_source": False, **changes}


def test_an_encoder_is_told_what_its_cells_reached_and_by_how_much_more_than_random() -> None:
    mine = [result("a", seed=0, value=0.7), result("a", seed=1, value=0.9)]
    other = [result("random", seed=0, value=0.5), result("random", seed=1, value=0.6)]
    told = facts.downstream(mine, mine + other)
    assert told["t/linear/test_auroc_mean"] == pytest.approx(0.8)
    assert told["t/linear/test_auroc_mean_over_random"] == pytest.approx(0.25)
    assert told["t/linear/tested_cells"] == 2
    assert not any("auprc" in name or "nodule" in name for name in told)


def test_what_must_not_count_for_an_encoder_does_not() -> None:
    whole = result("a", value=0.7)
    others = [result("a", value=0.1, fraction=0.1), result("a", value=0.1, own_source=True), result("a", value=0.1, shuffle_labels=True)]
    assert facts.downstream([whole, *others], [whole, *others]) == facts.downstream([whole], [whole])


def test_exposed_cells_count_where_the_study_ranks_them() -> None:
    plain, seen = result("a", seed=0, value=0.6), result("a", seed=1, value=0.8, exposed_to=["nih-cxr14"])
    assert facts.downstream([plain, seen], [plain, seen])["t/linear/test_auroc_mean"] == pytest.approx(0.6)
    assert facts.downstream([plain, seen], [plain, seen], "ranked")["t/linear/test_auroc_mean"] == pytest.approx(0.7)


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    rows = [{"split": "test", "class": "", "metric": "auroc_mean", "unit": "fraction", "value": None, "n": 0}]
    assert facts.headline(result("a", metrics=rows)) == {}
    assert facts.curves({"epoch": 1, "train_loss": float("nan"), "val_loss": 0.5, "event": "health"}) == {"training/val_loss": 0.5}


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
    [(200, b"<html>", "is no MLflow server"), (403, b"", "allowed-hosts"), (404, b"", "status 404"), (200, b"{}", None), (401, b"", None)],
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
    shared = {"encoder_sha256": "e", "role": "cell", "options": {}, "resolution": 32}
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
