"""The standard error of a validation metric over the patients, whatever the metric is.

    error, groups = patients_error(task, arrays, logits)
    row = error_row(task, arrays, logits)                   # the same as a metric row, `auroc_mean_error`

Legend: N images.
"""

import math

import numpy as np
from numpy.typing import NDArray

from base.seeds import rng
from finetune.data import Arrays
from finetune.predict import Row, headline, measure
from finetune.task import Task

GROUPS = 20  # of patients


def patients_error(task: Task, arrays: Arrays, logits: NDArray[np.float32]) -> tuple[float, int]:
    """Standard error of the task's metric on a split over its patients, and from how many groups of them.

    Delete-a-group jackknife (Shao and Tu 1995, 2.3): patients are dealt into at most 20 groups by their names, and the metric is taken
    with each group left out. NaN where fewer than two of these are defined.
    """
    names = [patient or f"image {key}" for patient, key in zip(arrays.patients, arrays.ids, strict=True)]
    order = sorted(set(names), key=lambda name: float(rng("jackknife", name).random()))
    groups = {name: i % GROUPS for i, name in enumerate(order)}
    group_N = np.array([groups[name] for name in names])
    values = []
    for group in range(min(GROUPS, len(order))):
        kept = np.flatnonzero(group_N != group)
        value = headline(task, measure(task, arrays.take(kept), logits[kept])) if len(kept) else math.nan
        if not math.isnan(value):
            values.append(value)
    if len(values) < 2:
        return math.nan, len(values)
    return math.sqrt((len(values) - 1) * float(np.var(values))), len(values)


def error_row(task: Task, arrays: Arrays, logits: NDArray[np.float32]) -> Row:
    """The error of the task's metric; its value is None where it is not known, n the groups of patients."""
    error, groups = patients_error(task, arrays, logits)
    value = None if math.isnan(error) else error
    return {"split": arrays.split, "class": "", "metric": f"{task.metric}_error", "unit": "fraction", "value": value, "n": groups}
