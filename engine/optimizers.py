"""Optimisers and their parameter groups.

    optimizer = make(method, OptimizerConfig(name="lars", lr=4.8, weight_decay=1e-6))
    for group in optimizer.param_groups: group["lr"] = rate * group["lr_scale"]

AdamW (fused) and SGD are torch's. LARS and LAMB are here in torch's foreach form: one kernel for all tensors instead of several for each.
Both take norms per tensor, so they need ZeRO stage 0: above it they would be given flat pieces, and be silently wrong.

Groups: weights with decay, biases and norms (everything of at most one dimension) without, and each of these once a depth where the rate
decays with depth (Clark et al. 2020, arXiv 2003.10555; BEiT, arXiv 2106.08254): heads at the full rate, the last cut of the encoder at
`layer_decay` times it, the cut before at its square, and so on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from encoders.cuts import depths
from engine.config import OptimizerConfig

TRUST, LARS_EPS, LAMB_EPS = 1e-3, 1e-8, 1e-6


class _Foreach(torch.optim.Optimizer):
    """Base of optimisers that update all tensors of a group at once."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that stand."""
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _slots(self, name: str, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


class LARS(_Foreach):
    """SGD with momentum whose step is scaled to each tensor's norm (You et al. 2017, arXiv 1708.03888).

        step = 0.001 * |w| / (|g| + decay * |w|) * (g + decay * w);   v = momentum * v + step;   w = w - lr * v

    As in SimCLR and BYOL, groups without weight decay (biases, norms) take the plain gradient.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        decay = group["weight_decay"]
        if decay:
            weight_norm, grad_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
            scale = TRUST * weight_norm / (grad_norm + decay * weight_norm + LARS_EPS)
            scale = torch.where((weight_norm > 0) & (grad_norm > 0), scale, torch.ones_like(scale))
            grads = list(torch._foreach_add(grads, params, alpha=decay))
            torch._foreach_mul_(grads, list(scale.unbind()))
        velocity = self._slots("momentum_buffer", params)
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, grads)
        torch._foreach_add_(params, velocity, alpha=-group["lr"])


class LAMB(_Foreach):
    """AdamW whose step is scaled to each tensor's norm (You et al. 2020, arXiv 1904.00962, algorithm 2), with Adam's bias correction.

        u = m_hat / (sqrt(v_hat) + eps) + decay * w;   w = w - lr * |w| / |u| * u

    Groups without weight decay take the step unscaled.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        first, second = group["betas"]
        means, squares = self._slots("exp_avg", params), self._slots("exp_avg_sq", params)
        for p in params:  # a plain number: it needs no device, and a checkpoint keeps it in JSON
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        count = self.state[params[0]]["step"]
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, 1 - second)
        spread = torch._foreach_sqrt(squares)
        torch._foreach_div_(spread, (1 - second**count) ** 0.5)
        torch._foreach_add_(spread, LAMB_EPS)
        step = torch._foreach_div(means, spread)
        torch._foreach_div_(step, 1 - first**count)
        if group["weight_decay"]:
            torch._foreach_add_(step, params, alpha=group["weight_decay"])
            weight_norm, step_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(step))
            scale = torch.where((weight_norm > 0) & (step_norm > 0), weight_norm / step_norm, torch.ones_like(step_norm))
            torch._foreach_mul_(step, list(scale.unbind()))
        torch._foreach_add_(params, step, alpha=-group["lr"])


def groups(module: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with `weight_decay` and `lr_scale`; see the module's header.

    Raises:
        RequestError: `layer_decay` for a module without `encoder`, or of an unknown architecture.
    """
    scales = dict(_scales(module, layer_decay)) if layer_decay is not None else {}
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = (scales.get(name, 1.0), weight_decay if parameter.ndim > 1 else 0.0)
            kinds.setdefault(kind, []).append(parameter)
    return [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in kinds.items()]


def _scales(module: nn.Module, layer_decay: float) -> Iterator[tuple[str, float]]:
    encoder: Any = module.encoder
    depth = depths(encoder.architecture, encoder.net)
    for name, at in depth.items():
        yield f"encoder.net.{name}", layer_decay ** (len(encoder.cuts) - at)


def make(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over the module's trained parameters."""
    found = groups(module, config.weight_decay, config.layer_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(found, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(found, lr=config.lr, momentum=config.momentum)
    if config.name == "lamb":
        return LAMB(found, lr=config.lr, betas=config.betas)
    return LARS(found, lr=config.lr, momentum=config.momentum)
