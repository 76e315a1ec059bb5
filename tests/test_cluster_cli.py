"""The command line: every command explains itself, bad requests end with 2 and one line, tables fit pipes."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from base.paths import names
from cluster import cli
from cluster.listing import KINDS
from cluster.screen import aligned
from shards.card import load_card
from shards.pack import pack

COMMANDS = sorted(typer.main.get_group(cli.app).commands)


def allograft(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cluster", *words], capture_output=True, text=True, cwd=cwd)


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
def test_a_wrong_request_ends_with_2_and_one_line(words: list[str], says: str) -> None:
    done = allograft(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_unknown_command_and_a_missing_argument_end_with_2() -> None:
    assert CliRunner().invoke(cli.app, ["packk"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["pack"]).exit_code == 2


def test_version_names_the_revision() -> None:
    said = CliRunner().invoke(cli.app, ["--version"])
    assert said.exit_code == 0
    assert said.output.startswith("allograft ")


def test_list_datasets_has_every_card_on_a_line_of_its_own_when_piped() -> None:
    lines = allograft("list", "datasets").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names("card")
    for line, name in zip(lines[1:], names("card"), strict=True):
        assert line.endswith(load_card(name).licence)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_listed(kind: str) -> None:
    header, rows = KINDS[kind]()
    assert rows
    assert all(len(row) == len(header) for row in rows)


def test_columns_are_aligned_and_lines_end_without_blanks() -> None:
    assert aligned([("a", "1"), ("long", "22")], ("x", "y")) == "x     y\na     1\nlong  22\n"


def test_inspect_prints_the_manifest_and_writes_a_sheet(tmp_path: Path) -> None:
    manifest = pack(load_card("phantom-chest"), "phantom:40/32", str(tmp_path / "shards"))
    done = allograft("inspect", "shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest.digest in done.stdout
    assert all(label in done.stdout for label in manifest.card.labels)
    assert (tmp_path / "phantom-chest-sheet.png").read_bytes().startswith(b"\x89PNG")
    refused = allograft("inspect", "nothing", cwd=tmp_path)
    assert refused.returncode == 2
    assert "no packed dataset here" in refused.stderr
