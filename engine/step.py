"""One training step as a DeepSpeed engine: gradients averaged over ranks, clipped, applied at a rate that is a function of the step.

    engine = Engine(method, config, rank_batch=32, total_steps=1000)
    output = engine.forward(batch)
    norm = engine.step(output.loss, step)          # backward, all-reduce, clip, update

The engine never changes the rate or the batch for the number of workers: both belong to the study. ZeRO stage 0 is the default; 1 to 3
partition states and are for large networks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from base.errors import RequestError, WorkError
from engine import ema, optimizers, ranks, schedules, zero
from engine.config import EngineConfig

State = dict[str, Tensor]


def rank_batch(global_batch: int, world: int, accumulate: int = 1) -> int:
    """Samples per rank, of `accumulate` equal micro-batches.

    Raises:
        RequestError: the global batch does not divide by the number of workers, or each one's part not by the micro-batches; it is never
            rounded, the study's results depend on it.
    """
    unit = world * accumulate
    near = global_batch - global_batch % unit or unit
    if global_batch % world:
        raise RequestError(
            f"global batch {global_batch} does not divide over {world} workers", where="recipe: global_batch", hint=f"global_batch={near}"
        )
    part = global_batch // world
    if part % accumulate:
        fewer = next(count for count in range(accumulate, 0, -1) if part % count == 0)
        raise RequestError(
            f"global batch {global_batch} does not divide over {world} workers in {accumulate} micro-batches each",
            where="recipe: accumulate",
            hint=f"accumulate={fewer}, or global_batch={near}",
        )
    return part


class Engine:
    """A module under DeepSpeed. All ranks construct it together, after the module's weights and norms are final.

    Args:
        module: float32, its forward takes one batch; already converted by `engine.norm.convert`.
        rank_batch: samples per rank and step.
        warmup_steps, total_steps: of the schedule.
        optimizer: in place of the configuration's, by whoever sets its rates and calls `update`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        *,
        rank_batch: int,
        warmup_steps: int,
        total_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        ranks.start()
        deepspeed = ranks.import_deepspeed()
        self.config, self.device = config, ranks.device()
        self._warmup, self._total = warmup_steps, total_steps
        self.plateau = schedules.Plateau(config.optimizer.patience, config.optimizer.gamma)
        module.to(self.device)
        ranks.share_buffers(module)
        optimizer = optimizer or optimizers.make(module, config.optimizer)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": rank_batch // config.accumulate,
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": config.optimizer.clip or 0.0,
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
            "zero_optimization": {"stage": config.zero_stage},
        }
        if config.precision == "bf16":
            # Of no layer are weights gathered or gradients averaged in bf16: stage 0 does neither.
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        # Alone there is nothing to average, and DeepSpeed copies every gradient into one buffer and back: 30 ms a step for a ResNet-18.
        self._alone = ranks.world() == 1 and config.zero_stage == 0
        if self._alone:
            self._engine.enable_backward_allreduce = False

    def forward(self, *inputs: Any) -> Any:
        """The module's output, under autocast in bf16."""
        return self._engine(*inputs)

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        opt = self.config.optimizer
        shape = schedules.factor(step, self._total, self._warmup, opt.schedule, opt.final, opt.milestones, opt.gamma)
        return opt.lr * shape * (self.plateau.state[2] if opt.schedule == "plateau" else 1.0)

    def step(self, loss: Tensor, step: int, *, measure: bool = False) -> float | None:
        """Backward; with the last micro-batch of update number `step` (from 0): average over ranks, clip, update.

        Returns:
            With `measure`, the norm of the averaged gradient before clipping, at an update; otherwise None.
        """
        opt, rate = self.config.optimizer, self.rate(step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
            if group["weight_decay"]:
                group["weight_decay"] = schedules.decayed(opt.weight_decay, opt.weight_decay_end, step, self._total)
        return self.update(loss, measure=measure)

    def update(self, loss: Tensor, *, measure: bool = False) -> float | None:
        """`step` at the rates that stand in the optimiser."""
        self._engine.backward(loss)
        updates = self._engine.is_gradient_accumulation_boundary()
        if self._alone:
            for parameter in self.module.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # as averaging leaves it: what stands still decays at any number of ranks
        norm = None
        if measure and updates and self.config.zero_stage == 0:  # where DeepSpeed gives none
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        self._engine.step()
        if measure and updates and self.config.zero_stage:
            norm = float(self._engine.get_global_grad_norm())
        return norm

    def model_state(self) -> State:
        """Parameters and persistent buffers on the CPU, under the module's own names; at stage 3 gathered (all ranks must call).

        Raises:
            WorkError: a buffer differs between ranks, so no single file could hold it.
        """
        return self.whole(self.module)

    def whole(self, module: nn.Module) -> State:
        """`model_state` of any module beside or inside the engine's: of a teacher, for instance."""
        apart = ranks.differing_buffers(module)
        if apart:
            raise WorkError(
                f"buffers differ between ranks: {', '.join(apart[:5])}", where="engine", hint="normalise with engine.norm.convert"
            )
        with ema.whole(list(module.parameters())):
            return {name: t.detach().cpu().clone().contiguous() for name, t in module.state_dict().items()}

    def optimizer_state(self) -> tuple[State, dict[str, Any]]:
        """Tensors as `<slot>|<parameter name>`, whole at every ZeRO stage (all ranks call), and the other values as JSON."""
        if self.config.zero_stage:
            return zero.gather(self.module, self._engine.optimizer), {}
        tensors: State = {}
        values: dict[str, Any] = {}
        for name, parameter in self.module.named_parameters():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{slot}|{name}"] = value.detach().cpu().clone().contiguous()
                else:
                    values[f"{slot}|{name}"] = value
        return tensors, values

    def load_optimizer_state(self, tensors: State, values: dict[str, Any]) -> None:
        """Inverse of `optimizer_state`; exact, at any number of ranks. The module's parameters were loaded before the engine was made."""
        parameters = dict(self.module.named_parameters())
        for key in [*tensors, *values]:
            name = key.partition("|")[2]
            if name not in parameters:
                raise WorkError(
                    f"the checkpoint's optimiser knows a parameter '{name}' that the network lacks", where="optimizer.safetensors"
                )
        if self.config.zero_stage:
            zero.scatter(self.module, self._engine.optimizer, tensors)
            return
        for key, value in [*tensors.items(), *values.items()]:
            slot, _, name = key.partition("|")
            home = parameters[name]
            if isinstance(value, Tensor):
                # Fused updates walk memory: a moment must lie as its parameter does (channels last).
                like = home.detach() if value.shape == home.shape else value
                value = torch.empty_like(like, device=home.device, dtype=value.dtype).copy_(value)
            self._optimizer.state[home][slot] = value
