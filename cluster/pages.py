"""The pages of MLflow's UI on which a study's runs are compared: links to them, and what their tables show.

A table shows neither nested runs nor metrics until somebody chooses them, every visitor anew. MLflow keeps a view that was shared by a link
as a tag of the experiment (plain JSON, key `mlflow.sharedViewState.<name>`): the views that a study needs are written as such tags. A later
MLflow that does not know them shows its usual table.
"""

import json
from collections.abc import Iterable, Sequence
from urllib.parse import quote

CELL_PARAMS = ("task", "source", "strategy", "fraction", "resolution", "seed")
ENCODER_PARAMS = ("method", "start_from", "data", "architecture", "seed")


def note(words: str, experiment: str, encoders: Iterable[str]) -> str:
    """Markdown for the description of the experiment and of the study's run: the answer, then the pages.

    Args:
        words: the study's answer, one line. encoders: run ids of the pretrainings.
    """
    compared = f"runs={quote(json.dumps(sorted(encoders)))}&experiments={quote(json.dumps([experiment]))}"
    runs = f"#/experiments/{experiment}/runs?viewStateShareKey="
    lines = [
        f"* [the pretrained encoders side by side](#/compare-runs?{compared})",
        f"* [table of the encoders, with what their cells reached]({runs}encoders)",
        f"* [table of the cells]({runs}cells)",
        "* the report: artifact report/index.html of the study's run",
    ]
    return "\n\n".join([part for part in (words, "\n".join(lines)) if part])


def views(encoder_metrics: Sequence[str], cell_metrics: Sequence[str]) -> dict[str, str]:
    """Tags of the experiment that hold the two tables, `encoders` and `cells`: flat, with the columns chosen.

    Args:
        encoder_metrics, cell_metrics: the columns, in order.
    """
    return {
        "mlflow.sharedViewState.encoders": _view("pretrain", ENCODER_PARAMS, encoder_metrics),
        "mlflow.sharedViewState.cells": _view("cell", CELL_PARAMS, cell_metrics),
    }


def _view(kind: str, params: Sequence[str], metrics: Sequence[str]) -> str:
    columns = [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics]
    state = {
        "searchFilter": f"tags.`allograft.kind` = '{kind}'",
        # Sorted by anything but time, the table is flat and shows nested runs as any other.
        "orderByKey": f"params.`{params[0]}`",
        "orderByAsc": True,
        "selectedColumns": columns,
        "viewMaximized": True,
    }
    return json.dumps(state)
