"""Weights from elsewhere as exports like our own: timm's, the benchmark's self-supervised ResNet-50s (each with a card in `encoders/zoo/`),
and a user's.

    export_timm("resnet50.a1_in1k", "out/a1", revision="1a2b3c")
    export_zoo("moco-v2", "out/moco-v2", revision="1a2b3c", file="moco_v2_800ep_pretrain.pth.tar")
    export_own("mine.pt", "out/mine", architecture="resnet18", seen=["nih-cxr14"], labelled=[], licence="CC-BY-4.0", revision="1a2b3c")

The benchmark's files, which no library loads, are pickles. One is read once, by torch's unpickler for tensors and plain values alone
(`weights_only=True`: it runs no code of the file), checked against its card and made an export; from then on only that is read. SimCLR's
and BYOL's official files are not here: they are TensorFlow's and JAX's, whose pickles would have to be run.
"""

import hashlib
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from base.config import Strict, load
from base.errors import RequestError, WorkError, unknown
from base.paths import named, names
from encoders.build import NORMALISATIONS, PATCHES, Encoder, build, in_channels
from encoders.export import export
from encoders.weights import State, channels_of, load_into, read_checkpoint, tensors_of, timm_names, timm_pretrained

PATIENCE_S = 30.0


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
        RequestError: another file than the card's, or one that holds more than tensors and plain values, or values that are not finite.
        WorkError: it cannot be fetched, or tensors of the encoder are missing in it.
    """
    card = load_zoo(name)
    with tempfile.TemporaryDirectory(prefix="allograft-zoo-") as temporary:
        if file is None:
            file = Path(temporary, "weights")
            fetch_zoo(name, file)
        state, file_sha256 = _read(card, Path(file))
    encoder = build(card.architecture, len(card.mean), card.mean, card.std, image_size=card.image_size)
    filled = _fill(encoder, state, str(file), allow_partial)
    step = {"name": f"zoo:{name}", "method": card.method, "datasets": card.exposed_to, "labelled": [], "file_sha256": file_sha256} | filled
    data = [{"dataset": corpus, "digest": "not ours", "licence": card.licence} for corpus in card.exposed_to]
    about = {"name": f"zoo-{name}", "method": card.method, "lineage": [step], "data": data, "image_size": card.image_size}
    return export(encoder, dir, revision=revision, **about)  # type: ignore[arg-type]


def export_timm(tag: str, dir: str | Path, *, revision: str, file: str | None = None, allow_partial: bool = False) -> str:
    """Weights that timm publishes, converted once into an export like our own; returns `sha256_of` their tensors.

    Args:
        file: a local copy of the published weights, where there is no network.
        allow_partial: see `export_zoo`.

    Raises:
        RequestError: timm has no such tag, or the file cannot be read, or holds values that are not finite.
        WorkError: they could not be fetched, or tensors of the encoder are missing in them.
    """
    found = timm_pretrained(tag, file)
    encoder = build(found.architecture, len(found.mean), found.mean, found.std, image_size=found.image_size)
    where = file or f"timm:{tag}"
    filled = _fill(encoder, timm_names(encoder.net, found.state, where), where, allow_partial)
    step = {"name": f"timm:{tag}", "method": "timm", "datasets": [], "labelled": labelled_of_tag(tag.partition(".")[2])} | filled
    data = [{"dataset": corpus, "digest": "not ours", "licence": found.licence} for corpus in corpora_of_tag(tag.partition(".")[2])]
    name = f"timm-{tag}"
    return export(encoder, dir, name=name, method="timm", lineage=[step], data=data, revision=revision, image_size=found.image_size)


def export_own(
    file: str | Path,
    dir: str | Path,
    *,
    architecture: str,
    seen: Sequence[str],
    labelled: Sequence[str],
    licence: str,
    revision: str,
    normalisation: str | None = None,
    image_size: int = 224,
    allow_partial: bool = False,
) -> str:
    """A user's weights of a timm architecture, converted into an export of the folder's name; returns `sha256_of` their tensors.

    Args:
        seen: corpora whose images they were trained on. labelled: those of them whose labels they saw.
        normalisation: of the images that they were trained on, a name of `NORMALISATIONS`; timm's for the architecture unless given.
        image_size: side in pixels of these images; a vision transformer's positions are for it.
        allow_partial: see `export_zoo`.

    Raises:
        RequestError: the file cannot be read, or holds values that are not finite, or positions for another `image_size`; unknown
            architecture or normalisation.
        WorkError: tensors of the encoder are missing in it.
    """
    if normalisation is not None and normalisation not in NORMALISATIONS:
        raise unknown("normalisation", normalisation, NORMALISATIONS)
    held = tensors_of(read_checkpoint(file), str(file))
    net: Any = build(architecture, 3, image_size=image_size).net
    positions = next((tensor for name, tensor in held.items() if name.endswith("pos_embed")), None)
    if getattr(net, "pos_embed", None) is not None and positions is not None and positions.shape[1] != net.pos_embed.shape[1]:
        side = round((positions.shape[1] - net.num_prefix_tokens) ** 0.5) * PATCHES["vit"]  # else they would be interpolated
        raise RequestError(f"its positions are not for images of {image_size} px", where=str(file), hint=f"--image-size {side}")
    state = timm_names(net, held, str(file))
    cfg = net.pretrained_cfg
    own_mean, own_std = NORMALISATIONS[normalisation] if normalisation else (tuple(cfg["mean"]), tuple(cfg["std"]))
    mean, std = in_channels(own_mean, own_std, channels_of(net, state))
    encoder = build(architecture, len(mean), mean, std, image_size=image_size)
    corpora = list(dict.fromkeys([*seen, *labelled]))
    filled = _fill(encoder, state, str(file), allow_partial)
    step = {"name": f"own:{Path(dir).name}", "method": "own", "datasets": corpora, "labelled": list(labelled)} | filled
    data = [{"dataset": corpus, "digest": "not ours", "licence": licence} for corpus in corpora]
    return export(encoder, dir, name=Path(dir).name, method="own", lineage=[step], data=data, revision=revision, image_size=image_size)


def _fill(encoder: Encoder, state: State, where: str, allow_partial: bool) -> dict[str, Any]:
    """Load the tensors, all of them unless `allow_partial`; returns what the lineage says of those that were missing.

    Missing ones stay as `build` drew them, by a seed.

    Raises:
        RequestError: a loaded tensor has values that are not finite.
        WorkError: tensors of the encoder are missing, or all of them, or its layers hold others beside.
    """
    report = load_into(encoder.net, state, allow_partial=True)
    if report.missing and not (allow_partial and report.loaded):
        partial = "--allow-partial takes them all the same, and leaves the others random"
        hint = partial if report.loaded else "are they of another architecture?"
        raise WorkError(f"tensors of {encoder.architecture} are not in these weights ({report.table()})", where=where, hint=hint)
    loaded = encoder.net.state_dict()
    layers = {name.partition(".")[0] for name in loaded}
    beside = [name.removeprefix(report.prefix) for name in report.unexpected if name.startswith(report.prefix) and name.endswith(".weight")]
    foreign = [name for name in beside if name.partition(".")[0] in layers]
    if foreign and not allow_partial:
        what = f"{len(foreign)} tensors of these weights have no place in {encoder.architecture}: {', '.join(foreign[:3])}"
        raise WorkError(what, where=where, hint="are they of a deeper network? --allow-partial takes those that fit")
    bad = [name for name in report.loaded if not loaded[name].isfinite().all() or (name.endswith("running_var") and loaded[name].min() < 0)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise RequestError(f"'{bad[0]}'{more} has values that are NaN or infinite, or a variance under 0: not taken", where=where)
    if not report.missing:
        return {}
    counted = [name for name in report.loaded if not name.endswith("num_batches_tracked")]
    return {"loaded": f"{len(counted)} of {len(counted) + len(report.missing)} tensors", "missing": list(report.missing)}


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
    "ig1b": ("ig-1b",),
    "dino": ("imagenet-1k",),
    "mae": ("imagenet-1k",),
}
LABELLED = {"imagenet-1k", "imagenet-21k", "inat2021"}  # corpora of classes
UNLABELLED = ("dino", "mae", "ijepa", "lvd142m")  # marks of methods without labels


def corpora_of_tag(tag: str) -> list[str]:
    """The corpora that weights have seen, by timm's name for them (`augreg_in21k_ft_in1k`: two); the tag itself where it names none."""
    return sorted({corpus for mark, corpora in CORPORA.items() if mark in tag for corpus in corpora}) or [tag]


def labelled_of_tag(tag: str) -> list[str]:
    """Those whose labels the weights have seen, by the name again: of a method without labels what came after it (`mae_ft_in1k`)."""
    last = tag.partition("ft_")[2] if any(mark in tag for mark in UNLABELLED) else tag
    return sorted(LABELLED & set(corpora_of_tag(last))) if last else []


def _read(card: ZooCard, file: Path) -> tuple[State, str]:
    """The encoder's tensors under its own names, and the file's sha256."""
    held = read_checkpoint(file)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if card.sha256 is not None and sha256 != card.sha256:
        raise RequestError(f"not the published file of {card.name}: its sha256 is {sha256}, the card's {card.sha256}", where=str(file))
    if card.container is not None and isinstance(held, dict):
        held = held.get(card.container)
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)} if isinstance(held, dict) else {}
    state = {name.removeprefix(card.prefix): tensor for name, tensor in tensors.items() if name.startswith(card.prefix)}
    if not state:
        place = f"{card.container}: {card.prefix}" if card.container else card.prefix
        raise RequestError(f"no tensor at '{place}': not the published file of {card.name}", where=str(file))
    return state, sha256
