"""The command line: every command explains itself, bad requests end with 2 and one line, tables fit pipes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from base.config import parse
from base.paths import names
from cluster import cli
from cluster.inspect import quarantine_lines
from cluster.listing import KINDS
from cluster.pack import Packing
from cluster.progress import Progress
from cluster.screen import aligned
from shards.card import Card, load_card
from shards.manifest import read
from shards.pack import commit, pack, plan, write

COMMANDS = sorted(typer.main.get_group(cli.app).commands)


class Done(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


Allograft = Callable[..., Done]


@pytest.fixture
def allograft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Allograft:
    """The command line in this process, from `main` on: the imports of a new one would cost seconds a call."""

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["allograft", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Done(int(end.value.code or 0), said.out, said.err)

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    said = CliRunner().invoke(cli.app, [command, "--help"])
    assert said.exit_code == 0
    assert f"Example: allograft {command}" in " ".join(said.output.split())


def test_no_help_text_imports_anything_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cluster import cli\n"
        f"for command in {COMMANDS}: assert CliRunner().invoke(cli.app, [command, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'omegaconf', 'pandas', 'cv2', 'pydicom'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "dataset"], "did you mean 'datasets'"),
        (["pack", "montgomrey", "/nowhere", "--out", "/tmp/nothing"], "did you mean 'montgomery'"),
        (["pack", "montgomery", "/nowhere", "--out", "/tmp/nothing"], "no such folder of raw files"),
        (["report", "/nowhere"], "no study here"),
    ],
)
def test_a_wrong_request_ends_with_2_and_one_line(words: list[str], says: str, allograft: Allograft) -> None:
    done = allograft(*words)
    assert done.code == 2
    assert says in done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_an_unknown_command_and_a_missing_argument_end_with_2() -> None:
    assert CliRunner().invoke(cli.app, ["packk"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["pack"]).exit_code == 2


def test_version_names_the_revision() -> None:
    said = CliRunner().invoke(cli.app, ["--version"])
    assert said.exit_code == 0
    assert said.output.startswith("allograft ")


def test_list_datasets_has_every_card_on_a_line_of_its_own_when_piped(allograft: Allograft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = allograft("list", "datasets").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names("card")
    assert max(map(len, lines)) <= 140
    assert all(
        word in next(line for line in lines if line.startswith("mimic-cxr "))
        for word in ("377,110", "MIMIC-CXR, chest", "PhysioNet", "...")
    )
    monkeypatch.setenv("COLUMNS", "400")
    for line, name in zip(allograft("list", "datasets").out.splitlines()[1:], names("card"), strict=True):
        assert line.endswith(load_card(name).licence)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_listed(kind: str) -> None:
    header, rows = KINDS[kind][1]()
    assert rows
    assert all(len(row) == len(header) for row in rows)


def test_a_list_of_nothing_named_lists_the_lists(allograft: Allograft) -> None:
    said = allograft("list").out.splitlines()
    assert [line.split()[2] for line in said] == list(KINDS)


def test_epochs_of_recipes_are_said_as_they_are_written() -> None:
    assert all(float(epochs) > 0 and not epochs.endswith(".0") for _, epochs, _ in KINDS["recipes"][1]()[1])


def test_columns_are_aligned_and_lines_end_without_blanks() -> None:
    assert aligned([("a", "1"), ("long", "22")], ("x", "y")) == "x     y\na     1\nlong  22\n"


def test_inspect_prints_the_manifest_and_writes_a_sheet(tmp_path: Path, allograft: Allograft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = pack(load_card("phantom-chest"), "phantom:40/32", "shards")
    done = allograft("inspect", "shards")
    assert done.code == 0
    assert manifest.digest in done.out
    assert all(label in done.out for label in manifest.card.labels)
    assert (tmp_path / "phantom-chest-sheet.png").read_bytes().startswith(b"\x89PNG")
    refused = allograft("inspect", "nothing")
    assert refused.code == 2
    assert "no packed dataset here" in refused.err


def test_reasons_of_quarantine_are_counted_by_kind(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"key": "0a", "reason": f"mask measures {n} x 9, its image 8 x 8", "file": f"{n}.png"} for n in range(3)
    ]
    rows.append({"key": "0b", "reason": "image is an empty file", "file": None})
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = quarantine_lines(str(tmp_path))
    assert lines[0].startswith("4 quarantined")
    assert lines[1:] == [
        "  3 x mask measures N x 9, its image 8 x 8: 0.png, 1.png, 2.png",
        "  1 x image is an empty file: 0b",
    ]
    assert quarantine_lines(str(tmp_path), {"0b": "ward/7.png"})[2] == "  1 x image is an empty file: ward/7.png"
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps({"key": f"k{n}", "reason": "r"}) + "\n" for n in range(9)))
    assert quarantine_lines(str(tmp_path))[1:] == ["  9 x r: k0, k1, k2, k3, k4 and 4 more"]
    (tmp_path / "quarantine.jsonl").write_text("")
    assert quarantine_lines(str(tmp_path)) == []


def test_progress_counts_what_was_written_and_what_stood(tmp_path: Path) -> None:
    jobs = plan(load_card("phantom-chest"), "phantom:40/32", shard_samples=20)
    so_far = Packing(len(jobs), sum(len(job.records) for job in jobs), started=time.monotonic() - 10)
    assert so_far.line() == f"0/{len(jobs)} shards | 0/40 images"
    so_far.add(jobs[0], write(jobs[0], str(tmp_path)), stood=True)
    assert "img/s" not in so_far.line()
    so_far.under_way = 5  # of a shard that is not done
    assert f"{len(jobs[0].records) + 5}/40 images | 0 img/s | to go" in so_far.line()
    so_far.under_way = 0
    so_far.add(jobs[1], write(jobs[1], str(tmp_path)), stood=False)
    assert so_far.images_written == len(jobs[1].records)
    assert "img/s" in so_far.line()
    assert "to go" in so_far.line()
    assert so_far.summary().startswith(f"1 of {len(jobs)} shards stood unchanged")


def test_lines_of_progress_say_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("a file [bold]x[/bold].png")
    assert "a file [bold]x[/bold].png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--max-side", "5", "--max-side"), ("--depth", "12", "--depth"), ("--split-files", "/nowhere", "no such split files")],
)
def test_pack_refuses_options_before_any_work(option: str, value: str, says: str, allograft: Allograft, tmp_path: Path) -> None:
    done = allograft("pack", "phantom-chest", "phantom:40", "--out", str(tmp_path / "shards"), option, value)
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "shards").exists()


def test_survey_prints_tables_and_writes_a_draft_once(tmp_path: Path, allograft: Allograft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALLOGRAFT_SECRET", raising=False)
    monkeypatch.delenv("ALLOGRAFT_SECRET_FILE", raising=False)
    (tmp_path / "raw").mkdir()
    for n in range(8):
        Image.fromarray(np.full((9, 12), n, np.uint8)).save(tmp_path / "raw" / f"p{n // 2}_{n % 2}.png")
    done = allograft("survey", str(tmp_path / "raw"), "--out", str(tmp_path / "card.yaml"))
    assert done.code == 0
    assert "9 x 12" in done.out
    assert "the first part of the name  4" in done.out
    assert "4 open points" in done.out
    assert "export ALLOGRAFT_SECRET_FILE=FILE" in done.out  # which pack asks for next
    monkeypatch.setenv("ALLOGRAFT_SECRET", "x" * 32)
    assert "ALLOGRAFT_SECRET_FILE=FILE" not in allograft("survey", str(tmp_path / "raw"), "--out", str(tmp_path / "second.yaml")).out
    assert load_card(str(tmp_path / "card.yaml")).kind == "unlabelled"
    again = allograft("survey", str(tmp_path / "raw"), "--out", str(tmp_path / "card.yaml"))
    assert again.code == 2
    assert "there already" in again.err


def test_whoever_packs_private_files_is_told_their_names(tmp_path: Path, allograft: Allograft) -> None:
    sheet = str(tmp_path / "sheet.png")
    (tmp_path / "raw").mkdir()
    for n in range(9):
        Image.fromarray(np.full((36, 40), n, np.uint8)).save(tmp_path / "raw" / f"{n}.png")
    (tmp_path / "raw" / "3.png").write_bytes(b"")
    layout = {"name": "one", "requires": ["*.png"], "images": ["*.png"]}
    held = {"schema": 2, "dataset": "ward", "title": "t", "reader": "folders", "kind": "unlabelled", "layouts": [layout]}
    card = parse({**held, "licence": "l", "access": "a", "citation": "c", "split": {"val": 0, "test": 0}}, Card, "card")
    jobs = plan(card, str(tmp_path / "raw"), b"secret" * 16)
    so_far = Packing(len(jobs), 9)
    entries = [write(job, str(tmp_path / "shards")) for job in jobs]
    for job, entry in zip(jobs, entries, strict=True):
        so_far.add(job, entry, stood=False)
    commit(card, entries, str(tmp_path / "shards"))
    assert "1 quarantined" in so_far.line()
    assert "3.png" not in (tmp_path / "shards" / "quarantine.jsonl").read_text()
    assert quarantine_lines(str(tmp_path / "shards"), so_far.quarantined)[1] == "  1 x image is an empty file: 3.png"
    assert "pack again with this raw folder to see the names" in allograft("inspect", str(tmp_path / "shards"), "--sheet", sheet).out


def test_copies_and_files_that_no_row_names_are_counted(tmp_path: Path, allograft: Allograft) -> None:
    raw, sheet = tmp_path / "raw", str(tmp_path / "sheet.png")
    raw.mkdir()
    for n in range(9):  # 0 and 1 are of one patient, 2 and 4 of two
        Image.fromarray(np.full((36, 40), {1: 0, 4: 2}.get(n, n), np.uint8)).save(raw / f"{n}.png")
    (raw / "t.csv").write_text("\n".join(["image,patient", *(f"{n}.png,p{n // 2}" for n in range(7))]))
    layout = {"name": "one", "requires": ["t.csv"], "table": "t.csv", "images": ["*.png"], "image_column": "image"}
    held = {"schema": 2, "dataset": "ward", "title": "t", "reader": "csv", "kind": "unlabelled", "public": True}
    held |= {"layouts": [layout | {"patient_column": "patient"}], "split": {"val": 0, "test": 0}}
    card = parse({**held, "licence": "l", "access": "a", "citation": "c"}, Card, "card")
    pack(card, str(raw), str(tmp_path / "shards"))
    out = allograft("inspect", str(tmp_path / "shards"), "--sheet", sheet).out
    assert "2 images left out: no row of the table names them\n" in out
    assert "2 of 7 images are exact copies of others, 1 across patients" in out
    assert "card's rules" not in out


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, allograft: Allograft, out: str) -> None:
    (tmp_path / "file").write_text("x")
    done = allograft("pack", "phantom-chest", "phantom:40", "--out", str(tmp_path / out))
    assert done.code == 2
    assert "this is a file, shards need a folder" in done.err
    pack(load_card("phantom-chest"), "phantom:40/32", str(tmp_path / "shards"))
    done = allograft("inspect", str(tmp_path / "shards"), "--sheet", str(tmp_path / "file" / "sheet.png"))
    assert done.code == 1
    assert "no folder can be made here" in done.err


def test_a_damaged_manifest_is_named(tmp_path: Path, allograft: Allograft) -> None:
    (tmp_path / "manifest.json").write_text("{")
    done = allograft("inspect", str(tmp_path))
    assert done.code == 2
    assert f"{tmp_path}/manifest.json: damaged: not JSON" in done.err


def test_a_shard_tells_how_far_it_is(tmp_path: Path) -> None:
    job = plan(load_card("phantom-chest"), "phantom:40/32")[0]
    told: list[int] = []
    write(job, str(tmp_path), told.append)
    assert told == list(range(len(job.records)))


@pytest.mark.ray
@pytest.mark.usefixtures("on_head")
def test_pack_writes_what_is_missing_and_says_what_stood(tmp_path: Path, allograft: Allograft) -> None:
    out = str(tmp_path / "shards")
    smaller = load_card("phantom-chest").model_copy(update={"max_side": 48})
    manifest = pack(smaller, "phantom:40", out)
    (tmp_path / "shards" / "phantom-chest-val-00000.entry.json").unlink()
    done = allograft("pack", "phantom-chest", "phantom:40", "--out", out, "--max-side", "48")
    assert done.code == 0
    assert "2 of 3 shards stood unchanged" in done.out
    assert "img/s" in done.out
    assert "allograft inspect" in done.out
    assert read(out).digest == manifest.digest
