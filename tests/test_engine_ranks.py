"""Two processes with different data against one with the whole batch: norms, losses, gradients, checkpoints of several ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from two_ranks import norm_case, two_ranks

from engine import norm


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    two_ranks("engine", folder)
    return folder


def tensors(pair: Path, rank: int, prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in load_file(pair / f"rank{rank}.safetensors").items() if key.startswith(prefix)}


def test_global_norm_equals_one_process_with_the_whole_batch(pair: Path) -> None:
    torch.set_num_threads(1)
    expected = norm_case(0, 1)
    found = load_file(pair / "rank0.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-5, msg=f"{key}: {{}}".format)
    for key in expected:
        if "running" in key or "tracked" in key:
            assert torch.equal(load_file(pair / "rank1.safetensors")[key], found[key])


def test_ranks_agree_on_buffers_and_keep_their_own_state(pair: Path) -> None:
    for rank in (0, 1):
        facts = json.loads((pair / f"rank{rank}.json").read_text())
        assert facts["equal"] == []
        assert facts["apart"] == ["running_mean"]
        assert facts["mine"] == rank


def test_no_chatter_no_kernel_build_no_mlflow(pair: Path) -> None:
    output = (pair / "output.txt").read_text()
    assert "FutureWarning" not in output
    assert "built" not in output
    assert "[INFO]" not in output
    assert "mlflow" not in json.loads((pair / "rank0.json").read_text())["modules"]


def test_convert_alone_is_torch_bit_for_bit_and_keeps_names() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    names = list(plain.state_dict())
    x = torch.randn(5, 1, 4, 4)
    import copy

    ours = norm.convert(copy.deepcopy(plain))
    assert isinstance(ours, nn.Sequential)
    assert isinstance(ours[1], norm.GlobalBatchNorm2d)
    assert isinstance(ours[4], norm.GlobalBatchNorm1d)
    assert torch.equal(plain(x), ours(x))
    assert list(ours.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
    assert torch.equal(plain.eval()(x), ours.eval()(x))


def test_convert_keeps_the_activation_of_timm_layers() -> None:
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(3)
    x = torch.randn(2, 3, 4, 4)
    expected = layer.eval()(x)
    assert torch.equal(norm.convert(layer)(x), expected)
