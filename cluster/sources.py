"""Sources resolved to the place of an exported encoder and its hash, before anything below is called."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache

from analysis.results import Cell
from base import storage
from base.config import parse, read
from base.errors import RequestError, WorkError, in_a_line
from base.paths import is_url, safe_name
from cluster.plan import Weights
from cluster.published import obtain
from finetune.cell import CellConfig


def read_weights(url: str, seed: int = 0) -> Weights:
    """The facts of an exported encoder, from its folder (path or URL); the tensors are checked by whoever loads them.

    Raises:
        RequestError: no encoder there.
    """
    from encoders.export import ExportInfo

    file = storage.join(url, "allograft.json")
    if not storage.exists(file):
        raise no_export(url)
    info = parse(storage.read_json(file), ExportInfo, file)
    labelled, data = tuple(info.labelled_datasets), tuple(info.data)
    return Weights(url, info.sha256, info.architecture, seed, labelled, data, info.cut)


def no_export(place: str) -> RequestError:
    """The error for a source that is no exported encoder: nothing, a file, or a folder of something else."""
    held = os.path.join(place, "model.safetensors")
    file = place if os.path.isfile(place) else held if os.path.isfile(held) else None
    command = f"allograft weights NAME --file {file or 'FILE'} --architecture ARCHITECTURE --seen CORPUS --licence LICENCE"
    if file == place:
        return RequestError("a file, not the folder of an exported encoder", where=place, hint=f"weights are converted by: {command}")
    there = is_url(place) or os.path.exists(place)
    what = "no exported encoder here" + (" (no allograft.json)" if there else ": there is no such file or folder")
    return RequestError(what, where=place, hint=f"{'its ' if file else ''}weights are converted by: {command}")


def cell_config(url: str) -> CellConfig:
    """The configuration of a cell, from its folder."""
    return read(storage.join(url, "config.yaml"), CellConfig)


def baseline(cells: Iterable[Cell]) -> str | None:
    """The source of random weights that others are held against, whatever its name: of several the first by name; None without one."""
    from analysis.family import is_random

    first = {cell.source: cell for cell in cells}
    return min((source for source, cell in first.items() if is_random(cell)), default=None)


def external(source: str, out: str, uri: str) -> Weights:
    """A source from outside the study: `timm:<tag>`, `zoo:<name>`, `models:/<name>@<alias>`, `run:<id>`, a path or URL of an export.

    What has to be fetched is kept under `OUT/sources/`, so that a study sees the same weights for as long as it lives.

    Raises:
        RequestError: there are no such weights, or the file in a folder on this machine is not the one that was exported.
        WorkError: what holds them does not answer.
    """
    kind, _, rest = source.partition(":")
    if kind in {"timm", "zoo"}:
        return _fetched(out, source, lambda folder: shutil.copytree(obtain(source), folder))
    if kind == "models":
        from cluster.registry import pull

        return _fetched(out, source, lambda folder: _answered(source, lambda: pull(rest.removeprefix("/"), folder, uri)))
    if kind == "run":
        return _fetched(out, source, lambda folder: _answered(source, lambda: _download_run(rest, folder, uri)))
    if is_url(source):
        return read_weights(source)
    found = read_weights(os.path.abspath(source))
    file = os.path.join(found.url, "model.safetensors")
    _refuse_changed(found.url, os.stat(file).st_mtime_ns if os.path.exists(file) else 0)
    return found


@cache
def _refuse_changed(folder: str, changed_ns: int) -> None:
    """Of a folder on this machine: a worker would refuse other tensors as well, but once everything is started."""
    from encoders.export import read_export

    try:
        read_export(folder)
    except WorkError as error:
        raise RequestError(error.what, where=error.where, hint="export or fetch it again") from error


def _fetched(out: str, source: str, fetch: Callable[[str], object]) -> Weights:
    target = storage.join(out, "sources", safe_name(source))
    if not storage.exists(storage.join(target, "allograft.json")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = os.path.join(temporary, "encoder")
            fetch(folder)
            storage.put_dir(folder, target, last=("allograft.json",))
    return read_weights(target)


def _answered(source: str, ask: Callable[[], object]) -> None:
    """Raises WorkError where an MLflow server that was there when the study began is not now: that is no fault of the request."""
    from mlflow.exceptions import MlflowException

    try:
        ask()
    except MlflowException as error:
        raise WorkError(f"MLflow could not be read: {in_a_line(error)}", where=source) from error
    except RequestError as error:
        if error.where != "tracking":
            raise
        raise WorkError(f"MLflow could not be read: {error.what}", where=source) from error


def _download_run(run: str, folder: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    from cluster.mlflow_store import connect

    client = connect(uri)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found = client.download_artifacts(run, "encoder", temporary)
        except MlflowException as error:
            raise RequestError(f"run '{run}' has no encoder", where="source") from error
        shutil.copytree(found, folder)
