"""Is a planted difference found as often as `allograft plan` promises? Simulated studies against analysis.power.

    python benchmarks/power.py                # some minutes on two cores

Each row is a world: its spreads are measured on draws of their own and given to `power`, which says what difference it finds in 80 % of
studies; that is planted, and each study's comparison is held against Holm's first step. `needed`: the difference that 80 % of the very
same studies would have found, the planted one moved. The last line is promised over needed, least and most.
"""

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from analysis.power import ALPHA, WANTED_POWER, Spread, power
from analysis.replicates import Bootstrap, metric_B
from analysis.statistics import compare
from base.paths import ROOT
from base.seeds import rng

sys.path.insert(0, str(ROOT / "tests"))
from simulated import World, study

REPLICATES = 500
MISTAKES = (0.5, 0.0, 0.2, 0.3)
DICE = World("dice", patients=60, tuning_sd=0.006, mistakes=MISTAKES)
AUROC = World("auroc_mean", patients=300, tuning_sd=0.01, mistakes=MISTAKES)
SEVERAL = replace(DICE, seeds=2, pretraining_seeds=3, tuning_sd=0.0, both_sd=0.006, pretraining_sd=0.01)
# (world, comparisons in the family, whether the other side's weights are drawn with every fine-tuning seed)
WORLDS = [
    (DICE, 1, False),
    (replace(DICE, seeds=5), 6, False),
    (replace(DICE, seeds=10, patients=200, tuning_sd=0.003), 20, False),
    (SEVERAL, 1, False),
    (replace(SEVERAL, pretraining_seeds=5), 6, False),
    (SEVERAL, 1, True),
    (replace(SEVERAL, seeds=3), 1, True),
    (replace(SEVERAL, seeds=5), 1, True),
    (replace(SEVERAL, seeds=3, pretraining_seeds=5), 1, True),
    (AUROC, 1, False),
    (replace(AUROC, seeds=5, prevalence=(0.1,), level=0.75), 6, False),
    (replace(AUROC, seeds=5, patients=400, prevalence=(0.05, 0.1, 0.3)), 6, False),
    (replace(AUROC, seeds=10, patients=400, prevalence=(0.1,), level=0.85), 20, False),
    (replace(AUROC, seeds=2, pretraining_seeds=5, prevalence=(0.2,), tuning_sd=0.0, both_sd=0.01, pretraining_sd=0.015), 6, False),
]


def measured(world: World, draws: int = 1500) -> Spread:
    """What `power` is told: correlations of two cells over draws of patients, in the world without effects of seeds."""
    still = replace(world, seeds=2, pretraining_seeds=1, tuning_sd=0.0, both_sd=0.0, pretraining_sd=0.0)
    values = []
    for number in range(draws):
        a, b = study(still, rng("spread", number))
        values.append([metric_B(cell, world.metric, np.ones((1, len(cell.ids_N))))[0] for cell in (*a, *b)])
    related = np.corrcoef(np.array(values).T)
    same, other = (related[0, 1] + related[2, 3]) / 2, related[:2, 2:].mean()
    tuning = math.hypot(world.tuning_sd, world.both_sd)
    return Spread(world.level, tuning, world.pretraining_sd, float(same), float(other), 0.0, world.spread)


def studies_of(world: World, level: float, drawn: bool, numbers: range) -> list[tuple[float, float]]:
    """(estimate less the planted difference, half the interval's width) of every study."""
    rows = []
    for number in numbers:
        both = max(world.pretraining_seeds, world.seeds if drawn else 0)
        a, b = study(replace(world, pretraining_seeds=both), rng("power", number))
        if drawn:
            a, b = [cell for cell in a if cell.source_seed < world.pretraining_seeds], [cell for cell in b if cell.source_seed == cell.seed]
        result = compare(a, b, world.metric, bootstrap=Bootstrap(REPLICATES, number), level=level)
        rows.append((result.estimate - world.lift, result.width / 2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    began, ratios = time.monotonic(), []
    print("| metric | patients | prevalence | pretraining x fine-tuning seeds | family | promised | found | needed | promised / needed |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        for world, family, drawn in WORLDS:
            spread, masks = measured(world), world.metric == "dice"
            sizes = {"patients": world.patients, "seeds": world.seeds, "family": family}
            # As `allograft plan` asks: the side that has fewer decides.
            sizes["pretraining_seeds"] = min(world.pretraining_seeds, world.seeds) if drawn else world.pretraining_seeds
            told = power(world.metric, prevalence=None if masks else world.prevalence, spread=spread, **sizes)
            planted = replace(world, lift=told.detectable)
            step = math.ceil(args.studies / (4 * args.jobs))
            numbers = [range(start, min(args.studies, start + step)) for start in range(0, args.studies, step)]
            rows = np.concatenate(list(pool.map(partial(studies_of, planted, 1 - ALPHA / family, drawn), numbers)))
            found = float(np.mean(np.abs(rows[:, 0] + planted.lift) > rows[:, 1]))
            needed = float(np.quantile(rows[:, 1] - rows[:, 0], WANTED_POWER))
            ratios.append(told.detectable / needed)
            prevalence = "" if masks else ", ".join(f"{share:g}" for share in world.prevalence)
            seeds = f"{world.pretraining_seeds} x {world.seeds}" + (f" against {world.seeds} drawn" if drawn else "")
            numbers_told = f"{told.detectable:.4f} | {found:.0%} | {needed:.4f} | {ratios[-1]:.2f}"
            print(f"| {world.metric} | {world.patients} | {prevalence} | {seeds} | {family} | {numbers_told} |", flush=True)
    print(f"promised over needed: {min(ratios):.2f} to {max(ratios):.2f} (wanted: 0.8 to 1.2) [{time.monotonic() - began:.0f} s]")


if __name__ == "__main__":
    main()
