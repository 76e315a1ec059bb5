"""`allograft explain` as a user sees it."""

import re
import sys
from collections.abc import Callable

import pytest
import yaml

from cluster import cli

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Exit code and what was said, of the command in this process."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["allograft", "explain", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def rows(said: str) -> dict[str, str]:
    """The table below the recipe."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in said.partition("\n\n")[2].splitlines())


def test_the_recipe_is_printed_in_full_and_can_be_read_again(explain: Say) -> None:
    code, said = explain("moco-v2/smoke", "optimizer.lr=0.5", "--architecture", "test_resnet", "--images", "500")
    assert code == 0
    shown = yaml.safe_load(said.partition("\n\n")[0])
    assert shown["optimizer"]["lr"] == 0.5
    assert shown["options"]["temperature"] == 0.2
    assert shown["options"]["queue"] is None
    assert "queue 96" in rows(said)["scaled to the data"]
    assert rows(said)["steps"] == "12 of 32 images; 15 in an epoch"
    assert rows(said)["data"] == "500 images, views of 2 x 32 px"


def test_hours_fall_with_the_gpus_and_memory_that_is_short_is_said(explain: Say) -> None:
    words = ("simclr/paper", "--architecture", "resnet50", "--channels", "3", "--gpu", "a100-80")
    one, many = (rows(explain(*words, "--gpus", count)[1]) for count in ("1", "64"))
    assert float(one["at the roofline"].split()[0]) == pytest.approx(64 * float(many["at the roofline"].split()[0]), rel=0.05)
    assert one["at the roofline"].endswith("on 1 x a100-80, bound by bandwidth")
    assert "48.6 GFLOP" in one["operations"]
    assert one[""].startswith("more than the 80 GiB of a100-80: --gpus 8")
    assert "" not in many


def test_transformers_are_chosen_where_only_they_fit(explain: Say) -> None:
    code, said = explain("mae/smoke", "--images", "100")
    assert code == 0
    assert "vit_base_patch16_224, 1 channel" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simclr/papre",), "did you mean 'simclr/paper'"),
        (("simclr/smoke", "epoch=3"), "did you mean 'epochs'"),
        (("simclr/smoke", "--gpu", "h10"), "h100-sxm"),
        (("simclr/smoke", "--architecture", "resnet51"), "did you mean 'resnet50'"),
        (("mae/smoke", "--architecture", "resnet18"), "vision transformer"),
        (("simclr/smoke", "--gpus", "5"), "does not divide over 5"),
        (("moco-v2/smoke", "options.queue=100", "--images", "500"), "options.queue=96"),
    ],
)
def test_wrong_requests_end_with_2_and_what_would_be_right(explain: Say, words: tuple[str, ...], said: str) -> None:
    code, text = explain(*words)
    assert code == 2
    assert said in text
    assert "Traceback" not in text
