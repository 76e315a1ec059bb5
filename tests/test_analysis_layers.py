"""Encoders layer by layer: maps at every cut of every family, what training left alone is 1, and the command on encoders and on a study."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_cluster_cli import Allograft, allograft

from analysis.activations import Probe, maps_at
from analysis.evaluating import evaluating
from analysis.layers import across, averaged, top
from base.config import to_yaml
from base.errors import RequestError
from base.seeds import seed_of
from encoders.build import Encoder, build
from encoders.cuts import FAMILIES, cuts, pyramid_cuts, smallest
from encoders.export import export
from encoders.truncate import truncate
from finetune.cell import CellConfig
from finetune.task import load_task
from shards.manifest import read

__all__ = ["allograft"]  # a fixture
# The smallest of each family.
ONE_OF_EACH = [min(family.architectures, key=lambda name: (len(cuts(name)), "test" not in name)) for family in FAMILIES.values()]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_maps_at_any_cut_are_what_truncation_and_decoders_see(name: str) -> None:
    torch.set_num_threads(1)
    encoder = build(name, 1, image_size=32)
    side = max(32, smallest(name))
    x = torch.randint(0, 256, (2, 1, side, side), dtype=torch.uint8)
    with evaluating(encoder):
        names = [cut.name for cut in cuts(name)]
        maps = maps_at(encoder, x, names)
        pyramid = encoder.pyramid(x)
    assert len(maps) == len(names)
    at = dict(zip(names, maps, strict=True))
    for cut, expected in zip(pyramid_cuts(name), pyramid, strict=True):
        assert torch.equal(at[cut.name], expected), cut
    for inner in (names[0], names[len(names) // 2]):
        small = truncate(encoder, inner)
        with evaluating(small):
            assert torch.allclose(at[inner], small.pyramid(x)[-1], atol=1e-5)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_a_probe_is_the_same_for_whoever_asks(phantom_chest: str) -> None:
    one, two = (Probe(phantom_chest, images=21, size=32, batch=batch) for batch in (5, 8))
    assert one.ids == two.ids
    assert one.sha256 == two.sha256
    assert torch.equal(torch.cat(list(one)), torch.cat(list(two)))
    assert min(len(batch) for batch in one) > 1  # 21 in fives: the last joins the one before
    assert set(Probe(phantom_chest, images=10, size=32).ids) < set(one.ids)
    for other in (Probe(phantom_chest, images=20, size=32), Probe(phantom_chest, images=21, size=40)):
        assert other.sha256 != one.sha256
    with pytest.raises(RequestError):
        Probe(phantom_chest, split="nothing")


def nudged(seed: int, cut: str) -> Encoder:
    """test_resnet whose weights after a cut are others."""
    encoder, other = build("test_resnet", 1, seed=seed), build("test_resnet", 1, seed=seed + 100)
    names = [point.name for point in encoder.cuts]
    later = {point.module.split(".")[0] for point in encoder.cuts[names.index(cut) + 1 :]}
    mixed, drawn = encoder.net.state_dict(), other.net.state_dict()
    encoder.net.load_state_dict(mixed | {key: tensor for key, tensor in drawn.items() if key.split(".")[0] in later})
    return encoder


def test_what_was_frozen_is_1_and_what_was_drawn_again_is_as_unrelated_weights(phantom_chest: str) -> None:
    torch.set_num_threads(1)
    before, after, third = build("test_resnet", 1, seed=0), nudged(0, "layer2.0"), build("test_resnet", 1, seed=7)
    probe = Probe(phantom_chest, split="train", images=96, size=32)
    found = across({"a": before, "b": after, "c": third}, [("a", "b"), ("a", "c")], probe)
    same, other = ({cut: one.values for cut, one in zip(found.cuts, held, strict=True)} for held in found.pairs.values())
    for cut in ("stem", "layer1.0", "layer2.0"):
        assert same[cut]["cka"] == pytest.approx(1)
        assert same[cut]["svcca"] == pytest.approx(1)
        assert other[cut]["svcca"] < 0.999
    assert same["layer3.0"]["svcca"] < 0.999
    # Random layers on the same input are alike to a degree; drawn again they are as alike as two networks are, not more.
    assert found.images == 96
    assert top([before]) == ["layer3.0", "layer4.0"]
    mean = averaged(found.pairs["a", "b"][:2])
    assert mean.values["cka"] == pytest.approx(1)
    again = across({"a": before, "b": after}, [("a", "b")], probe)
    assert again.sha256 == found.sha256
    assert again.pairs["a", "b"][0].values == found.pairs["a", "b"][0].values


def test_two_architectures_have_no_cuts_in_common(phantom_chest: str) -> None:
    encoders = {"a": build("test_resnet", 1), "b": build("cbr_tiny", 1)}
    with pytest.raises(RequestError, match="cbr_tiny and test_resnet have no cut points in common"):
        across(encoders, [("a", "b")], Probe(phantom_chest, images=4, size=32))


def exported(folder: Path, encoder: Encoder) -> str:
    export(encoder, folder, name=folder.name, method="none", lineage=[], data=[], revision="none", image_size=32)
    return str(folder)


def test_the_command_compares_two_encoders(tmp_path: Path, phantom_chest: str, allograft: Allograft) -> None:
    one = exported(tmp_path / "before", build("test_resnet", 1))
    two = exported(tmp_path / "after", nudged(0, "layer2.0"))
    words = ["analyze", "similarity", one, "random:3", "--trained", two, "--trained", "random:3"]
    said = allograft(*words, "--data", phantom_chest, "--split", "train", "--images", "64", "--out", str(tmp_path / "out"))
    assert said.code == 0, said.err
    frame = pd.read_csv(tmp_path / "out" / "similarity.csv")
    assert len(frame) == 10
    assert frame["cka"][0] == pytest.approx(1)
    assert {"gaussian_svcca", "permuted_svcca", "kept_a", "dead_a", "area", "probe_sha256"} <= set(frame.columns)
    assert "too few rows" in said.out or frame["too_few"].isna().all()
    for name in ("layers", "coefficients"):
        held = cv2.imread(str(tmp_path / "out" / f"{name}.png"))
        assert held is not None
        assert held.std() > 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{one}"], "no study here"),
        (["{one}", "random", "--measure", "svca"], "did you mean 'svcca'"),
        (["{one}", "random", "--spatial", "folds"], "did you mean 'fold'"),
        (["{one}", "random", "--trained", "{one}"], "none or both of them after training"),
        (["{one}", "random", "--cuts", "layer9"], "has no cut 'layer9'"),
        (["random:1", "random:2"], "random weights of which architecture?"),
    ],
)
def test_bad_requests_end_with_2_and_one_line(
    words: list[str], says: str, tmp_path: Path, phantom_chest: str, allograft: Allograft
) -> None:
    one = exported(tmp_path / "one", build("test_resnet", 1))
    said = allograft("analyze", "similarity", *(word.format(one=one) for word in words), "--data", phantom_chest, "--images", "4")
    assert said.code == 2
    assert says in said.err
    assert len(said.err.splitlines()) == 1


def kept_cell(out: Path, source: str, seed: int, shards: str, encoder_dir: str | None) -> None:
    """A cell's folder as one leaves it that kept its trained encoder: here the later layers are others than at the start."""
    key = f"{source}{seed}"
    folder = out / "cells" / key
    task = load_task("phantom-chest")
    weights: dict[str, Any] = {"source_kind": "weights", "encoder_dir": encoder_dir} if encoder_dir else {"source_kind": "random"}
    config = CellConfig(
        key=key,
        architecture="test_resnet",
        source=source,
        strategy={"name": "full"},
        task=task,
        shards=shards,
        manifest_digest=read(shards).digest,
        resolution=32,
        seed=seed,
        out=str(folder),
        **weights,
    )
    drawn = seed_of("source", source, seed)
    before = build("test_resnet", 1, seed=drawn if encoder_dir is None else 0)
    other = build("test_resnet", 1, seed=1000 + seed)
    later = {name: tensor for name, tensor in other.net.state_dict().items() if name.startswith("layer4")}
    before.net.load_state_dict(before.net.state_dict() | later)
    exported(folder / "encoder", before)
    (folder / "config.yaml").write_text(to_yaml(config))
    result = {
        "key": key,
        "source": source,
        "seed": seed,
        "source_seed": seed,
        "strategy": "full",
        "options": {},
        "role": "cell",
        "metrics": [],
    }
    result |= {"task": task.task, "dataset": task.dataset, "architecture": "test_resnet", "fraction": 1.0, "resolution": 32}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_command_takes_a_study_whose_cells_kept_their_encoders(tmp_path: Path, phantom_chest: str, allograft: Allograft) -> None:
    out = tmp_path / "study"
    out.mkdir()
    (out / "study.yaml").write_text("study: made\n")
    words = ["analyze", "similarity", str(out), "--data", phantom_chest, "--split", "train", "--images", "48"]
    said = allograft(*words, "--out", str(tmp_path / "none"))
    assert said.code == 2
    assert "no cell of this study kept its trained encoder" in said.err
    source = exported(tmp_path / "pretrained", build("test_resnet", 1, seed=0))
    for seed in range(3):
        kept_cell(out, "noise", seed, phantom_chest, None)  # random weights, whatever their name
        kept_cell(out, "simclr", seed, phantom_chest, source)
    said = allograft(*words, "--measure", "cka", "--out", str(tmp_path / "made"))
    assert said.code == 0, said.err
    folder = tmp_path / "made" / "phantom-chest-test_resnet-full-1.0-32"
    frame = pd.read_csv(folder / "runs.csv")
    assert len(frame) == 6 * 5
    # The beginning is made again from the configuration: whatever training left alone is the same to the last figure.
    assert frame[frame["cut"] != "layer4.0"]["cka"].to_numpy() == pytest.approx(1)
    assert (frame[frame["cut"] == "layer4.0"]["cka"] < 0.999).all()
    pairs = pd.read_csv(folder / "pairs.csv")
    assert len(pairs) == 15 * 3
    assert "simclr and noise" in said.out
    drawn = (folder / "top-simclr.svg").read_text()
    assert "of 3 runs of simclr and 3 of noise; 95 % intervals over runs" in drawn
    assert "R squared of stem at the start and at the end  1.00" in said.out  # the first layer never moved
    assert {path.name for path in folder.glob("*.png")} == {"layers.png", "coefficients.png", "top-simclr.png", "start-against-end.png"}
    assert np.isfinite(pairs["cka"]).all()
    shutil.rmtree(out / "cells" / "noise2")
    said = allograft(*words, "--measure", "cka", "--out", str(tmp_path / "fewer"))
    assert "3 runs of simclr and 2 of noise kept their encoder, and an interval takes 3 runs of each." in said.out
