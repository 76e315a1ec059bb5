"""The ground floor: configuration errors, seeds, storage."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base import paths, storage
from base.config import Strict, apply, canonical_json, digest, load, parse
from base.errors import RequestError, WorkError, nearest, unknown
from base.seeds import rng, seed_of


class Inner(Strict):
    warmup_epochs: float = 1.0


class Outer(Strict):
    epochs: int
    inner: Inner = Inner()


def test_unknown_key_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("epochs: 1\ninner: {warmup_epoch: 2}\n")
    with pytest.raises(RequestError, match=r"x\.yaml: unknown key 'inner\.warmup_epoch', did you mean 'warmup_epochs'\?"):
        load(path, Outer)


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
    monkeypatch.setattr(storage, "put_file", lambda local, url: (written.append(url), real(local, url)))
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
