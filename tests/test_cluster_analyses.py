"""The analyses of a study: made once of its cells, by key, and shown by its report."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_cell
import tiny_study
import torch
from browser import CHROMIUM, Browser
from looks import wrong
from made_study import claim, write_claims

from analysis import analysis_sections
from analysis import report as reports
from analysis.analyses import KINDS, Analysis, folder, standing
from analysis.evidence import gather
from analysis.replicates import Bootstrap
from analysis.results import finished
from base import storage
from base.errors import RequestError
from base.paths import ROOT
from cluster import analyses
from cluster.analyses import NODES, analyse, of_study, run_analyses
from cluster.events import Events
from cluster.load import load_study
from cluster.plan import Packed
from cluster.progress import Progress
from cluster.sources import cell_config, read_weights
from cluster.study import Study
from encoders.build import build
from encoders.export import export
from engine.context import LocalContext
from finetune import efficiency as measured
from finetune.run import run
from shards import manifest

QUICK = Bootstrap(100)
STORED = "memory://analyses/two"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, phantom_chest: str) -> Study:
    """Nine trained cells that kept their encoders: random weights and two exported encoders, one of them in a store, three seeds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("analyses")
    facts: dict[str, Any] = {"method": "made", "lineage": [], "data": [], "revision": "0", "image_size": 32}
    for seed, name in enumerate(("one", "two")):
        export(build("test_resnet", 1, seed=seed), folder / name, name=name, **facts)
    storage.put_dir(folder / "two", STORED)
    places = {"one": str(folder / "one"), "two": STORED}
    sources = ["random", *({"name": name, "source": place} for name, place in places.items())]
    tree = {**tiny_study.SMALLER, "data": {"phantom-chest": {"shards": phantom_chest}}, "pretrain": [], "analyses": list(KINDS)}
    tree.pop("champion")
    cells = {**tree["cells"], "sources": sources, "strategies": ["full"], "seeds": [0, 1, 2], "keep": "encoder"}
    cells |= {"task_settings": {"phantom-chest": {"recipe.epochs": 2}}, "architectures": ["test_resnet"]}
    made = load_study(tiny_study.write(folder, {**tree, "cells": cells}))
    weights = {name: [read_weights(place)] for name, place in places.items()}
    corpora = {"phantom-chest": Packed(phantom_chest, manifest.read(phantom_chest))}
    for config in tiny_study.cells(made, corpora, weights):
        run(config, LocalContext(dir=str(folder / "work")))
    (folder / "out" / "study.yaml").write_text((folder / "study.yaml").read_text())
    (folder / "out" / "accuracy.csv").write_text("source,accuracy\nrandom,0.1\none,0.6\ntwo,0.7\n")
    return made


@pytest.fixture(scope="module")
def analysed(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    patch = pytest.MonkeyPatch()
    patch.setattr(measured, "SECONDS", 0.001)
    patch.setenv("ALLOGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))  # as on a machine that has trained none of these cells
    run_analyses(study, Progress(), Events(study.out))
    patch.undo()
    return study


def test_each_kind_stands_once_with_what_it_lists(analysed: Study) -> None:
    held = standing(analysed.out)
    assert [one.analysis.kind for one in held] == list(KINDS)
    for one in held:
        assert one.analysis.cells == 9
        for drawn in one.analysis.figures:
            assert len(drawn.text) > 20
            assert Path(one.url, f"{drawn.file}.png").stat().st_size > 2000
            svg = Path(one.url, f"{drawn.file}.svg").read_text()
            assert svg.startswith("<svg")
            assert "<desc" in svg
            assert "#0a0b0" not in svg  # a placeholder of a colour
        for listed in one.analysis.tables:
            assert Path(one.url, listed.file).exists()
            assert all(len(row) == len(listed.heads) for row in listed.rows)
    before = sorted(path.name for path in Path(analysed.out, "analyses").iterdir())
    assert all(analyse(analysed.out, kind) is None for kind in NODES)
    assert sorted(path.name for path in Path(analysed.out, "analyses").iterdir()) == before


def test_similarity_and_filters_are_those_of_before_and_after(analysed: Study) -> None:
    held = {one.analysis.kind: one for one in standing(analysed.out)}
    files = {drawn.file.rpartition("/")[2] for drawn in held["similarity"].analysis.figures}
    assert {"layers", "coefficients", "top-one", "top-two", "start-against-end"} <= files
    runs = next(Path(held["similarity"].url).rglob("runs.csv"))
    assert len(pd.read_csv(runs)) == 9 * 5
    rows = next(listed for listed in held["filters"].analysis.tables if listed.file == "summary.csv").rows
    assert len(rows) == 3
    assert all(row[4].startswith("median") for row in rows)  # movement: the first layer was trained


def test_a_source_in_a_store_is_named_by_its_place_there_and_analysed_from_any_machine(analysed: Study) -> None:
    cells = [cell for cell in finished(analysed.out) if cell.source == "two"]
    assert {cell_config(cell.url).encoder_dir for cell in cells} == {STORED}
    assert not [note for one in standing(analysed.out) for note in one.analysis.notes if "two" in note or "encoder" in note]


def test_convergence_counts_steps(analysed: Study) -> None:
    (held,) = (one for one in standing(analysed.out) if one.analysis.kind == "convergence")
    runs = pd.read_csv(Path(held.url, "runs.csv"))
    assert set(runs["by"]) == {"steps"}
    steps = {
        row["step"] for cell in finished(analysed.out) for row in map(json.loads, Path(cell.url, "metrics.jsonl").read_text().splitlines())
    }
    assert set(runs["at"].dropna()) <= steps
    assert len(runs) == 9


def test_efficiency_and_transferability_are_of_every_source(analysed: Study) -> None:
    held = {one.analysis.kind: one for one in standing(analysed.out)}
    costs = pd.read_csv(Path(held["efficiency"].url, "efficiency.csv"))
    assert set(" ".join(costs["keys"]).split()) == {cell.key for cell in finished(analysed.out)}
    guesses = pd.read_csv(Path(held["transferability"].url, "transferability.csv"))
    assert set(guesses["source"]) == {"random", "one", "two"}
    assert guesses[["LogME", "H-score", "N-LEEP"]].notna().all(axis=None)
    assert set(guesses["features"]) == {96}
    assert guesses["images"].gt(97).all()
    ranks = pd.read_csv(Path(held["transferability"].url, "correlation.csv"), dtype=str)
    assert ranks.loc[ranks["guess"] == "LogME", "sources"].tolist() == ["3"]
    assert ranks.loc[ranks["guess"] == "LogME", "Spearman"].astype(float).abs().le(1).all()


def test_no_h_score_is_given_nor_ranked_where_images_are_too_few(analysed: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyses, "ROWS", 60)
    out = tmp_path / "out"
    shutil.copytree(analysed.out, out, ignore=shutil.ignore_patterns("encoder"))
    key = analyse(str(out), "transferability")
    assert key is not None
    place = Path(folder(str(out), "transferability", key))
    guesses = pd.read_csv(place / "transferability.csv")
    assert guesses["H-score"].isna().all()
    assert guesses[["LogME", "N-LEEP"]].notna().all(axis=None)
    assert (set(guesses["images"]), set(guesses["features"])) == ({60}, {96})
    assert set(pd.read_csv(place / "correlation.csv")["guess"]) == {"LogME", "N-LEEP"}
    notes = json.loads((place / "analysis.json").read_text())["notes"]
    assert [note for note in notes if note.endswith(": no H-score of 60 labelled images and 96 features, whose covariance is singular")]


def test_accuracies_are_kept_with_the_study_and_held_against_its_results(analysed: Study, tmp_path: Path) -> None:
    held = {one.analysis.kind: one for one in standing(analysed.out)}["accuracy"]
    (listed,) = (listed for listed in held.analysis.tables if listed.file == "correlation.csv")
    assert [row[-1] for row in listed.rows] == ["3"]
    out = tmp_path / "out"
    shutil.copytree(analysed.out, out, ignore=shutil.ignore_patterns("encoder"))
    (tmp_path / "mine.csv").write_text("source,accuracy\nrandom,0.9\none,0.6\ntwo,0.7\n")
    time.sleep(1.1)  # the newest counts, by a clock of seconds
    of_study(str(out), ["accuracy"], str(tmp_path / "mine.csv"))
    assert (out / "accuracy.csv").read_text() == (tmp_path / "mine.csv").read_text()
    newest = {one.analysis.kind: one for one in standing(str(out))}["accuracy"]
    assert newest.analysis.key != held.analysis.key
    points = pd.read_csv(Path(newest.url, "accuracy.csv"))
    assert dict(zip(points["source"], points["accuracy"], strict=True)) == {"random": 0.9, "one": 0.6, "two": 0.7}
    (out / "accuracy.csv").unlink()
    with pytest.raises(RequestError, match="no such file"):
        analyse(str(out), "accuracy")


def test_the_report_shows_them_and_says_what_is_missing(analysed: Study) -> None:
    evidence = gather(analysed.out, QUICK)
    page = reports.page(evidence)
    for title in analysis_sections.TITLES.values():
        assert f"<h2>{title}</h2>" in page
    assert "Steps until validation" in page
    assert "T (ms)" not in page  # one strategy: no table of Peng et al.
    evidence.cells.pop()
    assert "Of 9 cells; 8 stand now" in reports.page(evidence)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_nothing_is_wrong_with_its_page_in_a_browser(analysed: Study, phantom_fundus: str, tmp_path: Path) -> None:
    """Its analyses and Grad-CAM as they were computed, beside a claim, a cell with masks, and what leaked."""
    out = tmp_path / "out"
    shutil.copytree(analysed.out, out, ignore=shutil.ignore_patterns("encoder"))
    masks: dict[str, Any] = {"task": "phantom-vessels", "settings": {"recipe.epochs": 1}, "key": "e" * 16}
    masks["out"] = str(out / "cells" / ("e" * 16))
    run(tiny_cell.config({"phantom-fundus": phantom_fundus}, tmp_path, **masks), LocalContext(dir=str(tmp_path)))
    write_claims(out, [claim(comparison={"a": {"source": "one"}, "b": {"source": "random"}}, where={"kind": "classification"})])
    (out / "leakage.json").write_bytes((ROOT / "tests" / "golden" / "leakage_summary.json").read_bytes())
    with Browser() as browser:
        page = browser.open(Path(reports.report(str(out), gather(str(out), QUICK))).as_uri())
        for section in ("claims", "leakage", *KINDS):
            assert page.run(f"document.querySelector('#{section}').textContent.length") > 200, section
        assert page.run("document.querySelectorAll('#images img[alt^=\"Grad-CAM\"]').length") == 2  # of each task
        assert page.run("document.querySelectorAll('#images figure svg').length") >= 5 + 3  # labelled images, and masks
        assert "predicted mask" in page.run("document.querySelector('#images').textContent")
        assert wrong(page) == []


def test_an_analysis_that_fails_is_said_and_stops_no_other(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / "study.yaml").write_text(Path(study.out, "study.yaml").read_text())
    with pytest.raises(RequestError, match="no finished cell"):
        analyse(str(out), "filters")
    elsewhere = study.model_copy(update={"out": str(out), "analyses": ["filters", "convergence"]})
    run_analyses(elsewhere, Progress(), Events(str(out)))
    told = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in told if row["event"] == "analysis failed"] == ["filters", "convergence"]
    shown = {kind: text for kind, _, text in analysis_sections.sections(gather(str(out)))}
    assert "Could not be computed: " in shown["filters"]
    assert "not computed yet" in shown["similarity"]


def test_a_figure_that_cannot_be_drawn_loses_neither_report_nor_registry(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_: object) -> None:
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setitem(NODES, "filters", singular)
    monkeypatch.setattr(analyses, "VERSION", 0)  # none of it stands
    run_analyses(study.model_copy(update={"analyses": ["filters"]}), Progress(), Events(study.out))
    told = [json.loads(line) for line in Path(study.out, "events.jsonl").read_text().splitlines()]
    assert told[-1]["reason"] == "LinAlgError: Singular matrix"


def test_json_schema_and_golden_analysis() -> None:
    """To change the format: raise its `schema`, then write what this test prints."""
    schema = json.dumps(Analysis.model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / "analysis.json").read_text() == schema
    held = json.loads((ROOT / "tests" / "golden" / "analysis.json").read_text())
    assert Analysis.model_validate(held).model_dump(mode="json", by_alias=True) == held
