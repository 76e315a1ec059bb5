"""What the ranks of a run tell one another between the two passes of a step: whose loss is not finite, and who was asked to stop.

    watch = Watch(name, "OUT/pretrain/x/not-finite", record, method)
    watch.keep()                                              # before the forward pass
    if not watch.finite(loss, batch, step, held, asked):   # all ranks, the same answer: without it nothing may be updated
        ...                                                   # its batches and the state are written down; the third in a row raises
    if watch.stop: ...                                        # a rank was asked to

It is one sum over ranks and one number read back, at every step and on every device. On a GPU the host waits here for the forward pass,
never for a whole step: the backward pass and all that follows are handed over while the device works on them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from base.errors import WorkError
from engine import norm, ranks
from pretrain.capture import dump
from pretrain.methods import Method
from pretrain.record import Record
from shards.batches import Batch

IN_A_ROW = 3  # steps without a finite loss that end a run


class Watch:
    """Of one run; every rank holds one.

    Args:
        url: folder for the batches and states of such steps.
        method: with its teachers on their device. What a forward pass changes of them is set back after such a step.
        most: steps in a row that end the run.
    """

    def __init__(self, name: str, url: str, record: Record, method: Method, most: int = IN_A_ROW) -> None:
        self.name, self.url, self.record, self.method, self.most = name, url, record, method, most
        self.stop, self.in_a_row = False, 0
        statistics = [value for network in (method, *method.teachers.values()) for value in norm.statistics(network)]
        self._moved = statistics + method.moved_by_forward()
        self._kept = [value.clone() for value in self._moved]

    def keep(self) -> None:
        """What a forward pass changes though no update follows: a mean that has taken up one NaN is NaN for ever, and no loss shows it."""
        if self._kept:
            torch._foreach_copy_(self._kept, self._moved)

    def finite(self, loss: Tensor, batch: Batch, step: int, held: Callable[[], dict[str, dict[str, Tensor]]], asked: bool = False) -> bool:
        """Whether the losses of all ranks are.

        Args:
            step: number of the update that would follow, from 1.
            held: the whole state by file (`model`, `ema`) on the CPU; all ranks call it where it is needed.
            asked: whether this rank was asked to stop.

        Raises:
            WorkError: they were not, `most` steps in a row.
        """
        told = torch.zeros(ranks.world() + 1, device=loss.device)
        told[ranks.rank()], told[-1] = ~torch.isfinite(loss.detach()), float(asked)
        *flags, stop = ranks.all_sum(told).tolist()
        self.stop, named = stop > 0, [rank for rank, flag in enumerate(flags) if flag]
        if not named:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if self._kept:
            torch._foreach_copy_(self._moved, self._kept)
        self.method.on_step_skipped()
        state = held()
        place = dump(self.url, step, batch, state if ranks.rank() == 0 else {}, float(loss.detach()))
        self.record.add({"event": "not finite", "step": step, "why": f"the loss on rank {named}", "dump": place})
        if self.in_a_row == self.most:
            self.record.put()
            times = f", {self.most} steps in a row" if self.most > 1 else ", and micro-batches before it have left their gradients"
            raise WorkError(
                f"the loss is not finite at step {step} on rank {named}{times}",
                where=f"pretrain {self.name}",
                hint=f"lower settings.optimizer.lr; the batches and the state are in {self.url}",
            )
        return False


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return [name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
