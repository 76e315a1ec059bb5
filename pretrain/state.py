"""What a checkpoint of a run holds, and how a run takes one up.

snapshot = find(run)                # the newest one of this run, or None; what was logged up to it is there again
load_weights(run.method, snapshot)  # before the engine: at ZeRO 3 weights are cut in pieces there
go_on(run, snapshot)                # after it: optimiser, schedule, random state, queues, windows
save(run)
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from base import storage
from base.errors import WorkError
from engine import checkpoint, ranks
from engine.checkpoint import Snapshot
from engine.saved import Position, RunState
from pretrain.methods import Method
from pretrain.run import PRETRAIN_VERSION
from pretrain.watch import not_finite

if TYPE_CHECKING:
    from pretrain.loop import Run


def find(run: "Run") -> Snapshot | None:
    """The newest checkpoint of this run. All ranks call.

    Raises:
        RequestError: it is another run's.
    """
    found = checkpoint.find_newest(run.saver.url) if run.recipe.checkpoint_every_steps else None
    if found is None:
        if run.first and run.restarts:
            storage.remove(run.record.url)
        return None
    snapshot = checkpoint.load(found)
    run.refuse_another(snapshot.state.key, "checkpoint", snapshot.state.configuration)
    run.record.take_up(found.step)
    for reason in found.refused:
        run.record.add({"event": "checkpoint refused", "step": found.step, "why": reason})
    run.record.add({"event": "resumed", "step": found.step, "restarts": run.restarts, "workers": ranks.world()})
    run.record.put()
    return snapshot


def load_weights(method: Method, snapshot: Snapshot) -> None:
    """Of the method and its teachers."""
    method.load_state_dict(snapshot.model, strict=True)
    for name, teacher in method.teachers.items():
        teacher.load_state_dict(_of(name, snapshot.ema or {}), strict=True)


def go_on(run: "Run", snapshot: Snapshot) -> None:
    """Everything but the weights; what belongs to one process only at the same number of ranks."""
    run.engine.load_optimizer_state(snapshot.optimizer, snapshot.state.optimizer_values)
    run.engine.plateau.state = list(snapshot.state.plateau)
    run.step, run.seconds_before = snapshot.step, snapshot.state.seconds
    if snapshot.mine:
        checkpoint.restore_random_state(snapshot.mine)
        run.method.load_extra_state(_of("extra", snapshot.mine))
        run.window.state = _of("window", snapshot.mine)
        run.epoch_loss = snapshot.mine["epoch_loss"]


def held(run: "Run") -> dict[str, dict[str, Tensor]]:
    """`model` and, with teachers, `ema`: tensors on the CPU, whatever they hold. All ranks call."""
    teachers = {name: run.engine.whole(teacher) for name, teacher in run.method.teachers.items()}
    ema = {f"{name}.{key}": value for name, teacher in teachers.items() for key, value in teacher.items()}
    return {"model": run.engine.model_state()} | ({"ema": ema} if ema else {})


def whole(run: "Run") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The method's tensors and those of its teachers, on the CPU. All ranks call.

    Raises:
        WorkError: one of them is not finite: who went on from it could only repeat it.
    """
    tensors = held(run)
    model, ema = tensors["model"], tensors.get("ema", {})
    if broken := not_finite(model | ema):
        run.record.put()
        raise WorkError(
            f"not finite at step {run.step}: {', '.join(broken[:3])}" + (f" and {len(broken) - 3} more" if broken[3:] else ""),
            where=f"pretrain {run.config.name}",
            hint="lower settings.optimizer.lr, or clip gradients: settings.optimizer.clip=5",
        )
    return model, ema


def save(run: "Run") -> None:
    """Begin to write a checkpoint of the step that is done. All ranks call. Raises as `whole`."""
    model, ema = whole(run)
    tensors, values = run.engine.optimizer_state()
    mine = checkpoint.random_state() | {f"extra.{name}": value for name, value in run.method.extra_state().items()}
    mine |= {f"window.{name}": value for name, value in run.window.state.items()} | {"epoch_loss": run.epoch_loss}
    newest: dict[str, Any] = next(iter(run.record.measured[-1:]), {})
    score = next((row["knn_auroc"] for row in reversed(run.record.measured) if "knn_auroc" in row), None)
    best, waited, factor = run.engine.plateau.state
    state = RunState(
        key=run.config.key,
        version=PRETRAIN_VERSION,
        epoch=run.step / run.epoch_steps,
        total_steps=run.total,
        loader=Position(next_step=run.step, global_batch=run.recipe.global_batch, seed=run.config.seed),
        optimizer_values=values,
        plateau=(best, waited, factor),
        score=score,
        sound=newest.get("health") in ("healthy", "too short"),
        seconds=run.seconds(),
        restarts=run.restarts,
        configuration=run.config.model_dump(mode="json", by_alias=True),
    )
    run.record.put()  # before COMMIT: a resumed run reads the rows up to its checkpoint
    copied = {name: value.detach().cpu().clone().contiguous() for name, value in mine.items()}
    run.saver.save(Snapshot(run.step, model, tensors, state, copied, ema or None))


def _of(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}
