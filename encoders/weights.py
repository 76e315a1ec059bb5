"""Weights: where they come from, how they are put into a network, and proof that they were.

    state = load_local("OUT/pretrain/simclr-.../export")       # a folder or a .safetensors file
    report = load_into(encoder.net, state)                      # Loaded(loaded, missing, unexpected, reshaped, prefix)
    sha256_of(encoder.net.state_dict()) == sha256_of(state)     # the transplant is real

Pickles are read by torch's unpickler for tensors and plain values alone (`weights_only=True`), which runs no code of the file. A checkpoint
that fits less than 95 % of the network's tensors is refused with the table of what did not fit: a wrong key prefix loads nothing and trains
from random without a word in most code.
"""

import argparse
import hashlib
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import RequestError, WorkError, in_a_line, unknown

State = dict[str, Tensor]
ENOUGH = 0.95
log = logging.getLogger(__name__)

# Of what is no tensor and no plain value, PyContrast's files hold their command line: a Namespace, which is a dictionary with dots.
HARMLESS: list[Any] = [argparse.Namespace]
TENSORS_ALONE = "weights are a .safetensors file, or a state_dict that torch.save wrote"
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # under which a checkpoint holds its tensors; timm's, in timm's order

# Longest first where one begins another. MoCo and PCL: module.encoder_q.; InfoMin, InsDis, PIRL: module.encoder.; SwAV and kin: module.
PREFIXES = ("module.encoder_q.", "module.encoder.", "module.backbone.", "module.", "encoder_q.", "encoder.", "backbone.", "net.")


@dataclass(frozen=True)
class Loaded:
    """What became of each tensor. `reshaped`: the first convolution, adapted to another number of input channels, and positions of
    another image size, interpolated."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    prefix: str = ""

    def table(self) -> str:
        """Counts and the first names of each kind, for an error or a log line."""
        rows = [f"loaded {len(self.loaded)}" + (f" (prefix '{self.prefix}' removed)" if self.prefix else "")]
        for kind in ("missing", "unexpected", "reshaped"):
            names = getattr(self, kind)
            if names:
                rows.append(f"{kind} {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        return "; ".join(rows)


def sha256_of(state: Mapping[str, Tensor]) -> str:
    """64 hex digits over names (sorted), dtypes, shapes and bytes of all tensors: independent of file format and memory layout."""
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def load_local(path: str | Path) -> State:
    """Tensors of a `.safetensors` file, or of `model.safetensors` in a folder.

    Raises:
        RequestError: nothing there, or another kind of file.
    """
    place = Path(path)
    file = place / "model.safetensors" if place.is_dir() else place
    if not file.is_file():
        raise RequestError("no weights here", where=str(file), hint="expected an exported encoder's folder or a .safetensors file")
    if file.suffix != ".safetensors":
        raise RequestError(f"'{file.suffix}' is no exported encoder", where=str(file), hint=f"allograft weights NAME --file {file}")
    return _safetensors(file)


def _safetensors(file: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(file)))
    except SafetensorError as error:
        raise RequestError("not a safetensors file, or one that was cut short", where=str(file), hint=TENSORS_ALONE) from error


def read_checkpoint(path: str | Path) -> Any:
    """What a `.safetensors` file or a file of torch.save holds: tensors by name, or these under keys beside plain values.

    Raises:
        RequestError: no such file, or one that is empty or damaged, or holds more than tensors and plain values.
    """
    file = Path(path)
    if not file.is_file():
        raise RequestError("a folder, not a file of weights" if file.is_dir() else "no such file", where=str(file))
    if file.stat().st_size == 0:
        raise RequestError("this file is empty", where=str(file), hint=TENSORS_ALONE)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of the unpickler, about versions of pickles
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes anything of an unpickler
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f"it holds more than tensors and plain values ({needed[1]}), which could run code: not read" if needed else ""
        raise RequestError(more or "it is damaged, or not what torch.save writes", where=str(file), hint=TENSORS_ALONE) from error


def tensors_of(held: Any, where: str) -> State:
    """The tensors by name in what a checkpoint holds, bare or in one of `CONTAINERS`, without the prefixes of torch's wrappers.

    Raises:
        RequestError: there are none.
    """
    from timm.models import clean_state_dict

    whole = held if isinstance(held, dict) else {}
    inner = next((whole[key] for key in CONTAINERS if isinstance(whole.get(key), dict)), whole)
    state = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    if not state:
        keys = f", but {', '.join(map(str, list(whole)[:6]))}" if whole else ""
        raise RequestError(f"it holds no tensors by name{keys}", where=where, hint=TENSORS_ALONE)
    return clean_state_dict(state)


@dataclass(frozen=True)
class Published:
    """Weights that timm publishes, under the names of their file, and the preprocessing and terms they came with."""

    state: State
    architecture: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    licence: str


def timm_pretrained(tag: str, file: str | None = None) -> Published:
    """The weights that timm knows as `tag` (`resnet18.a1_in1k`), as they were published.

    Args:
        file: a local copy of those weights instead of the download.

    Raises:
        RequestError: timm has no such tag, or the file cannot be read.
        WorkError: the download failed.
    """
    from timm.models import get_pretrained_cfg, load_state_dict_from_hf

    architecture = timm_architecture(tag)
    cfg: dict[str, Any] = get_pretrained_cfg(tag).to_dict()
    if file is not None:
        held = read_checkpoint(file)
    else:
        try:
            held = load_state_dict_from_hf(cfg["hf_hub_id"])
        except Exception as error:
            raise WorkError(
                f"could not be fetched ({in_a_line(error)})",
                where=f"timm:{tag}",
                hint=f"fetch its file where there is a network, then: allograft weights timm:{tag} --file FILE",
            ) from error
    return Published(
        state=tensors_of(held, file or f"timm:{tag}"),
        architecture=architecture,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        image_size=int(cfg["input_size"][-1]),
        licence=str(cfg.get("license") or "unknown"),
    )


def timm_names(net: Any, state: State, where: str) -> State:
    """The tensors under the names of this timm network, by timm's own filter for checkpoints of its family; without the classifier.

    Raises:
        WorkError: the filter takes them for another network's.
    """
    module, prefix = sys.modules[type(net).__module__], _prefix(net.state_dict(), state)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    try:
        if hasattr(module, "checkpoint_filter_fn"):
            state = module.checkpoint_filter_fn(state, net)
        elif hasattr(module, "_filter_torchvision_pretrained"):  # DenseNet's, which takes the tensors alone and renames them in place
            state = module._filter_torchvision_pretrained(dict(state))
    except Exception as error:  # the filters index and reshape what they expect
        what = f"not weights of {net.pretrained_cfg['architecture']}: timm's filter for them fails ({in_a_line(error)})"
        raise WorkError(what, where=where) from error
    named = net.pretrained_cfg.get("classifier") or ()
    heads = [named] if isinstance(named, str) else named
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in heads}


def channels_of(net: nn.Module, state: Mapping[str, Tensor]) -> int:
    """1 where the first convolution in the state is for grey images, else 3."""
    target = net.state_dict()
    first = next(name for name, tensor in target.items() if tensor.ndim == 4)
    found = state.get(_prefix(target, state) + first)
    return 1 if found is not None and found.ndim == 4 and found.shape[1] == 1 else 3


def timm_architecture(tag: str) -> str:
    """The architecture of weights that timm knows as `tag`.

    Raises:
        RequestError: timm has no such tag, or we no such architecture.
    """
    import timm

    from encoders.cuts import family

    architecture = tag.partition(".")[0]
    family(architecture)
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag not in known:
        raise unknown("published weights", tag, known)
    return architecture


def adapt_input(weight_OIHW: Tensor, in_chans: int) -> Tensor:
    """A first convolution for 1 instead of 3 input channels, or 3 instead of 1.

    Summed over the channels (3 to 1), or repeated and divided by 3 (1 to 3): the output on a grey image, and on its copy in three
    channels, is the same, as long as the normalisation does not differ between the channels.

    Raises:
        RequestError: any other pair of channels.
    """
    have = weight_OIHW.shape[1]
    if have == in_chans:
        return weight_OIHW
    if have == 3 and in_chans == 1:
        return weight_OIHW.sum(dim=1, keepdim=True)
    if have == 1 and in_chans == 3:
        return weight_OIHW.repeat(1, 3, 1, 1) / 3
    raise RequestError(f"cannot adapt a first convolution of {have} input channels to {in_chans}")


def load_into(net: nn.Module, state: Mapping[str, Tensor], allow_partial: bool = False) -> Loaded:
    """Copy tensors into the network, whatever prefix they were saved under, and say what became of each.

    `num_batches_tracked` counters are not counted for or against (old checkpoints lack them).

    Raises:
        WorkError: less than 95 % of the network's tensors were found, unless `allow_partial`.
    """
    target = net.state_dict()
    prefix = _prefix(target, state)
    source = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    first = next((name for name, tensor in target.items() if tensor.ndim == 4), None)
    ready: State = {}
    reshaped: list[str] = []
    for name, wanted in target.items():
        tensor = source.get(name)
        if tensor is None:
            continue
        if tensor.shape == wanted.shape:
            ready[name] = tensor
        elif name == "pos_embed" and tensor.shape[2] == wanted.shape[2]:
            ready[name] = _resized_positions(tensor, wanted.shape[1], net)
            reshaped.append(name)
        elif name == first and tensor.shape[0] == wanted.shape[0] and tensor.shape[2:] == wanted.shape[2:]:
            ready[name] = adapt_input(tensor, wanted.shape[1])
            reshaped.append(name)
    counted = [name for name in target if not name.endswith("num_batches_tracked")]
    report = Loaded(
        loaded=tuple(ready),
        missing=tuple(name for name in counted if name not in ready),
        unexpected=tuple(name for name in state if name.removeprefix(prefix) not in ready or not name.startswith(prefix)),
        reshaped=tuple(reshaped),
        prefix=prefix,
    )
    found = 1 - len(report.missing) / len(counted)
    if found < ENOUGH and not allow_partial:
        raise WorkError(f"only {found:.0%} of the network's tensors are in these weights ({report.table()})")
    net.load_state_dict(ready, strict=False)
    if prefix or report.missing or reshaped:
        log.warning("weights: %s", report.table())
    return report


def _resized_positions(tensor_1TD: Tensor, tokens: int, net: Any) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    side = round((tokens - net.num_prefix_tokens) ** 0.5)
    resized: Tensor = resample_abs_pos_embed(tensor_1TD, [side, side], num_prefix_tokens=net.num_prefix_tokens)
    return resized


def _prefix(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The known prefix under which most of the network's tensors stand in the state; none when it makes no difference."""
    return max(("", *PREFIXES), key=lambda prefix: sum(prefix + name in state for name in target))
