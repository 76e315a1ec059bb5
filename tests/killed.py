"""A pretraining that ends by SIGKILL once it has logged a step: `python tests/killed.py CONFIG.json STEP`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from base.config import parse
from pretrain.run import PretrainConfig, run


class KillAt:
    """A context that ends the process when a row of that step comes."""

    rank, world_size = 0, 1

    def __init__(self, dir: str, step: int) -> None:
        self.dir, self.step = dir, step

    def report(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step and "loss" in row:
            os.kill(os.getpid(), signal.SIGKILL)

    def should_stop(self) -> None:
        return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = parse(json.loads(Path(sys.argv[1]).read_text()), PretrainConfig, "test")
    run(config, KillAt(config.out, int(sys.argv[2])))
