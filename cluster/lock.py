"""One driver for an `out`: a lock file made exclusively, with a heartbeat; a lock without one for two minutes is taken over.

with DriverLock(out) as lock:
    ...                                     # ends by Ctrl-C of its own, and then WorkError, if another driver takes the lock over
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from base import storage
from base.errors import RequestError, WorkError

STALE_S = 120.0
BEAT_S = 20.0
SETTLE_S = 1.0  # longer than writing a lock takes


class DriverLock:
    """Context manager around `OUT/driver.lock`. A driver that was suspended for longer than its lock holds (a laptop, a virtual machine)
    finds another one at work when it wakes, and stops.

    Attributes:
        lost: another driver has taken it over: nothing may be written any more.

    Raises:
        RequestError: another driver works on this `out`.
        WorkError: another driver has taken it over.
    """

    def __init__(self, out: str) -> None:
        self.url = storage.join(out, "driver.lock")
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}:{_processes()}"
        self.lost = False
        self._beaten = time.time()  # when the lock last said so
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="driver-lock", daemon=True)

    def __enter__(self) -> "DriverLock":
        if not storage.create(self.url, self._content()):
            self.refuse()
            storage.put(self.url, self._content())
            time.sleep(SETTLE_S)  # of two that found it stale the later one has it
            self.refuse()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost:
            other = self._read()["owner"] or "gone by now"
            said = f"another driver ({other}) has taken over, since this one gave no sign for {STALE_S:.0f} s"
            raise WorkError(said, where=self.url, hint="leave the study to that one") from error
        if self._read()["owner"] == self.owner:
            storage.remove(self.url)

    def refuse(self) -> None:
        """Raises RequestError where another driver holds it that may be alive."""
        held = self._read()
        if not held["owner"]:  # it is just being written
            time.sleep(SETTLE_S)
            held = self._read()
        age_s = time.time() - held["beat"]
        if held["owner"] != self.owner and age_s < STALE_S and not _dead(held["owner"]):
            hint = f"wait for it, or remove {self.url} if that driver is gone"
            raise RequestError(f"another driver ({held['owner']}) works here, last seen {age_s:.0f} s ago", where=self.url, hint=hint)

    def _content(self) -> str:
        return json.dumps({"owner": self.owner, "beat": time.time()})

    def _read(self) -> dict[str, Any]:
        try:
            return dict(storage.read_json(self.url))
        except (FileNotFoundError, json.JSONDecodeError):
            return {"owner": "", "beat": 0.0}

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            # A beat that storage did not take is made up for by the next one; the lock is stale only after several.
            with suppress(OSError, WorkError):
                owner = self._read()["owner"]
                if owner == self.owner:
                    storage.put(self.url, self._content())
                    self._beaten = time.time()
                # Removed by hand, it is made anew; after a long sleep, another driver may have come and gone.
                elif owner or time.time() - self._beaten > STALE_S or not storage.create(self.url, self._content()):
                    self.lost = True
                    # Ctrl-C, which a job in the background of a shell ignores.
                    stop = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
                    signal.pthread_kill(threading.main_thread().ident or 0, stop)
                    return


def _dead(owner: str) -> bool:
    """True when the owner was a process of this host that no longer runs: no need to wait for its heartbeat to age."""
    import psutil

    host, pid, _, processes = [*owner.split(":"), *[""] * 4][:4]
    return (host, processes) == (socket.gethostname(), _processes()) and pid.isdigit() and not psutil.pid_exists(int(pid))


def _processes() -> str:
    """What process numbers mean anything in: this start of this machine and its namespace. Two containers may share a host's name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return f"{boot.read_text()[:8] if boot.exists() else ''}-{os.readlink(space).strip('pid:[]') if space.is_symlink() else ''}"
