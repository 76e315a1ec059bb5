"""The house: who may import whom, and what importing costs."""

import ast
import re
import resource
import subprocess
import sys

import pytest

from base.paths import ROOT

ORDER = ["base", "shards", "encoders", "engine", "analysis", "finetune", "pretrain", "cluster"]
FILES = [path for room in ORDER for path in sorted((ROOT / room).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_only_toward_the_left(room: str) -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != room:
            continue
        above = imported(ast.parse(path.read_text())) & set(ORDER[ORDER.index(room) + 1 :])
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_only_cluster_knows_ray_and_mlflow() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "cluster":
            assert not imported(ast.parse(path.read_text())) & {"ray", "mlflow"}, path


def test_every_variable_of_the_environment_is_documented() -> None:
    documented = set(re.findall(r"`([A-Z0-9_]+)`", (ROOT / "docs" / "cluster.md").read_text()))
    code = [
        *FILES,
        *(
            path
            for folder in ("tests", "benchmarks", "docker")
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        ),
    ]
    held = {name for path in code for name in re.findall(rb"ALLOGRAFT_[A-Z][A-Z0-9_]*[A-Z0-9]", path.read_bytes())}
    assert {name.decode() for name in held} <= documented
    from cluster.session import FORWARDED

    assert set(FORWARDED) <= documented


def test_the_packages_are_the_rooms() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert set(listed) == found


def test_help_imports_nothing_heavy_and_is_instant() -> None:
    code = (
        "import sys; sys.argv = ['allograft', '--help']\n"
        "from cluster import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pydantic', 'omegaconf', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # processor time: it does not wait for anything, and neighbours of the test cannot stretch it


def test_nothing_published_or_read_is_a_pickle() -> None:
    for path in FILES:
        text = path.read_text()
        if path == ROOT / "encoders" / "weights.py":  # files of others, converted once, by the unpickler that runs no code of theirs
            text = text.replace('torch.load(file, map_location="cpu", weights_only=True)', "")
        for word in ("torch.load(", "torch.save(", "pickle.load", "allow_pickle=True"):
            assert word not in text, f"{path}: {word}"
