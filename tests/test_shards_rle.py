"""Run lengths: three encodings of one asymmetric mask, and each against an encoder written here."""

import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.planes import Unusable
from shards.rle import Kind, decode

# 3 high, 4 wide; unlike itself transposed, turned or mirrored. Down the columns: 0 1 1 | 0 0 1 | 0 0 0 | 1 0 0.
MASK = np.array([[0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], np.uint8)


def runs(mask_HW: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of ones, down the columns."""
    flat = [0, *mask_HW.T.ravel().tolist(), 0]
    starts = [i for i in range(len(flat) - 1) if (flat[i], flat[i + 1]) == (0, 1)]
    ends = [i for i in range(len(flat) - 1) if (flat[i], flat[i + 1]) == (1, 0)]
    return list(zip(starts, ends, strict=True))


def kaggle(mask_HW: np.ndarray) -> str:
    return " ".join(f"{start + 1} {end - start}" for start, end in runs(mask_HW))


def siim(mask_HW: np.ndarray) -> str:
    last, parts = 0, []
    for start, end in runs(mask_HW):
        parts.append(f"{start - last} {end - start}")
        last = end
    return " ".join(parts)


def counts(mask_HW: np.ndarray) -> list[int]:
    edges = [0, *(edge for run in runs(mask_HW) for edge in run), mask_HW.size]
    return [after - before for before, after in itertools.pairwise(edges)]


def packed(numbers: Sequence[int]) -> str:
    """COCO's text: differences to two before from the fourth on, 5 bits a character, lowest first."""
    text = ""
    for i, number in enumerate(numbers):
        value, more = number - numbers[i - 2] if i > 2 else number, True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | 32 if more else bits) + 48)
    return text


def coco(mask_HW: np.ndarray) -> str:
    return json.dumps({"size": list(mask_HW.shape), "counts": counts(mask_HW)})


def coco_text(mask_HW: np.ndarray) -> str:
    return json.dumps({"size": list(mask_HW.shape), "counts": packed(counts(mask_HW))})


def coco_bare(mask_HW: np.ndarray) -> str:
    return " ".join(str(count) for count in counts(mask_HW))


ENCODERS: list[tuple[Kind, Callable[[np.ndarray], str]]] = [
    ("kaggle", kaggle),
    ("siim", siim),
    ("coco", coco),
    ("coco", coco_text),
    ("coco", coco_bare),
]
NAMES = [encode.__name__ for _, encode in ENCODERS]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("kaggle", "2 2 6 1 10 1"),
        ("siim", "1 2 2 1 3 1"),
        ("coco", "1 2 2 1 3 1 2"),
        ("coco", '{"size": [3, 4], "counts": [1, 2, 2, 1, 3, 1, 2]}'),
        ("coco", '{"size": [3, 4], "counts": "122O10O"}'),
    ],
)
def test_an_asymmetric_mask(kind: Kind, text: str) -> None:
    assert np.array_equal(decode([text], kind, 3, 4), MASK)


@pytest.mark.parametrize(("kind", "encode"), ENCODERS, ids=NAMES)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)))
def test_what_is_encoded_is_decoded(kind: Kind, encode: Callable[[np.ndarray], str], mask_HW: np.ndarray) -> None:
    assert np.array_equal(decode([encode(mask_HW)], kind, *mask_HW.shape), mask_HW)


def test_several_texts_are_united() -> None:
    assert np.array_equal(decode(["2 2", "6 1 10 1", "3 1"], "kaggle", 3, 4), MASK)
    assert not decode([], "siim", 3, 4).any()


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("kaggle", "1 2 3", "pairs of numbers"),
        ("kaggle", "0 2", "beyond the image's 12 pixels"),
        ("kaggle", "12 2", "beyond"),
        ("siim", "3 -2", "beyond"),
        ("siim", "one two", "not numbers"),
        ("coco", "1 2 3", "cover 6 pixels, the image has 12"),
        ("coco", '{"size": [4, 3], "counts": [12]}', "are of an image of"),
        ("coco", '{"counts": [12]}', "not the JSON of COCO"),
        ("coco", '{"size": [3, 4], "counts": "P"}', "in the middle of a number"),
    ],
)
def test_wrong_runs_are_refused(kind: Kind, text: str, says: str) -> None:
    with pytest.raises(Unusable, match=says):
        decode([text], kind, 3, 4)
