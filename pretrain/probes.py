"""Label-free numbers that say what a representation is like while it trains. Legend: N samples, D or d dimensions.

All are computed on the current global batch at logging steps, on detached float32 features, and hold no state: a resumed run logs the
same numbers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import ranks

MOST_ROWS = 4096  # a singular value decomposition of more would cost seconds


def std_ratio(z_Nd: Tensor) -> float:
    """Spread of directions: mean over dimensions of the standard deviation of z / |z|, times sqrt(d). About 1 is healthy, 0 collapsed.

    The diagnostic of SimSiam (Chen and He 2021, arXiv 2011.10566, section 4.1).
    """
    unit_Nd = F.normalize(z_Nd.double(), dim=1)
    return float(unit_Nd.std(dim=0, correction=0).mean() * z_Nd.shape[1] ** 0.5)


def mean_cosine(z_Nd: Tensor) -> float:
    """Mean cosine of all pairs of different samples. 1 when all point the same way."""
    unit_Nd = F.normalize(z_Nd.double(), dim=1)
    count = z_Nd.shape[0]
    total = float(unit_Nd.sum(dim=0).square().sum())
    return (total - float(unit_Nd.square().sum())) / max(1, count * (count - 1))


def rankme(z_ND: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, arXiv 2210.02885).

    Of centred features (the mean direction says nothing about images); from 1 to min(N - 1, D). 1 when all samples are equal.
    Compare only runs of one method and one batch size: the paper's own caveat, and N bounds it.
    """
    z_ND = z_ND[:MOST_ROWS]
    centred_ND = z_ND.double() - z_ND.double().mean(dim=0)
    singular = torch.linalg.svdvals(centred_ND)
    scale = z_ND.double().abs().max().clamp_min(1e-12)
    singular = singular[singular > 1e-7 * scale * max(z_ND.shape) ** 0.5]  # what float32 features leave above rounding
    if not len(singular):
        return 1.0
    p = singular / singular.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def contrastive_top1(first_Nd: Tensor, second_Nd: Tensor) -> float:
    """Share of the 2N views whose nearest other view (cosine) is the other view of the same image. Chance is 1 / (2N - 1).

    Ties count against: equal embeddings score 0, not 1.
    """
    unit = F.normalize(torch.cat([first_Nd, second_Nd]).double(), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2.0)
    count = first_Nd.shape[0]
    partner = torch.arange(2 * count, device=unit.device).roll(count)
    own = similarity.gather(1, partner[:, None])
    rivals = similarity.scatter(1, partner[:, None], -2.0).max(dim=1, keepdim=True).values
    return float((own > rivals).double().mean())


def measure(features: dict[str, Tensor]) -> dict[str, float]:
    """The row of all numbers that these features allow, over the global batch. Every rank must call; all get the same row."""
    row: dict[str, float] = {}
    backbone_ND = ranks.all_gather(features["backbone"])
    row["rankme"] = rankme(backbone_ND)
    shown_Nd = backbone_ND
    if "projector_0" in features:
        first_Nd, second_Nd = ranks.all_gather(features["projector_0"]), ranks.all_gather(features["projector_1"])
        row["contrastive_top1"] = contrastive_top1(first_Nd, second_Nd)
        shown_Nd = torch.cat([first_Nd, second_Nd])
    row["std_ratio"] = std_ratio(shown_Nd)
    row["mean_cosine"] = mean_cosine(shown_Nd)
    return {name: round(value, 6) for name, value in row.items()}
