"""Every strategy: what it copies, what trains, what stays, bare and inside DeepSpeed; on unusual sources, on volumes, as whole cells."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_cell
import torch
from safetensors.torch import save_file
from torch import nn
from transplants import (
    CASES,
    CHEST,
    EVERY,
    FROZEN,
    LUNGS,
    SIDE,
    SMALL,
    TRAINED,
    count,
    data,
    over,
    plant,
    planted,
    settings_of,
    snapshot,
    source_of,
    train,
)

from base.errors import RequestError, WorkError
from base.paths import ROOT
from encoders.build import build
from encoders.cuts import find
from encoders.export import export
from encoders.truncate import Truncated, truncate
from encoders.weights import sha256_of
from engine.context import LocalContext
from finetune.catalogue import EVERYTHING, STRATEGIES
from finetune.run import plant as run_plant
from finetune.run import run
from finetune.strategies import check, get, resolve
from finetune.task import Task
from finetune.transplant import places, verify


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
def test_the_catalogue_says_what_strategies_do(case: str, task: Task) -> None:
    transplant, _ = planted(case, task)
    about = STRATEGIES[case.partition(" ")[0]]
    trains_by = None if not transplant.groups else "linear" if transplant.views == "evaluation" else "recipe"
    assert (about.trains_by, about.probe) == (trains_by, transplant.probe)
    assert about.ends == isinstance(transplant.module.encoder, Truncated)
    if about.trains_by == "recipe" and case != "lwft nothing":
        trains = [parameter.requires_grad for parameter in transplant.module.encoder.parameters()]
        always = all(trains) and not any(group.start for group in transplant.groups)
        assert about.passes == (EVERYTHING if always else 2.0 if any(trains) else 1.0)


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
    unread: tuple[str, ...] = ("encoder.net.norm.",) if task is LUNGS else ()  # decoders get maps from before a transformer's closing norm
    unread += ("encoder.net.cls_token",) if case == "truncated vit stem" else ()  # which attention alone would bring to the patches
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
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format)


# One of each family: a cut in its middle. Those above are not repeated.
FAMILIES = {
    "resnet18": "layer2.0",
    "densenet121": "denseblock2.denselayer3",
    "convnext_tiny": "stages.1",
    "swin_tiny_patch4_window7_224": "layers.1",
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("strategy", "task"), [("lwft", CHEST), ("truncated", LUNGS)], ids=["lwft", "truncated"])
def test_every_family_trains_a_step_from_a_cut(architecture: str, strategy: str, task: Task) -> None:
    transplant, weights = plant(architecture, {"name": strategy, "cut": FAMILIES[architecture]}, task)
    verify(transplant, weights)
    at, last = places(transplant.module.encoder), find(architecture, FAMILIES[architecture])
    train(transplant, task, count=1)
    parameters = dict(transplant.module.encoder.net.named_parameters())
    still = {name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.any()}
    assert still == ({name for name in parameters if at[name] <= last} if strategy == "lwft" else set())


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
def test_weights_that_fit_less_than_95_percent_are_refused_with_the_table(strategy: str) -> None:
    weights = {name: t for name, t in source_of("test_resnet").items() if not name.startswith("layer4")}
    with pytest.raises(WorkError, match=r"only \d+% .*loaded \d+; missing \d+: layer4"):
        plant("test_resnet", strategy, weights=weights)


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
    with torch.no_grad():  # of equal slices: as the image, on every one; in double precision: only the thirds of weights are rounded
        deep, wide = (copy.deepcopy(found.module).double().eval() for found in (transplant, flat))
        x_64 = x.double() / 255
        torch.testing.assert_close(deep.embed(x_64.unsqueeze(2).expand(-1, -1, 3, -1, -1)), wide.embed(x_64), rtol=1.3e-6, atol=1e-5)
    if transplant.groups:
        before = snapshot(transplant.module)
        optimizer = torch.optim.Adam(settings_of(transplant))
        transplant.module.train()
        nn.BCEWithLogitsLoss()(transplant.module(torch.stack([x, x.flip(3), x.flip(2)], 2)), target).backward()
        optimizer.step()
        moved = {name for name, tensor in transplant.module.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name for name in moved if "running" not in name and "tracked" not in name} <= trains[0]
        assert moved


CONVOLUTIONAL = {
    "alexnet": "conv1",
    "resnet50_clip_gap": "stages.0",
    "resnetv2_50x1_bit": "stages.0",
    "inception_v3": "Mixed_5c",
    "efficientnet_b0": "blocks.2",
    "convnext_tiny": "stages.0",
}


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_weights_of_every_convolutional_family_are_transplanted_into_volumes(architecture: str) -> None:
    transplant, weights = plant(architecture, {"name": "lwft", "cut": CONVOLUTIONAL[architecture]}, VOLUMES)
    assert transplant.loaded is not None
    assert set(transplant.loaded.loaded) == set(weights)
    verify(transplant, weights)
    encoder = transplant.module.encoder
    at, last = places(encoder), find(architecture, CONVOLUTIONAL[architecture])
    assert {name for name, parameter in encoder.net.named_parameters() if not parameter.requires_grad} == {
        name for name, _ in encoder.net.named_parameters() if at[name] <= last
    }
    with torch.no_grad():
        next(parameter for parameter in encoder.net.parameters() if parameter.ndim == 5)[0, 0, 0] += 1e-3
    with pytest.raises(WorkError, match="1 transplanted tensors are not the source's"):
        verify(transplant, weights)


def test_what_has_no_volumes_says_so() -> None:
    for architecture, strategy in (("test_vit", "full"), ("test_resnet", {"name": "truncated", "cut": "layer2", "head": "flat"})):
        with pytest.raises(RequestError, match="volumes"):
            plant(architecture, strategy, VOLUMES)


# -- what can be told before anything runs


@over(EVERY)
def test_what_can_be_made_passes_the_check(case: str, task: Task) -> None:
    small, options = CASES[case]
    check({"name": case.partition(" ")[0], **options}, SMALL[small], task)


ENDING = ("transfusion", "slim", "lwft", "truncated", "fat")
REFUSED: list[tuple[dict[str, Any], str, Task, str]] = [
    *(({"name": name, "cut": "layr2"}, "resnet18", CHEST, "no cut 'layr2'") for name in ENDING),
    ({"name": "mean-var", "after": "layer9"}, "resnet18", CHEST, "no cut 'layer9'"),
    ({"name": "mean-var", "subset": ["stem", "block1"]}, "resnet18", CHEST, "no cut 'block1'"),
    ({"name": "slim", "cut": "block1"}, "test_vit", CHEST, "no widths"),
    ({"name": "slim", "cut": "layer4"}, "test_resnet", CHEST, "nothing comes after"),
    ({"name": "truncated", "cut": "layer1", "head": "flat"}, "test_resnet", LUNGS, "no flat head"),
    ({"name": "gabor"}, "efficientnet_b0", CHEST, "32 filters of 3 px"),
    ({"name": "gradual", "stages": 6}, "test_resnet", CHEST, "6 stages of an encoder with 5 cuts"),
    ({"name": "lora"}, "resnet18", CHEST, "resnet18 is none"),
    ({"name": "knn"}, "resnet18", LUNGS, "images, not pixels"),
    ({"name": "full"}, "test_vit", VOLUMES, "not inflated to volumes"),
]


@pytest.mark.parametrize(("strategy", "architecture", "task", "message"), REFUSED, ids=[f"{case[0]['name']}-{case[3]}" for case in REFUSED])
def test_what_cannot_be_made_is_refused_before_and_when_it_is_made(
    strategy: dict[str, Any], architecture: str, task: Task, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as early:
        check(strategy, architecture, task, "study.yaml: cells.strategies[3]")
    assert early.value.where == "study.yaml: cells.strategies[3]"
    assert early.value.hint
    with pytest.raises(RequestError, match=message):
        plant(architecture, strategy, task)


def test_a_cut_that_is_searched_for_passes_the_check() -> None:
    for name in ("truncated", "fat", "transfusion"):
        check({"name": name, "cut": "auto"}, "resnet18", CHEST)


# -- whole cells


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_cell.corpora(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_a_cell(name: str, shards: dict[str, str], tmp_path: Path) -> None:
    small, options = CASES[name]
    cell = tiny_cell.config(shards, tmp_path, architecture=SMALL[small], strategy={"name": name, **options})
    result = run(cell, LocalContext(dir=str(tmp_path)))
    assert result["options"] == resolve(cell.strategy)[1].model_dump(mode="json")
    transplant, encoder_sha256, _ = run_plant(cell, 1)
    assert (result["transplanted_sha256"], result["encoder_sha256"]) == (transplant.sha256, encoder_sha256)
    assert result["params"] == count(transplant.module)
    assert {row["split"] for row in result["metrics"]} == {"val", "test"}


@pytest.mark.parametrize("kind", ["cut", "slim"])
def test_exports_of_truncated_and_slim_encoders_are_sources_of_cells(kind: str, shards: dict[str, str], tmp_path: Path) -> None:
    whole = build("test_resnet", 1, seed=3, widths=(32, 32, 24, 48) if kind == "slim" else None)
    facts: dict[str, Any] = {"name": kind, "method": "supervised", "lineage": [], "data": [], "revision": "abc", "image_size": SIDE}
    export(whole, tmp_path / "export", **facts)
    weights = whole.net.state_dict()
    if kind == "cut":  # as the export of a truncated encoder, but for its ONNX program, which takes seconds
        weights = truncate(whole, "layer3").net.state_dict()
        save_file(weights, tmp_path / "export" / "model.safetensors")
        about = tmp_path / "export" / "allograft.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | {"cut": "layer3.0", "sha256": sha256_of(weights)}))
    source: dict[str, Any] = {"source": kind, "source_kind": "weights", "encoder_dir": str(tmp_path / "export")}
    source["encoder_sha256"] = sha256_of(weights)
    cuts_of_source = 4 if kind == "cut" else 5
    of = {"full": ({}, cuts_of_source), "transfusion": ({"cut": "layer2"}, cuts_of_source), "truncated": ({"cut": "layer1"}, 2)}
    for name, (options, kept) in of.items():
        cell = tiny_cell.config(shards, tmp_path, strategy={"name": name, **options}, **source)
        transplant, encoder_sha256, _ = run_plant(cell, 1)
        assert encoder_sha256 == sha256_of(weights)
        assert len(transplant.module.encoder.cuts) == kept
        assert transplant.module(data(CHEST)[0]).shape == (4, 3)


# -- what is written about them


def test_the_table_of_strategies_is_the_code() -> None:
    """Name, options with their defaults, and description, for every strategy."""
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/strategies.md").read_text().splitlines() if line.startswith("| `")]
    expected = []
    for name, about in STRATEGIES.items():
        fields = get(name).Config.model_fields
        options = [f"`{key}`" if field.is_required() else f"`{key}: {json.dumps(field.default)}`" for key, field in fields.items()]
        expected.append([f"`{name}`", ", ".join(options) or "none", about.text])
    assert [row[:3] for row in rows] == expected
    assert all(len(row) == 6 for row in rows)
