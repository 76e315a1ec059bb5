"""The live view: one thread of the driver that projects OUT into MLflow every few seconds while the study runs, the nodes' load with it.

projector = Projector(out, study, uri)
projection = projector.finish()                 # a last, complete projection in the caller's thread

An MLflow that goes away in the middle costs nothing: the next round, or the last one, makes up for it.
"""

import threading
import time
from contextlib import suppress

from base.errors import WorkError, in_a_line
from cluster import observe
from cluster.projection import Projection

PERIOD_S = 15.0
LOOK_S = 60.0  # how often the load of the nodes is noted
LAST_PAUSES_S = (1.0, 3.0)
STOP_S = 30.0  # for the round that goes on


class Projector:
    """Runs until `finish`."""

    def __init__(self, out: str, study: str, uri: str) -> None:
        self._stop = threading.Event()
        self._arguments = (out, study, uri)
        self._projection: Projection | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-projection", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        looked_at = -LOOK_S
        while not self._stop.is_set():
            if time.monotonic() - looked_at >= LOOK_S:
                looked_at = time.monotonic()
                self._look()
            self._round()
            self._stop.wait(PERIOD_S)

    def _look(self) -> None:
        # What could not be seen or written is not there, whatever Ray or storage said of it, and the next look comes in a minute.
        with suppress(Exception):
            observe.look(self._arguments[0])

    def _round(self) -> Exception | None:
        """One projection; what went wrong is returned."""
        try:
            if self._projection is None:
                self._projection = Projection(*self._arguments)
            self._projection.update()
        except Exception as error:  # noqa: BLE001, a view may end neither itself nor the study: `finish` says what stood in its way
            return error
        return None

    def stop(self, status: str) -> None:
        """Where a study ends early: nothing is written after it. Its run in MLflow, where there is one, gets this status, and those of its
        pretrainings theirs."""
        self._stop.set()
        self._thread.join(STOP_S)
        if self._projection is not None and not self._thread.is_alive():
            with suppress(Exception):  # the study has its own error to tell
                self._projection.end(status)
                self._projection.pretrainings()

    def finish(self) -> Projection:
        """A last, complete projection in the caller's thread.

        Raises:
            WorkError: MLflow could not be written, whatever the reason; everything is safe in OUT.
        """
        self._stop.set()
        self._thread.join()
        for pause_s in (*LAST_PAUSES_S, None):
            failure = self._round()
            if failure is None:
                assert self._projection is not None
                return self._projection
            if pause_s is not None:
                time.sleep(pause_s)
        assert failure is not None
        raise mlflow_trouble(failure, self._arguments[0], self._arguments[2])


def mlflow_trouble(error: Exception, out: str, uri: str) -> WorkError:
    """What an error of MLflow comes to: its view lacks something, and nothing is lost."""
    made = WorkError(
        f"MLflow could not be written: {in_a_line(error)}", where=uri, hint=f"results and report are safe; allograft sync {out}"
    )
    made.__cause__ = error
    return made
