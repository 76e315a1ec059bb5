"""PCL: MoCo, and images attract the centre of their cluster, at several numbers of clusters (Li et al. 2020, arXiv 2005.04966).

Once an epoch the key encoder's projections of the whole corpus are clustered, M times; c_j is a centre, s the image's cluster, phi_j the
concentration of cluster j with Z images v' (equations 11 and 12 of the paper):

    loss = l_MoCo + 1/M sum_m -log( exp(q . c_s / phi_s) / sum_j exp(q . c_j / phi_j) )
    phi_j = sum_{v' in j} |v' - c_j| / (Z log(Z + 10)),   clipped at the 10th and 90th percentile, then scaled to the mean t

Official hyper-parameters: MoCo's, with t 0.2, a queue of 16384, 25000, 50000 and 100000 clusters of ImageNet's images, 20 iterations of
k-means, 20 warm-up epochs with l_MoCo alone, 200 epochs. Version 1: linear head; version 2: head 2048-2048-128, blur, cosine.

Memory: a number of 8 bytes an image and clustering, on every rank, and all projections (512 bytes an image) while clusters are made.
Parts: as moco.py; k-means is pretrain.clusters'.
Deviations: as moco.py. The softmax is over all centres, there over the batch's and 16000 others. k-means is spherical and starts once,
there it is Euclidean and the best of five starts. Numbers of clusters that are left open are the official ones in proportion to the corpus.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from base.errors import RequestError
from base.seeds import seed_of
from engine.ahead import to_device
from pretrain.clusters import IMAGENET, kmeans
from pretrain.methods import Embed, Facts, Output
from pretrain.methods.moco import MoCo, MoCoOptions, MoCoV2, MoCoV2Options

if TYPE_CHECKING:
    from shards.batches import Batch

CLUSTERS = (25_000, 50_000, 100_000)
ITERATIONS = 20
SMOOTHING = 10  # of the concentration: small clusters do not look tight


class PCLOptions(MoCoOptions):
    """clusters: of each clustering; left open, the official ones in proportion to the corpus, 2 at least. warmup_epochs: without any."""

    temperature: float = Field(default=0.2, ge=1e-3)
    clusters: tuple[int, ...] | None = Field(default=None, min_length=1)
    warmup_epochs: int = Field(default=20, ge=0)

    @model_validator(mode="after")
    def _clusters_are_several(self) -> "PCLOptions":
        if few := [count for count in self.clusters or () if count < 2]:
            raise ValueError(f"a clustering has two clusters at least, got {few[0]}")
        return self


class PCLV2Options(PCLOptions, MoCoV2Options):
    """With the head of version 2."""


def concentrations(z_Nd: Tensor, centres_kd: Tensor, cluster_N: Tensor, temperature: float) -> Tensor:
    """phi_k, each cluster's temperature; their mean is `temperature`. On the CPU, so that sums have one order."""
    distance_N = (z_Nd - centres_kd[cluster_N]).norm(dim=1).double()
    clusters = len(centres_kd)
    count_k = torch.bincount(cluster_N, minlength=clusters)
    phi_k = torch.bincount(cluster_N, weights=distance_N, minlength=clusters) / (count_k.clamp_min(1) * (count_k + SMOOTHING).log())
    phi_k[count_k < 2] = phi_k.max()  # one image is its own centre: no distance, and yet not tight
    phi_k = phi_k.clamp(phi_k.quantile(0.1), phi_k.quantile(0.9))
    # Clusters of equal images have no spread at all; a hundredth of the temperature is sharp enough and can be divided by.
    return (temperature * phi_k / phi_k.mean().clamp_min(1e-12)).clamp_min(temperature / 100).float()


class Clustering(nn.Module):
    """Centres, their concentrations and every image's cluster, the same on all ranks."""

    centres_kd: Tensor
    phi_k: Tensor
    cluster_N: Tensor

    def __init__(self, samples: int, clusters: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centres_kd", torch.zeros(clusters, width))
        self.register_buffer("phi_k", torch.ones(clusters))
        self.register_buffer("cluster_N", torch.zeros(samples, dtype=torch.int64))

    def fit(self, index_N: Tensor, z_Nd: Tensor, temperature: float, seed: int) -> None:
        """From unit rows on the CPU. All ranks call."""
        centres_kd, cluster_N = (found.cpu() for found in kmeans(z_Nd, len(self.centres_kd), ITERATIONS, seed))
        self.phi_k.copy_(concentrations(z_Nd, centres_kd, cluster_N, temperature))
        self.centres_kd.copy_(centres_kd)
        self.cluster_N[index_N.to(self.cluster_N.device)] = cluster_N.to(self.cluster_N.device)

    def logits(self, q_Bd: Tensor) -> Tensor:
        """q . c_j / phi_j, B,k."""
        return q_Bd @ self.centres_kd.T / self.phi_k


class PCL(MoCo):
    """Version 1; see the module's header."""

    exact_epochs = True
    official_queue = 16384
    Options: ClassVar[type[MoCoOptions]] = PCLOptions
    options: PCLOptions

    def __init__(self, encoder: nn.Module, options: PCLOptions, facts: Facts) -> None:
        super().__init__(encoder, options, facts)
        counts = options.clusters or cluster_counts(facts.samples)
        self.clusterings = nn.ModuleList(Clustering(facts.samples, count, options.output_dim) for count in counts)

    def on_epoch_start(self, embed: Embed) -> None:
        """New clusters."""
        if self.clock.epoch < self.options.warmup_epochs:
            return
        index_N, z_Nd = embed(self.key)
        for number, clustering in enumerate(self.clusterings):
            seed = seed_of("clusters", self.facts.seed, self.clock.epoch, number)
            clustering.fit(index_N, z_Nd, self.options.temperature, seed)  # type: ignore[operator]

    def forward(self, batch: "Batch") -> Output:
        """views: two u8 BCHW, the query's and the key's."""
        alone, q_Bd = self.first(batch)
        if self.clock.epoch < self.options.warmup_epochs:
            return alone
        with torch.autocast(q_Bd.device.type, enabled=False):
            logits = [clustering.logits(q_Bd) for clustering in self.clusterings]  # type: ignore[operator]
            index_B = to_device(batch.index_B, q_Bd.device)
            wanted = [clustering.cluster_N[index_B] for clustering in self.clusterings]  # type: ignore[index]
            losses = [F.cross_entropy(logits_Bk, cluster_B) for logits_Bk, cluster_B in zip(logits, wanted, strict=True)]
            of_clusters = torch.stack(losses).mean()
        top1 = (logits[0].argmax(dim=1) == wanted[0]).float().mean()
        features = alone.features | {"prototypes": logits[0].detach().softmax(dim=1)}
        logs = alone.logs | {"queue_loss": alone.loss.detach(), "cluster_loss": of_clusters.detach(), "cluster_top1": top1}
        return Output(alone.loss + of_clusters, features, logs)

    def chance_loss(self, global_batch: int) -> float | None:
        """None: clusters are of the network's own features, which one that has learned nothing guesses too."""
        return None

    @classmethod
    def check(cls, options: MoCoOptions, facts: Facts) -> None:
        """Raises RequestError as MoCo, and for more clusters than images."""
        super().check(options, facts)
        most = max(getattr(options, "clusters", None) or (0,))
        if most > facts.samples:
            raise RequestError(
                f"{facts.samples} images cannot make {most} clusters",
                where="recipe: options.clusters",
                hint=f"options.clusters={list(cluster_counts(facts.samples))}",
            )

    @classmethod
    def scaled(cls, options: MoCoOptions, facts: Facts) -> dict[str, int]:
        """The queue and the numbers of clusters, when left open."""
        counts = () if getattr(options, "clusters", None) else cluster_counts(facts.samples)
        return super().scaled(options, facts) | {f"clusters.{number}": count for number, count in enumerate(counts)}


def cluster_counts(samples: int) -> tuple[int, ...]:
    """The official numbers in proportion to the corpus, 2 at least."""
    return tuple(max(2, round(official * samples / IMAGENET)) for official in CLUSTERS)


class PCLV2(PCL, MoCoV2):
    """The head of version 2."""

    Options = PCLV2Options
    options: PCLV2Options


METHODS = {"pcl-v1": PCL, "pcl-v2": PCLV2}
