"""The report says what is so: the answer in words, controls, floors, and the gaps of a study that is not whole."""

import json
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from made_study import make
from tiny_corpus import write

from analysis import figures, leakage_section, samples
from analysis import report as reports
from analysis.evidence import gather
from analysis.findings import significance
from analysis.replicates import Bootstrap
from analysis.results import finished
from analysis.study_floors import StudyFloors
from base import storage
from cluster import quarantine
from shards.corpus import Corpus

QUICK = Bootstrap(300)


def text_of(out: Path) -> str:
    return storage.read_bytes(reports.report(str(out), gather(str(out), QUICK))).decode()


class Tags(HTMLParser):
    """Fails on tags that do not nest, and collects addresses."""

    void = ("meta", "br", "link", "img", "path", "use", "image", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = {"random": 0.0, "random-b": 0.0, "simclr": 0.7}
    return make(tmp_path_factory.mktemp("whole"), sources, seeds=3, images=300)


def test_the_answer_is_a_sentence_for_each_comparison(whole: Path) -> None:
    line = gather(str(whole), QUICK).answer()
    gain, control = line.split("; ")
    number = r"0\.\d{2,3}"
    assert re.fullmatch(rf"simclr beats random on phantom-chest \(these weights\): \+{number} AUROC \[{number}, {number}\]", gain)
    assert re.fullmatch(r"random against random-b: no difference shown \([+-]0\.\d+ AUROC \[-0\.\d+, 0\.\d+\], 0\.\d+ wide\)", control)
    assert gather(str(whole)).answer().startswith("simclr beats random on phantom-chest (these weights): +0.")


def test_the_page_is_one_file_and_holds_what_it_should(whole: Path) -> None:
    page = text_of(whole)
    assert page.index("simclr beats random") < page.index("<nav")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    outside = [link for link in tags.links if not link.startswith(("#", "data:"))]
    assert outside == []
    assert "http://" not in page.replace("http://www.w3.org", "")
    for words in (
        "Encoder × task",
        "± ",
        "n 3",
        "Learning curves",
        "Health of the pretrainings",
        "allograft report",
        "Positives",
    ):
        assert words in page
    assert "about encoders (these weights)" in page
    for figure in re.findall(r"<svg role=\"img\".*?</svg>", page, flags=re.S):
        assert "<title" in figure or "aria-label" in figure
    assert (whole / "report" / "results.csv").exists()
    assert "declared" in (whole / "report" / "significance.csv").read_text().splitlines()[0]


def test_the_page_is_the_same_twice_but_for_its_date(whole: Path) -> None:
    first, second = (re.sub(r"<dt>report made</dt><dd>[^<]*", "", text_of(whole)) for _ in range(2))
    assert first == second


def test_own_source_cells_are_marked_and_neither_declared_nor_ranked(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3, "simclr-sup": 3.0}, seeds=3, images=150, own=[("simclr-sup", "phantom-chest")])
    evidence = gather(str(out), QUICK)
    kinds = {(f.a, f.b): (f.kind, f.declared) for f in evidence.findings}
    assert kinds["simclr-sup", "random"] == ("own", False)
    assert kinds["simclr-sup", "simclr"] == ("own", False)
    assert "own source" in evidence.answer()
    assert "simclr</b>" in reports.best_on_validation(evidence)
    assert '<span class="tag own">own source</span>' in reports.page(evidence)


def test_exposed_cells_are_marked_and_ranked_only_on_request(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3, "simclr-sup": 3.0}, seeds=3, images=150)
    for file in (out / "cells").glob("*/result.json"):
        result = json.loads(file.read_text())
        if result["source"].endswith("simclr-sup"):
            file.write_text(json.dumps(result | {"exposed_to": ["nih-cxr14"]}))
    evidence = gather(str(out), QUICK)
    assert {f.kind for f in evidence.findings if "simclr-sup" in (f.a, f.b)} == {"exposed"}
    assert "exposed (its pretraining may have seen these test images), nothing declared" in evidence.answer()
    assert "simclr</b>" in reports.best_on_validation(evidence)
    page = reports.page(evidence)
    assert '<span class="tag own">exposed to nih-cxr14</span>' in page
    assert "Exposed cells, left out of ranks" in page
    study = Path(out, "study.yaml")
    study.write_text(yaml.safe_dump(yaml.safe_load(study.read_text()) | {"exposed": "ranked"}))
    evidence = gather(str(out), QUICK)
    assert {f.kind for f in evidence.findings if "simclr-sup" in (f.a, f.b)} == {"gain", "chain"}
    assert "simclr-sup</b>" in reports.best_on_validation(evidence)
    assert "ranked all the same" in leakage_section.leakage(evidence)


def test_the_report_says_what_was_compared_and_left_out(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3}, seeds=2, images=100)
    assert leakage_section.leakage(gather(str(out), QUICK)) == ""
    sides = {"dataset": "nih-cxr14", "split": "train", "digest": "d", "images": 1063, "unread": 1}
    counts = {"same_patient": 0, "same_pixels": 2, "near_duplicate": 5, "follow_up": 0, "leaked": 6}
    check = {
        "corpus": sides,
        "test": sides | {"dataset": "siim-acr", "split": "test", "unread": 0},
        "key": "k",
        "patients": "other namespace",
    }
    known = {"known": ["siim-acr and nih-cxr14 share images: annotated again"]}
    held = {"setting": "exclude", "checks": [check | counts | known], "own": []}
    (out / "leakage.json").write_text(json.dumps(held))
    said = leakage_section.leakage(gather(str(out), QUICK))
    for words in (
        "nih-cxr14 train (1,063)",
        "left out of pretraining",
        "share images",
        "1 images of nih-cxr14",
        "name patients differently",
    ):
        assert words in said
    # Of patients that cannot be compared nothing is known, which is no 0.
    assert "<td>–</td><td>2</td><td>5</td><td>–</td><td>6</td>" in said


def test_the_report_says_which_training_images_are_test_images_too(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0}, seeds=2, images=100)
    sides = {"dataset": "shenzhen", "split": "train", "digest": "d", "images": 463, "unread": 0}
    counts = {"same_patient": 0, "same_pixels": 1, "near_duplicate": 2, "follow_up": 0, "leaked": 3}
    test = sides | {"split": "test", "images": 134}
    check = {"corpus": sides, "test": test, "key": "k", "patients": "compared", **counts, "known": []}
    (out / "leakage.json").write_text(json.dumps({"setting": "stop", "checks": [], "own": [check]}))
    said = leakage_section.leakage(gather(str(out), QUICK))
    assert "Training images of a task that match its own test images." in said
    assert "The dataset itself holds identical images and near-identical images on both sides: results on it may be too good" in said
    near = check | {"same_pixels": 0, "leaked": 2}  # two exposures of one person are no one image
    (out / "leakage.json").write_text(json.dumps({"setting": "stop", "checks": [], "own": [near]}))
    said = leakage_section.leakage(gather(str(out), QUICK))
    assert "The dataset itself holds near-identical images on both sides" in said
    assert "these images" not in said
    (out / "leakage.json").write_text(json.dumps({"setting": "stop", "checks": [], "own": [check | {"leaked": 0}]}))
    assert "on both sides" not in leakage_section.leakage(gather(str(out), QUICK))


def test_samples_that_no_rank_could_read_are_gathered_and_reported(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3}, seeds=2, images=100)
    assert quarantine.merge(str(out)) == []
    folder = next((out / "pretrain").iterdir())
    rows = [{"sample": f"x.tar: x-{i}", "reason": "the checksum of its image differs"} for i in range(3)]
    for rank, held in enumerate((rows[:2], rows[1:])):
        (folder / f"quarantine-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    merged = quarantine.merge(str(out))
    assert merged == [{"pretraining": folder.name, **row} for row in rows]
    assert [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()] == merged
    page = text_of(out)
    assert "Samples that could not be read, each replaced by the next of its lane: 3 in simclr." in page
    assert "the checksum of its image differs" in page


def test_what_a_chain_forgot_of_earlier_corpora_is_a_table(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3}, seeds=2, images=100)
    assert "earlier corpora" not in text_of(out)
    file = next((out / "pretrain").iterdir()) / "result.json"
    before = {"dataset": "nih-cxr14", "when": "before", "linear_auroc": 0.81, "knn_auroc": None}
    after = before | {"when": "after", "linear_auroc": 0.74}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source_probes": [before, after]}))
    page = text_of(out)
    table = page[page.index("What was kept of earlier corpora") :]
    assert re.findall(r"0\.810|0\.740|-0\.070|none", table)[:4] == ["none", "0.810", "0.740", "-0.070"]
    config = file.with_name("config.yaml")
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": [{"dataset": "nih-cxr14"}]}))
    assert "earlier corpora" not in text_of(out)  # it goes on with the very same
    replayed = [{"dataset": "own-a", "weight": 0.3}, {"dataset": "own-b", "weight": 0.4}, {"dataset": "nih-cxr14", "weight": 0.3}]
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": replayed, "replay": 0.3}))
    page = text_of(out)
    assert re.findall(r"0\.810|30%|-0\.070", page[page.index("What was kept of earlier corpora") :])[:3] == ["30%", "0.810", "-0.070"]


def test_results_under_their_floor_are_red_and_a_confounded_task_says_so(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.2}, seeds=2, images=150, strata=3)
    evidence = gather(str(out), QUICK)
    held = {"pixels": {"auroc_mean": 0.9, "auroc_within_mean": 0.9}, "metadata": {"auroc_mean": 0.756, "auroc_within_mean": 0.5}}
    evidence.floors = StudyFloors(evidence, {("phantom-chest", 1.0): [held]}, [])
    page = reports.page(evidence)
    assert "under floor 0.900" in page
    assert "AUROC, confounded" in page
    assert "AUROC within source" in page
    assert "is confounded: a predictor that sees only <code>source</code>" in page


def test_one_seed_declares_nothing(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 2.0}, seeds=1, images=200)
    evidence = gather(str(out), QUICK)
    assert "one seed: patients only, nothing declared" in evidence.answer()
    assert "beats" not in reports.page(evidence)


def test_an_empty_a_running_and_a_failed_study_are_reported_truthfully(tmp_path: Path) -> None:
    assert gather(str(tmp_path / "nothing")).answer() == "no finished cell yet"
    assert "no finished cell yet" in text_of(tmp_path / "nothing")
    out = make(tmp_path / "half", {"random": 0.0, "simclr": 0.7}, seeds=3, images=120)
    folders = sorted((out / "cells").iterdir())
    (out / "events.jsonl").write_text(json.dumps({"event": "cell failed", "key": folders[0].name, "error": "out of <memory>"}) + "\n")
    shutil.rmtree(folders[0])
    (folders[1] / "predictions.parquet").unlink()
    next((out / "pretrain").glob("*/result.json")).unlink()
    page = text_of(out)
    assert gather(str(out), QUICK).answer().startswith("5 of 6 cells finished: ")
    assert "1 of 6 cells have no result" in page
    assert "out of &lt;memory&gt;" in page
    assert "not finished, at step 400" in page
    for folder in (out / "cells").iterdir():
        shutil.rmtree(folder)
    assert gather(str(out), QUICK).answer() == "no finished cell yet (0 of 6)"
    assert "0 of 6" in text_of(out)


def diary(out: Path, *events: Mapping[str, object]) -> None:
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_pretraining_that_failed_says_at_which_step_and_why(tmp_path: Path) -> None:
    out = make(tmp_path, {"simclr": 0.7, "simclr-sup": 0.7}, seeds=1, images=60)
    failed, stopped = sorted((out / "pretrain").iterdir())
    keys = [folder.name.rsplit("-", 1)[-1] for folder in (failed, stopped)]
    for folder in (failed, stopped):
        (folder / "result.json").unlink()
    (failed / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"event": "not finite", "step": 4, "why": "the loss on rank [0]"}\n')
    begun = [{"event": "start"}, *({"event": "pretraining", "key": key} for key in keys)]
    broke = {"event": "pretraining failed", "key": keys[0], "reason": "the loss is not finite <at> step 4"}
    diary(out, *begun, broke, {"event": "stop", "error": "KeyboardInterrupt: "})
    page = text_of(out)
    assert "failed at step 4: the loss is not finite &lt;at&gt; step 4" in page
    assert "stopped at step 400: KeyboardInterrupt" in page
    assert "<b>0 finished, 1 failed, 1 not finished</b>" in page
    assert "failed cell" not in page


def test_a_result_that_was_cut_in_half_is_named(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=1, images=60)
    cell = sorted((out / "cells").iterdir())[0]
    held = (cell / "result.json").read_bytes()
    (cell / "result.json").write_bytes(held[: len(held) // 2])
    page, name = text_of(out), f"cells/{cell.name}/result.json"
    assert f"<code>{name}</code>" in page[page.index('<section id="missing">') :]
    assert gather(str(out), QUICK).answer().startswith(f"{name} cannot be read (run the study again); 1 of 2 cells finished: ")
    shutil.rmtree(out / "cells" / next(folder.name for folder in (out / "cells").iterdir() if folder != cell))
    assert gather(str(out), QUICK).answer() == f"{name} cannot be read (run the study again); no finished cell yet (0 of 2)"


def test_where_a_study_of_pretrainings_alone_was_computed_is_said(tmp_path: Path) -> None:
    out = make(tmp_path, {"simclr": 0.7}, seeds=1, images=60)
    file = next((out / "pretrain").glob("*/result.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "abc1234-dirty", "device": "cuda:0"}))
    shutil.rmtree(out / "cells")
    (out / "plan.json").unlink(missing_ok=True)
    page = text_of(out)
    assert "<dt>revision</dt><dd>abc1234-dirty (1 pretrainings)</dd>" in page
    assert "<dt>devices</dt><dd>cuda:0 (1 pretrainings)</dd>" in page
    assert "git checkout abc1234 " in page
    assert "The revision ends in -dirty" in page


def test_metrics_that_are_not_numbers_and_a_flagged_control(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "random-b": 1.5, "simclr": 0.5}, seeds=3, images=200)
    evidence = gather(str(out), QUICK)
    assert "random against random-b: FLAGGED" in evidence.answer()
    for cell in finished(str(out)):
        held = {**cell.result, "metrics": [{**row, "value": None} for row in cell.metrics]}
        Path(cell.url, "result.json").write_text(json.dumps(held))
    page = text_of(out)
    assert "no number" in page
    assert gather(str(out), QUICK).answer() == "9 of 9 have no number on test images: no two sources can be compared"
    for cell in finished(str(out)):
        rows = [*cell.metrics, {**cell.metrics[0], "split": "test", "metric": "prevalence", "value": 0.0}]
        Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": rows}))
    assert gather(str(out), QUICK).answer().startswith("9 of 9 have no number on test images, where no label of theirs has both values: ")


def test_shuffled_labels_stand_among_the_controls_only(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0}, seeds=2, images=100)
    file = next((out / "cells").glob("*/result.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "shuffle_labels": True}))
    evidence = gather(str(out), QUICK)
    assert (len(evidence.cells), len(evidence.controls)) == (1, 1)
    assert "Shuffled labels, phantom-chest, random, full" in reports.page(evidence)


def test_cells_of_an_earlier_plan_are_no_evidence(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=3, images=100)
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps([row for row in plan if row["seed"] < 2]))
    evidence = gather(str(out), QUICK)
    assert (len(evidence.cells), evidence.asked, evidence.earlier) == (4, 4, 2)
    assert "2 finished cells are no longer asked for" in text_of(out)
    assert len(finished(str(out))) == 6


def test_masks_are_outlined_only_where_the_card_shares_images(tmp_path: Path) -> None:
    for shared in (True, False):
        out = make(
            tmp_path / str(shared),
            {"random": 0.0, "simclr": 1.0},
            tasks={"lungs": "segmentation"},
            seeds=2,
            images=30,
            manifests={"lungs": {"share_images": shared}},
        )
        image = np.full((4, 16, 16), 90, np.uint8)
        mask = np.zeros((4, 16, 16), np.uint8)
        mask[:, 4:12, 4:12] = 1
        for cell in finished(str(out)):
            np.savez(
                Path(cell.url, "samples.npz"),
                ids=np.arange(4),
                image=image,
                true=mask,
                pred=mask,
                dice=np.linspace(0.5, 1, 4, dtype=np.float32),
            )
        page = text_of(out)
        assert ('class="predicted" d="M' in page) is shared
        assert ("does not share images" in page) is not shared
        assert "Dice" in page


def test_predicted_masks_are_those_of_the_setting_that_leads(tmp_path: Path) -> None:
    """The first cell's strategy was shown, of whatever architecture came first for each source."""
    shown = {"lungs": {"share_images": True}}
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, tasks={"lungs": "segmentation"}, seeds=2, images=30, manifests=shown)
    arrays: dict[str, Any] = {"ids": np.arange(4), "image": np.zeros((4, 8, 8), np.uint8), "true": np.ones((4, 8, 8), np.uint8)}
    for cell in finished(str(out)):
        leads = cell.result["seed"] == 1
        result = cell.result | ({"architecture": "densenet121", "strategy": "linear"} if leads else {})
        for row in result["metrics"]:
            row["value"] = 0.9 if leads else 0.5
        Path(cell.url, "result.json").write_text(json.dumps(result))
        dice = np.full(4, 0.875 if leads else 0.25, np.float32)
        np.savez(Path(cell.url, "samples.npz"), **arrays, pred=arrays["true"], dice=dice)
    page = samples.gallery(gather(str(out), QUICK), "lungs")
    assert ("Dice 0.875" in page, "Dice 0.250" in page) == (True, False)
    assert page.count("<b>random</b>") == page.count("<b>simclr</b>") == 3
    assert "linear" in page.split("faint")[-1]


def test_true_masks_are_those_of_the_best_cell_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen on the test split, the captions would show the luckiest cell."""
    shown = {"lungs": {"share_images": True}}
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, tasks={"lungs": "segmentation"}, seeds=1, images=30, manifests=shown)
    corpus = Corpus(write(tmp_path / "shards", (30,), masks=True, splits=["test"], dataset="lungs"), ("test",))
    monkeypatch.setattr(samples, "_corpus", lambda *_: corpus)
    evidence = gather(str(out), QUICK)
    assert "Images could not be read" in samples.gallery(evidence, "lungs")
    assert "no test image 000" in samples.gallery(evidence, "lungs")  # predictions about other shards
    for cell in finished(str(out)):
        frame = pd.read_parquet(Path(cell.url, "predictions.parquet"))
        frame.loc[frame["split"] == "test", "sample_id"] = corpus.keys()
        frame.to_parquet(Path(cell.url, "predictions.parquet"))
        result = json.loads(Path(cell.url, "result.json").read_text())
        for row in result["metrics"]:
            row["value"] = 0.9 if (row["split"] == "val") == (cell.source == "simclr") else 0.1
        Path(cell.url, "result.json").write_text(json.dumps(result))
    page = samples.gallery(gather(str(out), QUICK), "lungs")
    assert "True masks only" in page
    assert "simclr, full: Dice" in page
    assert "random, full: Dice" not in page


def test_the_table_of_significance_is_consistent_and_captions_are_escaped(whole: Path) -> None:
    table = significance(gather(str(whole), QUICK))
    assert (table.loc[table["declared"], "p_holm"] < 0.05).all()
    assert (table["low"] <= table["estimate"]).all()
    assert set(table["claim"]) == {"encoders (these weights)"}
    drawn = figures.overlay(np.zeros((8, 8, 3), np.uint8), None, None, 'a "quoted" <name>')
    assert "a &quot;quoted&quot; &lt;name&gt;" in drawn
