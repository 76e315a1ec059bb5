"""The report's figures and tables on MLflow's runs, so that its pages compare encoders without the report.

    show(client, out, parent, {encoder_sha256: run}, projection.cells())

On the study's run: figures/*.svg of the page, the figures and tables of the analyses (analyses/<kind>/), and MLflow tables of results and
of comparisons. On each encoder's run an MLflow table of its own cells under the same name, which the runs' comparison lays side by side.
Everything is written over when it comes again: `client.log_table` would append.
"""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis import results
from analysis.analyses import standing
from base import storage

TAG = "mlflow.loggedArtifacts"  # where MLflow looks for the tables of a run
ROWS = 5000
FACTS = ("strategy", "task", "fraction", "resolution", "seed", "params", "macs", "seconds")
COLUMNS = ("source", "options", *FACTS[:5], "metric", "value", "unit", *FACTS[5:], "encoder_sha256")


def show(client: Any, out: str, parent: str, encoders: Mapping[str, str], cells: Mapping[str, Any]) -> None:
    """cells: results by key. Raises MlflowException where the server or its artifacts' storage is away."""
    with tempfile.TemporaryDirectory(prefix="showcase-") as local:
        for name in storage.listing(storage.join(out, "report", "figures")):
            _fetch(storage.join(out, "report", "figures", name), local, f"figures/{name}")
        for found in standing(out):
            analysis = found.analysis
            files = [f"{drawn.file}.png" for drawn in analysis.figures] + [listed.file for listed in analysis.tables]
            for name in files:
                _fetch(storage.join(found.url, name), local, f"analyses/{analysis.kind}/{name}")
        if os.listdir(local):
            client.log_artifacts(parent, local)
    frame = headlines(out, cells)
    put_table(client, parent, "results", frame.drop(columns="encoder_sha256"))
    url = storage.join(out, "report", "significance.csv")
    if storage.exists(url) and storage.read_bytes(url).strip():
        put_table(client, parent, "comparisons", pd.read_csv(io.BytesIO(storage.read_bytes(url))))
    for sha256, run in encoders.items():
        own = frame[frame["encoder_sha256"] == sha256].drop(columns="encoder_sha256")
        if len(own):
            put_table(client, run, "results", own)


def headlines(out: str, cells: Mapping[str, Any]) -> pd.DataFrame:
    """A row a cell with its headline metric on the test split, controls left out."""
    rows = []
    for cell in results.finished(out, cells):
        metric = cell.primary()
        if cell.shuffled or metric is None:
            continue
        facts = {name: cell.result.get(name) for name in FACTS}
        facts |= {"source": cell.source, "options": cell.options, "metric": metric, "unit": "fraction", "value": cell.value(metric)}
        rows.append({**facts, "encoder_sha256": cell.result.get("encoder_sha256")})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def put_table(client: Any, run: str, name: str, frame: pd.DataFrame) -> None:
    """An MLflow table `tables/<name>.json`, in the form of `client.log_table`; one that stands is replaced."""
    path = f"tables/{name}.json"
    with tempfile.TemporaryDirectory(prefix="table-") as local:
        frame.head(ROWS).to_json(os.path.join(local, f"{name}.json"), orient="split", index=False)
        client.log_artifact(run, os.path.join(local, f"{name}.json"), "tables")
    held = json.loads(client.get_run(run).data.tags.get(TAG, "[]"))
    entry = {"path": path, "type": "table"}
    if entry not in held:
        client.set_tag(run, TAG, json.dumps([*held, entry]))


def _fetch(url: str, local: str, path: str) -> None:
    target = os.path.join(local, path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    storage.get_file(url, target)
