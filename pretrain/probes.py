"""Numbers that say what a representation is like while it trains. Legend: N samples, D or d dimensions, K prototypes, L labels.

    window = Window()
    window.count(output.features)                       # each step: which prototypes were used
    row = window.measure(output.features, batch)        # at logging steps, all ranks: one row, the same on each

All features come from one window: the newest samples of the logging steps, gathered over ranks, detached, float32. What must be the same
after a resume lies in `state`. Spread and cosine are of the projector's outputs, or of centred backbone features where there is none: raw
pooled ReLU features all point into one corner and look collapsed when they are healthy.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.metrics import auroc
from engine import ranks

WINDOW = 1024  # samples; a singular value decomposition of more would cost seconds
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the kNN probe, as in InstDisc (arXiv 1805.01978)
FEWEST_OF_A_CLASS = 5
KEPT_USE = 0.99  # share of a prototype's count that is left after a step
GRAM_ROWS = 128  # computed at a time
RIDGE = 1.0  # of the linear probe, on standardised features


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


def centred(z_ND: Tensor) -> Tensor:
    """Float64 without the mean direction, which says nothing about images; what is only float32 rounding becomes 0."""
    z64_ND = z_ND.double()
    apart_ND = z64_ND - z64_ND.mean(dim=0)
    return torch.where(apart_ND.abs() > 1e-6 * z64_ND.abs().max().clamp_min(1e-12), apart_ND, torch.zeros_like(apart_ND))


def spectrum(z_ND: Tensor) -> Tensor:
    """Singular values of the centred features, falling; those that float32 features leave to rounding are cut off."""
    apart_ND = z_ND.double()
    apart_ND = apart_ND - apart_ND.mean(dim=0)
    # From the smaller Gram matrix: tens of times cheaper than a decomposition of the features, and exact enough for float32 ones.
    singular = torch.linalg.eigvalsh(_lower_gram(apart_ND.T if len(z_ND) > z_ND.shape[1] else apart_ND)).flip(0).clamp_min(0).sqrt()
    scale = z_ND.abs().max().double().clamp_min(1e-12)
    return singular[singular > 1e-7 * scale * max(z_ND.shape) ** 0.5]


def _lower_gram(x_MK: Tensor) -> Tensor:
    """The lower half of x x^T, which is all that torch's decompositions of symmetric matrices read; what is above is not to be used."""
    gram_MM = x_MK.new_zeros(len(x_MK), len(x_MK))
    for start in range(0, len(x_MK), GRAM_ROWS):
        gram_MM[start : start + GRAM_ROWS, : start + GRAM_ROWS] = x_MK[start : start + GRAM_ROWS] @ x_MK[: start + GRAM_ROWS].T
    return gram_MM


def rankme(singular: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, arXiv 2210.02885).

    From 1 to min(N - 1, D); 1 when all samples are equal. Compare only runs of one method and one window: the paper's own caveat.
    """
    if not len(singular):
        return 1.0
    p = singular / singular.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(singular: Tensor) -> tuple[float, float] | None:
    """Decay of the eigenvalues: minus the slope of log eigenvalue over log index, and the R^2 of that line; None with too few.

    alpha-ReQ (Agrawal et al. 2022): about 1 is healthy. The line is fitted from index 10 to half of the spectrum.
    """
    low, high = 10, len(singular) // 2
    if high - low < 5:
        return None
    x = torch.arange(low, high, dtype=torch.float64, device=singular.device).log()
    y = 2 * singular[low - 1 : high - 1].log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return -float(slope), float((slope * (x @ y)) / (y @ y).clamp_min(1e-30))


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


def _macro(score_NL: Tensor, target_NL: Tensor, mask_NL: Tensor) -> float | None:
    """Mean AUROC over the labels that enough of both classes are known of (balanced: every label counts alike, however rare).

    Targets that an uncertain label was smoothed to count as the nearer of 0 and 1. Labels without finite scores do not count.
    """
    found = []
    for score_N, target_N, known_N in zip(*(of_NL.T.cpu().numpy() for of_NL in (score_NL, target_NL > 0.5, mask_NL > 0)), strict=True):
        score, target = score_N[known_N], target_N[known_N]
        if min(target.sum(), (~target).sum()) >= FEWEST_OF_A_CLASS and np.isfinite(score).all():
            found.append(auroc(score, target))
    return sum(found) / len(found) if found else None


def knn_auroc(z_ND: Tensor, index_N: Tensor, target_NL: Tensor, mask_NL: Tensor) -> float | None:
    """Macro AUROC of each sample's labels as its nearest others (cosine) have them; the same image is never its own neighbour."""
    unit_ND = F.normalize(centred(z_ND), dim=1).float()
    similarity_NN = unit_ND @ unit_ND.T
    similarity_NN = similarity_NN.masked_fill(index_N[:, None] == index_N[None, :], -2.0)
    near_NK, who_NK = similarity_NN.topk(min(NEIGHBOURS, len(z_ND) - 1), dim=1)
    weight_NK = torch.exp(near_NK / TEMPERATURE)
    known_NKL = mask_NL[who_NK] * weight_NK[:, :, None]
    score_NL = (known_NKL * target_NL[who_NK]).sum(1) / known_NKL.sum(1).clamp_min(1e-12)
    return _macro(score_NL, target_NL, mask_NL)


def linear_auroc(z_ND: Tensor, index_N: Tensor, target_NL: Tensor, mask_NL: Tensor) -> float | None:
    """Macro AUROC of ridge regression on standardised features: fitted on the images of even id, judged on those of odd id, and turned.

    An unknown label counts as the label's mean: it pulls nowhere.
    """
    x_ND = centred(z_ND) / z_ND.double().std(dim=0).clamp_min(1e-12)
    y_NL, known_NL = target_NL.double(), mask_NL.double()
    scores_NL = torch.zeros_like(y_NL)
    for held in (0, 1):
        fit, judged = index_N % 2 != held, index_N % 2 == held
        mean_L = (y_NL * known_NL)[fit].sum(0) / known_NL[fit].sum(0).clamp_min(1)
        pull_NL = (y_NL - mean_L) * known_NL
        scores_NL[judged] = x_ND[judged] @ _ridge(x_ND[fit], pull_NL[fit], RIDGE * len(x_ND)) + mean_L
    return _macro(scores_NL, target_NL, mask_NL)


def _ridge(x_ND: Tensor, y_NL: Tensor, weight: float) -> Tensor:
    """Coefficients D,L; solved among samples where they are fewer than features, which is the same and less work."""
    if len(x_ND) >= x_ND.shape[1]:
        gram_DD = x_ND.T @ x_ND
        return torch.linalg.solve(gram_DD + weight * torch.eye(len(gram_DD), dtype=x_ND.dtype, device=x_ND.device), x_ND.T @ y_NL)
    gram_NN = x_ND @ x_ND.T
    return x_ND.T @ torch.linalg.solve(gram_NN + weight * torch.eye(len(gram_NN), dtype=x_ND.dtype, device=x_ND.device), y_NL)


class Window:
    """The shared queue of features, and the use of prototypes."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}  # backbone_ND, index_N, target_NL, mask_NL of the newest samples; use_K of this rank

    def count(self, features: dict[str, Tensor]) -> None:
        """Called each step on each rank: a sample uses the prototype that it is nearest to."""
        if (p_BK := features.get("prototypes")) is not None:
            # Not by bincount, which waits for the device to know the largest.
            used_K = p_BK.new_zeros(p_BK.shape[1]).index_add_(0, p_BK.argmax(dim=1), p_BK.new_ones(len(p_BK)))
            self.state["use_K"] = self.state.get("use_K", torch.zeros_like(used_K)).to(used_K.device) * KEPT_USE + used_K

    def measure(self, features: dict[str, Tensor], batch: Any, *, by_labels: bool = True) -> dict[str, float]:
        """The row of all numbers that these features and the window allow. Every rank must call; all get the same row.

        by_labels: the probes that labels judge, which cost as much as all the rest.
        """
        self._add({"backbone_ND": features["backbone"], "index_N": batch.index_B.to(features["backbone"].device)})
        if batch.target_BL is not None and batch.target_BL.shape[1]:
            self._add({"target_NL": batch.target_BL, "mask_NL": batch.mask_BL})
        z_ND = self.state["backbone_ND"]
        singular = spectrum(z_ND)
        row: dict[str, float | None] = {"rankme": rankme(singular), "window": len(z_ND)}
        if (fit := alpha_req(singular)) is not None:
            row["alpha_req"], row["alpha_req_r2"] = fit
        if "projector_0" in features:
            first_Nd, second_Nd = ranks.all_gather(features["projector_0"]), ranks.all_gather(features["projector_1"])
            row["contrastive_top1"] = contrastive_top1(first_Nd, second_Nd)
            shown_Nd = torch.cat([first_Nd, second_Nd])
        else:
            shown_Nd = centred(z_ND)
        row["std_ratio"], row["mean_cosine"] = std_ratio(shown_Nd), mean_cosine(shown_Nd)
        if by_labels and "target_NL" in self.state:
            held = (z_ND, self.state["index_N"], self.state["target_NL"], self.state["mask_NL"])
            row["knn_auroc"], row["linear_auroc"] = knn_auroc(*held), linear_auroc(*held)
        if "use_K" in self.state:
            use_K = ranks.all_sum(self.state["use_K"].to(features["backbone"].device))
            p = use_K / use_K.sum().clamp_min(1e-12)
            row["prototype_perplexity"] = float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()) / len(p))  # share of those there are
            row["prototypes_dead"] = float((p < 0.01 / len(p)).double().mean())
            row["prototype_samples"] = float(use_K.sum() / len(p))  # samples a prototype that these two rest on
        return {name: round(value, 6) for name, value in row.items() if value is not None}

    def _add(self, rows: dict[str, Tensor]) -> None:
        for name, value in rows.items():
            newest = ranks.all_gather(value)
            before = self.state.get(name, newest[:0]).to(newest.device)
            self.state[name] = torch.cat([before, newest])[-WINDOW:]
