"""Weights: nothing is loaded in silence, nothing is unpickled."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from base.errors import RequestError, WorkError
from encoders.build import build
from encoders.weights import PREFIXES, adapt_input, load_into, load_local, read_checkpoint, sha256_of, tensors_of


def plain(seed: int, in_chans: int = 3) -> dict[str, torch.Tensor]:
    return dict(build("test_resnet", in_chans, seed=seed).net.state_dict())


def test_sha256_sees_names_shapes_types_and_bytes_but_not_layout_or_order() -> None:
    state = {"a": torch.arange(6.0).view(1, 2, 1, 3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": state["a"].to(memory_format=torch.channels_last)}
    assert sha256_of(state) == sha256_of(same)
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].view(1, 1, 2, 3), "b": state["b"]},
        {"a": state["a"], "b": torch.tensor(1, dtype=torch.int32)},
        {"a": state["a"] + 1e-6, "b": state["b"]},
    ]
    assert len({sha256_of(other) for other in [state, *others]}) == 5


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_known_prefixes_load_everything_and_say_so(prefix: str) -> None:
    net, state = build("test_resnet", 3, seed=0).net, plain(1)
    report = load_into(net, {prefix + name: tensor for name, tensor in state.items()} | {"module.fc.weight": torch.zeros(2)})
    assert report.prefix == prefix
    assert not report.missing
    assert report.unexpected == ("module.fc.weight",)
    assert sha256_of(net.state_dict()) == sha256_of(state)


def test_a_wrong_prefix_is_refused_with_the_table() -> None:
    net = build("test_resnet", 3, seed=0).net
    before = sha256_of(net.state_dict())
    with pytest.raises(WorkError, match=r"only 0% .*missing \d+: conv1"):
        load_into(net, {f"teacher.model.{name}": tensor for name, tensor in plain(1).items()})
    assert sha256_of(net.state_dict()) == before


def test_less_than_95_percent_is_refused_unless_asked_for() -> None:
    net, state = build("test_resnet", 3, seed=0).net, plain(1)
    half = {name: tensor for name, tensor in state.items() if not name.startswith("layer4")}
    with pytest.raises(WorkError, match="missing"):
        load_into(net, half)
    report = load_into(net, half, allow_partial=True)
    assert report.missing
    assert all(name.startswith("layer4") for name in report.missing)


def test_a_tensor_of_another_shape_is_missing_not_loaded() -> None:
    net, state = build("test_resnet", 3, seed=0).net, plain(1)
    state["layer1.0.conv1.weight"] = torch.zeros(1, 1, 3, 3)
    report = load_into(net, state)  # one of many: allowed, and reported
    assert report.missing == ("layer1.0.conv1.weight",)


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1)])
def test_adapted_input_gives_the_same_output_on_grey(have: int, want: int) -> None:
    before = build("test_resnet", have, seed=2).eval()
    after = build("test_resnet", want, seed=9).eval()
    report = load_into(after.net, before.net.state_dict())
    assert report.reshaped == ("conv1.0.weight",)
    grey = torch.randint(0, 256, (2, 1, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(after(grey.expand(-1, want, -1, -1)), before(grey.expand(-1, have, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="4 input channels"):
        adapt_input(torch.zeros(8, 4, 3, 3), 3)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(RequestError, match=r"no exported encoder.*allograft weights NAME --file"):
        load_local(tmp_path / "model.pth")
    with pytest.raises(RequestError, match="no weights here"):
        load_local(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(RequestError, match="not a safetensors file"):
        load_local(tmp_path)


class Runs:
    """What a malicious file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.pt", "no such file"),
        ("folder", "a folder, not a file of weights"),
        ("empty.pt", r"this file is empty \(weights are a \.safetensors file, or"),
        ("empty.safetensors", "this file is empty"),
        ("short.pt", "it is damaged, or not what torch.save writes"),
        ("text.pt", "it is damaged, or not what torch.save writes"),
        ("short.safetensors", "not a safetensors file, or one that was cut short"),
        ("code.pt", r"it holds more than tensors and plain values \(getattr\), which could run code: not read"),
        ("module.pt", r"it holds more than tensors and plain values \(torch\.nn\S+\), which could run code: not read"),
        ("plain.pkl", "it is damaged, or not what torch.save writes"),
    ],
)
def test_files_that_cannot_be_read_are_named_and_said_what_they_are(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty.pt").touch()
    Path("empty.safetensors").touch()
    Path("text.pt").write_text("no model")
    torch.save(plain(1), "whole.pt")
    save_file(plain(1), "whole.safetensors")
    for kind in ("pt", "safetensors"):
        Path(f"short.{kind}").write_bytes(Path(f"whole.{kind}").read_bytes()[:3000])
    torch.save({"a": Runs()}, "code.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    Path("plain.pkl").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(RequestError, match=f"^{name}: {says}") as found:
        read_checkpoint(name)
    assert "weights_only" not in str(found.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize("container", [None, "state_dict", "model", "state_dict_ema"])
def test_the_tensors_of_a_checkpoint_are_found(container: str | None) -> None:
    state = plain(1)
    held = {container: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3} if container else state
    assert sha256_of(tensors_of(held, "x.pt")) == sha256_of(state)
    with pytest.raises(RequestError, match=r"^x\.pt: it holds no tensors by name, but epoch, model"):
        tensors_of({"epoch": 3, "model": {"name": "resnet"}}, "x.pt")
