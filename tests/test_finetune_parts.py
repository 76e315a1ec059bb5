"""Losses, heads, transplants, label fractions: each property by itself."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import write

from analysis.floors import of_shards
from base.config import parse
from base.errors import RequestError, WorkError
from encoders.build import build
from encoders.export import export
from encoders.weights import sha256_of
from finetune.cell import CellConfig
from finetune.data import Arrays, batches, fraction_of, load, shuffled
from finetune.heads import PyramidHead
from finetune.losses import loss_of
from finetune.predict import measure
from finetune.run import plant
from finetune.strategies import resolve
from finetune.task import load_task
from finetune.transplant import EncoderSpec, Transplant
from shards.card import NOT_JUDGED, Card
from shards.manifest import read
from shards.pack import pack

CHEST, LUNGS = load_task("phantom-chest"), load_task("lxs")
SPEC = EncoderSpec(architecture="test_resnet", in_chans=1)


def transplanted(strategy: str, task: object = CHEST, seed: int = 0) -> tuple[Transplant, dict[str, torch.Tensor]]:
    make, options = resolve(strategy)
    weights = dict(build("test_resnet", 1, seed=77).net.state_dict())
    return make.transplant(SPEC, weights, task, options, seed), weights  # type: ignore[arg-type]


def steps(transplant: Transplant, task: object, count: int = 3) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8, generator=draw)
    target = torch.randint(0, 2, (4, 32, 32) if task is LUNGS else (4, 3), generator=draw).float()
    optimizer = torch.optim.SGD([{"params": group.params} for group in transplant.groups], lr=0.1)
    transplant.module.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(task, transplant.module(x), target, torch.ones_like(target)).backward()  # type: ignore[arg-type]
        optimizer.step()


# -- normalisation


@pytest.mark.parametrize("of", ["random", "weights"])
def test_a_task_may_normalise_every_source_alike(of: str, tmp_path: Path) -> None:
    expected = {"imagenet": (0.449, 0.226), "chestx-ray": (0.5056, 0.252), "none": (0.0, 1.0), "neutral": (0.5, 0.25), None: (0.5, 0.25)}
    fields: dict[str, Any] = {"source": "random", "source_kind": "random", "architecture": "test_resnet"}
    if of == "weights":
        about: dict[str, Any] = {"method": "none", "lineage": [], "data": [], "revision": "abc", "image_size": 32}
        export(build("test_resnet", 1, (0.3,), (0.2,)), tmp_path, name="source", **about)
        fields, expected[None] = fields | {"source_kind": "weights", "encoder_dir": str(tmp_path)}, (0.3, 0.2)
    for name, (mean, std) in expected.items():
        task = CHEST.model_copy(update={"normalise": name})
        config = {"key": "0", "strategy": {"name": "full"}, "shards": "", "manifest_digest": "", "resolution": 32, "out": ""}
        transplant, *_ = plant(CellConfig.model_validate(config | fields | {"task": task}), 1)
        constant = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
        torch.testing.assert_close(transplant.module.encoder.normalise(constant), torch.full((1, 1, 4, 4), (1 - mean) / std))


# -- pixels that nobody judged


def test_pixels_that_nobody_judged_count_for_nothing() -> None:
    logits, target = torch.randn(3, 8, 8), (torch.rand(3, 8, 8) > 0.5).float()
    outside = target.clone()
    outside[:, :, 5:] = NOT_JUDGED
    of = Arrays("test", np.zeros((3, 1, 8, 8), np.uint8), outside.numpy(), np.ones((3, 1), np.float32), ("p",) * 3, (None,) * 3, ("i",) * 3)
    inside = dataclasses.replace(of, target=target[:, :, :5].numpy())
    assert measure(LUNGS, of, logits.numpy()) == measure(LUNGS, inside, logits[:, :, :5].numpy())


# -- data


@pytest.mark.parametrize(("uncertain", "trains_on"), [(None, 20), ("ones", 30), ({"smoothed": [0.6, 0.9]}, 30)])
def test_uncertain_labels_train_by_the_tasks_policy_and_are_never_measured(tmp_path: Path, uncertain: object, trains_on: int) -> None:
    url = write(tmp_path, (40, 40), splits=["train", "test"])  # 0, 1, -1, None in turn
    task = load_task("phantom-chest", {"labels": ["a"], "uncertain": uncertain})
    train = load(url, read(url).digest, "train", 24, task, str(tmp_path / "cache"))
    test = load(url, read(url).digest, "test", 24, task, str(tmp_path / "cache"))
    assert (len(train), len(test)) == (trains_on, 20)
    assert set(np.unique(test.target)) == {0, 1}
    assert ((train.target > 0) & (train.target < 1)).sum() == (10 if isinstance(uncertain, dict) else 0)
    absent = load_task("phantom-chest", {"labels": ["absent"]})
    with pytest.raises(RequestError, match="tiny has no label absent"):
        load(url, read(url).digest, "train", 24, absent, str(tmp_path / "cache"))


# -- transplants


@pytest.mark.parametrize("task", [CHEST, LUNGS], ids=["labels", "masks"])
@pytest.mark.parametrize("strategy", ["full", "linear"])
def test_the_source_is_really_in_the_network(strategy: str, task: object) -> None:
    transplant, weights = transplanted(strategy, task)
    assert transplant.sha256 == sha256_of(weights) == sha256_of(transplant.module.encoder.net.state_dict())
    trainable = [parameter for parameter in transplant.module.parameters() if parameter.requires_grad]
    grouped = [parameter for group in transplant.groups for parameter in group.params]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trainable}
    assert len(grouped) == len(trainable)
    assert all((parameter.ndim > 1) == group.decay for group in transplant.groups for parameter in group.params)


@pytest.mark.parametrize("task", [CHEST, LUNGS], ids=["labels", "masks"])
def test_full_changes_every_tensor(task: object) -> None:
    transplant, weights = transplanted("full", task)
    steps(transplant, task)
    after = transplant.module.encoder.net.state_dict()
    assert [name for name in weights if torch.equal(weights[name], after[name])] == []


@pytest.mark.parametrize("task", [CHEST, LUNGS], ids=["labels", "masks"])
def test_linear_leaves_the_encoder_bit_identical_batch_norm_included(task: object) -> None:
    transplant, weights = transplanted("linear", task)
    head = {name: tensor.clone() for name, tensor in transplant.module.head.named_parameters()}
    steps(transplant, task)
    assert sha256_of(transplant.module.encoder.net.state_dict()) == sha256_of(weights)
    assert all(parameter.grad is None for parameter in transplant.module.encoder.parameters())
    assert all(not torch.equal(head[name], tensor) for name, tensor in transplant.module.head.named_parameters())


def test_weights_that_do_not_fit_are_refused() -> None:
    make, options = resolve("full")
    with pytest.raises(WorkError, match="of the network's tensors"):
        make.transplant(SPEC, {"conv1.weight": torch.zeros(1)}, CHEST, options, 0)


def test_heads_are_drawn_from_the_seed() -> None:
    states = [sha256_of(transplanted("full", LUNGS, seed)[0].module.head.state_dict()) for seed in (0, 0, 1)]
    assert states[0] == states[1] != states[2]


def test_the_pyramid_head_is_linear_in_the_features() -> None:
    head = PyramidHead([4, 6])
    a, b = ([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)] for _ in range(2))
    zero = head([torch.zeros_like(x) for x in a], (16, 16))
    mixed = head([2 * x - 3 * y for x, y in zip(a, b, strict=True)], (16, 16))
    torch.testing.assert_close(mixed - zero, 2 * (head(a, (16, 16)) - zero) - 3 * (head(b, (16, 16)) - zero))


# -- data


def test_a_task_outlines_one_class_of_the_masks_or_all(tmp_path: Path) -> None:
    outlines = {"heart": (slice(4, 12), slice(4, 12)), "clavicle": (slice(20, 24), slice(2, 30))}
    for i in range(12):
        for folder, place in {"images": None, **outlines}.items():
            pixels = np.full((32, 32), 90 + i, np.uint8) if place is None else np.zeros((32, 32), np.uint8)
            if place is not None:
                pixels[place] = 255
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "raw" / folder / f"{i}.png"), pixels)
    masks = {name: [f"{name}/{{stem}}.png"] for name in outlines}
    layout = {"name": "one", "requires": ["images/*"], "images": ["images/*.png"], "masks": masks}
    card = {"schema": 2, "dataset": "organs", "title": "t", "reader": "pairs", "kind": "segmentation", "mask_classes": list(outlines)}
    said = {
        "public": True,
        "licence": "none",
        "access": "none",
        "citation": "none",
        "layouts": [layout],
        "split": {"val": 0.2, "test": 0.2},
    }
    url = str(tmp_path / "shards")
    packed = pack(parse({**card, **said}, Card, "card"), str(tmp_path / "raw"), url)
    found = {}
    for name in ("heart", "clavicle", None):
        task = LUNGS.model_copy(update={"dataset": "organs", "mask_class": name})
        target = load(url, packed.digest, "train", 32, task).target
        found[name] = target[0] == 1
        assert (target == target[0]).all()
    for name, place in outlines.items():
        assert found[name].sum() == found[name][place].sum() == found[name][place].size
    assert (found[None] == (found["heart"] | found["clavicle"])).all()
    with pytest.raises(RequestError, match=r"unknown mask class 'hart'.*did you mean 'heart'"):
        load(url, packed.digest, "train", 32, LUNGS.model_copy(update={"dataset": "organs", "mask_class": "hart"}))
    (fit,) = of_shards(url, "segmentation", [], size=32, mask_class="heart")[1.0]
    assert fit["mean_mask"]["dice"] == 1


def arrays(patients: list[str], target: np.ndarray) -> Arrays:
    n = len(patients)
    ids = tuple(f"image-{i}" for i in range(n))
    return Arrays(
        "train",
        np.zeros((n, 1, 4, 4), np.uint8),
        target.astype(np.float32),
        np.ones_like(target, np.float32),
        tuple(patients),
        (None,) * n,
        ids,
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(20, 80))
def test_fractions_are_nested_patient_aware_and_independent_of_file_order(seed: int, patients: int) -> None:
    draw = np.random.default_rng(seed)
    names = [f"p{i}" for i in draw.integers(0, patients, 200)]
    whole = arrays(names, draw.random((200, 2)) < 0.3)
    small, large = (fraction_of(whole, share, seed) for share in (0.1, 0.25))
    chosen, rest = {names[i] for i in small}, {names[i] for i in set(range(200)) - set(small.tolist())}
    assert set(small) <= set(large)
    assert not chosen & rest
    assert 20 <= len(small) < 20 + max(names.count(name) for name in names)
    order = draw.permutation(200)
    again = fraction_of(whole.take(order), 0.1, seed)
    assert {whole.take(order).ids[i] for i in again} == {whole.ids[i] for i in small}


def test_fractions_keep_the_mix_of_labels() -> None:
    target = np.zeros((1000, 2))
    target[:200, 0], target[150:250, 1] = 1, 1
    whole = arrays([f"p{i}" for i in range(1000)], target)
    for seed in range(5):
        chosen = fraction_of(whole, 0.1, seed)
        assert len(chosen) == 100
        assert abs(whole.target[chosen].sum(0) - [20, 10]).max() <= 2
    assert set(fraction_of(whole, 0.1, 0)) != set(fraction_of(whole, 0.1, 1))


def test_shuffling_permutes_targets_and_nothing_else() -> None:
    whole = arrays([f"p{i}" for i in range(50)], np.arange(50)[:, None])
    mixed = shuffled(whole, 3)
    assert sorted(mixed.target[:, 0]) == sorted(whole.target[:, 0])
    assert (mixed.target != whole.target).any()
    assert mixed.ids == whole.ids
    np.testing.assert_array_equal(shuffled(whole, 3).target, mixed.target)
    assert (shuffled(dataclasses.replace(whole, split="val"), 3).target != mixed.target).any()


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_labels_have_no_correlation_left_with_the_true_ones(seed: int) -> None:
    draw = np.random.default_rng(seed)
    whole = arrays([f"p{i}" for i in range(800)], draw.random((800, 3)) < [0.5, 0.3, 0.1])
    mixed = shuffled(whole, seed).target
    for label in range(3):
        assert abs(np.corrcoef(whole.target[:, label], mixed[:, label])[0, 1]) < 0.02


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_of_studies_are_those_of_other_studies(seed: int, exclusive: bool) -> None:
    """Studies of one to nine images keep how many of them are positive, negative or not known."""
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(300), draw.integers(1, 10, 300))
    target: np.ndarray
    known: np.ndarray
    if exclusive:
        target = known = np.eye(3)[draw.integers(0, 3, 300)][of]
    else:
        target, known = draw.random((len(of), 3)) < [0.5, 0.1, 0.02], draw.random((len(of), 3)) < 0.95
    whole = dataclasses.replace(
        arrays([f"p{i}" for i in of], target),
        known=np.ones_like(target, np.float32) if exclusive else known.astype(np.float32),
        meta=tuple({"scan": f"s{i}"} for i in of),
    )

    def studies(of_arrays: Arrays) -> np.ndarray:
        values = np.where(of_arrays.known > 0, of_arrays.target, np.nan)
        made = [values[of == i] for i in range(300)]
        return np.stack([np.where((one == 1).any(0), 1, np.where(np.isnan(one).any(0), 2, 0)) for one in made])

    for by in ("patient", "scan"):
        mixed = shuffled(whole, seed, by)
        before, after = studies(whole), studies(mixed)
        one, other = (np.sort(found.view([("", found.dtype)] * 3), 0) for found in (before, after))
        np.testing.assert_array_equal(one, other)
        assert (before != after).any()
        for label in range(3):
            assert abs(np.corrcoef(before[:, label] == 1, after[:, label] == 1)[0, 1]) < 0.03
        if exclusive:
            assert all(len(np.unique(mixed.target[of == i], axis=0)) == 1 for i in range(300))


@given(st.integers(2, 60), st.integers(2, 9))
def test_no_batch_has_one_image_and_each_image_comes_once(n: int, size: int) -> None:
    parts = list(batches(np.arange(n), size))
    assert np.concatenate(parts).tolist() == list(range(n))
    assert min(map(len, parts)) >= 2
    assert max(map(len, parts)) <= size + 1
