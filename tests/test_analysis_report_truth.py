"""What the page may not say: each test names a sentence or a mark that stood there once and was not so."""

from pathlib import Path

import pytest
from made_study import make

from analysis import report as reports
from analysis.evidence import gather
from analysis.statistics import Bootstrap

QUICK = Bootstrap(150)


@pytest.mark.parametrize(
    ("floors", "said", "unsaid"),
    [
        (
            {"record": 0.99, "pixels": 0.4},
            "2 are no better than what is written beside the image, with no image looked at",
            "nothing was learned",
        ),
        ({"metadata": 0.99}, "2 are no better than what is written beside the image", "pixel"),
        ({"pixels": 0.99}, "a pixel logistic regression or a mean mask does better than 2, so nothing was learned there", "written beside"),
        ({"pixels": 0.98, "record": 0.99}, "nothing was learned there; 2 are no better than what is written beside the image", "pixels or"),
    ],
)
def test_does_not_repeat_that_pixels_do_better_where_the_floor_is_what_is_written(
    tmp_path: Path, floors: dict[str, float], said: str, unsaid: str
) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=2, images=80)), QUICK)
    held = {("phantom-chest", 1.0): {name: {"auroc_mean": value} for name, value in floors.items()}}
    words = reports.under_floor(evidence, held)
    assert words.startswith("2 of 2 results are under a floor: ")
    assert said in words
    assert unsaid not in words
