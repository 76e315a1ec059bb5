"""What a node fetches and decodes once, whoever asks at the same time: encoders and images."""

import http.server
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cell
import torch

from analysis.exposure import exposed_to
from base import storage
from base.errors import RequestError, WorkError
from cluster import cli
from cluster.single import finetune_study
from cluster.sources import external
from encoders.local import local_encoder
from encoders.weights import load_local, sha256_of
from finetune import data
from finetune.cell import CellConfig
from finetune.run import plant
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


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """How `allograft` ends."""
    monkeypatch.setattr(sys, "argv", ["allograft", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


OWN = ("--architecture", "test_resnet", "--seen", "padchest", "--labelled", "phantom-chest", "--licence", "ours")


def test_a_state_dict_of_plain_timm_becomes_the_source_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    network = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    torch.save(network.state_dict(), "model.pt")
    assert command(monkeypatch, "weights", "mine", "--file", "model.pt", *OWN, "--seen", "padchset", "--image-size", "32") == 0
    said = capsys.readouterr().out
    assert f"cells.sources: [{tmp_path}/mine]" in said
    assert "padchest, padchset: leakage is judged by these names" in said
    found = external("./mine", str(tmp_path / "out"), "")
    expected = sha256_of({name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")})
    shards = tiny_cell.corpora(tmp_path / "corpora")
    fields: dict[str, Any] = {"source": "mine", "source_kind": "weights", "encoder_dir": found.url, "encoder_sha256": found.sha256}
    transplant, sha256, _ = plant(tiny_cell.config(shards, tmp_path, **fields), 1)
    assert transplant.sha256 == sha256 == found.sha256 == expected
    assert found.labelled == ("phantom-chest",)
    assert exposed_to(found.data, "phantom-chest", "another packing") == ["phantom-chest"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("mine", "--file", "model.pt", "--architecture", "test_resnet", "--licence", "ours"), "which corpora have these weights seen?"),
        (("mine", "--file", "model.pt", "--architecture", "test_resnet", "--seen", "padchest"), "need --file FILE and --licence LICENCE"),
        (("mine", "--file", "model.pt", "--seen", "padchest"), "give their --architecture, too"),
        (("there", "--file", "model.pt", *OWN), "there: this is there already"),
        (("mine", "--file", "nothing.pt", *OWN), "nothing.pt: no such file"),
    ],
)
def test_ones_own_weights_are_refused_without_what_must_be_said_of_them(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    torch.save({}, "model.pt")
    assert command(monkeypatch, "weights", *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_places_that_hold_no_export_are_told_apart(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(
        RequestError, match=f"^{place}: no exported encoder here: there is no such file or folder .weights are .*: allograft"
    ):
        external(str(place), str(tmp_path), "")
    place.mkdir()
    with pytest.raises(RequestError, match=rf"^{place}: no exported encoder here \(no allograft.json\) .weights are .* --file FILE --arch"):
        external(str(place), str(tmp_path), "")
    file = place / "model.safetensors"
    file.touch()
    with pytest.raises(RequestError, match=rf"^{place}: no exported encoder .*: allograft weights NAME --file {file} --architecture"):
        external(str(place), str(tmp_path), "")
    with pytest.raises(RequestError, match=rf"^{file}: a file, not the folder .*: allograft weights NAME --file {file} --architecture"):
        external(str(file), str(tmp_path), "")


def test_a_file_or_folder_that_is_here_is_a_source_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    words = ["data.phantom-chest.raw=phantom:60"]
    with pytest.raises(RequestError, match=r"unknown source 'mine' \(the file or folder of that name is \./mine\)"):
        finetune_study("phantom-chest", [*words, "source=mine"])
    study = finetune_study("phantom-chest", [*words, "source=model.safetensors"])
    assert study.cells is not None
    assert study.cells.sources[0].source == f"{tmp_path}/model.safetensors"


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
