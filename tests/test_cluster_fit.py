"""Pretrainings that do not fit their data, their workers or what they start from are refused before any worker starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_corpus import write

from base.errors import RequestError
from cluster.fit import fits
from cluster.load import load_study
from cluster.outlook import outlook
from cluster.plan import Packed
from cluster.study import Study
from shards import manifest


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("shards"), (60,), dataset="phantom-chest")


def study_of(folder: Path, data: dict[str, str], *entries: dict[str, Any], **more: Any) -> Study:
    base = {"data": {"phantom-chest": "train"}, "architecture": "test_resnet"}
    runs = [{"name": f"run{i}", **base, **entry} for i, entry in enumerate(entries)]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"study": "fit", "out": str(folder / "out"), "data": {"phantom-chest": data}, "pretrain": runs, **more}))
    return load_study(str(path))


def corpora(shards: str) -> dict[str, Packed]:
    return {"phantom-chest": Packed(shards, manifest.read(shards))}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"recipe": "swav/smoke", "settings": {"options.prototypes": 500}}, "60 samples cannot have 500 prototypes"),
        ({"recipe": "deepcluster-v2/smoke", "settings": {"options.prototypes": 61}}, "60 samples cannot have 61 prototypes"),
        ({"recipe": "insdis/smoke", "settings": {"options.negatives": 60}}, "every image has only 59 others"),
        ({"recipe": "simclr/smoke", "settings": {"global_batch": 64}}, "global batch of 64 is larger than the 60 samples"),
    ],
)
def test_options_that_do_not_fit_the_number_of_images(entry: dict[str, Any], message: str, shards: str, tmp_path: Path) -> None:
    study = study_of(tmp_path, {"shards": shards}, {"recipe": "simclr/smoke"}, entry)
    with pytest.raises(RequestError, match=f"^pretrain run1: .*{message}"):
        fits(study, corpora(shards))


def test_a_plan_says_which_run_does_not_fit(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"recipe": "swav/smoke", "settings": {"options.prototypes": 500}}
    assert not outlook(study_of(tmp_path, {"shards": shards}, {"recipe": "simclr/smoke"}, wrong))
    told = capsys.readouterr()
    assert "pretrain run0" in told.out
    assert "1 of 1 to do" in told.out
    assert "cannot start, see above" in told.out
    assert [line for line in told.err.splitlines() if "cannot have 500 prototypes" in line] == told.err.splitlines()
    assert outlook(study_of(tmp_path, {"shards": shards}, {"recipe": "simclr/smoke"}))


def test_images_smaller_than_the_crop(shards: str, tmp_path: Path) -> None:
    entry = {"recipe": "simclr/smoke", "settings": {"views.size": 96}}
    fits(study_of(tmp_path, {"raw": "phantom:60@3/96"}, entry), corpora(shards))
    study = study_of(tmp_path, {"raw": "phantom:60"}, entry)
    with pytest.raises(RequestError, match=r"views of 96 px .*'phantom-chest'.* at most 64 px \(pretrain\.run0\.settings\.views\.size=64,"):
        fits(study, corpora(shards))


def test_images_reduced_when_packed_are_as_small_as_the_card_says(shards: str, tmp_path: Path) -> None:
    study = study_of(tmp_path, {"shards": shards}, {"recipe": "simclr/smoke"})
    packed = manifest.read(shards)
    card = packed.card.model_copy(update={"phantom": None, "max_side": 31})
    with pytest.raises(RequestError, match=r"views of 32 px .* at most 31 px"):
        fits(study, {"phantom-chest": Packed(shards, packed.model_copy(update={"card": card}))})


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([{"recipe": "simclr/smoke"}], {"resources": {"pretrain_workers": 3}}, "global batch 32 does not divide over 3 workers"),
        (
            [{"recipe": "simclr/smoke", "settings": {"global_batch": 24, "accumulate": 8}}],
            {"resources": {"pretrain_workers": 2}},
            "global batch 24 does not divide over 2 workers in 8 micro-batches each",
        ),
        (
            [{"recipe": "simclr/smoke"}, {"recipe": "mae/smoke", "architecture": None, "start_from": "pretrain:run0"}],
            {},
            "mae trains a vision transformer, not test_resnet",
        ),
        (
            [{"recipe": "simclr/smoke"}, {"recipe": "simclr/smoke", "architecture": "resnet18", "start_from": "pretrain:run0"}],
            {},
            "weights of test_resnet do not fit resnet18",
        ),
        (
            [{"recipe": "simclr/smoke"}, {"recipe": "moco-v2/smoke", "settings": {"options.queue": 100}}],
            {},
            r"pretrain\[1\]: .*100 keys is not a multiple of the global batch of 32 \(pretrain\.run1\.settings\.options\.queue=96\)",
        ),
        (
            [{"recipe": "simclr/smoke", "settings": {"virtual_batch": 8}}],
            {},
            r"virtual_batch is exact only without batch norm, and test_resnet has it \(pretrain\.run0\.settings\.virtual_batch=null,",
        ),
        ([{"recipe": "simclr/smoke", "start_from": "pretrain:run0"}], {}, r"pretrain\[0\]\.start_from: unknown pretraining run 'run0'"),
        (
            [{"recipe": "simclr/smoke", "start_from": "pretrain:run1"}, {"recipe": "simclr/smoke", "start_from": "pretrain:run0"}],
            {},
            r"pretrain\[0\]\.start_from: unknown pretraining run 'run1'",
        ),
    ],
)
def test_what_a_study_file_alone_shows(entries: list[dict[str, Any]], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        study_of(tmp_path, {"raw": "phantom:60"}, *entries, **more)
