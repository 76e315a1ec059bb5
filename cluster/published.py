"""Published weights on this machine: fetched, verified and converted once, then read by every study.

folder = obtain("zoo:moco-v2")            # or timm:resnet18.a1_in1k: the folder of an export like our own
"""

import os
import tempfile
from pathlib import Path

from base import storage
from base.paths import revision, safe_name


def default_dir() -> str:
    """$ALLOGRAFT_WEIGHTS, else `~/.cache/allograft/weights`."""
    return os.environ.get("ALLOGRAFT_WEIGHTS") or str(Path.home() / ".cache" / "allograft" / "weights")


def place_of(source: str) -> str:
    """Where these weights are, or will be."""
    return os.path.join(default_dir(), safe_name(source))


def stands(source: str) -> bool:
    """Whether they were converted already."""
    return os.path.exists(os.path.join(place_of(source), "allograft.json"))


def obtain(source: str, file: str | None = None, allow_partial: bool = False) -> str:
    """The folder of the converted weights `zoo:NAME` or `timm:TAG`, made now where it is not there.

    Args:
        file: the published file, where it is here already; then it is converted whatever stands.
        allow_partial: see encoders.published.export_zoo.

    Raises:
        RequestError: no such weights, or another file than theirs.
        WorkError: they cannot be fetched.
    """
    from encoders.published import export_timm, export_zoo

    kind, _, name = source.partition(":")
    target = place_of(source)
    if file is None and stands(source):
        return target
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "encoder")
        if kind == "timm":
            export_timm(name, folder, revision=revision(), file=file)
        else:
            export_zoo(name, folder, revision=revision(), file=file, allow_partial=allow_partial)
        storage.put_dir(folder, target, last=("allograft.json",))
    return target


def show(name: str, file: str | None, allow_partial: bool) -> None:
    """`allograft weights`: obtain them, and print what they are and how a study starts from them."""
    from cluster.screen import table
    from encoders.export import read_export

    source = name if name.startswith(("timm:", "zoo:")) else f"zoo:{name}"
    folder = obtain(source, file, allow_partial)
    info = read_export(folder)
    rows = [
        ("weights", f"{info.name}: {info.architecture}, {info.method}"),
        ("have seen", ", ".join(str(entry["dataset"]) for entry in info.data)),
        ("licence", info.licence),
        ("sha256", info.sha256),
        *[("random", ", ".join(step["missing"])) for step in info.lineage if step.get("missing")],
        ("at", folder),
        ("use", f"start_from: {source}, or cells.sources: [{source}]"),
    ]
    table(rows)
