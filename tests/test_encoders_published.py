"""Published weights: read without running what is in their files, checked against their cards, converted into exports."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from base.errors import RequestError, WorkError
from base.paths import ROOT, names
from encoders import published
from encoders.export import read_export
from encoders.published import ZooCard, export_zoo, load_zoo
from encoders.weights import load_local, sha256_of

CARDS = {name: load_zoo(name) for name in names("weights")}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each card with an architecture of a few kilobytes, in its own layout of names."""
    monkeypatch.setattr(published, "load_zoo", lambda name: CARDS[name].model_copy(update={"architecture": "test_resnet"}))


def official(name: str, file: Path) -> torch.nn.Module:
    """A file in the layout of that publisher, with all that stands in it beside the encoder; returns the network."""
    torch.manual_seed(len(name))
    card, network = CARDS[name], timm.create_model("test_resnet", num_classes=7)
    tensors = {f"{card.prefix}{key}": value for key, value in network.state_dict().items()}
    if card.prefix == "module.encoder_q.":  # MoCo, PCL: the second encoder and the queue
        tensors |= {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in network.state_dict().items()}
        tensors |= {"module.queue": torch.randn(8, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    if card.prefix == "module.encoder.":  # PyContrast: heads beside the encoder
        tensors |= {"module.head.0.weight": torch.randn(4, 4), "module.head_jig.fc1.weight": torch.randn(4, 4)}
    if card.prefix == "module.":  # SwAV and kin
        tensors |= {"module.projection_head.0.weight": torch.randn(4, 4), "module.prototypes.weight": torch.randn(9, 4)}
    whole: Any = tensors
    if card.container == "model":
        whole = {"opt": argparse.Namespace(arch="resnet50", epochs=200), "model": tensors, "epoch": 200}
    elif card.container == "state_dict":
        whole = {"epoch": 200, "arch": "resnet50", "state_dict": tensors, "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]}}
    torch.save(whole, file)
    return network


@pytest.mark.parametrize("name", CARDS)
def test_every_publishers_layout_becomes_an_export(name: str, tmp_path: Path) -> None:
    network = official(name, tmp_path / "published.pth")
    sha256 = export_zoo(name, tmp_path / "out", revision="abc", file=tmp_path / "published.pth")
    info = read_export(tmp_path / "out")
    expected = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    assert sha256 == info.sha256 == sha256_of(load_local(tmp_path / "out")) == sha256_of(expected)
    assert info.licence == CARDS[name].licence
    assert [entry["dataset"] for entry in info.data] == ["imagenet-1k"]
    assert info.labelled_datasets == []
    assert (info.mean, info.std, info.in_chans) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3)
    assert len(info.lineage[0]["file_sha256"]) == 64


def test_the_eleven_of_the_benchmark_have_cards() -> None:
    assert set(CARDS) == {
        *("insdis", "moco-v1", "pcl-v1", "pirl", "pcl-v2", "moco-v2", "sela-v2", "infomin", "deepcluster-v2", "swav", "barlow-twins")
    }
    assert all(card.name == name and card.architecture == "resnet50" for name, card in CARDS.items())


def test_the_names_in_torchvisions_layout_are_timms() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet50().state_dict()
        ours = timm.create_model("resnet50", num_classes=0).state_dict()
    assert {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")} == {k: v.shape for k, v in ours.items()}


class Runs:
    """What a malicious file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(1)}, "extra": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(RequestError, match="more than tensors and plain values"):
        export_zoo("moco-v2", tmp_path / "out", revision="abc", file=tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:300])
    with pytest.raises(RequestError, match="or is damaged"):
        export_zoo("moco-v2", tmp_path / "out", revision="abc", file=tmp_path / "cut.pth")


def test_another_publishers_file_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    official("swav", tmp_path / "swav.pth")
    with pytest.raises(RequestError, match=r"no tensor at 'state_dict: module.encoder_q.': not the published file of moco-v2"):
        export_zoo("moco-v2", tmp_path / "out", revision="abc", file=tmp_path / "swav.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "few.pth")
    with pytest.raises(WorkError, match="are not in these weights"):
        export_zoo("barlow-twins", tmp_path / "out", revision="abc", file=tmp_path / "few.pth")
    whole = official("barlow-twins", tmp_path / "whole.pth").state_dict()
    del whole["bn1.running_mean"]
    torch.save(whole, tmp_path / "one.pth")
    with pytest.raises(WorkError, match=r"missing 1: bn1\.running_mean.*--allow-partial"):
        export_zoo("barlow-twins", tmp_path / "out", revision="abc", file=tmp_path / "one.pth")
    export_zoo("barlow-twins", tmp_path / "out", revision="abc", file=tmp_path / "one.pth", allow_partial=True)
    assert read_export(tmp_path / "out").lineage[0]["missing"] == ["bn1.running_mean"]
    with pytest.raises(RequestError, match="no such file"):
        export_zoo("swav", tmp_path / "out", revision="abc", file=tmp_path / "nothing.pth")


def test_a_hash_on_the_card_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official("swav", tmp_path / "swav.pth")
    card = CARDS["swav"].model_copy(update={"architecture": "test_resnet", "sha256": "0" * 64})
    monkeypatch.setattr(published, "load_zoo", lambda name: card)
    with pytest.raises(RequestError, match="not the published file of swav: its sha256 is"):
        export_zoo("swav", tmp_path / "out", revision="abc", file=tmp_path / "swav.pth")


def test_no_network_is_said_with_the_way_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = CARDS["swav"].model_copy(update={"url": "http://127.0.0.1:9/swav.pth"})
    monkeypatch.setattr(published, "load_zoo", lambda name: closed)
    with pytest.raises(WorkError, match=r"allograft weights swav --file FILE"):
        export_zoo("swav", tmp_path / "out", revision="abc")


def test_json_schema_is_committed() -> None:
    schema = json.dumps(ZooCard.model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / "weights.json").read_text() == schema
