"""The registry: each pretrained encoder a version of the study's registered model, the best on validation its champion.

versions, champion = register(projection, study)                      # every encoder once; a champion promoted by hand stays
promote("demo", "2", "radiologists preferred it", uri)                # the alias by hand, with its reason
pull("demo@champion", "./encoder", uri)
"""

import json
import os
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from analysis.counted import counts, losses
from base import storage
from base.errors import RequestError, WorkError, unknown
from base.paths import timestamp
from cluster.mlflow_store import connect
from cluster.projection import KEY_TAG, Projection
from cluster.study import Study

CHAMPION = "champion"
SOURCE_TAG = "allograft.source"
REASON_TAG, WHO_TAG, WHEN_TAG = "promoted.reason", "promoted.by", "promoted.at"  # of a version: its last promotion
BY_HAND_TAG = "champion.by_hand"  # of the registered model: the version that holds, until the tag is deleted


def register(projection: Projection, study: Study) -> tuple[dict[str, str], str | None]:
    """Register every exported encoder once, and give the alias `champion` by the study's rule, unless somebody gave it by hand.

    Returns:
        Versions by folder of the pretraining (`simclr-<key>`), and the champion in words (None without a rule or a result).
    """
    client, name = projection.client, study.study
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description=f"Encoders of the study {name}; load with timm, see README.md in each")
    versions = {version.tags[KEY_TAG]: version for version in client.search_model_versions(f"name='{name}'") if KEY_TAG in version.tags}
    registered: dict[str, str] = {}
    best: tuple[float, str, str] | None = None
    lost = losses(study.out) if study.champion else {}
    cells = [held for key, held in projection.cells().items() if key not in lost] if study.champion else []
    for folder in storage.listing(storage.join(study.out, "pretrain")):
        path = storage.join(study.out, "pretrain", folder)
        if not storage.exists(storage.join(path, "result.json")):
            continue
        result = storage.read_json(storage.join(path, "result.json"))
        key = result["key"]
        score = champion_score(study, result["encoder_sha256"], cells)
        if key not in versions:
            run = projection.runs[key]
            exported = storage.read_json(storage.join(path, "export", "allograft.json"))
            tags = {
                KEY_TAG: key,
                SOURCE_TAG: result["name"],
                "revision": exported["revision"],
                "license": exported["licence"],
                "data.digest": json.dumps({entry["dataset"]: entry.get("digest") for entry in exported["data"]}),
                "allograft.run": run,
                "method": exported["method"],
                "architecture": exported["architecture"],
                "weights.sha256": exported["file_sha256"],
                "encoder.sha256": result["encoder_sha256"],
                "lineage": json.dumps(exported["lineage"]),
                "health": result["health"],
            }
            versions[key] = client.create_model_version(name, source=f"runs:/{run}/encoder", run_id=run, tags=tags)
        version = str(versions[key].version)
        registered[f"{result['name']}-{key}"] = version
        if score is not None:
            client.set_model_version_tag(name, version, "validation", f"{study.champion.metric}={score:.4f}" if study.champion else "")
            if best is None or score > best[0]:
                best = (score, version, result["name"])
    by_rule = best[2] if best else None
    held = _champion(client, name)
    if held is not None and client.get_registered_model(name).tags.get(BY_HAND_TAG) == str(held.version):
        rule = f"; by the rule {by_rule}" if by_rule else ""
        return registered, f"{_named(held)}, promoted by hand: {held.tags.get(REASON_TAG)}{rule}"
    if best is not None:
        client.set_registered_model_alias(name, CHAMPION, best[1])
    return registered, by_rule


def champion_score(study: Study, encoder_sha256: str, cells: Sequence[dict[str, Any]]) -> float | None:
    """An encoder's validation metric on the champion's task: the mean over seeds under the strategy that suits it best, as in the report.

    Returns:
        None where it has no cell there, or only controls, cells on datasets whose labels it has seen, and settings of which a cell has no
        number: those that did not diverge are a selection.
    """
    if study.champion is None:
        return None
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for cell in cells:
        mine = cell["task"] == study.champion.task and cell["encoder_sha256"] == encoder_sha256
        if not mine or not counts(cell, study.exposed):
            continue
        for row in cell["metrics"]:
            if row["split"] == "val" and row["metric"] == study.champion.metric and not row["class"]:
                how = (cell["strategy"], str(cell["options"]), cell["fraction"], cell["resolution"])
                groups.setdefault(how, []).append(row["value"])
    return max((fmean(values) for values in groups.values() if None not in values), default=None)


def promote(name: str, version: str, reason: str, uri: str) -> str:
    """Make a version the champion by hand: reason, user and time become its tags, and `register` leaves it where it is.

    Returns:
        What has changed, in words.

    Raises:
        RequestError: no such encoder or version, with what there is, or no reason.
    """
    if not reason.strip():
        raise RequestError("why?", where="--reason", hint='--reason "one sentence for those who come later"')
    client = connect(uri)
    wanted, before = resolve(client, f"{name}/{version}"), _champion(client, name)
    from mlflow.tracking.context.registry import resolve_tags

    who = resolve_tags().get("mlflow.user", "unknown")  # the login at the server, else the user here
    for tag, value in {WHO_TAG: who, WHEN_TAG: timestamp(), REASON_TAG: reason}.items():
        client.set_model_version_tag(name, wanted.version, tag, value)
    client.set_registered_model_tag(name, BY_HAND_TAG, wanted.version)
    client.set_registered_model_alias(name, CHAMPION, wanted.version)
    instead = f" instead of version {before.version} ({_named(before)})" if before and before.version != wanted.version else ""
    return f"{name}@{CHAMPION} is version {wanted.version} ({_named(wanted)}){instead}"


def _champion(client: Any, name: str) -> Any | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, version) if version else None


def _named(version: Any) -> str:
    """The pretraining that a version comes from."""
    return str(version.tags.get(SOURCE_TAG, "not of a study"))


def resolve(client: Any, reference: str) -> Any:
    """The model version of `NAME`, `NAME@ALIAS`, `NAME@VERSION` or `NAME/VERSION`.

    Raises:
        RequestError: no such model, alias or version, with what there is.
    """
    from mlflow.exceptions import MlflowException

    name, _, alias = reference.partition("@")
    name, _, version = name.partition("/")
    alias, version = ("", alias) if alias.isdigit() else (alias, version)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        raise unknown("registered encoder", name, [model.name for model in client.search_registered_models()]) from error
    try:
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException as error:
        versions = sorted(client.search_model_versions(f"name='{name}'"), key=lambda one: int(one.version))
        there = [f"{one.version} ({_named(one)})" for one in versions]
        hint = f"versions: {', '.join(there) or 'none'}; aliases: {', '.join(client.get_registered_model(name).aliases) or 'none'}"
        if not version and alias in ("", CHAMPION):
            hint += f"; {name}/VERSION is one by its number, allograft promote {name} VERSION --reason WHY makes it the champion"
        raise RequestError(f"no '{alias or version or CHAMPION}' of '{name}'", hint=hint) from error


def pull(reference: str, folder: str, uri: str) -> str:
    """Fetch a registered encoder into an empty folder and check its hash.

    Args:
        reference: `NAME[@ALIAS]`, alias `champion` by default.

    Returns:
        The version.

    Raises:
        RequestError: nothing under that name, or the folder is not empty.
        WorkError: what arrived is not what was registered.
    """
    import hashlib

    if os.path.isdir(folder) and os.listdir(folder):
        raise RequestError("the folder is not empty", where=folder)
    client = connect(uri)
    version = resolve(client, reference)
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        found = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=temporary, tracking_uri=uri)
        weights = os.path.join(found, "model.safetensors")
        with open(weights, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != version.tags.get("weights.sha256"):
            raise WorkError("the weights that arrived are not those that were registered (sha256 differs)", where=reference)
        storage.put_dir(found, os.path.abspath(folder), last=("allograft.json",))
    return str(version.version)
