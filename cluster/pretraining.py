"""One pretraining as a Ray Train job: Ray places the workers, restarts them and hands back the result; checkpoints are ours.

A restart reads the newest COMMIT in storage, whatever Ray remembers, with as many workers as there are then.
"""

import os
import sys
import tempfile
import threading
from concurrent.futures import Future
from typing import Any

from base import storage
from base.config import canonical_json, parse
from base.errors import AllograftError, WorkError
from cluster.context import WorkerContext
from cluster.places import of_trainer
from cluster.study import Resources
from pretrain.run import PretrainConfig

# Longest wait for another rank: rank 0 alone uploads the export, and waits up to half an hour for a checkpoint (engine.checkpoint).
COLLECTIVE_S = 2400
RESIZE_S = 60.0  # how often a run with a range of workers looks whether the cluster has grown or shrunk


def pretrain_on_ray(config: PretrainConfig, resources: Resources) -> dict[str, Any]:
    """Run to the end, over the deaths of workers and nodes.

    Returns:
        The run's result, as in its result.json.

    Raises:
        WorkError: the run died again and again without getting further, or failed by an error of its own.
        AllograftError: what watches over its workers died, which ends the study; the same command goes on.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from cluster.trainer import MAX_FAILURES, Final, Prepare, Trainer, failure
    from engine.checkpoint import newest_step

    # One more process for each group of workers, and of use only where there is another node to go to.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(len(ray.nodes()) > 1))
    gpus, wanted = resources.gpus_per_pretrain_worker, resources.pretrain_workers
    checkpoints = storage.join(config.out, "checkpoints")
    given = {
        "checkpoints": checkpoints,
        "micro_batch": config.recipe.global_batch // config.recipe.accumulate,
        "train_loop_config": {"config": canonical_json(config)},
        "torch_config": TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=COLLECTIVE_S),
        "scaling_config": ScalingConfig(
            num_workers=tuple(wanted) if isinstance(wanted, list) else wanted,
            use_gpu=bool(gpus),
            resources_per_worker=of_trainer(resources),
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
    }
    hint = "run the same command again to go on from the newest checkpoint"
    try:
        # Ray Train insists on a folder for its own book-keeping; nothing of ours is in it.
        with tempfile.TemporaryDirectory(prefix="allograft-ray-train-", ignore_cleanup_errors=True) as scratch:
            run_config = RunConfig(name=config.key, storage_path=scratch, callbacks=[Prepare()])
            _fit(Trainer(_worker, run_config=run_config, **given))
    except ray.train.TrainingFailedError as error:
        if final := failure(error, Final):
            raise WorkError(str(final), where=f"pretrain {config.name}") from error
        deaths = f"died {MAX_FAILURES + 1} times after the checkpoint of step {newest_step(checkpoints)} without another"
        raise WorkError(f"{deaths}, at last with: {_lines(error)[-1]}", where=f"pretrain {config.name}", hint=hint) from error
    except (RayActorError, OutOfMemoryError) as error:
        # The one process that Ray Train does not start again. What its workers held stays taken until this driver ends, so the whole study
        # ends here (no WorkError, which would let the rest go on and wait for room).
        told = f"Ray lost the process that watches over the workers: {_lines(error)[0]}"
        raise AllograftError(told, where=f"pretrain {config.name}", hint=hint) from error
    return dict(storage.read_json(storage.join(config.out, "result.json")))


class TrainerContext(WorkerContext):
    """The context of a trainer, which may be asked to go."""

    def should_stop(self) -> str | None:
        """Why, when this or another worker of the run is about to be taken away."""
        from cluster.trainer import notice

        return notice()


def _fit(trainer: Any) -> Any:
    # In the main thread Ray Train takes Ctrl-C for itself and ends the process with 1; so it stays a KeyboardInterrupt of the caller.
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001, raised where the result is asked for
            outcome.set_exception(error)

    threading.Thread(target=fit, name="pretraining", daemon=True).start()
    return outcome.result()


def _lines(error: BaseException) -> list[str]:
    return [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]


def _worker(task: dict[str, str]) -> None:
    """What every rank runs. Whatever ends it before its time is raised, so that Ray takes the other ranks down at once: they wait for it in
    a collective. Deaths, and a store that does not answer, are tried again; an error of the work itself is not."""
    import json

    # DeepSpeed's autotuner imports MLflow when it can: 3 s of every worker's start, for something that workers never do.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    import ray.train

    from cluster.trainer import Final, Noticed
    from cluster.worker import of_storage
    from pretrain import run

    config = parse(json.loads(task["config"]), PretrainConfig, "pretraining configuration")
    place = ray.train.get_context()
    context = TrainerContext(rank=place.get_world_rank(), world_size=place.get_world_size(), dir=config.out)
    try:
        done = run.run(config, context)
    except AllograftError as error:
        if of_storage(error):
            raise
        raise Final(str(error)) from None
    if done is None:  # saved and stopped: an exception is what makes Ray place the run anew
        raise Noticed(context.should_stop() or "another rank was told to stop")
