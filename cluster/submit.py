"""A study as a job of a Ray cluster: packed, sent, followed to its end, with the exit code of its own driver.

submit("studies/demo.yaml", ["out=s3://bucket/demo", "tracking=http://mlflow:5000"], "http://head:8265")
code = follow("allograft-demo-1f0c9a2e", "http://head:8265")

Credentials never travel: the cluster's nodes have their own (docs/cluster.md). What is sent is searched for them first.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from base.errors import RequestError, WorkError, unknown
from base.paths import ROOT, names, revision, with_preset

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# What a driver reads: the packages and the YAML files. Named, so that nothing else that lies in a checkout is ever sent.
SENT = ("base", "shards", "encoders", "engine", "analysis", "finetune", "pretrain", "cluster", "datasets", "studies")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
STUDIES = "submitted"  # the folder of the package for study files from elsewhere
# Ray ends a job with SIGTERM and kills it after 3 s; a driver that is interrupted instead gives its lock back.
STOP_SETTINGS = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
CONNECT_S = 10.0
LAST_CUTS = 5
QUIET_S = 30.0
SILENCE_S = 120.0  # a dashboard that says nothing for so long is gone
SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSPHRASE|PRIVATE_KEY")


def command(
    study: str | None, settings: Sequence[str], address: str | None, *, detach: bool, followed: str | None, stopped: str | None
) -> int:
    """What `allograft submit` does; returns its exit code."""
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS", "")).rstrip("/")
    if [study, followed, stopped].count(None) != 2:
        raise RequestError("one of STUDY, --follow JOB and --stop JOB", hint="allograft submit STUDY.yaml --address http://HOST:8265")
    if not address:
        raise RequestError("which cluster?", where="--address", hint="--address http://HOST:8265")
    if stopped is not None:
        print(f"job {stopped}: {stop(stopped, address)}")
        return 0
    job = followed or submit(str(study), settings, address)
    ways = f"  allograft submit --follow {job} --address {address}\n  allograft submit --stop {job} --address {address}"
    if followed is None:
        print(f"job {job}", flush=True)
    if detach:
        print(ways)
        return 0
    try:
        return follow(job, address)
    except KeyboardInterrupt:
        print(f"\nno longer followed; the job goes on\n{ways}", file=sys.stderr)
        return 130


def connect(address: str) -> "JobSubmissionClient":
    """The job client of a cluster whose Ray and Python are those of this command.

    Args:
        address: of the dashboard, `http://HOST:8265` or `https://...`.

    Raises:
        RequestError: no cluster there, no or a wrong token, another version of Ray or Python.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"'{address}' is not the address of a dashboard", where="--address", hint="--address http://HOST:8265")
    _without_credentials(address, "--address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()
    except OSError as error:
        hint = "ray start --head shows the dashboard's address; from outside: kubectl port-forward or ssh -L 8265:127.0.0.1:8265 HEAD"
        raise RequestError(f"no cluster answers: {error}", where=address, hint=hint) from error
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets RAY_ADDRESS win over what it is given
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and every socket
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address, verify=os.environ.get("REQUESTS_CA_BUNDLE") or True)
        reply = client._do_request("GET", "/api/v0/cluster_metadata", timeout=SILENCE_S)
        reply.raise_for_status()
        cluster = reply.json()["data"]
    except AuthenticationError as error:
        hint = "export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH=FILE, with the token that the cluster was started with"
        raise RequestError(str(error).splitlines()[0], where=address, hint=hint) from error
    except ConnectionError as error:
        reason, hint = str(error), "is it Ray's dashboard?"
        if isinstance(error.__context__, requests.exceptions.SSLError):
            reason, hint = (
                f"its certificate is refused: {error.__context__}",
                "an authority of your own: export REQUESTS_CA_BUNDLE=FILE.pem",
            )
        raise RequestError(reason, where=address, hint=hint) from error
    except (RuntimeError, ValueError, KeyError, requests.exceptions.RequestException) as error:
        raise RequestError(f"what answers is not Ray's dashboard: {error}", where=address, hint="--address http://HOST:8265") from error
    _same_versions(cluster, address)
    return client


def _same_versions(cluster: dict[str, Any], address: str) -> None:
    import ray

    here = ".".join(map(str, sys.version_info[:2]))
    if cluster["rayVersion"] != ray.__version__:
        what = f"the cluster has Ray {cluster['rayVersion']}, this command {ray.__version__}"
        raise RequestError(what, where=address, hint=f"start the cluster from requirements.lock (ray=={ray.__version__})")
    if cluster["pythonVersion"].rpartition(".")[0] != here:
        what = f"the cluster has Python {cluster['pythonVersion']}, this command {here}"
        raise RequestError(what, where=address, hint=f"Python {here} on both sides: see docker/Dockerfile")


def submit(path: str, settings: Sequence[str], address: str) -> str:
    """Send a study to a cluster and come back at once.

    Args:
        path: a study file, or the name of one in studies/ or here.
        settings: `key=value` words, applied there as here.
        address: of the dashboard.

    Returns:
        The job's name.

    Raises:
        RequestError: the study is wrong, cannot run as a job (relative paths), holds a credential; or see `connect`.
    """
    from cluster.load import load_study, study_file

    path = path if path in names("study") else study_file(path)
    study = load_study(path, settings, job=True)
    for url in _texts(study.model_dump()):
        _without_credentials(url, path)
    client = connect(address)
    job = f"allograft-{study.study}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="allograft-submit-") as folder:
        name = pack(Path(folder), path, list(_texts(study.model_dump())))
        entrypoint = shlex.join(["allograft", "run", name, *settings])
        files = {str(file.relative_to(folder)): file.read_text() for file in Path(folder).rglob("*.y*ml")}
        refuse_secrets({"settings": entrypoint, **files})
        variables = {"ALLOGRAFT_REVISION": revision(), **STOP_SETTINGS}
        client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env={"working_dir": folder, "env_vars": variables})
    return job


def pack(folder: Path, study: str, texts: Sequence[str]) -> str:
    """Fill `folder` with what the driver needs: the code, the study file, and the YAML files of the user's own that the study names.

    Returns:
        The study as the driver names it.

    Raises:
        RequestError: a file of the user's own that cannot stand at the same relative path there.
    """
    for name in SENT:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    own = sorted({file for text in texts if (file := with_preset(text)[0]).endswith((".yaml", ".yml")) and Path(file).is_file()})
    for file in own:
        target = folder / file
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise RequestError("a file outside of this directory cannot go with the job", where=file, hint="name it by a path below here")
        if target.exists() and target.read_bytes() != Path(file).read_bytes():
            raise RequestError("Allograft has another file of this name", where=file, hint="rename yours")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if "/" not in study and not study.endswith((".yaml", ".yml")):
        return study
    (folder / STUDIES).mkdir()
    shutil.copyfile(study, folder / STUDIES / Path(study).name)
    return f"{STUDIES}/{Path(study).name}"


def follow(job: str, address: str) -> int:
    """Print a job's log until it ends, from its beginning; a connection that breaks is made again.

    Returns:
        The driver's exit code: 0 done, 1 the work failed (or the job was stopped, or killed), 2 the request is wrong.

    Raises:
        RequestError: no such job.
        WorkError: the cluster does not answer any more.
        KeyboardInterrupt: the job itself goes on.
    """
    import requests

    client = connect(address)
    info = _details(client, job)
    seen, cuts, heard = 0, 0, time.monotonic()
    while True:
        seen, cut = asyncio.run(_print_log(client, job, seen))
        cuts = cuts + 1 if cut else 0
        try:
            info = client.get_job_info(job)
            heard = time.monotonic()
        except (requests.exceptions.RequestException, RuntimeError) as error:
            if time.monotonic() - heard > SILENCE_S:
                hint = f"when it is back: allograft submit --follow {job} --address {address}"
                raise WorkError("the cluster does not answer any more", where=address, hint=hint) from error
        # A log that was cut is read once more to its end, unless the node that holds it is gone.
        if info.status.is_terminal() and (not cut or cuts > LAST_CUTS):
            return _ending(job, info)
        time.sleep(1)


async def _print_log(client: "JobSubmissionClient", job: str, seen: int) -> tuple[int, bool]:
    """Print what follows the first `seen` characters; returns how many there are now, and whether the connection broke."""
    import aiohttp

    position = 0
    try:
        async with contextlib.aclosing(client.tail_job_logs(job)) as texts:
            while True:
                # A connection may die without a word, and a log may be quiet for long: after a while the log is asked for again.
                text = await asyncio.wait_for(anext(texts), QUIET_S)
                print(text[max(0, seen - position) :], end="", flush=True)  # it always comes from the beginning
                position += len(text)
    except StopAsyncIteration:
        return max(seen, position), False
    except (TimeoutError, aiohttp.ClientError, RuntimeError):
        return max(seen, position), True


def _ending(job: str, info: Any) -> int:
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        print(f"job {job} was stopped", file=sys.stderr)
    elif code is None:
        print(f"job {job} failed before its driver ended: {(info.message or '').strip()}", file=sys.stderr)
    elif code not in (1, 2):
        print(f"job {job}: its driver was killed (exit code {code})", file=sys.stderr)
    return code if code in (1, 2) else 1


def stop(job: str, address: str) -> str:
    """Interrupt a job and wait for its end; what it has done stays.

    Returns:
        Its last status: STOPPED, or what it had ended with before.
    """
    client = connect(address)
    if _details(client, job).status.is_terminal():
        return str(client.get_job_info(job).status.value)
    client.stop_job(job)
    deadline = time.monotonic() + SILENCE_S
    while not (status := client.get_job_info(job).status).is_terminal():
        if time.monotonic() > deadline:
            raise WorkError("the job was told to stop and has not", where=job, hint=f"allograft submit --follow {job} --address {address}")
        time.sleep(0.5)
    return str(status.value)


def _details(client: "JobSubmissionClient", job: str) -> Any:
    jobs = {found.submission_id: found for found in client.list_jobs() if found.submission_id}
    if job not in jobs:
        raise unknown("job", job, jobs)
    return jobs[job]


def refuse_secrets(sent: dict[str, str]) -> None:
    """Refuse to send what holds the value of a secret of this environment: everyone who reaches the dashboard reads it there.

    Args:
        sent: texts by the name of the place that they come from.
    """
    for name, value in os.environ.items():
        if len(value) < 8 or not SECRET_NAMES.search(name) or name.endswith(("_FILE", "_PATH")):
            continue
        for where, text in sent.items():
            if value in text:
                hint = "leave it out: the cluster's nodes have it in their environment (docs/cluster.md)"
                raise RequestError(f"holds the value of ${name}, which everyone at the dashboard would read", where=where, hint=hint)


def _without_credentials(text: str, where: str) -> None:
    if "://" in text and (urlsplit(text).password or "signature=" in text.lower()):
        hint = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_*, in the environment of the cluster's nodes"
        raise RequestError("an address with a credential in it, which everyone at the dashboard would read", where=where, hint=hint)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a tree, keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from _texts(key)
            yield from _texts(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts(held)
