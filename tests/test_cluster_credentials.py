"""Keys that rotate while a process lives, against an S3 server that knows only the newest: the ways of docs/deploy.md, "Credentials"."""

import json
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import Services, end, free_ports, tool

from base import storage

LIFE_S = 2
ALL = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})


class Vault:
    """Who hands out keys: `rotate` makes new ones and revokes the old, and `program` prints them, with when they expire."""

    def __init__(self, folder: Path, address: str) -> None:
        import boto3

        self._keys, self.asked, self.program = folder / "keys.json", folder / "asked", folder / "program"
        expires = f"$(date --utc --date '+{LIFE_S} seconds' +%FT%TZ)"
        self.program.write_text(f'#!/bin/sh\necho >> {self.asked}\nsed "s/EXPIRES/{expires}/" {self._keys}\n')
        self.program.chmod(stat.S_IRWXU)
        given = {"endpoint_url": address, "region_name": "us-east-1"}
        root = boto3.client("iam", aws_access_key_id="root", aws_secret_access_key="root", **given)
        made = {}
        for user in ("admin", "nodes"):
            root.create_user(UserName=user)
            root.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=ALL)
            made[user] = root.create_access_key(UserName=user)["AccessKey"]
        admin = {"aws_access_key_id": made["admin"]["AccessKeyId"], "aws_secret_access_key": made["admin"]["SecretAccessKey"]}
        self._iam = boto3.client("iam", **admin, **given)
        boto3.client("s3", **admin, **given).create_bucket(Bucket="allograft")
        self.current: dict[str, Any] = made["nodes"]
        self._tell()
        asking = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(asking, timeout=30).close()  # from now on the server asks who one is

    def rotate(self) -> None:
        old, self.current = self.current, self._iam.create_access_key(UserName="nodes")["AccessKey"]
        self._iam.delete_access_key(UserName="nodes", AccessKeyId=old["AccessKeyId"])
        self._tell()

    def _tell(self) -> None:
        told = {name: self.current[name] for name in ("AccessKeyId", "SecretAccessKey")}
        self._keys.write_text(json.dumps({"Version": 1, "Expiration": "EXPIRES", **told}))


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    import s3fs

    (port,) = free_ports(1)
    served = Services(tmp_path, {}, {})
    with open(tmp_path / "store.log", "wb") as log:
        command = [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
        served.running["store"] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        served.wait("store", lambda: "Running on" in served.log("store"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        address = f"http://127.0.0.1:{port}"
        given = {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        given |= {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        found = Vault(tmp_path, address)
        (tmp_path / "config").write_text(f"[default]\ncredential_process = {found.program}\n")
        s3fs.S3FileSystem.clear_instance_cache()
        yield found
    finally:
        end(served.running["store"].pid)
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_program_is_asked_again_when_what_it_gave_expires(vault: Vault) -> None:
    import boto3

    artifacts = boto3.session.Session().client("s3")  # as MLflow's
    for n in range(2):
        storage.put(f"s3://allograft/{n}", str(n))
        artifacts.head_object(Bucket="allograft", Key=str(n))
        vault.rotate()
        time.sleep(LIFE_S)
        assert storage.listing("s3://allograft") == [str(i) for i in range(n + 1)]
        assert storage.read_bytes(f"s3://allograft/{n}") == str(n).encode()
        artifacts.head_object(Bucket="allograft", Key=str(n))
    assert len(vault.asked.read_text()) >= 4  # twice for each of the two clients at the least


def test_keys_in_variables_end_with_their_rotation(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", vault.current["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", vault.current["SecretAccessKey"])
    storage.put("s3://allograft/x", "x")
    vault.rotate()
    with pytest.raises(OSError, match="Access Key"):
        storage.read_bytes("s3://allograft/x")
    assert not vault.asked.exists()
