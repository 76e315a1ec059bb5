"""Published weights as exports like our own: timm's, and the benchmark's self-supervised ResNet-50s, each with a card in `encoders/zoo/`.

    export_timm("resnet50.a1_in1k", "out/a1", revision="1a2b3c")
    export_zoo("moco-v2", "out/moco-v2", revision="1a2b3c", file="moco_v2_800ep_pretrain.pth.tar")

The benchmark's files, which no library loads, are pickles. One is read once, by torch's unpickler for tensors and plain values alone
(`weights_only=True`: it runs no code of the file), checked against its card and made an export; from then on only that is read. SimCLR's
and BYOL's official files are not here: they are TensorFlow's and JAX's, whose pickles would have to be run.
"""

import argparse
import hashlib
import pickle
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from base.config import Strict, load
from base.errors import RequestError, WorkError, unknown
from base.paths import named, names
from encoders.build import build
from encoders.export import export
from encoders.weights import State, load_into, load_local, timm_pretrained

PATIENCE_S = 30.0
# Of what is no tensor and no plain value, PyContrast's files hold their command line: a Namespace, which is a dictionary with dots.
HARMLESS: list[Any] = [argparse.Namespace]


class ZooCard(Strict):
    """One set of published weights. `prefix`: what stands before the encoder's names in the file; `exposed_to`: corpora that they saw."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    title: str
    method: str
    architecture: str
    url: str
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")  # of the file; null where its publisher names none
    container: str | None = None  # the key under which the file holds the tensors
    prefix: str = ""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 224
    licence: str
    exposed_to: list[str] = Field(min_length=1)
    citation: str


def load_zoo(name: str) -> ZooCard:
    """The card of that name. Raises RequestError for an unknown one, with the nearest right name."""
    if name not in names("weights"):
        raise unknown("published weights", name, names("weights"))
    return load(named("weights", name), ZooCard)


def fetch_zoo(name: str, file: str | Path) -> None:
    """Download the published file.

    Raises:
        WorkError: it cannot be had.
    """
    url = load_zoo(name).url
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply, open(file, "wb") as out:
            shutil.copyfileobj(reply, out)
    except (urllib.error.URLError, OSError) as error:
        hint = f"fetch it where there is a network, then: allograft weights {name} --file FILE"
        raise WorkError(f"could not be fetched ({error})", where=url, hint=hint) from error


def export_zoo(name: str, dir: str | Path, *, revision: str, file: str | Path | None = None, allow_partial: bool = False) -> str:
    """Published weights verified and converted into an export; returns `sha256_of` their tensors.

    Args:
        file: the published file, where it is here already.
        allow_partial: tensors that it lacks stay random, and the lineage names them.

    Raises:
        RequestError: another file than the card's, or one that holds more than tensors and plain values.
        WorkError: it cannot be fetched, or tensors of the encoder are missing in it.
    """
    card = load_zoo(name)
    with tempfile.TemporaryDirectory(prefix="allograft-zoo-") as temporary:
        if file is None:
            file = Path(temporary, "weights")
            fetch_zoo(name, file)
        state, file_sha256 = _read(card, Path(file))
    encoder = build(card.architecture, len(card.mean), card.mean, card.std, image_size=card.image_size)
    report = load_into(encoder.net, state, allow_partial=True)
    if report.missing and not (allow_partial and report.loaded):
        what = f"tensors of {card.architecture} are not in these weights ({report.table()})"
        raise WorkError(what, where=str(file), hint="--allow-partial takes them all the same, and leaves the others random")
    step = {"name": f"zoo:{name}", "method": card.method, "datasets": card.exposed_to, "labelled": [], "file_sha256": file_sha256}
    step |= {"missing": list(report.missing)} if report.missing else {}
    data = [{"dataset": corpus, "digest": "not ours", "licence": card.licence} for corpus in card.exposed_to]
    about = {"name": f"zoo-{name}", "method": card.method, "lineage": [step], "data": data, "image_size": card.image_size}
    return export(encoder, dir, revision=revision, **about)  # type: ignore[arg-type]


def export_timm(tag: str, dir: str | Path, *, revision: str, file: str | None = None) -> str:
    """Weights that timm publishes, converted once into an export like our own; returns `sha256_of` their tensors.

    Args:
        file: a local copy of the published weights, where there is no network.

    Raises:
        RequestError: timm has no such tag.
        WorkError: they could not be fetched.
    """
    found = timm_pretrained(tag, file)
    encoder = build(found.architecture, len(found.mean), found.mean, found.std, image_size=found.image_size)
    load_into(encoder.net, found.state)
    step = {"name": f"timm:{tag}", "method": "timm", "datasets": [], "labelled": []}
    data = [{"dataset": corpus, "digest": "not ours", "licence": found.licence} for corpus in corpora_of_tag(tag.partition(".")[2])]
    name = f"timm-{tag}"
    return export(encoder, dir, name=name, method="timm", lineage=[step], data=data, revision=revision, image_size=found.image_size)


# Corpora by the marks that timm's tags name them with.
CORPORA = {
    "in21k": ("imagenet-21k",),
    "in22k": ("imagenet-21k",),
    "in12k": ("imagenet-21k",),
    "in1k": ("imagenet-1k",),
    "inat21": ("inat2021",),
    "laion2b": ("laion-2b",),
    "laion400m": ("laion-400m",),
    "lvd142m": ("lvd-142m", "imagenet-1k", "imagenet-21k"),
    "yfcc": ("yfcc-100m",),
}


def corpora_of_tag(tag: str) -> list[str]:
    """The corpora that weights have seen, by timm's name for them (`augreg_in21k_ft_in1k`: two); the tag itself where it names none."""
    return sorted({corpus for mark, corpora in CORPORA.items() if mark in tag for corpus in corpora}) or [tag]


def _read(card: ZooCard, file: Path) -> tuple[State, str]:
    """The encoder's tensors under its own names, and the file's sha256."""
    if not file.is_file():
        raise RequestError("no such file", where=str(file))
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if card.sha256 is not None and sha256 != card.sha256:
        raise RequestError(f"not the published file of {card.name}: its sha256 is {sha256}, the card's {card.sha256}", where=str(file))
    held: Any = load_local(file) if file.suffix == ".safetensors" else _unpickled(file)
    if card.container is not None and isinstance(held, dict):
        held = held.get(card.container)
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)} if isinstance(held, dict) else {}
    state = {name.removeprefix(card.prefix): tensor for name, tensor in tensors.items() if name.startswith(card.prefix)}
    if not state:
        place = f"{card.container}: {card.prefix}" if card.container else card.prefix
        raise RequestError(f"no tensor at '{place}': not the published file of {card.name}", where=str(file))
    return state, sha256


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"it holds more than tensors and plain values, or is damaged: not read ({reason})", where=str(file)) from error
