"""One training step as a DeepSpeed engine: gradients averaged over ranks, clipped, applied at a rate that is a function of the step.

    engine = Engine(method, config, rank_batch=32, total_steps=1000)
    output = engine.forward(batch)
    norm = engine.step(output.loss, step)          # backward, all-reduce, clip, update

The engine never changes the rate or the batch for the number of workers: both belong to the study. ZeRO stage 0 is the default; 1 to 3
partition states and are for large networks. LARS computes a norm per parameter, which is wrong on the flat partitions of stages 1 to 3
(it runs and loses silently), so it is refused there.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from base.errors import RequestError, WorkError
from engine import ema, ranks, schedules
from engine.config import EngineConfig, OptimizerConfig

State = dict[str, Tensor]


def rank_batch(global_batch: int, world: int) -> int:
    """Samples per rank.

    Raises:
        RequestError: the global batch does not divide by the number of workers; it is never rounded, the study's results depend on it.
    """
    if global_batch % world:
        near = global_batch - global_batch % world or world
        raise RequestError(
            f"global batch {global_batch} does not divide over {world} workers", where="recipe: global_batch", hint=f"global_batch={near}"
        )
    return global_batch // world


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weights with decay, then biases and norm parameters (everything of at most one dimension) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD, or lightly's LARS (which leaves groups without decay unscaled, as SimCLR and BYOL do)."""
    groups = decay_groups(module, config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    from lightly.utils.lars import LARS

    return cast(torch.optim.Optimizer, LARS(groups, lr=config.lr, momentum=config.momentum))


class Engine:
    """A module under DeepSpeed. All ranks construct it together, after the module's weights and norms are final.

    Args:
        module: float32, its forward takes one batch; already converted by `engine.norm.convert`.
        rank_batch: samples per rank and step.
        warmup_steps, total_steps: of the schedule.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, *, rank_batch: int, warmup_steps: int, total_steps: int) -> None:
        ranks.start()
        deepspeed = ranks.import_deepspeed()
        self.config, self.device = config, ranks.device()
        self._warmup, self._total = warmup_steps, total_steps
        module.to(self.device)
        ranks.share_buffers(module)
        optimizer = make_optimizer(module, config.optimizer)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": rank_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.clip or 0.0,
            "steps_per_print": None,
            "zero_optimization": {"stage": config.zero_stage},
        }
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module: nn.Module = self._engine.module

    def forward(self, *inputs: Any) -> Any:
        """The module's output, under autocast in bf16."""
        return self._engine(*inputs)

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        opt = self.config.optimizer
        return opt.lr * schedules.factor(step, self._total, self._warmup, opt.schedule, opt.final)

    def step(self, loss: Tensor, step: int, *, measure: bool = False) -> float | None:
        """Backward, average over ranks, clip, update number `step` (from 0).

        Returns:
            With `measure`, the norm of the averaged gradient before clipping (stage 0 only, otherwise None).
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self._engine.backward(loss)
        norm = None
        if measure and self.config.zero_stage == 0:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        self._engine.step()
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
        """Tensors as `<slot>|<parameter name>`, and the other values as JSON under the same names.

        Raises:
            RequestError: above ZeRO stage 0, where the state lies in partitions.
        """
        self._require_whole_states()
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
        """Inverse of `optimizer_state`; exact, at any number of ranks."""
        self._require_whole_states()
        parameters = dict(self.module.named_parameters())
        for key, value in [*tensors.items(), *values.items()]:
            slot, _, name = key.partition("|")
            if name not in parameters:
                raise WorkError(
                    f"the checkpoint's optimiser knows a parameter '{name}' that the network lacks", where="optimizer.safetensors"
                )
            home = parameters[name]
            # Adam's step counter stays on the CPU as torch keeps it there; moments live beside their parameter.
            kept = value.clone() if not isinstance(value, Tensor) or value.ndim == 0 else value.to(home.device)
            self._optimizer.state[home][slot] = kept

    def _require_whole_states(self) -> None:
        if self.config.zero_stage:
            raise RequestError(
                f"checkpoints are exact at ZeRO stage 0 only, this run asks for stage {self.config.zero_stage}",
                where="recipe: engine.zero_stage",
                hint="zero_stage=0, or checkpoint_every_steps=0 to run without checkpoints",
            )
