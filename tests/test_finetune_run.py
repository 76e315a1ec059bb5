"""Whole cells on phantoms, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import tiny_cell
import tiny_corpus
import torch
from numpy.typing import NDArray

from analysis.loaded import scores
from analysis.replicates import metric_B
from analysis.results import Cell
from base.errors import RequestError, WorkError
from base.paths import ROOT
from base.seeds import seed_of
from encoders.build import build
from encoders.cuts import cuts
from encoders.export import export
from encoders.truncate import truncate
from encoders.weights import load_local, sha256_of
from engine.context import LocalContext
from finetune import data, predict, similarity
from finetune.cell import CELL_VERSION, CellConfig
from finetune.measure import rows_of
from finetune.run import plant, run
from finetune.task import LOSSES, Kind, load_task
from finetune.train import Trainer
from shards.manifest import read

QUICK = {"recipe.epochs": 2, "recipe.batch": 32, "linear.epochs": 4}
Make = Callable[..., CellConfig]


@pytest.fixture
def cell(phantom_chest: str, phantom_fundus: str, tmp_path: Path) -> Make:
    """A cell on phantoms; keyword arguments replace its fields, `task` and `settings` resolve the task."""
    shards = {"phantom-chest": phantom_chest, "phantom-fundus": phantom_fundus}

    def make(task: str = "phantom-chest", settings: dict[str, Any] = QUICK, **fields: Any) -> CellConfig:
        return tiny_cell.config(shards, tmp_path, task, settings, **({"cache_dir": None} | fields))

    return make


def context(tmp_path: Path) -> LocalContext:
    return LocalContext(dir=str(tmp_path / "context"))


def value(result: dict[str, Any], metric: str, split: str = "test", name: str = "") -> float:
    (row,) = [row for row in result["metrics"] if (row["metric"], row["split"], row["class"]) == (metric, split, name)]
    return float(row["value"])


@pytest.mark.parametrize("strategy", ["full", "linear"])
@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_a_cell_leaves_its_files_and_is_not_computed_twice(cell: Make, tmp_path: Path, task: str, strategy: str) -> None:
    config = cell(task, strategy={"name": strategy})
    result = run(config, context(tmp_path))
    out = Path(config.out)
    files = {"config.yaml", "metrics.jsonl", "predictions.parquet", "result.json", "heat.npz"}  # phantoms may be shown, their cards say
    if task == "phantom-vessels":
        files.add("samples.npz")
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "result.json").read_text()) == result
    assert result["transplanted_sha256"] == result["encoder_sha256"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == result["selection"]["epochs"]
    assert {"epoch", "train_loss", f"val_{config.task.metric}", "lr", "seconds"} <= set(rows[0])
    assert result["selection"]["value"] == max(row[f"val_{config.task.metric}"] for row in rows)
    at_resolution = "dice_resized" if config.task.metric == "dice" else config.task.metric
    assert value(result, at_resolution, "val") == result["selection"]["value"]  # the best epoch's weights made the predictions
    table = pd.read_parquet(out / "predictions.parquet")
    counts = read(config.shards).counts
    assert table["split"].value_counts().to_dict() == {"val": counts["val"], "test": counts["test"]}
    assert table["sample_id"].is_unique
    assert rows_of(config.task, table) == result["metrics"]  # any metric can be computed again from the file
    if task == "phantom-vessels":
        assert table.loc[table["split"] == "test", "dice"].mean() == pytest.approx(value(result, "dice"))
    stamp = (out / "result.json").stat().st_mtime_ns
    assert run(config, context(tmp_path)) == result
    assert (out / "result.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("multilabel", "auroc_mean"), ("multilabel", "auprc_mean"), ("multiclass", "balanced_accuracy"), ("ordinal", "kappa_quadratic")],
)
def test_the_headline_and_its_comparison_are_of_the_tasks_metric(tmp_path: Path, kind: Kind, metric: str) -> None:
    """The report's bootstrap finds the number that the cell wrote, also where fewer labels are measured than trained."""
    shards = tiny_cell.corpora(tmp_path)
    settings = {"kind": kind, "metric": metric, "loss": LOSSES[kind][0], "evaluate": ["texture", "count"] if kind == "multilabel" else []}
    config = tiny_cell.config(shards, tmp_path, settings=settings | ({} if kind == "multilabel" else tiny_cell.CLASSES))
    made = Cell(config.out, run(config, context(tmp_path)))
    assert made.primary() == metric
    held = scores(made)
    assert held is not None
    assert metric_B(held, metric, np.ones((1, len(held.ids_N))))[0] == pytest.approx(made.value(metric))


def test_the_same_cell_gives_the_same_numbers_and_another_seed_others(cell: Make, tmp_path: Path) -> None:
    results = [run(cell(seed=seed, out=str(tmp_path / name)), context(tmp_path)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    same = [{key: item for key, item in result.items() if key != "seconds"} for result in results]
    assert same[0] == same[1]
    assert same[0]["encoder_sha256"] != same[2]["encoder_sha256"]
    assert same[0]["metrics"] != same[2]["metrics"]
    frames = [pd.read_parquet(tmp_path / name / "predictions.parquet") for name in "ab"]
    pd.testing.assert_frame_equal(frames[0], frames[1])


def test_random_under_two_names_is_two_draws(cell: Make) -> None:
    hashes = [plant(cell(source=name), 1)[1] for name in ("random", "random-b", "random")]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("strategy", ["full", "linear"])
def test_what_was_exported_is_what_is_transplanted(cell: Make, tmp_path: Path, strategy: str) -> None:
    folder, sha256 = tiny_cell.exported(tmp_path / "export")
    fields = {"source": "simclr", "source_kind": "weights", "encoder_dir": str(folder), "encoder_sha256": sha256}
    config = cell(strategy={"name": strategy}, **fields)
    transplant, found, _ = plant(config, 1)
    assert transplant.sha256 == found == sha256 == sha256_of(load_local(folder))
    result = run(config, context(tmp_path))
    assert result["transplanted_sha256"] == result["encoder_sha256"] == sha256
    with pytest.raises(WorkError, match="not those that the cell was planned for"):
        plant(cell(**fields | {"encoder_sha256": "0" * 64}), 1)
    with pytest.raises(RequestError, match="is a test_resnet, the cell asks for resnet18"):
        plant(cell(**fields, architecture="resnet18"), 1)
    # Grey weights on a colour dataset: adapted, loaded, and not claimed to be the same tensors.
    adapted, found, _ = plant(config, 3)
    assert adapted.loaded is not None
    assert adapted.loaded.reshaped
    assert adapted.sha256 != found == sha256


def test_cached_features_give_the_predictions_of_the_whole_network(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("finetune.features.LIMIT_BYTES", limit)
        config = cell("phantom-vessels", strategy={"name": "linear"})
        transplant, sha256, _ = plant(config, 3)
        trainer = Trainer(config, transplant)
        trainer.fit(context(tmp_path), tmp_path / "log.jsonl")
        assert (trainer.evaluator._features["train"] is not None) == (limit > 0)
        assert sha256_of(transplant.module.encoder.net.state_dict()) == sha256
        image = torch.from_numpy(trainer.arrays("test").image)
        with torch.no_grad():
            whole = transplant.module(image).numpy()
        np.testing.assert_allclose(trainer.logits("test"), whole, atol=1e-4)
        outputs.append(whole)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


def test_the_test_split_is_read_once_and_last_and_never_in_a_trial(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_splits: list[str] = []
    load = data.load

    def recorded(url: str, digest: str, split: str, *rest: Any) -> data.Arrays:
        read_splits.append(split)
        return load(url, digest, split, *rest)

    monkeypatch.setattr(data, "load", recorded)
    run(cell(), context(tmp_path))
    assert read_splits.count("test") == 1
    assert read_splits[-1] == "test"
    assert read_splits.count("train") == 1
    read_splits.clear()
    result = run(cell(role="trial", out=str(tmp_path / "trial")), context(tmp_path))
    assert "test" not in read_splits
    assert {row["split"] for row in result["metrics"]} == {"val"}


def unbiased_cka(x_ND: NDArray[np.float64], y_NE: NDArray[np.float64]) -> float:
    """By the matrices of Song et al. 2012, eq. 5."""
    n, (k, m) = len(x_ND), (z @ z.T * (1 - np.eye(len(z))) for z in (x_ND, y_NE))

    def hsic(k: NDArray[np.float64], m: NDArray[np.float64]) -> float:
        return float((k * m).sum() + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum())

    return hsic(k, m) / float(np.sqrt(hsic(k, k) * hsic(m, m)))


def test_a_source_is_compared_with_random_weights_on_validation_images(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_splits: list[str] = []
    load = data.load

    def recorded(url: str, digest: str, split: str, *rest: Any) -> data.Arrays:
        read_splits.append(split)
        return load(url, digest, split, *rest)

    monkeypatch.setattr(data, "load", recorded)
    monkeypatch.setattr(similarity, "IMAGES", 20)
    config = cell(role="similarity", seed=3, **tiny_cell.weights(tmp_path))
    result = run(config, context(tmp_path))
    assert set(read_splits) == {"val"}
    assert [row["class"] for row in result["metrics"]] == [cut.name for cut in cuts("test_resnet")]
    assert {(row["split"], row["metric"], row["n"]) for row in result["metrics"]} == {("val", "cka_debiased", 20)}
    assert (result["role"], result["train_images"], result["selection"]["epochs"]) == ("similarity", 0, 0)
    arrays = load(config.shards, config.manifest_digest, "val", 32, config.task)
    chosen = sorted(range(len(arrays)), key=lambda i: seed_of("similarity", 3, arrays.ids[i]))[:20]
    images = torch.from_numpy(arrays.image[chosen])
    assert config.encoder_dir
    ours = plant(config, 1)[0].module.encoder.eval()
    other = build("test_resnet", 1, ours.mean, ours.std, seed_of("similarity", 3)).eval()
    with torch.no_grad():
        expected = unbiased_cka(*(np.asarray(encoder(images).numpy(), np.float64) for encoder in (ours, other)))
    last = result["metrics"][-1]["value"]
    assert last == pytest.approx(expected, abs=1e-4)
    assert 0 < last < 0.99
    again = run(config.model_copy(update={"out": str(tmp_path / "again")}), context(tmp_path))
    assert again["metrics"] == result["metrics"]


def test_sources_that_are_cut_off_or_read_masks_are_compared_at_the_cuts_that_they_have(cell: Make, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"name": "short", "method": "made", "lineage": [], "data": [], "revision": "0"}
    sha256 = export(truncate(build("test_resnet", 3, seed=1), "layer2.0"), tmp_path / "short", image_size=32, **facts)
    short = {"source": "short", "source_kind": "weights", "encoder_dir": str(tmp_path / "short"), "encoder_sha256": sha256}
    for name, fields in (("phantom-vessels", short), ("phantom-chest", {"architecture": "test_vit"})):
        out = str(tmp_path / name)
        result = run(cell(name, role="similarity", out=out, **fields), context(tmp_path))
        names = [cut.name for cut in cuts(fields.get("architecture", "test_resnet"))]
        assert [row["class"] for row in result["metrics"]] == names[: 3 if fields is short else None]
        assert all(-0.2 < row["value"] < 1 for row in result["metrics"])


def test_training_stops_early_and_keeps_the_best_epoch(cell: Make, tmp_path: Path) -> None:
    config = cell(settings={"linear.epochs": 400, "linear.patience": 3, "linear.lr": 0.01}, strategy={"name": "linear"})
    selection = run(config, context(tmp_path))["selection"]
    assert selection["epochs"] == selection["epoch"] + 3 < 400


def test_shuffled_labels_leave_the_test_split_alone(cell: Make) -> None:
    config = cell(shuffle_labels=True)
    arrays = Trainer(config, plant(config, 1)[0]).arrays
    honest = Trainer(cell(), plant(config, 1)[0]).arrays
    np.testing.assert_array_equal(arrays("test").target, honest("test").target)
    for split in ("train", "val"):
        assert (arrays(split).target != honest(split).target).any()
        np.testing.assert_array_equal(arrays(split).target.sum(0), honest(split).target.sum(0))


def test_a_label_absent_from_training_and_a_test_of_one_class_do_not_crash(
    cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = data.load

    def poor(url: str, digest: str, split: str, *rest: Any) -> data.Arrays:
        arrays = load(url, digest, split, *rest)
        target, known = arrays.target.copy(), arrays.known.copy()
        target[:, 0] = 0  # `texture` has no positive anywhere
        if split == "val":
            target[:] = 0  # nothing to select on but the loss
        if split == "test":
            known[:, 1] = 0  # `count` is unknown in the whole split
        return data.replace(arrays, target=target, known=known)

    monkeypatch.setattr(data, "load", poor)
    result = run(cell(), context(tmp_path))
    rows = {(row["class"], row["metric"]): row for row in result["metrics"] if row["split"] == "test"}
    n = read(cell().shards).counts["test"]
    assert rows["texture", "auroc"] | {"value": None, "n": n} == rows["texture", "auroc"]
    assert (rows["count", "auroc"]["value"], rows["count", "auroc"]["n"]) == (None, 0)
    assert rows["", "auroc_mean"]["n"] == 1
    assert result["selection"]["metric"] == "loss"


def test_bad_requests_are_refused(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="unknown strategy 'ful'"):
        run(cell(strategy={"name": "ful"}), context(tmp_path))
    with pytest.raises(RequestError, match="unknown key 'depth'"):
        run(cell(strategy={"name": "full", "depth": 3}), context(tmp_path))
    with pytest.raises(WorkError, match="not those that the cell was planned for"):
        run(cell(manifest_digest="0" * 64), context(tmp_path))
    fundus = cell("phantom-vessels")
    with pytest.raises(RequestError, match="is about phantom-chest, these shards are phantom-fundus"):
        run(cell(shards=fundus.shards, manifest_digest=fundus.manifest_digest), context(tmp_path))
    with pytest.raises(WorkError, match="not finite"):
        run(cell(settings=QUICK | {"recipe.lr": 1e30, "recipe.warmup": 0}), context(tmp_path))
    monkeypatch.setattr(data, "fraction_of", lambda *_: np.array([0]))
    with pytest.raises(RequestError, match="1 training image is too few"):
        run(cell(fraction=0.001), context(tmp_path))
    assert not Path(cell().out).exists()


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_an_output_that_is_not_finite_is_no_result(cell: Make, tmp_path: Path, task: str) -> None:
    """One step an epoch: the only training loss is that of the untouched weights. A mask cut from nan would pass for an empty one."""
    config = cell(task, settings={"recipe.epochs": 1, "recipe.batch": 1000, "recipe.lr": 1e30, "recipe.warmup": 0})
    with pytest.raises(WorkError, match=rf"task {task}: the network's output is not finite on split val .*lower recipe.lr"):
        run(config, context(tmp_path))
    assert not Path(config.out).exists()


def test_the_result_of_another_cell_is_not_taken_for_this_one(cell: Make, tmp_path: Path) -> None:
    run(cell(), context(tmp_path))
    with pytest.raises(RequestError, match="is that of cell 0000000000000000, not of 1111111111111111"):
        run(cell(key="1" * 16), context(tmp_path))


def test_a_dataset_without_the_stratum_has_no_metric_within_it(cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the official NIH layout: the card names a column that this copy of the data does not have."""
    config = cell()
    card = data._corpus(config.shards, config.manifest_digest, "val", None).manifest.card
    monkeypatch.setitem(card.__dict__, "stratify_by", "source")
    arrays = Trainer(config, plant(config, 1)[0]).arrays("val")
    assert set(arrays.strata) == {None}
    logits = np.zeros((len(arrays), 3), np.float32)
    assert not any("within" in row["metric"] for row in predict.measure(config.task, arrays, logits))
    half = data.replace(arrays, strata=tuple("abc"[i] if i < 2 else None for i in range(len(arrays))))
    rows = [row for row in predict.measure(config.task, half, logits) if row["metric"] == "auroc_within"]
    assert [row["n"] for row in rows] == [2, 2, 2]


def test_a_cell_stops_when_asked_and_leaves_nothing(cell: Make, tmp_path: Path) -> None:
    class Asked(LocalContext):
        def should_stop(self) -> str | None:
            return "SIGTERM"

    with pytest.raises(WorkError, match="SIGTERM"):
        run(cell(), Asked(dir=str(tmp_path)))
    assert not Path(cell().out).exists()


# Adam's first steps are signs of gradients, which makes another CPU's last bit a step in the other direction.
PLAIN = {f"{recipe}.{key}": value for recipe in ("recipe", "linear") for key, value in (("optimizer", "sgd"), ("lr", 0.01))}


def test_golden_numbers_of_a_cell(cell: Make, tmp_path: Path) -> None:
    """Losses of four cells, recorded with one thread; CPUs differ by 1e-5. Changed? Raise CELL_VERSION, then write what this test prints.

    The data are noise and squares made in this folder, so that phantoms and packing may change without changing these numbers.
    """
    found: dict[str, Any] = {"cell_version": CELL_VERSION}
    splits = ["train", "val", "test"]
    for task, channels in (("phantom-chest", 1), ("phantom-vessels", 3)):
        resolved = load_task(task)
        folder = tmp_path / task
        labels = ["texture", "count", "arrangement"]
        masks = resolved.kind == "segmentation"
        tiny_corpus.write(
            folder, dataset=resolved.dataset, channels=channels, masks=masks, labels=labels, splits=splits, size=48, suffix="png"
        )
        for strategy in ("full", "linear"):
            name, out = f"{task} {strategy}", tmp_path / f"{task}-{strategy}"
            fields = {"strategy": {"name": strategy}, "shards": str(folder), "manifest_digest": read(str(folder)).digest, "fraction": 0.8}
            result = run(cell(task, QUICK | PLAIN, **fields, out=str(out)), context(tmp_path))
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[name] = [round(row[key], 6) for row in rows for key in ("train_loss", "val_loss")]
            found[f"{name}: params, macs, images"] = [result["params"], result["macs"], result["train_images"]]
    print(json.dumps(found, indent=1))
    golden = json.loads((ROOT / "tests" / "golden" / "cell_numbers.json").read_text())
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        assert found[name] == pytest.approx(expected, abs=1e-4), name


def test_two_workers_compute_what_one_does(tmp_path: Path) -> None:
    """Each on its part of every batch, gradients averaged by DeepSpeed, statistics of batch norm those of the whole batch; the last batch
    has an odd number of images. The frozen part of a gradual release stays as it is, and one process writes; tensors have the names that
    they have without a wrapper. Processes end without a group whose threads outlive Python (now and then one was aborted)."""
    shards = tiny_cell.corpora(tmp_path / "corpora")
    quick = {"recipe.epochs": 2, "recipe.batch": 15, "recipe.lr": 1e-3, "recipe.optimizer": "sgd", "recipe.warmup": 0}
    cases: dict[str, tuple[str, dict[str, Any], str]] = {
        "labels": ("phantom-chest", {"class_weights": "balanced"}, "full"),
        "classes": ("phantom-chest", {"kind": "multiclass", **tiny_cell.CLASSES}, "gradual"),
        "masks": ("phantom-vessels", {"recipe.batch": 9}, "lp-ft"),
    }
    alone, both = (
        [
            tiny_cell.config(
                shards, tmp_path / f"{name}-{workers}", task, quick | extra, workers=workers, strategy={"name": strategy}, keep="encoder"
            )
            for name, (task, extra, strategy) in cases.items()
        ]
        for workers in (1, 2)
    )
    said = tiny_cell.together(both, tmp_path, 2)
    assert "Traceback" not in said
    assert said.count("group left: False") == 2
    for one, two in zip(alone, both, strict=True):
        expected = run(one, context(tmp_path))
        found = json.loads((Path(two.out) / "result.json").read_text())
        rows = [tiny_cell.rows(Path(config.out) / "metrics.jsonl") for config in (one, two)]
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            assert [b[key] for key in a] == pytest.approx([a[key] for key in a], abs=1e-5)
        frames = [pd.read_parquet(Path(config.out) / "predictions.parquet") for config in (one, two)]
        if one.task.kind == "segmentation":
            maps = [[cv2.imdecode(np.frombuffer(png, np.uint8), -1) for png in frame.pop("probability_png")] for frame in frames]
            assert np.ptp(np.array(maps, int), axis=0).max() <= 1
        pd.testing.assert_frame_equal(frames[0], frames[1], atol=1e-4, rtol=1e-4)
        assert found["selection"]["epoch"] == expected["selection"]["epoch"]
        states = [load_local(Path(config.out) / "encoder") for config in (one, two)]
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=1e-3)
    with pytest.raises(RequestError, match="the cell asks for 2 workers, 1 run"):
        run(both[0].model_copy(update={"key": "1" * 16}), context(tmp_path))
