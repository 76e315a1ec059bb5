"""The trained encoder that a cell keeps beside its result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cell
import torch

from base.errors import RequestError
from encoders.build import build
from encoders.export import read_export
from encoders.weights import load_into, load_local
from engine.context import LocalContext
from finetune import keep
from finetune.run import plant, run
from finetune.task import load_task


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_cell.corpora(tmp_path_factory.mktemp("corpora"))


@pytest.mark.parametrize(("strategy", "architecture"), [("full", "test_resnet"), ("linear", "test_resnet"), ("lora", "test_vit")])
def test_a_cell_keeps_the_encoder_that_it_trained(shards: dict[str, str], tmp_path: Path, strategy: str, architecture: str) -> None:
    """Its plain tensors, those of lora merged, and where they came from."""
    source = tiny_cell.weights(tmp_path, 1, architecture)
    config = tiny_cell.config(shards, tmp_path, strategy={"name": strategy}, keep="encoder", settings={"recipe.lr": 0.01}, **source)
    result = run(config, LocalContext(dir=str(tmp_path)))
    info = read_export(Path(config.out) / "encoder")  # hashes its tensors
    assert (info.sha256 == result["encoder_sha256"]) == (strategy == "linear")
    step = info.lineage[-1]
    assert (step["source"], step["strategy"]["name"], step["task"]) == ("simclr", strategy, "phantom-chest")
    assert info.labelled_datasets == ["phantom-chest"]
    assert [entry["digest"] for entry in info.data] == [config.manifest_digest]
    encoder = build(architecture, 1, info.mean, info.std, image_size=info.image_size if architecture == "test_vit" else None)
    load_into(encoder.net, load_local(Path(config.out) / "encoder"))
    again, _, _ = tiny_cell.trained(config.model_copy(update={"out": str(tmp_path / "again")}), tmp_path)
    image = torch.from_numpy(np.ascontiguousarray(again.arrays("test").image[:4]))
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(image), again.module.eval().encoder(image), atol=1e-4, rtol=1e-4)


def test_a_side_that_is_padded_for_masks_is_that_of_the_export(shards: dict[str, str], tmp_path: Path) -> None:
    """A vision transformer takes whole patches, and masks of any side."""
    fields: dict[str, Any] = {"architecture": "test_vit", "strategy": {"name": "linear"}, "resolution": 50}
    config = tiny_cell.config(shards, tmp_path, task="phantom-vessels", keep="encoder", **fields)
    result = run(config, LocalContext(dir=str(tmp_path)))
    info = read_export(Path(config.out) / "encoder")
    assert (info.image_size, result["resolution"]) == (64, 50)


def test_an_encoder_is_kept_only_where_asked_and_a_result_without_is_computed_again(shards: dict[str, str], tmp_path: Path) -> None:
    config = tiny_cell.config(shards, tmp_path)
    run(config, LocalContext(dir=str(tmp_path)))
    kept = Path(config.out) / "encoder"
    assert not kept.exists()
    first = run(config.model_copy(update={"keep": "encoder"}), LocalContext(dir=str(tmp_path)))
    stamp = (kept / "allograft.json").stat().st_mtime_ns
    assert run(config.model_copy(update={"keep": "encoder"}), LocalContext(dir=str(tmp_path))) == first
    assert (kept / "allograft.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("strategy", "volume"), [({"name": "full"}, True), ({"name": "slim", "cut": "layer1.0", "factor": 2}, False)])
def test_what_has_no_export_is_refused_before_it_trains(
    shards: dict[str, str], tmp_path: Path, strategy: dict[str, Any], volume: bool
) -> None:
    config = tiny_cell.config(shards, tmp_path, architecture="resnet18", strategy=strategy, keep="encoder")
    task = load_task("phantom-chest", {"volume": volume})
    with pytest.raises(RequestError, match="cannot be exported"):
        keep.check(plant(config.model_copy(update={"task": task}), 1)[0].module.encoder, config.key)
