"""The floor of what is written beside an image: planted relations are found, nothing is read out of nothing, gaps and new words pass."""

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from analysis import floors
from analysis.metadata import frame_of, regression
from base.seeds import rng


def patients(n: int, seed: int) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any]]:
    """Rows with age, sex, view; labels: one follows age, one view, one nothing."""
    draw = rng("metadata", seed)
    age, view = draw.integers(20, 90, n), draw.choice(["AP", "PA"], n)
    rows = [{"age": int(a), "sex": str(draw.choice(["F", "M"])), "view": str(v), "site": "one"} for a, v in zip(age, view, strict=True)]
    target = np.stack([age + draw.normal(0, 10, n) > 55, (view == "AP") ^ (draw.random(n) < 0.1), draw.random(n) < 0.5], 1)
    return rows, target.astype(float)


def test_a_label_that_follows_what_is_written_is_found_and_one_that_does_not_is_not() -> None:
    (train, known), (test, asked) = patients(400, 0), patients(400, 1)
    scores = regression(train, known, test)
    assert scores is not None
    by_age, by_view, by_nothing = (roc_auc_score(asked[:, i], scores[:, i]) for i in range(3))
    assert by_age > 0.9
    assert by_view > 0.85
    assert abs(by_nothing - 0.5) < 0.1


def test_gaps_words_that_training_lacks_and_unknown_labels_pass() -> None:
    (train, known), (test, asked) = patients(300, 2), patients(200, 3)
    for i, row in enumerate(train):
        if i % 3 == 0:
            row["age"] = None
        if i % 5 == 0:
            del row["view"]
    test[0] |= {"age": "", "view": "LATERAL", "unheard": 1}
    test[1] = {}
    known[::4, 0] = math.nan
    scores = regression(train, known, test)
    assert scores is not None
    assert np.isfinite(scores).all()
    assert roc_auc_score(asked[:, 0], scores[:, 0]) > 0.8


def test_numbers_in_words_are_numbers() -> None:
    (train, known), (test, asked) = patients(300, 4), patients(200, 5)
    for row in (*train, *test):
        row["age"] = f" {row['age']}"
    scores = regression(train, known, test)
    assert scores is not None
    assert roc_auc_score(asked[:, 0], scores[:, 0]) > 0.9
    assert frame_of([{"a": " "}, {"a": 0}])["a"].isna().tolist() == [True, False]


def test_where_nothing_varies_there_is_no_floor() -> None:
    rows, target = patients(50, 6)
    same = [{"site": row["site"], "empty": None} for row in rows]
    assert regression(same, target, same) is None
    assert regression([{} for _ in rows], target, same) is None


def test_a_label_of_one_class_scores_nothing() -> None:
    rows, target = patients(60, 7)
    target[:, 1] = 1
    scores = regression(rows, target, rows)
    assert scores is not None
    assert not scores[:, 1].any()
    assert scores[:, 0].any()


@pytest.mark.parametrize("beside", [True, False])
def test_the_floors_of_a_task_hold_it_where_something_is_written(beside: bool) -> None:
    images = rng("pixels of metadata").integers(0, 255, (90, 1, 8, 8)).astype(np.uint8)
    rows, target = patients(90, 8)
    every = floors.Arrays(images, target, None, None, rows if beside else [{} for _ in rows])
    parts = [every.take(np.arange(90)[i::3]) for i in range(3)]
    found = floors.classification(*parts)
    assert ("record" in found) == beside
    if beside:
        assert found["record"]["auroc_mean"] > 0.6 > found["pixels"]["auroc_mean"]
