"""A batch in parts whose gradients are averaged, and their outputs as one: `joined([forward(part) for part in parts(batch, 4)])`."""

from typing import Any

import torch
from torch import Tensor

from pretrain.methods import Output
from shards.batches import Batch


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch in equal parts, in order."""
    if count == 1:
        return [batch]
    cut: dict[str, Any] = {name: value.chunk(count) for name in batch._fields if isinstance(value := getattr(batch, name), Tensor)}
    views = list(zip(*(view.chunk(count) for view in batch.views), strict=True))
    pieces: list[dict[str, Any]] = [{name: chunks[i] for name, chunks in cut.items()} for i in range(count)]
    return [batch._replace(views=list(views[i]), **pieces[i]) for i in range(count)]


def joined(outputs: list[Output]) -> Output:
    """Micro-batches' outputs as one: means of the scalars, all features."""
    if len(outputs) == 1:
        return outputs[0]
    loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    features = {name: torch.cat([output.features[name] for output in outputs]) for name in outputs[0].features}
    logs = {name: torch.stack([output.logs[name] for output in outputs]).mean() for name in outputs[0].logs}
    return Output(loss, features, logs)
