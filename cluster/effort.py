"""What a cell takes, estimated before it runs, so that the longest begin first and none of them is left over at the end.

    share = effort(config, {"train": 700, "val": 100, "test": 200}, forward=3.6e9)      # operations
    estimated(config)                                                                   # the same, by its manifest and its network

An upper estimate for an order, not a time: early stopping is not foreseen, and what a cut leaves out of a network is counted.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

from finetune.catalogue import STRATEGIES
from finetune.cell import CellConfig

HEAD = 1e-3  # of a forward pass: one image in one epoch of a head on kept features


def effort(config: CellConfig, images: Mapping[str, int], forward: float) -> float:
    """Operations of a cell: images x epochs x operations of an image x what the strategy makes of it.

    Args:
        images: of each split, whole.
        forward: operations of one image through the network, once.
    """
    if config.role == "similarity":
        from finetune.similarity import IMAGES

        return 2 * min(images.get("val", 0), IMAGES) * forward
    strategy = STRATEGIES[str(config.strategy["name"])]
    train, val = images.get("train", 0) * config.fraction, images.get("val", 0)
    test = 0 if config.role != "cell" else images.get("test", 0)
    by, linear = strategy.trains_by, config.task.linear.epochs * HEAD
    if by is None:
        return (train + val + test) * forward
    if by == "linear":
        return (train * (1 + linear) + val + test) * forward
    probe = train * (1 + linear) if strategy.probe else 0.0
    epochs = config.task.recipe.epochs
    return (probe + epochs * (train * strategy.passes + val) + test) * forward


def estimated(config: CellConfig) -> float:
    """The effort of a cell whose data and architecture are looked up; infinite where they cannot be: it fails first, and says why."""
    try:
        counts, channels, slices = _corpus(config.shards, config.manifest_digest, config.task.volume)
        forward = slices * forward_of(config, channels)
    except Exception:  # noqa: BLE001  it only sorts a line, so it may never end a study; what is wrong with a cell its own run says
        return math.inf
    return effort(config, counts, forward)


@lru_cache(maxsize=256)
def _corpus(shards: str, digest: str, volume: bool) -> tuple[Mapping[str, int], int, int]:
    """Images by split, channels of an image, and images that one sample counts for. `digest` is a part of what is remembered."""
    from shards import manifest

    held = manifest.read(shards)
    slices = (held.card.slab or 1) if volume else 1
    return held.counts, held.card.channels // slices, slices


def forward_of(config: CellConfig, channels: int) -> float:
    """Operations of one image through the network with the task's head; a network without values, once for all cells that share it."""
    import torch

    from encoders.build import build
    from engine.work import pretend
    from finetune.transplant import assemble

    task = config.task
    key = (config.architecture, channels, config.resolution, task.task, task.kind)
    if key not in _KNOWN:
        with torch.device("meta"):  # not under pretend: timm reads values as it builds, which are not there
            encoder = build(config.architecture, channels, image_size=config.resolution)
            network = assemble(encoder, task.model_copy(update={"volume": False}), 0, linear=task.kind != "segmentation").eval()
        with pretend() as work, torch.no_grad():
            network.to_empty(device="cpu")
            before = work.flops
            network(torch.empty(2, channels, config.resolution, config.resolution, dtype=torch.uint8))
        _KNOWN[key] = (work.flops - before) / 2
    return _KNOWN[key]


_KNOWN: dict[tuple[str, int, int, str, str], float] = {}
