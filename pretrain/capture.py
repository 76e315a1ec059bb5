"""What a run leaves when a loss is not finite: the batch and the state of that step, so that it can be computed again.

place = dump("OUT/pretrain/x/not-finite", step=120, batch=batch, state=state, loss=loss)     # every rank its own batch

<place>/step-00000120/rank<r>.safetensors  (views, ids, draws)   model.safetensors   ema.safetensors (when any)   rank<r>.json
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from base import storage
from engine import ranks
from shards.batches import Batch


def dump(url: str, step: int, batch: Batch, state: dict[str, dict[str, Tensor]], loss: float) -> str:
    """Write this rank's batch, and rank 0 the state (by file, whole, on the CPU); returns the folder."""
    place = storage.join(url, f"step-{step:08d}")
    held = {"index_B": batch.index_B, "epoch_B": batch.epoch_B} | {f"view{i}": view for i, view in enumerate(batch.views)}
    held |= {name: value for name in ("target_BL", "mask_BL") if (value := getattr(batch, name)) is not None}
    with tempfile.TemporaryDirectory(prefix="allograft-capture-") as folder:
        files = {f"rank{ranks.rank()}.safetensors": held} | {f"{name}.safetensors": tensors for name, tensors in state.items()}
        for name, tensors in files.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, Path(folder) / name)
            storage.put_file(Path(folder) / name, storage.join(place, name))
    storage.put(storage.join(place, f"rank{ranks.rank()}.json"), json.dumps({"step": step, "loss": str(loss), "torch": torch.__version__}))
    return place
