"""How like the features of a source are to those of random weights, cut by cut: what `similarity: auto` guides a search by.

rows = similarity_rows(evaluator, other)        # other: the same network with random weights

Nothing is trained and no label is read. Features are means over positions; linear CKA in float64, debiased (analysis.similarity): the plain
one of a few hundred images rises with the number of channels, and so with depth, whatever the weights.
"""

import math

import numpy as np
import torch
from torch import Tensor

from analysis.activations import walk
from analysis.similarity import cka
from base.errors import WorkError
from base.seeds import seed_of
from encoders.build import Encoder
from finetune import data
from finetune.evaluate import Evaluator
from finetune.features import chunks
from finetune.heads import pad
from finetune.measure import Row

IMAGES = 300  # of validation, at most
METRIC = "cka_debiased"


def similarity_rows(evaluator: Evaluator, other: Encoder) -> list[Row]:
    """A metric row for each cut of the evaluator's encoder, whose name is the row's class: its features against those of `other` for the
    same validation images, those whose ids hash lowest with the cell's seed.

    Raises:
        WorkError: features that never change or are not finite, or images too few for CKA.
    """
    arrays, network = evaluator.arrays("val"), evaluator.module
    names = [cut.name for cut in network.encoder.cuts]
    chosen = sorted(range(len(arrays)), key=lambda i: seed_of("similarity", evaluator.config.seed, arrays.ids[i]))[:IMAGES]
    index = np.array(sorted(chosen), np.int64)
    images = (pad(data.as_input(arrays.image[index[part]], arrays.slices), network.stride) for part in chunks(len(index), evaluator.chunk))
    held: list[list[tuple[Tensor, ...]]] = [[] for _ in names]
    for taken in walk([network.encoder, other.to(evaluator.device)], images, names):
        for parts, maps in zip(held, zip(*taken, strict=True), strict=True):
            parts.append(tuple(x.double().flatten(2).mean(2) for x in maps))
    rows = []
    for name, parts in zip(names, held, strict=True):
        x_NP, y_NP = (torch.cat(side) for side in zip(*parts, strict=True))
        value = cka(x_NP, y_NP, debiased=True)
        if not math.isfinite(value):
            raise WorkError(f"similarity to random weights at {name} is not defined on {len(index)} validation images")
        rows.append({"split": "val", "class": name, "metric": METRIC, "unit": "fraction", "value": value, "n": len(index)})
    return rows
