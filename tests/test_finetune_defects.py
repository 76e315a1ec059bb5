"""Defects of the studies' code that are not about numbers (../shared/reference/transfer-learning.md 2.5, 3.7): what does not run, is not
found, or cannot be run again."""

import ast
import importlib
import json
import random
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_cell
import torch
import typer
from test_datasets import CARDS, SECRET, build, wide
from test_house import FILES

from base.errors import RequestError
from base.paths import ROOT, names
from cluster.cli import app
from cluster.single import finetune_study
from encoders.build import build as build_encoder
from encoders.published import load_zoo
from encoders.weights import load_into, load_local
from engine.context import LocalContext
from finetune.measure import rows_of
from finetune.run import run
from finetune.task import load_task
from shards.pack import pack, plan


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_cell.corpora(tmp_path_factory.mktemp("corpora"))


def context(folder: Path) -> LocalContext:
    return LocalContext(dir=str(folder / "context"))


def test_does_not_repeat_pickled_modules_that_load_only_as_they_were_trained(shards: dict[str, str], tmp_path: Path) -> None:
    """2.5-6: whole modules were saved, on the device of their training, and the test read `.module`, which only a wrapper has."""
    config = tiny_cell.config(shards, tmp_path, keep="encoder")
    run(config, context(tmp_path))
    files = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".json", ".jsonl", ".parquet", ".md", ".safetensors"}
    for path in files:
        assert path.read_bytes()[:1] != b"\x80"
        members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        assert all(member.endswith(".npy") for member in members)
    state = load_local(Path(config.out) / "encoder")
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert set(load_into(build_encoder("test_resnet", 1).net, state).loaded) == set(state)


def test_does_not_repeat_paths_of_the_authors_machines_and_a_class_that_never_ran(tmp_path: Path) -> None:
    """2.5-7: paths of home folders in the code, a network that crashes without arguments, an ImageNet that reads an unknown name."""
    held = [path for folder in ("datasets", "studies", "encoders/zoo", "finetune/tasks") for path in (ROOT / folder).glob("*.yaml")]
    for path in [*FILES, *held]:
        assert not re.search(r"/(home|Users|root)/", path.read_text()), path
    assert build_encoder("test_resnet", 1).eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 96)
    card = wide(CARDS["imagenet-1k"])
    (tmp_path / "raw").mkdir()
    truths = build(card, card.layouts[0], tmp_path / "raw")
    assert sum(pack(card, str(tmp_path / "raw"), str(tmp_path / "out"), secret=SECRET).counts.values()) == len(truths)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each `allograft COMMAND ...` of a page up to the end of its line or code: the words of the command, and its options."""
    for words in re.findall(r"allograft ((?:analyze )?[a-z]+(?: [^`#\n]*)?)", text):
        yield words, re.findall(r" (--[a-z][a-z-]*)", words.partition(" -- ")[0])


def test_does_not_repeat_documented_commands_and_names_that_are_not_accepted() -> None:
    """2.5-8: training and testing were documented by the same command, and a data set by a name that the code refuses."""
    group: Any = typer.main.get_command(app)
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for words, options in commands(page.read_text()):
            command, rest = group, words.split()
            while hasattr(command, "commands") and rest:
                assert rest[0] in command.commands, f"{page.name}: allograft {words}"
                command, rest = command.commands[rest[0]], rest[1:]
            known = {name for parameter in command.params for name in parameter.opts}
            assert set(options) <= known, f"{page.name}: allograft {words}"
            found += 1
    assert found > 40
    for name in names("task"):
        assert load_task(name).dataset in CARDS
    with pytest.raises(RequestError, match="did you mean 'dxc14'"):
        load_task("dxc-14")


def test_does_not_repeat_gradients_in_evaluation_and_a_second_look_at_the_training_images(shards: dict[str, str], tmp_path: Path) -> None:
    """2.5-9: evaluation built a graph, and every epoch went through the training images twice; logs and caches were committed."""
    seen: Counter[tuple[bool, bool]] = Counter()

    def watched(made: Any) -> Any:
        made.module.encoder.register_forward_pre_hook(
            lambda encoder, given: seen.update({(encoder.training, torch.is_grad_enabled()): len(given[0])})
        )
        return made

    trainer, selection, _ = tiny_cell.trained(tiny_cell.config(shards, tmp_path), tmp_path, change=watched)
    train, val = (len(trainer.arrays(split)) * selection.epochs for split in ("train", "val"))
    assert seen == {(True, True): train, (False, False): val}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name.endswith((".log", ".pyc", ".pt", ".pth")) or "__pycache__" in name]


def test_does_not_repeat_a_data_set_whose_option_was_never_defined(tmp_path: Path) -> None:
    """3.7-2: VinDr-CXR read an argument that no parser had."""
    card = wide(CARDS["vindr-cxr"])
    (tmp_path / "raw").mkdir()
    build(card, card.layouts[0], tmp_path / "raw")
    pack(card, str(tmp_path / "raw"), str(tmp_path / "out"), secret=SECRET)
    config = tiny_cell.config({"vindr-cxr": str(tmp_path / "out")}, tmp_path, "vindr/smoke")
    result = run(config, context(tmp_path))
    assert {row["class"] for row in result["metrics"]} >= set(config.task.measured)


def test_does_not_repeat_masks_that_cannot_be_tested_and_a_source_that_must_be_named(shards: dict[str, str], tmp_path: Path) -> None:
    """3.7-6: testing a segmentation named a model that was not there, and no `--init` crashed."""
    study = finetune_study("phantom-vessels", ["data.phantom-fundus.raw=phantom:24", "architecture=test_resnet"])
    assert study.cells is not None
    assert [source.source for source in study.cells.sources] == ["random"]
    config = tiny_cell.config(shards, tmp_path, "phantom-vessels")
    result = run(config, context(tmp_path))
    assert {"val", "test"} == {row["split"] for row in result["metrics"]}
    stored = pd.read_parquet(Path(config.out) / "predictions.parquet")
    assert rows_of(config.task, stored) == result["metrics"]  # tested again, without the network


def test_does_not_repeat_runs_without_a_seed_and_logs_that_mix_them(shards: dict[str, str], tmp_path: Path) -> None:
    """3.7-9: trials had no seeds, cuDNN chose its kernels by the clock, and a run of the same name was appended to the log of the first."""
    rows = []
    for run_of in (1, 2):
        torch.manual_seed(run_of)
        np.random.seed(run_of)
        random.seed(run_of)
        _, _, made = tiny_cell.trained(tiny_cell.config(shards, tmp_path), tmp_path)
        rows.append(made)
    assert rows[0] == rows[1]
    assert tiny_cell.trained(tiny_cell.config(shards, tmp_path, seed=1), tmp_path)[2] != rows[0]
    assert not torch.backends.cudnn.benchmark
    config = tiny_cell.config(shards, tmp_path)
    first = run(config, context(tmp_path))
    log = Path(config.out) / "metrics.jsonl"
    (Path(config.out) / "result.json").unlink()  # as a run that was cut off leaves it
    assert run(config, context(tmp_path))["metrics"] == first["metrics"]
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]


def test_does_not_repeat_names_that_libraries_have_dropped() -> None:
    """3.7-10: it did not import where the libraries were newer than its authors' (`sklearn.metrics.ranking`, `np.bool`)."""
    short = {"np": np, "torch": torch, "F": torch.nn.functional, "nn": torch.nn, "pd": pd}
    ours = {"numpy", "torch", "timm", "torchvision", "sklearn", "scipy", "pandas", "cv2", "safetensors", "pydantic"}
    used: set[tuple[str, str]] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in ours:
                used |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in short:
                used.add((short[node.value.id].__name__, node.attr))
    assert len(used) > 200
    for module, name in sorted(used):
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}"), f"{module}.{name}"


def test_does_not_repeat_dead_ends_for_links_and_splits_that_are_not_there(tmp_path: Path) -> None:
    """3.7-12: weights behind links of a console or none at all; splits of CheXpert, PE, SIIM and Montgomery that the README
    promises. Here a split is a function of patients' names."""
    for name in names("weights"):
        assert re.fullmatch(r"https://[\w.-]+/\S+\.(pth|tar|pt|pkl)(\?\S*)?", load_zoo(name).url), name
    for name, card in CARDS.items():
        assert card.phantom or re.match(r"https?://[\w.-]+/", card.access), name
    for name in ("chexpert", "rsna-pe", "siim-acr", "montgomery"):
        card, splits = wide(CARDS[name]), []
        (tmp_path / name / "here").mkdir(parents=True)
        build(card, card.layouts[0], tmp_path / name / "here")
        shutil.copytree(tmp_path / name / "here", tmp_path / name / "there")
        for place in ("here", "there"):
            jobs = plan(card, str(tmp_path / name / place), SECRET)
            splits.append({record.key: record.split for job in jobs for record in job.records})
        assert splits[0] == splits[1], name
        assert {"train", "test"} <= set(splits[0].values()), name
