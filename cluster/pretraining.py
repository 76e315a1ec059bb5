"""One pretraining as a Ray Train job: Ray places the workers, restarts them and hands back the result; checkpoints are ours.

A restart reads the newest COMMIT in storage, whatever Ray remembers.
"""

import sys
import threading
from concurrent.futures import Future
from typing import Any

from base import storage
from base.config import canonical_json, parse
from base.errors import AllograftError, WorkError
from cluster.context import WorkerContext
from cluster.sources import local_encoder
from cluster.study import Resources
from pretrain.run import PretrainConfig

MAX_FAILURES = 3


def pretrain_on_ray(config: PretrainConfig, resources: Resources) -> dict[str, Any]:
    """Run to the end, over the deaths of workers.

    Returns:
        The run's result, as in its result.json.

    Raises:
        WorkError: the run failed more often than it may, or by an error of its own.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = resources.gpus_per_pretrain_worker
    per_worker = {"CPU": float(resources.threads), **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": canonical_json(config)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(num_workers=resources.pretrain_workers, use_gpu=bool(gpus), resources_per_worker=per_worker),
        run_config=RunConfig(name=config.key, storage_path=_scratch(), failure_config=FailureConfig(max_failures=MAX_FAILURES)),
    )
    try:
        outcome = _fit(trainer).return_value
    except ray.train.TrainingFailedError as error:
        hint = "run the same command again to go on from the newest checkpoint"
        raise WorkError(
            f"failed {MAX_FAILURES + 1} times, at last with: {_last_line(error)}", where=f"pretrain {config.name}", hint=hint
        ) from error
    if "error" in outcome:
        raise WorkError(outcome["error"], where=f"pretrain {config.name}")
    return dict(storage.read_json(storage.join(config.out, "result.json")))


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


def _scratch() -> str:
    # Ray Train insists on a folder for its own book-keeping; nothing of ours is in it.
    import tempfile

    return tempfile.mkdtemp(prefix="allograft-ray-train-")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _worker(task: dict[str, str]) -> dict[str, Any]:
    """What every rank runs. An error of the work itself is handed back, not retried; a death is retried by Ray."""
    import json

    # DeepSpeed's autotuner imports MLflow when it can: 3 s of every worker's start, for something that workers never do.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    import ray.train

    from pretrain import run

    config = parse(json.loads(task["config"]), PretrainConfig, "pretraining configuration")
    if config.start_from and config.start_from_sha256:
        config = config.model_copy(update={"start_from": local_encoder(config.start_from, config.start_from_sha256)})
    place = ray.train.get_context()
    context = WorkerContext(rank=place.get_world_rank(), world_size=place.get_world_size(), dir=config.out)
    try:
        run.run(config, context)
    except AllograftError as error:
        return {"error": str(error)}
    return {"key": config.key}
