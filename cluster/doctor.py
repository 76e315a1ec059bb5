"""What is wrong with a cluster, for one study or at all, and the command that mends it.

    allograft doctor [STUDY]                    # exit code 0 sound, 1 a study would run but worse, 2 it would be refused
    require(study)                              # inside of a session, before anything starts: RequestError where it must be refused

Inside of a Ray job, or where RAY_ADDRESS is set, every node of the cluster is looked at; otherwise this machine.
"""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from base import storage
from base.errors import AllograftError, RequestError
from base.paths import is_url
from cluster.hosts import Host, everywhere, look
from cluster.places import of_place, of_trainer, room_for, together
from cluster.study import Study

SKEW_REFUSED_S = 10.0  # locks in `out` count two minutes, signatures of requests to a store fifteen
SKEW_SOUND_S = 1.0
SHM_SOUND = 2 << 30
FREE_SOUND = 5 << 30
INFINIBAND_LOCKED = 64 << 20
Level = Literal["ok", "mend", "refused"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. mend: the command or setting that helps; none where all is well."""

    level: Level
    what: str
    said: str
    mend: str | None = None


def command(path: str | None, settings: Sequence[str], address: str | None) -> int:
    """What `allograft doctor` does: print the findings; returns the exit code."""
    from cluster.load import load_study

    study = load_study(path, settings) if path else None
    findings = [_dashboard(address)] if address else examine(study)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.level:8} {finding.what:{width}}  {finding.said}")
        if finding.mend:
            print(f"{'':8} {'':{width}}  -> {finding.mend}")
    return max({"ok": 0, "mend": 1, "refused": 2}[finding.level] for finding in findings)


def examine(study: Study | None) -> list[Finding]:
    """All findings: of the cluster, and of what the study wants of it."""
    tracking = [_tracking(study)] if study else []
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        here = _here(study)
        said = "no RAY_ADDRESS: a study starts a cluster of its own on this machine and ends it"
        return [Finding("ok", "cluster", said), *_findings(study, [here], [], here), *tracking]
    from cluster.session import session

    try:
        with session(), _token(study) as token:
            nodes, silent = everywhere([*token, *(_local_data(study) if study else ())])
            return [*_findings(study, nodes, silent, _here(study), token, _ceiling()), *tracking]
    except AllograftError as error:
        return [Finding("refused", "cluster", f"{error.where}: {error.what}", error.hint), *tracking]


def require(study: Study) -> None:
    """Refuse a study that this cluster cannot run, before anything starts. On one node little can be wrong, and only room is looked at.

    Raises:
        RequestError: too few processors or GPUs, another version on a node, a node that says nothing, storage that the nodes do not share,
            clocks that differ.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 1 and _ceiling() is None:
        findings = room(study, [node["Resources"] for node in alive])
    else:
        with _token(study) as token:
            nodes, silent = everywhere([*token, *_local_data(study)])
            findings = _findings(study, nodes, silent, _here(study), token, _ceiling())
    refused = [finding for finding in findings if finding.level == "refused"]
    if refused:
        words = "; ".join(f"{finding.what}: {finding.said}" for finding in refused)
        raise RequestError(words, where="cluster", hint=refused[0].mend)


def _findings(
    study: Study | None,
    nodes: Sequence[Host],
    silent: Sequence[str],
    here: Host,
    token: Mapping[str, str] | None = None,
    ceiling: Mapping[str, float] | None = None,
) -> list[Finding]:
    found = [_nodes(nodes, silent), versions(nodes, here), _clocks(nodes), *_machines(nodes), *_network(nodes)]
    if study:
        rooms = [node.resources for node in nodes] if ceiling is None else [ceiling]
        found += [*room(study, rooms), *shared(study, nodes, token or {}), *_credentials(study, nodes)]
    return found


def _here(study: Study | None) -> Host:
    import dataclasses

    facts = look([study.out] if study else [], "127.0.0.1")
    cores = float(len(os.sched_getaffinity(0)))
    return dataclasses.replace(facts, resources={"CPU": cores, **({"GPU": float(len(facts.gpus))} if facts.gpus else {})})


def _ceiling() -> dict[str, float] | None:
    """What a cluster that grows can have at most; None for one that does not."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return {name: float(value) for name, value in most.items()} if most else None


def _nodes(nodes: Sequence[Host], silent: Sequence[str]) -> Finding:
    if silent:
        hint = "the same environment on every node (docs/deploy.md, Several hosts); ray drain-node takes a sick one out"
        return Finding("refused", "nodes", "; ".join(silent), hint)
    return Finding("ok", "nodes", f"{len(nodes)}: {', '.join(node.name for node in nodes)}")


def versions(nodes: Sequence[Host], here: Host) -> Finding:
    """Every node has the packages of the driver."""
    apart = [
        f"{node.name} has {name} {version}, the driver {here.versions[name]}"
        for node in nodes
        for name, version in node.versions.items()
        if version != here.versions[name]
    ]
    if apart:
        return Finding("refused", "versions", "; ".join(apart), "uv pip sync --require-hashes requirements.lock, on those nodes")
    return Finding("ok", "versions", ", ".join(f"{name} {version}" for name, version in here.versions.items()))


def _clocks(nodes: Sequence[Host]) -> Finding:
    worst = max(nodes, key=lambda node: abs(node.skew_s) - node.skew_error_s, default=None)
    away = abs(worst.skew_s) - worst.skew_error_s if worst else 0.0
    if worst is None or away <= SKEW_SOUND_S:
        return Finding("ok", "clocks", "agree")
    level: Level = "refused" if away > SKEW_REFUSED_S else "mend"
    return Finding(level, "clocks", f"{worst.name} is {worst.skew_s:+.0f} s away from the driver", "timedatectl set-ntp true, there")


def _machines(nodes: Sequence[Host]) -> Iterator[Finding]:
    """Shared memory and disks."""
    small = [node for node in nodes if node.shm < min(SHM_SOUND, node.memory // 4)]
    if small:
        said = ", ".join(f"{node.name} {node.shm >> 20} MiB" for node in small)
        hint = "docker run --shm-size=16g; Kubernetes: the volume at /dev/shm in cluster/deploy/rayjob.yaml"
        yield Finding("mend", "/dev/shm", f"too small for Ray's objects and for loader workers: {said}", hint)
    full = [f"{node.name} {name} {free >> 20} MiB" for node in nodes for name, free in node.free.items() if free < FREE_SOUND]
    if full:
        yield Finding("mend", "disk", f"little space: {', '.join(full)}", "export TMPDIR=..., ALLOGRAFT_CACHE=... to a larger disk, there")
    if not small and not full:
        yield Finding("ok", "machines", "shared memory and disks are large enough")


def _network(nodes: Sequence[Host]) -> Iterator[Finding]:
    """What NCCL will find between nodes with GPUs."""
    training = [node for node in nodes if node.gpus]
    idle = [node.name for node in training if not node.resources.get("GPU")]
    if idle:
        yield Finding("mend", "GPUs", f"Ray was started without those of {', '.join(idle)}", "ray start --num-gpus=N")
    if len(training) < 2:
        return
    for node in training:
        name = next((name for name, address in node.interfaces.items() if address == node.address), None)
        chosen = node.environment.get("NCCL_SOCKET_IFNAME")
        if name is None and chosen is None:
            hint = f"export NCCL_SOCKET_IFNAME=INTERFACE before ray start; there are {', '.join(node.interfaces)}"
            yield Finding("mend", "NCCL", f"{node.name}: no interface has the address by which Ray knows it", hint)
        elif chosen is not None and not any(held.startswith(chosen.lstrip("=").split(",")[0]) for held in node.interfaces):
            hint = f"export NCCL_SOCKET_IFNAME={name} before ray start"
            yield Finding("mend", "NCCL", f"{node.name}: NCCL_SOCKET_IFNAME={chosen} names no interface", hint)
        if node.infiniband and node.environment.get("NCCL_IB_DISABLE") == "1":
            hint = "unset NCCL_IB_DISABLE before ray start"
            yield Finding("mend", "NCCL", f"{node.name} has {', '.join(node.infiniband)} and NCCL_IB_DISABLE=1", hint)
        if node.infiniband and 0 <= node.locked_memory < INFINIBAND_LOCKED:
            hint = "ulimit -l unlimited before ray start; docker run --ulimit memlock=-1; Kubernetes: capability IPC_LOCK"
            yield Finding("mend", "NCCL", f"{node.name}: InfiniBand with {node.locked_memory >> 20} MiB of locked memory", hint)
    with_ib = [node.name for node in training if node.infiniband]
    if with_ib and len(with_ib) < len(training):
        hint = "train on those alone: a cluster of them, or NCCL_IB_DISABLE=1 everywhere"
        yield Finding("mend", "NCCL", f"InfiniBand only on {', '.join(with_ib)}", hint)
    way = "InfiniBand or RoCE" if with_ib else "TCP: gradients of a ViT-B take some 0.3 s a step at 10 Gbit/s"
    yield Finding("ok", "NCCL", f"{len(training)} nodes with {sum(len(node.gpus) for node in training)} GPUs, by {way}")


def room(study: Study, nodes: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Whether the study's workers fit.

    Args:
        nodes: `CPU` and `GPU` of each.
    """
    fewest, most = study.resources.pretrain_range
    trainer, cell = of_trainer(study.resources), of_place(study.resources, nodes)
    total = ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s" for name in ("CPU", "GPU"))
    found = []
    if study.pretrain:
        fit = room_for(nodes, [trainer])
        if fit < fewest:
            wanted = ", ".join(f"{value:g} {name}s" for name, value in together([trainer] * fewest).items())
            said = f"pretraining wants {fewest} workers of {_words(trainer)} ({wanted}), {fit} fit: the cluster has {total}"
            found.append(Finding("refused", "room", said, f"resources.pretrain_workers={fit}" if fit else "nodes with more"))
        elif fit < most:
            found.append(Finding("ok", "room", f"pretraining: {fit} of at most {most} workers fit"))
    if study.cells and not room_for(nodes, cell):
        said = f"a cell wants {_words(together(cell))}, which no node has: the cluster has {total}"
        found.append(Finding("refused", "room", said, "resources.gpus_per_cell, resources.threads"))
    return found or [Finding("ok", "room", total)]


def _words(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{value:g} {name}" for name, value in bundle.items())


@contextmanager
def _token(study: Study | None) -> Iterator[dict[str, str]]:
    """A file in `out` with its content, for as long as it is looked for."""
    if study is None:
        yield {}
        return
    word = uuid.uuid4().hex
    path = storage.join(study.out, f".doctor-{word[:8]}")
    storage.put(path, word)
    try:
        yield {path: word}
    finally:
        storage.remove(path)


def _local_data(study: Study) -> list[str]:
    paths = [path for entry in study.data.values() for path in (entry.raw, entry.shards, entry.split_files) if path]
    return [path for path in paths if not is_url(path) and not path.startswith("phantom:")]


def shared(study: Study, nodes: Sequence[Host], token: Mapping[str, str]) -> list[Finding]:
    """Whether every node sees what the driver has written, and the local files that the study reads."""
    found = []
    for path, word in token.items():
        blind = [f"{node.name} ({node.seen[path]})" for node in nodes if node.seen[path] != word]
        if blind:
            hint = "out=s3://BUCKET/..., or mount that folder at the same path on every node"
            found.append(Finding("refused", "storage", f"{study.out} is not shared: not seen by {', '.join(blind)}", hint))
    for path in _local_data(study) if token else ():
        blind = [node.name for node in nodes if node.seen[path] == "not there"]
        if blind:
            hint = "mount it at the same path on every node, or pack once into s3://BUCKET/... and name that as shards"
            found.append(Finding("refused", "data", f"{path} is not seen by {', '.join(blind)}", hint))
    return found or [Finding("ok", "storage", f"{study.out} is seen by every node" if token else study.out)]


def _credentials(study: Study, nodes: Sequence[Host]) -> list[Finding]:
    if not study.out.startswith("s3://"):
        return []
    without = [node.name for node in nodes if node.credentials is None]
    if without:
        hint = "a role of the node, or AWS_SHARED_CREDENTIALS_FILE before ray start (docs/deploy.md, Credentials)"
        return [Finding("mend", "credentials", f"none for S3 on {', '.join(without)}", hint)]
    return [Finding("ok", "credentials", f"S3: {', '.join(sorted({str(node.credentials) for node in nodes}))} on every node")]


def _tracking(study: Study) -> Finding:
    from cluster.mlflow_store import require_server, tracking_uri

    if study.tracking == "sqlite":
        return Finding("ok", "MLflow", "a file in out")
    uri = tracking_uri(study.out, study.tracking)
    return _asked("MLflow", f"{uri} answers", lambda: require_server(uri))


def _dashboard(address: str) -> Finding:
    from cluster.submit import connect

    said = f"{address} answers with the same Ray and Python; its nodes are looked at by a job: ray job submit ... -- allograft doctor"
    return _asked("cluster", said, lambda: connect(address))


def _asked(what: str, well: str, ask: Callable[[], object]) -> Finding:
    try:
        ask()
    except AllograftError as error:
        return Finding("refused", what, f"{error.where}: {error.what}", error.hint)
    return Finding("ok", what, well)
