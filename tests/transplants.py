"""For tests of strategies: each on a source that has trained, and steps: `train(planted("lwft", CHEST)[0], CHEST, wrapped=True)`."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.build import build
from engine import ranks
from finetune.strategies import resolve
from finetune.task import Task, load_task
from finetune.transplant import EncoderSpec, Transplant

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
    "transfusion vit stem": ("vit", {"cut": "stem"}),
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
    "lwft vit stem": ("vit", {"cut": "stem"}),
    "truncated": ("resnet", {"cut": "layer2"}),
    "truncated flat": ("resnet", {"cut": "layer2", "head": "flat"}),
    "truncated vit": ("vit", {"cut": "block3"}),
    "truncated vit stem": ("vit", {"cut": "stem"}),
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


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
