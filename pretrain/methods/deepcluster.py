"""DeepCluster version 2 and SeLa version 2: label every image by clustering the corpus once an epoch, then learn the labels.

Both are baselines of the SwAV paper (Caron et al. 2020, arXiv 2006.09882), which brings DeepCluster (Caron et al. 2018, arXiv 1807.05520)
and SeLa (Asano et al. 2020, arXiv 1911.05371) to its own training. A bank keeps the projections z_n of two views of each image n, of length
1, from the epoch before. At the start of an epoch head h of H labels every image by the bank of view h mod 2:

    DeepCluster v2:  C_h, y_h = spherical k-means;  the prototypes are the centroids C_h and do not learn
    SeLa v2:         y_h = argmax of the Sinkhorn assignment of the whole corpus to prototypes C_h, equal shares;  the prototypes learn

    loss = mean over heads h, views v and images n of -log softmax(z_nv . C_h / T)[y_h(n)]

Official hyper-parameters of DeepCluster v2 (its script of 800 epochs): ResNet-50, batch 4096, LARS with lr 4.8, weight decay 1e-6, 10
epochs of warm-up, cosine decay to a thousandth, T 0.1, projector 2048-128, three heads of 3000 prototypes, 10 iterations of k-means, 2
crops of 224 px and 6 of 96.
SeLa v2 has no official script, only weights: this is a REIMPLEMENTATION. Known are 400 epochs, batch 4096, crops of 2 x 160 and 4 x 96 px;
heads, prototypes and rates are taken from DeepCluster v2, epsilon from SwAV.

Parts: lightly's SwaVProjectionHead. Lightly has neither method.
Deviations: the bank is one for all ranks and lies in the checkpoint (the official code keeps a part on each): 2 * N * d numbers, 1.3 GB for
ImageNet. It is filled at first from evaluation views by the network as it is then, in eval mode, where the official code takes augmented
crops. k-means gives a cluster that lost all its images a new start; the official one leaves its centroid. Every sample comes once an epoch.
Biases and norms have neither weight decay nor LARS' scaling, where DeepCluster's official code treats all parameters alike.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from base.config import Strict
from base.seeds import seed_of
from engine import ema, ranks
from engine.ahead import to_device
from pretrain.clusters import check_count, kmeans, scaled_count, sinkhorn_labels
from pretrain.methods import Embed, Facts, Method, Output
from pretrain.methods.swav import ASSIGNED, PROTOTYPES, Prototypes, check_views

if TYPE_CHECKING:
    from shards.batches import Batch


class DeepClusterOptions(Strict):
    """`prototypes` is that of each head; left open, 3000 for as many samples as ImageNet has, in proportion for fewer, at least 8 (or a
    quarter of the samples). `iterations` are of k-means. `hidden_dim` defaults to the width of the encoder's features.
    """

    temperature: float = Field(default=0.1, ge=1e-3)
    heads: int = Field(default=3, ge=1)
    prototypes: int | None = Field(default=None, gt=0)
    iterations: int = Field(default=10, ge=1)
    hidden_dim: int | None = Field(default=None, gt=0)
    output_dim: int = Field(default=128, gt=0)


class SeLaOptions(DeepClusterOptions):
    """As above; `iterations` are of Sinkhorn over the corpus, `epsilon` its softness."""

    iterations: int = Field(default=20, ge=1)
    epsilon: float = Field(default=0.05, gt=0)


class _SelfLabelled(Method):
    """What the two share: the bank, the labels, the loss. Legend: N samples, H heads, K prototypes, V views."""

    views = ("multi", "two")
    exact_epochs = True

    def __init__(self, encoder: nn.Module, options: DeepClusterOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        from lightly.models.modules.heads import SwaVProjectionHead

        self.count = options.prototypes or scaled_count(PROTOTYPES, facts.samples)
        self.head = SwaVProjectionHead(self.width, options.hidden_dim or self.width, options.output_dim)
        self.bank: Tensor
        self.labels: Tensor
        self.register_buffer("bank", torch.zeros(ASSIGNED, facts.samples, options.output_dim))
        self.register_buffer("labels", torch.zeros(options.heads, facts.samples, dtype=torch.int64))
        self.pending: list[tuple[Tensor, Tensor]] = []  # ids and projections of this update

    def scores(self, head: int, z_Bd: Tensor) -> Tensor:
        """Cosines to the head's prototypes, B,K."""
        raise NotImplementedError

    def label(self, head: int, z_Nd: Tensor) -> Tensor:
        """New labels of all rows, the same on every rank; sets the head's prototypes where they do not learn."""
        raise NotImplementedError

    @torch.no_grad()
    def on_epoch_start(self, embed: Embed) -> None:
        """Labels every sample; before the first epoch the bank is filled."""
        if self.clock.step == 0:
            index_N, z_Nd = embed(lambda x: self.head(self.encoder(x)))
            self.bank[:, index_N.to(self.bank.device)] = F.normalize(z_Nd).to(self.bank.device)
        known_N = self.bank[0].any(dim=1).nonzero().flatten()  # a sample that cannot be read has no row
        for head in range(self.options.heads):
            self.labels[head, known_N] = self.label(head, self.bank[head % ASSIGNED, known_N])

    def forward(self, batch: "Batch") -> Output:
        """views: u8 BCHW, the first two of one size."""
        count = len(batch.views)
        z_views = self.encode_views(batch.views)
        together_Nd = self.head(torch.cat(z_views))
        with torch.autocast(together_Nd.device.type, enabled=False):
            z_Nd = F.normalize(together_Nd.float())
            logits = [self.scores(head, z_Nd) / self.options.temperature for head in range(self.options.heads)]
            index_B = to_device(batch.index_B, z_Nd.device)
            label_HB = self.labels[:, index_B]
            loss = torch.stack([F.cross_entropy(found, label_HB[h].repeat(count)) for h, found in enumerate(logits)]).mean()
        first_Bd, second_Bd = z_Nd.detach().chunk(count)[:2]
        self.pending.append((index_B, torch.stack([first_Bd, second_Bd], dim=1)))
        features = {"backbone": z_views[0].detach().float(), "projector_0": first_Bd, "projector_1": second_Bd}
        return Output(loss, features | {"prototypes": logits[0].detach().chunk(count)[0].softmax(dim=1)}, {})

    def on_step_end(self) -> None:
        """The bank takes the projections."""
        for mine_B, z_B2d in self.pending:
            index_B, z_B2d = ranks.all_gather(mine_B), ranks.all_gather(z_B2d)
            # Where two epochs meet in a batch a sample may come twice: both rows write the later one, so that all ranks keep the same.
            last_B = len(index_B) - 1 - (index_B[:, None] == index_B.flip(0)).int().argmax(dim=1)
            self.bank[:, index_B] = z_B2d[last_B].transpose(0, 1)
        self.pending.clear()

    def on_step_skipped(self) -> None:
        """The bank stays."""
        self.pending.clear()

    def chance_loss(self, global_batch: int) -> float | None:
        """log K: when every prototype is as likely."""
        return math.log(self.count)

    @classmethod
    def check(cls, options: DeepClusterOptions, facts: Facts) -> None:
        """Raises RequestError for more prototypes than samples, and for views of which no two are alike."""
        check_views(facts)
        check_count(options.prototypes, facts.samples)

    @classmethod
    def scaled(cls, options: DeepClusterOptions, facts: Facts) -> dict[str, int]:
        """Prototypes of each head where they were left open."""
        return {} if options.prototypes else {"prototypes": scaled_count(PROTOTYPES, facts.samples)}


class DeepCluster(_SelfLabelled):
    """Version 2; see the module's header."""

    Options = DeepClusterOptions

    def __init__(self, encoder: nn.Module, options: DeepClusterOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.centroids: Tensor
        self.register_buffer("centroids", torch.zeros(options.heads, self.count, options.output_dim))

    def scores(self, head: int, z_Bd: Tensor) -> Tensor:
        """Cosines to the centroids, B,K."""
        return z_Bd @ self.centroids[head].T

    def label(self, head: int, z_Nd: Tensor) -> Tensor:
        """The nearest centroid's number."""
        seed = seed_of("kmeans", self.facts.seed, self.clock.epoch, head)
        self.centroids[head], label_N = kmeans(z_Nd, self.count, self.options.iterations, seed)
        return label_N


class SeLa(_SelfLabelled):
    """Version 2, a reimplementation; see the module's header."""

    Options = SeLaOptions

    def __init__(self, encoder: nn.Module, options: SeLaOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        self.prototypes = nn.ModuleList([Prototypes(self.count, options.output_dim) for _ in range(options.heads)])

    def scores(self, head: int, z_Bd: Tensor) -> Tensor:
        """Cosines to the prototypes, B,K."""
        found: Tensor = self.prototypes[head](z_Bd)
        return found

    def label(self, head: int, z_Nd: Tensor) -> Tensor:
        """Labels of which each goes to about as many samples."""
        weight_Kd: nn.Parameter = self.prototypes[head].weight  # type: ignore[assignment]
        with ema.whole([weight_Kd]):
            return sinkhorn_labels(z_Nd, weight_Kd, self.options.epsilon, self.options.iterations)

    def on_step_end(self) -> None:
        """The bank too; prototypes keep their length."""
        super().on_step_end()
        for prototypes in self.prototypes:
            prototypes.shorten()  # type: ignore[operator]


METHODS = {"deepcluster-v2": DeepCluster, "sela-v2": SeLa}
