"""The studies' strategies one by one: rows T1 to T14 of the reference's table."""

import math
from typing import Any

import pytest
import torch
from transplants import CHEST, LUNGS, RATE, SIDE, TASKS, count, data, plant, settings_of, snapshot, source_of, train, wrap

from base.errors import RequestError
from encoders.build import build
from encoders.cuts import cuts, find
from encoders.weights import sha256_of
from finetune.strategies import resolve
from finetune.strategies.gabor import bank
from finetune.strategies.slim import slimmed
from finetune.task import Task
from finetune.transplant import EncoderSpec, places, verify


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "resnetv2_50x1_bit"])  # batch, layer and group norm
def test_does_not_repeat_running_variances_that_are_drawn(architecture: str) -> None:
    """A re-implementation draws every tensor of the state dict, running variances too: below 0 they make NaN of everything."""
    weights = source_of(architecture)
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = torch.rand(weights[name].shape).pow(8) * 100 + 1e-3  # half of what N(mean, variance) of this gives is below 0
    fresh = build(architecture, 1, image_size=SIDE).net.state_dict()
    norms = [name.removesuffix("weight") for name in fresh if name.endswith("weight") and fresh[name].ndim == 1]
    assert norms
    affine = {norm + kind for norm in norms for kind in ("weight", "bias")}
    for how in ("default", "copy", "meanvar"):
        transplant, _ = plant(architecture, {"name": "mean-var", "batch_norm": how}, weights=weights)
        state = transplant.module.encoder.net.state_dict()
        for name in (name for name in state if "running" in name):
            assert torch.equal(state[name], (weights if how == "copy" else fresh)[name])
        for name in affine:
            expected = {"default": (False, True), "copy": (True, False), "meanvar": (False, False)}[how]
            assert (torch.equal(state[name], weights[name]), torch.equal(state[name], fresh[name])) == expected, name
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


def test_truncated_has_the_published_parameters() -> None:
    """At layer 12 of ResNet-50; tests of encoders.truncate have the others."""
    weights = build("resnet50", 3).net.state_dict()
    transplant, _ = plant("resnet50", {"name": "truncated", "cut": "layer3.3"}, weights=weights, in_chans=3)
    assert count(transplant.module.encoder) == 6_308_928
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
    refused: list[tuple[dict[str, Any], Task, dict[str, Any], str]] = [
        ({"cut": "layer7"}, CHEST, {}, "no cut 'layer7'"),
        ({"cut": "auto"}, CHEST, {}, "searched for by a study"),
        ({"cut": "layer2", "head": "flat"}, LUNGS, {}, "no flat head"),
        ({"cut": "layer2", "head": "flat"}, CHEST, {"resolution": None}, "needs the images' size"),
    ]
    for strategy, task, spec, message in refused:
        for name in ("truncated", "fat"):
            with pytest.raises(RequestError, match=message):
                plant("test_resnet", {"name": name, **strategy}, task, **spec)
