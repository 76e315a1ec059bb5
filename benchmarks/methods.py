"""Does every pretraining method learn? Each on chest phantoms with three planted labels, against the weights that it started from.

    nice .venv/bin/python benchmarks/methods.py --out runs/methods            # goes on where it stopped; --only NAME for one method

Each method as its smoke recipe has it, with the budget below and views that suit phantoms (their histograms say nothing, so crops do the
work). Judge: logistic regression on the frozen features of 1,000 labelled phantoms, AUROC on 700 others, mean over the labels; the random
encoder is the very one that the pretraining with that seed began with. Five seeds of pretraining; the interval is Student's, paired.
The last line counts the methods whose interval excludes 0.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PHANTOMS, SEEDS, STEPS, BATCH = 3400, 5, 500, 64
GREY = {"brightness": 0.3, "contrast": 0.4, "blur_p": 0.0}
FIT = 1000


def settings(method: str) -> dict[str, Any]:
    """The smoke recipe's changes: more steps, and for tokens of 16 px whole images."""
    from pretrain import methods
    from pretrain.recipe import load_recipe

    changed: dict[str, Any] = {"max_steps": STEPS, "epochs": 1000, "global_batch": BATCH, "optimizer.warmup_epochs": 1}
    changed |= {"log_every_steps": 25, "checkpoint_every_steps": 0, "stop_when_collapsed": False}
    changed |= {f"views.{key}": value for key, value in GREY.items()}
    if methods.method_class(method).only == "vit":
        views = load_recipe(f"{method}/smoke").views
        changed["views.size"] = 64
        if views.crops:
            changed["views.crops"] = [{"count": 2, "crop_scale": [0.4, 1.0]}, {"count": 2, "size": 32, "crop_scale": [0.1, 0.4]}]
    return changed


def judge(encoder: Any, shards: str) -> float:
    """Mean AUROC of the planted labels from frozen features."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from shards.loader import Corpus, eval_batches

    encoder.eval()
    z, y = {}, {}
    for split in ("train", "test"):
        corpus = Corpus(shards, (split,))
        parts = [(encoder(b.views[0])[b.valid_B], b.target_BL[b.valid_B]) for b in eval_batches(corpus, 64, 200) if b.target_BL is not None]
        z[split], y[split] = (torch.cat(of).double().numpy() for of in zip(*parts, strict=True))
    areas = []
    for label in range(y["train"].shape[1]):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(z["train"][:FIT], y["train"][:FIT, label])
        areas.append(roc_auc_score(y["test"][:, label], model.decision_function(z["test"])))
    return float(np.mean(areas))


def one(method: str, seed: int, out: str) -> dict[str, Any]:
    """Pretrain with that seed, and judge before and after."""
    import torch

    torch.set_num_threads(1)
    from base.seeds import seed_of
    from encoders.build import build
    from encoders.weights import load_into, load_local
    from engine.context import LocalContext
    from pretrain import methods
    from pretrain.recipe import load_recipe
    from pretrain.run import DataRef, PretrainConfig, run
    from shards.manifest import read

    shards, folder = os.path.join(out, "shards"), os.path.join(out, "runs", f"{method}-{seed}")
    recipe = load_recipe(f"{method}/smoke", settings(method))
    architecture = "test_vit" if methods.method_class(method).only == "vit" else "test_resnet"
    data = [DataRef(dataset="phantom-chest", shards=shards, digest=read(shards).digest)]
    config = PretrainConfig(
        name=method, key="0" * 16, recipe=recipe, architecture=architecture, in_chans=1, data=data, seed=seed, out=folder, threads=1
    )
    started = time.perf_counter()
    result = run(config, LocalContext(dir=os.path.join(folder, "log")))
    assert result is not None
    encoder = build(architecture, 1, seed=seed_of("encoder", seed), image_size=recipe.views.size)
    with torch.inference_mode():
        before = judge(encoder, shards)
        load_into(encoder.net, load_local(os.path.join(folder, "export")))
        after = judge(encoder, shards)
    facts = {"method": method, "seed": seed, "architecture": architecture, "size": recipe.views.size, "steps": STEPS, "batch": BATCH}
    facts |= {"random": before, "pretrained": after, "health": result["health"], "seconds": round(time.perf_counter() - started, 1)}
    place = Path(out) / "rows" / f"{method}-{seed}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(facts))
    return facts


def table(out: str) -> None:
    import numpy as np
    from scipy.stats import t

    rows = [json.loads(path.read_text()) for path in sorted((Path(out) / "rows").glob("*.json"))]
    passed = []
    names = sorted({row["method"] for row in rows})
    print("| method | encoder | px | random | pretrained | difference | seeds | health | s a run |\n|---|---|---|---|---|---|---|---|---|")
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        gain = np.array([row["pretrained"] - row["random"] for row in mine])
        half = float(t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else float("inf")
        passed += [name] if gain.mean() - half > 0 else []
        before, after = (np.mean([row[key] for row in mine]) for key in ("random", "pretrained"))
        health = ", ".join(sorted({row["health"] for row in mine}))
        interval = f"{gain.mean():+.3f} [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]{'' if name in passed else ' not passed'}"
        seconds = np.median([row["seconds"] for row in mine])
        facts = (
            name,
            mine[0]["architecture"],
            mine[0]["size"],
            f"{before:.3f}",
            f"{after:.3f}",
            interval,
            len(mine),
            health,
            f"{seconds:.0f}",
        )
        print("| " + " | ".join(str(fact) for fact in facts) + " |")
    print(f"{len(passed)} of {len(names)} methods learn: the interval excludes 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    from cluster.session import WORKER_SETTINGS
    from pretrain import methods
    from shards.card import load_card
    from shards.pack import pack

    os.environ.update(WORKER_SETTINGS)  # as the workers of a study have them
    out = os.path.abspath(options.out)
    if not os.path.exists(os.path.join(out, "shards", "manifest.json")):
        pack(load_card("phantom-chest"), f"phantom:{PHANTOMS}", os.path.join(out, "shards"))
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.only or methods.METHODS]
    todo = [(name, seed) for name, seed in wanted if not (Path(out) / "rows" / f"{name}-{seed}.json").exists()]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(one, name, seed, out) for name, seed in todo]):
            if error := done.exception():
                print(f"failed: {error}", flush=True)
            else:
                row = done.result()
                print(f"{row['method']} {row['seed']}: {row['random']:.3f} -> {row['pretrained']:.3f}, {row['seconds']:.0f} s", flush=True)
    table(out)


if __name__ == "__main__":
    main()
