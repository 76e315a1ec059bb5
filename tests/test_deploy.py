"""cluster/deploy: manifests, `ray up` by the validators of Ray and AWS, the Slurm script; and the recipes of docs/deploy.md.

No Kubernetes, no AWS account and no Slurm run here: docs/tested.md.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from services import Services, compose, end, free_ports, tool
from test_docker import locked

from base.paths import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
GUIDE = (ROOT / "docs" / "deploy.md").read_text()
SBATCH = DEPLOY / "slurm.sbatch"
MANIFESTS = ("rayjob.yaml", "raycluster.yaml")
MARK = "change me"
PLACEHOLDER = re.compile(r"example|0{12}")


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / name).read_text()))


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((DEPLOY / "kuberay.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def cluster_of(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_only_fields_that_kuberay_knows(name: str) -> None:
    assert [error.message for error in validator().iter_errors(manifest(name))] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "RayJobs"),
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"), -1),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"), "64 GB"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0), {"name": "REGION", "valu": "x"}),
    ],
)
def test_the_schema_refuses_what_kuberay_would(path: tuple[Any, ...], value: object) -> None:
    tree = manifest("rayjob.yaml")
    node: Any = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    assert list(validator().iter_errors(tree))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_cluster_is_the_locks_ray_behind_a_token_with_workers_that_may_vanish(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == locked("ray")
    assert cluster["authOptions"]["mode"] == "token"
    head, workers = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert "on-demand" in head["nodeSelector"].values()
    assert "spot" in workers["nodeSelector"].values()
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0
    volumes = {volume["name"]: volume["emptyDir"] for volume in workers["volumes"]}
    assert volumes["shm"]["medium"] == "Memory"
    mounted = {mount["name"]: mount["mountPath"] for mount in workers["containers"][0]["volumeMounts"]}
    assert mounted["shm"] == "/dev/shm"
    assert set(mounted) == set(volumes)
    for container in (*head["containers"], *workers["containers"]):
        assert container["envFrom"] == [{"secretRef": {"name": "allograft-storage"}}]
        assert not [item for item in container["env"] if re.search("KEY|SECRET|TOKEN|PASSWORD", item["name"])]


def test_the_job_runs_a_study_that_is_there_on_urls_and_may_be_tried_again() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["allograft", "run"]
    assert (ROOT / words[2]).exists()
    settings = dict(word.split("=", 1) for word in words[3:])
    assert settings["out"].startswith("s3://")
    assert settings["tracking"].startswith("http://")
    assert spec["backoffLimit"] >= 1


def test_the_image_is_that_of_compose() -> None:
    image = str(compose()["head"]["image"])
    named = re.findall(r"^\s*(?:- )?image: (\S+)", "".join((DEPLOY / name).read_text() for name in (*MANIFESTS, "aws.yaml")), re.MULTILINE)
    assert len(named) == 5
    assert {name.rpartition("/")[2].partition(":")[0] for name in named} == {image}


def bare(path: Path) -> list[tuple[int, str]]:
    """Lines of a file that are not comments alone, with their numbers."""
    lines = enumerate(path.read_text().splitlines())
    return [(i, line) for i, line in lines if not re.match(r"\s*#(?!SBATCH)", line)]


@pytest.mark.parametrize("path", [*(DEPLOY / name for name in (*MANIFESTS, "aws.yaml")), SBATCH], ids=lambda path: path.name)
def test_what_a_user_must_change_is_marked(path: Path) -> None:
    lines = path.read_text().splitlines()
    marked = {i for i, line in bare(path) if line.endswith(f"# {MARK}") or (i and lines[i - 1] == f"# {MARK}")}
    placeholders = {i for i, line in bare(path) if PLACEHOLDER.search(line)}
    assert placeholders
    assert [lines[i] for i in sorted(placeholders - marked)] == []
    assert len(marked) == sum(line.endswith(f"# {MARK}") for line in lines), "a mark that marks nothing"


def test_ray_up_takes_the_configuration() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(manifest("aws.yaml"))
    validate_config(config)
    types = config["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert any(option.startswith("--shm-size") for option in config["docker"]["run_options"])
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "docker": {**config["docker"], "shm_size": "16g"}})


def test_ec2_takes_the_nodes() -> None:
    import botocore.session
    from botocore.validate import validate_parameters

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in manifest("aws.yaml")["available_node_types"].values():
        validate_parameters({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A checkout with commands in the place of Slurm's and of the driver, on a path with a space."""
    home = tmp_path / "a checkout"
    commands = {
        "scontrol": "echo node1; echo node2",
        "srun": 'echo "$@" > srun.txt; [ -n "$STARTS" ] || exit 0; while [ "$1" != -- ]; do shift; done; shift; "$@"',
        "allograft": 'printf "%s\\n" "$RAY_ADDRESS" "$@" > allograft.txt; exit "$CODE"',
    }
    (home / ".venv/bin").mkdir(parents=True)
    for name, text in commands.items():
        path = home / ".venv/bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return home


def batch(home: Path, *words: str, starts: str = "1", code: int = 0, nodes: int = 2) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_SUBMIT_DIR": str(home), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(nodes)}
    environment = {**os.environ, **slurm, "SLURM_CPUS_ON_NODE": "8", "STARTS": starts, "CODE": str(code)}
    return subprocess.run(["bash", str(SBATCH), *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_ends_with_the_drivers_own_code(slurm: Path, code: int) -> None:
    done = batch(slurm, "my study.yaml", "out=/shared/a b", code=code)
    assert done.returncode == code, done.stderr
    assert (slurm / "allograft.txt").read_text().splitlines() == ["node1:20077", "run", "my study.yaml", "out=/shared/a b"]


def test_slurm_fails_when_ray_does_not_start_and_without_a_study(slurm: Path) -> None:
    silent = batch(slurm, "study.yaml", starts="")
    assert (silent.returncode, "Ray did not start" in silent.stderr) == (1, True)
    assert batch(slurm).returncode == 2


ALONE = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "bash", "-c"]  # `ray stop` sees no other processes there
ALLOWED = subprocess.run([*ALONE, "mount -t tmpfs none /mnt && ip link set lo up"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.skipif(not ALLOWED, reason="namespaces need privileges, and without one `ray stop` would end every Ray of this machine")
def test_slurm_starts_ray_for_real_on_one_node(slurm: Path) -> None:
    """In a namespace of its own; only Slurm's own commands are replaced, and the driver by one that counts the nodes that it joins."""
    inside = 'mkdir -p /tmp/ray; mount -t tmpfs none /tmp/ray; ip link set lo up; "$@"'
    commands = {
        "scontrol": "#!/bin/bash\necho 127.0.0.1",
        "srun": f'#!/bin/bash\nshift\n{shlex.join([*ALONE, inside, "srun"])} "$@"',
        "ray": f'#!/bin/bash\nexec {tool("ray")} "$@"',
        "allograft": f"#!{sys.executable}\nimport ray\nray.init(address='auto')\nprint('joined', len(ray.nodes()))\nraise SystemExit(2)",
    }
    for name, text in commands.items():
        (slurm / ".venv/bin" / name).write_text(text + "\n")
        (slurm / ".venv/bin" / name).chmod(0o755)
    done = batch(slurm, "study.yaml", nodes=1)
    assert "joined 1" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 2


def test_ray_has_the_command_that_slurm_calls(slurm: Path) -> None:
    import click
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    batch(slurm, "study.yaml")
    words = shlex.split((slurm / "srun.txt").read_text().partition(" -- ")[0])
    at = words.index("symmetric-run")
    options = curate_and_validate_ray_start_args(words[at + 1 :])
    assert options == ["--num-cpus", "8", "--disable-usage-stats"]
    context = start.make_context("start", ["--head", *options])
    assert isinstance(context, click.Context)


def test_slurms_directives_stand_before_the_first_command() -> None:
    lines = SBATCH.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives
    assert max(directives) < first
    assert "#SBATCH --exclusive" in lines
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0
    assert "set -euo pipefail" in lines


def recipe(title: str) -> str:
    """The first block of commands below a title of the guide."""
    found = re.search(rf"^## {re.escape(title)}\n.*?^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


@pytest.mark.timeout(600)
def test_wheels_are_fetched_by_hash_and_installed_without_an_index(tmp_path: Path) -> None:
    """The guide's own commands, with three packages of the lock: two wheels and the smaller of the two that come as source."""
    lock = (ROOT / "requirements.lock").read_text()
    entries = [re.search(rf"^{name}==(?:.*\\\n)*.*\n", lock, re.MULTILINE) for name in ("idna", "setuptools", "antlr4-python3-runtime")]
    few = "".join(entry.group() for entry in entries if entry)
    fetch, install = (part.replace("python3.11", sys.executable) for part in recipe("Without the internet").split("# on the cluster"))
    install = "\n".join(line for line in install.splitlines() if "--editable" not in line)

    def bash(commands: str, lock: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "requirements.lock").write_text(lock)
        return subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, capture_output=True, text=True)

    fetched = bash(fetch, few)
    assert fetched.returncode == 0, fetched.stderr[-1500:]
    refused = bash(install, re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", few))
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    done = bash(install, few)
    assert done.returncode == 0, done.stderr[-1500:]
    there = subprocess.run([str(tmp_path / ".venv/bin/python"), "-c", "import idna, antlr4"], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr


def authority(folder: Path) -> tuple[Path, Path, Path]:
    """The certificate of an authority of our own; certificate and key of `localhost`, signed by it."""
    ca, key, certificate, secret = (folder / name for name in ("ca.pem", "ca.key", "localhost.pem", "localhost.key"))
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*new, "-keyout", key, "-out", ca, "-subj", "/CN=hospital"], check=True, capture_output=True)
    signed: list[str | Path] = [*new, "-keyout", secret, "-out", certificate, *names, "-CA", ca, "-CAkey", key]
    subprocess.run(signed, check=True, capture_output=True)
    return ca, certificate, secret


def test_a_store_with_a_certificate_of_ones_own_buckets_in_the_path_and_encryption(tmp_path: Path) -> None:
    ca, certificate, key = authority(tmp_path)
    (port,) = free_ports(1)
    served = Services(tmp_path, {}, {})
    with open(tmp_path / "store.log", "wb") as log:
        command = [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port), "-c", str(certificate), "-k", str(key)]
        served.running["store"] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        served.wait("store", lambda: "Running on" in served.log("store"))
        (tmp_path / "config").write_text(recipe("An object store of your own"))
        variables = dict(re.findall(r"^export (\w+)='(.*)'$", GUIDE, re.MULTILINE))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"AWS_ENDPOINT_URL": f"https://localhost:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(tmp_path / "config")}
        code = (
            "import boto3; from base import storage; client = boto3.client('s3'); client.create_bucket(Bucket='allograft')\n"
            "storage.put('s3://allograft/a', 'x'); assert storage.create('s3://allograft/lock', 'x')\n"
            "print([client.head_object(Bucket='allograft', Key=key).get('ServerSideEncryption') for key in ('a', 'lock')])"
        )
        with_all = {**environment, **variables, "AWS_CA_BUNDLE": str(ca)}
        done, refused = (
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=each, capture_output=True, text=True)
            for each in (with_all, environment)
        )
        assert done.stdout.strip() == "['aws:kms', 'aws:kms']", done.stderr
        asked = re.findall(r'"(?:PUT|HEAD) (\S+)', served.log("store"))
        assert asked
        assert all(path.startswith("/allograft") for path in asked)
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
    finally:
        end(served.running["store"].pid)


def test_a_dashboard_with_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import ssl
    import threading

    from base.errors import RequestError
    from cluster.submit import connect

    ca, certificate, key = authority(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"https://localhost:{server.server_port}"
        with pytest.raises(RequestError, match=r"certificate is refused.*REQUESTS_CA_BUNDLE"):
            connect(address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca))
        with pytest.raises(RequestError, match="not Ray's dashboard"):  # the certificate is taken, and no Ray is behind it
            connect(address)
        server.shutdown()


def test_what_was_run_is_a_date_with_evidence_or_never() -> None:
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "tested.md").read_text().splitlines() if line.startswith("| ")]
    head, *rows = lines
    assert head[1:-1] == ["2-core CPU", "three namespaces", "one H100", "many GPUs with NCCL", "Kubernetes", "Slurm"]
    assert len({row[0] for row in rows}) == len(rows) > 20
    for row in rows:
        assert len(row) == len(head), row
        dates = [cell for cell in row[1:-1] if cell != "never run"]
        for cell in dates:
            assert date.fromisoformat(cell) >= date(2026, 11, 21)
        named = re.findall(r"`((?:tests|benchmarks)/\S+\.py)`", row[-1])
        assert all((ROOT / path).exists() for path in named), row
        assert named or not dates, row
