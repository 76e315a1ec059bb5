"""The champion in a real MLflow store: by the study's rule, or by hand, and then for good."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster_tracking import GOLDEN, put

from base.config import parse
from base.errors import RequestError
from cluster import cli
from cluster.mlflow_store import connect
from cluster.projection import Projection
from cluster.registry import promote, register, resolve
from cluster.study import Study

RULE = {"task": "phantom-chest", "metric": "auroc_mean"}


class Registered:
    """A study's folder with encoders `a` and `b`, version 1 and 2, and cells of both."""

    def __init__(self, folder: Path, rule: dict[str, str] | None = RULE) -> None:
        self.out = folder / "out"
        data = {"phantom-chest": {"raw": "phantom:60"}}
        self.study = parse({"study": "tiny", "out": str(self.out), "data": data, "champion": rule}, Study, "study")
        put(self.out, {"study.yaml": "study: tiny"})
        for name in "ab":
            self._encoder(name)
            self.cell(name, 0, {"a": 0.7, "b": 0.6}[name])
        self.uri = f"sqlite:///{self.out}/mlflow.db"

    def _encoder(self, name: str) -> None:
        config, result = yaml.safe_load((GOLDEN / "pretrain.yaml").read_text()), json.loads((GOLDEN / "pretrain_result.json").read_text())
        result |= {"name": name, "key": name * 16, "encoder_sha256": name * 64}
        info = {"revision": "r", "licence": "l", "data": [], "method": "m", "architecture": "n", "file_sha256": name * 64, "lineage": []}
        files = {"config.yaml": yaml.safe_dump(config), "result.json": json.dumps(result), "export/allograft.json": json.dumps(info)}
        put(self.out / "pretrain" / f"{name}-{name * 16}", files)

    def cell(self, name: str, seed: int, value: float) -> None:
        """A finished cell of an encoder, with its validation score."""
        key = f"{name}{seed:015x}"
        score = {"split": "val", "class": "", "metric": "auroc_mean", "unit": "fraction", "value": value, "n": 9}
        held: dict[str, Any] = json.loads((GOLDEN / "cell_result.json").read_text())
        held |= {"key": key, "source": name, "encoder_sha256": name * 64, "metrics": [score], "seed": seed}
        put(self.out / "cells" / key, {"config.yaml": (GOLDEN / "cell.yaml").read_text(), "result.json": json.dumps(held)})

    def register(self) -> tuple[dict[str, str], str | None]:
        """As at the end of every run and sync."""
        projection = Projection(str(self.out), "tiny", self.uri)
        projection.update()
        return register(projection, self.study)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """For tests that change nothing."""
    held = Registered(tmp_path_factory.mktemp("registered"))
    assert held.register() == ({f"a-{'a' * 16}": "1", f"b-{'b' * 16}": "2"}, "a")
    return held


def allograft(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["allograft", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_champion_by_hand_stays_whatever_the_rule_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Registered(tmp_path)
    assert tiny.register()[1] == "a"
    tiny.cell("b", 1, 0.9)
    assert tiny.register()[1] == "b"  # by the rule it moves
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "dr-x")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of-dr-x")
    assert allograft(monkeypatch, "promote", "tiny", "1", "--reason", "fairer to the old", "--tracking", str(tiny.out)) == 0
    assert capsys.readouterr().out == "tiny@champion is version 1 (a) instead of version 2 (b)\n"
    for _ in range(2):
        assert tiny.register()[1] == "a, promoted by hand: fairer to the old; by the rule b"
        champion = resolve(connect(tiny.uri), "tiny")
        assert (champion.version, champion.tags["promoted.reason"], champion.tags["promoted.by"]) == (1, "fairer to the old", "dr-x")
        assert champion.tags["promoted.at"].endswith("+00:00")
    assert promote("tiny", "2", "the old one is too slow", tiny.uri) == "tiny@champion is version 2 (b) instead of version 1 (a)"
    assert tiny.register()[1] == "b, promoted by hand: the old one is too slow; by the rule b"
    # What MLflow's pages can do gives the choice back.
    connect(tiny.uri).delete_registered_model_tag("tiny", "champion.by_hand")
    assert tiny.register()[1] == "b"
    tiny.cell("a", 1, 1.0)
    assert [tiny.register()[1] for _ in range(2)] == ["a", "a"]


def test_a_setting_of_which_a_seed_failed_leads_nowhere(tmp_path: Path) -> None:
    """One that diverges leaves no result, only its reason: those that did not are a selection, as in the report."""
    tiny = Registered(tmp_path)
    tiny.cell("b", 1, 0.9)
    assert tiny.register()[1] == "b"
    setting = {"architecture": "resnet18", "strategy": "linear", "task": "t", "fraction": 1.0, "resolution": 48, "options": {}}
    rows = [{**setting, "source": name, "key": f"{name}{seed:015x}"} for name in "ab" for seed in range(3)]
    put(tiny.out, {"plan.json": json.dumps(rows), "events.jsonl": json.dumps({"event": "cell failed", "key": rows[-1]["key"]}) + "\n"})
    assert tiny.register()[1] == "a"
    tiny.cell("b", 2, 0.9)  # tried again, and done
    assert tiny.register()[1] == "b"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tinny", "1", "--reason", "r"], "unknown registered encoder 'tinny' (did you mean 'tiny'?)"),
        (["tiny", "3", "--reason", "r"], "no '3' of 'tiny' (versions: 1 (a), 2 (b); aliases: champion)"),
        (["tiny", "b", "--reason", "r"], "no 'b' of 'tiny' (versions: 1 (a), 2 (b); aliases: champion)"),
        (["tiny", "2", "--reason", " "], "--reason: why?"),
    ],
)
def test_a_wrong_promotion_changes_nothing_and_says_what_there_is(
    shared: Registered, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert allograft(monkeypatch, "promote", *words, "--tracking", str(shared.out)) == 2
    assert says in capsys.readouterr().err
    assert resolve(connect(shared.uri), "tiny").version == 1


def test_a_promotion_wants_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert allograft(monkeypatch, "promote", "tiny", "1", "--tracking", "http://127.0.0.1:9") == 2
    assert "--reason" in capsys.readouterr().err


def test_without_a_rule_the_champion_is_left_to_hands(tmp_path: Path) -> None:
    ward = Registered(tmp_path, rule=None)
    assert ward.register()[1] is None
    with pytest.raises(RequestError, match=r"no 'champion' of 'tiny'.*allograft promote tiny VERSION"):
        resolve(connect(ward.uri), "tiny")
    assert [resolve(connect(ward.uri), f"tiny{mark}2").version for mark in "/@"] == [2, 2]
    assert promote("tiny", "2", "the only one with a licence", ward.uri) == "tiny@champion is version 2 (b)"
    assert ward.register()[1] == "b, promoted by hand: the only one with a licence"
