"""The standard error of a metric over the patients, whatever the metric is, from a table of predictions.

error, groups = patients_error(task, table)        # rows of one split
row = error_row(task, table)                       # the same as a metric row, `auroc_mean_error`
"""

import math

import numpy as np
import pandas as pd

from base.seeds import rng
from finetune.measure import Row, headline, rows_of
from finetune.task import Task

GROUPS = 20  # of patients


def patients_error(task: Task, table: pd.DataFrame) -> tuple[float, int]:
    """Standard error of the task's metric on a split, and from how many groups of patients.

    Delete-a-group jackknife (Shao and Tu 1995, 2.3): patients are dealt into at most 20 groups by their names, and the metric is taken
    with each group left out. NaN where fewer than two of these are defined.
    """
    patients = [patient or f"image {key}" for patient, key in zip(table["patient"], table["sample_id"], strict=True)]
    order = sorted(set(patients), key=lambda name: float(rng("jackknife", name).random()))
    groups = {name: i % GROUPS for i, name in enumerate(order)}
    group_N = np.array([groups[name] for name in patients])
    rest = table.assign(split="rest")  # of no split: decisions at thresholds are not asked for
    found = [headline(task, rows_of(task, rest[group_N != group])) for group in range(min(GROUPS, len(order))) if (group_N != group).any()]
    values = [value for value in found if not math.isnan(value)]
    if len(values) < 2:
        return math.nan, len(values)
    return math.sqrt((len(values) - 1) * float(np.var(values))), len(values)


def error_row(task: Task, table: pd.DataFrame) -> Row:
    """The error of the task's metric; its value is None where it is not known, n the groups of patients."""
    error, groups = patients_error(task, table)
    value = None if math.isnan(error) else error
    split = str(table["split"].iloc[0])
    return {"split": split, "class": "", "metric": f"{task.metric}_error", "unit": "fraction", "value": value, "n": groups}
