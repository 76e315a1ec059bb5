"""The two ends of a run: the encoder it begins with, and the exported folder and facts it ends with."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from base import storage
from base.config import canonical_json
from base.errors import RequestError
from base.paths import revision
from base.seeds import seed_of
from encoders.build import Encoder, build
from encoders.export import ExportInfo, export, read_export
from encoders.local import local_encoder
from encoders.weights import load_into, load_local
from pretrain.methods import Method
from pretrain.run import PretrainConfig, without_name

PREFIX = "encoder.net."  # of the encoder's tensors inside a method's state


def begin(config: PretrainConfig) -> tuple[Encoder, ExportInfo | None]:
    """The encoder as training begins: random, or the tensors of an earlier export under that export's normalisation.

    Raises:
        RequestError: the weights are not those of the configuration, or of another architecture.
    """
    seed, size = seed_of("encoder", config.seed), config.recipe.views.size
    if config.start_from is None:
        return build(config.architecture, config.in_chans, seed=seed, image_size=size), None
    place = local_encoder(config.start_from, config.start_from_sha256)
    info = read_export(place)
    if info.sha256 != config.start_from_sha256:
        raise RequestError("these weights are not those that the run was planned with", where=config.start_from)
    if info.architecture != config.architecture:
        raise RequestError(f"weights of {info.architecture} do not fit {config.architecture}", where=config.start_from)
    mean, std = info.normalisation(config.in_chans)
    encoder = build(config.architecture, config.in_chans, mean, std, seed=seed, image_size=size)
    load_into(encoder.net, load_local(place))
    return encoder, info


def finish(
    config: PretrainConfig, method: Method, parent: ExportInfo | None, state: dict[str, Tensor], licences: list[str], steps: int
) -> dict[str, Any]:
    """Write `<out>/export` and return what result.json says about the encoder.

    Args:
        state: the method's whole state on the CPU; the encoder's tensors are exported, heads stay behind.
        licences: of the datasets, in the configuration's order.
    """
    trained, recipe = method.encoder, config.recipe
    assert isinstance(trained, Encoder)
    encoder = build(config.architecture, config.in_chans, trained.mean, trained.std, image_size=recipe.views.size)
    weights = {name[len(PREFIX) :]: value for name, value in state.items() if name.startswith(PREFIX)}
    encoder.net.load_state_dict(weights, strict=True)
    datasets = [ref.dataset for ref in config.data]
    step: dict[str, Any] = {"name": config.name, "key": config.key, "method": recipe.method, "datasets": datasets}
    step |= {"labelled": datasets if method.labelled else [], "seed": config.seed, "steps": steps}
    if config.labels:
        step["labels"] = config.labels
    if config.replay is not None:
        step |= {"replay": config.replay, "shares": {f"{ref.dataset} {ref.split}": round(ref.weight, 6) for ref in config.data}}
    lineage = list(parent.lineage) if parent else []
    if parent and lineage:
        lineage[-1] = lineage[-1] | {"sha256": parent.sha256}
    seen = list(parent.data) if parent else []  # terms and digests of all data that shaped these weights, not of the last step alone
    seen += [
        {"dataset": ref.dataset, "split": ref.split, "digest": ref.digest, "licence": licence}
        | ({"without": without_name(ref.without), "left_out": len(ref.without)} if ref.without else {})
        for ref, licence in zip(config.data, licences, strict=True)
    ]
    data = list({canonical_json(entry): entry for entry in seen}.values())
    with tempfile.TemporaryDirectory(prefix="allograft-export-") as folder:
        sha256 = export(
            encoder,
            Path(folder),
            name=config.name,
            method=recipe.method,
            lineage=[*lineage, step],
            data=data,
            revision=revision(),
            image_size=recipe.views.size,
        )
        labelled = read_export(folder, verify=False).labelled_datasets
        storage.remove(storage.join(config.out, "export"))
        storage.put_dir(folder, storage.join(config.out, "export"), last=("allograft.json",))
    return {
        "schema": 1,
        "name": config.name,
        "key": config.key,
        "method": recipe.method,
        "architecture": config.architecture,
        "encoder_sha256": sha256,
        "start_from": config.start_from_name,
        "start_from_sha256": config.start_from_sha256,
        "seed": config.seed,
        "lineage": [*lineage, step | {"sha256": sha256}],
        "labelled": list(labelled),
        "revision": revision(),
    }
