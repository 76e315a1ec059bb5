"""Runs that end by SIGKILL, change their number of ranks, or compute a step in pieces: the numbers stay those of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pretrain_run import metrics, resumed_at, tree
from tiny_corpus import write
from two_ranks import ROOT, standing_at, two_ranks

from base.config import parse
from base.errors import RequestError
from encoders.build import build
from encoders.weights import load_local
from engine.context import LocalContext
from pretrain import methods
from pretrain.recipe import load_recipe
from pretrain.run import PretrainConfig, run

# What has to survive: nothing but weights, a teacher, a queue, a bank by sample id, clusters of an epoch.
pytestmark = pytest.mark.slow
FAMILIES = {"none": "barlow-twins", "EMA": "byol", "queue": "moco-v2", "bank": "insdis", "clusters": "deepcluster-v2"}
SHORT = {"epochs": 4, "global_batch": 20, "max_steps": 10, "checkpoint_every_steps": 3, "log_every_steps": 1}
ALONE = {"start_from": None, "start_from_sha256": None, "start_from_name": None}


def config(plan: dict[str, Any], out: Path) -> PretrainConfig:
    return parse(plan | {"out": str(out)}, PretrainConfig, "test")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family that ended by SIGKILL after step 8, and the configurations."""
    folder = tmp_path_factory.mktemp("killed")
    shards, files = write(folder / "shards"), [str(folder / f"{family}.json") for family in FAMILIES]
    for file, (family, method) in zip(files, FAMILIES.items(), strict=True):
        plan = tree(method, shards, family, **SHORT) | ALONE | {"out": str(folder / family)}
        Path(file).write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), "8", *files]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [-signal.SIGKILL] * len(FAMILIES), ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_ends_as_an_undisturbed_one(killed: Path, family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plan = json.loads((killed / f"{family}.json").read_text())
    shutil.copytree(killed / family, tmp_path / "killed")
    assert not (tmp_path / "killed" / "result.json").exists()
    whole = run(config(plan, tmp_path / "whole"), LocalContext(dir=str(tmp_path / "a")))
    again = run(config(plan, tmp_path / "killed"), LocalContext(dir=str(tmp_path / "b")))
    assert whole is not None
    assert again is not None
    assert (again["restarts"], again["encoder_sha256"]) == (1, whole["encoder_sha256"])
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert len(resumed_at(tmp_path / "killed")) == 1
    for file in ("model", "optimizer", "rank0"):
        first, other = (
            load_local(tmp_path / kind / "checkpoints" / "step-00000010" / f"{file}.safetensors") for kind in ("whole", "killed")
        )
        assert all(torch.equal(first[key], other[key]) for key in first), file


STATELESS = ("simclr", "barlow-twins", "vicreg")


@pytest.fixture(scope="module")
def at_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stateless methods and every ZeRO stage at two ranks, undisturbed; the stages also from their checkpoints of step 6."""
    folder = tmp_path_factory.mktemp("two")
    shards = write(folder / "shards")
    adamw = {"optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "clip": 1.0}}
    trees = [tree(name, shards, name, **SHORT) | ALONE | {"resumed": False} for name in STATELESS]
    stages = {stage: tree("byol", shards, f"stage{stage}", **SHORT, **adamw, zero_stage=stage) | ALONE for stage in (0, 1, 2, 3)}
    trees += [plan | {"resumed": stage > 0} for stage, plan in stages.items()]
    clusters = [tree("swav", shards, f"swav{stage}", **SHORT, **adamw, zero_stage=stage) | ALONE for stage in (0, 1, 3)]
    trees += [plan | {"resumed": plan["name"] != "swav0"} for plan in clusters]
    (folder / "configs.json").write_text(json.dumps(trees))
    two_ranks("resumed", folder, timeout=400)
    return folder


def plans(at_two: Path) -> dict[str, dict[str, Any]]:
    """Of the stateless methods, as they ran at two ranks."""
    trees = {one["name"]: one for one in json.loads((at_two / "configs.json").read_text())}
    return {name: {key: value for key, value in trees[name].items() if key != "resumed"} for name in STATELESS}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_alike_and_resumes_bit_identical(at_two: Path, stage: int) -> None:
    assert resumed_at(at_two / f"cut-stage{stage}") == [6]
    assert metrics(at_two / f"whole-stage{stage}") == metrics(at_two / f"cut-stage{stage}")
    names = [str(at_two / f"{kind}-stage{stage}" / "checkpoints" / "step-00000010") for kind in ("whole", "cut")]
    for file in ("model", "optimizer", "ema"):
        first, other = (load_local(f"{name}/{file}.safetensors") for name in names)
        assert all(torch.equal(first[key], other[key]) for key in first), file
    # Adam divides gradients by their size, and so blows rounding up: only the first steps can agree.
    plain, cut_up = ([row["loss"] for row in metrics(at_two / f"whole-stage{kind}")][:4] for kind in (0, stage))
    assert cut_up == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_in_pieces_as_it_does_whole(method: str, tmp_path: Path) -> None:
    """ZeRO 3, whose weights have no shape outside of a layer's own pass."""
    torch.set_num_threads(1)
    shards = write(tmp_path / "shards")
    adamw = {"optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01}}
    short = SHORT | {"max_steps": 2, "checkpoint_every_steps": 0}
    for stage in (0, 3):
        plan = tree(method, shards, method, **short, **adamw, zero_stage=stage) | ALONE | {"earlier": []}
        plan |= {"architecture": "test_vit"} if methods.method_class(method).only == "vit" else {}
        assert run(config(plan, tmp_path / f"stage{stage}"), LocalContext(dir=str(tmp_path))) is not None
    whole, cut_up = ([row["loss"] for row in metrics(tmp_path / f"stage{stage}")] for stage in (0, 3))
    assert cut_up == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_prototypes_keep_their_length_at_every_zero_stage(at_two: Path, stage: int) -> None:
    """Above stage 0 they grew, losses left those of stage 0 from the third step on, and a resume went on from other prototypes."""
    last = [at_two / f"{kind}-swav{stage}" / "checkpoints" / "step-00000010" / "model.safetensors" for kind in ("whole", "cut")]
    first, other = (load_local(str(place)) for place in last)
    assert all(torch.equal(first[key], other[key]) for key in first)
    torch.testing.assert_close(first["prototypes.weight"].norm(dim=1), torch.ones(len(first["prototypes.weight"])))
    plain, cut_up = ([row["loss"] for row in metrics(at_two / f"whole-swav{kind}")][:4] for kind in (0, stage))
    assert cut_up == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", STATELESS)
def test_from_two_ranks_to_one(at_two: Path, name: str, tmp_path: Path) -> None:
    """The loss curve goes on within 1e-4: the same samples in the same views."""
    torch.set_num_threads(1)
    standing_at(at_two / f"whole-{name}", tmp_path / "out", 6)
    assert run(config(plans(at_two)[name], tmp_path / "out"), LocalContext(dir=str(tmp_path))) is not None
    assert resumed_at(tmp_path / "out") == [6]
    expected = [row["loss"] for row in metrics(at_two / f"whole-{name}")]
    assert [row["loss"] for row in metrics(tmp_path / "out")] == pytest.approx(expected, rel=1e-4)


def test_from_one_rank_to_two(at_two: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, plan in plans(at_two).items():
        assert run(config(plan, tmp_path / f"one-{name}"), LocalContext(dir=str(tmp_path / "log"))) is not None
        standing_at(tmp_path / f"one-{name}", tmp_path / f"whole-{name}", 6)
    (tmp_path / "configs.json").write_text(json.dumps([plan | {"resumed": False} for plan in plans(at_two).values()]))
    two_ranks("resumed", tmp_path, timeout=200)
    for name in STATELESS:
        assert resumed_at(tmp_path / f"whole-{name}") == [6]
        expected = [row["loss"] for row in metrics(tmp_path / f"one-{name}")]
        assert [row["loss"] for row in metrics(tmp_path / f"whole-{name}")] == pytest.approx(expected, rel=1e-4)


def losses(tmp_path: Path, shards: str, name: str, method: str, **settings: Any) -> list[float]:
    plan = (
        tree(method, shards, name, **{**SHORT, "max_steps": 3, "checkpoint_every_steps": 0, **settings})
        | ALONE
        | {"architecture": "test_vit"}
    )
    assert run(config(plan, tmp_path / name), LocalContext(dir=str(tmp_path / f"log-{name}"))) is not None
    return [row["loss"] for row in metrics(tmp_path / name)]


def test_micro_batches_chunks_and_checkpointed_activations_give_the_same_step(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shards = write(tmp_path / "shards")
    whole = losses(tmp_path, shards, "whole", "mae")
    assert losses(tmp_path, shards, "accumulated", "mae", accumulate=4) == pytest.approx(whole, rel=1e-5)
    assert losses(tmp_path, shards, "checkpointed", "mae", activation_checkpointing=True) == pytest.approx(whole, rel=1e-5)
    contrast = losses(tmp_path, shards, "contrast", "simclr")
    assert losses(tmp_path, shards, "virtual", "simclr", virtual_batch=6) == pytest.approx(contrast, rel=1e-5)
    assert losses(tmp_path, shards, "parts", "simclr", accumulate=2) != pytest.approx(contrast, rel=1e-2)  # fewer negatives: not the same


def test_a_virtual_batch_keeps_a_chunk_and_gives_the_exact_gradient() -> None:
    """All of 48 images contrasted with one another, 8 of them in memory at a time."""
    torch.manual_seed(0)
    batch = SimpleNamespace(views=[torch.randint(0, 256, (48, 1, 32, 32), dtype=torch.uint8) for _ in range(2)])
    found: dict[int | None, tuple[int, torch.Tensor]] = {}
    for chunk in (None, 8):
        encoder = build("test_vit", 1, seed=0, image_size=32)
        method = methods.build("simclr", encoder, {}, methods.Facts(seed=0, samples=100, global_batch=48))
        method.chunk = chunk
        saved: list[int] = []

        def keep(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = method(batch)
        held = sum(saved)
        output.loss.backward()
        found[chunk] = held, torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    (whole, expected), (chunked, gradient) = found[None], found[8]
    assert chunked < 0.2 * whole
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("setting", ["virtual_batch", "activation_checkpointing"])
def test_what_batch_norm_would_make_inexact_is_refused(setting: str, tmp_path: Path) -> None:
    plan = tree("simclr", write(tmp_path / "shards"), "refused", **{setting: 4 if setting == "virtual_batch" else True})
    with pytest.raises(RequestError, match=rf"{setting} is exact only without batch norm, and test_resnet has it"):
        run(config(plan, tmp_path / "out"), LocalContext(dir=str(tmp_path)))


def test_rates_by_layer_and_decay_over_time() -> None:
    from engine import optimizers, schedules
    from engine.config import OptimizerConfig

    encoder = build("test_vit", 1, seed=0, image_size=32)
    method = methods.build("simclr", encoder, load_recipe("simclr/smoke").options, methods.Facts(seed=0, samples=100, global_batch=20))
    made = optimizers.make(method, OptimizerConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    scale = {id(p): group["lr_scale"] for group in made.param_groups for p in group["params"]}
    named = {name: scale[id(p)] for name, p in method.named_parameters()}
    assert named["head.layers.0.weight"] == 1
    assert named["encoder.net.blocks.5.mlp.fc1.weight"] == named["encoder.net.norm.weight"] == 0.5
    assert named["encoder.net.blocks.0.mlp.fc1.weight"] == 0.5**6
    assert named["encoder.net.pos_embed"] == named["encoder.net.patch_embed.proj.weight"] == 0.5**7
    assert schedules.decayed(0.04, 0.4, 0, 100) == pytest.approx(0.04)
    assert schedules.decayed(0.04, 0.4, 99, 100) == pytest.approx(0.4)
    assert schedules.decayed(0.04, None, 50, 100) == 0.04
    plateau = schedules.Plateau(patience=2, gamma=0.1)
    for loss in (3.0, 2.0, 2.5, 2.4, 2.3, 2.2):
        plateau.observe(loss)
    assert plateau.state == [2.0, 0.0, pytest.approx(0.01)]
    assert [schedules.factor(step, 10, 0, "step", milestones=(0.5, 0.8)) for step in (4, 5, 8)] == pytest.approx([1, 0.1, 0.01])


def test_lars_and_lamb_are_the_papers_equations() -> None:
    from engine.optimizers import LAMB, LARS

    torch.manual_seed(0)
    w, g = torch.randn(5, 4), [torch.randn(5, 4) for _ in range(3)]
    weight = torch.nn.Parameter(w.clone())
    lars = LARS([{"params": [weight], "weight_decay": 0.1}], lr=0.5, momentum=0.9)
    reference, v = w.clone().double(), torch.zeros(5, 4).double()
    for grad in g:
        weight.grad = grad.clone()
        lars.step()
        d = grad.double()
        v = 0.9 * v + 1e-3 * reference.norm() / (d.norm() + 0.1 * reference.norm() + 1e-8) * (d + 0.1 * reference)
        reference = reference - 0.5 * v
    torch.testing.assert_close(weight.detach().double(), reference, rtol=1e-5, atol=1e-6)
    weight = torch.nn.Parameter(w.clone())
    lamb = LAMB([{"params": [weight], "weight_decay": 0.1}], lr=0.05)
    reference, m, s = w.clone().double(), torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    for t, grad in enumerate(g, 1):
        weight.grad = grad.clone()
        lamb.step()
        d = grad.double()
        m, s = 0.9 * m + 0.1 * d, 0.999 * s + 0.001 * d * d
        u = (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-6) + 0.1 * reference
        reference = reference - 0.05 * reference.norm() / u.norm() * u
    torch.testing.assert_close(weight.detach().double(), reference, rtol=1e-5, atol=1e-6)
