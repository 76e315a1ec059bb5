"""SwAV: from one view predict the cluster of another (Caron et al. 2020, arXiv 2006.09882).

Equations 1 to 3, z projections and c_k prototypes of length 1, q_s the soft assignment of view s by Sinkhorn over the global batch, so that
every prototype gets the same share (pretrain.clusters); s runs over the first two views, t over all others:

    p_t^(k) = exp(z_t . c_k / T) / sum_k' exp(z_t . c_k' / T),    loss = mean over s and t != s of -sum_k q_s^(k) log p_t^(k)

Official hyper-parameters (appendix A.1 and the official scripts): ResNet-50, 800 epochs, batch 4096, LARS with lr 4.8, weight decay 1e-6,
10 epochs of warm-up, cosine decay to a thousandth, T 0.1, epsilon 0.05, 3 iterations, 3000 prototypes frozen in the first epoch, projector
2048-128, 2 crops of 224 px and 6 of 96. At batch 256: lr 0.6, no warm-up, and a queue of 3840 from epoch 15 on, whose projections take part
in the assignment.

Parts: lightly's SwaVProjectionHead. Its prototypes have a bias, which says what is frequent and so undoes equal shares; its Sinkhorn
overflows in half precision. Both are written here and in pretrain.clusters.
Deviations: the queue is one for all ranks, not a part on each, so that the number of ranks changes nothing. Prototypes are scaled to length
1 within the loss too, so that their gradient has no part along them, which the scaling after each step would remove.
Biases and norms have neither weight decay nor LARS' scaling, where the official code treats all parameters alike.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.errors import RequestError
from engine import ranks, zero
from pretrain.clusters import check_count, scaled_count, sinkhorn
from pretrain.memory import check_queue
from pretrain.methods import Facts, Method, Output

if TYPE_CHECKING:
    from shards.batches import Batch

ASSIGNED = 2  # views, the first ones, that are assigned to clusters
PROTOTYPES, QUEUE = 3000, 3840  # official, for ImageNet


class SwAVOptions(Strict):
    """What is left open follows from the data.

    prototypes: 3000 for as many samples as ImageNet has, in proportion for fewer, at least 8 (or a quarter of the samples).
    queue: projections of earlier batches, a multiple of the global batch; 0 is none. Left open: at most 3840 and a quarter of the samples
        (or one batch), so none at batches above 3840.
    queue_epoch: fills from this epoch on, and is used once it is full.
    freeze_epochs: prototypes do not learn before.
    hidden_dim: defaults to the width of the encoder's features.
    """

    temperature: float = Field(default=0.1, ge=1e-3)
    epsilon: float = Field(default=0.05, gt=0)
    iterations: int = Field(default=3, ge=1)
    prototypes: int | None = Field(default=None, gt=0)
    queue: int | None = Field(default=None, ge=0)
    queue_epoch: int = Field(default=15, ge=0)
    freeze_epochs: float = Field(default=1.0, ge=0)
    hidden_dim: int | None = Field(default=None, gt=0)
    output_dim: int = Field(default=128, gt=0)


class Prototypes(nn.Module):
    """K vectors of length 1 without biases. Forward: z_Bd -> cosines_BK."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count  # which the weight does not tell at ZeRO 3
        self.weight = nn.Parameter(F.normalize(torch.randn(count, width)))

    def forward(self, z_Bd: Tensor, frozen: bool = False) -> Tensor:
        """frozen: without gradient for the prototypes."""
        weight_Kd = self.weight.detach() if frozen else self.weight
        return F.normalize(z_Bd) @ F.normalize(weight_Kd).T

    def shorten(self) -> None:
        """Back to length 1, after a step."""
        zero.change(self.weight, F.normalize)


class SwAV(Method):
    """See the module's header. Legend: K prototypes, Q queued projections."""

    views = ("multi", "two")
    Options = SwAVOptions

    def __init__(self, encoder: nn.Module, options: SwAVOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.models.modules.heads import SwaVProjectionHead

        sizes = {"prototypes": options.prototypes, "queue": options.queue} | self.scaled(options, facts)
        self.head = SwaVProjectionHead(self.width, options.hidden_dim or self.width, options.output_dim)
        self.prototypes = Prototypes(sizes["prototypes"] or 1, options.output_dim)
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(ASSIGNED, sizes["queue"] or 0, options.output_dim))

    def forward(self, batch: "Batch") -> Output:
        """views: u8 BCHW, the first two of one size."""
        options, count = self.options, len(batch.views)
        z_views = self.encode_views(batch.views)
        together_Nd = self.head(torch.cat(z_views))
        with torch.autocast(together_Nd.device.type, enabled=False):
            z_Nd = F.normalize(together_Nd.float())
            scores_NK = self.prototypes(z_Nd, self.clock.step < options.freeze_epochs * self.clock.epoch_steps)
            codes = [self._codes(s, z_Nd.chunk(count)[s].detach(), scores_NK.chunk(count)[s]) for s in range(ASSIGNED)]
            log_p = (scores_NK / options.temperature).log_softmax(dim=1).chunk(count)
            pairs = [(s, t) for s in range(ASSIGNED) for t in range(count) if t != s]
            loss = torch.stack([-(codes[s] * log_p[t]).sum(dim=1).mean() for s, t in pairs]).mean()
        first_Bd, second_Bd = z_Nd.detach().chunk(count)[:2]
        features = {"backbone": z_views[0].detach().float(), "projector_0": first_Bd, "projector_1": second_Bd}
        return Output(loss, features | {"prototypes": log_p[0].detach().exp()}, {})

    @torch.no_grad()
    def _codes(self, view: int, z_Bd: Tensor, scores_BK: Tensor) -> Tensor:
        """Soft assignments of this rank's rows; then the global batch goes into the view's queue, the oldest leave."""
        length = self.queue.shape[1]
        waited = self.clock.step - self.options.queue_epoch * self.clock.epoch_steps
        full = length > 0 and waited * self.facts.global_batch >= length
        common_QK = self.prototypes(self.queue[view]) if full else None
        q_BK = sinkhorn(scores_BK, self.options.epsilon, self.options.iterations, common_QK)
        if length and waited >= 0:
            self.queue[view] = torch.cat([ranks.all_gather(z_Bd), self.queue[view]])[:length]
        return q_BK

    def moved_by_forward(self) -> list[Tensor]:
        """The queue."""
        return [self.queue]

    def on_step_end(self) -> None:
        """Prototypes keep their length."""
        self.prototypes.shorten()

    def chance_loss(self, global_batch: int) -> float | None:
        """log K: when every prototype is as likely."""
        return math.log(self.prototypes.count)

    @classmethod
    def check(cls, options: SwAVOptions, facts: Facts) -> None:
        """Raises RequestError for too many prototypes, a queue that batches do not divide, and views that cannot be swapped."""
        check_views(facts)
        check_count(options.prototypes, facts.samples)
        check_queue(options.queue, facts)

    @classmethod
    def scaled(cls, options: SwAVOptions, facts: Facts) -> dict[str, int]:
        """Prototypes and queue where they were left open."""
        most = min(QUEUE, max(facts.global_batch, facts.samples // 4))
        found = {"prototypes": scaled_count(PROTOTYPES, facts.samples), "queue": most - most % facts.global_batch}
        return {name: value for name, value in found.items() if getattr(options, name) is None}


def check_views(facts: Facts) -> None:
    """Raises RequestError unless the first two views are of one size (an empty `sizes` is not known yet)."""
    if facts.sizes and (len(facts.sizes) < ASSIGNED or len(set(facts.sizes[:ASSIGNED])) > 1):
        raise RequestError(
            f"the first two views must be of one size, got {list(facts.sizes)} px",
            where="recipe: views.crops",
            hint="views.crops=[{count: 2, crop_scale: [0.3, 1.0]}]",
        )


METHODS = {"swav": SwAV}
