"""Is every method's run the same to the bit after a SIGKILL? All methods, one after the other, on a tiny corpus.

    nice .venv/bin/python benchmarks/resume.py --out runs/resume          # goes on where it stopped; --only NAME ...

Each method's smoke recipe for 10 steps with a checkpoint every 3, twice: undisturbed, and ended by SIGKILL when step 8 is logged, then
called again. Compared: every tensor of the last checkpoint (weights, queues, banks, teachers, optimiser, random state) and every number
logged but the clocks. The last line counts the methods that agree.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def one(method: str, out: Path) -> dict[str, Any]:
    """What differs between the two runs of a method."""
    import torch
    from test_pretrain_run import metrics, tree
    from tiny_corpus import write

    from base.config import parse
    from encoders.weights import load_local
    from engine.context import LocalContext
    from pretrain import methods
    from pretrain.run import PretrainConfig, run

    torch.set_num_threads(1)
    shards = str(out / "shards")
    if not (out / "shards" / "manifest.json").exists():
        write(out / "shards")
    short = {"epochs": 4, "global_batch": 20, "max_steps": 10, "checkpoint_every_steps": 3, "log_every_steps": 1}
    plan = tree(method, shards, method, **short) | {"start_from": None, "start_from_sha256": None, "start_from_name": None}
    plan |= {"architecture": "test_vit"} if methods.method_class(method).only == "vit" else {}
    places = {kind: out / f"{kind}-{method}" for kind in ("whole", "killed")}
    configs = {kind: parse(plan | {"out": str(place)}, PretrainConfig, method) for kind, place in places.items()}
    run(configs["whole"], LocalContext(dir=str(out / "log")))
    given = out / f"{method}.json"
    given.write_text(json.dumps(plan | {"out": str(places["killed"])}))
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), "8", str(given)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [-signal.SIGKILL], ended.stderr[-2000:]
    run(configs["killed"], LocalContext(dir=str(out / "log")))
    files = sorted(path.name for path in (places["whole"] / "checkpoints" / "step-00000010").glob("*.safetensors"))
    apart, tensors = [], 0
    for file in files:
        first, other = (load_local(places[kind] / "checkpoints" / "step-00000010" / file) for kind in places)
        tensors += len(first)
        apart += [f"{file}:{name}" for name in first if not torch.equal(first[name], other[name])]
    apart += [] if metrics(places["whole"]) == metrics(places["killed"]) else ["metrics"]
    return {"method": method, "tensors": tensors, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/resume")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    from pretrain import methods

    out = Path(options.out).resolve()
    rows = []
    for method in options.only or methods.METHODS:
        place = out / "rows" / f"{method}.json"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(one(method, out)))
        rows.append(json.loads(place.read_text()))
        said = f"differs in {', '.join(rows[-1]['apart'][:3])}" if rows[-1]["apart"] else "equal"
        print(f"{method}: {rows[-1]['tensors']} tensors, {said}", flush=True)
    print(f"{sum(not row['apart'] for row in rows)} of {len(rows)} methods equal to the bit after SIGKILL")


if __name__ == "__main__":
    main()
