"""OUT/quarantine.jsonl: the samples that pretrainings could not read, of all runs and ranks, each once a run.

Each rank writes a file of its own (shards.quarantine), since they do not speak with each other about it; here they become one.
"""

import json

from base import storage

FILE = "quarantine.jsonl"


def merge(out: str) -> list[dict[str, str]]:
    """Write the file anew from what the ranks wrote; returns its rows, {pretraining, sample, reason}. None are written where none are."""
    rows = []
    for folder in storage.listing(storage.join(out, "pretrain")):
        url = storage.join(out, "pretrain", folder)
        reasons: dict[str, str] = {}
        for name in storage.listing(url):
            if name.startswith("quarantine-") and name.endswith(".jsonl"):
                found = [json.loads(line) for line in storage.read_bytes(storage.join(url, name)).splitlines()]
                reasons |= {row["sample"]: row["reason"] for row in found}
        rows += [{"pretraining": folder, "sample": sample, "reason": reasons[sample]} for sample in sorted(reasons)]
    if rows:
        storage.put(storage.join(out, FILE), "".join(json.dumps(row) + "\n" for row in rows))
    return rows
