"""States of the optimiser under DeepSpeed's ZeRO stages 1 to 3, whole and by name, so that one kind of checkpoint serves every stage.

    tensors = gather(module, zero)             # `<slot>|<parameter>` on the CPU, the same on every rank
    scatter(module, zero, tensors)             # into a fresh engine, at any stage and number of ranks
    change(parameter, F.normalize)             # after an update, at any stage, stage 0 too

DeepSpeed's own files are pickles, at stages 1 and 2 need a conversion for another number of ranks, and then lose the buffers of batch norm.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import ranks

State = dict[str, Tensor]


def gather(module: nn.Module, zero: Any) -> State:
    """Whole tensors of every parameter's slots, counters included, named as stage 0 names them. All ranks call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    shown: dict[str, Any] = next(iter(zero.optimizer.state.values()), {})
    tensor_slots = [slot for slot, value in shown.items() if isinstance(value, Tensor) and value.ndim]
    counters = {slot: value for slot, value in shown.items() if slot not in tensor_slots}
    if tensor_slots:
        _link(zero)
    tensors: State = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            for slot in tensor_slots:
                tensors[f"{slot}|{name}"] = safe_get_full_optimizer_state(parameter, slot).detach().cpu().clone().contiguous()
            for slot, count in counters.items():
                tensors[f"{slot}|{name}"] = torch.as_tensor(count, dtype=torch.float32).cpu().clone()
    return tensors


def scatter(module: nn.Module, zero: Any, tensors: State) -> None:
    """Inverse of `gather`, into an engine whose parameters already are those of the checkpoint."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    counted = {key.partition("|")[0]: value for key, value in tensors.items() if value.ndim == 0}
    slots = [slot for slot in dict.fromkeys(key.partition("|")[0] for key in tensors) if slot not in counted]
    if not slots:
        return
    flats = getattr(zero, "fp32_partitioned_groups_flat", None) or [p for group in zero.optimizer.param_groups for p in group["params"]]
    for flat in flats:
        counters = {slot: value.clone().to(flat.device) for slot, value in counted.items()}
        zero.optimizer.state[flat] = {slot: torch.zeros_like(flat) for slot in slots} | counters
    _link(zero)
    for name, parameter in module.named_parameters():
        for slot in slots if parameter.requires_grad else ():
            value = tensors[f"{slot}|{name}"].to(parameter.device)
            if hasattr(parameter, "ds_id"):
                part: Any = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                padded = F.pad(value.flatten(), (0, part * ranks.world() - value.numel()))
                safe_set_local_optimizer_state(parameter, padded.narrow(0, part * ranks.rank(), part), slot)
            else:
                safe_set_full_optimizer_state(parameter, value, slot)


@torch.no_grad()
def change(parameter: nn.Parameter, how: Callable[[Tensor], Tensor]) -> None:
    """Set a parameter to a function of itself, and the optimiser's own copy, which the next update would bring back. All ranks call."""
    deepspeed = ranks.import_deepspeed()
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            value = how(parameter.detach())
            parameter.copy_(value)
    else:
        value = how(parameter.detach())
        parameter.copy_(value)
    deepspeed.utils.safe_set_full_fp32_param(parameter, value)


def _link(zero: Any) -> None:
    # Stages 1 and 2 map a parameter to its piece of the states only when they are asked, and forget states that came later.
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
