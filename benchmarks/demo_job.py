"""The demo as a Ray job on a head and a worker, everything on an S3 server, tracked by an MLflow server: equal to the demo on disk?

    .venv/bin/python benchmarks/demo_job.py [LOCAL]      # LOCAL: the folder of a finished demo, default runs/demo-job (made if missing)

Starts the services of docker/compose.yaml on loopback (`tests/services.py`), submits studies/demo.yaml with `ray job submit`, and ends by
saying whether the exit code is 0 and every row of results.csv is the local run's, but for `run_id` and `seconds`. Takes some ten minutes.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from base import storage
from base.paths import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from services import running, tool

OUT = "s3://allograft/demo"


def rows(out: str) -> pd.DataFrame:
    """The result rows of a finished study, in their order, without what differs between two runs of it."""
    return pd.read_csv(io.BytesIO(storage.read_bytes(f"{out}/report/results.csv"))).drop(columns=["run_id", "seconds"])


def main() -> int:
    """Run, compare, say so."""
    local = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-job")
    study = str(ROOT / "studies" / "demo.yaml")
    subprocess.run([sys.executable, "-m", "cluster", "run", study, f"out={local}"], check=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as services:
        words = [tool("ray"), "job", "submit", "--address", services.jobs, "--working-dir", ".", "--", "allograft", "run"]
        started = time.monotonic()
        job = subprocess.run(
            [*words, "studies/demo.yaml", f"out={OUT}", f"tracking={services.tracking}"], cwd=ROOT, env=services.environment
        )
        took_s = time.monotonic() - started
        os.environ.update(services.environment)
        ours, theirs = rows(local), rows(OUT)
    equal = ours.equals(theirs)
    print(f"the job ended with exit code {job.returncode} after {took_s:.0f} s; {len(theirs)} rows, {len(ours)} on disk")
    print(f"every row equals the run on disk: {'yes' if equal else 'NO'}")
    return 0 if equal and job.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
