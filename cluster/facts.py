"""What a tracked run says about a pretraining or a cell: its name, parameters, metrics and tags. Pure functions of the files in OUT.

Chosen for the two pages on which encoders are compared, the table of runs and the comparison of a few of them: what tells runs apart is a
parameter, what they are judged by is a metric, one value each, and the rest stays in config.yaml and result.json, which are artifacts.

    pretraining    parameters: method, start, data, the recipe; metrics: what its cells reached, means by setting; speed
    cell           parameters: its axes and its recipe; metrics: each metric over all labels, on validation and on test
    both           curves over epochs or steps, under `training/`, apart from the values that runs are judged by
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from analysis.counted import counts
from base.config import digest
from finetune.catalogue import STRATEGIES

# How often something is written tells no two runs apart.
UNTOLD = {"schema", "method", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints"}
PLACES = ("step", "steps", "epoch", "seconds")  # where a row stands, not what it measured
NAME = 250  # letters that MLflow takes in a name
ALIKE = ("architecture", "fraction")  # of an encoder's cells, not in the name of their mean: it has one of each


@dataclass(frozen=True)
class Tracked:
    """One run as MLflow is told."""

    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str] = field(default_factory=dict)


def name(kind: str, config: dict[str, Any]) -> str:
    """The run's name: `pretrain simclr seed 0`, `phantom-chest simclr linear seed 0`."""
    if kind == "pretrain":
        return f"pretrain {config['name']} seed {config['seed']}"
    task = config["task"]["task"] + (" shuffled labels" if config.get("shuffle_labels") else "")
    amount = f" {config['fraction']:g}" if config["fraction"] != 1 else ""
    role = config.get("role", "cell")
    trial = f"{role} of " if role != "cell" else ""
    return f"{trial}{task} {config['source']} {config['strategy']['name']}{amount} seed {config['seed']}"


def kind(folder: str, config: dict[str, Any]) -> str:
    """The tag `allograft.kind`: pretrain, cell, control, trial (of a search), similarity (that guides one)."""
    role = str(config.get("role", "cell"))
    if folder == "pretrain" or role != "cell":
        return "pretrain" if folder == "pretrain" else role
    return "control" if config.get("shuffle_labels") else "cell"


def pretraining(config: dict[str, Any], result: dict[str, Any]) -> Tracked:
    """A pretraining, `result` empty while it has none; what its cells reached is added by `downstream` as they finish."""
    recipe = config["recipe"]
    params = {
        "source": config["name"],
        "method": recipe["method"],
        "architecture": config["architecture"],
        "start_from": config.get("start_from_name") or "random",
        "data": " + ".join(f"{entry['dataset']} {entry['split']}" for entry in config["data"]),
        "replay": config.get("replay"),
        "labels": ", ".join(config.get("labels") or []) or None,
        "seed": config["seed"],
        **{f"recipe.{key}": value for key, value in recipe.items() if key not in UNTOLD},
        **{f"digest.{entry['dataset']}": entry["digest"] for entry in config["data"]},
    }
    metrics: dict[str, Any] = {
        key: result[key] for key in ("steps", "epochs", "images", "img_per_s", "seconds", "restarts") if key in result
    }
    for probe in result.get("source_probes", []):  # what was forgotten of an earlier corpus
        metrics |= {f"source_task/{probe['dataset']}/{name}_{probe['when']}": probe[name] for name in ("linear_auroc", "knn_auroc")}
    return Tracked(_flat(params), _numbers(metrics), _tags(config["name"], result))


def cell(config: dict[str, Any], result: dict[str, Any]) -> Tracked:
    """A cell, `result` empty of one that failed. Metrics of single labels stay in result.json: fourteen labels in two splits would hide
    the rest."""
    recipe = config["task"][STRATEGIES[config["strategy"]["name"]].trains_by or "recipe"]
    options = {f"strategy.{key}": value for key, value in config["strategy"].items() if key != "name"}
    params = {
        "source": config["source"],
        "source_seed": config["source_seed"],
        "architecture": config["architecture"],
        "strategy": config["strategy"]["name"],
        **options,
        "task": config["task"]["task"],
        "dataset": config["task"]["dataset"],
        "fraction": config["fraction"],
        "resolution": config["resolution"],
        "seed": config["seed"],
        **{f"recipe.{key}": value for key, value in recipe.items()},
        f"digest.{config['task']['dataset']}": config["manifest_digest"],
    }
    metrics: dict[str, Any] = {}
    if result:
        metrics = headline(result) | {
            "best_epoch": result["selection"]["epoch"],
            "seconds": result["seconds"],
            "params_million": result["params"] / 1e6,
            "macs_million": result["macs"] / 1e6,
        }
    tags = _tags(config["source"], result) | {"allograft.own_source": str(config.get("own_source", False)).lower()}
    if config.get("exposed_to"):
        tags["allograft.exposed_to"] = ", ".join(config["exposed_to"])
    return Tracked(_flat(params), _numbers(metrics), tags)


def headline(result: dict[str, Any]) -> dict[str, float]:
    """A cell's metrics over all labels, by name: `test_auroc_mean`, `val_dice`, and `test_auroc_mean/<stratum>` in MLflow's letters."""
    rows = [row for row in result["metrics"] if not row["class"] and row["value"] is not None]
    return {re.sub(r"[^\w\-./: ]", "_", f"{row['split']}_{row['metric']}"): float(row["value"]) for row in rows}


def downstream(
    mine: Sequence[dict[str, Any]], everything: Sequence[dict[str, Any]], baseline: str | None, exposed: str = "apart"
) -> dict[str, float]:
    """What the cells of one encoder reached: means by task, strategy with its options and resolution, over seeds alone, and the number of
    cells: `phantom-chest/truncated cut layer3 head pooled/224 px/test_auroc_mean`.

    Where the study has the same cells of the encoder's architecture from random weights, the difference in the task's metric stands beside
    it (`..._over_random`); whether it is more than chance is for the report to say. Left out are controls, cells on data whose labels the
    encoder has seen or, unless the study ranks them, whose test images, and all but the largest fraction of the labels.

    Args:
        mine: results of the encoder's cells. everything: results of all cells of the study. baseline: the source of random weights.
        exposed: the study's setting of that name.
    """
    found: dict[str, float] = {}
    drawn = [result for result in everything if result["source"] == baseline and counts(result, exposed)]
    for group, members in _groups(mine, exposed).items():
        metric = f"test_{members[0]['selection']['metric']}"
        means = {name: value for name, value in _means(members).items() if name.endswith((metric[4:], "_within_mean"))}
        found |= {f"{group}/{name}": value for name, value in means.items()}
        # Named so that it does not come before what encoders are judged by: MLflow's tables go by the alphabet.
        found[f"{group}/tested_cells"] = float(len(members))
        like = [result for result in drawn if _group(result) == group and all(result[name] == members[0][name] for name in ALIKE)]
        floor = _means(like)
        if metric in means and metric in floor:
            found[f"{group}/{metric}_over_random"] = means[metric] - floor[metric]
    return _numbers(found)


def _group(result: dict[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in result["options"].items() if value is not None]
    return f"{result['task']}/{' '.join([result['strategy'], *options])}/{result['resolution']} px"


def _groups(results: Sequence[dict[str, Any]], exposed: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if counts(result, exposed):
            groups.setdefault(_group(result), []).append(result)
    largest = {group: max(member["fraction"] for member in members) for group, members in groups.items()}
    return {group: [member for member in members if member["fraction"] == largest[group]] for group, members in groups.items()}


def _means(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    values = [headline(result) for result in results]
    names = sorted({metric for value in values for metric in value})
    return {metric: fmean(value[metric] for value in values if metric in value) for metric in names}


def curves(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of one row of metrics.jsonl that are drawn over steps."""
    return _numbers({f"training/{key}": value for key, value in row.items() if key not in PLACES})


def _tags(source: str, result: dict[str, Any]) -> dict[str, str]:
    tags = {
        "allograft.source": source,
        "allograft.encoder_sha256": result.get("encoder_sha256"),
        "allograft.lineage": json.dumps(result["lineage"]) if result.get("lineage") else None,
        "allograft.host": result.get("host"),
        "allograft.device": result.get("device"),
        "mlflow.source.git.commit": result.get("revision"),
        "health": result.get("health"),
        "health.why": result.get("why"),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Finite numbers only, under names that MLflow takes."""
    kept = {key: float(value) for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {_safe(key): value for key, value in kept.items() if value == value and abs(value) != float("inf")}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[_safe(f"{prefix}{key}")] = str(value)[:6000]
    return found


def _safe(text: str) -> str:
    # MLflow's alphabet for names, and its length.
    name = "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in text)
    return name if len(name) <= NAME else f"{name[: NAME - 9]} {digest(text)[:8]}"
