"""Whether two sources differ, with an interval over pretraining seeds, fine-tuning seeds and test patients: the one analysis that declares.

docs/statistics.md says why it is this one, with what it was measured to hold.

result = compare(scores_a, scores_b, "auroc_mean"); result.about; adjusted = holm([r.p for r in results]); result.detectable

Estimator. Difference of the sides' means: of a side, over pretraining seeds of the mean over their fine-tuning seeds. Its variance is
that of the Multi-Bootstrap (Sellam et al., ICLR 2022), which draws pretraining seeds, fine-tuning seeds and patients together, with
three changes. (1) Patients are drawn, and of each such draw the variance over draws of seeds is written down, since it has a closed
form: no noise from drawing seeds. (2) It is the unbiased one, with R - 1 and S - 1 where drawing from R or S seeds gives R or S: of 3
seeds the plain bootstrap sees two thirds. (3) A bootstrap of crossed factors counts their interaction three times (Owen, Ann. Appl.
Stat. 2007): once among seeds, once among patients, and once more in every draw of both. It stays among the seeds, which are fewer.
Interval = estimate +- c sqrt(variance), since a normal quantile knows nothing of a variance that was estimated from three seeds: c is
that of Student's distributions for seeds and for patients, mixed by their shares of the variance (`analysis.components.weight`).

Fine-tuning seeds that both sides hold are paired. Pretraining seeds are not: seed 0 of two methods has nothing in common.
With one seed only patients can be resampled: such an interval says so (`basis`) and declares nothing.
Legend: R pretraining seeds, S fine-tuning seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from pydantic import ConfigDict
from scipy import optimize, special

from analysis.claims import PRETRAINING_SEEDS
from analysis.components import Parts, parts, side_of
from analysis.replicates import Array, Bootstrap, Scores, same_images
from base.config import Number

LEAST_DRAWS = 0.5  # of the draws of patients must keep both values of every label, or nothing is known of the patients
LEVEL, POWER = 0.05, 0.8  # of the test, and of repetitions that find what is called detectable
BOUND = "both at a bound: patients and seeds do not vary"


def _unknown() -> float:  # a default that is not finite stands in no schema
    return math.nan


@dataclass(frozen=True)
class Comparison:
    """Difference of two sources.

    `basis` is "seeds and patients", "patients only" (one seed) or "not comparable" (then all is NaN and `why` says it). `why` is also said
    where nothing varied: then the interval is unbounded, unless both sides are the same predictions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    estimate: Number
    low: Number
    high: Number
    se: Number
    df: Number
    p: Number
    basis: str
    units: int = 0  # of the side that has fewer: fine-tuning seeds; pretraining seeds where each has several of these or all the same
    patients: int = 0
    images: int = 0
    # Both of the estimate, in squared units of the metric; the first with what seeds do on few patients only.
    seed_variance: Number = field(default_factory=_unknown)
    patient_variance: Number = field(default_factory=_unknown)
    redrawn: int = 0
    pretraining_seeds: int = 1  # of the side that has fewer; random weights are drawn anew with every fine-tuning seed
    per_seed: tuple[Number, ...] = ()
    why: str = ""
    # The part of seed_variance between pretraining seeds, where it can be told apart.
    pretraining_variance: Number = field(default_factory=_unknown)
    seeds_df: Number = field(default_factory=_unknown)  # with which seed_variance was estimated

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def width(self) -> float:
        return self.high - self.low

    @property
    def parts(self) -> Parts:
        """The variance by what it comes from: gives quantiles and p at any level, which `df` does at 95 % only."""
        if not math.isfinite(self.seeds_df):  # of one kind
            return Parts(0.0, 0, self.se**2, self.df)
        patients = 0.0 if math.isnan(self.patient_variance) else self.patient_variance
        return Parts(self.seed_variance, self.seeds_df, patients, self.patients - 1, self.pretraining_variance)

    @property
    def about(self) -> str:
        """What may be claimed. With fewer than 3 pretraining seeds a side the next run of a method may turn it round."""
        return "methods" if self.pretraining_seeds >= PRETRAINING_SEEDS else "encoders (these weights)"

    @cached_property
    def detectable(self) -> float:
        """Smallest true difference that a study with this one's variance would have found in POWER of repetitions, two-sided at LEVEL.

        Solves the noncentral t for its centre at the observed standard error and degrees of freedom; NaN where there is neither.
        """
        if not (self.se > 0 and self.df > 0):
            return math.nan
        critical = -float(special.stdtrit(self.df, LEVEL / 2))

        def short(centre: float) -> float:
            return 1 - POWER - float(special.nctdtr(self.df, centre, critical))

        high = critical + 2.0
        while short(high) < 0 and high < 1e4:
            high *= 1.5
        return float(optimize.brentq(short, 0.0, high)) * self.se


def not_comparable(why: str) -> Comparison:
    nan = math.nan
    return Comparison(nan, nan, nan, nan, nan, nan, "not comparable", why=why)


def compare(
    a: Sequence[Scores], b: Sequence[Scores], metric: str, *, bootstrap: Bootstrap | None = None, level: float = 0.95
) -> Comparison:
    """Difference A - B of two sources in `metric` with its interval; see the head of this file.

    Args:
        a, b: one Scores per fine-tuned cell, of one strategy, task, fraction and resolution.
        bootstrap: share one over the comparisons of a study.
    """
    bootstrap = bootstrap or Bootstrap()
    if not a or not b:
        return not_comparable("one of the two has no finished cell")
    if not same_images([*a, *b]):
        return not_comparable("the two were not tested on the same images")
    draw = bootstrap.draw(a[0], metric)
    if len(draw.weight_BN) < LEAST_DRAWS * bootstrap.replicates:
        kept = f"{len(draw.weight_BN)} of {bootstrap.replicates} draws of patients"
        return not_comparable(f"too few patients have a label: {kept} hold both of its values")
    sides = [side_of(cells, metric, bootstrap) for cells in (a, b)]
    both = sorted(sides[0].common & sides[1].common)
    simple = not any(side.nested for side in sides)
    if simple and both and (len(both) > 1 or min(side.units for side in sides) == 1):
        sides = [side.only(both) for side in sides]  # a seed that only one side has is in no pair
        a, b = ([cell for cell in cells if cell.seed in both] for cells in (a, b))
    estimate = float(sides[0].mean_C()[0] - sides[1].mean_C()[0])
    if not math.isfinite(estimate):
        return not_comparable("the metric is not a number")
    found, tail = parts(sides, draw.patients), (1 - level) / 2
    se, df = found.se, found.df(tail)
    known = df > 0
    half = found.critical(tail) * se if known else (0.0 if _same(a, b) else math.inf)
    whole = all(side.units > 1 for side in sides)
    paired = simple and len(both) == sides[0].units == sides[1].units
    return Comparison(
        estimate,
        estimate - half,
        estimate + half,
        se,
        df,
        found.p(abs(estimate) / se) if known else 1.0,
        "seeds and patients" if whole else "patients only",
        units=min(side.units for side in sides),
        patients=draw.patients,
        images=len(a[0].ids_N),
        seed_variance=found.seeds if whole else math.nan,
        patient_variance=found.patients,
        redrawn=draw.redrawn,
        pretraining_seeds=min(len({s.source_seed for s in cells}) for cells in (a, b)),
        per_seed=tuple(float(sides[0].groups[0][seed][0] - sides[1].groups[0][seed][0]) for seed in both) if paired else (),
        why="" if known or half == 0 else BOUND,
        pretraining_variance=found.pretraining,
        seeds_df=found.seeds_df if whole else math.nan,
    )


def _same(a: Sequence[Scores], b: Sequence[Scores]) -> bool:
    """Whether both sides hold the same predictions, cell by cell, and not merely all of them at one value."""

    def values(cells: Sequence[Scores]) -> list[Array]:
        ordered = sorted(cells, key=lambda cell: (cell.source_seed, cell.seed))
        return [held for cell in ordered if (held := cell.score_NL if cell.dice_N is None else cell.dice_N) is not None]

    one, other = values(a), values(b)
    return len(one) == len(other) and all(np.array_equal(x, y) and np.ptp(x) > 0 for x, y in zip(one, other, strict=True))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (Scand. J. Stat. 1979), in the order given; NaN stays NaN and does not count in the family."""
    adjusted = [math.nan] * len(p)
    order = sorted((i for i, value in enumerate(p) if math.isfinite(value)), key=lambda i: p[i])
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted
