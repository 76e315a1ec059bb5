"""The diary of a study."""

import json
import threading
from typing import Any

from base import storage
from base.paths import timestamp


class Events:
    """OUT/events.jsonl: what the drivers of this study did, and when."""

    def __init__(self, out: str) -> None:
        self.url = storage.join(out, "events.jsonl")
        self._lock = threading.Lock()  # the nodes of a study work side by side

    def add(self, event: str, **facts: Any) -> None:
        """Append one event; the file is small and written whole, since object stores cannot append. It is read anew each time: an analysis
        asked for by hand writes beside a driver."""
        with self._lock:
            held = (storage.read_or_none(self.url) or b"").decode()
            storage.put(self.url, held + json.dumps({"time": timestamp(), "event": event, **facts}) + "\n")
