"""Supervised pretraining on the union of the corpora's labels: one linear layer, and cross-entropy over what is known.

    loss = (sum_il m_il BCE(w_l . z_i, y_il) + sum_ig m_ig CE(W_g z_i, y_ig)) / (sum_il m_il + sum_ig m_ig)     over the global batch

l: labels that stand alone; g: sets of classes of which exactly one holds (a multi-class dataset); m is 1 where the answer is known. What a
dataset does not tell is unknown for its samples and costs nothing, so datasets with different label sets train together. Used from random
weights, from published ones, or after self-supervision (continual pretraining).

Official hyper-parameters, from CheXNet (Rajpurkar et al. 2017, arXiv 1711.05225), which trains on the labels of ChestX-ray14 in this way:
DenseNet-121 from ImageNet weights, Adam (0.9, 0.999), lr 1e-3, batch 16, 224 px, horizontal flips.
Deviations: their rate falls tenfold when the validation loss stalls and the best epoch is kept; here it falls along a cosine and the
last weights are exported, because no step of a pretraining looks at the validation split. The mean runs over the known labels of the
global batch, a set of classes counting as one. Classes that another dataset has as labels of their own are labels here too.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError
from engine.losses import label_loss, least_constant
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch


class SupervisedOptions(Strict):
    """Nothing to set: the loss has no free number."""


class Supervised(Method):
    """See the module's header. Legend: L labels."""

    views = ("one",)
    labelled = True
    Options = SupervisedOptions

    def __init__(self, encoder: nn.Module, options: SupervisedOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.classifier = nn.Linear(self.width, len(facts.labels))

    def forward(self, batch: "Batch") -> Output:
        """views: one u8 BCHW; target_BL 0 or 1; mask_BL 1 where known."""
        if batch.target_BL is None or batch.mask_BL is None:
            raise RequestError("supervised pretraining needs labels, and the loader gives none", where="pretrain: data")
        z_BD = self.encode(batch.views[0])
        logits_BL: Tensor = self.classifier(z_BD)
        with torch.autocast(logits_BL.device.type, enabled=False):
            loss = label_loss(logits_BL, batch.target_BL, batch.mask_BL, self.facts.exclusive)
        return Output(loss, {"backbone": z_BD.detach().float()}, {})

    def chance_loss(self, global_batch: int) -> float | None:
        """That of the best constant answer."""
        facts = self.facts
        return least_constant(torch.tensor(facts.rates), torch.tensor(facts.known), facts.exclusive) if facts.rates else None

    @classmethod
    def check(cls, options: SupervisedOptions, facts: Facts) -> None:
        """Raises RequestError without labels."""
        if not facts.labels:
            raise RequestError("supervised pretraining needs labels, and the datasets' cards name none", where="pretrain: data")


METHODS = {"supervised": Supervised}
