"""A study file that changed after work was done: what of that is kept, what is computed again, what is no longer asked for.

    before = held(out)                                        # the file as the last driver had it
    for line in changes(study, before, corpora, searches): ...

Nothing that stands is ever removed: what a later study does not ask for is left out of its report and found again when it is asked for.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from base import storage
from base.config import canonical_json
from base.errors import RequestError
from cluster.outs import study_at
from cluster.plan import Packed
from cluster.searches import Searches
from cluster.single import spelled
from cluster.standing import finished, pretrainings
from cluster.study import Study
from pretrain.run import differing

SHOWN = 8  # keys of a study file
AGAIN = "computed again, since what they are made of has changed"
SAME = ("task", "source", "source_seed", "architecture", "strategy", "options", "fraction", "resolution", "seed", "shuffle_labels")


def held(out: str) -> Study | None:
    """The study that stands in OUT; None where there is none that can be read today."""
    try:
        return study_at(out)
    except RequestError:
        return None


def changes(
    study: Study, before: Study | None, corpora: Mapping[str, Packed] | None, searches: Searches, *, typed: bool = False
) -> list[str]:
    """Lines for a person; none where nothing has been computed yet.

    Args:
        corpora: as they are trained on; None while they are not packed and compared.
        searches: of the study as it is now.
        typed: it is that of a command without a study file.
    """
    lines = []
    if before is not None:
        plain = [one.model_dump(mode="json", by_alias=True, exclude={"out", "presets", "preset"}) for one in (before, study)]
        if keys := differing(plain[0], plain[1]):
            keys = list(dict.fromkeys(map(spelled, keys))) if typed else keys
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            what = "changed since the last command here" if typed else "the study file has changed"
            lines.append(f"{what}: {', '.join(keys[:SHOWN])}{more}")
    runs = _runs(study, corpora)
    if runs:
        lines.append(f"pretrainings: {_words(runs)}")
    cells = _cells(study, searches)
    if cells:
        lines.append(f"cells: {_words(cells)}")
    return lines


def _runs(study: Study, corpora: Mapping[str, Packed] | None) -> Counter[str]:
    """Pretrainings by what becomes of them; empty where none was begun."""
    from engine.checkpoint import newest_step

    folder = storage.join(study.out, "pretrain")
    begun = set(storage.listing(folder))
    if not begun or corpora is None:
        return Counter()
    stand = finished(folder)
    known = pretrainings(study, corpora)
    asked = {f"{config.name}-{config.key}" for _, _, config, _ in known if config is not None}
    earlier = {_run_of(storage.join(folder, name)) for name in stand - asked}
    found: Counter[str] = Counter()
    for entry, seed, config, weights in known:
        if weights is not None:
            found["kept"] += 1
        elif config is not None and newest_step(storage.join(config.out, "checkpoints")):
            found["begun, to go on from a checkpoint"] += 1
        else:
            found[AGAIN if (entry.name, seed) in earlier else "new"] += 1
    names = {entry.name for entry in study.pretrain}
    found["no longer asked for"] = sum(name.rpartition("-")[0] not in names for name in stand - asked)
    return found


def _run_of(url: str) -> tuple[str, int]:
    """The name and the seed of a finished pretraining."""
    result = storage.read_json(storage.join(url, "result.json"))
    return result["name"], result["seed"]


def _cells(study: Study, searches: Searches) -> Counter[str]:
    """Cells by what becomes of them; empty where none has finished."""
    stand = finished(storage.join(study.out, "cells"))
    path = storage.join(study.out, "plan.json")
    earlier = [row for row in (storage.read_json(path) if storage.exists(path) else []) if row["key"] in stand]
    if not earlier:
        return Counter()
    old = {_identity(row): row["key"] for row in earlier}
    found: Counter[str] = Counter()
    keys, again = set(), set()
    for row in searches.rows():
        key, same = row["key"], _identity(row)
        keys.add(key)
        if key in stand:
            found["kept"] += 1
        elif not key:
            found["known once data, encoders and searches stand"] += 1
        elif same in old:
            found[AGAIN] += 1
            again.add(old[same])
        else:
            found["new"] += 1
    found["no longer asked for"] = sum(row["key"] not in keys and row["key"] not in again for row in earlier)
    return found


def _identity(row: Mapping[str, Any]) -> str:
    """What a cell is called, whatever its encoder, its data and its recipe are."""
    return canonical_json([row.get(name) or 0 for name in SAME] + [row.get("asked") or 0])


def _words(counts: Counter[str]) -> str:
    order = ("kept", AGAIN, "new")
    known = [*order, *(what for what in counts if what not in order)]
    return "; ".join(f"{counts[what]:,} {what}" for what in known if counts[what])
