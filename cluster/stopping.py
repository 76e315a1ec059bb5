"""The end of work by a signal: clean, with a word on how to go on."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C, and SIGTERM (Slurm, Kubernetes, timeout), end work that can go on later cleanly, and say so."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        # A job is stopped by this signal, and a cluster that was started in the background hands it down as ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.stdout.flush()
        # Not by Python's way out, on which Ray would shut down beside threads that still call it (cluster/session.py).
        for process in psutil.Process().children(recursive=True):  # a Ray of our own
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(143 if isinstance(error, Terminated) else 130)


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminated(*_: object) -> None:
    raise Terminated
