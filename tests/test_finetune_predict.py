"""Predictions as a table, and metric rows made of nothing else: by hand, against scikit-learn, and from the file."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import tiny_corpus
from raw_files import ct_slice
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from analysis import metrics, results
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster import facts
from finetune.data import Arrays, load, original_masks
from finetune.measure import FEW, headline, rows_of
from finetune.predict import measure, predictions, probabilities
from finetune.task import METRICS, Aggregate, Task, load_task
from shards.card import NOT_JUDGED, Card, Smoothed, SplitRule, load_card
from shards.corpus import Corpus
from shards.manifest import read
from shards.pack import pack

CHEST, VESSELS = load_task("phantom-chest"), load_task("phantom-vessels")


def task_of(kind: str, labels: list[str], **fields: Any) -> Task:
    return CHEST.model_copy(update={"kind": kind, "labels": labels, "metric": METRICS[kind][0], **fields})  # type: ignore[index]


TWO = task_of("multilabel", ["a", "b"])
CLASSES = task_of("multiclass", ["a", "b", "c"])
GRADES = task_of("ordinal", ["none", "mild", "severe"])


def labelled(target: Any, split: str = "test", **fields: Any) -> Arrays:
    """Images of nothing with those targets; nan is not known."""
    target_NL = np.asarray(target, np.float32)
    n = len(target_NL)
    made: dict[str, Any] = {
        "split": split,
        "image": np.zeros((n, 1, 4, 4), np.uint8),
        "target": np.nan_to_num(target_NL, nan=0.5),
        "known": np.isfinite(target_NL).astype(np.float32),
        "patients": tuple(f"p{i}" for i in range(n)),
        "strata": (None,) * n,
        "ids": tuple(f"{split}-{i}" for i in range(n)),
    }
    return Arrays(**made | fields)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_split(task: Task, n: int, split: str, seed: int, **fields: Any) -> tuple[Arrays, np.ndarray]:
    """Targets and logits that know a little of them."""
    draw, labels = np.random.default_rng(seed), len(task.labels)
    if task.kind == "multilabel":
        target = (draw.random((n, labels)) < 0.4).astype(np.float32)
        logits = target + noise((n, labels), seed)
    else:
        target = np.eye(labels, dtype=np.float32)[draw.integers(0, labels, n)]
        logits = target + noise((n, labels), seed)
        if task.kind == "ordinal":
            grade = target.argmax(1)[:, None]
            logits = (grade + noise((n, 1), seed) - np.arange(labels - 1) - 0.5).astype(np.float32)
    return labelled(target, split, **fields), logits


def value(rows: list[dict[str, Any]], metric: str, name: str = "", split: str = "test") -> Any:
    (row,) = [row for row in rows if (row["split"], row["class"], row["metric"]) == (split, name, metric)]
    return row["value"]


def count(rows: list[dict[str, Any]], metric: str, name: str = "") -> int:
    (row,) = [row for row in rows if (row["split"], row["class"], row["metric"]) == ("test", name, metric)]
    return int(row["n"])


# -- labels


def test_grades_are_differences_of_cumulative_probabilities() -> None:
    logits = np.log(np.array([[0.9, 0.3], [0.5, 0.5]]) / (1 - np.array([[0.9, 0.3], [0.5, 0.5]]))).astype(np.float32)
    np.testing.assert_allclose(probabilities(GRADES, logits), [[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]], atol=1e-7)
    many = probabilities(GRADES, -np.sort(-20 * noise((500, 2)), axis=1))
    assert many.min() >= 0
    np.testing.assert_allclose(many.sum(1), 1)


def test_areas_equal_sklearn_and_single_class_columns_are_reported_and_not_averaged() -> None:
    """M1. The third label has no positive, the fourth nobody judged."""
    task = task_of("multilabel", ["a", "b", "c", "d"])
    target = (np.random.default_rng(0).random((60, 4)) < 0.5).astype(float)
    target[:, 2], target[:, 3], target[:7, 0] = 0, np.nan, np.nan
    rows = measure(task, labelled(target), logits := noise((60, 4)))
    scores = probabilities(task, logits)
    a, b = roc_auc_score(target[7:, 0], scores[7:, 0]), roc_auc_score(target[:, 1], scores[:, 1])
    assert value(rows, "auroc", "a") == pytest.approx(a)
    assert value(rows, "auroc_mean") == pytest.approx((a + b) / 2)
    assert [count(rows, "auroc", name) for name in "abcd"] == [53, 60, 60, 0]
    assert [value(rows, metric, name) for metric in ("auroc", "auprc") for name in "cd"] == [None] * 4
    assert count(rows, "auroc_mean") == 2
    assert value(rows, "prevalence", "c") == 0
    assert value(rows, "prevalence", "d") is None
    assert value(rows, "prevalence", "a") == pytest.approx(np.nanmean(target[:, 0]))


def test_labels_of_few_positives_are_in_one_mean_and_not_in_the_other() -> None:
    target = np.zeros((40, 2))
    target[:FEW, 0], target[: FEW - 1, 1] = 1, 1
    rows = measure(TWO, labelled(target), noise((40, 2)))
    assert count(rows, "auroc_mean") == 2
    assert count(rows, "auroc_mean_min10") == 1
    assert value(rows, "auroc_mean_min10") == value(rows, "auroc", "a")
    assert value(rows, "auprc_mean_min10") == value(rows, "auprc", "a")


def test_does_not_repeat_metrics_of_the_last_batch_only() -> None:
    """TruncatedTL (2.5-2) appends after its loop and computes AUPRC on the last batch."""
    arrays, logits = random_split(TWO, 200, "test", 0)
    rows = measure(TWO, arrays, logits)
    scores = probabilities(TWO, logits)
    for at, name in enumerate(TWO.labels):
        assert count(rows, "auprc", name) == 200
        assert value(rows, "auprc", name) == pytest.approx(metrics.auprc(scores[:, at], arrays.target[:, at]))
        assert value(rows, "auprc", name) != pytest.approx(metrics.auprc(scores[-64:, at], arrays.target[-64:, at]))


def test_does_not_repeat_smoothed_labels_in_evaluation(tmp_path: Path) -> None:
    """The benchmark (3.7-8) draws smoothed labels for validation and test, too, which its AUROC then crashes on."""
    url = tiny_corpus.write(tmp_path / "shards", splits=["train", "val", "test"])
    task = TWO.model_copy(update={"dataset": "tiny", "uncertain": Smoothed(smoothed=(0.55, 0.85))})
    soft = load(url, read(url).digest, "train", 32, task).target
    assert ((soft > 0) & (soft < 1)).any()
    frames = []
    for split in ("val", "test"):
        arrays = load(url, read(url).digest, split, 32, task)
        assert set(arrays.target[arrays.known > 0].tolist()) == {0.0, 1.0}
        frames.append(predictions(task, arrays, noise((len(arrays), 2))))
    assert value(rows_of(task, pd.concat(frames)), "auroc_mean") is not None


def test_labels_that_are_not_evaluated_are_kept_and_not_measured() -> None:
    task = TWO.model_copy(update={"evaluate": ["b"]})
    arrays, logits = random_split(TWO, 50, "test", 0)
    rows = measure(task, arrays, logits)
    assert {row["class"] for row in rows} == {"", "b"}
    assert value(rows, "auroc_mean") == value(rows, "auroc", "b")
    assert "score_a" in predictions(task, arrays, logits)


def test_operating_points_are_those_of_validation() -> None:
    """On test the same thresholds, whatever it would have chosen itself."""
    target = np.array([[0]] * 100 + [[1]] * 100, float)
    task = task_of("multilabel", ["a"])
    val_logits = np.concatenate([np.linspace(-3, 1, 100), np.linspace(0, 4, 100)])[:, None].astype(np.float32)
    val = predictions(task, labelled(target, "val"), val_logits)
    test = predictions(task, labelled(target), val_logits + 1)
    rows = rows_of(task, pd.concat([val, test]))
    points = metrics.operating_points(val["score_a"], val["target_a"])
    score = test["score_a"].to_numpy()
    for point in ("spec95", "sens95"):
        assert value(rows, f"sensitivity_at_{point}", "a") == pytest.approx((score[100:] >= points[point]).mean())
        assert value(rows, f"specificity_at_{point}", "a") == pytest.approx((score[:100] < points[point]).mean())
    assert value(rows, "specificity_at_spec95", "a") < 0.95  # an honest number: test scores are shifted
    said = score >= points["youden"]
    assert value(rows, "threshold", "a") == points["youden"]
    assert value(rows, "f1", "a") == pytest.approx(f1_score(target[:, 0], said))
    assert value(rows, "accuracy", "a") == pytest.approx(accuracy_score(target[:, 0], said))
    assert value(rows, "kappa", "a") == pytest.approx(cohen_kappa_score(target[:, 0], said))
    assert not any("sensitivity" in row["metric"] for row in rows if row["split"] == "val")


def test_a_label_that_validation_could_not_set_a_threshold_for_has_no_decisions() -> None:
    val, test = np.zeros((20, 2)), np.zeros((20, 2))
    val[:5, 0], test[:5] = 1, 1
    frames = [predictions(TWO, labelled(target, split), noise((20, 2))) for target, split in ((val, "val"), (test, "test"))]
    rows = rows_of(TWO, pd.concat(frames))
    assert value(rows, "f1", "a") is not None
    assert value(rows, "f1", "b") is None
    assert value(rows, "threshold", "b") is None
    assert count(rows, "f1_mean") == 1


def test_strata_are_measured_apart() -> None:
    arrays, logits = random_split(TWO, 90, "test", 0, strata=tuple(["x", "y", None][i % 3] for i in range(90)))
    rows = measure(TWO, arrays, logits)
    at = np.arange(90) % 3 == 1
    inside = measure(TWO, arrays.take(np.flatnonzero(at)), logits[at])
    assert value(rows, "auroc_mean/y") == value(inside, "auroc_mean")
    assert value(rows, "auprc_mean/x") is not None
    assert not any(row["class"] for row in rows if "/" in row["metric"])
    assert value(rows, "auroc_within_mean") is not None
    assert not any("within" in row["metric"] for row in rows if "/" in row["metric"])
    one, logits = random_split(TWO, 30, "test", 0, strata=("x",) * 30)
    assert not any("/" in row["metric"] for row in measure(TWO, one, logits))


# -- labels that exclude each other


@pytest.mark.parametrize("task", [CLASSES, GRADES], ids=["classes", "grades"])
def test_decisions_equal_sklearn(task: Task) -> None:
    arrays, logits = random_split(task, 120, "test", 3)
    rows = measure(task, arrays, logits)
    true = arrays.target.argmax(1)
    # Grades by the rule of CORAL: how many of P(grade > k) exceed a half.
    pred = (logits > 0).sum(1) if task is GRADES else logits.argmax(1)
    assert value(rows, "accuracy") == pytest.approx(accuracy_score(true, pred))
    assert value(rows, "f1_macro") == pytest.approx(f1_score(true, pred, average="macro"))
    assert value(rows, "kappa") == pytest.approx(cohen_kappa_score(true, pred))
    assert value(rows, "kappa_quadratic") == pytest.approx(cohen_kappa_score(true, pred, weights="quadratic"))
    scores = probabilities(task, logits)
    for at, name in enumerate(task.labels):
        assert value(rows, "auroc", name) == pytest.approx(roc_auc_score(true == at, scores[:, at]))
        assert value(rows, "precision", name) == pytest.approx((true[pred == at] == at).mean())
        assert value(rows, "sensitivity", name) == pytest.approx((pred[true == at] == at).mean())


def test_a_grade_or_worse_is_ranked_by_its_probability() -> None:
    """What Transfusion reports of retinas: the AUC of moderate or worse. A grade that no image reaches has none."""
    task = task_of("ordinal", ["none", "mild", "moderate", "severe"])
    arrays, logits = random_split(task, 90, "test", 0)
    kept = np.flatnonzero(arrays.target[:, 3] == 0)
    arrays, logits = arrays.take(kept), logits[kept]
    rows, grade = measure(task, arrays, logits), arrays.target.argmax(1)
    for k, name in ((1, "mild"), (2, "moderate")):
        assert value(rows, f"auroc_from_{name}") == pytest.approx(roc_auc_score(grade >= k, logits[:, k - 1]))
        assert count(rows, f"auroc_from_{name}") == len(arrays)
    assert value(rows, "auroc_from_severe") is None
    assert len([row for row in rows if row["metric"].startswith("auroc_from_")]) == 3
    arrays, logits = random_split(CLASSES, 60, "test", 0)
    assert not [row for row in measure(CLASSES, arrays, logits) if "_from_" in row["metric"]]


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "ordinal"])
def test_every_metric_that_a_task_may_select_on_is_a_row(kind: str) -> None:
    task = {"multilabel": TWO, "multiclass": CLASSES, "ordinal": GRADES}[kind]
    arrays, logits = random_split(task, 60, "val", 0, strata=tuple("xy"[i % 2] for i in range(60)))
    for metric in METRICS[kind]:  # type: ignore[index]
        assert math.isfinite(headline(task.model_copy(update={"metric": metric}), measure(task, arrays, logits)))


# -- studies


def slices(how: str, by: str = "patient") -> tuple[Task, Arrays, np.ndarray]:
    """Five slices of two studies and one of its own."""
    target = [[0, 0], [1, np.nan], [0, 0], [0, np.nan], [0, 1]]
    patients = ("p", "p", "q", "q", "")
    strata = ("x", "x", "x", "y", None)
    meta = tuple({"study": name} for name in ("s", "s", "t", "t", None))
    arrays = labelled(target, patients=patients, strata=strata, meta=meta)
    p = np.array([[0.2, 0.4], [0.6, 0.1], [0.5, 0.5], [0.5, 0.9], [0.3, 0.7]])
    return TWO.model_copy(update={"aggregate": Aggregate(by=by, how=how)}), arrays, np.log(p / (1 - p)).astype(np.float32)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[0.4, 0.25], [0.5, 0.7], [0.3, 0.7]]),
        ("max", [[0.6, 0.4], [0.5, 0.9], [0.3, 0.7]]),
        ("noisy-or", [[1 - 0.8 * 0.4, 1 - 0.6 * 0.9], [0.75, 0.95], [0.3, 0.7]]),
    ],
)
@pytest.mark.parametrize("by", ["patient", "study"])
def test_slices_become_studies(how: str, expected: list[list[float]], by: str) -> None:
    table = predictions(*slices(how, by))
    np.testing.assert_allclose(table[["score_a", "score_b"]], expected, atol=1e-6)
    np.testing.assert_array_equal(table[["target_a", "target_b"]], [[1, np.nan], [0, np.nan], [0, 1]])
    assert table["sample_id"].tolist() == [*("pq" if by == "patient" else "st"), "test-4"]
    assert table["images"].tolist() == ["test-0 test-1", "test-2 test-3", "test-4"]
    assert table["patient"].tolist() == ["p", "q", ""]
    assert table["stratum"].tolist()[0] == "x"
    assert table["stratum"].isna().tolist() == [False, True, True]


def test_metrics_of_studies_count_studies() -> None:
    task, arrays, logits = slices("max")
    rows = measure(task, arrays, logits)
    assert count(rows, "auroc", "a") == 3
    assert count(rows, "auroc", "b") == 1
    assert value(rows, "auroc", "a") == 1


def test_scores_of_exclusive_labels_stay_probabilities() -> None:
    arrays = labelled([[1, 0, 0], [1, 0, 0], [0, 1, 0]], patients=("p", "p", "q"))
    for how in ("mean", "max", "noisy-or"):
        task = CLASSES.model_copy(update={"aggregate": Aggregate(by="patient", how=how)})
        table = predictions(task, arrays, noise((3, 3)))
        np.testing.assert_allclose(table[[f"score_{name}" for name in "abc"]].sum(axis=1), 1)
        assert value(rows_of(task, table), "accuracy") in (0, 0.5, 1)


def test_studies_that_make_no_sense_are_refused() -> None:
    task, arrays, logits = slices("mean", "study")
    with pytest.raises(RequestError, match="keeps no metadata 'scan'"):
        predictions(task.model_copy(update={"aggregate": Aggregate(by="scan", how="mean")}), arrays, logits)
    with pytest.raises(RequestError, match="a study of 2 patients"):
        predictions(task, dataclasses.replace(arrays, patients=("p", "o", "q", "q", "")), logits)
    mixed = labelled([[1, 0, 0], [0, 1, 0]], patients=("p", "p"))
    with pytest.raises(RequestError, match="several labels"):
        predictions(CLASSES.model_copy(update={"aggregate": Aggregate(by="patient", how="mean")}), mixed, noise((2, 3)))


# -- masks


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arrays, Arrays, Task]:
    """Validation and test images of 40 px with a square each, decoded at 20 px; pixels of 0.5 x 2 mm."""
    url = tiny_corpus.write(
        tmp_path_factory.mktemp("squares"), (8, 14, 14), splits=["train", "val", "test"], masks=True, suffix="png", spacing=(0.5, 2.0)
    )
    task = VESSELS.model_copy(update={"dataset": "tiny", "mask_class": "square"})
    val, test = (load(url, read(url).digest, split, 20, task) for split in ("val", "test"))
    return val, test, task


def knowing(arrays: Arrays, sure: float = 8.0) -> np.ndarray:
    return np.where(arrays.target == 1, sure, -sure).astype(np.float32)


def test_masks_are_measured_where_they_were_drawn(squares: tuple[Arrays, Arrays, Task]) -> None:
    """Perfect at 20 px is not perfect at 40: the resized Dice flatters."""
    val, test, task = squares
    table = predictions(task, test, knowing(test), predictions(task, val, knowing(val)))
    rows = rows_of(task, table)
    assert value(rows, "dice_resized") == 1
    assert 0.8 < value(rows, "dice") < 1
    assert headline(task, rows) == value(rows, "dice")
    assert all(true == mask.sum() for true, mask in zip(table["true_px"], (m == 1 for m in original_masks(test)), strict=True))
    assert (table["true_px"] == 144).all()
    for place in range(len(table)):  # by hand: nearest pixels of a sharp edge are at most one off
        assert abs(table["predicted_px"][place] - 144) <= 50
    assert value(rows, "dice_pooled") == pytest.approx(2 * table["overlap_px"].sum() / (table["predicted_px"] + table["true_px"]).sum())
    assert count(rows, "dice") == len(test)
    assert {row["metric"]: row["unit"] for row in rows if "hd95" in row["metric"]} == {"hd95": "px", "hd95_mm": "mm"}


def test_distances_are_in_pixels_and_millimetres(squares: tuple[Arrays, Arrays, Task]) -> None:
    val, test, task = squares
    moved = np.roll(knowing(test), 2, axis=2)  # two of 20 px to the right: four of 40, 8 mm; squares that wrap around are further
    table = predictions(task, test, moved, predictions(task, val, knowing(val)))
    still = [i for i in range(len(test)) if not (test.target[i, :, -2:] == 1).any()]
    assert len(still) > 3
    for place in still:
        assert 3 <= table["hd95"][place] <= 6
        assert table["hd95_mm"][place] == pytest.approx(2 * table["hd95"][place], abs=0.6)


def montgomery(folder: Path) -> Card:
    """Montgomery's official layout in miniature: CT slices of 96 x 80 pixels of 0.5 x 0.25 mm under its names, two rectangles each."""
    for name in ("CXR_png", "ManualMask/leftMask", "ManualMask/rightMask"):
        (folder / name).mkdir(parents=True)
    for i in range(16):
        left, right = np.zeros((2, 96, 80), np.uint8)
        left[10 + i : 61 + i, 7:31], right[13:70, 41 : 63 + i] = 255, 255
        name = f"MCUCXR_{i:04d}_{i % 2}.png"
        (folder / "CXR_png" / name).write_bytes(ct_slice(np.int16(1024) + 3 * np.maximum(left, right) + i, 0.0))
        for side, mask in (("left", left), ("right", right)):
            cv2.imwrite(str(folder / f"ManualMask/{side}Mask" / name), mask)
    return load_card("montgomery").model_copy(update={"split": SplitRule(val=0.25, test=0.4)})


def test_images_that_are_reduced_when_packed_have_the_metrics_of_whole_ones(tmp_path: Path) -> None:
    """The mask stays as it was drawn, and distances are in pixels of the original, though the image is a third of it."""
    card = montgomery(tmp_path / "raw")
    task = load_task("lxs")
    tables, masks = [], []
    for max_side in (1024, 32):
        url = str(tmp_path / f"shards-{max_side}")
        digest = pack(card.model_copy(update={"max_side": max_side}), str(tmp_path / "raw"), url).digest
        val, test = (load(url, digest, split, 24, task, str(tmp_path / "cache")) for split in ("val", "test"))
        logits = [cv2.GaussianBlur(noise((24, 24, len(arrays))), (0, 0), 3).transpose(2, 0, 1) for arrays in (val, test)]
        tables.append(predictions(task, test, logits[1], predictions(task, val, logits[0])))
        masks.append(list(original_masks(test)))
        corpus = Corpus(url, ("test",))
        sample = corpus[0]
        assert sample.image.shape == ((32, 27, 1) if max_side == 32 else (96, 80, 1))
        assert sample.seg is not None
        assert sample.seg.shape == sample.image.shape[:2]  # in the image's frame, for views and pages
        assert abs(sample.seg.mean() - (masks[0][0] == 1).mean()) < 0.03
    assert len(tables[0]) > 3
    for whole, reduced in zip(*masks, strict=True):
        np.testing.assert_array_equal(reduced, whole)
        assert whole.shape == (96, 80)
    exact = ["sample_id", "dice", "iou", "hd95", "overlap_px", "predicted_px", "true_px"]
    pd.testing.assert_frame_equal(tables[1][exact], tables[0][exact])
    np.testing.assert_allclose(tables[1]["hd95_mm"], tables[0]["hd95_mm"], rtol=1e-5)
    assert tables[0]["hd95_mm"].notna().all()


def test_empty_masks_follow_the_policy(squares: tuple[Arrays, Arrays, Task]) -> None:
    """Both empty agree; one empty is 0 and has no distance; the mean over images with something to find stands beside."""
    val, test, task = squares
    nothing = np.full_like(knowing(test), -8)
    table = predictions(task, test, nothing, predictions(task, val, knowing(val)))
    assert (table["dice"] == 0).all()
    assert table["hd95"].isna().all()
    rows = rows_of(task, table)
    assert value(rows, "hd95") is None
    assert count(rows, "hd95") == 0
    half = table.assign(true_px=[0 if i % 2 else 144 for i in range(len(table))])
    half["dice"] = metrics.dice_of(half["overlap_px"], half["predicted_px"], half["true_px"])
    rows = rows_of(task, half)
    assert value(rows, "dice") == pytest.approx((half["true_px"] == 0).mean())
    assert value(rows, "dice_nonempty") == 0
    assert count(rows, "dice_nonempty") == (half["true_px"] > 0).sum()


def test_the_threshold_of_masks_is_fixed_or_validations(squares: tuple[Arrays, Arrays, Task]) -> None:
    """A network that is never sure: at 0.5 it finds nothing, at what validation chose it finds all."""
    val, test, task = squares
    shy = [np.where(arrays.target == 1, -1.0, -4.0).astype(np.float32) for arrays in (val, test)]  # 0.27 and 0.02
    tables = [predictions(task, val, shy[0])]
    tables.append(predictions(task, test, shy[1], tables[0]))
    rows = rows_of(task, pd.concat(tables))
    assert value(rows, "dice") == 0
    assert value(rows, "dice_tuned") > 0.8
    assert value(rows, "threshold_tuned") == value(rows, "threshold_tuned", split="val") == 0.25
    # What test alone would choose is not looked at.
    assert (predictions(task, test, knowing(test), tables[0])["threshold_tuned"] == 0.25).all()


def test_pixels_that_nobody_judged_count_for_nothing() -> None:
    target = np.zeros((1, 8, 8), np.float32)
    target[0, 2:5, 2:5], target[0, :, 6:] = 1, NOT_JUDGED
    arrays = dataclasses.replace(labelled([[1.0]]), target=target)
    logits = np.where(target > 0, 5.0, -5.0).astype(np.float32)  # also where nobody judged
    rows = measure(VESSELS, arrays, logits)
    assert value(rows, "dice") == value(rows, "iou") == 1


def test_bad_output_is_refused(squares: tuple[Arrays, Arrays, Task]) -> None:
    val, test, task = squares
    with pytest.raises(WorkError, match=r"masks of split test are \[\d+, 20, 20\], the network's \[\d+, 40, 40\]"):
        predictions(task, test, np.zeros((len(test), 40, 40), np.float32))
    broken = knowing(val)
    broken[0, 0, 0] = np.nan
    for what in (measure, predictions):
        with pytest.raises(WorkError, match="not finite on split val"):
            what(task, val, broken)
    with pytest.raises(WorkError, match="not finite"):
        measure(TWO, labelled([[0, 1]]), np.array([[0, np.inf]], np.float32))


# -- from the file


def test_the_probability_of_every_pixel_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squares: tuple[Arrays, Arrays, Task]
) -> None:
    """Read back as docs/metrics.md does. At a threshold between two 255ths nothing is lost; what reports read leaves it out."""
    val, test, task = squares
    logits = noise(test.target.shape)
    first = predictions(task, val, noise(val.target.shape, 1))
    table = predictions(task, test, logits, first)
    pd.concat([first, table], ignore_index=True).to_parquet(tmp_path / "predictions.parquet", index=False)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 3
    p = probabilities(task, logits)
    for threshold in (0.3, 0.5):
        found: dict[str, Any] = {"test": test, "np": np, "pd": pd, "cv2": cv2, "metrics": metrics}
        exec(code.replace("0.3", str(threshold)), found)
        np.testing.assert_allclose(found["probability_NHW"], p, rtol=0, atol=0.5 / 255 + 1e-12)
        np.testing.assert_array_equal(found["dice_N"], metrics.dice_per_image((p > threshold) & (test.target <= 1), test.target == 1))
        assert (found["dice_N"].tolist() == table["dice_resized"].tolist()) == (threshold == 0.5)
    light = results.predictions(results.Cell(str(tmp_path), {}))
    assert light is not None
    assert set(table) - set(light) == {"probability_png"}


def test_any_row_can_be_computed_again_from_the_file(tmp_path: Path, squares: tuple[Arrays, Arrays, Task]) -> None:
    val, test, masks = squares
    cases: list[tuple[Task, list[tuple[Arrays, np.ndarray]]]] = [(masks, [(val, knowing(val)), (test, noise(test.target.shape))])]
    for task in (TWO, CLASSES, GRADES, TWO.model_copy(update={"aggregate": Aggregate(by="patient", how="max")})):
        strata = tuple(["x", "y", None][i % 3] for i in range(60))
        patients = tuple(f"p{i // 3}" for i in range(60))
        cases.append((task, [random_split(task, 60, split, 5, strata=strata, patients=patients) for split in ("val", "test")]))
    for task, splits in cases:
        tables: list[pd.DataFrame] = []
        for arrays, logits in splits:
            tables.append(predictions(task, arrays, logits, tables[0] if tables else None))
        whole = pd.concat(tables, ignore_index=True)
        whole.to_parquet(tmp_path / "predictions.parquet", index=False)
        rows = rows_of(task, whole)
        assert rows_of(task, pd.read_parquet(tmp_path / "predictions.parquet")) == rows
        assert {row["split"] for row in rows} == {"val", "test"}
        assert len({(row["split"], row["class"], row["metric"]) for row in rows}) == len(rows)
        assert math.isfinite(headline(task, [row for row in rows if row["split"] == "test"]))


def test_metrics_of_strata_have_names_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    arrays, logits = random_split(TWO, 60, "test", 0, strata=tuple(["a+b, (c)", "d=e"][i % 2] for i in range(60)))
    rows = measure(TWO, arrays, logits)
    told = facts.headline({"metrics": rows})
    assert told["test_auroc_mean/d_e"] == value(rows, "auroc_mean/d=e")
    for name in told:
        _validate_metric_name(name)
