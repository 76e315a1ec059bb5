"""Chains of pretrainings: what a run replays of the runs before it, what it may forget, and where it may start from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_corpus import write

from base import storage
from base.config import parse
from base.errors import RequestError
from cluster import facts, plan
from cluster.changes import changes
from cluster.load import load_study
from cluster.outlook import outlook
from cluster.plan import Packed, Weights
from cluster.searches import Searches
from cluster.study import Study
from encoders.build import build
from encoders.export import export, read_export
from engine.context import LocalContext
from pretrain.loop import Run
from pretrain.run import PretrainConfig, run
from shards import manifest
from shards.corpus import Corpus as Samples
from shards.loader import TrainLoader

SIZES = {"phantom-chest": 60, "procedural": 30, "nih-cxr14": 90}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Packed]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shards")
    urls = {name: write(folder / name, (size,), dataset=name) for name, size in SIZES.items()}
    return {name: Packed(url, manifest.read(url)) for name, url in urls.items()}


def chain(folder: Path, corpora: dict[str, Packed], *entries: dict[str, Any]) -> Study:
    base = {"recipe": "supervised/smoke", "architecture": "test_resnet", "settings": {"max_steps": 2, "checkpoint_every_steps": 0}}
    data = {name: {"shards": corpus.url} for name, corpus in corpora.items()}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"study": "chain", "out": str(folder / "out"), "data": data, "pretrain": [base | e for e in entries]}))
    return load_study(str(path))


A = {"name": "a", "data": {"phantom-chest": "train"}}
B = {"name": "b", "data": {"procedural": "train"}, "start_from": "pretrain:a"}
C = {"name": "c", "data": {"nih-cxr14": "train"}, "start_from": "pretrain:b"}


def config_of(study: Study, number: int, corpora: dict[str, Packed], start: Weights | None = None) -> PretrainConfig:
    start = start or Weights(url="/before", sha256="0" * 64, architecture="test_resnet")
    return plan.pretrain_config(study, study.pretrain[number], 0, corpora, start if number else None)


def test_a_chain_of_three_replays_all_before_it_in_proportion_to_their_sizes(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    study = chain(tmp_path, corpora, A, B, C | {"replay": 0.3})
    config = config_of(study, 2, corpora)
    assert {ref.dataset: ref.weight for ref in config.data} == pytest.approx({"nih-cxr14": 0.7, "phantom-chest": 0.2, "procedural": 0.1})
    loader = TrainLoader([Samples(ref.shards) for ref in config.data], [ref.weight for ref in config.data], config.recipe.views, 16, seed=0)
    ids = [i for step in range(100) for i in loader.ids(step).tolist()]
    assert sum(i >= 90 for i in ids) / len(ids) == pytest.approx(0.3, abs=0.01)
    assert {ref.dataset for ref in config.earlier} == {"phantom-chest", "procedural"}


def test_an_epoch_of_a_run_that_replays_is_one_pass_over_its_own_data(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    config = config_of(chain(tmp_path, corpora, A, B | {"replay": 0.4, "settings": {"global_batch": 10}}), 1, corpora)
    one = Run(config.model_copy(update={"start_from": None, "start_from_sha256": None}), LocalContext(dir=config.out))
    one._build()
    assert one.epoch_steps == 5  # 30 images of its own are 60 % of 50
    ids = [i for step in range(one.epoch_steps) for i in one.loader.ids(step).tolist()]
    assert sorted(i for i in ids if i < 30) == list(range(30))


def test_a_plan_counts_the_steps_of_a_run_that_replays(
    tmp_path: Path, corpora: dict[str, Packed], capsys: pytest.CaptureFixture[str]
) -> None:
    study = chain(tmp_path, corpora, A, B | {"replay": 0.4, "settings": {"global_batch": 10, "epochs": 2, "max_steps": None}})
    outlook(study)
    assert re.search(r"pretrain b +1 of 1 to do, 10 steps,", capsys.readouterr().out)  # two epochs of the five above


def test_runs_that_follow_a_changed_one_are_computed_again_and_not_new(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    study = chain(tmp_path, corpora, A, B)
    for i, name in enumerate("ab"):
        result = {"name": name, "seed": 0, "key": f"{i}" * 16}
        storage.put(f"{study.out}/pretrain/{name}-{result['key']}/result.json", json.dumps(result))
    assert changes(study, None, corpora, Searches([])) == ["pretrainings: 2 computed again, since what they are made of has changed"]


def test_replay_is_part_of_the_key_and_other_runs_keep_theirs(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    keys = [config_of(chain(tmp_path, corpora, A, B | extra), 1, corpora).key for extra in ({}, {"replay": 0.3}, {"replay": 0.5})]
    assert len(set(keys)) == 3
    alone = config_of(chain(tmp_path, corpora, A), 0, corpora)
    assert alone.key == config_of(chain(tmp_path, corpora, A, B), 0, corpora).key
    assert [ref.weight for ref in alone.data] == [1.0]
    assert alone.earlier == []


def test_left_out_samples_do_not_count(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    less = {
        **corpora,
        "phantom-chest": Packed(corpora["phantom-chest"].url, corpora["phantom-chest"].manifest, {"train": tuple(range(30))}),
    }
    config = config_of(chain(tmp_path, corpora, A, B, C | {"replay": 0.5}), 2, less)
    assert [ref.weight for ref in config.data] == pytest.approx([0.5, 0.25, 0.25])
    assert config.data[1].without == list(range(30))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([A | {"replay": 0.3}], "it starts from no run of this study"),
        ([A, B | {"start_from": "timm:resnet18.a1_in1k", "replay": 0.3}], "it starts from no run of this study"),
        ([A, B | {"data": A["data"], "replay": 0.3}], "the runs before it read the same data"),
        ([A, B | {"recipe": "pcl-v2/smoke", "replay": 0.3}], "pcl-v2 needs every sample once an epoch"),
        ([A, B | {"replay": 1.0}], "replay"),
    ],
)
def test_replay_that_means_nothing_is_refused(
    entries: list[dict[str, Any]], message: str, tmp_path: Path, corpora: dict[str, Packed]
) -> None:
    with pytest.raises(RequestError, match=message):
        chain(tmp_path, corpora, *entries)


def test_replay_of_colour_in_a_grey_run_is_refused(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    fundus = write(tmp_path / "fundus", (20,), dataset="phantom-fundus", channels=3)
    more = {**corpora, "phantom-fundus": Packed(fundus, manifest.read(fundus))}
    first = A | {"data": {"phantom-fundus": "train"}}
    with pytest.raises(RequestError, match="grey and colour corpora in one run"):
        chain(tmp_path, more, first, B | {"replay": 0.3})
    assert config_of(chain(tmp_path, more, first, B), 1, more).earlier == []  # what a grey encoder cannot see is not probed


def test_a_run_that_replays_says_so_in_its_lineage_and_what_it_kept(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    study = chain(tmp_path, corpora, A, B | {"replay": 0.25})
    first = run(config_of(study, 0, corpora), LocalContext(dir=str(tmp_path)))
    assert first is not None
    start = Weights(url=f"{config_of(study, 0, corpora).out}/export", sha256=first["encoder_sha256"], architecture="test_resnet")
    config = config_of(study, 1, corpora, start)
    second = run(config, LocalContext(dir=str(tmp_path)))
    assert second is not None
    assert (second["lineage"][0]["replay"], second["lineage"][1]["replay"]) == (None, 0.25)
    assert second["lineage"][1]["shares"] == {"procedural train": 0.75, "phantom-chest train": 0.25}
    assert second["lineage"][1]["datasets"] == ["procedural", "phantom-chest"]
    info = read_export(f"{config.out}/export")
    assert info.lineage[1]["shares"] == second["lineage"][1]["shares"]
    assert [entry["dataset"] for entry in info.data] == ["phantom-chest", "procedural"]
    told = facts.pretraining(config.model_dump(mode="json", by_alias=True), second)
    probes = {f"source_task/phantom-chest/{name}_{when}" for name in ("linear_auroc", "knn_auroc") for when in ("before", "after")}
    assert probes <= set(told.metrics)
    assert told.params["replay"] == "0.25"


def test_grey_data_goes_on_from_weights_of_colour_with_the_same_outputs(tmp_path: Path, corpora: dict[str, Packed]) -> None:
    """A chain from three channels to one and back: the encoder of a run that has not stepped yet gives the outputs of its source."""
    from pretrain import ends

    colour = build("test_resnet", 3, (0.4,) * 3, (0.2,) * 3, seed=1)
    facts_of: dict[str, Any] = {"method": "timm", "lineage": [], "data": [], "revision": "abc", "image_size": 32}
    sha256 = export(colour, tmp_path / "colour", name="colour", **facts_of)
    study = chain(tmp_path, corpora, A | {"start_from": str(tmp_path / "colour")})
    start = Weights(url=str(tmp_path / "colour"), sha256=sha256, architecture="test_resnet")
    config = plan.pretrain_config(study, study.pretrain[0], 0, corpora, start)
    assert config.in_chans == 1
    grey, _ = ends.begin(config)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    wanted = colour.eval()(images.repeat(1, 3, 1, 1))
    assert torch.allclose(grey.eval()(images), wanted, atol=1e-5)
    sha256 = export(grey, tmp_path / "grey", name="grey", **facts_of)
    back = parse(
        config.model_dump(mode="json", by_alias=True) | {"in_chans": 3, "start_from": str(tmp_path / "grey"), "start_from_sha256": sha256},
        PretrainConfig,
        "test",
    )
    again, _ = ends.begin(back)
    assert torch.allclose(again.eval()(images.repeat(1, 3, 1, 1)), wanted, atol=1e-5)
    result = run(config, LocalContext(dir=str(tmp_path)))
    assert result is not None
    assert json.loads(Path(f"{config.out}/export/allograft.json").read_text())["in_chans"] == 1


@pytest.fixture
def weights_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for published weights, and one export that stands for everything registered elsewhere."""
    monkeypatch.setenv("ALLOGRAFT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    encoder = build("test_resnet", 3, (0.4,) * 3, (0.2,) * 3, seed=1)
    before = [{"dataset": "imagenet-1k", "digest": "not ours", "licence": "research only"}]
    about: dict[str, Any] = {"method": "timm", "data": before, "revision": "abc", "image_size": 32}
    step = {"name": "timm:x", "method": "timm", "datasets": [], "labelled": []}
    export(encoder, tmp_path / "elsewhere", name="elsewhere", lineage=[step], **about)
    return tmp_path / "elsewhere"


def give(kind: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make weights of that kind available without a network; returns the source's name."""
    import shutil

    import timm
    from safetensors.torch import save_file

    from cluster import published, registry, sources
    from encoders import published as files

    whole = timm.create_model("test_resnet", num_classes=1000).state_dict()
    if kind == "timm":
        save_file(whole, "published.safetensors")
        published.obtain("timm:test_resnet.r160_in1k", "published.safetensors")
        return "timm:test_resnet.r160_in1k"
    if kind == "zoo":
        small = files.load_zoo("moco-v2").model_copy(update={"architecture": "test_resnet"})
        monkeypatch.setattr(files, "load_zoo", lambda name: small)
        torch.save({"state_dict": {f"module.encoder_q.{key}": value for key, value in whole.items()}}, "moco.pth.tar")
        published.obtain("zoo:moco-v2", "moco.pth.tar")
        return "zoo:moco-v2"
    if kind == "models":
        monkeypatch.setattr(registry, "pull", lambda name, folder, uri: shutil.copytree(elsewhere, folder))
        return "models:/demo@champion"
    if kind == "run":
        monkeypatch.setattr(sources, "_download_run", lambda run, folder, uri: shutil.copytree(elsewhere, folder))
        return "run:0123456789abcdef"
    return {"path": "./elsewhere", "absolute": str(elsewhere), "url": f"file://{elsewhere}"}[kind]


@pytest.mark.parametrize("kind", ["timm", "zoo", "models", "run", "path", "absolute", "url"])
def test_a_chain_starts_from_published_registered_and_exported_weights(
    kind: str, tmp_path: Path, corpora: dict[str, Packed], weights_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published weights -> one corpus -> the next: planned, begun with those very tensors, and run to a result with the whole lineage."""
    from cluster.standing import standing_weights, start_of
    from encoders.weights import load_local, sha256_of
    from pretrain import ends

    source = give(kind, weights_here, monkeypatch)
    study = chain(tmp_path, corpora, A | {"architecture": None, "start_from": source}, B | {"architecture": None})
    assert standing_weights(study, corpora)[1] == ["a", "b"]
    start = start_of(study.pretrain[0].start_from, 0, {}, study, "")
    assert start is not None
    assert start.architecture == "test_resnet"
    config = plan.pretrain_config(study, study.pretrain[0], 0, corpora, start)
    encoder, parent = ends.begin(config)
    assert parent is not None
    published = load_local(start.url.removeprefix("file://"))
    assert torch.equal(encoder.net.state_dict()["conv1.0.weight"], published["conv1.0.weight"].sum(dim=1, keepdim=True))
    assert sha256_of(published) == start.sha256
    monkeypatch.chdir("/")
    result = run(config, LocalContext(dir=str(tmp_path)))
    assert result is not None
    assert [step["name"] for step in result["lineage"]][1:] == ["a"]
    assert result["lineage"][0]["sha256"] == result["start_from_sha256"] == start.sha256
    seen = [entry["dataset"] for entry in read_export(f"{config.out}/export").data]
    assert seen == ["imagenet-1k", "phantom-chest"]
    assert standing_weights(study, corpora)[1] == ["b"]


def test_an_export_whose_file_was_changed_is_refused_before_anything_runs(
    tmp_path: Path, corpora: dict[str, Packed], weights_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from cluster.standing import standing_weights
    from encoders.weights import load_local

    folder = Path(give("absolute", weights_here, monkeypatch))
    state = dict(load_local(folder))
    state.popitem()
    save_file(state, folder / "model.safetensors")
    study = chain(tmp_path, corpora, A | {"architecture": None, "start_from": str(folder)})
    with pytest.raises(RequestError, match="the weights are not those that were exported"):
        standing_weights(study, corpora)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="no weights here"):
        standing_weights(study, corpora)


def test_sources_that_are_not_there_are_refused(tmp_path: Path, corpora: dict[str, Packed], weights_here: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'moco-v2'"):
        chain(tmp_path, corpora, A | {"start_from": "zoo:moco-2"})
    with pytest.raises(RequestError, match="did you mean 'random'"):
        chain(tmp_path, corpora, A | {"start_from": "randon"})
    from cluster.standing import start_of

    study = chain(tmp_path, corpora, A | {"start_from": "./nowhere"})
    with pytest.raises(RequestError, match=f"{tmp_path}/nowhere: no exported encoder here: there is no such file or folder"):
        start_of(study.pretrain[0].start_from, 0, {}, study, "")


def test_weights_are_shown_converted_and_listed(
    tmp_path: Path, weights_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    from cluster import listing, published
    from encoders import published as files

    before = listing.KINDS["weights"][1]()[1]
    assert len(before) == 11
    assert not any("here" in row for row in before)
    small = files.load_zoo("swav").model_copy(update={"architecture": "test_resnet"})
    torch.save({f"module.{key}": value for key, value in timm.create_model("test_resnet").state_dict().items()}, "swav.pth.tar")
    with monkeypatch.context() as patched:
        patched.setattr(files, "load_zoo", lambda name: small)
        published.show("zoo:swav", published.obtain(published.source_of("swav"), "swav.pth.tar"))
        published.show("zoo:swav", published.obtain("zoo:swav"))  # stands: nothing is fetched
    said = capsys.readouterr().out
    assert "start_from: zoo:swav" in said
    assert "CC-BY-NC-4.0" in said
    assert [row[0] for row in listing.KINDS["weights"][1]()[1] if "here" in row] == ["swav"]
