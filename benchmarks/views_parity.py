"""Do our views train as well as lightly's? Runs studies/views-parity.yaml; prints the differences in AUROC and Dice with their intervals.

    .venv/bin/python benchmarks/views_parity.py NIH MONTGOMERY [key=value ...]     # folders of raw files; goes on where it stopped

Six pretrainings and 28 cells: an hour on two cores; preset=smoke takes minutes and claims nothing. Both against random weights are
printed too: two pretrainings that taught nothing would be equal as well. The last line is ours minus lightly's.
"""

import os
import subprocess
import sys

from analysis.evidence import gather
from analysis.loaded import scores
from analysis.replicates import Bootstrap
from analysis.statistics import Comparison, compare
from base.paths import ROOT

OURS, LIGHTLY = "simclr-ours", "simclr-lightly"


def line(strategy: str, metric: str, a: str, b: str, found: Comparison) -> str:
    seeds = f"{found.pretraining_seeds} pretraining seeds, {found.patients} patients"
    return f"{strategy}, {metric}, {a} minus {b}: {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {seeds}"


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    nih, montgomery, *more = sys.argv[1:]
    settings = [f"data.nih-cxr14.raw={os.path.abspath(nih)}", f"data.montgomery.raw={os.path.abspath(montgomery)}", *more]
    out = next((os.path.abspath(setting[4:]) for setting in settings if setting.startswith("out=")), os.path.abspath("runs/views-parity"))
    subprocess.run([sys.executable, "-m", "cluster", "run", str(ROOT / "studies" / "views-parity.yaml"), *settings], check=True)
    cells, bootstrap = gather(out).cells, Bootstrap()
    for a, b in ((OURS, "random"), (LIGHTLY, "random"), (OURS, LIGHTLY)):
        for task, strategy in sorted({(cell.task, cell.strategy) for cell in cells}):
            held = {name: [cell for cell in cells if (cell.source, cell.task, cell.strategy) == (name, task, strategy)] for name in (a, b)}
            of_a, of_b = ([found for cell in held[name] if (found := scores(cell))] for name in (a, b))
            metric = held[a][0].primary() or "auroc_mean"
            print(line(f"{task}, {strategy}", metric, a, b, compare(of_a, of_b, metric, bootstrap=bootstrap)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
