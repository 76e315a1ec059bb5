"""Does `compile: true` pay on this machine? The same pretraining with and without it, in turns, each in a process of its own.

    nice .venv/bin/python benchmarks/compiled.py            # some minutes on 2 cores; --rounds N

SimCLR on grey JPEGs (benchmarks/xrays.py), batch 32: ResNet-18 at 64 px and ViT-Ti/16 at 96 px. Seconds a step are those after the first
ten steps; what the compiler took is the difference of the time until then. A ratio over 1 says that the compiled run is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = {"ResNet-18, 64 px": ("resnet18", 64), "ViT-Ti/16, 96 px": ("vit_tiny_patch16_224", 96)}
BATCH, SKIPPED, STEPS = 32, 10, 30


def one(case: str, shards: str, out: str, compiled: bool, threads: int) -> dict[str, float]:
    """Seconds until step 10, and of a step after it."""
    from engine.context import LocalContext
    from pretrain.recipe import load_recipe
    from pretrain.run import DataRef, PretrainConfig, run
    from shards.corpus import Corpus

    architecture, size = CASES[case]
    changes: dict[str, Any] = {"views.size": size, "global_batch": BATCH, "epochs": 1e6, "max_steps": STEPS, "log_every_steps": SKIPPED}
    changes |= {"checkpoint_every_steps": 0, "stop_when_collapsed": False, "compile": compiled}
    recipe, data = load_recipe("simclr/small", changes), [DataRef(dataset="bench", shards=shards, digest=Corpus(shards).manifest.digest)]
    config = PretrainConfig(
        name="compiled", key="0", recipe=recipe, architecture=architecture, in_chans=1, data=data, out=out, threads=threads
    )
    run(config, LocalContext(dir=os.path.join(out, "context")))
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    return {
        "until": steps[SKIPPED]["seconds"],
        "step": (steps[STEPS]["seconds"] - steps[SKIPPED]["seconds"]) / (STEPS - SKIPPED),
        "loss": steps[STEPS]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, shards, compiled = options.one
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(one(case, shards, out, compiled == "True", options.threads)))
        return
    import xrays

    from cluster.session import WORKER_SETTINGS

    with tempfile.TemporaryDirectory() as name:
        xrays.write(Path(name), 2, 100)
        for case in CASES:
            found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for _ in range(options.rounds):
                for compiled in (False, True):
                    command = [sys.executable, __file__, "--one", case, name, str(compiled), "--threads", str(options.threads)]
                    done = subprocess.run(command, env=os.environ | WORKER_SETTINGS, check=True, stdout=subprocess.PIPE, text=True)
                    found[compiled].append(json.loads(done.stdout.splitlines()[-1]))
            eager, ours = ([row["step"] for row in found[compiled]] for compiled in (False, True))
            ratios = [a / b for a, b in zip(eager, ours, strict=True)]
            took = statistics.median(b["until"] - a["until"] for a, b in zip(found[False], found[True], strict=True))
            print(f"{case}: eager {statistics.median(eager) * 1e3:.0f} ms a step, compiled {statistics.median(ours) * 1e3:.0f}")
            print(f"    ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {options.rounds} rounds)")
            last = ", ".join(f"{row['loss']:.4f}" for rows in found.values() for row in rows)
            print(f"    the compiler {took:.0f} s more until step {SKIPPED}; losses at the end {last}", flush=True)


if __name__ == "__main__":
    main()
