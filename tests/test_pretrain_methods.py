"""Every method: two ranks against one, a run that goes on from a checkpoint against an undisturbed one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain_run import metrics, resumed_at, tree
from tiny_corpus import write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import BATCH, LABELS, SAMPLES, TinyEncoder, batch, make_method, method_case, two_ranks

from encoders.build import build
from encoders.weights import load_local
from pretrain import methods
from pretrain.recipe import load_recipe

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> list[str]:
    """Names of the methods that this session tests: `-k moco` costs what those cost."""
    calls = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    return [name for name in methods.METHODS if any(params.get("name") == name for params in calls)]


@pytest.fixture(scope="module")
def pair(chosen: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "methods.json").write_text(json.dumps(chosen))
    two_ranks("methods", folder)
    return folder


@pytest.mark.parametrize("name", methods.METHODS)
def test_gradients_at_two_ranks_equal_one_rank_with_the_global_batch(pair: Path, name: str) -> None:
    torch.set_num_threads(1)
    expected, found = method_case(name, 0, 1), load_file(pair / f"{name}-rank0.safetensors")
    assert expected.keys() == found.keys()
    method, _ = make_method(name)
    trained = [f"{name}.{key}" for key, parameter in method.named_parameters() if parameter.requires_grad]
    whole = torch.cat([expected[key].flatten() for key in trained]).norm()
    assert whole > 0
    for key in trained:
        apart = (expected[key] - found[key]).norm()
        # Beside 1e-5 of its own size a few roundings of the whole: the sums behind a small part are of the size of the others.
        assert float(apart) <= 1e-5 * float(expected[key].norm()) + 4 * EPS * float(whole), key
    for key in set(expected) - set(trained):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=f"{key}: {{}}".format)
    other: dict[str, Tensor] = load_file(pair / f"{name}-rank1.safetensors")
    assert all(torch.equal(value, other[key]) for key, value in found.items())


def first_step(name: str, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a batch of 8 by an encoder without batch norm, which sees `chunk` images at once."""
    recipe, kind = load_recipe(f"{name}/smoke"), methods.method_class(name)
    sizes = tuple(recipe.views.sizes)
    encoder: Any = build("test_vit", 1, seed=0, image_size=sizes[0]) if kind.only == "vit" else TinyEncoder()
    if kind.only != "vit":
        encoder.net[1], encoder.net[4] = nn.GroupNorm(1, 8), nn.GroupNorm(1, 12)
    options = recipe.options | ({"prototypes": SAMPLES} if name.startswith("dino") else {})
    facts = methods.Facts(0, SAMPLES, BATCH, sizes, tuple("abc"[:LABELS]), (0.5,) * LABELS, (1.0,) * LABELS)
    method = methods.build(name, encoder, options, facts)
    for network in (method, *method.teachers.values()):
        network.train()
    method.on_epoch_start(lambda network: (torch.arange(SAMPLES), network(corpus_of(sizes[0])).detach().float()))
    method.chunk = chunk
    loss = method(batch(0, 1, sizes)).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def corpus_of(side: int) -> Tensor:
    return torch.randint(0, 256, (SAMPLES, 1, side, side), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_virtual_batch_gives_the_loss_and_gradient_of_the_whole(name: str) -> None:
    """Heads with batch norm see the whole batch, the teachers' too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole = first_step(name, None)
    torch.manual_seed(0)
    for expected, found in zip(whole, first_step(name, 3), strict=True):
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and GPU that wait for it. Reading values of a tensor on the GPU has none to read (FakeTensorMode).

    A mask on the GPU that picks rows, which torch counts there, counts as one row a row.
    """

    def __init__(self, pinned: Sequence[Tensor]) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet in (aten.index, aten.index_put, aten.index_put_):
            assert all(index is None or index.device == args[0].device for index in args[1]), "an index is copied, and waited for"
            args = (args[0], [place for index in args[1] for place in places(index)], *args[2:])
        out = func(*args, **kwargs)
        # label_loss picks its columns by lists of a few numbers, after the encoder.
        if packet is aten._to_copy and out.device != args[0].device and args[0].numel() > LABELS:
            assert kwargs.get("non_blocking"), "a copy that is waited for"
            assert any(args[0] is tensor for tensor in self.pinned), "a copy from memory that is not pinned"
        return out


def places(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(len(index), dtype=torch.int64) for _ in range(index.dim())]


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_step_reads_nothing_from_the_gpu_and_waits_for_no_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without values. Does not repeat masks drawn from ids that had been sent there: each step waited for the one before."""
    pinned: list[Tensor] = []

    def pin_memory(x: Tensor) -> Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    with torch.device("meta"):
        method, sizes = make_method(name)
    method.clock = methods.Clock(100, 200, 1)  # after any warm-up
    held = batch(0, 1, sizes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (method, *method.teachers.values()):
            network.to_empty(device="cuda")
        held.views = [torch.empty(view.shape, dtype=torch.uint8, device="cuda") for view in held.views]
        held.target_BL, held.mask_BL = torch.empty(2, *held.target_BL.shape, device="cuda")
        with NoWaiting(pinned):
            loss = method(held).loss
            method.on_step_end()
    assert loss.device.type == "cuda"


@pytest.fixture(scope="module")
def runs(chosen: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shards = write(folder / "shards")
    trees: list[dict[str, Any]] = []
    for name in chosen:
        settings = {"epochs": 4, "global_batch": 20, "max_steps": 8, "checkpoint_every_steps": 3, "log_every_steps": 1}
        one = tree(name, shards, name, **settings)
        one |= {"start_from": None, "start_from_sha256": None, "start_from_name": None}
        trees.append(one | ({"architecture": "test_vit"} if methods.method_class(name).only == "vit" else {}))
    (folder / "configs.json").write_text(json.dumps(trees))
    two_ranks("resumed", folder, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.METHODS)
def test_resumed_is_bit_identical(runs: Path, chosen: list[str], name: str) -> None:
    """From the checkpoint of step 6 of 8, in the second epoch; test_pretrain_run.py has runs that are asked to stop there."""
    whole, second = json.loads((runs / "rank0.json").read_text())[chosen.index(name)]
    assert (whole["encoder_sha256"], second["restarts"]) == (second["encoder_sha256"], 1)
    assert resumed_at(runs / f"cut-{name}") == [6]
    assert metrics(runs / f"whole-{name}") == metrics(runs / f"cut-{name}")
    assert [row["step"] for row in metrics(runs / f"cut-{name}")] == list(range(1, 9))
    for file in ("model", "optimizer", "ema", "rank0", "rank1"):
        place = Path("checkpoints") / "step-00000008" / f"{file}.safetensors"
        if file == "ema" and not make_method(name)[0].teachers:
            assert not (runs / f"whole-{name}" / place).exists()
            continue
        first, other = (load_local(runs / f"{kind}-{name}" / place) for kind in ("whole", "cut"))
        assert all(torch.equal(first[key], other[key]) for key in first), file
        assert first.keys() == other.keys()
