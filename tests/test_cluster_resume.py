"""Runs that go on: what is refused before anything is written, `allograft pretrain --resume RUN`, and what is said of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_cell
import torch
import yaml
from tiny_corpus import write

from base.config import parse, read, to_yaml
from base.errors import RequestError
from cluster import pretraining, stages
from cluster.changes import changes
from cluster.cli import _resume
from cluster.events import Events
from cluster.plan import Packed, pretrain_config
from cluster.progress import Progress
from cluster.resume import resumed
from cluster.run import run
from cluster.searches import Searches
from cluster.single import pretrain_study
from cluster.study import Study
from engine import checkpoint
from engine.saved import State
from pretrain.run import PretrainConfig
from shards import manifest

ROOT = Path(__file__).parents[1]


def asked(folder: Path, *words: str) -> Study:
    """The study of a command, its data packed."""
    data = f"data.phantom-chest.shards={folder}/shards"
    return pretrain_study("simclr/smoke", [data, "architecture=test_resnet", f"out={folder}/out", *words])


def config_of(study: Study, folder: Path) -> PretrainConfig:
    shards = f"{folder}/shards"
    corpora = {"phantom-chest": Packed(shards, manifest.read(shards))}
    return pretrain_config(study, study.pretrain[0], study.pretrain[0].seeds[0], corpora, None)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a pretraining that was begun: its configuration, and the study beside it."""
    write(tmp_path / "shards", (60,), dataset="phantom-chest")
    study = asked(tmp_path)
    config = config_of(study, tmp_path)
    Path(config.out).mkdir(parents=True)
    (Path(config.out) / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "out" / "study.yaml").write_text(to_yaml(study))
    return Path(config.out)


def checkpoints(run: Path, *steps: int) -> None:
    """Of the run at these steps."""
    state = parse(json.loads((ROOT / "tests" / "golden" / "checkpoint_state.json").read_text()), State, "golden")
    saver = checkpoint.Saver(str(run / "checkpoints"))
    for step in steps:
        saver.save(checkpoint.Snapshot(step, {"w": torch.ones(9)}, {}, state))
    saver.finish()


def finish(run: Path, **result: Any) -> None:
    tiny_cell.exported(run / "export")
    (run / "result.json").write_text(json.dumps({"name": "simclr-smoke", "seed": 0, "steps": 8, **result}))


def test_a_run_goes_on_with_its_own_configuration_whatever_the_study_asks_for_now(begun: Path) -> None:
    held = read(str(begun / "config.yaml"), PretrainConfig)
    study, config = resumed(str(begun), [])
    assert study.out == str(begun.parent.parent)
    assert config == held
    (begun.parents[1] / "study.yaml").write_text(to_yaml(asked(begun.parents[2], "settings.epochs=3", "seed=7")))
    assert resumed(str(begun), [])[1] == held


def test_a_folder_that_was_moved_goes_on_where_it_is(begun: Path, tmp_path: Path) -> None:
    shutil.move(begun.parents[1], tmp_path / "moved")
    here = tmp_path / "moved" / "pretrain" / begun.name
    assert resumed(str(here), [])[1].out == str(here)


def test_resume_and_start_from_exclude_each_other(begun: Path) -> None:
    with pytest.raises(RequestError, match="--resume goes on with a run, start_from begins a new one"):
        resumed(str(begun), ["start_from=timm:resnet18.a1_in1k"])
    with pytest.raises(RequestError, match=r"a resumed run goes on as it was begun: 'simclr/smoke' cannot be given"):
        resumed(str(begun), ["simclr/smoke", "settings.epochs=3"])


def test_what_is_no_run_or_cannot_go_on_is_refused(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no pretraining here"):
        resumed(str(begun.parent), [])
    file = begun / "config.yaml"
    held = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**held, "key": "0123456789abcdef"}))
    with pytest.raises(RequestError, match="another version of pretraining began it"):
        resumed(str(begun), [])
    file.write_text(yaml.safe_dump(held))
    shutil.rmtree(tmp_path / "shards")
    write(tmp_path / "shards", (61,), dataset="phantom-chest")
    with pytest.raises(RequestError, match="the shards of 'phantom-chest' that the run was begun with are not here"):
        resumed(str(begun), [])


def test_of_a_finished_run_one_line_says_that_there_is_nothing_to_do(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(begun)
    _resume(str(begun), [])
    assert capsys.readouterr().out == "pretrain simclr-smoke: finished at step 8, nothing to do\n"
    assert sorted(path.name for path in begun.parents[1].iterdir()) == ["pretrain", "study.yaml"]


def test_a_refused_command_leaves_what_stands(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (begun.parents[1] / "study.yaml").read_bytes()
    with pytest.raises(RequestError, match="global batch of 64 is larger than the 60 samples"):
        run(asked(begun.parents[2], "settings.global_batch=64"))
    assert (begun.parents[1] / "study.yaml").read_bytes() == before
    assert sorted(path.name for path in begun.parents[1].iterdir()) == ["pretrain", "study.yaml"]
    assert capsys.readouterr().out == ""


def test_weights_that_are_not_those_exported_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    export, _ = tiny_cell.exported(tmp_path / "export")
    (export / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:1000])
    words = ["data.phantom-chest.raw=phantom:60", f"out={tmp_path}/out", f"start_from={export}"]
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        run(pretrain_study("simclr/smoke", words))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named_with_the_step_that_the_run_goes_on_from(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(config: PretrainConfig, resources: object) -> dict[str, Any]:
        finish(begun)
        return {"restarts": 0, "steps": 40, "img_per_s": 1.0, "health": "healthy", "stragglers": []}

    monkeypatch.setattr(pretraining, "pretrain_on_ray", trained)
    checkpoints(begun, 20, 40)
    file = begun / "checkpoints" / "step-00000040" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    study, config = resumed(str(begun), [])
    stages.pretrain(study, config, "pretrain simclr-smoke", Progress(), Events(study.out))
    said = capsys.readouterr().out
    assert "step-00000040: model.safetensors does not have the committed hash" in said
    assert "goes on from step 20" in said
    assert "step 40\n" not in said


def test_what_becomes_of_pretrainings_is_said_as_it_is(begun: Path) -> None:
    folder = begun.parents[2]
    corpora = {"phantom-chest": Packed(f"{folder}/shards", manifest.read(f"{folder}/shards"))}

    def told(*words: str) -> list[str]:
        return changes(asked(folder, *words), None, corpora, Searches([]))

    assert told() == ["pretrainings: 1 new"]
    checkpoints(begun, 20)
    assert told() == ["pretrainings: 1 begun, to go on from a checkpoint"]
    finish(begun)
    assert told() == ["pretrainings: 1 kept"]
    assert told("seed=1") == ["pretrainings: 1 new"]
    assert told("settings.epochs=3") == ["pretrainings: 1 computed again, since what they are made of has changed"]


def test_what_a_command_without_a_study_file_changes_is_named_by_its_own_keys(begun: Path) -> None:
    before, now = asked(begun.parents[2]), asked(begun.parents[2], "seed=1", "settings.global_batch=16")
    corpora = {"phantom-chest": Packed(f"{begun.parents[2]}/shards", manifest.read(f"{begun.parents[2]}/shards"))}
    lines = changes(now, before, corpora, Searches([]), typed=True)
    assert lines[0] == "changed since the last command here: seed, settings, settings.global_batch"
