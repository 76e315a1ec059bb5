"""Networks as they are used and not trained, for as long as somebody looks.

with evaluating(encoder): ...          # evaluation mode, no gradients, all as before afterwards
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(module: Callable[..., Any]) -> Iterator[None]:
    """Evaluation mode and no gradients; each part goes back to the mode that it was in."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        with torch.inference_mode():
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
