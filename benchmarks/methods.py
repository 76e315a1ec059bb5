"""Does every pretraining method learn? Each against the very weights that it started from, by what their frozen features know.

    nice .venv/bin/python benchmarks/methods.py                              # goes on where it stopped; --only NAME for one method
    nice .venv/bin/python benchmarks/methods.py --data nih-cxr14 --raw FOLDER --seeds 1        # real radiographs

Chest phantoms with three planted labels: each method as its smoke recipe has it for 500 steps (2,000 of masked images), with views that
suit phantoms (their histograms say nothing, so crops do the work). NIH's radiographs (../shared/data/nih_cxr14_256): each method's
`small` recipe, ResNet-18 or ViT-Ti/16 at 96 px, cut to --epochs. Judge: logistic regression on the frozen features of training images
(1,000 phantoms), mean AUROC over the labels of the test images, inside of strata where the card has them. Five seeds of pretraining; the
interval is Student's, paired. The last line counts the methods whose interval excludes 0.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

SEEDS, STEPS, BATCH = 5, 500, 64
LONGER = {"ijepa": 2000, "mae": 2000, "simmim": 2000}  # whose losses still fall at 500
CROPS = {  # small ones still hold something of what the labels are about
    "vit": [{"count": 2, "crop_scale": [0.4, 1.0]}, {"count": 2, "size": 32, "crop_scale": [0.1, 0.4]}],
    "other": [{"count": 2, "crop_scale": [0.3, 1.0]}, {"count": 2, "size": 24, "crop_scale": [0.3, 0.6]}],
}
PROTOTYPES = 64  # as in `small`; smoke leaves them open, which at this size is 8
GREY = {"brightness": 0.3, "contrast": 0.4, "blur_p": 0.0}


class Data(NamedTuple):
    """fit: training images that the judge sees, all by default."""

    raw: str | None
    preset: str
    encoders: dict[str, str]
    fit: int | None


DATA = {
    "phantom-chest": Data("phantom:3400", "smoke", {"vit": "test_vit", "other": "test_resnet"}, 1000),
    "nih-cxr14": Data(None, "small", {"vit": "vit_tiny_patch16_224", "other": "resnet18"}, None),
}


def kind(method: str) -> str:
    from pretrain import methods

    return "vit" if methods.method_class(method).only == "vit" else "other"


def settings(method: str, data: str, epochs: float) -> dict[str, Any]:
    """What this benchmark changes of a recipe: budget and pace; for phantoms grey views of which small ones show enough, and prototypes."""
    from pretrain.recipe import load_recipe

    changed: dict[str, Any] = {"optimizer.warmup_epochs": 1, "checkpoint_every_steps": 0, "stop_when_collapsed": False}
    if data != "phantom-chest":
        return changed | {"epochs": epochs}
    changed |= {"max_steps": LONGER.get(method, STEPS), "epochs": 1000, "global_batch": BATCH, "log_every_steps": 25}
    changed |= {f"views.{key}": value for key, value in GREY.items()}
    crops = bool(load_recipe(f"{method}/smoke").views.crops)
    if kind(method) == "vit":
        changed["views.size"] = 64
    if crops:
        changed["views.crops"] = CROPS[kind(method)]
    if method in ("swav", "sela-v2", "deepcluster-v2"):
        changed["options.prototypes"] = PROTOTYPES
    return changed


def judge(encoder: Any, shards: str, size: int, fit: int | None) -> float:
    """Mean AUROC of the labels from frozen features; unknown answers are left out."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from analysis.metrics import auroc, auroc_within, stratified
    from shards.corpus import Corpus
    from shards.evaluate import eval_batches

    encoder.eval()
    z, y, known, strata = {}, {}, {}, {}
    for split in ("train", "test"):
        corpus = Corpus(shards, (split,))
        rows: list[tuple[torch.Tensor, ...]] = []
        for batch in eval_batches(corpus, size, 200):
            assert batch.target_BL is not None
            assert batch.mask_BL is not None
            ok = batch.valid_B
            rows.append((encoder(batch.views[0])[ok].double(), batch.target_BL[ok], batch.mask_BL[ok] > 0, batch.index_B[ok]))
        z[split], y[split], known[split], index = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
        metas = [record.meta.get(str(corpus.card.stratify_by)) for record in corpus.records()]
        strata[split] = [metas[i] for i in index]
    areas = []
    for label in range(y["train"].shape[1]):
        fitted, judged = known["train"][:fit, label], known["test"][:, label]
        if len(set(y["train"][:fit, label][fitted])) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(z["train"][:fit][fitted], y["train"][:fit, label][fitted])
        score, target = model.decision_function(z["test"][judged]), y["test"][judged, label]
        inside = [stratum for stratum, ok in zip(strata["test"], judged, strict=True) if ok]
        areas.append(auroc_within(score, target, inside) if stratified(inside) else auroc(score, target))
    return float(np.nanmean(areas))


def one(method: str, seed: int, out: str, name: str, epochs: float) -> dict[str, Any]:
    """Pretrain with that seed, and judge before and after."""
    import torch

    torch.set_num_threads(1)
    from base.seeds import seed_of
    from encoders.build import build
    from encoders.weights import load_into, load_local
    from engine.context import LocalContext
    from pretrain.recipe import load_recipe
    from pretrain.run import PRETRAIN_VERSION, DataRef, PretrainConfig, run
    from shards.manifest import read

    data, shards, folder = DATA[name], os.path.join(out, "shards"), os.path.join(out, "runs", f"{method}-{seed}")
    recipe = load_recipe(f"{method}/{data.preset}", settings(method, name, epochs))
    architecture, size = data.encoders[kind(method)], recipe.views.size
    config = PretrainConfig(
        name=method,
        key="0" * 16,
        recipe=recipe,
        architecture=architecture,
        in_chans=1,
        data=[DataRef(dataset=name, shards=shards, digest=read(shards).digest)],
        seed=seed,
        out=folder,
        threads=1,
    )
    started = time.perf_counter()
    result = run(config, LocalContext(dir=os.path.join(folder, "log")))
    assert result is not None
    encoder = build(architecture, 1, seed=seed_of("encoder", seed), image_size=size)
    judged_at = 64 if name == "phantom-chest" else size
    with torch.inference_mode():
        before = judge(encoder, shards, judged_at, data.fit)
        load_into(encoder.net, load_local(os.path.join(folder, "export")))
        after = judge(encoder, shards, judged_at, data.fit)
    facts = {"method": method, "seed": seed, "architecture": architecture, "size": size, "steps": result["steps"]}
    facts |= {"batch": recipe.global_batch, "version": PRETRAIN_VERSION, "random": before, "pretrained": after, "health": result["health"]}
    facts["seconds"] = round(time.perf_counter() - started, 1)
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
    columns = ("method", "encoder", "px", "steps", "random", "pretrained", "difference", "seeds", "health", "s a run")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        gain = np.array([row["pretrained"] - row["random"] for row in mine])
        half = float(t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None
        passed += [name] if half is not None and gain.mean() - half > 0 else []
        before, after = (np.mean([row[key] for row in mine]) for key in ("random", "pretrained"))
        health = ", ".join(sorted({row["health"] for row in mine}))
        interval = f"{gain.mean():+.3f}"
        if half is not None:
            interval += f" [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]{'' if name in passed else ' not passed'}"
        seconds = np.median([row["seconds"] for row in mine])
        facts = (
            name,
            mine[0]["architecture"],
            mine[0]["size"],
            mine[0]["steps"],
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
    parser.add_argument("--data", choices=DATA, default="phantom-chest")
    parser.add_argument("--raw", help="folder of the raw files, where the data are not generated")
    parser.add_argument("--out", help="default: runs/methods-DATA")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=6, help="of a run on data that are not generated")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    from cluster.session import WORKER_SETTINGS
    from pretrain import methods
    from shards.card import load_card
    from shards.pack import pack

    os.environ.update(WORKER_SETTINGS)  # as the workers of a study have them
    out = os.path.abspath(options.out or f"runs/methods-{options.data}")
    if not os.path.exists(os.path.join(out, "shards", "manifest.json")):
        raw = options.raw or DATA[options.data].raw
        if raw is None:
            parser.error(f"--data {options.data} needs --raw FOLDER")
        pack(load_card(options.data), raw, os.path.join(out, "shards"))
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.only or methods.METHODS]
    todo = [(name, seed) for name, seed in wanted if not (Path(out) / "rows" / f"{name}-{seed}.json").exists()]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(one, name, seed, out, options.data, options.epochs) for name, seed in todo]):
            if error := done.exception():
                print(f"failed: {error}", flush=True)
            else:
                row = done.result()
                print(f"{row['method']} {row['seed']}: {row['random']:.3f} -> {row['pretrained']:.3f}, {row['seconds']:.0f} s", flush=True)
    table(out)


if __name__ == "__main__":
    main()
