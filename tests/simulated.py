"""Studies with a known truth, to measure what the statistics hold: benchmarks/coverage.py, benchmarks/power.py and tests.

a, b = study(World(metric="dice", seeds=5, lift=0.02), rng("any", 0)); compare(a, b, "dice")

Two sources, each a method with pretraining seeds, each of those with fine-tuning seeds, all tested on the same patients. The metric of a
cell is level + effects of its seeds; its mistakes on a patient have a part that all cells share and parts of the source, the
checkpoint and the cell. AUROC: scores of two normal classes of variance 1, so that a cell's is known; Dice: normal by image, not cut at 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from analysis.replicates import Array, Scores


@dataclass(frozen=True)
class World:
    """What studies are drawn from. Standard deviations are of the metric; `mistakes` are shares of a cell's variance on a patient that all
    cells, all of its source, all of its checkpoint and it alone have: they add up to 1."""

    metric: str = "auroc_mean"  # or "dice"
    seeds: int = 3  # fine-tuning seeds of every pretraining seed
    pretraining_seeds: int = 1
    paired: bool = True  # both sides use the same fine-tuning seeds
    patients: int = 120
    images: int = 1  # of every patient
    prevalence: Sequence[float] = (0.3,)  # of every label
    level: float = 0.8  # the metric of B
    lift: float = 0.0  # by which A is truly better
    pretraining_sd: float = 0.0
    tuning_sd: float = 0.01
    both_sd: float = 0.0  # of a fine-tuning seed with one checkpoint only
    shared_sd: float = 0.0  # of a fine-tuning seed on both sides alike: cancels where they are paired
    mistakes: tuple[float, float, float, float] = (0.5, 0.2, 0.0, 0.3)
    spread: float = 0.12  # Dice: standard deviation over images

    def mean(self, side: int) -> float:
        """The metric of a side (A: 0, B: 1) over all seeds and patients."""
        return self.level + (self.lift if side == 0 else 0.0)

    @property
    def slope(self) -> float:
        """Change of AUROC with the distance of the classes."""
        return math.exp(-(float(special.ndtri(self.level)) ** 2) / 2) / math.sqrt(4 * math.pi)


def _effects(world: World, draw: np.random.Generator) -> Array:
    """(2 sides, R, S): what seeds add to the metric."""
    count = (2, world.pretraining_seeds, world.seeds)
    of_checkpoint = draw.normal(0, world.pretraining_sd, (2, count[1], 1))
    of_seed = draw.normal(0, world.tuning_sd, (2, 1, count[2]))
    of_both = draw.normal(0, world.both_sd, count)
    shared = draw.normal(0, world.shared_sd, (1 if world.paired else 2, 1, count[2]))
    return np.asarray(of_checkpoint + of_seed + of_both + shared)


def _mistakes(world: World, draw: np.random.Generator, labels: int) -> Array:
    """(2, R, S, N, L) of variance 1; half of each part is of the patient where one has several images."""
    sides, r, s = (1, 2, 2, 2), (1, 1, world.pretraining_seeds, world.pretraining_seeds), (1, 1, 1, world.seeds)
    total = np.zeros((2, world.pretraining_seeds, world.seeds, world.patients * world.images, labels))
    for share, shape in zip(world.mistakes, zip(sides, r, s, strict=True), strict=True):
        of_image = draw.normal(0, 1, (*shape, world.patients, world.images, labels))
        if world.images > 1:
            of_image = (of_image + draw.normal(0, 1, (*shape, world.patients, 1, labels))) / math.sqrt(2)
        total += math.sqrt(share) * of_image.reshape(*shape, -1, labels)
    return total


def study(world: World, draw: np.random.Generator) -> tuple[list[Scores], list[Scores]]:
    """Cells of the two sides. Every label has round(prevalence x patients) positive patients."""
    labels = len(world.prevalence) if world.metric == "auroc_mean" else 1
    names = np.arange(world.patients * world.images).astype(str)
    patient_N = np.repeat(np.arange(world.patients), world.images).astype(str).astype(object)
    effects, noise = _effects(world, draw), _mistakes(world, draw, labels)
    target_NL, variance, slope = None, 0.0, world.slope
    if world.metric == "auroc_mean":
        positive_PL = np.arange(world.patients)[:, None] < np.round(np.asarray(world.prevalence) * world.patients)
        target_NL = np.repeat(draw.permuted(positive_PL, axis=0), world.images, axis=0).astype(float)
        sds = (world.pretraining_sd, world.tuning_sd, world.both_sd, world.shared_sd)
        variance = sum(sd**2 for sd in sds) / slope**2
    sides: list[list[Scores]] = []
    for side in (0, 1):
        cells = []
        # The mean of a normal distribution function over normal effects is one with their variance added.
        middle = math.sqrt(2 + variance) * float(special.ndtri(world.mean(side))) if target_NL is not None else world.mean(side)
        for r in range(world.pretraining_seeds):
            for s in range(world.seeds):
                seed, added, noise_NL = s + (0 if world.paired else 1000 * side), effects[side, r, s], noise[side, r, s]
                if target_NL is None:
                    dice_N = middle + added + world.spread * noise_NL[:, 0]
                    cells.append(Scores(seed, names, patient_N, dice_N=dice_N, source_seed=r))
                else:
                    apart_NL = target_NL * (middle + added / slope)
                    cells.append(Scores(seed, names, patient_N, target_NL, apart_NL + noise_NL, source_seed=r))
        sides.append(cells)
    return sides[0], sides[1]
