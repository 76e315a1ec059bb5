"""The published form of an encoder: a folder that plain timm loads, in a Python that never heard of Allograft.

    sha256 = export(encoder, "out/export", name="simclr", method="simclr", lineage=[...], data=[...], revision="1a2b3c", image_size=96)
    info = read_export("out/export")                             # ExportInfo; info.sha256 == sha256
    timm.create_model("local-dir:out/export", pretrained=True)   # what consumers do

Encoders that plain timm cannot rebuild (CBR, AlexNet, truncated ones) have `encoder.onnx` instead of `config.json`: the program of
normalised images to features, of any number of images, with the weights in it, for onnxruntime. Slim ResNets are timm's with an argument.

Files: `config.json` (timm's layout), `model.safetensors` (fp32, no prefix, batch-norm statistics included), `README.md` (model card),
`allograft.json` (provenance; ExportInfo), `golden.safetensors` (a phantom as stored pixels, as preprocessed tensor, and its features).

The sha256 that identifies an encoder is `weights.sha256_of` its tensors; that of the file stands beside it in `allograft.json`.
"""

import copy
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict, parse
from base.errors import RequestError, WorkError
from encoders.build import Encoder, in_channels, model_args
from encoders.cuts import registered_by
from encoders.model_card import model_card
from encoders.truncate import Truncated, rebuilt
from encoders.weights import State, load_local, sha256_of

GOLDEN_SEED = 0
PROGRAM = "encoder.onnx"


class ExportInfo(Strict):
    """`allograft.json`. `labelled_datasets`: datasets whose labels any step of the lineage has seen; `widths`, `cut`, `flat`: see Encoder
    and Truncated."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    method: str
    architecture: str
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    widths: tuple[int, ...] | None = None
    cut: str | None = None
    flat: int | None = None
    sha256: str
    file_sha256: str
    lineage: list[dict[str, Any]]
    labelled_datasets: list[str]
    data: list[dict[str, Any]]
    licence: str
    revision: str
    torch: str
    timm: str

    @property
    def by_timm(self) -> bool:
        """Whether plain timm can rebuild it."""
        return self.cut is None and registered_by(self.architecture) is None

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation under which these weights take images of that many channels."""
        return in_channels(self.mean, self.std, channels)


def export(
    encoder: Encoder,
    dir: str | Path,
    *,
    name: str,
    method: str,
    lineage: list[dict[str, Any]],
    data: list[dict[str, Any]],
    revision: str,
    image_size: int,
) -> str:
    """Write the folder and return `sha256_of` the tensors in it.

    Args:
        lineage: the steps that led here, oldest first; a step's `labelled` lists the datasets whose labels it used.
        data: a dict a dataset, with `dataset`, `digest`, `licence`.
    """
    import timm
    from safetensors.torch import save_file

    place = Path(dir)
    place.mkdir(parents=True, exist_ok=True)
    state = _plain(encoder.net.state_dict())
    # A fresh network, so that wrappers, memory layouts and replaced norms of training leave no trace in the golden numbers.
    fresh = rebuilt(encoder)
    fresh.net.load_state_dict(state, strict=True)
    save_file(state, str(place / "model.safetensors"), metadata={"format": "pt"})
    save_file(golden(fresh, image_size), str(place / "golden.safetensors"), metadata={"format": "pt"})
    licence = "; ".join(sorted({str(entry["licence"]) for entry in data if entry.get("licence")})) or "unknown"
    info = ExportInfo(
        name=name,
        method=method,
        architecture=encoder.architecture,
        in_chans=encoder.in_chans,
        mean=encoder.mean,
        std=encoder.std,
        image_size=image_size,
        widths=encoder.widths,
        cut=encoder.cut if isinstance(encoder, Truncated) else None,
        flat=encoder.flat if isinstance(encoder, Truncated) else None,
        sha256=sha256_of(state),
        file_sha256=hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest(),
        lineage=lineage,
        labelled_datasets=sorted({item for step in lineage for item in step.get("labelled", ())}),
        data=data,
        licence=licence,
        revision=revision,
        torch=torch.__version__,
        timm=timm.__version__,
    )
    if not info.by_timm:
        write_program(fresh, place / PROGRAM, image_size)
    else:
        (place / "config.json").write_text(json.dumps(_timm_config(fresh, info), indent=2) + "\n")
    (place / "README.md").write_text(model_card(info))
    (place / "allograft.json").write_text(json.dumps(info.model_dump(mode="json", by_alias=True), indent=2) + "\n")
    return info.sha256


def read_export(dir: str | Path, verify: bool = True) -> ExportInfo:
    """What `allograft.json` says; with `verify`, the tensors are hashed and compared.

    Raises:
        RequestError: no export there.
        WorkError: the tensors are not those that were exported.
    """
    file = Path(dir) / "allograft.json"
    if not file.is_file():
        raise RequestError("no exported encoder here", where=str(file))
    info = parse(json.loads(file.read_text()), ExportInfo, str(file))
    if verify and sha256_of(load_local(dir)) != info.sha256:
        raise WorkError("the weights are not those that were exported", where=str(Path(dir) / "model.safetensors"))
    return info


def golden(encoder: Encoder, image_size: int) -> dict[str, Tensor]:
    """A phantom as stored pixels u8 BCHW, as the preprocessed float tensor, and its features z_BD (eval mode, one thread)."""
    from shards import phantoms

    draw = phantoms.chest if encoder.in_chans == 1 else phantoms.fundus
    image = torch.from_numpy(draw(GOLDEN_SEED, 0, image_size).image)
    pixels = (image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None]).contiguous()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoder.eval()
        with torch.inference_mode():
            preprocessed = encoder.normalise(pixels)
            return {"pixels": pixels, "preprocessed": preprocessed.clone(), "features": encoder(pixels).clone()}
    finally:
        torch.set_num_threads(threads)


def write_program(encoder: Encoder, file: Path, image_size: int) -> None:
    """The encoder as an ONNX program: `preprocessed` float B,C,side,side -> `features` B,D, for any B. Evaluation mode, no paths in it."""
    import onnx

    network = copy.deepcopy(encoder).eval()
    network.normalise = nn.Identity()  # type: ignore[assignment]
    for module in network.modules():
        if isinstance(module, nn.ConstantPad2d):
            module.value = 1e-30  # onnxruntime takes a padding by 0 into the pooling after it, whose own padding is by -inf
    x = torch.zeros(2, encoder.in_chans, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        traced = torch.onnx.export(
            network,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=["preprocessed"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert traced is not None
    model = traced.model_proto
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]  # stack traces of this machine
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString(deterministic=True))


def _plain(state: State) -> State:
    """Contiguous copies on the CPU; floating-point tensors as fp32."""
    return {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).cpu().contiguous().clone()
        for name, tensor in state.items()
    }


def _timm_config(encoder: Encoder, info: ExportInfo) -> dict[str, Any]:
    """timm's config.json. `pretrained_cfg` is written whole: the architecture's defaults would claim somebody else's weights and paper."""
    shape = [info.in_chans, info.image_size, info.image_size]
    declared: Any = encoder.net.pretrained_cfg
    return {
        "architecture": info.architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": "token" if encoder.image_size else "avg",
        "model_args": model_args(info.architecture, info.in_chans, encoder.image_size, encoder.widths),
        "pretrained_cfg": {
            "tag": f"allograft_{info.name}",
            "license": info.licence,
            "origin_url": "",
            "description": f"{info.method}, tensors sha256 {info.sha256}, Allograft revision {info.revision}",
            "paper_ids": [],
            "custom_load": False,
            "input_size": shape,
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": 0,
            "pool_size": None,
            # Facts of the network's shape, which timm needs for another number of channels or a fresh head.
            "first_conv": declared["first_conv"],
            "classifier": declared["classifier"],
        },
    }
