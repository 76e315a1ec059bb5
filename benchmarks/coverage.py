"""Does the primary interval hold what it says? Coverage in simulated studies of known truth, false declarations of a null, and rivals.

    python benchmarks/coverage.py                     # the table of docs/statistics.md: some 20 minutes on two cores
    python benchmarks/coverage.py --only null         # 2,000 studies of six comparisons without any difference
    python benchmarks/coverage.py --only quantiles    # which quantile: a linear model of 120 patients, its sums of squares drawn at once
    python benchmarks/coverage.py --only checkpoints  # one checkpoint a method: what Welch over fine-tuning seeds declares of methods

Coverage in percent of simulated studies; with 2,000 of them its standard error is 0.5. Every row stands for three worlds, in which seeds,
patients or their interaction make 60 % of the variance and the other two 20 % each; the least and the most of the three are given.
`double`: variance over seeds + bootstrap variance over patients, which holds the interaction twice; `percentile`: the Multi-Bootstrap as
published, 2.5 and 97.5 % of joint draws; `Welch`: over seeds alone, patients taken as given. The last line is the range of ours.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from scipy import stats

from analysis import power
from analysis.components import critical
from analysis.replicates import Array, Bootstrap, Scores
from analysis.statistics import Comparison, compare, holm
from base.paths import ROOT
from base.seeds import rng

sys.path.insert(0, str(ROOT / "tests"))
from simulated import World, study

SHARES = ((0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6))
DESIGNS = {"paired": (True, False), "unpaired": (False, False), "several pretraining seeds": (True, True)}
REPLICATES = 200  # a report draws 2,000


def world(metric: str, design: str, seeds: int, shares: tuple[float, float, float]) -> World:
    """120 patients; with several pretraining seeds they are `seeds`, each with two fine-tuning seeds."""
    paired, several = DESIGNS[design]
    base = World(metric, 2 if several else seeds, seeds if several else 1, paired, lift=0.03)
    variance = base.spread**2 / base.patients
    if metric == "auroc_mean":
        positives = base.prevalence[0] * base.patients
        variance = power.auroc_variance(base.level, positives, base.patients - positives)
    return shared_out(base, shares, variance)


def shared_out(world: World, shares: tuple[float, float, float], variance: float) -> World:
    """The world in which seeds, patients and their interaction have these shares of the estimate's variance.

    Args:
        variance: of one cell's metric from its patients, in the world as it is.
    """
    seeds, patients, interaction = shares
    cells = world.seeds * world.pretraining_seeds
    # A cell's own mistakes have half of what is not common; from there the others follow.
    own, source = interaction * cells, patients
    several = world.pretraining_seeds > 1
    checkpoint = interaction * world.pretraining_seeds / 2 if several else 0.0
    own = own / 2 if several else own
    scale = 0.5 / (own + source + checkpoint)
    of_seeds = seeds * scale * variance
    tuning, pretraining = (of_seeds / 3, of_seeds / 3) if several else (of_seeds, 0.0)
    return replace(
        world,
        mistakes=(0.5, source * scale, checkpoint * scale, own * scale),
        tuning_sd=math.sqrt(tuning * world.seeds),
        pretraining_sd=math.sqrt(pretraining * world.pretraining_seeds),
        both_sd=math.sqrt(of_seeds / 3 * cells) if several else 0.0,
        shared_sd=math.sqrt(of_seeds * world.seeds) if world.paired else 0.0,
    )


def tables(cells: Sequence[Scores], metric: str, bootstrap: Bootstrap) -> tuple[Array, Array]:
    """Metric (R, S) and its replicates (R, S, B)."""
    first = len({cell.source_seed for cell in cells})
    values_RSC = np.array([bootstrap(cell, metric) for cell in cells]).reshape(first, -1, bootstrap.replicates + 1)
    return values_RSC[..., 0], values_RSC[..., 1:]


def double(a: Sequence[Scores], b: Sequence[Scores], made: World, bootstrap: Bootstrap) -> tuple[float, float]:
    (a_RS, a_RSB), (b_RS, b_RSB) = (tables(side, made.metric, bootstrap) for side in (a, b))
    d_B = (a_RSB - b_RSB).mean((0, 1))
    if made.pretraining_seeds > 1 or not made.paired:
        axis = 1 if made.pretraining_seeds > 1 else 0
        units = [a_RS.mean(axis), b_RS.mean(axis)]
    else:
        units = [(a_RS - b_RS)[0]]
    terms = [(float(d_B.var(ddof=1)), made.patients - 1), *((float(unit.var(ddof=1)) / len(unit), len(unit) - 1) for unit in units)]
    variance = sum(term for term, _ in terms)
    df = variance**2 / sum(term**2 / free for term, free in terms)
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(variance)
    estimate = float(a_RS.mean() - b_RS.mean())
    return estimate - half, estimate + half


def percentile(a: Sequence[Scores], b: Sequence[Scores], made: World, bootstrap: Bootstrap) -> tuple[float, float]:
    draw = rng("percentile", bootstrap.seed)
    means = []
    tuned: np.ndarray | None = None
    for side in (a, b):
        _, x_RSB = tables(side, made.metric, bootstrap)
        r, s, count = x_RSB.shape
        pre_BR, own_BS = draw.integers(0, r, (count, r)), draw.integers(0, s, (count, s))
        tuned = own_BS if tuned is None or not made.paired else tuned
        each = np.arange(count)
        means.append(x_RSB.transpose(2, 0, 1)[each[:, None, None], pre_BR[:, :, None], tuned[:, None, :]].mean((1, 2)))
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def welch(a: Sequence[Scores], b: Sequence[Scores], made: World, bootstrap: Bootstrap) -> tuple[float, float]:
    (a_RS, _), (b_RS, _) = (tables(side, made.metric, bootstrap) for side in (a, b))
    axis = 1 if made.pretraining_seeds > 1 else 0
    if made.paired and made.pretraining_seeds == 1:
        interval = stats.ttest_1samp((a_RS - b_RS)[0], 0).confidence_interval()
    else:
        interval = stats.ttest_ind(a_RS.mean(axis), b_RS.mean(axis), equal_var=False).confidence_interval()
    return float(interval.low), float(interval.high)


Rival = Callable[[Sequence[Scores], Sequence[Scores], World, Bootstrap], tuple[float, float]]
RIVALS: dict[str, Rival] = {"double": double, "percentile": percentile, "Welch": welch}


def covered(made: World, name: str, numbers: range) -> Array:
    """How often ours and the rivals hold the true difference in the studies of these numbers."""
    hits = np.zeros(1 + len(RIVALS))
    for number in numbers:
        a, b = study(made, rng("coverage", name, number))
        bootstrap = Bootstrap(REPLICATES, number)
        found = compare(a, b, made.metric, bootstrap=bootstrap)
        intervals = [(found.low, found.high), *(rival(a, b, made, bootstrap) for rival in RIVALS.values())]
        hits += [low <= made.lift <= high for low, high in intervals]
    return hits


def parts(studies: int, jobs: int) -> list[range]:
    step = math.ceil(studies / (4 * jobs))
    return [range(start, min(studies, start + step)) for start in range(0, studies, step)]


def coverage(pool: ProcessPoolExecutor, studies: int, jobs: int) -> tuple[float, float]:
    print("| metric | design | seeds | ours | double | percentile | Welch |\n|---|---|---|---|---|---|---|", flush=True)
    everything: list[float] = []
    for metric, design, seeds in itertools.product(("dice", "auroc_mean"), DESIGNS, (3, 5, 10)):
        rates = []
        for shares in SHARES:
            made, name = world(metric, design, seeds, shares), f"{metric} {design} {seeds} {shares}"
            rates.append(100 * sum(pool.map(partial(covered, made, name), parts(studies, jobs))) / studies)
        table = np.array(rates)
        everything += table[:, 0].tolist()
        ranges = [f"{low:.1f} to {high:.1f}" for low, high in zip(table.min(0), table.max(0), strict=True)]
        print(f"| {metric} | {design} | {seeds} | **{ranges[0]}** | " + " | ".join(ranges[1:]) + " |", flush=True)
    return min(everything), max(everything)


def null_studies(made: World, numbers: range) -> Array:
    """(studies with any declared difference, comparisons whose interval excludes 0) of families of six comparisons."""
    hits = np.zeros(2)
    for number in numbers:
        found = [one_null(made, number, member) for member in range(6)]
        hits += [min(holm([c.p for c in found])) < 0.05, sum(c.excludes_zero for c in found)]
    return hits


def one_null(made: World, number: int, member: int) -> Comparison:
    a, b = study(made, rng("null", number, member, made.metric))
    return compare(a, b, made.metric, bootstrap=Bootstrap(REPLICATES, 6 * number + member))


def null(pool: ProcessPoolExecutor, studies: int, jobs: int) -> float:
    """Two sources of one distribution: six independent comparisons a study, corrected by Holm."""
    worst = 0.0
    for metric, design in (("dice", "paired"), ("auroc_mean", "paired"), ("dice", "several pretraining seeds")):
        made = world(metric, design, 3, (1 / 3, 1 / 3, 1 / 3))
        declared, single = 100 * np.sum([*pool.map(partial(null_studies, replace(made, lift=0.0)), parts(studies, jobs))], axis=0) / studies
        worst = max(worst, declared)
        print(f"{metric}, {design}, 3 seeds: {declared:.1f} % of studies declare, {single / 6:.1f} % of intervals exclude 0")
    return worst


def one_checkpoint(made: World, numbers: range) -> Array:
    """(Welch over fine-tuning seeds, ours worded as about methods, ours as about encoders) declare a difference of equal methods."""
    hits = np.zeros(3)
    for number in numbers:
        a, b = study(made, rng("checkpoints", number, made.pretraining_seeds))
        bootstrap = Bootstrap(REPLICATES, number)
        found = compare(a, b, made.metric, bootstrap=bootstrap)
        values_a, values_b = ([bootstrap(cell, made.metric)[0] for cell in side] for side in (a, b))
        declared = found.p < 0.05
        hits += [
            stats.ttest_ind(values_a, values_b, equal_var=False).pvalue < 0.05,
            declared and found.about == "methods",
            declared and found.about != "methods",
        ]
    return hits


def checkpoints(pool: ProcessPoolExecutor, studies: int, jobs: int) -> None:
    """Checkpoints of a method spread as much as its fine-tuning seeds."""
    for pretraining, seeds in ((1, 10), (3, 10)):
        made = World("dice", seeds, pretraining, paired=False, patients=400, pretraining_sd=0.02, tuning_sd=0.0, both_sd=0.02, spread=0.05)
        welched, methods, encoders = 100 * np.sum([*pool.map(partial(one_checkpoint, made), parts(studies, jobs))], axis=0) / studies
        print(
            f"equal methods, {pretraining} checkpoints of each, {seeds} fine-tuning seeds: Welch over all runs declares {welched:.1f} %, "
            f"ours {methods:.1f} % about methods and {encoders:.1f} % about encoders (these weights)"
        )


def linear(seeds: int, shares: tuple[float, float, float], level: float, draws: int = 100_000, patients: int = 120) -> list[float]:
    """Coverage of four intervals for paired seeds and a mean over patients, from draws of the mean squares alone."""
    draw, free = rng("linear", seeds, str(shares), str(level)), seeds - 1
    of_seeds, of_patients, of_both = shares
    among = (of_seeds + of_both) * draw.chisquare(free, draws) / free
    both = of_both * draw.chisquare((patients - 1) * free, draws) / ((patients - 1) * free)
    resampled = (of_patients + of_both) * draw.chisquare(patients - 1, draws) / (patients - 1)
    away, rest = np.abs(draw.normal(0, 1, draws)), np.maximum(0, resampled - both)
    of_few, of_many = (float(stats.t.ppf(0.5 + level / 2, df)) for df in (free, patients - 1))

    def welch_satterthwaite(left: Array) -> Array:
        df = (among + left) ** 2 / (among**2 / free + left**2 / (patients - 1))
        return np.asarray(stats.t.ppf(0.5 + level / 2, df) * np.sqrt(among + left))

    share, se = among / (among + rest), np.sqrt(among + rest)
    halves = (
        critical(among, free, rest, patients - 1, 0.5 - level / 2) * se,
        (share * of_few + (1 - share) * of_many) * se,
        welch_satterthwaite(rest),
        welch_satterthwaite(resampled),
    )
    return [100 * float(np.mean(away <= half)) for half in halves]


def quantiles() -> None:
    """Ours, Cochran and Cox's, Satterthwaite's with the interaction once and twice, at 95 % and at Holm's first step of 10 and of 50."""
    mixes = [*SHARES, (1 / 3, 1 / 3, 1 / 3), (0.9, 0.05, 0.05), (0.05, 0.9, 0.05), (0.05, 0.05, 0.9)]
    print("| seeds | level | ours | Cochran and Cox | Satterthwaite | with the interaction twice |\n|---|---|---|---|---|---|")
    for seeds, level in itertools.product((2, 3, 5, 10), (0.95, 0.995, 0.999)):
        table = np.array([linear(seeds, mix, level) for mix in mixes])
        ranges = [f"{low:.1f} to {high:.1f}" for low, high in zip(table.min(0), table.max(0), strict=True)]
        print(f"| {seeds} | {100 * level:g} | " + " | ".join(ranges) + " |", flush=True)


def wanted(only: str | None) -> Iterator[str]:
    yield from [only] if only else ["quantiles", "coverage", "null", "checkpoints"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=["quantiles", "coverage", "null", "checkpoints"])
    args = parser.parse_args()
    began = time.monotonic()
    last = ""
    with ProcessPoolExecutor(args.jobs) as pool:
        for part in wanted(args.only):
            if part == "coverage":
                low, high = coverage(pool, args.studies, args.jobs)
                last = f"coverage of the primary interval: {low:.1f} to {high:.1f} % (wanted: 93 to 97)"
            elif part == "null":
                last = f"null studies that declare: at most {null(pool, args.studies, args.jobs):.1f} % (stated: 5)"
            elif part == "quantiles":
                quantiles()
            else:
                checkpoints(pool, args.studies, args.jobs)
            print(last or "", f"[{time.monotonic() - began:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
