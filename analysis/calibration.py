"""Can the scores be read as probabilities: reliability diagrams and expected calibration error of each task's leading setting.

    html = section(evidence)
    points = reliability(confidence_N, right_N)        # [(mean confidence, share right, images)] of the bins that hold any

Of labels that do not exclude each other every image and label is a point of the diagram: the score, and whether the label holds. Of labels
that do, an image is one: the highest score, and whether that label is the true one. The error is the cells' own, which a diagram of all
labels does not give: there a label that promises too much makes up for one that promises too little.
"""

import numpy as np
from numpy.typing import NDArray

from analysis import figures
from analysis.evidence import Evidence
from analysis.metrics import ECE_BINS
from analysis.replicates import Scores
from analysis.subgroups import RUNS, chosen, some_scores
from analysis.tables import cell, esc, in_study, num, over_seeds, table

Array = NDArray[np.float64]
Points = list[tuple[float, float, int]]


def reliability(confidence_N: Array, right_N: Array) -> Points:
    """The bins of equal width over 0..1 that hold any image."""
    bins = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    found = []
    for at in np.unique(bins):
        inside = bins == at
        found.append((float(confidence_N[inside].mean()), float(right_N[inside].mean()), int(inside.sum())))
    return found


def pooled(cells: list[Scores]) -> tuple[Array, Array]:
    """Confidence and rightness of every image (and label) of these cells."""
    confidence, right = [], []
    for one in cells:
        assert one.score_NL is not None
        assert one.target_NL is not None
        if one.true_N is not None:
            confidence.append(np.minimum(one.score_NL.max(1), 1.0))
            right.append((one.score_NL.argmax(1) == one.true_N).astype(float))
            continue
        known = np.isfinite(one.target_NL)
        confidence.append(one.score_NL[known])
        right.append(one.target_NL[known])
    return np.concatenate(confidence), np.concatenate(right)


def section(evidence: Evidence) -> str:
    """A diagram and a table for each task that scores labels; empty where none does."""
    panels, rows = [], []
    order = {source: i for i, source in enumerate(evidence.sources())}
    for number, ((task, _), sources) in enumerate(chosen(evidence).items()):
        series: dict[str, tuple[int, Points]] = {}
        for source, own in sources.items():
            held = [s for s in some_scores(own) if s.score_NL is not None and s.score_NL.min() >= 0 and s.score_NL.max() <= 1 + 1e-9]
            if not held:
                continue
            series[source] = (order[source], reliability(*pooled(held)))
            mean, sd, n, units = over_seeds(own, "ece" if held[0].true_N is not None else "ece_mean", "")
            parts = [f'<th scope="row">{esc(task)}</th>', cell(esc(source)), cell(esc(in_study(evidence, own[0])))]
            parts += [cell(num(value, 4), sort=value) for value in (mean, sd)]
            rows.append("".join([*parts, cell(n, sort=len(units))]))
        if series:
            panels.append(figures.reliability(f"calib{number}", f"{task}, all labels pooled", series))
    if not rows:
        return ""
    heads = ["task", "encoder", "strategy", "ECE, mean over seeds", "sd over seeds", "seeds"]
    note = (
        "ECE: of one label, the mean over test images of the distance between mean score and share of positives of their bin,"
        f" {ECE_BINS} bins of equal width; then the mean over labels, and over seeds (ece_mean of results.csv). Of labels that exclude each"
        " other, of the highest score and the share in which it is right (ece). The diagrams pool the labels of the test images and"
        f" {RUNS} runs of an encoder at most, so that labels may cancel there. Below the diagonal scores promise too much. Nothing was"
        " recalibrated. The setting of each task that leads on validation."
    )
    return f'<div class="panels">{"".join(panels)}</div>{table(heads, rows, cls="numbers")}<p class="faint">{note}</p>'
