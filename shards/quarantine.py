"""Samples of a run that could not be read: each named once with its reason, and a limit to how many a run may do without.

quarantine = Quarantine(samples=len(corpus), url="OUT/pretrain/x/quarantine-0.jsonl")
quarantine.add(errors)                         # writes the file; WorkError when there are too many
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from base import storage
from base.errors import WorkError


class Quarantine:
    """The damaged samples that this process was told of, and those of a file from before.

    Args:
        samples: of the data as a whole. Up to 10 or 0.1 % of them, whichever is more, may be damaged.
        url: the file, one JSON object {sample, reason} a line; None = kept in memory only.
    """

    def __init__(self, samples: int, url: str | None = None) -> None:
        self.limit, self.url = max(10, samples // 1000), url
        self.reasons: dict[str, str] = {}
        if url is not None and storage.exists(url):
            self.reasons = {row["sample"]: row["reason"] for row in map(json.loads, storage.read_bytes(url).splitlines())}

    def add(self, errors: Iterable[WorkError]) -> None:
        """Take in errors of shards.corpus.DamagedSample. Raises WorkError when more are damaged than may be."""
        fresh = {error.where: error.what for error in errors if error.where is not None and error.where not in self.reasons}
        if not fresh:
            return
        self.reasons |= fresh
        if self.url is not None:
            rows = ({"sample": sample, "reason": reason} for sample, reason in self.reasons.items())
            storage.put(self.url, "".join(json.dumps(row) + "\n" for row in rows))
        if len(self.reasons) > self.limit:
            sample, reason = next(iter(fresh.items()))
            raise WorkError(
                f"{len(self.reasons)} samples cannot be read, at most {self.limit} may; the last: {reason}",
                where=sample,
                hint="pack the dataset again",
            )
