"""The registry: each pretrained encoder a version of the study's registered model, the best on validation its champion."""

import json
import os
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from base import storage
from base.errors import RequestError, WorkError, unknown
from cluster.study import Study
from cluster.tracking import KEY_TAG, Projection, connect


def register(projection: Projection, study: Study) -> tuple[dict[str, str], str | None]:
    """Register every exported encoder once, and give the alias `champion` by the study's rule.

    Returns:
        Versions by folder of the pretraining (`simclr-<key>`), and the champion's name (None without a rule or a result).
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
    cells = list(projection.cells().values()) if study.champion else []
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
                "allograft.source": result["name"],
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
    if best is not None:
        client.set_registered_model_alias(name, "champion", best[1])
    return registered, best[2] if best else None


def champion_score(study: Study, encoder_sha256: str, cells: Sequence[dict[str, Any]]) -> float | None:
    """An encoder's validation metric on the champion's task: the mean over seeds under the strategy that suits it best, as in the report.

    Returns:
        None where it has no cell there, or only controls and cells on datasets whose labels it has seen.
    """
    if study.champion is None:
        return None
    groups: dict[tuple[Any, ...], list[float]] = {}
    for cell in cells:
        counts = cell["role"] == "cell" and not cell["own_source"] and not cell.get("shuffle_labels")
        counts = counts and (study.exposed == "ranked" or not cell.get("exposed_to"))
        if not counts or cell["task"] != study.champion.task or cell["encoder_sha256"] != encoder_sha256:
            continue
        for row in cell["metrics"]:
            if row["split"] == "val" and row["metric"] == study.champion.metric and not row["class"] and row["value"] is not None:
                how = (cell["strategy"], str(cell["options"]), cell["fraction"], cell["resolution"])
                groups.setdefault(how, []).append(row["value"])
    return max((fmean(values) for values in groups.values()), default=None)


def resolve(client: Any, reference: str) -> Any:
    """The model version of `NAME`, `NAME@ALIAS` or `NAME/VERSION`.

    Raises:
        RequestError: no such model, alias or version, with what there is.
    """
    from mlflow.exceptions import MlflowException

    name, _, alias = reference.partition("@")
    name, _, version = name.partition("/")
    known = [model.name for model in client.search_registered_models()]
    if name not in known:
        raise unknown("registered encoder", name, known)
    try:
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias or "champion")
    except MlflowException as error:
        model = client.get_registered_model(name)
        hint = f"aliases: {', '.join(model.aliases) or 'none'}"
        raise RequestError(f"no '{alias or version or 'champion'}' of '{name}'", hint=hint) from error


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
