"""How a study's work stands, as its driver wrote it down in OUT/events.jsonl.

endings(out)[""].status; failures(out)["0a1b2c3d"]
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from base import storage

INTERRUPTED = ("KeyboardInterrupt", "SystemExit")  # what ends a driver from outside


def failures(out: str) -> dict[str, str]:
    """Reasons by key, from the `cell failed` events of OUT/events.jsonl. A key that succeeded later is for the caller to leave out."""
    rows = storage.read_rows(storage.join(out, "events.jsonl"))
    return {row["key"]: _reason(row) for row in rows if row.get("event") == "cell failed"}


def _reason(row: Mapping[str, Any]) -> str:
    return str(row.get("error") or row.get("reason") or "no reason recorded")


class Ending(NamedTuple):
    """How work stands, in MLflow's words (RUNNING, FINISHED, FAILED, KILLED), and why it ended early."""

    status: str
    why: str = ""


RUNNING = Ending("RUNNING")


def endings(out: str) -> dict[str, Ending]:
    """How each pretraining without a result stands, by key, and the study itself by the empty key; from OUT/events.jsonl.

    A run that is not named here goes on, or was started by no driver.
    """
    found: dict[str, Ending] = {}
    for row in storage.read_rows(storage.join(out, "events.jsonl")):
        event, key = row.get("event"), str(row.get("key", ""))
        if event == "start":
            found = _cut_off(found, Ending("KILLED", "its driver ended without a word")) | {"": RUNNING}
        elif event == "stop":
            why = str(row.get("error", "")).strip(": ")
            found = _cut_off(found, Ending("KILLED" if why.startswith(INTERRUPTED) else "FAILED", why))
        elif event == "end":
            found[""] = Ending("FAILED" if row.get("failed") else "FINISHED")
        elif event == "pretraining":
            found[key] = RUNNING
        elif event == "pretrained":
            found.pop(key, None)
        elif event == "pretraining failed" and found.get(key) == RUNNING:  # not what its driver took down with it
            found[key] = Ending("FAILED", _reason(row))
    return found


def _cut_off(found: Mapping[str, Ending], ending: Ending) -> dict[str, Ending]:
    return {key: ending if one == RUNNING else one for key, one in found.items()}
