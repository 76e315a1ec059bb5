"""The study file of `allograft init`: it loads, `plan` accepts it, and every key there is stands in it, awake or at rest."""

import re
from pathlib import Path

import pytest

from base.errors import RequestError
from cluster import init
from cluster.load import load_study
from cluster.outlook import outlook
from cluster.study import Study

RESTS = re.compile(r"^( *)#(?=[a-z-])", re.MULTILINE)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(init.write("ward-7"))


def test_comments_stand_in_their_column_whatever_the_name(file: Path) -> None:
    for path in (file, Path(init.write("a-name-of-22-letters-h"))):
        lines = re.findall(r"^(?:schema|study|out|tracking): .*", path.read_text(), re.MULTILINE)
        assert [line.index("  # ") for line in lines] == [32] * 4


def test_plan_accepts_the_file_as_it_stands(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study(str(file))
    assert (study.study, study.out) == ("ward-7", str(file.parent / "runs" / "ward-7"))
    assert outlook(study)
    assert re.search(r"^cells  +18, of which 0 stand$", capsys.readouterr().out, re.MULTILINE)
    assert load_study(str(file), ["data.phantom-chest.raw=/data/chest"]).data["phantom-chest"].raw == "/data/chest"


def test_every_resting_key_can_be_woken(file: Path) -> None:
    file.write_text(RESTS.sub(r"\1", file.read_text()))
    study = load_study(str(file))
    assert study.cells is not None
    assert study.cells.asked_by == "claims"
    assert study.cells.seeds == [0]  # by its preset
    assert (study.pretrain[1].labels, study.pretrain[1].replay) == (["Mass", "Nodule"], 0.3)
    assert study.data["nih-cxr14"].shards == "/data/shards/nih"
    assert study.exposed == "ranked"


def test_every_key_of_a_study_is_explained() -> None:
    """But for those of claims, which are files of their own elsewhere, what stands inside of braces, and `card`, which is filled in."""
    schema = Study.model_json_schema()
    parts = {name: part for name, part in schema["$defs"].items() if name not in ("Claim", "Sides", "Where", "Tune", "SourceEntry")}
    for key in sorted({key for part in (schema, *parts.values()) for key in part["properties"]} - {"card"}):
        lines = [line for line in init.TEMPLATE.splitlines() if re.match(rf" *#?(- )?{key}:", line)]
        assert lines, f"no {key} in the file of allograft init"
        assert "  # " in lines[0] or key in ("task", "metric"), f"{key} is not explained"


def test_no_file_is_overwritten_and_no_name_is_refused_later(file: Path) -> None:
    before = file.read_text()
    with pytest.raises(RequestError, match=rf"{file}: this file is there already"):
        init.write("ward-7")
    assert file.read_text() == before
    with pytest.raises(RequestError, match=r"demo\.yaml: 'demo' is a ready study"):
        init.write("demo")
    for name in ("Ward", "ward.yaml", "a/b", ""):
        with pytest.raises(RequestError, match="is no name of a study"):
            init.write(name)
