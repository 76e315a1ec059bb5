"""k-means and Sinkhorn in one process; two ranks come with the methods that use them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain import clusters
from pretrain.clusters import kmeans, sinkhorn, sinkhorn_labels


def blobs(rows: int = 60, k: int = 5, d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tight clusters of equal size around orthogonal directions, shuffled, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    centres_kd = torch.eye(k, d)
    label_N = torch.arange(rows)[torch.randperm(rows, generator=generator)] % k
    z_Nd = centres_kd[label_N] + 0.05 * torch.randn(rows, d, generator=generator)
    return z_Nd * (1 + 9 * torch.rand(rows, 1, generator=generator)), label_N


def test_kmeans_finds_clusters_of_direction() -> None:
    z_Nd, label_N = blobs()
    tries = [kmeans(z_Nd, 5, 10, seed) for seed in range(8)]  # a first draw may lead to a local optimum
    centroids_kd, assignment_N = max(tries, key=lambda found: float((F.normalize(z_Nd) @ found[0].T).amax(dim=1).mean()))
    assert len({(int(a), int(b)) for a, b in zip(assignment_N, label_N, strict=True)}) == 5
    torch.testing.assert_close(centroids_kd.norm(dim=1), torch.ones(5))
    means_kd = torch.stack([F.normalize(F.normalize(z_Nd)[assignment_N == c].mean(dim=0), dim=0) for c in range(5)])
    torch.testing.assert_close(centroids_kd, means_kd)


def test_kmeans_is_drawn_from_its_seed_and_reads_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    z_Nd = torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (kmeans(z_Nd, 7, 5, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    monkeypatch.setattr(clusters, "ROWS", 10)
    torch.testing.assert_close(kmeans(z_Nd, 7, 5, 0)[0], first)


def test_kmeans_leaves_no_cluster_empty() -> None:
    """Half of the rows are one and the same, so first centroids coincide and all but one of them lose every row."""
    z_Nd = torch.cat([torch.ones(30, 4), torch.randn(30, 4, generator=torch.Generator().manual_seed(2))])
    centroids_kd, assignment_N = kmeans(z_Nd, 20, 20, seed=0)
    assert torch.isfinite(centroids_kd).all()
    assert len(assignment_N.unique()) == 20


def test_more_clusters_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows cannot have 6 clusters"):
        kmeans(torch.randn(5, 3), 6, 1, seed=0)


def test_sinkhorn_equals_its_definition() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (12, 4))
    q = np.exp(scores / 0.05)
    for _ in range(3):
        q /= q.sum(axis=0)
        q /= q.sum(axis=1, keepdims=True)
    found = sinkhorn(torch.from_numpy(scores), 0.05, 3)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), q, rtol=1e-4, atol=1e-7)
    split = sinkhorn(torch.from_numpy(scores[:5]), 0.05, 3, torch.from_numpy(scores[5:]))
    np.testing.assert_allclose(split.numpy(), q[:5], rtol=1e-4, atol=1e-7)


def test_sinkhorn_gives_equal_shares() -> None:
    scores_BK = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 8)
    q_BK = sinkhorn(scores_BK, 0.5, 100)
    torch.testing.assert_close(q_BK.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(q_BK.sum(dim=0), torch.full((8,), 5.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_does_not_repeat_the_overflow_of_float16(dtype: torch.dtype) -> None:
    """exp(1 / 0.05) is infinite in float16 and the shares NaN (lightly and the official code under half precision)."""
    scores_BK = torch.linspace(-1, 1, 48).reshape(12, 4).to(dtype)
    assert torch.isinf(torch.exp(scores_BK.half() / 0.05)).any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(scores_BK, 0.05, 3)
    torch.testing.assert_close(found, sinkhorn(scores_BK.double(), 0.05, 3))
    assert torch.isfinite(sinkhorn(scores_BK, 0.001, 3)).all()  # where float32 would overflow too


def test_labels_of_a_corpus_share_it_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest prototypes would give one label to nearly all: the rows lie on one side."""
    z_Nd = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 1.5
    prototypes_Kd = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    nearest = torch.bincount((F.normalize(z_Nd) @ F.normalize(prototypes_Kd).T).argmax(dim=1), minlength=4)
    found_N = sinkhorn_labels(z_Nd, prototypes_Kd, 0.02, 200)
    assert nearest.max() > 120
    assert torch.bincount(found_N, minlength=4).tolist() == pytest.approx([50] * 4, abs=5)
    monkeypatch.setattr(clusters, "ROWS", 33)
    assert torch.equal(sinkhorn_labels(z_Nd, prototypes_Kd, 0.02, 200), found_N)
