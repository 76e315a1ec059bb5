"""Packed images that are exact copies of others, counted from the indices alone: no image is read.

found = count("OUT/shards/nih-cxr14", manifest)      # Copies(images=12, across=3)
"""

from typing import NamedTuple

import numpy as np

from base import storage
from base.errors import WorkError
from shards.manifest import Manifest, load_index


class Copies(NamedTuple):
    """Images beyond the first of each content, and those of them whose content several patients have."""

    images: int
    across: int


def count(url: str, of: Manifest) -> Copies:
    """The copies among the packed images at `url`. Raises WorkError for an index that is missing or damaged.

    Two contents count as one where length and checksum are equal: among a million images of ten thousand lengths one false pair is
    a chance of one in a hundred.
    """
    held = []
    for shard in of.shards:
        where = storage.join(url, f"{shard.name}.idx")
        try:
            held.append(load_index(storage.read_bytes(where), where)[["patient", "image_len", "image_crc"]])
        except FileNotFoundError:
            raise WorkError("no such index", where=where, hint="pack the dataset again") from None
    if not held:
        return Copies(0, 0)
    row_N = np.concatenate(held)
    content_N = (row_N["image_crc"].astype(np.uint64) << np.uint64(32)) | (row_N["image_len"].astype(np.uint64) & np.uint64(0xFFFFFFFF))
    group_N = np.unique(content_N, return_inverse=True)[1].reshape(-1)
    patient_N = np.unique(row_N["patient"], return_inverse=True)[1].reshape(-1)
    times_G = np.bincount(group_N)
    pairs = np.unique(group_N.astype(np.int64) * (patient_N.max() + 1) + patient_N)
    patients_G = np.bincount(pairs // (patient_N.max() + 1), minlength=len(times_G))
    return Copies(int((times_G - 1).sum()), int((times_G - 1)[patients_G > 1].sum()))
