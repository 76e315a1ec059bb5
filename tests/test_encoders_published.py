"""Published weights: read without running what is in their files, checked against their cards, converted into exports."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from base.errors import RequestError, WorkError
from base.paths import ROOT, names
from encoders import published
from encoders.build import build
from encoders.export import read_export
from encoders.published import ZooCard, corpora_of_tag, export_own, export_timm, export_zoo, labelled_of_tag, load_zoo
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
    with pytest.raises(RequestError, match="it is damaged"):
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
    step = read_export(tmp_path / "out").lineage[0]
    assert step["missing"] == ["bn1.running_mean"]
    assert "loaded: " + step["loaded"] in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RequestError, match="no such file"):
        export_zoo("swav", tmp_path / "out", revision="abc", file=tmp_path / "nothing.pth")


TAG = "test_resnet.r160_in1k"


def test_weights_of_timm_lose_their_classifier_and_nothing_else(tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet", num_classes=1000)  # the layout that is published: with its classifier
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    export_timm(TAG, tmp_path / "out", revision="abc", file=str(tmp_path / "weights.pt"))
    info = read_export(tmp_path / "out")
    assert info.sha256 == sha256_of({name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("fc.")})
    assert (info.mean, info.image_size, info.licence) == ((0.5, 0.5, 0.5), 160, "apache-2.0")
    assert "missing" not in info.lineage[0]
    with pytest.raises(RequestError, match=r"did you mean 'test_resnet\.r160_in1k'"):
        export_timm("test_resnet.r160_in1", tmp_path / "out", revision="abc")


@pytest.mark.parametrize("architecture", ["densenet121", "convnext_tiny", "swin_tiny_patch4_window7_224", "test_vit", "resnet50_clip_gap"])
def test_the_filter_of_each_family_is_timms(architecture: str) -> None:
    """Against timm's own loading of the same file, which is of the layout that the filter is for where there is another than timm's."""
    from encoders.weights import timm_names

    torch.manual_seed(0)
    state = dict(timm.create_model(architecture).state_dict())
    if architecture == "densenet121":
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor for name, tensor in state.items()}
    if architecture == "test_vit":
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    theirs = timm.create_model(architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay={"state_dict": dict(state)})
    ours = build(architecture, 3, image_size=theirs.pretrained_cfg["input_size"][-1])
    assert published._fill(ours, timm_names(ours.net, state, "x"), "x", False) == {}
    assert sha256_of(ours.net.state_dict()) == sha256_of(theirs.state_dict())


def spoilt(kind: str) -> dict[str, torch.Tensor]:
    """Tensors of a file that is not what it is given as."""
    torch.manual_seed(1)
    state = dict(timm.create_model("test_resnet").state_dict())
    convolution = "layer3.0.conv1.weight"
    if kind == "other":
        return dict(timm.create_model("test_vit").state_dict())
    if kind == "renamed":
        return {f"foo.{name}" if i % 10 == 0 else name: tensor for i, (name, tensor) in enumerate(state.items())}
    if kind == "part":
        return {name: tensor for name, tensor in state.items() if not name.startswith("layer4")}
    if kind == "deeper":
        return state | {"layer4.1.conv1.weight": state["layer4.0.conv1.weight"]}
    if kind == "variance":
        return state | {"bn1.running_var": -state["bn1.running_var"]}
    if kind == "one":
        return {name: tensor for name, tensor in state.items() if name != convolution}
    return state | {convolution: torch.full_like(state[convolution], float(kind))}


@pytest.mark.parametrize("source", ["timm", "zoo", "own"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("other", r"tensors of test_resnet are not in these weights \(loaded 0; .*another architecture\?"),
        ("renamed", r"tensors of test_resnet are not in these weights .*missing \d+: conv1.*--allow-partial"),
        ("part", r"tensors of test_resnet are not in these weights .*missing \d+: layer4"),
        ("one", r"tensors of test_resnet are not in these weights .*missing 1: layer3\.0\.conv1\.weight"),
        ("nan", r"'layer3\.0\.conv1\.weight' has values that are NaN or infinite"),
        ("inf", r"'layer3\.0\.conv1\.weight' has values that are NaN or infinite"),
        ("variance", r"'bn1\.running_var' has values that are NaN or infinite, or a variance under 0"),
        ("deeper", r"1 tensors of these weights have no place in test_resnet: layer4\.1\.conv1\.weight .*deeper network"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_table(source: str, kind: str, says: str, tmp_path: Path) -> None:
    file, out = tmp_path / "weights.pt", tmp_path / "out"
    torch.save(spoilt(kind), file)

    def make(**options: Any) -> None:
        if source == "timm":
            export_timm(TAG, out, revision="abc", file=str(file), **options)
        elif source == "zoo":
            export_zoo("barlow-twins", out, revision="abc", file=file, **options)
        else:
            about: Any = {"seen": ["nih-cxr14"], "labelled": [], "licence": "ours", "revision": "abc"}
            export_own(file, out, architecture="test_resnet", **about, **options)

    with pytest.raises((RequestError, WorkError), match=f"^{file}: {says}"):
        make()
    assert not out.exists()
    if kind in ("other", "nan", "inf", "variance"):  # these are refused all the same
        with pytest.raises((RequestError, WorkError), match=says):
            make(allow_partial=True)
        return
    if kind == "deeper":
        make(allow_partial=True)
        return
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # what is missing is drawn by a seed of its own
        make(allow_partial=True)
        made.append(read_export(out))
    assert made[0].sha256 == made[1].sha256
    step = made[0].lineage[0]
    share, whole = (int(number) for number in step["loaded"].removesuffix(" tensors").split(" of "))
    assert whole - share == len(step["missing"]) > 0


@pytest.mark.parametrize("missing", [False, True])
def test_what_the_hub_sends_takes_the_same_path(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = spoilt("part") if missing else dict(timm.create_model("test_resnet").state_dict())
    save_file(state, tmp_path / "sent.safetensors")
    asked = []

    def sent(**what: Any) -> str:
        asked.append(what["repo_id"])
        return str(tmp_path / "sent.safetensors")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", sent)
    if missing:
        with pytest.raises(WorkError, match=rf"^timm:{TAG}: tensors of test_resnet are not in these weights .*layer4"):
            export_timm(TAG, tmp_path / "out", revision="abc")
    else:
        export_timm(TAG, tmp_path / "out", revision="abc")
        expected = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        assert read_export(tmp_path / "out").sha256 == sha256_of(expected)
    assert asked == [f"timm/{TAG}"]

    def closed(**what: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", closed)
    with pytest.raises(WorkError, match=rf"^timm:{TAG}: could not be fetched \(OSError: no route\) .*--file FILE"):
        export_timm(TAG, tmp_path / "out", revision="abc")


@pytest.mark.parametrize("channels", [1, 3])
def test_ones_own_weights_keep_their_tensors_and_channels(channels: int, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4, in_chans=channels)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}, "epoch": 9}, tmp_path / "x.pth")
    about: Any = {"seen": ["padchest"], "labelled": ["nih-cxr14"], "licence": "ours", "revision": "abc", "image_size": 96}
    export_own(tmp_path / "x.pth", tmp_path / "mine", architecture="test_resnet", normalisation="neutral", **about)
    info = read_export(tmp_path / "mine")
    assert info.sha256 == sha256_of({name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")})
    assert (info.name, info.in_chans, info.mean, info.std) == ("mine", channels, (0.5,) * channels, (0.25,) * channels)
    assert ([entry["dataset"] for entry in info.data], info.labelled_datasets) == (["padchest", "nih-cxr14"], ["nih-cxr14"])
    assert (info.licence, info.image_size, info.method) == ("ours", 96, "own")
    with pytest.raises(RequestError, match="did you mean 'neutral'"):
        export_own(tmp_path / "x.pth", tmp_path / "mine", architecture="test_resnet", normalisation="neutra", **about)


def test_positions_of_ones_own_weights_are_not_interpolated(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", img_size=96, num_classes=0).state_dict()
    torch.save(state, tmp_path / "x.pt")
    about: Any = {"architecture": "test_vit", "seen": ["padchest"], "labelled": [], "licence": "ours", "revision": "abc"}
    with pytest.raises(RequestError, match=r"its positions are not for images of 224 px \(--image-size 96\)"):
        export_own(tmp_path / "x.pt", tmp_path / "mine", **about)
    assert export_own(tmp_path / "x.pt", tmp_path / "mine", **about, image_size=96) == sha256_of(state)


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


@pytest.mark.parametrize(
    ("tag", "corpora", "labelled"),
    [
        ("a1_in1k", ["imagenet-1k"], ["imagenet-1k"]),
        ("augreg_in21k_ft_in1k", ["imagenet-1k", "imagenet-21k"], ["imagenet-1k", "imagenet-21k"]),
        ("fb_swsl_ig1b_ft_in1k", ["ig-1b", "imagenet-1k"], ["imagenet-1k"]),
        ("dino", ["imagenet-1k"], []),
        ("mae", ["imagenet-1k"], []),
        ("fcmae_ft_in1k", ["imagenet-1k"], ["imagenet-1k"]),
        ("in22k_ijepa", ["imagenet-21k"], []),
        ("lvd142m", ["imagenet-1k", "imagenet-21k", "lvd-142m"], []),
    ],
)
def test_what_timms_weights_have_seen_and_whose_labels(tag: str, corpora: list[str], labelled: list[str]) -> None:
    assert (corpora_of_tag(tag), labelled_of_tag(tag)) == (corpora, labelled)
