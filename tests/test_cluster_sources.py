"""What a node fetches and decodes once, whoever asks at the same time: encoders and images."""

import http.server
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cell

from base import storage
from base.errors import WorkError
from cluster.sources import external
from encoders.local import local_encoder
from encoders.weights import load_local, sha256_of
from finetune import data
from finetune.cell import CellConfig
from shards import cache, decoded

WORKERS = 3


def once_each(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, log: Path) -> None:
    """Every call of a function of this or a forked process leaves a line, and takes its time."""
    real = getattr(where, name)

    def slow(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(where, name, slow)


def together(work: Callable[[], Any]) -> list[Any]:
    """What several processes of this node find that begin at once."""
    fork = multiprocessing.get_context("fork")
    begin, results = fork.Barrier(WORKERS), fork.Queue()

    def worker() -> None:
        begin.wait()
        results.put(work())

    running = [fork.Process(target=worker) for _ in range(WORKERS)]
    for process in running:
        process.start()
    found = [results.get(timeout=60) for _ in running]
    for process in running:
        process.join()
    return found


def test_workers_of_a_node_fetch_an_encoder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOGRAFT_CACHE", str(tmp_path / "cache"))
    made, sha256 = tiny_cell.exported(tmp_path / "export")
    once_each(monkeypatch, storage, "get_dir", tmp_path / "log")
    url = f"file://{made}"
    assert together(lambda: sha256_of(load_local(local_encoder(url, sha256)))) == [sha256] * WORKERS
    assert (tmp_path / "log").read_text().splitlines() == ["get_dir"]
    assert local_encoder(url, sha256) == str(tmp_path / "cache" / "encoders" / sha256)
    assert local_encoder(str(made), sha256) == str(made)  # one that lies here is used where it lies


def test_an_encoder_that_is_not_what_was_exported_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOGRAFT_CACHE", str(tmp_path / "cache"))
    made, sha256 = tiny_cell.exported(tmp_path / "export")
    weights = made / "model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(WorkError, match="not those that were exported"):
        local_encoder(f"file://{made}", sha256)
    assert not [path for path in (tmp_path / "cache" / "encoders").iterdir() if path.is_dir()]


def test_an_encoder_is_not_kept_under_the_hash_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOGRAFT_CACHE", str(tmp_path / "cache"))
    made, sha256 = tiny_cell.exported(tmp_path / "export")
    with pytest.raises(WorkError, match="not those that were asked for"):
        local_encoder(f"file://{made}", "0" * 64)
    assert local_encoder(f"file://{made}").endswith(sha256)


def test_cells_of_a_node_decode_their_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards in a store: each is fetched once, each split decoded once, and every cell maps the same file."""
    shards = {name: f"file://{path}" for name, path in tiny_cell.corpora(tmp_path / "corpora").items()}
    config: CellConfig = tiny_cell.config(shards, tmp_path)
    once_each(monkeypatch, decoded, "_write", tmp_path / "log")
    once_each(monkeypatch, cache, "_fetch", tmp_path / "log")

    def load() -> int:
        arrays = data.load(config.shards, config.manifest_digest, "train", 32, config.task, config.cache_dir)
        return int(arrays.image.sum())

    found = together(load)
    assert len(set(found)) == 1
    assert found[0] > 0
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["_fetch", "_fetch", "_write"]  # the shard's tar and its index
    corpus = data.describe(config.shards, config.manifest_digest, config.cache_dir)
    assert isinstance(decoded.decode_all(corpus, 32).images, np.memmap)


class Broken(http.server.BaseHTTPRequestHandler):
    """Says that it is a tracking server, and then fails."""

    def do_GET(self) -> None:
        found = "experiments/search" in self.path
        self.send_response(200 if found else 500)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("answers", [False, True])
def test_a_registry_that_does_not_answer_fails_its_source_and_not_the_study(tmp_path: Path, answers: bool) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port if answers else 9}"
        try:
            with pytest.raises(WorkError, match=r"^models:/demo@champion: MLflow could not be read: "):
                external("models:/demo@champion", str(tmp_path), uri)
        finally:
            server.shutdown()
