"""Whole runs on a tiny corpus: two ranks stopped and resumed against undisturbed ones, one rank against two, damaged checkpoints."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_corpus import write
from two_ranks import StopAt, standing_at, two_ranks

from base.config import parse
from base.errors import RequestError, WorkError
from encoders.build import build
from encoders.export import export, read_export
from encoders.weights import load_local, sha256_of
from engine.ahead import ahead
from engine.context import LocalContext
from pretrain import loop
from pretrain.loop import Run
from pretrain.recipe import load_recipe
from pretrain.run import PretrainConfig, run
from shards.batches import Batch
from shards.evaluate import eval_batches
from shards.loader import TrainLoader
from shards.manifest import read

CLOCKS = {"seconds", "img_per_s", "s_per_step", "data_wait", "rank_s", "slowest_rank"}


def tree(method: str, shards: str, name: str, **settings: Any) -> dict[str, Any]:
    recipe = load_recipe(f"{method}/smoke", {"epochs": 4, "keep_checkpoints": 4, **settings})
    data = [{"dataset": "tiny", "shards": shards, "split": "train", "digest": read(shards).digest, "weight": 1.0}]
    start = {"start_from": "previous", "start_from_sha256": "?", "start_from_name": "pretrain:simclr", "earlier": data}
    start = start if method == "supervised" else {}
    place = {"name": name, "key": "0" * 16, "architecture": "test_resnet", "in_chans": 1, "seed": 3, "threads": 1, "out": "?"}
    return place | start | {"recipe": recipe.model_dump(mode="json", by_alias=True), "data": data}


def resumed_at(folder: Path) -> list[int]:
    """The steps whose checkpoints a run went on from."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row.get("event") == "resumed"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in found if "loss" in row]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    shards = write(folder / "shards")
    (folder / "configs.json").write_text(json.dumps([tree("simclr", shards, "simclr"), tree("supervised", shards, "supervised")]))
    two_ranks("pretrain", folder)
    return folder


@pytest.mark.parametrize(("number", "name"), [(0, "simclr"), (1, "supervised")])
def test_stopped_and_resumed_is_bit_identical(pair: Path, number: int, name: str) -> None:
    whole, stopped, second, again = json.loads((pair / "rank0.json").read_text())[number]
    assert stopped is None
    assert second == again  # a finished run is not run again
    assert whole["encoder_sha256"] == second["encoder_sha256"]
    assert (whole["restarts"], second["restarts"], whole["workers"]) == (0, 1, 2)
    assert metrics(pair / f"whole-{name}") == metrics(pair / f"cut-{name}")
    assert [row["step"] for row in metrics(pair / f"cut-{name}")] == [1, 2, 4, 6, 8, 10, 12]
    last = [load_local(pair / f"{kind}-{name}" / "checkpoints" / "step-00000012" / "model.safetensors") for kind in ("whole", "cut")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    assert json.loads((pair / "rank1.json").read_text())[number] == [whole, stopped, second, again]


def test_a_batch_that_was_sent_ahead_and_not_trained_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop as on a GPU, but for where the batches go: a checkpoint's position is that of the steps that are done."""
    read: list[int] = []
    batches, stream = Run._batches, TrainLoader.batches

    def as_on_a_gpu(self: Run) -> Iterator[Batch]:
        with monkeypatch.context() as during:
            during.setattr(self.engine, "device", SimpleNamespace(type="cuda"))
            return batches(self)

    def counted(self: TrainLoader, start_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(stream(self, start_step), start_step):
            read.append(step)
            yield batch

    plan = tree("moco-v2", write(tmp_path / "shards"), "one", max_steps=10, checkpoint_every_steps=3, log_every_steps=1)
    whole, cut = (parse(plan | {"out": str(tmp_path / name)}, PretrainConfig, "test") for name in ("whole", "cut"))
    run(whole, LocalContext(dir=str(tmp_path)))
    monkeypatch.setattr(loop, "ahead", lambda make, items, device: ahead(make, items, torch.device("cpu")))
    monkeypatch.setattr(Run, "_batches", as_on_a_gpu)
    monkeypatch.setattr(TrainLoader, "batches", counted)
    assert run(cut, StopAt(0, 1, tmp_path, 4)) is None
    assert run(cut, StopAt(0, 1, tmp_path, None)) is not None
    (stopped,) = resumed_at(tmp_path / "cut")
    assert 4 <= stopped < 10
    assert read == [*range(stopped + 1), *range(stopped, 10)]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    last = [load_local(tmp_path / name / "checkpoints" / "step-00000010" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_ids_and_epochs_stay_on_the_host() -> None:
    """Masks are drawn from them: to read them back, a step would wait for the device."""
    index_B, view_BCHW, target_BL = torch.arange(4), torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.ones(4, 2)
    one: Any = SimpleNamespace(engine=SimpleNamespace(device=torch.device("meta")))
    sent = Run._sent(one, Batch(index_B, [view_BCHW, view_BCHW], target_BL, None, None, index_B >= 0, index_B + 7))
    assert (sent.index_B.tolist(), sent.epoch_B.tolist()) == ([0, 1, 2, 3], [7, 8, 9, 10])
    assert sent.mask_BL is None
    assert sent.target_BL is not None
    assert [x.device.type for x in (*sent.views, sent.target_BL)] == ["meta"] * 3


def test_events_and_export_of_a_chain(pair: Path) -> None:
    lines = [json.loads(line) for line in (pair / "cut-supervised" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if "event" in line] == ["source probe", "resumed", "source probe", "health"]
    info = read_export(pair / "cut-supervised" / "export")
    assert [step["method"] for step in info.lineage] == ["simclr", "supervised"]
    assert info.labelled_datasets == ["tiny"]
    assert [entry["dataset"] for entry in info.data] == ["tiny"]  # both steps saw it: once
    result = json.loads((pair / "cut-supervised" / "result.json").read_text())
    assert sha256_of(load_local(pair / "cut-supervised" / "export")) == result["encoder_sha256"]
    assert result["start_from_sha256"] == result["lineage"][0]["sha256"] == read_export(pair / "whole-simclr" / "export").sha256
    assert result["labelled"] == ["tiny"]


def test_what_an_earlier_corpus_is_worth_is_probed_before_and_after_and_not_again_on_resume(pair: Path) -> None:
    whole, cut = (json.loads((pair / f"{kind}-supervised" / "result.json").read_text()) for kind in ("whole", "cut"))
    assert whole["source_probes"] == cut["source_probes"]
    assert [(probe["dataset"], probe["when"]) for probe in whole["source_probes"]] == [("tiny", "before"), ("tiny", "after")]
    assert all(0 <= probe[name] <= 1 for probe in whole["source_probes"] for name in ("linear_auroc", "knn_auroc"))
    rows = [json.loads(line) for line in (pair / "cut-supervised" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("event") == "source probe"] == [0, 12]
    assert json.loads((pair / "whole-simclr" / "result.json").read_text())["source_probes"] == []


def test_one_rank_sees_the_same_run(pair: Path, tmp_path: Path) -> None:
    """Same global batch, same rate: the first steps agree to rounding, which training then amplifies."""
    result = one_rank(pair, tmp_path)
    ours, theirs = metrics(tmp_path), metrics(pair / "whole-simclr")
    assert result["workers"] == 1
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["std_ratio"] == pytest.approx(b["std_ratio"], rel=1e-3)
        assert a["lr"] == b["lr"]


def one_rank(pair: Path, out: Path) -> dict[str, Any]:
    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(out)}
    result = run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(out)))
    assert result is not None
    return result


def test_resume_at_another_number_of_ranks_goes_on_at_the_right_sample(pair: Path, tmp_path: Path) -> None:
    """The two-rank run's checkpoint of step 10, taken up by one rank; the newest one is damaged and passed over."""
    out = tmp_path / "out"
    shutil.copytree(pair / "cut-simclr", out)
    (out / "result.json").unlink()
    model = out / "checkpoints" / "step-00000012" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    result = one_rank(pair, out)
    assert result["restarts"] == 2
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "event" in line]
    assert "committed hash" in next(row["why"] for row in events if row["event"] == "checkpoint refused")
    assert [row["step"] for row in metrics(out)] == [1, 2, 4, 6, 8, 10, 12]
    assert metrics(out)[-1]["loss"] == pytest.approx(metrics(pair / "whole-simclr")[-1]["loss"], rel=1e-3)


def test_embedding_the_corpus_visits_each_sample_once_in_order(pair: Path, tmp_path: Path) -> None:
    from pretrain.loop import Run

    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(tmp_path)}
    one = Run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    one._build()
    one._start(None)
    index_N, z_ND = one._embed(one.method.encoder)
    assert index_N.tolist() == list(range(100))
    assert z_ND.shape == (100, one.method.encoder.num_features)
    assert torch.isfinite(z_ND).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embedding_the_corpus_uses_the_loaders_workers_and_the_recipes_precision(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from pretrain import loop

    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(tmp_path), "workers": 2}
    plan["recipe"]["precision"] = precision
    one = loop.Run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    one._build()
    one._start(None)
    asked: list[int] = []

    def seen(*given: Any, **named: Any) -> Any:
        asked.append(named["workers"])
        return eval_batches(*given, **named)

    monkeypatch.setattr(loop, "eval_batches", seen)
    computed: list[torch.dtype] = []
    one.method.head.register_forward_hook(lambda _, x, out: computed.append(out.dtype))  # type: ignore[union-attr]
    _, z_Nd = one._embed(lambda x: one.method.head(one.method.encoder(x)))  # type: ignore[operator]
    assert asked == [2]
    assert set(computed) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert z_Nd.dtype == torch.float32


def test_what_a_run_measures_of_its_gpu_leaves_the_random_state_alone(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least time of a step is found by building the method once more, which seeds; at a resume too."""
    from pretrain import loop

    one_rank(pair, tmp_path / "sound")
    standing_at(tmp_path / "sound", tmp_path / "resumed", 10)
    monkeypatch.setattr(loop.Run, "_least_seconds", lambda _: torch.manual_seed(0) and None)
    one_rank(pair, tmp_path / "resumed")
    one_rank(pair, tmp_path / "whole")
    assert resumed_at(tmp_path / "resumed") == [10]
    places = [tmp_path / name / "checkpoints" / "step-00000012" / "rank0.safetensors" for name in ("sound", "resumed", "whole")]
    expected, *found = (load_local(place)["rng.cpu"] for place in places)
    assert all(torch.equal(state, expected) for state in found)


def test_other_shards_and_wrong_views_are_refused(pair: Path, tmp_path: Path) -> None:
    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(tmp_path)}
    plan["data"][0]["digest"] = "f" * 64
    with pytest.raises(RequestError, match="digest"):
        run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    colour = json.loads((pair / "configs.json").read_text())[0] | {"out": str(tmp_path), "in_chans": 3}
    with pytest.raises(RequestError, match="'tiny' has 1 channels, the encoder takes 3"):
        run(parse(colour, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    plan["recipe"]["views"]["kind"] = "one"
    with pytest.raises(RequestError, match=r"simclr needs views.kind 'two'"):
        run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    assert not (tmp_path / "result.json").exists()


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pair / "cut-simclr", out)
    (out / "result.json").unlink()
    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(out), "key": "1" * 16, "seed": 4}
    plan["recipe"]["options"] |= {"temperature": 0.3}
    with pytest.raises(RequestError, match=r"not of 1111111111111111: recipe\.options\.temperature, seed"):
        run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(out)))


@pytest.mark.parametrize("what", ["result", "checkpoint"])
def test_what_another_run_left_is_not_taken_for_this_one(pair: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(pair / "cut-simclr", out)
    if what == "checkpoint":
        (out / "result.json").unlink()
    plan = json.loads((pair / "configs.json").read_text())[0] | {"out": str(out), "key": "1" * 16}
    with pytest.raises(RequestError, match=f"the {what} that stands here is that of run 0000000000000000, not of 1111111111111111"):
        run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(out)))


def test_terms_of_the_first_data_stay_with_the_weights(tmp_path: Path) -> None:
    """Colour weights of licensed pictures, trained on in grey: both licences, both digests, and the first's brightness."""
    parent = tmp_path / "parent"
    pictures = {"dataset": "pictures", "digest": "not ours", "licence": "research only"}
    facts: dict[str, Any] = {"name": "pictures", "method": "timm", "lineage": [], "data": [pictures], "revision": "abc", "image_size": 32}
    sha256 = export(build("test_resnet", 3, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3), seed=1), parent, **facts)
    plan = tree("supervised", write(tmp_path / "shards"), "chained", max_steps=1, checkpoint_every_steps=0)
    plan |= {"start_from": str(parent), "start_from_sha256": sha256, "out": str(tmp_path / "out")}
    assert run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path))) is not None
    info = read_export(tmp_path / "out" / "export")
    assert [entry["dataset"] for entry in info.data] == ["pictures", "tiny"]
    assert [entry["digest"] for entry in info.data] == ["not ours", plan["data"][0]["digest"]]
    assert info.licence == "none; research only"
    assert (*info.mean, *info.std) == pytest.approx((0.4, 0.2))


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards")
    plan = tree("supervised", shards, "diverged", **{"optimizer": {"name": "sgd", "lr": 1e30, "warmup_epochs": 0}})
    plan |= {"start_from": None, "start_from_sha256": None, "start_from_name": None, "out": str(tmp_path / "out")}
    with pytest.raises(WorkError, match=r"not finite at step \d+ on rank \[0\]"):
        run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))


def test_views_made_on_the_device_or_by_lightly_train_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pixels that training gets: a loss of twenty random images is moved by a grey level, which CPUs round differently."""
    place, seen = Run._place, list[torch.Tensor]()

    def placed(self: Run, batch: Batch) -> Batch:
        on_device = place(self, batch)
        seen.append(torch.stack(on_device.views).float())
        return on_device

    monkeypatch.setattr(Run, "_place", placed)
    shards, losses, views = write(tmp_path / "shards"), {}, {}
    settings: dict[str, dict[str, Any]] = {"cpu": {}, "device": {"views.device_side": 40}, "lightly": {"views.library": "lightly"}}
    for name, setting in settings.items():
        plan = tree("simclr", shards, name, max_steps=1, checkpoint_every_steps=0, **setting) | {"out": str(tmp_path / name)}
        seen.clear()
        assert run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path / name))) is not None
        losses[name], views[name] = metrics(tmp_path / name)[0]["loss"], seen[0]
    assert (views["device"] - views["cpu"]).abs().mean() < 1
    assert (views["lightly"] - views["cpu"]).abs().mean() > 10
    assert losses["device"] == pytest.approx(losses["cpu"], rel=0.05)
    assert losses["lightly"] == pytest.approx(losses["cpu"], rel=0.3)
