"""Where things are: the project's own YAML files from ROOT (never from the working directory), users' paths made absolute."""

import os
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

from base.errors import RequestError, unknown

ROOT = Path(__file__).resolve().parent.parent

Kind = Literal["card", "task", "recipe", "study", "claim", "weights"]
FOLDERS: dict[str, Path] = {
    "card": ROOT / "datasets",
    "task": ROOT / "finetune" / "tasks",
    "recipe": ROOT / "pretrain" / "recipes",
    "study": ROOT / "studies",
    "claim": ROOT / "studies" / "claims",
    "weights": ROOT / "encoders" / "zoo",
}
PRESETS = ("smoke", "small", "paper")  # of a task, all in its one file
OVERLAPS = ROOT / "datasets" / "overlaps.yaml"  # stands among the cards and is none


def is_url(path: str) -> bool:
    """True for `s3://...` and the like; a local path is not a URL here."""
    return "://" in path


def absolute(path: str, base: str | Path | None = None) -> str:
    """The path made absolute against `base` (default: the caller's directory); URLs are left alone."""
    if is_url(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.join(base or os.getcwd(), os.path.expanduser(path)))


def safe_name(*parts: object) -> str:
    """Those parts that say something, as the name of a file or folder."""
    text = "-".join(str(part) for part in parts if part)
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text).strip("-")


def names(kind: Kind) -> list[str]:
    """Names of the files of a kind, without suffix: `simclr/small`, `dxc14`."""
    folder = FOLDERS[kind]
    below = [other for other in FOLDERS.values() if folder in other.parents]  # claims stand in a folder among the studies
    found = [path for path in folder.rglob("*.yaml") if path != OVERLAPS and not any(other in path.parents for other in below)]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in found)


def with_preset(task: str) -> tuple[str, str]:
    """Name and preset of `dxc14/paper`, `mine.yaml/smoke`, or `dxc14`, which means preset small."""
    name, _, preset = task.rpartition("/")
    return (name, preset) if name and preset in PRESETS else (task, "small")


def named(kind: Kind, name: str) -> Path:
    """The file of a card, task, recipe or study: one of ours by name, or a user's own by its path ending in .yaml.

    A task may be named with its preset: its file is the same.

    Raises:
        RequestError: unknown name (with the nearest right one), or no such file.
    """
    if kind == "task":
        name = with_preset(name)[0]
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise RequestError(f"no such {kind} file", where=name)
        return path
    path = FOLDERS[kind] / f"{name}.yaml"
    if not path.is_file():
        presets = [f"{task}/{preset}" for task in names("task") for preset in PRESETS] if kind == "task" and "/" in name else []
        raise unknown(kind, name, [*names(kind), *presets])
    return path


@cache
def revision() -> str:
    """`git describe --always --dirty` where .git stands, else ALLOGRAFT_REVISION, else `unknown`."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    return os.environ.get("ALLOGRAFT_REVISION", "unknown")


def timestamp() -> str:
    """Now, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
