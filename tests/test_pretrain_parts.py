"""Recipes, schemas, probes and verdicts, without training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from base.config import load, parse
from base.errors import RequestError
from base.paths import ROOT, names
from pretrain import methods
from pretrain.recipe import Recipe, load_recipe
from pretrain.run import PretrainConfig, Result
from shards.batches import Batch

GOLDEN = Path(__file__).parent / "golden"
SCHEMAS: dict[str, type[BaseModel]] = {"recipe": Recipe, "pretrain": PretrainConfig, "pretrain_result": Result}


@pytest.mark.parametrize("name", names("recipe"))
def test_every_recipe_reads_and_its_options_fit_its_method(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.method == name.split("/")[0]
    methods.check(recipe.method, recipe.options, views=recipe.views)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_the_presets(method: str) -> None:
    assert {f"{method}/{preset}" for preset in ("smoke", "small", "paper")} <= set(names("recipe"))


def test_paper_values() -> None:
    simclr = load_recipe("simclr/paper")
    assert (simclr.global_batch, simclr.epochs, simclr.optimizer.name, simclr.options["temperature"]) == (4096, 1000, "lars", 0.1)
    assert simclr.optimizer.lr == pytest.approx(0.3 * 4096 / 256)
    assert simclr.optimizer.weight_decay == pytest.approx(1e-6)
    chexnet = load_recipe("supervised/paper")
    assert (chexnet.global_batch, chexnet.optimizer.lr, chexnet.optimizer.betas) == (16, 1e-3, (0.9, 0.999))
    for name in ("insdis", "pirl"):
        assert load_recipe(f"{name}/paper").views.crop_scale == (0.08, 1.0)
    assert load_recipe("vicreg/paper").optimizer.final == 0.001


def test_the_papers_dino_is_one_run_and_not_parts_of_several() -> None:
    """The official code's run of 100 epochs on one node."""
    dino = load_recipe("dino/paper")
    assert (dino.global_batch, dino.epochs, dino.views.sizes) == (512, 100, [224] * 2 + [96] * 8)
    assert dino.optimizer.lr == pytest.approx(0.0005 * 512 / 256)
    assert dino.optimizer.lr * dino.optimizer.final == pytest.approx(1e-6)
    temperatures = ("teacher_temperature_start", "teacher_temperature", "teacher_warmup_epochs")
    assert [dino.options[name] for name in temperatures] == [0.04, 0.04, 0]


def test_settings_and_what_is_wrong_with_them() -> None:
    assert load_recipe("simclr/small", {"epochs": 3, "optimizer.lr": 0.5, "views": {"size": 64}}).views.size == 64
    with pytest.raises(RequestError, match=r"unknown key 'optimizer.learning_rate'|unknown key 'epoch'.*'epochs'"):
        load_recipe("simclr/small", {"epoch": 3})
    with pytest.raises(RequestError, match=r"unknown recipe 'simclr/smal'.*did you mean 'simclr/small'"):
        load_recipe("simclr/smal")
    with pytest.raises(RequestError, match="accumulate 3 does not divide"):
        load_recipe("simclr/small", {"accumulate": 3})
    with pytest.raises(RequestError, match="schedule step and milestones come together"):
        load_recipe("simclr/small", {"optimizer.schedule": "step"})
    with pytest.raises(RequestError, match="lars needs zero_stage 0"):
        load_recipe("simclr/paper", {"zero_stage": 1})


@pytest.mark.parametrize(
    ("recipe", "settings", "says"),
    [
        ("simclr/smoke", {"epochs": math.inf}, "epochs: expected a finite number"),
        ("simclr/smoke", {"optimizer.betas": [0.9, 1.0]}, r"optimizer.betas.1: 1\.0 is not less than 1"),
        ("simclr/smoke", {"optimizer.betas": [2, -1]}, "optimizer.betas.0: 2 is not less than 1; optimizer.betas.1: -1 is less than 0"),
        ("barlow-twins/smoke", {"accumulate": 32, "global_batch": 32}, "accumulate 32 leaves micro-batches of one image"),
        ("simclr/smoke", {"options.temperature": math.nan}, "temperature: expected a finite number"),
        ("simclr/smoke", {"options.temperature": 1e-300}, "temperature: 1e-300 is less than 0.001"),
        ("pcl-v1/smoke", {"options.clusters": [0]}, "a clustering has two clusters at least, got 0"),
        ("mae/smoke", {"options.decoder_heads": 3}, "decoder_heads 3 do not divide the width 32"),
        ("mae/smoke", {"views.size": 16}, r"views.size: a view of 16 px is one patch: none is left to paint \(views.size=32\)"),
        ("ijepa/smoke", {"options.predictor_heads": 5}, "predictor_heads 5 do not divide the width 32"),
        ("ijepa/smoke", {"options.target_scale": [-0.8, -0.9]}, "target_scale must be 0 < low <= high <= 1, got -0.8, -0.9"),
        ("ijepa/smoke", {"options.target_aspect": [0, 1]}, "target_aspect must be 0 < low <= high <= 10, got 0, 1"),
        ("dinov2/smoke", {"options.mask_ratio": [1.5, 2.0]}, "mask_ratio must be 0 < low <= high <= 1, got 1.5, 2"),
        ("dinov2/smoke", {"options.mask_ratio": [0.5, 0.1]}, "mask_ratio must be 0 < low <= high <= 1, got 0.5, 0.1"),
        ("dino/smoke", {"options.prototypes": 5000}, r"200 samples cannot have 5000 prototypes \(options.prototypes=200\)"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused(recipe: str, settings: dict[str, Any], says: str) -> None:
    """Each ended in a traceback, a run without end or weights that are not finite."""

    def read() -> None:
        held = load_recipe(recipe, settings)
        facts = methods.Facts(0, 200, held.global_batch, tuple(held.views.sizes))
        methods.check(held.method, held.options, views=held.views, facts=facts)

    with pytest.raises(RequestError, match=says):
        read()


def test_simclr_takes_views_of_two_sizes() -> None:
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    encoder.num_features = 4  # type: ignore[assignment]
    made = methods.build("simclr", encoder, {}, methods.Facts(seed=5, samples=100, global_batch=4))
    views = [torch.randint(0, 256, (4, 1, side, side)).float() for side in (32, 16)]
    ids = torch.arange(4)
    assert made(Batch(ids, views, None, None, None, ids >= 0, torch.zeros_like(ids))).loss.isfinite()


def test_unknown_method_and_option() -> None:
    encoder = nn.Linear(4, 4)
    encoder.num_features = 4  # type: ignore[assignment]
    facts = methods.Facts(seed=5, samples=100, global_batch=10)
    with pytest.raises(RequestError, match=r"unknown method 'simcrl'.*'simclr'"):
        methods.build("simcrl", encoder, {}, facts)
    with pytest.raises(RequestError, match=r"unknown key 'temprature'.*'temperature'"):
        methods.build("simclr", encoder, {"temprature": 1}, facts)
    with pytest.raises(RequestError, match="needs labels"):
        methods.build("supervised", encoder, {}, facts)
    with pytest.raises(RequestError, match=r"simclr needs views.kind 'two'"):
        methods.check("simclr", {}, views=load_recipe("supervised/smoke").views)
    first, second = (methods.build("simclr", encoder, {}, facts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schema_is_committed(name: str) -> None:
    """To change a format: raise its `schema`, then write what this test prints."""
    assert (ROOT / "docs" / "schemas" / f"{name}.json").read_text() == json.dumps(
        SCHEMAS[name].model_json_schema(by_alias=True), indent=1
    ) + "\n"


def test_golden_files_still_read() -> None:
    assert load(GOLDEN / "recipe.yaml", Recipe).schema_ == 1
    assert load(GOLDEN / "pretrain.yaml", PretrainConfig).schema_ == 1
    result = json.loads((GOLDEN / "pretrain_result.json").read_text())
    assert parse(result, Result, "golden").model_dump(mode="json", by_alias=True) == result
