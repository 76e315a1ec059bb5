"""Every strategy: what it copies, what trains, what stays; bare and inside DeepSpeed's wrapper. Rows T1 to T14 of the reference's table."""

import functools
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from base.errors import RequestError, WorkError
from base.paths import ROOT
from encoders.build import build
from encoders.cuts import cuts, find
from encoders.truncate import truncate
from encoders.weights import sha256_of
from engine import ranks
from finetune import efficiency
from finetune.efficiency import cost
from finetune.strategies import STRATEGIES, get, resolve
from finetune.strategies.gabor import bank
from finetune.strategies.knn import KnnHead
from finetune.strategies.lora import merge
from finetune.strategies.slim import slimmed
from finetune.task import Task, load_task
from finetune.transplant import EncoderSpec, Transplant, places, verify

CHEST, LUNGS = load_task("phantom-chest"), load_task("lxs")
TASKS = pytest.mark.parametrize("task", [CHEST, LUNGS], ids=["labels", "masks"])
SIDE, RATE = 32, 0.01
SMALL = {"resnet": "test_resnet", "vit": "test_vit", "cbr": "cbr_tiny"}

# Every strategy with each of its options, on the architecture where it is cheapest.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("resnet", {}),
    "linear": ("resnet", {}),
    "linear-aug": ("resnet", {}),
    "transfusion": ("resnet", {"cut": "layer2"}),
    "transfusion vit": ("vit", {"cut": "block2"}),
    "mean-var": ("resnet", {}),
    "mean-var copy": ("resnet", {"batch_norm": "copy"}),
    "mean-var meanvar": ("resnet", {"batch_norm": "meanvar"}),
    "mean-var subset": ("resnet", {"subset": ["layer1", "layer4"], "after": "stem"}),
    "mean-var vit": ("vit", {"after": "block2", "batch_norm": "meanvar"}),
    "slim": ("resnet", {"cut": "layer2"}),
    "slim cbr": ("cbr", {"cut": "conv2", "factor": 4}),
    "gabor": ("cbr", {}),
    "lwft": ("resnet", {"cut": "layer2"}),
    "lwft nothing": ("resnet", {"cut": None, "base_lr_div": 5.0}),
    "lwft vit": ("vit", {"cut": "block4"}),
    "truncated": ("resnet", {"cut": "layer2"}),
    "truncated flat": ("resnet", {"cut": "layer2", "head": "flat"}),
    "truncated vit": ("vit", {"cut": "block3"}),
    "fat": ("resnet", {"cut": "layer3"}),
    "fat flat": ("cbr", {"cut": "conv3", "head": "flat"}),
    "lp-ft": ("resnet", {}),
    "gradual": ("resnet", {"stages": 3}),
    "layer-decay": ("vit", {"decay": 0.5}),
    "l2-sp": ("resnet", {}),
    "lora": ("vit", {"rank": 2}),
    "knn": ("resnet", {"k": 3}),
}
FROZEN = {"linear", "linear-aug", "fat", "knn"}
ONLY_LABELS = {"truncated flat", "fat flat", "knn"}
EVERY = [(case, task) for case in CASES for task in (CHEST, LUNGS) if task is CHEST or case not in ONLY_LABELS]
TRAINED = [case for case in CASES if case != "knn"]


def over(pairs: list[tuple[str, Task]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "task"), pairs, ids=[f"{case}-{task.kind}" for case, task in pairs])


def source_of(architecture: str, seed: int = 77) -> dict[str, Tensor]:
    """Weights of a network that has trained: no tensor is as any initialisation leaves it."""
    return {name: tensor.clone() for name, tensor in _trained(architecture, seed).items()}


@functools.cache
def _trained(architecture: str, seed: int) -> dict[str, Tensor]:
    state = build(architecture, 1, seed=seed, image_size=SIDE).net.state_dict()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(5)
        else:
            tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=draw)).add_(0.02 * torch.rand(tensor.shape, generator=draw))
    return state


def plant(
    architecture: str,
    strategy: Mapping[str, Any] | str,
    task: Task = CHEST,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    **spec: Any,
) -> tuple[Transplant, dict[str, Tensor]]:
    make, options = resolve(strategy)
    state = dict(source_of(architecture) if weights is None else weights)
    whole = EncoderSpec(**{"architecture": architecture, "in_chans": 1, "image_size": SIDE, "resolution": SIDE, **spec})
    return make.transplant(whole, state, task, options, seed), state


def planted(case: str, task: Task, seed: int = 0) -> tuple[Transplant, dict[str, Tensor]]:
    small, options = CASES[case]
    return plant(SMALL[small], {"name": case.partition(" ")[0], **options}, task, seed)


def data(task: Task) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, 1, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    shape = (4, SIDE, SIDE) if task is LUNGS else (4, 3)
    return x, torch.randint(0, 2, shape, generator=draw).float()


def settings_of(transplant: Transplant) -> list[dict[str, Any]]:
    return [{"params": group.params, "lr": RATE * group.lr_scale} for group in transplant.groups]


def wrap(transplant: Transplant, optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> Any:
    ranks.start()
    engine, *_ = ranks.import_deepspeed().initialize(
        model=transplant.module,
        optimizer=optimizer(settings_of(transplant)),  # type: ignore[call-arg]
        config={"train_micro_batch_size_per_gpu": 4, "steps_per_print": None, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0},
        dist_init_required=False,
    )
    return engine


def train(
    transplant: Transplant, task: Task, wrapped: bool = False, count: int = 3, kind: type[torch.optim.Optimizer] = torch.optim.Adam
) -> torch.optim.Optimizer:
    """Steps, by Adam unless said: every tensor with a gradient moves by about its rate. Returns the optimiser."""
    x, target = data(task)
    loss_of = nn.BCEWithLogitsLoss()
    if wrapped:
        engine = wrap(transplant, kind)
        engine.train()
        for _ in range(count):
            engine.backward(loss_of(engine(x), target))
            engine.step()
        inside: torch.optim.Optimizer = engine.optimizer
        return inside
    optimizer = kind(settings_of(transplant))  # type: ignore[call-arg]
    transplant.module.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(transplant.module(x), target).backward()
        optimizer.step()
    return optimizer


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- all of them


def test_every_strategy_is_among_the_cases() -> None:
    assert {case.partition(" ")[0] for case in CASES} == set(STRATEGIES)


@pytest.mark.parametrize("case", CASES)
def test_a_transplant_is_a_function_of_its_seed(case: str) -> None:
    before = torch.get_rng_state()
    a, b, other = (planted(case, CHEST, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert sha256_of(a.module.state_dict()) == sha256_of(b.module.state_dict())
    assert a.sha256 == b.sha256
    if case != "knn":
        assert sha256_of(a.module.head.state_dict()) != sha256_of(other.module.head.state_dict())


@over(EVERY)
def test_groups_hold_each_trained_parameter_once_and_no_frozen_one(case: str, task: Task) -> None:
    transplant, _ = planted(case, task)
    grouped = [parameter for group in transplant.groups for parameter in group.params]
    trained = [parameter for parameter in transplant.module.parameters() if parameter.requires_grad]
    assert len({id(parameter) for parameter in grouped}) == len(grouped)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trained}
    assert all(group.params for group in transplant.groups)
    assert len({group.name for group in transplant.groups}) == len(transplant.groups)
    decays = [group.decay and parameter.ndim > 1 for group in transplant.groups for parameter in group.params]
    assert decays == [group.decay for group in transplant.groups for _ in group.params]
    assert all(0 < group.lr_scale <= 1 and 0 <= group.start < 1 for group in transplant.groups)
    heads = {id(parameter) for parameter in transplant.module.head.parameters()}
    assert all(group.lr_scale == 1 and not group.start for group in transplant.groups if id(group.params[0]) in heads)


@over(EVERY)
def test_what_is_said_to_be_the_sources_is_before_the_first_step_and_nothing_else_is(case: str, task: Task) -> None:
    transplant, weights = planted(case, task)
    verify(transplant, weights)
    state = transplant.module.encoder.net.state_dict()
    told = set() if transplant.loaded is None else set(transplant.loaded.loaded)
    same = {name for name, tensor in state.items() if name in weights and torch.equal(tensor, weights[name])}
    assert same == told
    name = case.partition(" ")[0]
    assert transplant.module.frozen == (name in FROZEN)
    assert (transplant.views == "evaluation") == (name in FROZEN - {"linear-aug"})
    assert transplant.probe == (name == "lp-ft")
    assert (transplant.penalty is not None) == (name == "l2-sp")
    assert any(group.start for group in transplant.groups) == (name == "gradual")
    if not case.startswith("lora"):
        assert transplant.sha256 == sha256_of(state)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "DeepSpeed"])
@over([pair for pair in EVERY if pair[0] in TRAINED])
def test_what_is_frozen_stays_to_the_bit_and_what_trains_moves(case: str, task: Task, wrapped: bool) -> None:
    transplant, _ = planted(case, task)
    trains = {name for name, parameter in transplant.module.named_parameters() if parameter.requires_grad}
    of_modules = {name.rpartition(".")[0] for name in trains}
    unread = ("encoder.net.norm.",) if task is LUNGS else ()  # decoders get a vision transformer's maps before its closing norm
    before = snapshot(transplant.module)
    asked = [group["lr"] for group in settings_of(transplant)]
    optimizer = train(transplant, task, wrapped)
    after = transplant.module.state_dict()
    assert [group["lr"] for group in optimizer.param_groups] == asked
    parameters = dict(transplant.module.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == trains
    assert all(parameters[name].grad is None for name in parameters.keys() - trains)
    for name, tensor in before.items():
        if "running" in name or "tracked" in name:  # a norm's statistics go as its weights do
            assert torch.equal(tensor, after[name]) == (name.rpartition(".")[0] not in of_modules), name
        elif ".norms." not in name:
            assert torch.equal(tensor, after[name]) == (name not in trains or name.startswith(unread)), name


@pytest.mark.parametrize("case", TRAINED)
def test_bare_and_wrapped_steps_are_the_same(case: str) -> None:
    (bare, _), (inside, _) = planted(case, CHEST), planted(case, CHEST)
    train(bare, CHEST, count=2, kind=torch.optim.SGD)
    train(inside, CHEST, wrapped=True, count=2, kind=torch.optim.SGD)
    for (name, ours), theirs in zip(bare.module.state_dict().items(), inside.module.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# One of each family: a cut in its middle. Those above are not repeated.
FAMILIES = {
    "resnet18": "layer2.0",
    "densenet121": "denseblock2.denselayer3",
    "convnext_tiny": "stages.1",
    "swin_tiny_patch4_window7_224": "layers.1",
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("strategy", "task"), [("transfusion", CHEST), ("truncated", LUNGS)], ids=["transfusion", "truncated"])
def test_every_family_trains_a_step_from_a_cut(architecture: str, strategy: str, task: Task) -> None:
    transplant, weights = plant(architecture, {"name": strategy, "cut": FAMILIES[architecture]}, task)
    verify(transplant, weights)
    before = snapshot(transplant.module)
    at, last = places(transplant.module.encoder), find(architecture, FAMILIES[architecture])
    train(transplant, task, count=1)
    after = transplant.module.state_dict()
    held = {name for name in at if torch.equal(before[f"encoder.net.{name}"], after[f"encoder.net.{name}"])}
    assert not {name for name in held if at[name] <= last}


# -- T1 to T4: source, full, frozen, transfusion


def test_two_seeds_of_random_differ_and_differ_from_the_source() -> None:
    spec = EncoderSpec(architecture="test_resnet", in_chans=1)
    make, options = resolve("full")
    shas = [make.transplant(spec, None, CHEST, options, seed).sha256 for seed in (0, 0, 1)]
    assert shas[0] == shas[1] != shas[2]
    assert sha256_of(source_of("test_resnet")) not in shas


@pytest.mark.parametrize("cut", [cut.name for cut in cuts("test_resnet")])
def test_transfusion_copies_up_to_the_cut_and_draws_the_rest_from_the_seed_alone(cut: str) -> None:
    transplant, weights = plant("test_resnet", {"name": "transfusion", "cut": cut}, seed=5)
    elsewhere, _ = plant("test_resnet", {"name": "transfusion", "cut": cut}, seed=5, weights=source_of("test_resnet", seed=1))
    at, last = places(transplant.module.encoder), find("test_resnet", cut)
    state, other = (found.module.encoder.net.state_dict() for found in (transplant, elsewhere))
    for name, tensor in state.items():
        assert torch.equal(tensor, weights[name]) == (at[name] <= last), name
        if at[name] > last:
            assert torch.equal(tensor, other[name]), name
    assert all(parameter.requires_grad for parameter in transplant.module.parameters())


def test_what_transfusion_draws_is_nothing_that_source_random_has() -> None:
    weights = dict(build("test_resnet", 1, seed=5).net.state_dict())  # the same number as the strategy's seed
    transplant, _ = plant("test_resnet", {"name": "transfusion", "cut": "layer2"}, seed=5, weights=weights)
    state = transplant.module.encoder.net.state_dict()
    assert not [name for name, t in state.items() if name.startswith(("layer3", "layer4")) and t.ndim > 1 and torch.equal(t, weights[name])]


# -- T5, T6: mean-var


def test_mean_var_keeps_mean_and_variance_and_nothing_of_the_order() -> None:
    transplant, weights = plant("test_resnet", "mean-var")
    state = transplant.module.encoder.net.state_dict()
    for name, tensor in state.items():
        if tensor.ndim < 2:
            continue
        theirs, ours, n = weights[name].double().flatten(), tensor.double().flatten(), tensor.numel()
        spread = float(theirs.std(correction=0))
        assert abs(float(ours.mean() - theirs.mean())) < 4 * spread / math.sqrt(n), name
        assert abs(float(ours.std(correction=0)) / spread - 1) < 4 / math.sqrt(2 * n), name
        assert abs(float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])) < 4 / math.sqrt(n), name


def test_does_not_repeat_running_variances_that_are_drawn() -> None:
    """A re-implementation draws every tensor of the state dict, running variances too: below 0 they make NaN of everything."""
    weights = source_of("test_resnet")
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = torch.rand(weights[name].shape).pow(8) * 100 + 1e-3  # half of what N(mean, variance) of this gives is below 0
    fresh = build("test_resnet", 1).net.state_dict()
    for how in ("default", "copy", "meanvar"):
        transplant, _ = plant("test_resnet", {"name": "mean-var", "batch_norm": how}, weights=weights)
        state = transplant.module.encoder.net.state_dict()
        for name in (name for name in state if "running" in name):
            assert torch.equal(state[name], (weights if how == "copy" else fresh)[name])
        affine = {name for name in state if "bn" in name and name.endswith(("weight", "bias"))}
        drawn = {name for name in affine if not torch.equal(state[name], weights[name]) and not torch.equal(state[name], fresh[name])}
        assert drawn == (affine if how == "meanvar" else set())
        assert transplant.module.eval()(data(CHEST)[0]).isfinite().all()


def test_a_subset_does_not_shift_what_is_drawn_for_the_others() -> None:
    everywhere, _ = plant("test_resnet", "mean-var", seed=3)
    some, weights = plant("test_resnet", {"name": "mean-var", "subset": ["layer2", "layer4"], "after": "stem"}, seed=3)
    rest, _ = plant("test_resnet", {"name": "transfusion", "cut": "stem"}, seed=3)
    a, b, c = (found.module.encoder.net.state_dict() for found in (everywhere, some, rest))
    for name in (name for name in b if b[name].ndim > 1):
        expected = weights if name.startswith("conv1") else a if name.startswith(("layer2", "layer4")) else c
        assert torch.equal(b[name], expected[name]), name
    with pytest.raises(RequestError, match="no cut 'layer9'"):
        plant("test_resnet", {"name": "mean-var", "subset": ["layer9"]})


# -- T7, T8: slim


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("cut", "expected"), [("layer3", 12_945_472), ("layer2", 7_135_296), ("layer1", 6_099_520)])
def test_slim_has_the_printed_numbers_of_parameters(cut: str, expected: int) -> None:
    with torch.device("meta"):
        whole = build("resnet50", 3).to("meta")
        assert count(slimmed(EncoderSpec(architecture="resnet50", in_chans=3), whole, find("resnet50", cut), 2, seed=0)) == expected


@pytest.mark.parametrize("cut", ["stem", "layer1", "layer2", "layer3"])
def test_slim_has_the_sources_prefix(cut: str) -> None:
    transplant, weights = plant("test_resnet", {"name": "slim", "cut": cut})
    verify(transplant, weights)
    assert transplant.loaded is not None
    at, last = places(transplant.module.encoder), find("test_resnet", cut)
    assert {name for name in at if at[name] <= last} == set(transplant.loaded.loaded)


@pytest.mark.parametrize(("architecture", "points"), [("resnet50", 16), ("resnet18", 8)])
def test_layer_wise_slim_has_fewer_parameters_the_earlier_it_shrinks(architecture: str, points: int) -> None:
    spec = EncoderSpec(architecture=architecture, in_chans=1)
    with torch.device("meta"):
        whole = build(architecture, 1).to("meta")
        counts = [count(slimmed(spec, whole, last, 2, seed=0)) for last in range(points)]
    assert counts == sorted(set(counts))
    assert counts[-1] < count(whole)


@TASKS
def test_a_slim_point_within_a_stage_keeps_the_blocks_before_it(task: Task) -> None:
    transplant, weights = plant("resnet18", {"name": "slim", "cut": "layer2.0"}, task)
    encoder = transplant.module.encoder
    assert encoder.pyramid_channels == (64, 64, 64, 128, 256)
    verify(transplant, weights)
    assert transplant.loaded is not None
    assert {name for name in weights if name.startswith(("conv1", "bn1", "layer1", "layer2.0"))} == set(transplant.loaded.loaded)
    again, _ = plant("resnet18", {"name": "slim", "cut": "layer2.0"}, task)
    assert again.sha256 == transplant.sha256
    before = snapshot(transplant.module.encoder)
    train(transplant, task, count=1)
    assert not torch.equal(
        before["net.layer2.1.downsample.0.weight"], transplant.module.encoder.net.get_parameter("layer2.1.downsample.0.weight")
    )


def test_slim_refuses_what_it_cannot_narrow() -> None:
    for architecture, options, message in (
        ("test_vit", {"cut": "block2"}, "no widths to choose"),
        ("test_resnet", {"cut": "layer4"}, "nothing comes after layer4.0"),
        ("test_resnet", {"cut": "layer1", "factor": 7}, "do not divide by 7"),
    ):
        with pytest.raises(RequestError, match=message):
            plant(architecture, {"name": "slim", **options})


# -- T9: gabor


@pytest.mark.parametrize(("side", "filters"), [(7, 64), (7, 32), (5, 32), (4, 96), (16, 192)])
def test_each_gabor_filter_has_one_orientation_and_the_bank_all_in_both_phases(side: int, filters: int) -> None:
    found = bank(filters, side).double()
    frequency = torch.fft.fftfreq(64).double()
    fy, fx = torch.meshgrid(frequency, frequency, indexing="ij")
    power = torch.fft.fft2(found, s=(64, 64)).abs().square()
    peaks = power.flatten(1).argmax(1)
    angles = (torch.atan2(fy, fx).flatten()[peaks] % math.pi) / (math.pi / 8)
    nearest = angles.round()
    assert (angles - nearest).abs().max() < 0.25  # of the step between two orientations
    parity = (found * found.flip(1, 2)).mean((1, 2))
    torch.testing.assert_close(parity.abs(), torch.ones_like(parity), atol=1e-4, rtol=0)
    assert len({(int(a) % 8, float(p) > 0) for a, p in zip(nearest[:16], parity[:16], strict=True)}) == 16
    off = (torch.atan2(fy, fx)[None] - (angles * math.pi / 8)[:, None, None] + math.pi / 2) % math.pi - math.pi / 2
    inside = (power * (off.abs() < math.pi / 4)).sum((1, 2)) / power.sum((1, 2))
    assert inside.min() > 0.9
    assert found.mean((1, 2)).abs().max() < 1e-6
    torch.testing.assert_close(found.std((1, 2), correction=0), torch.ones(filters, dtype=torch.float64), atol=1e-5, rtol=0)
    radii = torch.hypot(fx, fy).flatten()[peaks]
    if side >= 7:
        assert radii.max() / radii.min() > 1.5  # several frequencies


def test_gabor_filters_have_the_scale_of_the_source_and_everything_else_is_random() -> None:
    transplant, weights = plant("cbr_tiny", "gabor", seed=2)
    state = transplant.module.encoder.net.state_dict()
    torch.testing.assert_close(state["conv1.conv.weight"].std(correction=0), weights["conv1.conv.weight"].std(correction=0))
    assert float(state["conv1.conv.weight"].mean((1, 2, 3)).abs().max()) < 1e-7
    rest, _ = plant("cbr_tiny", {"name": "transfusion", "cut": "conv1"}, seed=2)
    assert all(torch.equal(state[name], t) for name, t in rest.module.encoder.net.state_dict().items() if not name.startswith("conv1."))
    with pytest.raises(RequestError, match="16 filters of 3 px"):
        plant("test_resnet", "gabor")


# -- T10, T11: lwft


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "DeepSpeed"])
def test_does_not_repeat_the_divided_rate_that_a_wrapper_swallows(wrapped: bool) -> None:
    """The authors take the wrapper's only child for the head: the whole network at the full rate, and an empty encoder."""
    transplant, _ = plant("test_resnet", {"name": "lwft", "cut": "layer1", "base_lr_div": 10})
    optimizer = wrap(transplant).optimizer if wrapped else torch.optim.Adam(settings_of(transplant))
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for part, rate in ((transplant.module.encoder, RATE / 10), (transplant.module.head, RATE)):
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        assert trained
        assert all(rates[id(parameter)] == pytest.approx(rate) for parameter in trained)
    frozen = [parameter for parameter in transplant.module.parameters() if not parameter.requires_grad]
    assert frozen
    assert not rates.keys() & {id(parameter) for parameter in frozen}


def test_does_not_repeat_frozen_batch_norm_that_drifts() -> None:
    """The authors' frozen layers stay in training mode."""
    transplant, _ = plant("test_resnet", {"name": "lwft", "cut": "layer2"})
    before = snapshot(transplant.module.encoder.net)
    at = places(transplant.module.encoder)
    train(transplant, CHEST)
    after = transplant.module.encoder.net.state_dict()
    drifted = {at[name] for name in before if "running" in name and not torch.equal(before[name], after[name])}
    assert drifted == {at[name] for name in before if at[name] > find("test_resnet", "layer2")}


def test_does_not_repeat_no_cut_that_froze_everything() -> None:
    """The authors' default of -1 is an index from the end."""
    transplant, _ = plant("test_resnet", "lwft")
    assert all(parameter.requires_grad for parameter in transplant.module.parameters())
    with pytest.raises(RequestError):
        plant("test_resnet", {"name": "lwft", "cut": -1})


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_lwft_trains_less_with_every_cut(architecture: str) -> None:
    weights = source_of(architecture)
    trained = []
    for cut in (None, *(cut.name for cut in cuts(architecture))):
        transplant, _ = plant(architecture, {"name": "lwft", "cut": cut}, weights=weights)
        trained.append(sum(parameter.numel() for group in transplant.groups for parameter in group.params))
    assert trained == sorted(set(trained), reverse=True)
    assert trained[-1] == count(transplant.module.head)


# -- T12 to T14: truncated


@pytest.mark.parametrize(("cut", "expected"), [("layer3", 8_543_296), ("layer3.3", 6_308_928)])
def test_truncated_has_the_published_parameters(cut: str, expected: int) -> None:
    weights = build("resnet50", 3).net.state_dict()
    transplant, _ = plant("resnet50", {"name": "truncated", "cut": cut}, weights=weights, in_chans=3)
    assert count(transplant.module.encoder) == expected
    verify(transplant, weights)


def test_a_truncated_transplant_computes_the_prefix_of_the_whole() -> None:
    transplant, weights = plant("test_resnet", {"name": "truncated", "cut": "layer3"})
    whole = build("test_resnet", 1, image_size=SIDE)
    whole.net.load_state_dict(weights)
    x = data(CHEST)[0]
    with torch.no_grad():
        torch.testing.assert_close(transplant.module.eval().embed(x)[0], whole.eval().pyramid(x)[3].mean((2, 3)))


def test_pooled_and_flat_heads_have_the_features_that_their_names_say() -> None:
    pooled, _ = plant("test_resnet", {"name": "truncated", "cut": "layer2"})
    flat, _ = plant("test_resnet", {"name": "truncated", "cut": "layer2", "head": "flat"})
    channels, positions = 48, (SIDE // 8) ** 2
    assert (count(pooled.module.head), count(flat.module.head)) == (channels * 3 + 3, channels * positions * 3 + 3)
    assert pooled.sha256 == flat.sha256
    for transplant in (pooled, flat):
        before = snapshot(transplant.module.head)
        train(transplant, CHEST, count=1)
        assert not any(torch.equal(before[name], t) for name, t in transplant.module.head.state_dict().items())


def test_truncating_is_refused_where_it_means_nothing() -> None:
    for strategy, task, spec, message in (
        ({"cut": "layer7"}, CHEST, {}, "no cut 'layer7'"),
        ({"cut": "auto"}, CHEST, {}, "searched for by a study"),
        ({"cut": "layer2", "head": "flat"}, LUNGS, {}, "no flat head"),
        ({"cut": "layer2", "head": "flat"}, CHEST, {"resolution": None}, "needs the images' size"),
    ):
        for name in ("truncated", "fat"):
            with pytest.raises(RequestError, match=message):
                plant("test_resnet", {"name": name, **strategy}, task, **spec)


# -- sources that are truncated or narrow themselves, and weights that do not fit


@pytest.mark.parametrize(
    "case", ["full", "linear", "transfusion", "mean-var", "lwft", "truncated", "fat", "gradual", "layer-decay", "l2-sp", "knn"]
)
def test_a_truncated_encoder_can_be_a_source(case: str) -> None:
    small = truncate(build("test_resnet", 1, seed=3), "layer3")
    options = {"cut": "layer2"} if case in ("transfusion", "truncated", "fat", "lwft") else {}
    transplant, weights = plant("test_resnet", {"name": case, **options}, weights=small.net.state_dict(), cut="layer3")
    verify(transplant, weights)
    assert len(transplant.module.encoder.cuts) == (3 if case in ("truncated", "fat") else 4)
    assert not [name for name in transplant.module.encoder.net.state_dict() if name.startswith("layer4")]
    with torch.no_grad():
        assert transplant.module.eval().embed(data(CHEST)[0])[0].shape == (4, 48 if case in ("truncated", "fat") else 192)
    if options:
        with pytest.raises(RequestError, match="truncated before 'layer4'"):
            plant("test_resnet", {"name": case, "cut": "layer4"}, weights=small.net.state_dict(), cut="layer3")


def test_a_slim_encoder_can_be_a_source() -> None:
    narrow = (32, 32, 24, 48)
    weights = build("test_resnet", 1, seed=3, widths=narrow).net.state_dict()
    transplant, _ = plant("test_resnet", {"name": "slim", "cut": "layer3"}, weights=weights, widths=narrow)
    verify(transplant, weights)
    assert transplant.module.encoder.num_features == 24
    full, _ = plant("test_resnet", "full", LUNGS, weights=weights, widths=narrow)
    assert full.sha256 == sha256_of(weights)


@pytest.mark.parametrize("strategy", ["full", "linear", "mean-var", "l2-sp", "knn"])
def test_weights_that_fit_less_than_95_percent_are_refused_with_the_table_unless_asked_for(strategy: str) -> None:
    weights = {name: t for name, t in source_of("test_resnet").items() if not name.startswith("layer4")}
    with pytest.raises(WorkError, match=r"only \d+% .*loaded \d+; missing \d+: layer4"):
        plant("test_resnet", strategy, weights=weights)
    transplant, _ = plant("test_resnet", strategy, weights=weights, allow_partial=True)
    verify(transplant, weights)


def test_does_not_repeat_a_prefix_that_is_stripped_too_early() -> None:
    """The benchmark strips `module.` before it looks for `module.encoder_q.`, which then is never found."""
    weights = {f"module.encoder_q.{name}": t for name, t in source_of("test_resnet").items()}
    for strategy in ("full", {"name": "transfusion", "cut": "layer2"}, {"name": "truncated", "cut": "layer2"}):
        transplant, _ = plant("test_resnet", strategy, weights=weights)
        assert transplant.loaded is not None
        assert transplant.loaded.prefix == "module.encoder_q."
        assert not transplant.loaded.missing
        verify(transplant, weights)


def test_verify_finds_a_tensor_that_is_not_the_sources() -> None:
    transplant, weights = plant("test_resnet", {"name": "transfusion", "cut": "layer2"})
    with torch.no_grad():
        transplant.module.encoder.net.get_parameter("layer2.0.conv1.weight")[0, 0, 0, 0] += 1e-6
    with pytest.raises(WorkError, match=r"1 transplanted tensors are not the source's: layer2.0.conv1.weight"):
        verify(transplant, weights)


# -- volumes

VOLUMES = CHEST.model_copy(update={"volume": True})


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != "vit" and "flat" not in case])
def test_every_strategy_transplants_into_volumes(case: str) -> None:
    transplant, weights = planted(case, VOLUMES)
    flat, _ = planted(case, CHEST)
    verify(transplant, weights)
    assert transplant.sha256 == flat.sha256
    trains = [{name for name, parameter in found.module.named_parameters() if parameter.requires_grad} for found in (transplant, flat)]
    assert trains[0] == trains[1]
    assert [(group.name, len(group.params)) for group in transplant.groups] == [(group.name, len(group.params)) for group in flat.groups]
    x, target = data(CHEST)
    with torch.no_grad():  # of equal slices: as the image, on every one
        torch.testing.assert_close(transplant.module.eval().embed(x.unsqueeze(2).expand(-1, -1, 3, -1, -1)), flat.module.eval().embed(x))
    if transplant.groups:
        before = snapshot(transplant.module)
        optimizer = torch.optim.Adam(settings_of(transplant))
        transplant.module.train()
        nn.BCEWithLogitsLoss()(transplant.module(torch.stack([x, x.flip(3), x.flip(2)], 2)), target).backward()
        optimizer.step()
        moved = {name for name, tensor in transplant.module.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name for name in moved if "running" not in name and "tracked" not in name} <= trains[0]
        assert moved


def test_what_has_no_volumes_says_so() -> None:
    for architecture, strategy in (("test_vit", "full"), ("test_resnet", {"name": "truncated", "cut": "layer2", "head": "flat"})):
        with pytest.raises(RequestError, match="volumes"):
            plant(architecture, strategy, VOLUMES)


# -- beyond the studies


def test_lp_ft_probes_first_with_the_head_of_linear() -> None:
    ours, linear = plant("test_resnet", "lp-ft")[0], plant("test_resnet", "linear")[0]
    assert ours.probe
    assert not linear.probe
    assert sha256_of(ours.module.head.state_dict()) == sha256_of(linear.module.head.state_dict())
    assert not ours.module.frozen


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6))
def test_gradual_unfreezes_from_the_top(stages: int) -> None:
    transplant, _ = plant("test_vit", {"name": "gradual", "stages": stages})
    at = places(transplant.module.encoder)
    names = {id(parameter): name for name, parameter in transplant.module.encoder.net.named_parameters()}
    starts: dict[int, float] = {}
    for group in transplant.groups:
        for parameter in group.params:
            if id(parameter) in names:
                assert starts.setdefault(at[names[id(parameter)]], group.start) == group.start
            else:
                assert group.start == 0
    ordered = [starts[cut] for cut in sorted(starts)]
    assert ordered == sorted(ordered, reverse=True)
    expected = [(stage + 1) / (stages + 1) for stage in reversed(range(stages))]
    assert sorted(set(ordered), reverse=True) == pytest.approx(expected)


def test_gradual_has_no_more_stages_than_cuts() -> None:
    with pytest.raises(RequestError, match="7 stages of an encoder with 6 cuts"):
        plant("test_vit", {"name": "gradual", "stages": 7})


def test_layer_decay_falls_towards_the_stem() -> None:
    transplant, _ = plant("test_resnet", {"name": "layer-decay", "decay": 0.5})
    rates = {group.name: group.lr_scale for group in transplant.groups}
    assert rates["encoder, stem"] == 0.5**5
    assert rates["encoder, layer4.0"] == 0.5
    assert rates["head"] == 1


def test_l2_sp_is_the_papers_penalty() -> None:
    transplant, weights = plant("test_resnet", {"name": "l2-sp", "alpha": 0.3, "beta": 0.07})
    assert transplant.penalty is not None
    assert not any(group.decay for group in transplant.groups)
    module = transplant.module
    head = sum(float(parameter.detach().double().square().sum()) for parameter in module.head.parameters())
    assert float(transplant.penalty().detach()) == pytest.approx(0.07 / 2 * head, rel=1e-5)
    train(transplant, CHEST, count=1)
    moved = sum(float((p.detach() - weights[name]).double().square().sum()) for name, p in module.encoder.net.named_parameters())
    head = sum(float(parameter.detach().double().square().sum()) for parameter in module.head.parameters())
    penalty = transplant.penalty()
    assert float(penalty.detach()) == pytest.approx(0.3 / 2 * moved + 0.07 / 2 * head, rel=1e-5)
    module.zero_grad()
    penalty.backward()
    for name, parameter in module.encoder.net.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.3 * (parameter.detach() - weights[name]), rtol=1e-5, atol=1e-8)


def test_lora_starts_as_the_source_and_merges_into_plain_weights() -> None:
    transplant, weights = plant("test_vit", {"name": "lora", "rank": 2, "alpha": 4})
    x = data(CHEST)[0]
    encoder = transplant.module.encoder
    plain = build("test_vit", 1, image_size=SIDE).eval()
    plain.net.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), plain(x))
    trained = {name for name, parameter in encoder.net.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 * 2 * 2  # blocks, projections, matrices
    assert all(name.endswith(("attn.qkv.down", "attn.qkv.up", "attn.proj.down", "attn.proj.up")) for name in trained)
    train(transplant, CHEST, count=20)
    encoder.eval()
    plain.net.load_state_dict(merge(encoder.net).state_dict(), strict=True)
    with torch.no_grad():
        adapted = encoder(x)
        assert (adapted - plain(x)).abs().max() < 1e-6
        assert (encoder.net(encoder.prepare(x)) - adapted).abs().max() == 0
        plain.net.load_state_dict(weights)
        assert (adapted - plain(x)).abs().max() > 1e-4
    with pytest.raises(RequestError, match=r"test_resnet is none .*vit_small_patch16_224"):
        plant("test_resnet", "lora")


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_is_that_of_scikit_learn_with_the_papers_weights(k: int) -> None:
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    draw = torch.Generator().manual_seed(k)
    z, x = torch.randn(40, 6, generator=draw), torch.randn(9, 6, generator=draw)
    grade = torch.randint(0, 3, (40,), generator=draw)
    peer = KNeighborsClassifier(min(k, 40), weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    expected = torch.from_numpy(peer.fit(z.numpy(), grade.numpy()).predict_proba(x.numpy())).float()
    target = nn.functional.one_hot(grade, 3).float()
    heads = {kind: KnnHead(kind, k, 0.07) for kind in ("multiclass", "multilabel", "ordinal")}  # type: ignore[arg-type]
    for head in heads.values():
        head.fit(z, target, torch.ones_like(target))
    found = {kind: head([x], (1, 1)) for kind, head in heads.items()}
    close = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(found["multiclass"].softmax(1), expected, **close)
    torch.testing.assert_close(found["multilabel"].sigmoid(), expected, **close)
    torch.testing.assert_close(found["ordinal"].sigmoid(), torch.stack([expected[:, 1:].sum(1), expected[:, 2]], 1), **close)
    assert all(logits.isfinite().all() for logits in found.values())


def test_knn_lets_only_those_vote_who_know() -> None:
    draw = torch.Generator().manual_seed(0)
    z, x, target = (
        torch.randn(30, 5, generator=draw),
        torch.randn(4, 5, generator=draw),
        torch.randint(0, 2, (30, 2), generator=draw).float(),
    )
    known = torch.ones(30, 2)
    known[10:, 1] = 0
    some, few = KnnHead("multilabel", 7, 0.07), KnnHead("multilabel", 7, 0.07)
    some.fit(z, target, known)
    few.fit(z[:10], target[:10], torch.ones(10, 2))
    torch.testing.assert_close(some([x], (1, 1))[:, 1], few([x], (1, 1))[:, 1])
    with pytest.raises(WorkError, match="no training image knows label number 1"):
        some.fit(z, target, known * torch.tensor([1.0, 0.0]))


def test_knn_trains_nothing_and_is_for_labels() -> None:
    transplant, weights = plant("test_resnet", "knn")
    assert (transplant.groups, transplant.views) == ([], "evaluation")
    assert not list(transplant.module.head.parameters())
    assert sha256_of(weights) == transplant.sha256
    with pytest.raises(RequestError, match="images, not pixels"):
        plant("test_resnet", "knn", LUNGS)


@pytest.mark.parametrize("pair", list(itertools.product(["transfusion", "truncated", "fat", "slim"], [{}, {"cut": None}])), ids=str)
def test_a_cut_must_be_given_where_there_is_no_strategy_without(pair: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="cut"):
        resolve({"name": pair[0], **pair[1]})


# -- what it costs, and what is written about it

# Of the table in arXiv 2106.05152: ResNet-50 at 224 px, billions of multiply-accumulates.
PRINTED_GMACS = [
    ("full", {}, 4.12),
    ("truncated", {"cut": "layer3"}, 3.31),
    ("truncated", {"cut": "layer3.3"}, 2.87),
    ("slim", {"cut": "layer3"}, 3.56),
]


@pytest.mark.parametrize(("name", "options", "printed"), PRINTED_GMACS, ids=str)
def test_operations_are_those_of_the_published_table(name: str, options: dict[str, Any], printed: float) -> None:
    make, chosen = resolve({"name": name, **options})
    transplant = make.transplant(EncoderSpec(architecture="resnet50", in_chans=3), None, CHEST, chosen, 0)
    params, macs = cost(transplant.module.to("meta"), (3, 224, 224))
    assert macs / 1e9 == pytest.approx(printed, rel=0.02)
    assert params == count(transplant.module)


def test_latency_is_measured_before_and_after_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "SECONDS", 0.01)
    transplant, _ = plant("test_resnet", {"name": "truncated", "cut": "layer1"})
    after, before = (
        efficiency.measure(module, (1, SIDE, SIDE)) for module in (transplant.module, efficiency.whole(transplant.module.encoder, CHEST))
    )
    assert after.params < before.params
    assert after.macs < before.macs
    for found in (after, before):
        assert [latency.batch for latency in found.latency] == [1, 32]
        for latency in found.latency:
            assert latency.runs >= 7
            assert 0 < latency.q1_ms <= latency.median_ms <= latency.q3_ms


def test_the_table_of_strategies_is_the_code() -> None:
    """Name, options with their defaults, and description, for every strategy."""
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/strategies.md").read_text().splitlines() if line.startswith("| `")]
    expected = []
    for name, about in STRATEGIES.items():
        fields = get(name).Config.model_fields
        options = [f"`{key}`" if field.is_required() else f"`{key}: {json.dumps(field.default)}`" for key, field in fields.items()]
        expected.append([f"`{name}`", ", ".join(options) or "none", about])
    assert [row[:3] for row in rows] == expected
    assert all(len(row) == 6 for row in rows)
