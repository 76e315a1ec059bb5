"""Forgetting made visible: what an encoder knows of the corpora that the runs before it were trained on, before its first step and
after its last one.

    measure(encoder, ref, size=96, place=to_device, cache_dir=None)    # {"linear_auroc": 0.81, "knn_auroc": 0.77}, on every rank

At most a thousand samples, the same ones each time, in the evaluation view, with the running statistics of batch norm. Nothing random is
drawn, so a run with these probes computes what it computes without them.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from base.seeds import rng
from engine import ranks
from pretrain import probes
from pretrain.run import DataRef
from shards.batches import Batch, BatchReader
from shards.corpus import Corpus
from shards.views import ViewsConfig

SAMPLES, SHARDS, BATCH = 1000, 10, 100  # of few shards, so that a corpus far away is not fetched for its probe


def chosen(corpus: Corpus) -> np.ndarray:
    """The ids that are looked at, a function of the corpus alone."""
    draw = rng("source probe", corpus.source.digest)
    shards = draw.permutation(len(corpus.shards))[:SHARDS]
    ids = np.concatenate([np.arange(corpus.starts[shard], corpus.starts[shard + 1]) for shard in sorted(shards)])
    return np.sort(draw.permutation(ids)[:SAMPLES])


@torch.no_grad()
def measure(
    encoder: nn.Module, ref: DataRef, *, size: int, place: Callable[[Batch], Batch], cache_dir: str | None
) -> dict[str, float | None]:
    """AUROC of a linear and of a kNN probe on the labels of that corpus; None where too few labels are known."""
    corpus = Corpus(ref.shards, (ref.split,), cache_dir, ref.without)
    id_N, world = chosen(corpus), ranks.world()
    padded_N = np.pad(id_N, (0, -len(id_N) % (BATCH * world)), constant_values=-1).reshape(-1, world, BATCH)[:, ranks.rank()]
    reader = BatchReader([corpus], ViewsConfig(kind="eval", size=size), corpus.labels, seed=0)
    parts: list[tuple[Tensor, ...]] = []
    encoder.eval()
    for read in reader.batches(((id_B, np.zeros_like(id_B)) for id_B in padded_N), workers=0):
        batch = place(read)
        assert batch.target_BL is not None
        assert batch.mask_BL is not None
        index_B = torch.where(read.valid_B, read.index_B, -1).to(batch.target_BL.device)
        found = (encoder(batch.views[0]).float(), index_B, batch.target_BL, batch.mask_BL)
        parts.append(tuple(ranks.all_gather(values).cpu() for values in found))
    encoder.train()
    z_ND, index_N, target_NL, mask_NL = (torch.cat(columns) for columns in zip(*parts, strict=True))
    known = index_N >= 0
    held = (z_ND[known], index_N[known], target_NL[known], mask_NL[known])
    scores = {"linear_auroc": probes.linear_auroc(*held), "knn_auroc": probes.knn_auroc(*held)}
    return {name: None if value is None else round(value, 6) for name, value in scores.items()}
