"""Learning rate as a pure function of the step, so that a resumed run needs no state of a scheduler; `Plateau` alone has one."""

import math
from typing import Literal

Shape = Literal["cosine", "constant", "linear", "step", "plateau"]


def factor(
    step: int, total: int, warmup: int, shape: Shape = "cosine", final: float = 0.0, milestones: tuple[float, ...] = (), gamma: float = 0.1
) -> float:
    """Share of the base rate at `step` (0 is the first update).

    Linear warm-up over `warmup` steps (the first update already moves: (step + 1) / warmup), then from 1 to `final`, reached at the
    last step; half a cosine as in SGDR without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983). `step`: times gamma after each
    milestone, a share of the total. `plateau`: 1; what it has come down to is the scheduler's state.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape in ("constant", "plateau"):
        return 1.0
    if shape == "step":
        return gamma ** sum(step >= share * total for share in milestones)
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if shape == "linear":
        return 1.0 + (final - 1.0) * progress
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decayed(start: float, end: float | None, step: int, total: int) -> float:
    """Weight decay at `step`: from start to end along half a cosine (DINO, arXiv 2104.14294), or start throughout."""
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, total - 1))))


class Plateau:
    """Multiplies the rate by gamma when the mean loss of an epoch has not been better for `patience` epochs.

    state: [best loss so far, epochs since, factor of the rate]; a checkpoint keeps it.
    """

    def __init__(self, patience: int, gamma: float) -> None:
        self.patience, self.gamma = patience, gamma
        self.state = [math.inf, 0.0, 1.0]

    def observe(self, loss: float) -> None:
        """An epoch has ended with that mean training loss."""
        best, waited, scale = self.state
        waited = 0.0 if loss < best else waited + 1.0
        if waited >= self.patience:
            waited, scale = 0.0, scale * self.gamma
        self.state = [min(best, loss), waited, scale]
