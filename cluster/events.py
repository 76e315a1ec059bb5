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
        self.text = storage.read_bytes(self.url).decode() if storage.exists(self.url) else ""

    def add(self, event: str, **facts: Any) -> None:
        """Append one event; the file is small and written whole, since object stores cannot append."""
        with self._lock:
            self.text += json.dumps({"time": timestamp(), "event": event, **facts}) + "\n"
            storage.put(self.url, self.text)
