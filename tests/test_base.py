"""The ground floor: configuration errors, seeds, storage."""

import datetime
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from base import paths, storage
from base.config import Strict, apply, canonical_json, digest, load, parse
from base.errors import RequestError, WorkError, at, nearest, unknown
from base.seeds import rng, seed_of


class Inner(Strict):
    warmup_epochs: float = 1.0


class Outer(Strict):
    epochs: int
    inner: Inner = Inner()


def test_unknown_key_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("epochs: 1\ninner: {warmup_epoch: 2}\n")
    with pytest.raises(RequestError, match=r"x\.yaml: unknown key 'inner\.warmup_epoch', did you mean 'inner\.warmup_epochs'\?"):
        load(path, Outer)


class Entry(Strict):
    name: str = Field(pattern="^[a-z]+$")
    rate: float = Field(0.5, gt=0, le=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)


class Forms(Strict):
    """Values of every kind and form that the project's files have."""

    shares: list[Annotated[float, Field(gt=0, le=1)]] | dict[str, list[Annotated[float, Field(gt=0, le=1)]]] = Field([1.0])
    workers: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] = 1
    of_gpu: Annotated[float, Field(ge=0)] | Literal["measured"] = 0.0
    split: dict[str, Literal["train", "val", "test"]] = Field({})
    votes: Literal["majority"] | Annotated[str, Field(pattern="^OPEN:")] | None = None
    runs: list[Entry] = Field([])
    groups: dict[str, Entry] | list[str] = Field([])
    either: list[Entry] | dict[str, Entry] = Field([])
    fast: bool = False
    range: tuple[float, float] | None = None
    labels: dict[str, Any] = Field({"a": 1}, min_length=1)
    presets: dict[Literal["small", "paper"], Entry] = Field({})


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"shares": [1.5]}, "shares.0: 1.5 is more than 1"),
        ({"shares": ["10%"]}, 'shares.0: expected a number, got "10%"'),
        ({"shares": "10%"}, 'shares: expected a list or a mapping of keys to values, got "10%"'),
        ({"shares": {"a": [0]}}, "shares.a.0: 0 is not more than 0"),
        ({"shares": {"Mass": 0.1}}, "shares.Mass: expected a list, got 0.1"),
        ({"workers": 0}, "workers: 0 is less than 1"),
        ({"workers": [1]}, "workers: has 1 entry, at least 2 are wanted"),
        ({"workers": []}, "workers: is empty"),
        ({"workers": [1, 2, 3]}, "workers: has 3 entries, at most 2 are wanted"),
        ({"workers": [0, "a"]}, 'workers.0: 0 is less than 1; workers.1: expected a whole number, got "a"'),
        ({"workers": "all"}, 'workers: expected a whole number or a list, got "all"'),
        ({"of_gpu": -1}, "of_gpu: -1 is less than 0"),
        ({"of_gpu": "mesured"}, "of_gpu: expected a number or 'measured', got \"mesured\", did you mean 'measured'?"),
        ({"split": {"x": "trian"}}, "split.x: expected 'train', 'val' or 'test', got \"trian\", did you mean 'train'?"),
        ({"split": ["x"]}, 'split: expected a mapping of keys to values, got ["x"]'),
        ({"votes": "all"}, "votes: expected 'majority' or text of the pattern ^OPEN:, got \"all\""),
        ({"runs": "a"}, 'runs: expected a list, got "a"'),
        ({"runs": ["a"]}, 'runs.0: expected a mapping of keys to values, got "a"'),
        ({"runs": [{"name": "A"}]}, 'runs.0.name: expected text of the pattern ^[a-z]+$, got "A"'),
        ({"runs": [{"name": 3, "seeds": []}]}, "runs.0.name: expected text, got 3; runs.0.seeds: is empty"),
        ({"runs": [{}]}, "missing key 'runs.0.name'"),
        ({"runs": [{"name": "a", "seeds": [1.5]}]}, "runs.0.seeds.0: expected a whole number, got 1.5"),
        ({"runs": None}, "runs: expected a list, got null"),
        ({"groups": {"a": {"name": "b", "rat": 1}}}, "unknown key 'groups.a.rat', did you mean 'groups.a.rate'?"),
        ({"either": [{}]}, "missing key 'either.0.name'"),
        ({"either": {"a": {}}}, "missing key 'either.a.name'"),
        ({"range": {datetime.date(2020, 1, 1): 1}}, "range: expected a list, got {datetime.date(2020, 1, 1): 1}"),
        ({"fast": "maybe"}, 'fast: expected true or false, got "maybe"'),
        ({"range": 3}, "range: expected a list, got 3"),
        ({"range": [1, 2, 3]}, "range: has 3 entries, at most 2 are wanted"),
        ({"labels": {}}, "labels: is empty"),
        ({"presets": {"smal": {"name": "a"}}}, "presets.smal: expected 'small' or 'paper', got \"smal\", did you mean 'small'?"),
        ({"shares": "x" * 200}, "shares: expected a list or a mapping of keys to values"),
        ([], "expected a mapping of keys to values, got []"),
    ],
)
def test_what_is_wrong_with_a_value_is_one_sentence(tree: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(tree, Forms, "file")
    assert str(caught.value) == f"file: {said}"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("runs.0.sedes", "runs.0.seeds"),
        ("shars", "shares"),
        ("seeds", "runs.N.seeds"),  # two steps too high, and right otherwise
        ("runs.0.share", "shares"),
        ("zzzz", None),
    ],
)
def test_an_unknown_key_is_told_where_the_likeliest_one_stands(key: str, meant: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse(apply({"runs": [{"name": "a"}]}, [f"{key}=1"]), Forms, "file")
    assert caught.value.what == f"unknown key '{key}'" + (f", did you mean '{meant}'?" if meant else "")
    with pytest.raises(RequestError, match=r"^file: unknown key 'x'$"):
        parse({"x": 1}, Strict, "file")


@pytest.mark.parametrize("value", [None, True, 0.5, -1, "x", "OPEN:", [], ["x"], [[]], {}, {"small": []}, {"a": {"name": "a", "b": 1}}])
def test_no_value_is_answered_in_the_words_of_pydantic(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse(dict.fromkeys(Forms.model_fields, value), Forms, "file")
    assert not re.search(r"Input|should|valid|[a-z]-[a-z]+:|\[key", caught.value.what)


def test_a_place_is_named_from_the_outside_in_and_once() -> None:
    with pytest.raises(RequestError) as caught, at("study.yaml: cells.tasks[0]"):
        raise RequestError("unknown key 'x'", where="task.yaml", hint="leave it out")
    assert str(caught.value) == "study.yaml: cells.tasks[0]: task.yaml: unknown key 'x' (leave it out)"
    with pytest.raises(RequestError) as caught, at("study.yaml: cells"):
        raise RequestError("no", where="study.yaml: cells.tasks[0]")
    assert caught.value.where == "study.yaml: cells.tasks[0]"
    with pytest.raises(WorkError, match=r"^no$"), at("study.yaml"):
        raise WorkError("no")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        parse({"epoch": "x", "inner": {"warmup_epochs": "soon"}}, Outer, "file")
    assert "unknown key 'epoch'" in caught.value.what
    assert "missing key 'epochs'" in caught.value.what
    assert "inner.warmup_epochs" in caught.value.what
    assert caught.value.exit_code == 2


def test_settings_win_over_the_file_and_reach_into_named_list_entries(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("epochs: 1\n")
    assert load(path, Outer, ["epochs=3", "inner.warmup_epochs=0.5"]) == Outer(epochs=3, inner=Inner(warmup_epochs=0.5))
    tree = apply({"pretrain": [{"name": "a", "seeds": [0]}]}, ["pretrain.a.seeds=[1,2]", "data.nih-cxr14.raw=/x/y"])
    assert tree == {"pretrain": [{"name": "a", "seeds": [1, 2]}], "data": {"nih-cxr14": {"raw": "/x/y"}}}
    with pytest.raises(RequestError, match="entries: a"):
        apply({"pretrain": [{"name": "a"}]}, ["pretrain.b.seeds=[1]"])


@pytest.mark.parametrize(
    "file", ["mine.yaml", "cards/mine.yml", "/data/mine.yaml", "./mine.yaml", "../../cards/mine.yaml", "mine.yaml/smoke"]
)
def test_a_file_in_the_key_of_a_setting_keeps_its_dots(file: str) -> None:
    assert apply({}, [f"data.{file}.raw=/x/y.yaml"]) == {"data": {file: {"raw": "/x/y.yaml"}}}
    assert apply({}, [f"data.{file}={{raw: x}}", "a.yam.l=1"]) == {"data": {file: {"raw": "x"}}, "a": {"yam": {"l": 1}}}


def test_typed_settings_replace_and_mappings_reach_below() -> None:
    """`allograft finetune dxc14 settings.recipe.epochs=3` must not lose the recipe's other keys."""
    assert apply({"data": {"x": {"raw": "a"}}}, ["data.x={shards: b}"]) == {"data": {"x": {"shards": "b"}}}
    for settings in ({"recipe": {"epochs": 3}}, {"recipe.epochs": 3}):
        assert apply({"recipe": {"epochs": 9, "batch": 8}}, settings) == {"recipe": {"epochs": 3, "batch": 8}}


@pytest.mark.parametrize("text", ["epochs", "=3"])
def test_a_setting_without_key_and_value_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("epochs: 1\n")
    with pytest.raises(RequestError, match="is not a setting"):
        load(path, Outer, [text])


@pytest.mark.parametrize(
    ("content", "match"),
    [("a: [", "not YAML"), ("- 1\n", "expected a mapping"), ("a: {b: 1, c: 2, b: 3}", "bad.yaml:1: the key 'b' stands twice")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(content: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=match):
        load(path, Outer)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bin.yaml"
    path.write_bytes(b"\x7fELF\xff\xfe\x00")
    with pytest.raises(RequestError, match=r"bin\.yaml: not UTF-8 text"):
        load(path, Outer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4))
def test_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(turned)
    assert digest(value) == digest(turned)


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from base.seeds import seed_of; print(seed_of('views', 3, 17))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert int(other.stdout) == seed_of("views", 3, 17)


@given(st.lists(st.integers(0, 9) | st.text(max_size=3), min_size=1, max_size=4))
def test_streams_differ_by_their_parts(parts: list[int | str]) -> None:
    assert seed_of(*parts) != seed_of(*parts, 0)
    assert rng(*parts).integers(2**62) == rng(*parts).integers(2**62)


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(WorkError("broke", where="a.yaml", hint="mend it")))
    assert str(error) == "a.yaml: broke (mend it)"
    assert error.exit_code == 1


def test_nearest_names() -> None:
    assert nearest("simcrl", ["simclr", "supervised"]) == "simclr"
    assert "did you mean 'simclr'?" in str(unknown("method", "simcrl", ["simclr"]))
    assert "known: simclr" in str(unknown("method", "zzzzzz", ["simclr"]))
    assert str(unknown("preset", "x", [])) == "unknown preset 'x' (there is none)"


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "place") if request.param == "local" else f"memory://{tmp_path.name}"


def test_storage_round_trip(place: str, tmp_path: Path) -> None:
    url = storage.join(place, "a", "b.txt")
    assert not storage.exists(url)
    storage.put(url, "hello")
    assert storage.read_bytes(url) == b"hello"
    assert storage.listing(storage.join(place, "a")) == ["b.txt"]
    assert storage.listing(storage.join(place, "nothing")) == []
    storage.get_file(url, tmp_path / "copy.txt")
    assert (tmp_path / "copy.txt").read_text() == "hello"
    storage.remove(storage.join(place, "a"))
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_a_folder_comes_back_whole_and_its_last_file_goes_last(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for name in ("COMMIT", "z.bin", "sub/a.bin"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    written: list[str] = []
    real = storage.put_file

    def put_file(local: str | Path, url: str) -> None:
        written.append(url)
        real(local, url)

    monkeypatch.setattr(storage, "put_file", put_file)
    storage.put_dir(source, storage.join(place, "d"), last=("COMMIT",))
    assert written[-1].endswith("COMMIT")
    storage.get_dir(storage.join(place, "d"), tmp_path / "back")
    back = tmp_path / "back"
    assert sorted(str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()) == [
        "COMMIT",
        "sub/a.bin",
        "z.bin",
    ]


def test_a_line_that_is_still_being_written_is_no_row(place: str) -> None:
    url = storage.join(place, "metrics.jsonl")
    assert storage.read_or_none(url) is None
    assert storage.read_rows(url) == []
    storage.put(url, '{"step": 1}\n{"step": 2}\n[3]\n{"step": "\N{LATIN SMALL LETTER E WITH ACUTE}'.encode()[:-1])
    assert storage.read_rows(url) == [{"step": 1}, {"step": 2}]


def test_removing_what_others_remove_at_the_same_time_is_fine(place: str) -> None:
    url = storage.join(place, "manifest.json")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            storage.put(url, "x")
            assert list(pool.map(storage.remove, [url] * 4)) == [None] * 4
    assert not storage.exists(url)


def test_create_is_exclusive(tmp_path: Path) -> None:
    url = str(tmp_path / "x" / "driver.lock")
    assert storage.create(url, "first")
    assert not storage.create(url, "second")
    assert storage.read_bytes(url) == b"first"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def onto_full_device(temporary: str) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(WorkError, match="no space left on the device"):
        storage._guard(lambda: storage._write_and_rename(str(tmp_path / "f"), onto_full_device), str(tmp_path / "f"))
    assert os.listdir(tmp_path) == []


def test_names_come_from_the_project_and_not_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nih-cxr14" in paths.names("card")
    with pytest.raises(RequestError, match="did you mean 'nih-cxr14'"):
        paths.named("card", "nih-cxr41")
    assert paths.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert paths.absolute("s3://b/x/") == "s3://b/x"
