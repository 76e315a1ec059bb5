"""Exposure: whether published or earlier weights may have seen a task's test images.

    exposed_to(info.data, "siim-acr", digest)            # ["nih-cxr14"], by the register of known overlaps; [] for none known

What weights have seen stands in their `allograft.json` as `data`: entries of `dataset` and, where the corpus was packed here, `split`,
`digest` of its manifest and `without`, a digest of the images left out of it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from shards.overlaps import known

Seen = tuple[str, str, str, str]  # dataset, split, digest, without


def name_of(entry: Mapping[str, Any]) -> Seen:
    """An entry of `data` as something to look up."""
    return str(entry["dataset"]), str(entry.get("split", "")), str(entry.get("digest", "")), str(entry.get("without", ""))


def exposed_to(data: Sequence[Mapping[str, Any]], dataset: str, digest: str, compared: Collection[Seen] = ()) -> list[str]:
    """The corpora among those seen that may hold test images, or other images of test patients, of a packed dataset.

    A corpus is harmless when it is another split of that very packing (patients stand in one split), when no overlap of the two is known,
    or when it is one of `compared`: its images were held against the test images and what matched was left out of training.
    """
    overlapping = {name for overlap in known() if dataset in overlap.datasets for name in overlap.datasets} - {dataset}
    found = []
    for entry in data:
        seen = name_of(entry)
        name, split, packed, _ = seen
        own = name == dataset and not (packed == digest and split in ("train", "val"))
        if own or (name in overlapping and seen not in compared):
            found.append(name)
    return sorted(set(found))


def overlap_notes(one: str, other: str) -> list[str]:
    """What the register says about two datasets, a sentence an entry."""
    pairs = [overlap for overlap in known() if set(overlap.datasets) == {one, other}]
    return [
        f"{' and '.join(overlap.datasets)} share {overlap.kind} ({overlap.extent}): {overlap.note} ({overlap.source})" for overlap in pairs
    ]
