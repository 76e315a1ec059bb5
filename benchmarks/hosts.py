"""A study over three hosts of one machine, one of which loses its network in the middle and another its power: does it end complete?

    nice .venv/bin/python benchmarks/hosts.py --out runs/hosts        # as root; some ten minutes on 2 cores

1,000 steps of SimCLR on two or three trainers, one a host, then eight cells; what happens to the hosts meanwhile: tests/three_hosts.py.
With --drain the third host is told before it goes, as by a spot notice, and nothing of the run may be lost. Exit code 0 when the study
ends with 0, every cell stands, and none was computed twice to its end.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from base.paths import ROOT

sys.path.insert(0, str(ROOT / "tests"))
CELLS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/hosts")
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    from namespaces import why_not
    from three_hosts import disturbed

    if reason := why_not():
        print(f"not possible here: {reason}")
        return 2
    folder = Path(options.out).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"load before: {os.getloadavg()}")
    ended = disturbed(folder, steps=1000, every=50, cells=CELLS, killed_after=2, drain=options.drain)
    print(f"exit code {ended.code}; {ended.stand} of {CELLS} cells stand, {ended.computed} were computed; load after: {os.getloadavg()}")
    print(f"pretraining: logged step {ended.logged}; went on at (step, workers) {ended.resumes}")
    kept = not options.drain or ended.resumes[0][0] >= ended.logged
    return 0 if ended.code == 0 and ended.stand == CELLS and ended.computed <= CELLS and kept else 1


if __name__ == "__main__":
    sys.exit(main())
