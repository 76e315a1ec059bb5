"""From raw labels to targets: policies for the uncertain, derived labels, classes; in training and for a metric."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.config import parse
from base.errors import RequestError
from shards.card import Card, Uncertain
from shards.labels import Targets, targets

NAMES = ["edema", "mass", "nodule"]
FIELDS: dict[str, Any] = {
    "schema": 2,
    "dataset": "tiny",
    "title": "tiny",
    "reader": "pairs",
    "kind": "multilabel",
    "labels": NAMES,
    "layouts": [{"name": "one", "requires": ["*.png"], "images": ["*.png"]}],
    "licence": "none",
    "access": "nowhere",
    "citation": "none",
}
RAW: list[dict[str, int | None]] = [{"edema": 1, "mass": 0, "nodule": -1}, {"edema": -1, "mass": None, "nodule": 0}]


def card(**change: Any) -> Card:
    return parse(FIELDS | change, Card, "card")


@pytest.mark.parametrize(
    ("uncertain", "target", "mask"),
    [
        ("ignore", [[1, 0, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 1]]),
        ("ones", [[1, 0, 1], [1, 0, 0]], [[1, 1, 1], [1, 0, 1]]),
        ("zeros", [[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 1]]),
        ({"edema": "ones"}, [[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 0, 1]]),
        ({"edema": "ones", "default": "zeros"}, [[1, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 1]]),
    ],
)
def test_policies(uncertain: Uncertain, target: list[list[int]], mask: list[list[int]]) -> None:
    for resolve in (Targets(card(uncertain=uncertain), NAMES, training=True), Targets(card(), NAMES, uncertain, training=True)):
        found_NL, known_NL = resolve(RAW, ["a", "b"])
        assert found_NL.tolist() == target
        assert known_NL.tolist() == mask
        assert found_NL.dtype == known_NL.dtype == np.float32


def test_a_metric_never_counts_the_uncertain() -> None:
    for uncertain in ("ones", "zeros", {"default": {"smoothed": [0.5, 0.9]}}):
        target_NL, mask_NL = targets(RAW, card(uncertain=uncertain), NAMES)
        assert mask_NL.tolist() == [[1, 1, 0], [0, 0, 1]]
        assert set(target_NL.ravel().tolist()) <= {0.0, 1.0}


def test_a_blank_may_be_a_no() -> None:
    target_NL, mask_NL = targets([{"edema": None, "mass": -1, "nodule": 1}], card(unmentioned="zeros"), NAMES)
    assert (target_NL.tolist(), mask_NL.tolist()) == ([[0, 0, 1]], [[1, 0, 1]])


def test_smoothed_labels_depend_on_seed_key_and_label_alone() -> None:
    smooth = card(uncertain={"default": {"smoothed": [0.55, 0.85]}})
    raw = [dict.fromkeys(NAMES, -1)] * 200
    keys = [f"tiny-{n}" for n in range(200)]
    drawn_NL, mask_NL = Targets(smooth, NAMES, training=True)(raw, keys)
    assert mask_NL.all()
    assert 0.55 <= drawn_NL.min() < 0.57
    assert 0.83 < drawn_NL.max() <= 0.85
    assert abs(drawn_NL.mean() - 0.7) < 0.01
    assert len(np.unique(drawn_NL)) == drawn_NL.size
    again_NL, _ = Targets(smooth, ["nodule"], training=True)(raw[:5], keys[5:10])
    assert again_NL[:, 0].tolist() == drawn_NL[5:10, 2].tolist()
    other_NL, _ = Targets(smooth, NAMES, training=True, seed=1)(raw, keys)
    assert (other_NL != drawn_NL).all()


def test_a_derived_label_is_any_of_its_own() -> None:
    made = card(views={"opacity": {"opacity": ["mass", "nodule"]}, "one": ["mass"]})
    values = [(1, 0), (0, 0), (1, None), (0, None), (-1, 0), (-1, 1)]
    target_NL, mask_NL = targets([{"edema": 0, "mass": mass, "nodule": nodule} for mass, nodule in values], made, ["opacity", "mass"])
    assert target_NL[:, 0].tolist() == [1, 0, 1, 0, 0, 1]
    assert mask_NL[:, 0].tolist() == [1, 1, 1, 0, 0, 1]


def test_one_class_says_no_to_all_others() -> None:
    grades = ["none", "mild", "moderate", "severe"]
    made = card(kind="multiclass", labels=grades, views={"referable": {"referable": ["moderate", "severe"]}})
    target_NL, mask_NL = targets([{"severe": 1}, {"none": 1}, {}], made, [*grades, "referable", "another dataset's"])
    assert target_NL.tolist() == [[0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    assert mask_NL.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6]


@given(st.lists(st.fixed_dictionaries({name: st.sampled_from([1, 0, -1, None]) for name in NAMES}), max_size=20))
def test_known_labels_come_out_as_they_are(raw: list[dict[str, int | None]]) -> None:
    target_NL, mask_NL = targets(raw, card(), [*NAMES, "absent"])
    assert mask_NL.tolist() == [[float(sample[name] in (0, 1)) for name in NAMES] + [0] for sample in raw]
    assert target_NL.tolist() == [[float(sample[name] == 1) for name in NAMES] + [0] for sample in raw]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uncertain": "twos"}, "uncertain"),
        ({"uncertain": {"oedema": "ones"}}, "oedema"),
        ({"uncertain": {"smoothed": [0.9, 0.5]}}, "lo above hi"),
        ({"views": {"some": ["oedema"]}}, "oedema"),
        ({"views": {"made": {"mass": ["edema"]}}}, "stand in labels already"),
    ],
)
def test_wrong_policies_and_views_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        card(**change)
