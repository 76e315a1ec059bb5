"""`allograft explain` as a user sees it."""

import re
import sys
from collections.abc import Callable

import pytest
import yaml

from cluster import cli
from engine import gpus
from pretrain.explain import explain as sketched
from pretrain.recipe import load_recipe

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
    """The table above the recipe; of several rows of a name the first."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in reversed(said.partition("\n\n")[0].splitlines()))


def test_the_recipe_is_printed_in_full_and_can_be_read_again(explain: Say) -> None:
    code, said = explain("moco-v2/smoke", "optimizer.lr=0.5", "--architecture", "test_resnet", "--images", "500")
    assert code == 0
    shown = yaml.safe_load(said.partition("\n\n")[2])
    assert shown["optimizer"]["lr"] == 0.5
    assert shown["options"]["temperature"] == 0.2
    assert shown["options"]["queue"] is None
    assert "queue 96" in rows(said)["scaled to the data"]
    assert rows(said)["steps"] == "12 of 32 images; 15 in an epoch"
    assert rows(said)["data"] == "500 images, views of 2 x 32 px"
    assert said.startswith("encoder ")
    assert len(said.splitlines()) <= 50  # of a terminal: the answer stays in sight
    assert max(map(len, said.splitlines())) <= 140


def test_hours_fall_with_the_gpus(explain: Say) -> None:
    words = ("simclr/paper", "--architecture", "resnet50", "--channels", "3", "--gpu", "a100-80")
    few, many = (rows(explain(*words, "--gpus", count)[1]) for count in ("8", "64"))
    assert float(few["at the roofline"].split()[0]) == pytest.approx(8 * float(many["at the roofline"].split()[0]), rel=0.05)
    assert few["at the roofline"].endswith("on 8 x a100-80, bound by bandwidth")
    assert "48.6 GFLOP" in few["operations"]
    assert "does not fit" not in few


@pytest.mark.parametrize(
    ("recipe", "architecture", "ways"),
    [
        ("simclr/smoke", "test_resnet", ["--gpus", "global_batch="]),  # its batch norm allows no other
        ("simclr/smoke", "test_vit", ["--gpus", "activation_checkpointing=", "virtual_batch=", "global_batch="]),
    ],
)
def test_memory_that_is_short_is_said_and_what_would_fit_does(
    explain: Say, monkeypatch: pytest.MonkeyPatch, recipe: str, architecture: str, ways: list[str]
) -> None:
    memory = sketched(load_recipe(recipe), architecture, images=500, channels=1, gpu_count=1).cost.memory
    room = (sum(memory) - 0.7 * memory.activations) / 2**30
    monkeypatch.setitem(gpus.GPUS, "little", gpus.get("v100")._replace(memory=room))  # type: ignore[arg-type]
    words = (recipe, "--architecture", architecture, "--images", "500", "--gpu", "little")
    code, said = explain(*words)
    assert code == 0
    assert "of little" in rows(said)["does not fit"]
    assert rows(said)["at the roofline"].endswith("; if it fitted")
    assert rows(said)["at 50% of it"].endswith("; if it fitted")
    told = [line.split("  ")[-1].strip() for line in said.splitlines() if line.startswith("would fit ")]
    assert all(any(line.startswith(way) for line in told) for way in ways), told
    for line in told:
        code, said = explain(*words, *line.partition(":")[0].removesuffix(" and a rate to match").split())
        assert code == 0
        assert "does not fit" not in said


def test_transformers_are_chosen_where_only_they_fit(explain: Say) -> None:
    code, said = explain("mae/smoke", "--images", "100")
    assert code == 0
    assert "vit_base_patch16_224, 1 channel" in said
    assert "vit_small_patch16_224, 1 channel" in explain("dino/smoke", "--images", "100")[1]  # whose recipes are a transformer's


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simclr/papre",), "did you mean 'simclr/paper'"),
        (("simclr/smoke", "epoch=3"), "did you mean 'epochs'"),
        (("simclr/smoke", "--gpu", "h10"), "h100-sxm"),
        (("simclr/smoke", "--gpu", "rtx"), "unknown GPU 'rtx' (did you mean 'rtx4090'?)"),
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
