"""SimCLR and its version 2 against NumPy: the heads layer by layer, the loss pair by pair."""

import math

import numpy as np
import pytest
import torch
from test_losses_memory import batch, numpy_of, unit
from two_ranks import TinyEncoder

from pretrain import methods

EPS = 1e-5  # of batch norm


def head(method: methods.Method, h: np.ndarray, layers: int) -> np.ndarray:
    """Linear layers without bias, each with a batch norm of this batch, and ReLU between them (SimCLR v2, official code)."""
    assert isinstance(method.head, torch.nn.Module)
    state = {name: numpy_of(value) for name, value in method.head.state_dict().items() if "running" not in name and "num" not in name}
    names = [name.removesuffix(".weight") for name, value in state.items() if value.ndim == 2]
    assert len(names) == layers
    assert len(state) == 3 * layers
    for i, name in enumerate(names):
        place = int(name.split(".")[1]) + 1
        h = h @ state[f"{name}.weight"].T
        h = (h - h.mean(0)) / np.sqrt(h.var(0) + EPS) * state[f"layers.{place}.weight"] + state[f"layers.{place}.bias"]
        h = np.maximum(h, 0) if i < layers - 1 else h
    return h


@pytest.mark.parametrize(("name", "layers"), [("simclr", 2), ("simclr-v2", 3)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_against_numpy(name: str, layers: int, temperature: float) -> None:
    """Equation 1: the other view of an image against all 2B - 1 other views, for each of the 2B views."""
    torch.manual_seed(0)
    facts = methods.Facts(seed=3, samples=40, global_batch=8)
    method = methods.build(name, TinyEncoder(), {"temperature": temperature, "hidden_dim": 10, "output_dim": 6}, facts).train()
    assert isinstance(method.head, torch.nn.Module)
    given = batch("simclr")
    with torch.no_grad():
        for layer in method.head.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):  # scale and shift that are not 1 and 0
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
    output = method(given)
    z = unit(head(method, numpy_of(method.encoder(torch.cat(given.views))), layers))
    count = len(z) // 2
    terms = []
    for i in range(2 * count):
        others = [math.exp(z[i] @ z[k] / temperature) for k in range(2 * count) if k != i]
        terms.append(-math.log(math.exp(z[i] @ z[(i + count) % (2 * count)] / temperature) / sum(others)))
    assert len(others) == 2 * count - 1
    assert float(output.loss.detach()) == pytest.approx(np.mean(terms), rel=1e-5)
    assert method.chance_loss(count) == pytest.approx(math.log(2 * count - 1))
