"""Sample images for the report, the worst, the middling and the best: masks outlined on segmentation tasks, labels and scores on others,
and where networks look. Only where the card shares images.

gallery(evidence, task) -> HTML

Predicted masks come from `samples.npz` in a cell's folder (arrays ids K: the samples' keys, image K H W [C] u8, true and pred
K H W u8, dice K f32). Where no cell kept one, the true masks are shown and the page says so.
"""

import io
from typing import Any

import numpy as np
import pandas as pd

from analysis import figures, heat, results
from analysis.evidence import Evidence
from analysis.heat import cases
from analysis.results import Cell
from analysis.tables import esc, in_study, leading
from base import storage
from base.errors import AllograftError, WorkError


def losses(frame: pd.DataFrame) -> dict[str, float]:
    """How wrong the scores of each row are: mean log loss over its known labels, or 1 - Dice."""
    if "dice" in frame and frame["dice"].notna().any():
        return dict(zip(frame["sample_id"].astype(str), 1 - frame["dice"].to_numpy(float), strict=True))
    labels = [name.removeprefix("score_") for name in frame.columns if name.startswith("score_")]
    score = np.clip(frame[[f"score_{label}" for label in labels]].to_numpy(float), 1e-6, 1 - 1e-6)
    target = frame[[f"target_{label}" for label in labels]].to_numpy(float)
    wrong = np.where(np.isfinite(target), -(target * np.log(score) + (1 - target) * np.log(1 - score)), np.nan)
    known = np.isfinite(wrong)
    mean = np.where(known, wrong, 0).sum(1) / np.maximum(1, known.sum(1))
    return dict(zip(frame["sample_id"].astype(str), mean, strict=True))


def gallery(evidence: Evidence, task: str) -> str:
    """The images of a task, or a sentence that says why there are none. Own-source and exposed cells show theirs where no others are."""
    every = [c for c in evidence.cells if c.task == task]
    cells = [c for c in every if not c.apart] or every
    dataset = cells[0].dataset
    if not evidence.card(dataset).get("share_images"):
        return f'<p class="faint">The card of {esc(dataset)} does not share images, so none are shown.</p>'
    ranks = losses(frame) if (frame := results.predictions(_best(evidence, cells))) is not None else {}
    if cells[0].primary() in ("dice", "iou"):
        return (_kept_masks(evidence, cells) or _true_masks(evidence, cells)) + heat.section(cells, ranks)
    return _labels(evidence, cells) + heat.section(cells, ranks)


def _best(evidence: Evidence, cells: list[Cell]) -> Cell:
    """The best on validation of the setting that leads there."""
    metric, ranked = results.headline(cells) or "", leading(evidence, cells)
    return max(ranked[0][1] if ranked else cells, key=lambda c: np.nan_to_num(c.value(metric, "val"), nan=-1.0))


def _kept_masks(evidence: Evidence, cells: list[Cell]) -> str:
    """The same images for every source in the setting that leads: worst, median and best by mean Dice over sources."""
    held: dict[str, dict[str, Any]] = {}
    best = _best(evidence, cells)
    for cell in cells:
        url = storage.join(cell.url, "samples.npz")
        if cell.group == best.group and cell.source not in held and storage.exists(url):
            with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
                held[cell.source] = {name: arrays[name] for name in arrays.files} | {"seed": cell.seed}
    if not held:
        return ""
    common = sorted(set.intersection(*({str(i) for i in arrays["ids"]} for arrays in held.values())))
    place = {source: {str(i): at for at, i in enumerate(arrays["ids"])} for source, arrays in held.items()}
    mean = {i: float(np.mean([arrays["dice"][place[source][i]] for source, arrays in held.items()])) for i in common}
    ranked = sorted(common, key=mean.__getitem__)
    parts = []
    for word, i in cases(ranked):
        for source in (s for s in evidence.sources() if s in held):
            arrays, at = held[source], place[source][i]
            text = f"{word}, {source}: test image {i}, Dice {arrays['dice'][at]:.3f}"
            drawn = figures.overlay(arrays["image"][at], arrays["true"][at], arrays["pred"][at], text)
            parts.append(f"<figure>{drawn}<figcaption>{word}: <b>{esc(source)}</b> Dice {arrays['dice'][at]:.3f}</figcaption></figure>")
    note = (
        f"The worst, the median and the best test image by mean Dice among those kept: {in_study(evidence, best)} (the setting that leads"
    )
    note += " on validation), one seed a source."
    style = f'style="--n:{len(held)}"'
    return f'{_legend()}<div class="gallery" {style}>{"".join(parts)}</div><p class="faint">{esc(note)}</p>'


def _legend() -> str:
    return '<p class="legend"><span class="line true"></span> true mask <span class="line predicted"></span> predicted mask</p>'


def _corpus(evidence: Evidence, dataset: str) -> Any:
    from shards.corpus import Corpus

    return Corpus(evidence.shards[dataset], ("test",))


def _sample(corpus: Any, place: dict[str, int], key: str) -> Any:
    if key not in place:
        raise WorkError(f"no test image {key}", where=corpus.url, hint="the cells were computed with other shards")
    return corpus[place[key]]


def _true_masks(evidence: Evidence, cells: list[Cell]) -> str:
    parts = []
    best = _best(evidence, cells)
    frame, mask_class = results.predictions(best), best.mask_class()
    try:
        corpus = _corpus(evidence, best.dataset)
        if frame is None or not len(corpus):
            return ""
        place = {key: i for i, key in enumerate(corpus.keys())}
        ranked = frame.sort_values("dice", kind="stable")
        for word, at in cases(range(len(ranked))):
            row = ranked.iloc[at]
            sample = _sample(corpus, place, row["sample_id"])
            text = f"{word}: {best.source}, {in_study(evidence, best)}: Dice {row['dice']:.3f}"
            true = sample.seg if mask_class is None else sample.seg == corpus.card.mask_index(mask_class, best.task)
            drawn = figures.overlay(sample.image, true, None, f"test image {row['sample_id']}; {text}")
            parts.append(f"<figure>{drawn}<figcaption>{esc(text)}</figcaption></figure>")
    except (AllograftError, OSError, IndexError) as error:
        return f'<p class="faint">Images could not be read: {esc(error)}</p>'
    note = "True masks only: these cells kept no predicted ones."
    return f'{_legend()}<div class="gallery" style="--n:{len(parts)}">{"".join(parts)}</div><p class="faint">{note}</p>'


def _labels(evidence: Evidence, cells: list[Cell]) -> str:
    """Test images from where the best cell on validation errs most to where it is surest and right, with true labels and scores."""
    best = _best(evidence, cells)
    frame = results.predictions(best)
    parts = []
    try:
        corpus = _corpus(evidence, best.dataset)
        if frame is None or not len(corpus):
            return ""
        place = {key: i for i, key in enumerate(corpus.keys())}
        names = [name.removeprefix("score_") for name in frame.columns if name.startswith("score_")]
        wrong = losses(frame)
        for word, at in cases(sorted(range(len(frame)), key=lambda at: -wrong[str(frame["sample_id"].iloc[at])]), 5):
            row = frame.iloc[at]
            key = row["images"].split()[0] if "images" in frame else row["sample_id"]  # the first image of a study
            sample = _sample(corpus, place, key)
            top = sorted(names, key=lambda name: -float(row[f"score_{name}"]))[:3]
            true = [name for name in names if row[f"target_{name}"] == 1]
            said = ", ".join(f"{name} {row[f'score_{name}']:.2f}" for name in top)
            text = f"true: {', '.join(true) or 'none'}"
            drawn = figures.overlay(sample.image, None, None, f"test image {key}; {text}")
            parts.append(f"<figure>{drawn}<figcaption>{word}; <b>{esc(text)}</b><br>{esc(said)}</figcaption></figure>")
    except (AllograftError, OSError, IndexError) as error:
        return f'<p class="faint">Images could not be read: {esc(error)}</p>'
    note = f"By log loss of {best.source}, {in_study(evidence, best)} (the best cell on validation of the setting that leads there),"
    note += " with true labels and its highest scores."
    return f'<div class="gallery" style="--n:{len(parts)}">{"".join(parts)}</div><p class="faint">{esc(note)}</p>'
