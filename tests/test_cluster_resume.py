"""`allograft pretrain --resume RUN`: what is refused before anything starts, and that a run goes on as itself."""

from pathlib import Path

import pytest
import yaml
from tiny_corpus import write

from base.config import to_yaml
from base.errors import RequestError
from cluster import plan
from cluster.plan import Packed
from cluster.resume import resumed
from cluster.single import pretrain_study
from shards import manifest


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a pretraining that was begun: its configuration, and the study beside it."""
    shards = write(tmp_path / "shards", (60,), dataset="phantom-chest")
    study = pretrain_study("simclr/smoke", [f"data.phantom-chest.shards={shards}", "architecture=test_resnet", f"out={tmp_path}/out"])
    config = plan.pretrain_config(study, study.pretrain[0], 0, {"phantom-chest": Packed(shards, manifest.read(shards))}, None)
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "out" / "study.yaml").write_text(to_yaml(study))
    return Path(config.out)


def test_a_run_goes_on_with_its_own_study(begun: Path) -> None:
    study = resumed(str(begun), [])
    assert study.out == str(begun.parent.parent)
    assert [entry.name for entry in study.pretrain] == ["simclr-smoke"]


def test_resume_and_start_from_exclude_each_other(begun: Path) -> None:
    with pytest.raises(RequestError, match="--resume goes on with a run, start_from begins a new one"):
        resumed(str(begun), ["start_from=timm:resnet18.a1_in1k"])
    with pytest.raises(RequestError, match=r"a resumed run goes on as it was begun: 'simclr/smoke' cannot be given"):
        resumed(str(begun), ["simclr/smoke", "settings.epochs=3"])


def test_what_is_no_run_or_would_be_another_one_is_refused(begun: Path) -> None:
    with pytest.raises(RequestError, match="no pretraining here"):
        resumed(str(begun.parent), [])
    file = begun.parent.parent / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["pretrain"][0]["settings"] = {"epochs": 3, "optimizer.lr": 0.5}
    file.write_text(yaml.safe_dump(study))
    with pytest.raises(RequestError, match=r"it would be another run: recipe\.epochs, recipe\.optimizer\.lr changed"):
        resumed(str(begun), [])
    study["pretrain"][0]["seeds"] = [7]
    file.write_text(yaml.safe_dump(study))
    with pytest.raises(RequestError, match="does not ask for 'simclr-smoke' seed 0"):
        resumed(str(begun), [])
