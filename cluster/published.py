"""Weights from elsewhere on this machine, as exports like our own: published ones, fetched, verified and converted once, and a user's.

folder = obtain("zoo:moco-v2")            # or timm:resnet18.a1_in1k: the folder of the export
convert("mine", "model.pt", architecture="resnet18", seen=["nih-cxr14"], labelled=[], licence="CC-BY-4.0")    # ./mine
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from base import storage
from base.errors import RequestError
from base.paths import names, revision, safe_name


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
            export_timm(name, folder, revision=revision(), file=file, allow_partial=allow_partial)
        else:
            export_zoo(name, folder, revision=revision(), file=file, allow_partial=allow_partial)
        storage.put_dir(folder, target, last=("allograft.json",))
    return target


def convert(
    folder: str,
    file: str,
    *,
    architecture: str,
    seen: Sequence[str],
    labelled: Sequence[str],
    licence: str,
    normalisation: str | None = None,
    image_size: int = 224,
    allow_partial: bool = False,
) -> None:
    """A user's own weights as an export in a new folder; see encoders.published.export_own.

    Raises:
        RequestError: the folder is there already, or nothing is said of the corpora, or the file is refused.
        WorkError: tensors of the encoder are missing in the file.
    """
    from encoders.published import export_own

    if os.path.exists(folder):
        raise RequestError("this is there already", where=folder, hint="name a folder that is not, or remove it")
    if not (seen or labelled):
        hint = "--seen CORPUS for each, --labelled CORPUS where their labels were used, too"
        raise RequestError("which corpora have these weights seen?", where=file, hint=hint)
    with tempfile.TemporaryDirectory() as temporary:
        made = os.path.join(temporary, os.path.basename(os.path.abspath(folder)))
        export_own(
            file,
            made,
            architecture=architecture,
            seen=seen,
            labelled=labelled,
            licence=licence,
            revision=revision(),
            normalisation=normalisation,
            image_size=image_size,
            allow_partial=allow_partial,
        )
        storage.put_dir(made, folder, last=("allograft.json",))


def source_of(name: str) -> str:
    """The source that `allograft weights NAME` means."""
    return name if name.startswith(("timm:", "zoo:")) else f"zoo:{name}"


def show(source: str, folder: str) -> None:
    """Print what the weights in this folder are and how a study starts from them."""
    from cluster.screen import table
    from encoders.export import read_export

    info = read_export(folder)
    bare = sorted({str(entry["dataset"]) for entry in info.data} - set(names("card")))
    rows = [
        ("weights", f"{info.name}: {info.architecture}, {info.method}"),
        ("have seen", ", ".join(str(entry["dataset"]) for entry in info.data)),
        ("licence", info.licence),
        ("sha256", info.sha256),
        *([("of no card", f"{', '.join(bare)}: leakage is judged by these names")] if bare and info.method == "own" else []),
        *[("random", f"all but {step['loaded']}, namely {', '.join(step['missing'])}") for step in info.lineage if step.get("missing")],
        ("at", folder),
        ("use", f"start_from: {source}, or cells.sources: [{source}]"),
    ]
    table(rows)
