"""An exported encoder on this node, wherever its folder stands.

folder = local_encoder("s3://bucket/out/pretrain/x-1234/export", info.sha256)
"""

import os
from functools import partial
from pathlib import Path

from base import storage
from base.errors import WorkError
from base.paths import is_url
from encoders.export import read_export
from shards import cache


def local_encoder(url: str, sha256: str | None = None) -> str:
    """The encoder's folder: itself when it is local, else fetched once a node, into the cache, whoever asks at the same time.

    Args:
        sha256: of its tensors; by default what its description says.

    Raises:
        WorkError: it cannot be fetched, or is not what its description says, or not the encoder with these tensors.
    """
    if not is_url(url):
        return url
    sha256 = sha256 or str(storage.read_json(storage.join(url, "allograft.json"))["sha256"])
    folder = Path(cache.default_dir()) / "encoders" / sha256
    if not folder.is_dir():
        cache.make_once(folder, partial(_fetch, url, sha256), "encoders")
    os.utime(folder)  # the time of last use, by which the cache makes room
    return str(folder)


def _fetch(url: str, sha256: str, folder: Path) -> None:
    storage.get_dir(url, folder)
    if read_export(folder).sha256 != sha256:
        raise WorkError("the weights here are not those that were asked for", where=url)
