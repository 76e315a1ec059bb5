"""What is said of a run before it starts: against figures known from elsewhere, against a real step, and for every method."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import nn
from two_ranks import make_method

from base.errors import RequestError
from cluster.progress import _describe
from encoders.build import build
from engine import gpus, ranks
from engine.throughput import Meter
from engine.work import Work, pretend
from pretrain import methods
from pretrain.explain import STATES, Explained, cost, explain, least_step
from pretrain.recipe import Recipe, load_recipe
from shards.batches import Batch

IMAGENET = 1_281_167


def gone_through(make: Callable[[], nn.Module], side: int, images: int = 8) -> tuple[Work, int]:
    """What a bf16 step of a network on colour images takes, and the operations of its forward pass."""
    with torch.device("meta"):
        net = make()
    with pretend() as work:
        net.to_empty(device="cpu")
        with torch.autocast("cpu", torch.bfloat16), work.keeping(net):
            loss = net(torch.empty(images, 3, side, side)).sum()
        forward = work.flops
        loss.backward()
    return work, forward // images


@pytest.mark.parametrize(
    ("architecture", "side", "forward", "both"),
    [
        ("resnet50", 224, 8.17, 24.3),
        ("resnet50", 96, 1.50, 4.46),
        ("vit_small_patch16_224", 224, 9.20, 27.5),
        ("vit_base_patch16_224", 224, 35.1, 105.2),
        ("vit_large_patch16_224", 224, 123.1, 369.0),
    ],
)
def test_operations_are_those_that_are_known(architecture: str, side: int, forward: float, both: float) -> None:
    work, found = gone_through(lambda: build(architecture, 3), side, images=2)
    assert found / 1e9 == pytest.approx(forward, rel=2e-3)
    assert work.flops / 2e9 == pytest.approx(both, rel=2e-3)


def test_traffic_is_about_the_known_one() -> None:
    """409 MB an image; that count leaves out some small operations."""
    work, _ = gone_through(lambda: build("resnet50", 3), 224, images=256)
    assert work.moved / 256e6 == pytest.approx(409, rel=0.05)


@pytest.mark.parametrize(("architecture", "forward"), [("convnext_tiny", 8.9), ("resnext50_32x4d", 8.5)])
def test_grouped_convolutions_backward_are_twice_the_forward_pass(architecture: str, forward: float) -> None:
    """torch's counter says 77 GFLOP for ConvNeXt-T."""
    work, found = gone_through(lambda: timm.create_model(architecture, num_classes=0), 224, images=2)
    assert found / 1e9 == pytest.approx(forward, rel=0.01)
    assert work.flops / (2 * found) == pytest.approx(3, rel=0.02)


def test_one_grouped_convolution_by_hand() -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
    with pretend() as work:
        conv(torch.empty(2, 8, 10, 10, requires_grad=True)).sum().backward()
    assert work.flops == 3 * (2 * 2 * 16 * 10 * 10 * (8 // 4) * 9)


def sides(recipe: Recipe, images: int, channels: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    views = [torch.randint(256, (images, channels, side, side), generator=random, dtype=torch.uint8) for side in recipe.views.sizes]
    known_BL, ids = torch.ones(images, 3), torch.arange(images)
    return Batch(ids, views, known_BL, known_BL, None, ids >= 0, torch.zeros_like(ids))


def memory_after_forward(method: methods.Method, batch: Batch) -> int:
    """Bytes that a real forward pass leaves allocated, by torch's allocator, with the gradient graph alive."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = method(batch).loss
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("name", ["simclr", "byol", "swav", "mae", "dinov2"])
def test_activations_are_those_of_a_real_step(name: str) -> None:
    torch.set_num_threads(1)
    recipe, images = load_recipe(f"{name}/smoke"), 32
    method, _ = real_method(name, recipe, images)
    measured = memory_after_forward(method, sides(recipe, images, 1))
    sketched, _ = real_method(name, recipe, images, device="meta")
    found = cost(recipe, sketched, 1, 1).memory.activations - sum(images * side**2 for side in recipe.views.sizes)
    assert found == pytest.approx(measured, rel=0.1)


def real_method(name: str, recipe: Recipe, images: int, device: str = "cpu") -> tuple[methods.Method, methods.Facts]:
    sizes = tuple(recipe.views.sizes)
    facts = methods.Facts(seed=0, samples=96, global_batch=images, sizes=sizes)
    with torch.device(device):
        encoder = build("test_vit" if methods.method_class(name).only == "vit" else "resnet18", 1, image_size=sizes[0])
        return methods.build(name, encoder, recipe.options, facts).train(), facts


def test_operations_of_a_step_are_those_of_torchs_counter_where_that_is_right() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    recipe = load_recipe("simclr/smoke", {"global_batch": 8})
    method, _ = real_method("simclr", recipe, 8)
    with FlopCounterMode(display=False) as counter:
        method(sides(recipe, 8, 1)).loss.backward()
    sketched, _ = real_method("simclr", recipe, 8, device="meta")
    assert cost(recipe, sketched, 1, 1).flops == counter.get_total_flops()


@cache
def of_paper(name: str) -> Explained:
    """The paper's preset on ImageNet with 16 GPUs."""
    vit = methods.method_class(name).only == "vit" or name == "dino"
    return explain(load_recipe(f"{name}/paper"), "vit_base_patch16_224" if vit else "resnet50", images=IMAGENET, channels=3, gpu_count=16)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_methods_paper_preset_is_explained(name: str) -> None:
    vit = methods.method_class(name).only == "vit" or name == "dino"
    found = of_paper(name)
    assert found.cost.flops / found.cost.images > (8e9 if vit else 24e9)
    assert found.cost.memory.optimizer == STATES[found.recipe.optimizer.name] * found.cost.memory.weights
    assert 1e6 < found.cost.memory.activations / found.cost.images < 1e9
    assert 0.05 < found.least_hours(gpus.get("h100-sxm")) < 100
    assert (found.cost.memory.teachers > 0) == bool(make_method(name)[0].teachers)


@pytest.mark.parametrize(
    ("name", "gflop"),  # of a source image, from the papers' views
    [
        ("insdis", 24.3),
        ("moco-v1", 32.5),
        ("pcl-v1", 32.5),
        ("pirl", 42.1),
        ("sela-v2", 42.6),
        ("simclr", 48.6),
        ("infomin", 50.4),
        ("byol", 65.0),
        ("swav", 75.3),
    ],
)
def test_operations_of_the_benchmarks_methods_are_those_that_are_known(name: str, gflop: float) -> None:
    found = of_paper(name)
    assert found.cost.flops / found.cost.images / 1e9 == pytest.approx(gflop, rel=0.01)
    assert found.cost.embed_flops / 1e9 == pytest.approx(8.17 if name == "pcl-v1" else 0, rel=0.01)


def simclr(architecture: str = "test_resnet", gpu_count: int = 1, **settings: Any) -> Explained:
    return explain(load_recipe("simclr/smoke", settings), architecture, images=500, channels=1, gpu_count=gpu_count)


def test_gpus_share_the_batch_and_the_states() -> None:
    one, four = simclr(), simclr(gpu_count=4)
    assert (one.cost.images, four.cost.images) == (32, 8)
    assert four.cost.memory.activations < one.cost.memory.activations / 3
    assert four.cost.memory.optimizer == one.cost.memory.optimizer == 2 * one.cost.memory.weights
    cut = [simclr(gpu_count=4, zero_stage=stage).cost.memory for stage in (1, 2, 3)]
    whole = four.cost.memory
    assert [memory.optimizer for memory in cut] == [whole.optimizer // 4] * 3
    assert [memory.gradients for memory in cut] == [whole.gradients, whole.gradients // 4, whole.gradients // 4]
    assert [memory.weights for memory in cut] == [whole.weights, whole.weights, whole.weights // 4]


@pytest.mark.parametrize("settings", [{"virtual_batch": 8}, {"activation_checkpointing": True}])
def test_memory_is_bought_with_operations(settings: dict[str, Any]) -> None:
    plain, thrifty = (simclr("test_vit", **more) for more in ({}, settings))
    assert thrifty.cost.memory.activations < 0.6 * plain.cost.memory.activations
    assert 1.2 < thrifty.cost.flops / plain.cost.flops < 1.35


def test_accumulation_keeps_the_operations_and_cuts_the_activations() -> None:
    plain, cut = simclr(), simclr(accumulate=4)
    assert cut.cost.memory.activations < plain.cost.memory.activations / 3
    assert cut.cost.flops == pytest.approx(plain.cost.flops, rel=0.01)


def test_what_a_run_would_refuse_is_refused() -> None:
    with pytest.raises(RequestError, match="does not divide"):
        simclr(gpu_count=3)
    with pytest.raises(RequestError, match="without batch norm"):
        simclr(virtual_batch=8)
    with pytest.raises(RequestError, match="500 images"):
        simclr(global_batch=512)
    with pytest.raises(RequestError, match="vision transformer"):
        explain(load_recipe("mae/smoke"), "resnet18", images=500, channels=1, gpu_count=1)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_devices_are_found_by_the_name_that_torch_gives_them(device: str, name: str | None) -> None:
    assert gpus.find(device) == (gpus.GPUS[name] if name else None)


def test_the_roofline_is_the_slower_of_the_two() -> None:
    gpu = gpus.get("h100-sxm")
    assert gpus.least_seconds(gpu, "bf16", 989.4e12, 1) == pytest.approx(1)
    assert gpus.least_seconds(gpu, "bf16", 1, 3.35e12) == pytest.approx(1)
    assert gpus.least_seconds(gpu, "fp32", 66.9e12, 1) == pytest.approx(1)


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="rtx4090"):
        gpus.get("rtx-4090")
    with pytest.raises(RequestError, match="h100-sxm, h100-pcie"):
        gpus.get("h100")


def test_the_share_of_the_roofline_is_the_least_time_over_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(8, least=0.25)
    meter.tick()
    meter.tick()
    assert meter.read() == {"img_per_s": 16.0, "s_per_step": 0.5, "data_wait": 0.0, "roofline": 0.5}


def test_the_least_time_of_a_run_is_that_of_its_explanation() -> None:
    found, h200 = simclr(), gpus.get("h200")
    facts = methods.Facts(seed=0, samples=500, global_batch=32, sizes=(32, 32))
    expected = gpus.least_seconds(h200, "fp32", found.cost.flops, found.cost.moved)
    assert least_step(h200, found.recipe, "test_resnet", 1, facts, found.epoch_steps, 1) == expected
    assert gpus.find("NVIDIA H200") == h200
    assert gpus.find("GeForce 256") is None


def test_the_share_of_the_roofline_is_on_the_progress_line_where_it_is_known() -> None:
    row = {"step": 1, "loss": 1.0, "img_per_s": 10.0}
    assert "| roofline 52% |" in _describe(row | {"roofline": 0.52, "data_wait": 0.1})
    assert "roofline" not in _describe(row)


def test_a_step_is_gone_through_without_the_other_ranks() -> None:
    """In a run of several processes that has not finished starting: a collective would wait for ever."""
    code = (
        "import torch.distributed as dist\n"
        "from pretrain.explain import explain\n"
        "from pretrain.recipe import load_recipe\n"
        "from engine import ranks\n"
        "dist.init_process_group('fake', rank=0, world_size=2, store=dist.HashStore())\n"
        "dist.all_gather = dist.all_reduce = None\n"
        "assert ranks.world() == 2\n"
        "explain(load_recipe('simclr/smoke'), 'test_resnet', images=500, channels=1, gpu_count=2)\n"
        "assert ranks.world() == 2"
    )
    code = "import torch.testing._internal.distributed.fake_pg\n" + code
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": "."})
    assert ranks.world() == 1
