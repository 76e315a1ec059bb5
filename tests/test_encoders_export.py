"""The export is what consumers get: plain timm must reproduce the golden features without anything of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from base.errors import RequestError, WorkError
from encoders.build import Encoder, build
from encoders.export import export, read_export
from encoders.published import export_timm
from encoders.truncate import truncate
from encoders.weights import load_local, sha256_of

# What a consumer does; one process for several exports, since its imports take seconds.
CONSUMER = """
import json, sys, timm, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
ours = ("base", "shards", "encoders", "engine", "analysis", "finetune", "pretrain", "cluster")
for place in sys.argv[1:]:
    golden = load_file(place + "/golden.safetensors")
    encoder = timm.create_model("local-dir:" + place, pretrained=True).eval()
    difference = (encoder(golden["preprocessed"]) - golden["features"]).abs().max().item()
    cfg = encoder.pretrained_cfg
    mine = (golden["pixels"].float() / 255 - torch.tensor(cfg["mean"]).view(1, -1, 1, 1)) / torch.tensor(cfg["std"]).view(1, -1, 1, 1)
    preprocessing = (mine - golden["preprocessed"]).abs().max().item()
    classes = timm.create_model("local-dir:" + place, pretrained=True, num_classes=5).eval()(golden["preprocessed"]).shape[1]
    print(json.dumps([difference, preprocessing, [name for name in sys.modules if name.split(".")[0] in ours], classes]))
"""


def seen_by(program: str, names: list[str], folder: Path) -> dict[str, list[Any]]:
    """What that program prints of the export `folder/NAME`, by name."""
    places = [str(folder / name) for name in names]
    # -I: no environment, no current directory, no user site; a checkout that is installed editable is shut out by the check of modules.
    out = subprocess.run([sys.executable, "-I", "-c", program, *places], cwd=folder, capture_output=True, text=True, check=True)
    return dict(zip(names, map(json.loads, out.stdout.splitlines()), strict=True))


def asked_for(request: pytest.FixtureRequest, among: list[str], parameter: str) -> list[str]:
    """Those that this session tests: `-k swin` costs what swin costs."""
    calls = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    return [name for name in among if any(params.get(parameter) == name for params in calls)]


def trained(in_chans: int) -> Encoder:
    """An encoder whose batch-norm statistics have moved, in the memory layout of training."""
    encoder = build("test_resnet", in_chans, seed=1).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    with torch.no_grad():
        encoder(torch.randint(0, 256, (8, in_chans, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    return encoder


def write(encoder: Encoder, place: Path) -> str:
    return export(
        encoder,
        place,
        name="simclr",
        method="simclr",
        lineage=[
            {"name": "simclr", "method": "simclr", "labelled": []},
            {"name": "sup", "method": "supervised", "labelled": ["nih-cxr14"]},
        ],
        data=[{"dataset": "phantom-chest", "digest": "0" * 64, "licence": "CC0"}],
        revision="abc1234",
        image_size=48 if encoder.smallest <= 48 and 48 % encoder.patch == 0 else 64,
    )


def test_the_export_holds_the_encoder_and_says_where_it_comes_from(tmp_path: Path) -> None:
    encoder = trained(1)
    sha256 = write(encoder, tmp_path)
    state = load_local(tmp_path)
    assert sha256 == sha256_of(state) == sha256_of(encoder.net.state_dict())
    assert state["bn1.running_mean"].abs().max() > 0  # batch-norm statistics are part of it
    assert not any(name.startswith(("net.", "module.", "fc.")) for name in state)
    info = read_export(tmp_path)
    assert (info.sha256, info.architecture, info.in_chans, info.image_size) == (sha256, "test_resnet", 1, 48)
    assert info.labelled_datasets == ["nih-cxr14"]
    config = json.loads((tmp_path / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (cfg["tag"], cfg["license"], cfg["num_classes"], cfg["input_size"]) == ("allograft_simclr", "CC0", 0, [1, 48, 48])
    assert "in1k" not in json.dumps(config)  # nothing of the architecture's published weights
    assert load_file(str(tmp_path / "golden.safetensors"))["pixels"].dtype == torch.uint8
    card = (tmp_path / "README.md").read_text()
    assert all(word in card for word in ("simclr", "nih-cxr14", sha256, "golden.safetensors", "CC0"))


PROGRAM = """
import json, sys, numpy, onnxruntime
from safetensors.numpy import load_file
for place in sys.argv[1:]:
    golden = load_file(place + "/golden.safetensors")
    encoder = onnxruntime.InferenceSession(place + "/encoder.onnx")
    run = lambda images: encoder.run(None, {"preprocessed": images})[0]
    apart = lambda features: float(abs(features - golden["features"]).max() / abs(golden["features"]).max())
    twice = run(numpy.concatenate([golden["preprocessed"], golden["preprocessed"] * 0.5]))
    ours = [name for name in ("torch", "timm", "base", "encoders") if name in sys.modules]
    print(json.dumps([apart(run(golden["preprocessed"])), apart(twice[:1]), twice.shape[0], ours]))
"""


SLIM = (32, 48, 24, 16)


def made(kind: str) -> Encoder:
    if kind == "slim":
        return build("test_resnet", 1, seed=1, widths=SLIM)
    if kind == "cbr":
        return build("cbr_tiny", 3, seed=1)
    if kind == "flat":
        return truncate(build("test_resnet", 1, seed=1), "layer2", flat=48)
    if kind == "alexnet":
        return build("alexnet", 1, seed=1)
    architecture, cut = kind.split(" ")
    return truncate(build(architecture, 1, seed=1, image_size=48 if architecture == "test_vit" else None), cut)


PROGRAMS = ["cbr", "alexnet", "flat", "test_resnet layer3", "test_vit stem", "test_vit block3", "densenet121 denseblock1.denselayer3"]
PROGRAMS += ["alexnet conv2", "resnet50_clip_gap stages.0", "resnetv2_50x1_bit stages.0"]


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The exports of `PROGRAMS` in their folder, and what a consumer sees of each."""
    folder, kinds = tmp_path_factory.mktemp("programs"), asked_for(request, PROGRAMS, "kind")
    for kind in kinds:
        write(made(kind), folder / kind)
    return folder, seen_by(PROGRAM, kinds, folder)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_timm_cannot_rebuild_is_a_program_with_the_same_golden_check(
    programs: tuple[Path, dict[str, list[Any]]], kind: str, tmp_path: Path
) -> None:
    place, encoder = programs[0] / kind, made(kind)
    alone, pair, count, ours = programs[1][kind]
    assert alone < 1e-5
    assert pair < 1e-5
    assert count == 2
    assert ours == []
    assert not (place / "config.json").exists()  # which would promise that timm makes it
    info = read_export(place)
    assert info.sha256 == sha256_of(encoder.net.state_dict())
    assert info.cut == getattr(encoder, "cut", None)
    program = (place / "encoder.onnx").read_bytes()
    assert b"/work" not in program
    assert str(Path.home()).encode() not in program
    assert b".py" not in program
    assert write(encoder, tmp_path) == info.sha256
    assert (tmp_path / "encoder.onnx").read_bytes() == program
    card = (tmp_path / "README.md").read_text()
    assert "onnxruntime" in card
    assert "timm.create_model" not in card
    assert kind in ("cbr", "alexnet") or f"up to its cut `{info.cut}`" in card


def test_the_cards_own_check_of_a_program_runs(tmp_path: Path) -> None:
    write(made("test_resnet layer1"), tmp_path)
    check = (tmp_path / "README.md").read_text().split("```python")[2].split("```")[0].replace("PATH", str(tmp_path))
    out = subprocess.run([sys.executable, "-I", "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1e-4


FAMILIES = ["slim", "swin_tiny_patch4_window7_224", "densenet121", "efficientnet_b0", "convnext_tiny"]
FAMILIES += ["resnet50_clip_gap", "resnetv2_50x1_bit"]
TRAINED = ["1", "3"]  # channels


@pytest.fixture(scope="module")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """Exports that timm rebuilds in their folder, and what a consumer sees of each."""
    folder, names = tmp_path_factory.mktemp("exports"), asked_for(request, TRAINED + FAMILIES, "name")
    for name in names:
        write(trained(int(name)) if name in TRAINED else made("slim") if name == "slim" else build(name, 1, seed=1), folder / name)
    return folder, seen_by(CONSUMER, names, folder)


@pytest.mark.parametrize("name", TRAINED)
def test_plain_timm_reproduces_the_golden_features_to_the_bit(exports: tuple[Path, dict[str, list[Any]]], name: str) -> None:
    difference, preprocessing, ours, classes = exports[1][name]
    assert difference == 0.0
    assert preprocessing < 1e-6
    assert ours == []
    assert classes == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_slim_networks_and_the_other_families_are_timms(exports: tuple[Path, dict[str, list[Any]]], name: str) -> None:
    assert exports[1][name][0] == 0.0
    assert read_export(exports[0] / name).widths == (SLIM if name == "slim" else None)
    assert not (exports[0] / name / "encoder.onnx").exists()


def test_same_encoder_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(trained(1), tmp_path / name)
    for file in ("config.json", "model.safetensors", "golden.safetensors", "README.md", "allograft.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_changed_weights_and_missing_exports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no exported encoder"):
        read_export(tmp_path)
    write(trained(1), tmp_path / "a")
    write(build("test_resnet", 1, seed=7), tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(WorkError, match="not those that were exported"):
        read_export(tmp_path / "a")


def test_published_weights_become_an_export(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    whole = timm.create_model("test_resnet", num_classes=1000)
    save_file(whole.state_dict(), str(tmp_path / "weights.safetensors"))
    sha256 = export_timm("test_resnet.r160_in1k", tmp_path / "out", revision="abc", file=str(tmp_path / "weights.safetensors"))
    info = read_export(tmp_path / "out")
    assert (info.sha256, info.method, info.mean, info.in_chans) == (sha256, "timm", (0.5, 0.5, 0.5), 3)
