"""Pretrainings that end by SIGKILL once they have logged a step: `python tests/killed.py STEP CONFIG.json...` prints how each ended.

Each is a process of its own, forked from one that has paid for the imports.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from base.config import parse
from engine.ranks import import_deepspeed
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


def killed(path: str, step: int) -> int:
    """How the process that runs this configuration ended: minus the signal."""
    pid = os.fork()
    if pid == 0:
        config = parse(json.loads(Path(path).read_text()), PretrainConfig, "test")
        run(config, KillAt(config.out, step))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_deepspeed()
    print(json.dumps([killed(path, int(sys.argv[1])) for path in sys.argv[2:]]))
