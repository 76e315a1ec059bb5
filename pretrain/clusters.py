"""Clusters of a whole corpus and of a batch: spherical k-means and Sinkhorn's equal shares. All ranks call, all get the same.

    centroids_kd, assignment_N = kmeans(z_Nd, k=3000, iterations=10, seed=seed)    # z_Nd the same on every rank
    q_BK = sinkhorn(scores_BK, epsilon=0.05, iterations=3)                         # scores of this rank's rows of the global batch
    assignment_N = sinkhorn_labels(z_Nd, prototypes_Kd, epsilon=0.05, iterations=10)

k-means (Lloyd's, on the unit sphere): assign every row to the centroid of the largest cosine, then centroid = sum of its rows / length.
Sinkhorn (Cuturi 2013, arXiv 1306.0895; for labels Asano et al. 2020, arXiv 1911.05371): the matrix of the largest entropy-regularised score

    max_Q  <Q, scores> + epsilon * H(Q),   each row sums to 1, each column to rows / K

is diag(u) exp(scores / epsilon) diag(v); scaling columns and rows in turn finds u and v. All of it is done with logarithms in float32:
exp(1 / 0.05) = 4.9e8 is beyond float16, whose Sinkhorn is NaN. Legend: N samples, B rows of this rank, K or k clusters, d dimensions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import RequestError
from engine import ranks

ROWS = 8192  # scored at a time: with 3000 clusters 100 MB
IMAGENET = 1_281_167  # samples that official counts are for
FEWEST = 8  # clusters


def scaled_count(official: int, samples: int) -> int:
    """Prototypes for so many samples: as many to a sample as official on ImageNet, but no fewer than 8 or a quarter of the samples."""
    return min(samples, max(round(official * samples / IMAGENET), min(FEWEST, samples // 4), 1))


def check_count(prototypes: int | None, samples: int) -> None:
    """Raises RequestError for more prototypes than samples."""
    if prototypes is not None and prototypes > samples:
        raise RequestError(
            f"{samples} samples cannot have {prototypes} prototypes",
            where="recipe: options.prototypes",
            hint=f"options.prototypes={samples}",
        )


@torch.no_grad()
def kmeans(z_Nd: Tensor, k: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means; the ranks share the rows, and sums over ranks make the result equal on all of them.

    Args:
        z_Nd: the same on every rank; scaled to length 1 here.
        iterations: updates of the centroids.
        seed: draws the first centroids among the rows.

    Returns:
        centroids_kd of length 1 and assignment_N (int64) to them, on this rank's device.
    """
    if not 0 < k <= len(z_Nd):
        raise ValueError(f"{len(z_Nd)} rows cannot have {k} clusters")
    z_Nd = F.normalize(z_Nd.to(ranks.device(), torch.float32))
    first_k = torch.randperm(len(z_Nd), generator=torch.Generator().manual_seed(seed))[:k]
    centroids_kd = z_Nd[first_k.to(z_Nd.device)]
    fit_N, assignment_N = _assign(z_Nd, centroids_kd)
    for _ in range(iterations):
        centroids_kd = _centroids(z_Nd, fit_N, assignment_N, k)
        fit_N, assignment_N = _assign(z_Nd, centroids_kd)
    return centroids_kd, assignment_N


def _assign(z_Nd: Tensor, centroids_kd: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the nearest centroid and its number, of all rows."""
    fit_N, assignment_N = z_Nd.new_zeros(len(z_Nd)), torch.zeros(len(z_Nd), dtype=torch.int64, device=z_Nd.device)
    for rows in _my_rows(len(z_Nd)):
        fit_N[rows], assignment_N[rows] = (z_Nd[rows] @ centroids_kd.T).max(dim=1)
    return ranks.all_sum(fit_N), ranks.all_sum(assignment_N)  # the other ranks' rows are zeros here


def _centroids(z_Nd: Tensor, fit_N: Tensor, assignment_N: Tensor, k: int) -> Tensor:
    sums_kd = z_Nd.new_zeros(k, z_Nd.shape[1])
    for rows in _my_rows(len(z_Nd)):
        sums_kd.index_add_(0, assignment_N[rows], z_Nd[rows])
    sums_kd = ranks.all_sum(sums_kd)
    empty = torch.nonzero(torch.bincount(assignment_N, minlength=k) == 0).flatten()
    # A cluster that lost all its rows starts again at a row that fits worst where it is.
    sums_kd[empty] = z_Nd[torch.argsort(fit_N, stable=True)[: len(empty)]]
    return F.normalize(sums_kd)


def _my_rows(count: int) -> Iterator[slice]:
    """This rank's share of so many rows, in pieces that fit in memory."""
    stop = (ranks.rank() + 1) * count // ranks.world()
    for start in range(ranks.rank() * count // ranks.world(), stop, ROWS):
        yield slice(start, min(start + ROWS, stop))


@torch.no_grad()
def sinkhorn(scores_BK: Tensor, epsilon: float, iterations: int, common_QK: Tensor | None = None) -> Tensor:
    """Soft assignments q_BK of this rank's rows; over the rows of all ranks every cluster gets the same share.

    Args:
        scores_BK: cosines to the prototypes; as many rows on every rank.
        epsilon: the smaller, the harder the assignments.
        common_QK: further rows that take part, equal on all ranks and counted once (those of a queue).

    Returns:
        float32; each row sums to 1, each column (with the other ranks' and the common rows) nearly to rows / K.
    """
    with torch.autocast(scores_BK.device.type, enabled=False):
        log_BK = scores_BK.float() / epsilon
        log_QK = log_BK[:0] if common_QK is None else common_QK.float() / epsilon
        for _ in range(iterations):
            parts = [ranks.all_gather(log_BK.logsumexp(dim=0, keepdim=True)), log_QK.logsumexp(dim=0, keepdim=True)]
            column_K = torch.cat(parts).logsumexp(dim=0)
            log_BK, log_QK = ((log - column_K).log_softmax(dim=1) for log in (log_BK, log_QK))
        return log_BK.exp()


@torch.no_grad()
def sinkhorn_labels(z_Nd: Tensor, prototypes_Kd: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The best label of each sample of a corpus when every label goes to about as many samples.

    Scores are made again in each iteration, so that memory holds the scaling of the columns and not N x K.

    Args:
        z_Nd, prototypes_Kd: the same on every rank; scaled to length 1 here.

    Returns:
        assignment_N (int64), on this rank's device.
    """
    z_Nd = F.normalize(z_Nd.to(ranks.device(), torch.float32))
    prototypes_Kd = F.normalize(prototypes_Kd.to(ranks.device(), torch.float32))
    log_v_K = z_Nd.new_zeros(len(prototypes_Kd))
    for _ in range(iterations):
        column_K = torch.full_like(log_v_K, -torch.inf)
        for rows in _my_rows(len(z_Nd)):
            log_BK = z_Nd[rows] @ prototypes_Kd.T / epsilon
            log_u_B1 = -(log_BK + log_v_K).logsumexp(dim=1, keepdim=True)
            column_K = torch.logaddexp(column_K, (log_BK + log_u_B1).logsumexp(dim=0))
        log_v_K = -ranks.all_gather(column_K[None]).logsumexp(dim=0)
    assignment_N = torch.zeros(len(z_Nd), dtype=torch.int64, device=z_Nd.device)
    for rows in _my_rows(len(z_Nd)):
        assignment_N[rows] = (z_Nd[rows] @ prototypes_Kd.T / epsilon + log_v_K).argmax(dim=1)
    return ranks.all_sum(assignment_N)
