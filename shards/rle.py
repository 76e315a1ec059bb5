"""Run-length encoded masks, as three kinds of release write them.

    mask_HW = decode(["1 3 10 2"], "kaggle", height=4, width=6)      # u8, 1 inside the runs

All three go through an image column by column, from the top left. Pairs of numbers, "start length":
`kaggle` counts starts from 1 at the first pixel; `siim` counts a start from the end of the run before (SIIM-ACR Pneumothorax,
mask_functions.py of the challenge); `coco` has no starts but lengths alone, of zeros, ones, zeros, ... (cocoapi, maskApi.c), as JSON
{"size": [height, width], "counts": [...] or text of 6 bits a character} or as the numbers themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np

from shards.planes import Unusable

Kind = Literal["kaggle", "siim", "coco"]


def decode(texts: Sequence[str], kind: Kind, height: int, width: int) -> np.ndarray:
    """The union of the runs as u8 (height, width) of 0 and 1.

    Raises:
        Unusable: text that is no such encoding, runs that reach beyond the image or are of an image of another size.
    """
    flat = np.zeros(height * width, np.uint8)
    for text in texts:
        if kind == "coco":
            lengths = np.array(_counts(text, height, width), np.int64)
            if (lengths < 0).any() or lengths.sum() != flat.size:
                raise Unusable(f"mask runs cover {lengths.sum()} pixels, the image has {flat.size}")
            ends = np.cumsum(lengths)[1::2]
            starts = ends - lengths[1::2]
        else:
            numbers = np.array(_numbers(text), np.int64)
            if len(numbers) % 2:
                raise Unusable(f"mask runs are pairs of numbers, here are {len(numbers)}")
            starts, lengths = numbers[::2], numbers[1::2]
            # The first start of SIIM is from the first pixel; Kaggle calls that one 1.
            starts = np.cumsum(starts) + np.cumsum(lengths) - lengths if kind == "siim" else starts - 1
            ends = starts + lengths
            if len(starts) and (lengths.min() < 0 or starts.min() < 0 or ends.max() > flat.size):
                raise Unusable(f"a mask run reaches beyond the image's {flat.size} pixels")
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            flat[start:end] = 1
    return flat.reshape(width, height).T.copy()


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").strip(" []").split()]
    except ValueError:
        raise Unusable("mask runs are not numbers") from None


def _counts(text: str, height: int, width: int) -> list[int]:
    if not text.lstrip().startswith("{"):
        return _numbers(text)
    try:
        encoded = json.loads(text)
        size, counts = [int(side) for side in encoded["size"]], encoded["counts"]
    except (ValueError, KeyError, TypeError):
        raise Unusable("mask runs are not the JSON of COCO") from None
    if size != [height, width]:
        raise Unusable(f"mask runs are of an image of {size}, this one has [{height}, {width}] (height, width)")
    return _unpacked(counts) if isinstance(counts, str) else [int(count) for count in counts]


def _unpacked(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a character (the sixth says that more follow), signed, from the third on relative to two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise Unusable("mask runs hold a character that COCO does not write")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise Unusable("mask runs end in the middle of a number")
    return counts
