"""Encoders compared layer by layer: the studies' figures of what training changes, and of what random weights share.

    found = across({"before": a, "after": b}, [("before", "after")], probe, cuts)          # Layer a cut: Fig. 3 of Transfusion, 2019
    top = against_random(["p0", "p1"], ["r0", "r1", "r2"], values)                         # Fig. 2: pretrained-random, random-random
    line = start_against_end(at_start, at_end, runs)                                       # Fig. 4: R squared over pairs of runs

One pass over the images serves all encoders, cuts and pairs. Intervals are over runs, not pairs: pairs that share a run are not
independent. Source: Raghu, Zhang, Kleinberg and Bengio, Transfusion, NeurIPS 2019 (arXiv 1902.07208), section 4.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from analysis.activations import walk
from analysis.correlation import Interval, pearson
from analysis.moments import Spatial, Sums
from analysis.similarity import MEASURES, THRESHOLD, Similarity, summarise
from base.errors import RequestError
from encoders.build import Encoder
from encoders.cuts import Cut, last_of_each

Names = tuple[str, str]
FEWEST = 3  # runs of a group, under which no interval is given
FEWEST_OF_LINE = 5  # starts, of R squared
SAME = 1e-9  # from 1: similarity of equal weights
POSITIONS = 64  # of a map that are folded: rows far outnumber channels, and the first layers have thousands


@dataclass(frozen=True)
class Across:
    """Similarities by pair of encoders and by cut. images, sha256: of the pixels that were shown, in their order."""

    cuts: list[str]
    pairs: dict[Names, list[Similarity]]
    images: int
    sha256: str


def across(
    encoders: Mapping[str, Encoder],
    pairs: Sequence[Names],
    batches: Iterable[Tensor],
    cuts: Sequence[str] | None = None,
    *,
    spatial: Spatial = "fold",
    positions: int | None = POSITIONS,
    threshold: float = THRESHOLD,
    energy: str = "s2",
) -> Across:
    """Each pair of encoders at each cut, with both baselines. Where rows are too few for CCA its measures are NaN and `few` says why.

    Args:
        batches: of stored pixels u8 BCHW, such as a Probe.
        cuts: their names; by default all that every encoder has.

    Raises:
        RequestError: encoders of different architectures, no such cut, no pair, images of another number of channels.
    """
    if not pairs:
        raise RequestError("no pair of encoders to compare")
    architectures = sorted({encoder.architecture for encoder in encoders.values()})
    if len(architectures) > 1:
        hint = "analysis.similarity compares any two arrays, maps of two sizes with spatial=interpolate or dft"
        raise RequestError(f"{' and '.join(architectures)} have no cut points in common", hint=hint)
    chosen = list(cuts) if cuts else [cut.name for cut in common(list(encoders.values()))]
    names = list(encoders)
    wanted = [(names.index(a), names.index(b)) for a, b in pairs]
    sums = [Sums(wanted, spatial=spatial, positions=positions, permuted=True) for _ in chosen]
    pixels = hashlib.sha256()
    for taken in walk(list(encoders.values()), _hashed(batches, pixels), chosen):
        for at, one in enumerate(sums):
            one.add([maps[at] for maps in taken])
    found: dict[Names, list[Similarity]] = {pair: [] for pair in pairs}
    for one in sums:
        straight, permuted = one.pairs(), one.permuted_pairs()
        for pair, key in zip(pairs, wanted, strict=True):
            found[pair].append(summarise(straight[key], permuted[key], one.images, threshold=threshold, energy=energy))
    return Across(chosen, found, sums[0].images, pixels.hexdigest())


def common(encoders: Sequence[Encoder]) -> list[Cut]:
    """The cuts of the shortest, which the others have too."""
    return list(min(encoders, key=lambda encoder: len(encoder.cuts)).cuts)


def top(encoders: Sequence[Encoder]) -> list[str]:
    """The last cuts of the last resolutions: the layers (CBR) or stages that Transfusion's Fig. 2 averages over."""
    return [cut.name for cut in last_of_each(common(encoders))[-2:]]


def _hashed(batches: Iterable[Tensor], pixels: "hashlib._Hash") -> Iterable[Tensor]:
    for batch in batches:
        pixels.update(str(tuple(batch.shape[1:])).encode())
        pixels.update(batch.cpu().contiguous().numpy().tobytes())
        yield batch


def averaged(found: Sequence[Similarity]) -> Similarity:
    """Several runs of one kind as one: means of the measures and of the baselines, all coefficients; the counts are the first's."""

    def mean(held: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([one[name] for one in held])) for name in MEASURES}

    return dataclasses.replace(
        found[0],
        values=mean([one.values for one in found]),
        gaussian=mean([one.gaussian for one in found]),
        permuted=mean([one.permuted for one in found]),
        coefficients=np.concatenate([one.coefficients for one in found]),
        permuted_coefficients=np.concatenate([one.permuted_coefficients for one in found]),
    )


# -- groups of runs


Values = Mapping[Names, float]


def value_of(values: Values, a: str, b: str) -> float:
    """Of the pair in either order."""
    return values[a, b] if (a, b) in values else values[b, a]


@dataclass(frozen=True)
class AgainstRandom:
    """Mean similarities of pretrained with random runs, of random runs among themselves, and the difference.

    Intervals are over runs of each kind, further ones of the same study, and are left out where a kind has fewer than three.
    """

    pretrained_random: Interval
    random_random: Interval
    difference: Interval


def against_random(pretrained: Sequence[str], random: Sequence[str], values: Values) -> AgainstRandom:
    """Do pretrained and random weights, both trained, come to more different representations than two random ones?

    Args:
        values: a similarity of each pair of names, in either order.

    Raises:
        RequestError: no pretrained run, or one random run.
    """
    if not pretrained or len(random) < 2:
        raise RequestError(
            f"{len(pretrained)} pretrained and {len(random)} random runs", hint="one and two at least, three each for intervals"
        )

    def mixed(p: Sequence[str], r: Sequence[str]) -> float:
        return float(np.mean([value_of(values, a, b) for a in p for b in r]))

    def own(r: Sequence[str]) -> float:
        return float(np.mean([value_of(values, a, b) for a, b in itertools.combinations(r, 2)]))

    return AgainstRandom(
        _jackknife(mixed, pretrained, random), _jackknife(own, random), _jackknife(lambda p, r: mixed(p, r) - own(r), pretrained, random)
    )


def _jackknife(of: Callable[..., float], *groups: Sequence[Any]) -> Interval:
    """A statistic of groups of runs, its 95 % interval from leaving out one run at a time: a run's own share moves all pairs that it is in.

    Student's t with one degree of freedom fewer than the smallest group has runs. Source: Arvesen, Jackknifing U-statistics, Annals of
    Mathematical Statistics 40, 1969.
    """
    from scipy import stats

    estimate, fewest = of(*groups), min(map(len, groups))
    if fewest < FEWEST:
        return Interval(estimate)
    variance = 0.0
    for at, runs in enumerate(groups):
        left = [of(*groups[:at], [run for run in runs if run != out], *groups[at + 1 :]) for out in runs]
        variance += (len(runs) - 1) * float(np.var(left))
    half = float(stats.t.ppf(0.975, fewest - 1)) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


@dataclass(frozen=True)
class StartAgainstEnd:
    """Similarity of each pair of runs at initialisation and after training, and the square of their correlation. same: pairs left out."""

    pairs: list[tuple[str, str, float, float]]
    same: int
    r_squared: Interval


def start_against_end(at_start: Values, at_end: Values, runs: Sequence[str]) -> StartAgainstEnd:
    """How far similarity at initialisation foretells similarity after training: layers that hardly move keep it.

    Pairs that start from the same weights (one source, fine-tuned twice) are left out: a crowd of them at 1 would make R squared by itself.

    The interval is that of the correlation on Fisher's scale, by leaving out the runs of one start at a time, squared; none under
    FEWEST_OF_LINE starts. (A bootstrap of runs never holds a true 0, which no square is under.)

    Raises:
        RequestError: fewer than three pairs of different starting weights.
    """
    every = [(a, b, value_of(at_start, a, b), value_of(at_end, a, b)) for a, b in itertools.combinations(runs, 2)]
    pairs = [pair for pair in every if not pair[2] >= 1 - SAME]
    if len(pairs) < 3:
        counted = f"{len(pairs)} pairs of runs with different starting weights"
        raise RequestError(f"{counted} are too few for R squared", hint="at least three runs of different starting weights")

    starts: list[list[str]] = []
    for run in runs:
        same = [held for held in starts if value_of(at_start, held[0], run) >= 1 - SAME]
        starts = [*starts, [run]] if not same else [[*held, run] if held is same[0] else held for held in starts]

    def line(left: Sequence[Sequence[str]]) -> float:
        held = {run for start in left for run in start}
        among = [pair for pair in pairs if held >= {*pair[:2]}]
        return float(np.arctanh(pearson([pair[2] for pair in among], [pair[3] for pair in among])))

    r = pearson([pair[2] for pair in pairs], [pair[3] for pair in pairs])
    if len(starts) < FEWEST_OF_LINE or not abs(r) < 1 - 1e-12:
        return StartAgainstEnd(pairs, len(every) - len(pairs), Interval(r**2))
    found = _jackknife(line, starts)
    low, high = sorted((math.tanh(found.low) ** 2, math.tanh(found.high) ** 2))
    return StartAgainstEnd(pairs, len(every) - len(pairs), Interval(r**2, 0.0 if found.low < 0 < found.high else low, high))
