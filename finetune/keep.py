"""The trained encoder of a cell, exported beside its result: `encoder/` in the cell's folder.

    check_named(architecture, task, strategy, where)    # what cannot be exported is refused by names alone, before anything runs
    check(encoder, key)                                 # and before a cell trains
    keep(config, network, corpus, folder)               # after it, with the chosen epoch's weights in place

Matrices that lora added are merged into the weights they stand beside, so that it loads as any other encoder does.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from base import paths
from base.errors import RequestError
from encoders.build import Encoder
from encoders.export import export, read_export
from encoders.local import local_encoder
from encoders.truncate import rebuilt
from finetune.cell import CellConfig
from finetune.heads import canvas_of
from finetune.network import Network
from finetune.strategies import slim
from finetune.strategies.lora import merge
from finetune.task import Task
from shards.corpus import Corpus

WHAT = "this encoder cannot be exported: it is of volumes, or narrowed inside a stage"


def check_named(architecture: str, task: Task, strategy: Mapping[str, Any], where: str) -> None:
    """Raises RequestError: of this strategy and task no encoder can be exported, whatever its weights."""
    if task.volume or (strategy["name"] == "slim" and slim.within_stage(architecture, strategy["cut"])):
        raise RequestError(WHAT, where=where, hint="cells.keep=nothing")


def check(encoder: Encoder, key: str) -> None:
    """Raises RequestError: an encoder that cannot be built again from its facts, of volumes or narrowed inside a stage."""
    with torch.device("meta"):
        fresh = rebuilt(encoder)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (merge(encoder.net), fresh.net)]
    if shapes[0] != shapes[1]:
        raise RequestError(WHAT, where=f"cell {key}: keep", hint="keep=nothing")


def keep(config: CellConfig, network: Network, corpus: Corpus, folder: Path) -> None:
    """Export the network's encoder as it stands, for images of the side that it was given, which is padded for masks; the lineage goes on
    from the source's."""
    plain = copy.deepcopy(network.encoder).cpu()
    plain.net = merge(plain.net)
    lineage, data = list[dict[str, Any]](), list[dict[str, Any]]()
    if config.encoder_dir is not None:
        info = read_export(local_encoder(config.encoder_dir, config.encoder_sha256), verify=False)
        lineage, data = info.lineage, info.data
    name = str(config.strategy["name"])
    dataset = config.task.dataset
    step = {
        "name": f"cell {config.key}",
        "key": config.key,
        "method": name,
        "source": config.source,
        "strategy": config.strategy,
        "task": config.task.task,
        "datasets": [dataset],
        "labelled": [dataset],
        "seed": config.seed,
    }
    read = {"dataset": dataset, "split": "train", "digest": config.manifest_digest, "licence": str(corpus.manifest.card.licence)}
    export(
        plain,
        folder,
        name=f"{config.source}-{name}-{config.task.task}",
        method=name,
        lineage=[*lineage, step],
        data=[*data, read],
        revision=paths.revision(),
        image_size=canvas_of((config.resolution, config.resolution), network.stride)[0],
    )
