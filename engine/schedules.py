"""Learning rate as a pure function of the step, so that a resumed run needs no state of a scheduler."""

import math
from typing import Literal

Shape = Literal["cosine", "constant", "linear"]


def factor(step: int, total: int, warmup: int, shape: Shape = "cosine", final: float = 0.0) -> float:
    """Share of the base rate at `step` (0 is the first update).

    Linear warm-up over `warmup` steps (the first update already moves: (step + 1) / warmup), then from 1 to `final`, reached at the
    last step; half a cosine as in SGDR without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983).
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    if shape == "linear":
        return 1.0 + (final - 1.0) * progress
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
