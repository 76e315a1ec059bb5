"""Networks that follow another: momentum encoders and teachers, in float32 under every precision and ZeRO stage.

    teacher = follower(student)                      # before the engine: a whole float32 copy that no optimiser sees
    follow(teacher, student, momentum=0.996)         # after an update: teacher = momentum * teacher + (1 - momentum) * student

A copy in bf16 would not move: at a momentum of 0.999 its steps are below that format's spacing. Batch-norm statistics are not averaged: a
follower in training mode keeps its own, of what it sees, as the official codes do.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine import ranks


def follower(network: nn.Module) -> nn.Module:
    """A float32 copy without gradients. It belongs outside of the module that the engine trains, or ZeRO 3 would cut it in pieces."""
    return copy.deepcopy(network).float().requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher towards the student's by 1 - momentum. All ranks call; all do the same."""
    theirs = list(student.parameters())
    with whole(theirs):
        torch._foreach_lerp_([p.data for p in teacher.parameters()], [p.detach().float() for p in theirs], 1.0 - momentum)


@torch.no_grad()
def lag(teacher: nn.Module, student: nn.Module) -> float:
    """Distance between the largest parameters of the two in units of the student's norm: 0 when equal. All ranks call.

    Of that one alone, as `moved`: all of a ResNet-18's cost eight updates of its teacher.
    """
    at = largest(teacher)
    theirs = list(student.parameters())[at]
    with whole([theirs]):
        now = theirs.detach().float()
        return float((list(teacher.parameters())[at].data - now).norm() / now.norm().clamp_min(1e-12))


def largest(network: nn.Module) -> int:
    """Number of the parameter that has the most numbers."""
    return max(enumerate(network.parameters()), key=lambda pair: pair[1].numel())[0]


BF16_SPACING = 2.0**-8
PIECE = 2**16  # numbers


@torch.no_grad()
def moved(before: Tensor, teacher: nn.Module, student: nn.Module) -> float:
    """Share of the numbers of the teacher's largest parameter that differ from `before`, among those where the student's do by more than
    bf16 resolves; 1 where none do.

    About 1 in float32; a teacher that is stored in bf16 stands still. All ranks call.
    """
    at = largest(teacher)
    theirs = list(student.parameters())[at]
    ahead, changed = list[Tensor](), list[Tensor]()
    with whole([theirs]):
        now = list(teacher.parameters())[at].data
        # In pieces that stay in the cache: whole, the temporaries of a ResNet-18's took as long as five updates of its teacher.
        rows = max(1, PIECE * len(now) // now.numel())
        for was, has, aims in zip(before.split(rows), now.split(rows), theirs.detach().to(before.device).split(rows), strict=True):
            apart = (aims - was).abs() > BF16_SPACING * was.abs()
            ahead.append(apart.sum())
            changed.append(((has != was) & apart).sum())
    count = float(torch.stack(ahead).sum())
    return float(torch.stack(changed).sum()) / count if count else 1.0


@contextmanager
def whole(parameters: list[nn.Parameter] | list[Tensor]) -> Iterator[None]:
    """At ZeRO 3 parameters lie in pieces on all ranks: inside, they are whole on each."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    with ranks.import_deepspeed().zero.GatheredParameters(parameters):
        yield
