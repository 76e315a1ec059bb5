"""What the page may not say: each test names a sentence or a mark that stood there once and was not so."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_study import claim, make, write_claims

from analysis import analysis_sections, calibration, papers, results, sections, statistics_sections, subgroups, tables
from analysis import report as reports
from analysis.analyses import Analysis, Standing
from analysis.claims import Claim
from analysis.comparing import compare_studies
from analysis.evidence import Evidence, gather
from analysis.findings import brief, significance
from analysis.loaded import Loaded, scores
from analysis.replicates import Bootstrap, Scores
from analysis.results import finished
from analysis.statistics import compare, holm
from analysis.study_floors import StudyFloors, clearly_under
from base.seeds import rng
from cluster.claims import register_family
from cluster.events import Events
from cluster.study import Study

QUICK = Bootstrap(150)


@pytest.mark.parametrize(
    ("floors", "said", "unsaid"),
    [
        (
            {"record": 0.99, "pixels": 0.4},
            "2 do worse than what is written beside the image, with no image looked at",
            "pixel",
        ),
        ({"metadata": 0.99}, "2 do worse than what is written beside the image", "pixel"),
        ({"pixels": 0.99}, "2 do worse than a pixel logistic regression, a mean mask or shuffled labels", "written beside"),
        (
            {"pixels": 0.98, "record": 0.99},
            "or shuffled labels; 2 do worse than what is written beside the image",
            "nothing learned",
        ),
    ],
)
def test_does_not_repeat_that_pixels_do_better_where_the_floor_is_what_is_written(
    tmp_path: Path, floors: dict[str, float], said: str, unsaid: str
) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=2, images=80)), QUICK)
    held = {("phantom-chest", 1.0): [{name: {"auroc_mean": value} for name, value in floors.items()}]}
    words = StudyFloors(evidence, held, []).warning()
    assert words.startswith("2 of 2 results are under a floor: ")
    assert said in words
    assert unsaid not in words


def test_does_not_repeat_a_floor_that_half_of_the_seeds_are_above(tmp_path: Path) -> None:
    """The demo's random weights, 0.6852 over five seeds, two of them at 0.793 and 0.705, were red under a floor of 0.6872."""
    seeds = [0.793, 0.705, 0.678, 0.648, 0.602]
    assert not clearly_under(seeds, [0.6872])
    assert clearly_under(seeds, [0.768])
    assert not clearly_under(seeds[:1], [0.999])  # of one seed nothing is known of the next
    assert clearly_under([0.6, 0.6], [0.61])
    level = [0.745, 0.751, 0.757, 0.748, 0.754]
    assert clearly_under(level, [0.77])
    assert not clearly_under(level, [0.70, 0.85, 0.80, 0.74, 0.76])  # 0.77 too, by fits that vary
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=5, images=80)
    for cell, value in zip(sorted((c for c in finished(str(out)) if c.source == "random"), key=lambda c: c.seed), seeds, strict=True):
        rows = [row | {"value": value} for row in cell.metrics]
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"metrics": rows}))
    evidence = gather(str(out), QUICK)
    evidence.floors = StudyFloors(evidence, {("phantom-chest", 1.0): [{"pixels": {"auroc_mean": 0.6872}}]}, [])
    own = [cell for cell in evidence.cells if cell.source == "random"]
    assert not evidence.under_floor(own)
    assert evidence.floors.warning() == "1 of 2 results are not above a floor, and not clearly under it"
    page = tables.matrix(evidence)
    assert '<span class="tag ">not above floor 0.687 (pixels)</span>' in page
    assert "heat bad" not in page


def test_a_floor_counts_pretrainings_where_a_source_has_several(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=6, images=60)
    values = [0.5, 0.5, 0.7, 0.7, 0.6, 0.6]  # three pretrainings of two seeds each
    for cell in finished(str(out)):
        if cell.source == "simclr":
            rows = [row | {"value": values[cell.seed]} for row in cell.metrics]
            seeds = {"source_seed": cell.seed // 2, "seed": cell.seed % 2}
            Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"metrics": rows, **seeds}))
    evidence = gather(str(out), QUICK)
    evidence.floors = StudyFloors(evidence, {("phantom-chest", 1.0): [{"pixels": {"auroc_mean": 0.69}}]}, [])
    own = [cell for cell in evidence.cells if cell.source == "simclr"]
    assert clearly_under(values, [0.69])  # six runs as if none shared its weights
    assert not evidence.under_floor(own)


def equal_groups(number: int, groups: int, patients: int) -> tuple[Scores, dict[str, str]]:
    """Two images a patient; whom an image shows says nothing of how well it is told."""
    draw = rng("equal groups", number)
    patient = np.repeat(np.arange(patients), 2)
    target_NL = (draw.random((len(patient), 1)) < 0.3).astype(float)
    seen_NL = target_NL + 0.7 * draw.normal(size=(patients, 1))[patient] + 0.7 * draw.normal(size=target_NL.shape)
    ids = np.arange(len(patient)).astype(str)
    group = draw.integers(0, groups, patients)[patient]
    scores = Scores(0, ids, np.array([f"p{p}" for p in patient], object), target_NL, 1 / (1 + np.exp(-seen_NL)))
    return scores, {str(i): f"g{g}" for i, g in zip(ids, group, strict=True)}


def test_does_not_repeat_gaps_that_are_marked_though_all_groups_are_equal() -> None:
    facts = ("task", "simclr", "full", "site", "auroc_mean", "corpus")
    made = [equal_groups(number, 8, 400) for number in range(40)]
    found = [subgroups.by_group(facts, [one], group_of, Bootstrap(200, i)) for i, (one, group_of) in enumerate(made)]
    assert all(np.isfinite(one.chance) for one in found)
    assert sum(one.clear for one in found) <= 5  # of 40 at 5 %; an interval of the best against the worst marked 24


def test_does_not_repeat_groups_that_count_images_for_patients() -> None:
    scores, group_of = equal_groups(0, 2, 38)  # some 19 patients, 38 images a group
    few = subgroups.by_group(("task", "simclr", "full", "sex", "auroc_mean", "corpus"), [scores], group_of, Bootstrap(50))
    assert [group.images for group in few.groups] == [2 * group.patients for group in few.groups]
    small = [group for group in few.groups if group.patients < subgroups.LEAST]
    assert small
    assert all(np.isnan(group.value) and group.images >= subgroups.LEAST for group in small)


def test_does_not_repeat_a_lack_of_patients_where_a_label_is_lacking() -> None:
    """153, 78 and 95 test patients were called too few, where the limit is 20: no label had images of each kind at every source."""
    facts = ("task", "simclr", "full", "source", "auroc_mean", "corpus")
    scores, group_of = equal_groups(1, 2, 200)
    assert scores.target_NL is not None
    of_first = np.array([group_of[str(i)] == "g0" for i in scores.ids_N])
    scores.target_NL[of_first, 0] = 0
    found = subgroups.by_group(facts, [scores], group_of, Bootstrap(50))
    assert min(group.patients for group in found.groups) > 4 * subgroups.LEAST
    assert (found.labels, found.worst) == (0, "–")
    assert found.why == "no label has 3 test images with it and 3 without it in every group of at least 20 test patients"
    few = subgroups.by_group(facts, [equal_groups(2, 2, 30)[0]], equal_groups(2, 2, 30)[1], Bootstrap(50))
    assert few.why == "fewer than two known groups of at least 20 test patients have a number"
    pairs = np.unique(scores.patient_N[of_first].astype(str))[:16].reshape(8, 2)  # of each of eight labels, whom a draw may leave out
    held, others = scores.patient_N.astype(str), scores.target_NL[:, 0]
    target_NL = np.stack([np.where(of_first, np.isin(held, pair), others) for pair in pairs], axis=1)
    scores = replace(scores, target_NL=target_NL.astype(float), score_NL=rng("rare").random(target_NL.shape))
    rare = subgroups.by_group(facts, [scores], group_of, Bootstrap(200))
    assert (rare.labels, np.isfinite(rare.gap), np.isnan(rare.chance)) == (8, True, True)
    assert rare.why.startswith("no gap by chance: ")
    assert rare.why.endswith(" of 200 draws of patients leave each group both values of each label")


def test_does_not_repeat_a_worst_group_of_whom_nothing_is_known() -> None:
    facts = ("task", "simclr", "full", "sex", "auroc_mean", "corpus")
    scores, group_of = equal_groups(3, 3, 300)
    named = {key: {"g0": "F", "g1": "M", "g2": "not known"}[name] for key, name in group_of.items()}
    assert scores.score_NL is not None
    unknown = np.array([named[str(i)] == "not known" for i in scores.ids_N])
    scores.score_NL[unknown] = 1 - scores.score_NL[unknown]
    found = subgroups.by_group(facts, [scores], named, Bootstrap(100))
    values = {group.name: group.value for group in found.groups}
    assert values["not known"] < min(values["F"], values["M"])
    assert found.worst != "not known"
    assert found.gap == abs(values["F"] - values["M"])
    assert not found.clear


def rewrite(out: Path, source: str, **changes: object) -> None:
    """Change keys of the results of a source's cells; `value` of its metrics too."""
    for cell in finished(str(out)):
        if cell.source == source:
            rows = [{**row, "value": changes.get("value", row["value"])} for row in cell.metrics]
            rest = {name: value for name, value in changes.items() if name != "value"}
            Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": rows, **rest}))


def test_does_not_repeat_own_source_and_exposed_cells_in_bold_and_unmarked(tmp_path: Path) -> None:
    sources = {"random": 0.0, "simclr": 0.5, "simclr-sup": 3.0}
    out = make(tmp_path, sources, seeds=2, images=100, strategies=("full", "linear"), own=[("simclr-sup", "phantom-chest")])
    made = {one.name: one for one in papers.layouts(gather(str(out), QUICK))}
    first = made["transfusion-1-phantom-chest-48"]
    assert first.rows[0][3].endswith("†")
    assert first.best == {(0, 2)}
    assert "n = 2; † pretrained on these labels" in first.caption
    assert "$\\dagger$" in first.latex()
    by_label = made["transfusion-2-phantom-chest-48"]
    assert {i for i, _ in by_label.best} == {1}
    assert not {j for _, j in made["truncated-phantom-chest-simclr-sup-resnet18-48"].best} & {1, 2}
    rewrite(out, "simclr-sup", own_source=False, exposed_to=["corpus"])
    benchmark = {one.name: one for one in papers.layouts(gather(str(out), QUICK))}["benchmark-resnet18-full"]
    assert benchmark.rows[2][1].endswith(" ‡")  # and no stars
    assert benchmark.best == {(1, 1)}
    assert "uncorrected, test patients taken as given; ‡ may have seen these test images" in benchmark.caption


def test_does_not_repeat_stars_of_results_without_spread(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=3, images=60)
    rewrite(out, "random", value=0.7)
    rewrite(out, "simclr", value=0.8)
    benchmark = {one.name: one for one in papers.layouts(gather(str(out), QUICK))}["benchmark-resnet18-full"]
    assert [row[1] for row in benchmark.rows] == ["70.00 ±0.00", "80.00 ±0.00"]


def test_does_not_repeat_stars_of_own_exposed_and_under_a_floor(tmp_path: Path) -> None:
    sources = {"random": 0.0, "simclr": 2.0, "simclr-sup": 4.0}
    out = make(tmp_path, sources, seeds=3, images=100, own=[("simclr-sup", "phantom-chest")])

    def stars(floor: float) -> tuple[dict[str, Any], papers.Layout]:
        evidence = gather(str(out), QUICK)
        evidence.floors = StudyFloors(evidence, {("phantom-chest", 1.0): [{"pixels": {"auroc_mean": floor}}]}, [])
        assert "own and exposed sources, and those under a floor, have none" in statistics_sections.secondary_tests(evidence)
        held = pd.read_csv(out / "report" / "secondary.csv")
        found = {str(row["a"]): row.get("stars") for _, row in held.iterrows() if row["b"] == "random"}
        return found, {one.name: one for one in papers.layouts(evidence)}["benchmark-resnet18-full"]

    found, benchmark = stars(0.0)
    assert "*" in found["simclr"]
    assert pd.isna(found["simclr-sup"])
    assert "*" in benchmark.rows[1][1]
    rewrite(out, "simclr-sup", own_source=False, exposed_to=["corpus"])
    assert pd.isna(stars(0.0)[0]["simclr-sup"])
    found, benchmark = stars(0.999)
    assert all(map(pd.isna, found.values()))
    assert not any("*" in text for row in benchmark.rows for text in row)
    assert benchmark.rows[1][1].endswith(" ¶")
    assert "; ¶ of a setting whose mean is under a floor" in benchmark.caption
    assert r"\P{}" in benchmark.latex()


def claimed(out: Path, *claims: Claim, late: tuple[str, ...] = ()) -> Evidence:
    """A made study with claims, registered before its results but for those in `late`."""
    write_claims(out, claims, late)
    return gather(str(out), QUICK)


def test_does_not_repeat_claims_without_what_their_intervals_are_over(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=3, images=80)
    evidence = claimed(out, claim(), claim(name="alike", sentence="They are alike.", expect="equivalent"), late=("alike",))
    said = statistics_sections.claims(evidence)
    patients = evidence.ledger[0].comparison.patients
    assert f'<td>seeds and patients</td><td data-v="3">3</td><td data-v="{patients}">{patients}</td>' in said
    assert "before their results stood, but for alike." in said
    assert "before it ran" not in said
    assert "(90 %)" in said
    assert reports._scope(evidence).endswith("Intervals are 95 %, of claims of equivalence 90 %.")
    next(Path(cell.url) for cell in finished(str(out)) if cell.source == "simclr").joinpath("result.json").unlink()
    evidence = gather(str(out), QUICK)
    assert "so far: 1 of its cells is missing" in statistics_sections.claims(evidence)
    assert "Added to the study file when" in statistics_sections.claims(claimed(out, claim(), late=("pretraining-helps",)))


def test_does_not_repeat_two_studies_compared_without_their_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = [make(tmp_path / name, {"random": 0.0, "simclr": lift}, seeds=3, images=150) for name, lift in (("one", 0.0), ("two", 2.0))]
    for out in outs:
        claimed(out, claim())
    monkeypatch.setattr("analysis.comparing.ROWS", 1)
    page = Path(compare_studies(str(outs[0]), str(outs[1]), QUICK)).read_text()
    held = page[page.index('<section id="statements">') :]
    assert "claim pretraining-helps: &quot;Pretraining on chests helps.&quot;" in held
    assert "holds (greater by 0.02)" in held
    assert "2 settings stand in both studies, of which the first 1 are compared, 1 of them with the very same cells" in page


def test_does_not_repeat_that_seeds_are_drawn() -> None:
    assert "jointly" not in reports.METHOD
    assert "patients are drawn, and what seeds add is computed in closed form" in reports.METHOD
    assert "with one seed it holds patients alone" in reports.METHOD


def test_does_not_repeat_settings_and_revisions_that_are_markup(tmp_path: Path) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0}, seeds=1, images=40)), QUICK)
    made = Analysis(kind="efficiency", key="k", made="today", revision="<b>r</b>", cells=1, settings={"name": "<script>"}, notes=["<i>"])
    said = analysis_sections._whole(evidence, Standing(str(tmp_path), made))
    assert "&lt;script&gt;" in said
    assert not {"<script", "<b>", "<i>"} & {said[i : i + n] for n in (3, 7) for i in range(len(said))}


def test_does_not_repeat_comparisons_that_are_kept_though_a_prediction_could_not_be_read(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=3, images=80)
    lost = {
        source: [Path(c.url, "predictions.parquet") for c in finished(str(out)) if c.source == source] for source in ("random", "simclr")
    }
    held = {file: file.read_bytes() for files in lost.values() for file in files}
    for away in (lost["simclr"], lost["simclr"][:1]):  # all of a side, and one of three
        for file in away:
            file.unlink()
        evidence = gather(str(out), QUICK)
        assert evidence.findings[0].comparison.units < 3
        evidence.comparisons.write()
        for file in away:
            file.write_bytes(held[file])
        evidence = gather(str(out), QUICK)
        assert (evidence.findings[0].comparison.units, evidence.comparisons.computed) == (3, 1)


def test_does_not_repeat_replicates_that_hold_the_predictions_they_came_from() -> None:
    bootstrap = Bootstrap(20)
    scores, _ = equal_groups(0, 2, 40)
    first, again = bootstrap(scores, "auroc_mean"), bootstrap(replace(scores), "auroc_mean")
    assert again is first
    assert scores.score_NL is not None
    assert bootstrap(replace(scores, score_NL=scores.score_NL[::-1].copy()), "auroc_mean")[0] != first[0]
    gone = weakref.ref(scores)
    del scores
    gc.collect()
    assert gone() is None


def test_does_not_repeat_a_loader_that_keeps_the_predictions_of_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = finished(str(make(tmp_path, {"random": 0.0}, seeds=4, images=40)))
    monkeypatch.setattr("analysis.loaded.HELD", 2)
    load = Loaded()
    held = [weakref.ref(found) for cell in (cells[0], cells[1], cells[0], cells[2]) if (found := load(cell)) is not None]
    del found
    gc.collect()
    assert [one() is not None for one in held] == [True, False, True, True]  # the first was asked for again, the second went


def test_does_not_repeat_claims_that_every_report_computes_anew(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7, "simclr-sup": 1.0}, seeds=2, images=60, pretrain=False)
    evidence = claimed(out, claim(comparison={"a": {"source": "simclr-sup"}, "b": {"source": "simclr"}}), claim(name="two", margin=0.03))
    made = {(f.a, f.b) for f in evidence.findings if f.kind != "claim"}
    assert evidence.comparisons.computed == len(made)  # the pairs of both claims are among them
    evidence.comparisons.write()
    again = gather(str(out), QUICK)
    assert repr(again.ledger) == repr(evidence.ledger)
    assert again.comparisons.computed == 0


def test_does_not_repeat_another_source_as_baseline_because_its_cells_came_first(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5, "moco": 1.5}, seeds=4, images=100)
    whole = {(f.a, f.b) for f in gather(str(out), QUICK).findings}
    assert whole == {("simclr", "random"), ("moco", "random")}
    for cell in finished(str(out)):
        if cell.source == "random":
            Path(cell.url, "result.json").unlink()
    evidence = gather(str(out), QUICK)
    assert evidence.findings == []
    assert evidence.judged.corrected == 2
    assert evidence.answer().endswith("no two sources can be compared")


def test_does_not_repeat_sources_apart_because_a_search_chose_them_other_cuts(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, strategies=("truncated",), seeds=3, images=100)
    plan = json.loads((out / "plan.json").read_text())
    chosen = {"random": {"cut": "layer2"}, "simclr": {"cut": "layer3"}}
    out.joinpath("plan.json").write_text(
        json.dumps([row | {"options": chosen[row["source"].removeprefix("pretrain:")], "asked": {"cut": "auto"}} for row in plan])
    )
    evidence = gather(str(out), QUICK)
    assert [(f.a, f.b) for f in evidence.findings] == [("simclr", "random")]
    assert evidence.judged.corrected == 1


def test_does_not_repeat_methods_whose_seeds_all_go_on_from_one_checkpoint(tmp_path: Path) -> None:
    def told(parents: list[str]) -> str:
        out = make(tmp_path / parents[-1], {"random": 0.0, "simclr": 1.0}, seeds=3, images=100, pretrain=False)
        for cell in finished(str(out)):
            place, sha = Path(cell.url, "result.json"), f"{cell.seed}" * 64
            changed = {"source_seed": cell.seed} | ({"encoder_sha256": sha} if cell.source == "simclr" else {})
            place.write_text(json.dumps(cell.result | changed))
            if cell.source == "simclr":
                folder = out / "pretrain" / f"simclr-{cell.seed}"
                folder.mkdir(parents=True)
                steps = [{"sha256": parents[int(cell.seed)]}, {"sha256": sha}]
                folder.joinpath("result.json").write_text(json.dumps({"name": "simclr", "encoder_sha256": sha, "lineage": steps}))
        plan = json.loads((out / "plan.json").read_text())
        out.joinpath("plan.json").write_text(json.dumps([row | {"source_seed": row["seed"]} for row in plan]))
        (finding,) = gather(str(out), QUICK).findings
        (entry,) = claimed(out, claim(about="methods")).ledger
        assert (entry.short == "") == (finding.about == "methods")
        return finding.about

    assert told(["a", "b", "c"]) == "methods"
    assert told(["a", "a", "d"]) == "encoders (these weights)"


def test_does_not_repeat_an_interval_of_seeds_alone_where_no_draw_of_patients_keeps_every_label(tmp_path: Path) -> None:
    ids, seeds = np.array([f"{i:03d}" for i in range(60)]), range(4)
    target_NL = np.eye(60)[:, :26]  # a single positive of each label
    draw = rng("few positives")
    sides = [
        [Scores(seed, ids, ids.astype(object), target_NL, target_NL + draw.normal(0, spread, target_NL.shape)) for seed in seeds]
        for spread in (0.5, 2.0)
    ]
    found = compare(sides[0], sides[1], "auroc_mean", bootstrap=Bootstrap(30))
    assert found.basis == "not comparable"
    assert "too few patients have a label: 0 of 30 draws" in found.why


def test_does_not_repeat_a_page_that_one_cell_without_dice_takes_down(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, tasks={"phantom-vessels": "segmentation"}, seeds=3, images=60)
    place = Path(finished(str(out))[0].url, "predictions.parquet")
    frame = pd.read_parquet(place)
    frame[["dice", "iou"]] = np.nan
    frame.to_parquet(place)
    (finding,) = gather(str(out), QUICK).findings
    assert (finding.comparison.basis, finding.comparison.units) == ("seeds and patients", 2)


def test_does_not_repeat_means_over_label_shares_called_seeds(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=3, fractions=(1.0, 0.1), images=60)
    evidence = gather(str(out), QUICK)
    assert "over 3 seeds" in reports.best_on_validation(evidence)
    by_label = tables.classes(evidence)
    assert by_label.count(f"full, {results.share(1.0)}") == by_label.count(f"full, {results.share(0.1)}") == 6


def test_does_not_repeat_shuffled_labels_that_alarm_nobody(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "random-b": 2.0, "simclr": 0.5}, seeds=2, images=200)
    for cell in finished(str(out)):
        if cell.source == "random-b":
            Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"shuffle_labels": True, "source": "random"}))
    plan = [row | {"shuffle_labels": row["source"] == "random-b"} for row in json.loads((out / "plan.json").read_text())]
    (out / "plan.json").write_text(json.dumps([row | {"source": "random"} if row["shuffle_labels"] else row for row in plan]))
    evidence = gather(str(out), QUICK)
    assert len(evidence.controls) == 2
    assert '<li class="bad">Shuffled labels, phantom-chest, random, full:' in sections.controls(evidence)
    setting = [cell for cell in evidence.cells if cell.source == "random"]
    assert evidence.floors.standing(setting, "auroc_mean").under == ["shuffled"]
    evidence = gather(str(out), QUICK)
    del evidence.controls[1]  # one run is a draw: the next one with shuffled labels may end lower
    standing = evidence.floors.standing(setting, "auroc_mean")
    assert (list(standing.values), standing.under) == (["shuffled"], [])


def test_does_not_repeat_deviations_over_runs_where_pretrainings_are_the_units(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=6, images=80)
    for cell in finished(str(out)):
        seeds = {"source_seed": cell.seed // 2, "seed": cell.seed % 2} if cell.source == "simclr" else {}
        ece = {"class": "", "metric": "ece_mean", "split": "test", "value": 0.01 * cell.seed**2, "unit": "fraction", "n": 80}
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | seeds | {"metrics": [*cell.metrics, ece]}))
    evidence = gather(str(out), QUICK)
    (own,) = (cells for (source,), cells in results.by(evidence.cells, "source").items() if source == "simclr")
    for metric, label, page in (
        ("ece_mean", "", calibration.section(evidence)),
        ("auroc_mean", None, Path(compare_studies(str(out), str(out), QUICK)).read_text()),
    ):
        means = [np.mean([c.value(metric, label=label) for c in own if c.source_seed == seed]) for seed in range(3)]
        assert tables.num(float(np.std(means, ddof=1)), 4 if label == "" else 3) in page
        assert "3 × 2" in page


def test_does_not_repeat_a_difference_of_other_seeds_than_its_interval(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"random": 0.0}, seeds=3, images=80)
    two = make(tmp_path / "two", {"random": 0.3}, seeds=6, images=80)
    page = Path(compare_studies(str(one), str(two), QUICK)).read_text()
    a, b = ([held for c in finished(str(out)) if c.seed < 3 and (held := scores(c))] for out in (two, one))
    found = compare(a, b, "auroc_mean", bootstrap=QUICK)
    assert f"{found.estimate:+.3f} AUROC over 3 common seeds" in page


def test_does_not_repeat_claims_that_fail_by_an_uncorrected_interval_as_declared(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.0}, seeds=5, images=150)
    held = claimed(out, claim(margin=0.9))
    assert [entry.verdict for entry in held.ledger] == ["fails"]
    assert (held.findings[0].declared, held.findings[0].mark) == (False, "worse")


def diverged(out: Path, source: str, seeds: int) -> None:
    """The first cells of a source end as not a number, in metrics and predictions."""
    for cell in [cell for cell in finished(str(out)) if cell.source == source][:seeds]:
        rows = [{**row, "value": None} for row in cell.metrics]
        Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": rows}))
        frame = pd.read_parquet(Path(cell.url, "predictions.parquet"))
        for name in [name for name in frame if str(name).startswith("score_")]:
            frame[name] = np.nan
        frame.to_parquet(Path(cell.url, "predictions.parquet"))


def test_does_not_repeat_survivors_of_runs_that_diverged_as_the_source(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 2.0, "moco": 1.0}, seeds=5, images=100)
    diverged(out, "simclr", 2)
    evidence = gather(str(out), QUICK)
    answer = evidence.answer()
    assert answer.startswith("2 of 15 have no number on test images: ")
    assert "simclr beats" not in answer
    why = "2 cells of it failed or ended without a number, and those that did not are a selection"
    assert f"simclr against random on phantom-chest (these weights): not comparable, {why}" in answer
    assert "moco beats random" in answer
    (moco,) = [f for f in evidence.findings if f.a == "moco"]
    assert moco.adjusted == pytest.approx(min(1, 2 * moco.comparison.p))  # the other stays in the family with p = 1
    page = text_of(evidence)
    assert "2 of 15 finished cells have no number on test images" in page
    assert '<div class="tile bad"><b>2 of 15</b><span>without a number</span></div>' in page
    assert "▲ above random" in page
    assert "2 failed or without a number" in tables.matrix(evidence)
    assert "<b>moco</b>" in tables.winners(evidence)
    assert "moco</b>" in reports.best_on_validation(evidence)
    assert statistics_sections.settings_by_source(evidence)["simclr"].isna().all()
    benchmark = {one.name: one for one in papers.layouts(evidence)}["benchmark-resnet18-full"]
    assert "n = 5 (moco, random), 3 (simclr)" in benchmark.caption
    assert next(row for row in benchmark.rows if row[0] == "simclr")[1].endswith(" §")
    assert benchmark.rows[max(benchmark.best)[0]][0] == "moco"
    (claimed_of,) = claimed(out, claim()).ledger
    assert (claimed_of.verdict, "are a selection" in claimed_of.why) == ("not comparable", True)


def test_does_not_repeat_survivors_of_runs_that_failed_as_the_source(tmp_path: Path) -> None:
    """A network that diverges raises: its cell is a failed one, without a result."""
    out = make(tmp_path, {"random": 0.0, "simclr": 2.0}, seeds=5, images=100)
    cell = next(cell for cell in finished(str(out)) if cell.source == "simclr")
    Path(cell.url, "result.json").unlink()
    assert "simclr beats random" in gather(str(out), QUICK).answer()  # one that has yet to run is no selection
    event = {"event": "cell failed", "key": cell.key, "reason": "the network's output is not finite on split val"}
    (out / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert "not comparable, 1 cell of it failed or ended without a number" in gather(str(out), QUICK).answer()


def text_of(evidence: Evidence) -> str:
    return Path(reports.report(evidence.out, evidence)).read_text()


def planned_again(out: Path, keep: set[str], events: bool = True) -> None:
    """The driver of a study that now has some of its sources: it writes the plan, and into the diary what is new of it."""
    plan = [row for row in json.loads((out.parent / "whole.json").read_text()) if row["source"].removeprefix("pretrain:") in keep]
    if events:
        register_family(Study.model_construct(out=str(out)), plan, Events(str(out)))  # type: ignore[call-arg]
    (out / "plan.json").write_text(json.dumps(plan))


FOUR = {"random": 0.0, "moco": 0.12, "simclr": 0.0, "simclr-sup": 0.0}


def test_does_not_repeat_a_family_that_shrinks_when_sources_are_taken_out_after_the_results(tmp_path: Path) -> None:
    out = make(tmp_path / "out", FOUR, strategies=("full", "linear"), seeds=3, images=60)
    cells, away = out / "cells", tmp_path / "cells"
    (out / "plan.json").rename(tmp_path / "whole.json")
    cells.rename(away)
    planned_again(out, set(FOUR))
    away.rename(cells)
    whole = gather(str(out), QUICK)
    assert (whole.family, whole.dropped, {f.late for f in whole.findings}) == (8, [], {False})  # 3 and a link of a chain, twice
    p = {(f.a, f.b, f.strategy): f.adjusted for f in whole.findings}
    planned_again(out, {"random", "moco"})
    part = gather(str(out), QUICK)
    assert (part.family, [f.a for f in part.findings]) == (8, ["moco", "moco"])
    assert all(f.adjusted >= p[f.a, f.b, f.strategy] for f in part.findings)
    assert [f.adjusted for f in part.findings] == holm([*(f.comparison.p for f in part.findings), *[1.0] * 6])[:2]
    assert part.dropped == ["random and simclr in 2 settings", "random and simclr-sup in 2 settings", "simclr and simclr-sup in 2 settings"]
    said = "Registered once and planned no longer, each with p = 1 in its family: random and simclr in 2 settings;"
    assert said in text_of(part)
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["family"]  # nothing was new the second time


def registered_before(out: Path, plan: list[dict[str, Any]]) -> None:
    """The first driver's event, written while nothing stood."""
    held = [(path, path.rename(out.parent / path.name)) for path in (out / "cells", out / "plan.json")]
    register_family(Study.model_construct(out=str(out)), plan, Events(str(out)))  # type: ignore[call-arg]
    for path, away in held:
        away.rename(path)


@pytest.mark.parametrize("foreseen", [True, False])
def test_does_not_repeat_own_sources_as_withdrawn_or_late(tmp_path: Path, foreseen: bool) -> None:
    """That an encoder has seen a task's labels is known once it is made: until then its pairs are planned as any other."""
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.2}, tasks={"t1": "classification", "t2": "classification"}, seeds=3, images=60)
    for cell in finished(str(out)):
        own = cell.source == "simclr" and cell.task == "t1"
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"own_source": own}))
    plan = json.loads((out / "plan.json").read_text())
    known = [row | {"own_source": row["source"].endswith("simclr") and row["task"] == "t1"} for row in plan]
    (out / "plan.json").write_text(json.dumps(known))
    alone = gather(str(out), QUICK)
    registered_before(out, known if foreseen else [row | {"own_source": False, "key": ""} for row in plan])
    told = gather(str(out), QUICK)
    assert [(f.kind, f.task, f.late, f.family) for f in told.findings] == [(f.kind, f.task, False, f.family) for f in alone.findings]
    assert sorted(f.kind for f in told.findings) == ["gain", "own"]
    assert (told.family, told.dropped) == (1, [])
    assert "added after the results" not in tables.findings(told)


def test_does_not_repeat_comparisons_of_one_seed_in_a_family_that_others_are_corrected_for(tmp_path: Path) -> None:
    """What has one seed on a side can never be declared; when it gets more it was thought of before all the same."""
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.1, "moco": 0.2}, seeds=3, images=60)
    whole = json.loads((out / "plan.json").read_text())
    few = [row for row in whole if row["seed"] == 0 or not row["source"].endswith("moco")]
    registered_before(out, few)
    (out / "plan.json").write_text(json.dumps(few))
    told = gather(str(out), QUICK)
    assert {f.a: (f.late, f.family) for f in told.findings if f.comparison.basis == "seeds and patients"} == {"simclr": (False, 1)}
    assert (told.family, told.dropped) == (1, [])
    register_family(Study.model_construct(out=str(out)), whole, Events(str(out)))  # type: ignore[call-arg]
    (out / "plan.json").write_text(json.dumps(whole))
    assert {f.a: (f.late, f.family) for f in gather(str(out), QUICK).findings} == {"simclr": (False, 2), "moco": (False, 2)}
    (out / "plan.json").write_text(json.dumps(few))  # back to one seed, now that it has been looked at
    back = gather(str(out), QUICK)
    assert (back.family, back.dropped) == (2, ["moco and random in 1 setting"])


def test_does_not_repeat_comparisons_that_were_thought_of_after_the_results_as_planned(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "moco": 0.3, "simclr": 0.0}, seeds=3, images=60)
    (out / "plan.json").rename(tmp_path / "whole.json")
    cells, away = out / "cells", tmp_path / "cells"
    cells.rename(away)
    planned_again(out, {"random", "moco"})
    away.rename(cells)
    planned_again(out, {"random", "moco", "simclr"})
    evidence = gather(str(out), QUICK)
    held = {f.a: f for f in evidence.findings}
    assert {name: (f.late, f.family) for name, f in held.items()} == {"moco": (False, 1), "simclr": (True, 2)}
    assert held["moco"].adjusted == pytest.approx(held["moco"].comparison.p)  # a later one takes nothing from an earlier one
    assert "ADDED AFTER THE RESULTS" in held["simclr"].sentence(evidence)
    assert '<span class="tag bad">added after the results</span>' in tables.findings(evidence)
    planned_again(out, {"moco", "simclr"}, events=False)  # by hand, another baseline
    assert [(f.a, f.late) for f in gather(str(out), QUICK).findings] == [("simclr", True)]


def test_does_not_repeat_withdrawn_comparisons_of_weights_whose_architecture_was_not_known_yet(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.3}, seeds=2, images=60)
    plan = json.loads((out / "plan.json").read_text())
    unknown = [row | {"architecture": "", "key": ""} for row in plan]
    register_family(Study.model_construct(out=str(out)), unknown, Events(str(out)))  # type: ignore[call-arg]
    register_family(Study.model_construct(out=str(out)), plan, Events(str(out)))  # type: ignore[call-arg]
    assert len((out / "events.jsonl").read_text().splitlines()) == 1
    evidence = gather(str(out), QUICK)
    assert (evidence.family, evidence.dropped) == (1, [])
    (out / "plan.json").write_text(json.dumps(unknown))
    assert gather(str(out), QUICK).dropped == []


def test_does_not_repeat_sentences_that_do_not_say_of_what_they_are(tmp_path: Path) -> None:
    """Two drawn sources speak of methods, one checkpoint of its weights."""
    out = make(tmp_path, {"random": 0.0, "drawn": 2.0, "simclr": 1.0}, seeds=3, images=100)
    for cell in finished(str(out)):
        if cell.source != "simclr":
            Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"source_seed": cell.seed}))
    evidence = gather(str(out), QUICK)
    assert "drawn beats random on phantom-chest (methods): +" in evidence.answer()
    assert "simclr beats random on phantom-chest (these weights): +" in evidence.answer()
    assert reports._scope(evidence).startswith("Each sentence says whether it is about encoders (these weights) or methods.")


def test_does_not_repeat_a_scope_that_the_table_contradicts(tmp_path: Path) -> None:
    """Random weights under two names are drawn with every seed, and so speak of methods; the rest is of these weights."""
    out = make(tmp_path, {"random": 0.0, "random-b": 0.0, "simclr": 1.0}, seeds=3, images=100)
    for cell in finished(str(out)):
        if cell.source != "simclr":
            Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"source_seed": cell.seed}))
    evidence = gather(str(out), QUICK)
    assert {(f.kind, f.about) for f in evidence.findings} == {("control", "methods"), ("gain", "encoders (these weights)")}
    assert reports._scope(evidence).startswith("Each sentence but those of A/A controls is about encoders (these weights), not about")
    assert "no difference shown" in tables.findings(evidence)


def test_does_not_repeat_not_declared_beside_a_claim_that_holds(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 2.0}, seeds=4, images=150)
    evidence = claimed(out, claim())
    assert evidence.ledger[0].verdict == "holds"
    winners = tables.winners(evidence)
    assert '<a href="#claims">see claims</a>' in winners
    assert "not declared" not in winners
    assert "▲" not in tables.matrix(evidence)
    assert '<a href="#claims">claims</a>' in tables.matrix(evidence)


def test_does_not_repeat_certainty_over_the_baseline_as_certainty_of_the_lead(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.5, "simclr-sup": 1.5}, seeds=3, images=200)
    evidence = gather(str(out), QUICK)
    said = tables.winners(evidence)
    assert '<span class="tag good">declared over random</span>' in said
    order = sorted(
        ("random", "simclr", "simclr-sup"),
        key=lambda name: -results.mean_sd(c.value("auroc_mean", "val") for c in evidence.cells if c.source == name)[0],
    )
    a, b = ([held for c in evidence.cells if c.source == name and (held := scores(c))] for name in order[:2])
    assert f"{brief(compare(a, b, 'auroc_mean', bootstrap=QUICK))} over {order[1]}, full" in said


def test_does_not_repeat_a_lead_of_a_study_with_one_source(tmp_path: Path) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0}, seeds=1, images=60)), QUICK)
    assert tables.winners(evidence) == ""
    assert "Certainty is over the source named" not in reports.page(evidence)


def test_does_not_repeat_a_green_lead_of_what_is_under_its_floor(tmp_path: Path) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0, "simclr": 1.5}, seeds=3, images=200)), QUICK)
    evidence.floors = StudyFloors(evidence, {("phantom-chest", 1.0): [{"pixels": {"auroc_mean": 0.999}}]}, [])
    said = tables.winners(evidence)
    assert "under floor 0.999 (pixels)" in said
    assert "tag good" not in said
    assert evidence.answer().startswith("2 of 2 results are under a floor: ")


def test_does_not_repeat_architectures_and_sizes_as_a_deviation_over_seeds(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=4, fractions=(1.0, 0.1), images=60)
    plan = json.loads((out / "plan.json").read_text())
    for cell in finished(str(out)):
        changed = {"resolution": 96 if cell.seed % 2 else 48, "architecture": "resnet50" if cell.seed > 1 else "resnet18"}
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | changed))
        next(row for row in plan if row["key"] == cell.key).update(changed)
    (out / "plan.json").write_text(json.dumps(plan))
    evidence = gather(str(out), QUICK)
    drawn = sections._by_fraction(evidence, sections.colours(evidence))
    titles = [one[one.index("<title") :].partition(">")[2].partition("<")[0] for one in drawn]
    assert titles == [f"phantom-chest, full, resnet{of}, {px} px" for of in (18, 50) for px in (48, 96)]
    of = [c for c in evidence.cells if (c.source, c.fraction, c.architecture, c.resolution) == ("simclr", 0.1, "resnet18", 48)]
    assert f"simclr: {of[0].value('auroc_mean'):.3f} at 10 %, " in drawn[0]


def test_does_not_repeat_what_one_seed_could_detect(tmp_path: Path) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0, "simclr": 2.0}, seeds=1, images=100)), QUICK)
    (finding,) = evidence.findings
    assert np.isfinite(finding.comparison.detectable)
    assert f">{finding.comparison.detectable:.3f}</td>" not in tables.findings(evidence)
    assert significance(evidence)["detectable"].isna().all()
    assert "with one seed there is none" in reports.METHOD


def test_does_not_repeat_one_mark_where_two_comparisons_are_declared(tmp_path: Path) -> None:
    evidence = gather(str(make(tmp_path, {"random": 0.0, "simclr": 1.0, "simclr-sup": 3.0}, seeds=4, images=200)), QUICK)
    assert {f.b for f in evidence.findings if f.a == "simclr-sup" and f.declared} == {"random", "simclr"}
    said = tables.matrix(evidence)
    assert said.count("▲ above random") == 2
    assert said.count("▲ above simclr") == 1


def test_does_not_repeat_tables_of_sources_that_were_withdrawn(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, strategies=("full", "linear"), seeds=2, images=60)
    evidence = gather(str(out), QUICK)
    text_of(evidence)
    folder = out / "report"
    (folder / "compare-other.html").write_text("another report's")
    first = {path.name for path in folder.rglob("*.*")}
    assert {"truncated-phantom-chest-simclr-resnet18-48.md", "secondary.csv"} <= first
    plan = [row for row in json.loads((out / "plan.json").read_text()) if row["source"] == "random" and row["strategy"] == "full"]
    (out / "plan.json").write_text(json.dumps(plan))
    text_of(gather(str(out), QUICK))
    second = {path.name for path in folder.rglob("*.*")}
    assert not {name for name in second if "simclr" in name}
    assert "secondary.csv" not in second
    assert second < first
    assert "compare-other.html" in second
