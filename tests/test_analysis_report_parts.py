"""The parts of the report: subgroups, calibration, ranks, secondary tests, tables as in the papers, studies compared; bad input."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from made_study import claim, make, write_claims

from analysis import (
    analysis_sections,
    calibration,
    figures,
    metrics,
    papers,
    results,
    samples,
    secondary,
    sections,
    statistics_sections,
    subgroups,
    tables,
)
from analysis import report as reports
from analysis.comparing import changed, compare_studies, settings
from analysis.evidence import Evidence, gather
from analysis.findings import Finding, effect
from analysis.replicates import Bootstrap, Scores
from analysis.results import finished
from analysis.statistics import Comparison
from base.errors import WorkError
from base.seeds import rng

QUICK = Bootstrap(150)


def scored(seed: int, images: int, noise_of_b: float) -> tuple[Scores, dict[str, str]]:
    """Two labels; images of group b have scores that are right but for noise."""
    fixed, own = rng("subgroups", images), rng("subgroups", images, seed)
    target = (fixed.random((images, 2)) < 0.4).astype(float)
    group = np.where(np.arange(images) % 2 == 0, "a", "b")
    noise = np.where(group == "b", noise_of_b, 1.0)[:, None] * own.normal(size=target.shape)
    score = 1 / (1 + np.exp(-(1.5 * target + noise - 1)))
    ids = np.array([f"i{i}" for i in range(images)])
    patients = np.array([f"p{i // 2}" for i in range(images)], object)
    return Scores(seed, ids, patients, target, score), dict(zip(ids.tolist(), group.tolist(), strict=True))


def test_a_comparison_has_three_decimals_wherever_it_stands(tmp_path: Path) -> None:
    narrow = Comparison(-0.0417, -0.0428, -0.0406, 0.0001, 1.0, 0.001, "seeds and patients")
    assert effect(narrow, "Dice") == "-0.042 Dice [-0.043, -0.041]"
    assert effect(replace(narrow, low=-0.06, high=-0.024), "Dice") == "-0.042 Dice [-0.060, -0.024]"
    assert effect(replace(narrow, estimate=-0.0002, low=-0.0004, high=0.001), "Dice") == "0.000 Dice [0.000, 0.001]"  # nothing has no sign
    out = make(tmp_path, {"random": 0.0, "simclr": 0.1}, seeds=3, images=100)
    write_claims(out, [claim()])
    evidence = gather(str(out), QUICK)
    claimed, gain = evidence.findings
    c = gain.comparison
    assert c.estimate == claimed.comparison.estimate
    for said in (claimed.sentence(evidence).replace("+", ""), gain.sentence(evidence).replace("+", ""), tables.findings(evidence)):
        assert f"[{c.low:.3f}, {c.high:.3f}]" in said
        assert f"{c.estimate:.3f}" in said


FACTS = ("task", "simclr", "full", "sex", "auroc_mean", "corpus")


def test_a_group_that_is_served_worse_is_found_and_equal_ones_are_not() -> None:
    cells = [scored(seed, 400, 6.0) for seed in range(3)]
    found = subgroups.by_group(FACTS, [one for one, _ in cells], cells[0][1], Bootstrap(300))
    assert found.worst == "b"
    assert found.clear
    assert found.labels == 2
    equal = [scored(seed, 400, 1.0) for seed in range(3)]
    found = subgroups.by_group(FACTS, [one for one, _ in equal], equal[0][1], Bootstrap(300))
    assert not found.clear
    assert found.gap < 0.1


def test_small_groups_have_no_number_and_labels_that_a_group_lacks_count_for_none() -> None:
    one, groups = scored(0, 200, 1.0)
    few = {key: "c" if i < 10 else name for i, (key, name) in enumerate(groups.items())}
    found = subgroups.by_group(FACTS, [one], few, Bootstrap(100))
    values = {group.name: (group.patients, group.images, group.value) for group in found.groups}
    assert values["c"][:2] == (5, 10)
    assert np.isnan(values["c"][2])
    assert one.target_NL is not None
    one.target_NL[[groups[str(i)] == "a" for i in one.ids_N], 1] = 0
    assert subgroups.by_group(FACTS, [one], groups, Bootstrap(100)).labels == 1


def test_a_label_that_a_group_has_both_ways_in_no_stratum_counts_for_none_within_strata() -> None:
    """Its positives in one stratum and its negatives in the other: that group has no such AUROC, the others have."""
    one, groups = scored(0, 400, 1.0)
    in_a = np.array([groups[str(i)] == "a" for i in one.ids_N])
    assert one.target_NL is not None
    split = np.where(one.target_NL[:, 1] == 1, "s", "t")
    strata = np.where(in_a, split, np.where(np.arange(400) % 4 < 2, "s", "t")).astype(object)
    within = (*FACTS[:4], "auroc_within_mean", FACTS[5])
    held = replace(one, stratum_N=strata)
    found = subgroups.by_group(within, [held], groups, Bootstrap(100))
    assert found.labels == 1
    assert subgroups.by_group(FACTS, [held], groups, Bootstrap(100)).labels == 2
    first = {group.name: group.value for group in found.groups}
    alone = replace(held, target_NL=one.target_NL[:, :1], score_NL=one.score_NL[:, :1])  # type: ignore[index]
    assert first == {group.name: group.value for group in subgroups.by_group(within, [alone], groups, Bootstrap(100)).groups}


@pytest.mark.parametrize(("pretrainings", "seeds", "of_each"), [(3, 3, 2), (4, 2, 1), (5, 2, 1), (1, 8, 6), (8, 1, 1)])
def test_predictions_are_read_of_every_pretraining_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrainings: int, seeds: int, of_each: int
) -> None:
    (cell,) = gather(str(make(tmp_path, {"simclr": 0.0}, seeds=1, images=60)), QUICK).cells
    every = [replace(cell, result=cell.result | {"source_seed": p, "seed": s}) for s in range(seeds) for p in range(pretrainings)]
    monkeypatch.setattr(subgroups, "scores", lambda cell, _: cell)
    read: list[Any] = subgroups.some_scores(every)
    assert Counter(cell.source_seed for cell in read) == dict.fromkeys(range(min(pretrainings, subgroups.RUNS)), of_each)


def test_the_setting_of_subgroups_is_the_one_that_leads_without_own_sources(tmp_path: Path) -> None:
    out = make(
        tmp_path, {"random": 0.0, "simclr": 0.3}, strategies=("full", "linear"), seeds=2, images=80, own=[("simclr", "phantom-chest")]
    )
    for cell in gather(str(out), QUICK).cells:
        value = 0.99 if (cell.source, cell.strategy) == ("simclr", "full") else 0.8 if cell.strategy == "linear" else 0.6
        rows = [row | {"value": value} if row["split"] == "val" else row for row in cell.metrics]
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"metrics": rows}))
    (sides,) = subgroups.chosen(gather(str(out), QUICK)).values()
    assert {source: {cell.strategy for cell in cells} for source, cells in sides.items()} == {"random": {"linear"}, "simclr": {"linear"}}


def test_all_cells_name_what_tells_them_apart(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.3}, seeds=2, images=80)
    table = tables.cells(gather(str(out), QUICK))
    assert "architecture" not in table
    assert "pretraining seed" not in table
    for cell in gather(str(out), QUICK).cells:
        facts = {"source_seed": 3, "architecture": "vit"} if (cell.source, cell.seed) == ("simclr", 1) else {}
        Path(cell.url, "result.json").write_text(json.dumps(cell.result | facts))
    table = tables.cells(gather(str(out), QUICK))
    heads = re.findall(r"<button[^>]*>([^<]*)</button>", table)
    (row,) = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>") if "<td>vit</td>" in row)
    assert (row[heads.index("architecture")], row[heads.index("pretraining seed")], row[heads.index("encoder")]) == ("vit", "3", "simclr")


@pytest.mark.parametrize(("age", "name"), [(17, "under 18"), (18, "18-39"), ("59", "40-59"), (80, "80 and over"), (None, "not known")])
def test_ages_are_bands(age: object, name: str) -> None:
    assert subgroups.band(age) == name


def test_reliability_is_the_diagonal_for_honest_scores_and_the_error_is_that_of_the_metric() -> None:
    draw = rng("reliability")
    p = draw.random(200_000)
    right = (draw.random(len(p)) < p).astype(float)
    points = calibration.reliability(p, right)
    assert max(abs(x - y) for x, y, _ in points) < 0.02
    assert sum(count for *_, count in points) == len(p)
    assert metrics.ece(p, right) < 0.01
    assert sum(count / len(p) * abs(x - y) for x, y, count in points) == pytest.approx(metrics.ece(p, right))


def test_calibration_is_in_the_page_and_not_of_masks(tmp_path: Path) -> None:
    out = make(tmp_path / "labels", {"random": 0.0, "simclr": 0.7}, seeds=2, images=120)
    assert "ECE, mean over seeds" in calibration.section(gather(str(out), QUICK))
    out = make(tmp_path / "masks", {"random": 0.0, "simclr": 0.7}, tasks={"lungs": "segmentation"}, seeds=2, images=40)
    assert calibration.section(gather(str(out), QUICK)) == ""


def test_does_not_repeat_an_error_in_which_labels_cancel(tmp_path: Path) -> None:
    """The table pooled the labels, 0.0879 where the mean over labels, ece_mean of results.csv, was 0.1378."""
    out = make(tmp_path, {"random": 0.0}, seeds=1, images=200, pretrain=False)
    (cell,) = finished(str(out))
    table = pd.read_parquet(Path(cell.url, "predictions.parquet"))
    table["target_count"] = 1 - table["target_count"]  # two thirds are positive, of the others one third; all scores are a half
    table[[name for name in table.columns if str(name).startswith("score_")]] = 0.5
    table.to_parquet(Path(cell.url, "predictions.parquet"))
    labels, test = ("texture", "count", "arrangement"), table[table["split"] == "test"]
    each = [metrics.ece(test[f"score_{label}"], test[f"target_{label}"]) for label in labels]
    together = metrics.ece(*(np.concatenate([test[f"{what}_{label}"] for label in labels]) for what in ("score", "target")))
    row = {"split": "test", "class": "", "metric": "ece_mean", "unit": "fraction", "value": float(np.mean(each)), "n": 3}
    Path(cell.url, "result.json").write_text(json.dumps(cell.result | {"metrics": [*cell.metrics, row]}))
    said = calibration.section(gather(str(out), QUICK))
    assert together < 0.8 * np.mean(each)
    assert f"{np.mean(each):.4f}" in said
    assert f"{together:.4f}" not in said
    assert "then the mean over labels" in said


def test_ranks_take_every_setting_and_leave_out_own_sources(tmp_path: Path) -> None:
    tasks = {"chest": "classification", "lungs": "segmentation", "hearts": "segmentation"}
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7, "simclr-sup": 2.0}, tasks=tasks, seeds=2, images=60, own=[("simclr-sup", "chest")])
    evidence = gather(str(out), QUICK)
    frame = statistics_sections.settings_by_source(evidence)
    assert frame.shape == (3, 3)
    assert frame["simclr-sup"].isna().sum() == 1
    said = statistics_sections.ranked(evidence)
    assert "2 settings that every source has, 1 left out" in said
    assert "critical difference" in said


def test_a_twin_has_no_rank_of_its_own(tmp_path: Path) -> None:
    tasks = dict.fromkeys(("chest", "hands", "hearts"), "classification")
    out = make(tmp_path, {"random": 0.0, "random-b": 0.0, "simclr": 0.7, "simclr-sup": 2.0}, tasks=tasks, seeds=2, images=60)
    evidence = gather(str(out), QUICK)
    assert list(statistics_sections.settings_by_source(evidence)) == ["random", "simclr", "simclr-sup"]
    said = statistics_sections.ranked(evidence)
    assert "random-b has no rank of its own" in said
    assert re.search(r"Friedman \d\.\d\d, p 0\.\d{4}, exact over all orders", said)


def test_secondary_tests_are_printed_with_their_refusals_and_declare_nothing(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=3, images=100)
    said = statistics_sections.secondary_tests(gather(str(out), QUICK))
    assert "Wilcoxon" in said
    assert "refused" in said  # three seeds cannot reach a Wilcoxon p under 0.05
    assert "declared</span>" not in said
    frame = pd.read_csv(out / "report" / "secondary.csv")
    assert frame["p_delong"].astype(float).between(0, 1).all()
    assert frame["p_wilcoxon"].str.startswith("refused").all()


def test_what_wins_where_says_certainty_and_cost(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.5}, seeds=3, images=300)
    evidence = gather(str(out), QUICK)
    said = tables.winners(evidence)
    assert "<b>simclr</b>" in said
    assert "against random" in said
    assert '<span class="tag good">declared over random</span>' in said
    assert "11.2 M" in said
    assert "▲ above random" in tables.matrix(evidence)


def test_a_share_and_a_size_of_each_task_by_itself_stand_in_its_head_and_split_no_row(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, tasks={"one": "classification", "two": "classification"}, seeds=2, images=60)
    few = [cell for cell in finished(str(out)) if cell.task == "two"]
    for cell in few:
        (Path(cell.url) / "result.json").write_text(json.dumps({**cell.result, "fraction": 0.1, "resolution": 64}))
    said = tables.matrix(gather(str(out), QUICK))
    assert "one, 100 % of the labels, 48 px: AUROC" in said
    assert "two, 10 % of the labels, 64 px: AUROC" in said
    assert said.count("<tr>") - said[said.find("<tfoot") :].count("<tr>") * ("<tfoot" in said) == 3  # the heads, and a row a source
    (Path(few[0].url) / "result.json").write_text(json.dumps({**few[0].result, "fraction": 1.0, "resolution": 64}))
    assert "two, 64 px: AUROC" in tables.matrix(gather(str(out), QUICK))


# -- figures


def axis_of(drawn: str) -> list[str]:
    """All texts of a figure."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn)


def test_a_comparison_is_drawn_once_and_controls_are_squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim stands for the gain, and for the A/A control turned round, that it is about."""
    out = make(tmp_path, {"random": 0.0, "random-b": 0.0, "simclr": 0.7}, seeds=3, images=80)
    sides = {"a": {"source": "random-b"}, "b": {"source": "random"}}
    write_claims(out, [claim(), claim(name="twins", sentence="They are one.", comparison=sides, expect="equivalent")])
    drawn: list[list[tuple[str, Any, bool]]] = []

    def forest(name: str, rows: list[tuple[str, Any, bool]], unit: str) -> str:
        drawn.append(rows)
        return ""

    monkeypatch.setattr(figures, "forest", forest)
    sections.forests(gather(str(out), QUICK))
    ((gain, twins),) = drawn
    assert (gain[0], gain[1].kind, gain[2]) == ("simclr − random, phantom-chest, full, resnet18", "claim", False)
    assert (twins[0], twins[1].kind, twins[2]) == ("random-b − random, phantom-chest, full, resnet18", "claim", True)


def test_what_cannot_be_compared_has_no_figure(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=2, images=40)
    for cell in finished(str(out)):
        (Path(cell.url) / "predictions.parquet").unlink()
    assert sections.forests(gather(str(out), QUICK)).count("<svg") == 0


def test_titles_of_axes_and_figures_are_whole(tmp_path: Path) -> None:
    """In lines that the figure has room for, an axis' title under all of it and not under its axes alone."""
    narrow = Comparison(0.1, 0.05, 0.15, 0.0001, 1.0, 0.001, "seeds and patients")
    held = Finding("gain", "a", "b", "resnet18", "full", "", "t", "t", 1.0, 48, "auroc_mean", narrow)
    unit = "share of the common level (0.671 AUROC within source on validation) reached so far, mean over the run"
    texts = axis_of(figures.forest("f", [("a − b, " + "a setting of many words " * 4 + "2.5 % of the labels", held, False)], unit))
    assert max(map(len, texts)) <= 79
    assert any("2.5\u00a0% of" in text for text in texts)
    assert "with 95\u00a0% interval" in " ".join(texts)
    title = "phantom-chest, truncated cut=layer3 factor=2, 10 %, 48 px, test_resnet"
    texts = axis_of(figures.learning("l", title, {"random": (0, [[0.5, 0.6]])}, "validation AUROC"))
    assert title not in [text.replace("\u00a0", " ") for text in texts]
    assert title in " ".join(texts).replace("\u00a0", " ")


def test_learning_curves_say_what_they_are(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=3, images=40, fractions=(0.1, 1.0))
    for cell in finished(str(out)):
        (Path(cell.url) / "result.json").write_text(json.dumps({**cell.result, "options": {"cut": "layer3", "after": None}}))
        rows = (Path(cell.url) / "metrics.jsonl").read_text().splitlines(keepends=True)
        (Path(cell.url) / "metrics.jsonl").write_text(rows[0])
    said = sections.curves(gather(str(out), QUICK))
    assert "Lines are means over n runs for as long as all of them train, bands their range, thin lines runs that trained on." in said
    assert "bars are one standard deviation over seeds" in said
    texts = axis_of(said)
    assert "random, n 3" in texts
    assert "phantom-chest, full cut=layer3, 10\u00a0%" in texts
    assert "{" not in "".join(texts)
    epochs = re.findall(r'id="learn\d+-xtick_\d+"', said)
    assert len(epochs) == texts.count("1") == 2  # of one epoch the axis shows that alone


# -- tables as in the papers


def paper(tmp_path: Path, **changes: Any) -> dict[str, papers.Layout]:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0, "simclr-sup": 2.0}, seeds=3, images=150, **changes)
    return {one.name: one for one in papers.layouts(gather(str(out), QUICK))}


def test_tables_have_the_layout_of_each_paper(tmp_path: Path) -> None:
    made = paper(
        tmp_path, strategies=("full", "linear"), tasks={"chest": "classification", "lungs": "segmentation"}, own=[("simclr-sup", "chest")]
    )
    assert made["transfusion-1-chest-48"].heads == ["model", "random", "simclr", "simclr-sup"]
    assert re.fullmatch(r"\d\d\.\d\d ±\d\.\d\d", made["transfusion-1-chest-48"].rows[0][1])
    assert made["transfusion-2-chest-48"].heads[1:] == ["texture", "count", "arrangement"]
    rows = made["truncated-chest-simclr-resnet18-48"].rows
    assert [row[0] for row in rows] == ["FTL", "linear"]
    assert rows[0][3:] == ["11.17", "0.085", "–"]
    benchmark = made["benchmark-resnet18-full"]
    assert benchmark.heads[0] == "pretraining"
    assert len(benchmark.heads) == 3
    sup = next(row for row in benchmark.rows if row[0] == "simclr-sup")
    assert [text.endswith(" †") for text in sup[1:]] == [True, False]  # on its own source no evidence
    assert "; † pretrained on these labels" in benchmark.caption
    assert any(re.search(r"\*|n\.s\.", text) for text in sup[1:])
    assert "*" not in benchmark.rows[0][1]  # the source that the others are held against


def test_markdown_and_latex_are_whole_and_escaped() -> None:
    held = papers.Layout("t", "50 % & more_", ["a|b", "c"], [["x_1", "97.1 ±0.2 **"], ["y", "–"]], {(0, 1)})
    text = held.markdown().splitlines()
    assert text[2:] == ["| a\\|b | c |", "|---|---|", "| x\\_1 | **97.1 ±0.2 \\*\\*** |".replace("\\_", "_"), "| y | – |"]
    tex = held.latex()
    assert r"\caption{50 \% \& more\_}" in tex
    assert r"x\_1 & \textbf{97.1 $\pm$0.2 **} \\" in tex
    assert tex.count(r"\begin{") == tex.count(r"\end{") == 2


def test_stars_are_those_of_a_two_sample_t_test(tmp_path: Path) -> None:
    from scipy import stats

    out = make(tmp_path, {"random": 0.0, "simclr": 0.05}, seeds=4, images=100)
    held = results.by(finished(str(out)), "source")
    a, b = held["simclr",], held["random",]
    p = stats.ttest_ind(*([cell.value("auroc_mean") for cell in side] for side in (a, b))).pvalue
    over = partial(tables.over_seeds, metric="auroc_mean")
    assert papers._starred(over(a), over(b)) == secondary.stars(p)
    assert papers._starred(over(a[:1]), over(b)) == ""


def with_test_means(out: Path, values: dict[str, list[float]], metric: str = "auroc_mean") -> Evidence:
    """Each source's runs by their seed have these values on test images, and on validation images of its place in the list."""
    for cell in finished(str(out)):
        value = values[cell.source][cell.seed]
        rows = [row | ({"value": value} if (row["metric"], row["split"]) == (metric, "test") else {}) for row in cell.metrics]
        (Path(cell.url) / "result.json").write_text(json.dumps({**cell.result, "metrics": rows}))
    return gather(str(out), QUICK)


@pytest.mark.parametrize(
    ("values", "bold"),
    [
        ({"random": [0.70, 0.72, 0.71], "simclr": [0.80, 0.82, 0.81]}, {(1, 1)}),
        ({"random": [0.70, 0.80, 0.75], "simclr": [0.72, 0.83, 0.76]}, set()),  # n.s.
        ({"random": [0.70], "simclr": [0.90]}, set()),  # one seed
    ],
)
def test_bold_is_what_a_test_tells_from_the_next(tmp_path: Path, values: dict[str, list[float]], bold: set[tuple[int, int]]) -> None:
    out = make(tmp_path, dict.fromkeys(values, 0.0), seeds=len(values["random"]), images=40)
    made = {one.name: one for one in papers.layouts(with_test_means(out, values))}["benchmark-resnet18-full"]
    assert made.best == bold
    assert ("bold: the highest mean of its column, p < 0.05 against the next highest" in made.caption) == bool(bold)


def test_nested_seeds_are_counted_by_pretrainings(tmp_path: Path) -> None:
    """Three pretrainings by three seeds are no nine runs: the deviation is that of the three means."""
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=9, images=40)
    values = [0.70, 0.72, 0.74, 0.80, 0.82, 0.84, 0.87, 0.89, 0.91]
    evidence = with_test_means(out, {"random": values, "simclr": values})
    for cell in finished(str(out)):
        if cell.source == "simclr":
            source_seed, seed = divmod(cell.seed, 3)
            (Path(cell.url) / "result.json").write_text(json.dumps({**cell.result, "source_seed": source_seed, "seed": seed}))
    evidence = gather(str(out), QUICK)
    drawn, sd = np.std(values, ddof=1), np.std([0.72, 0.82, 0.89], ddof=1)
    found = tables.over_seeds([cell for cell in evidence.cells if cell.source == "simclr"], "auroc_mean")
    assert (found.mean, found.sd, found.n) == (pytest.approx(np.mean(values)), pytest.approx(sd), "3 × 3")
    made = {one.name: one for one in papers.layouts(evidence)}["benchmark-resnet18-full"]
    assert [row[1].split(" ")[1] for row in made.rows] == [f"±{100 * drawn:.2f}", f"±{100 * sd:.2f}"]
    assert "n = 9 (random), 3 × 3 (simclr), where n is a × b of a pretrainings' means, each over b fine-tuning seeds" in made.caption
    said = tables.matrix(evidence)
    assert f'± {sd:.3f}</span> <span class="n">n 3 × 3' in said
    assert "the deviation is of the pretrainings' means" in said


def test_plain_numbers_of_a_confounded_task_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.5}, seeds=2, images=150, strata=3)
    evidence = gather(str(out), QUICK)
    monkeypatch.setattr(type(evidence.floors), "confounded", lambda *_: 0.756)
    made = {one.name: one for one in papers.layouts(evidence)}
    said = "plain AUROC of phantom-chest is confounded: source alone reaches a mean AUROC of 0.756"
    assert said in made["transfusion-2-phantom-chest-48"].caption
    assert "confounded" not in made["transfusion-1-phantom-chest-48"].caption
    assert "confounded" not in made["benchmark-resnet18-full"].caption


def test_stars_of_a_comparison_are_the_same_in_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a floor, either side of it: the baseline is side b of a gain and side a of an A/A control."""
    values = {"random": [0.70, 0.72, 0.71], "random-b": [0.74, 0.77, 0.75], "simclr": [0.80, 0.82, 0.81]}
    evidence = with_test_means(make(tmp_path, dict.fromkeys(values, 0.0), images=40), values)
    monkeypatch.setattr(type(evidence), "under_floor", lambda _, cells: cells[0].source == "random")
    made = {one.name: one for one in papers.layouts(evidence)}["benchmark-resnet18-full"]
    assert not any("*" in text or "n.s." in text for row in made.rows for text in row)
    statistics_sections.secondary_tests(evidence)
    assert "stars" not in pd.read_csv(tmp_path / "report" / "secondary.csv")


def test_one_rule_says_who_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AUROC within strata, on the page and for its pictures; a champion of plain AUROC is another's choice."""
    shown = {"phantom-chest": {"share_images": True}}
    sources = {"random": 0.0, "simclr": 0.5, "simclr-sup": 3.0}
    out = make(tmp_path, sources, seeds=2, images=80, strata=3, own=[("simclr-sup", "phantom-chest")], manifests=shown)
    for cell in finished(str(out)):
        better = {"auroc_within_mean": "random", "auroc_mean": "simclr"}
        rows = [row | {"value": 0.9 if cell.source == better.get(row["metric"]) else 0.6} for row in cell.metrics]
        rows = [row | {"value": 0.95} if cell.source == "simclr-sup" else row for row in rows]
        (Path(cell.url) / "result.json").write_text(json.dumps({**cell.result, "metrics": rows}))
    evidence = gather(str(out), QUICK)
    lead = reports.best_on_validation(evidence)
    assert "Best on validation (phantom-chest, AUROC within source): <b>random</b>" in lead
    assert lead.endswith("The champion in MLflow is chosen by AUROC.")
    assert "<b>random</b>" in tables.winners(evidence)
    taken: list[str] = []

    def labels(_: Evidence, cells: list[results.Cell]) -> str:
        taken.extend(cell.source for cell in cells)
        return ""

    monkeypatch.setattr(samples, "_labels", labels)
    samples.gallery(evidence, "phantom-chest")
    assert set(taken) == {"random", "simclr"}
    assert samples._best(evidence, evidence.cells).source == "random"


def test_the_tables_are_written(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 1.0}, seeds=2, images=80)
    reports.report(str(out), gather(str(out), QUICK))
    names = {path.name for path in (out / "report" / "tables").iterdir()}
    assert {"transfusion-1-phantom-chest-48.md", "transfusion-1-phantom-chest-48.tex", "benchmark-resnet18-full.tex"} <= names
    figures = list((out / "report" / "figures").glob("*.svg"))
    assert len(figures) >= 3
    for figure in figures:
        text = figure.read_text()
        assert "var(--ink)" not in text
        assert "<desc" in text


# -- analyses


def test_numbers_printed_with_commas_are_sorted_by_what_they_are(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0}, seeds=1, images=60)
    rows = [["t", "23,508,032", "4.1 G"], ["t", "464,154", "0.02 G"]]
    listed = {"file": "efficiency.csv", "title": "cost", "heads": ["task", "parameters", "MACs"], "rows": rows}
    told = {"kind": "efficiency", "key": "0", "made": "now", "revision": "0", "cells": 1, "tables": [listed]}
    (out / "analyses" / "efficiency-0").mkdir(parents=True)
    (out / "analyses" / "efficiency-0" / "analysis.json").write_text(json.dumps(told))
    ((_, _, said),) = analysis_sections.sections(gather(str(out), QUICK))
    assert '<td data-v="23508032">23,508,032</td><td>4.1 G</td>' in said
    assert '<td data-v="464154">464,154</td>' in said


# -- two studies


def test_settings_of_two_studies_are_named_by_their_keys() -> None:
    tree = {"cells": {"seeds": [0, 1], "sources": [{"name": "a", "source": "random"}, {"name": "b", "source": "x"}]}, "study": "s"}
    assert settings({**tree, "analyses": [], "data": {"raw": None}}) == {
        "cells": {"seeds": [0, 1], "sources": {"a": {"source": "random"}, "b": {"source": "x"}}},
        "study": "s",
    }


def test_does_not_repeat_defaults_and_nulls_of_what_one_study_has_alone(tmp_path: Path) -> None:
    outs = [make(tmp_path / name, {"random": 0.0}, seeds=1, images=40) for name in ("one", "two")]
    write_claims(outs[0], [claim(), claim(name="hurts", sentence="It hurts.", expect="less")])
    tree = yaml.safe_load((outs[0] / "study.yaml").read_text()) | {"data": {"chest": {"raw": "phantom:9", "shards": None}}}
    tree["cells"]["tune"], tree["pretrain"] = None, [{"name": "sup", "recipe": "supervised", "replay": None, "settings": {}}]
    (outs[0] / "study.yaml").write_text(yaml.safe_dump(tree))
    rows = changed(*(gather(str(out), QUICK) for out in outs))
    assert sorted(key for key, _, _ in rows) == ["claims.hurts", "claims.pretraining-helps", "data.chest", "pretrain.sup"]
    assert {two for *_, two in rows} == {"–"}
    told = {key: one for key, one, _ in rows}
    assert told["data.chest"] == '{"raw": "phantom:9"}'
    assert told["pretrain.sup"] == '{"recipe": "supervised"}'
    assert json.loads(told["claims.hurts"])["comparison"] == {"a": {"source": "simclr"}, "b": {"source": "random"}}
    assert "null" not in "".join(told.values())
    two = yaml.safe_load((outs[1] / "study.yaml").read_text()) | {"data": {"chest": {"raw": "phantom:8"}}}
    (outs[1] / "study.yaml").write_text(yaml.safe_dump(two))
    assert ("data.chest.raw", '"phantom:9"', '"phantom:8"') in changed(*(gather(str(out), QUICK) for out in outs))


def test_two_studies_are_compared_where_they_meet(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {"random": 0.0, "simclr": 0.2}, seeds=3, images=200)
    two = make(tmp_path / "two", {"random": 0.0, "simclr": 2.0, "simclr-sup": 1.0}, seeds=3, images=200)
    plan = json.loads((two / "plan.json").read_text())
    for row in plan:  # other settings, other keys: of the made cells only the source decides them
        if row["source"] == "pretrain:simclr":
            folder, row["key"] = two / "cells" / row["key"], f"f{row['key'][1:]}"
            file = folder.rename(folder.with_name(row["key"])) / "result.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"key": row["key"]}))
    (two / "plan.json").write_text(json.dumps(plan))
    keys = [key for key, _, _ in changed(gather(str(one), QUICK), gather(str(two), QUICK))]
    assert "cells.sources" in keys
    page = Path(compare_studies(str(one), str(two), QUICK)).read_text()
    assert "2 settings stand in both studies" in page
    assert "of the others 1 have an interval over seeds and patients above 0 for made (two) and 0 below. Nothing" in page
    assert "<td>seeds and patients</td><td>encoders (these weights)</td>" in page
    assert "Nothing is declared" in page
    assert "the same cells" in page  # random was drawn alike: the keys are the same
    assert "simclr-sup" in page[page.index("Results that one has alone") :]
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("seeds", "changes", "basis", "tag", "said"),
    [
        (1, {}, "patients only", "", "1 of one seed (patients only)"),
        (3, {"own_source": True}, "seeds and patients", "own source", "1 of an own or exposed source"),
        (3, {"exposed_to": ["nih-cxr14"]}, "seeds and patients", "exposed", "1 of an own or exposed source"),
    ],
)
def test_two_studies_count_nothing_that_declares_nothing(
    tmp_path: Path, seeds: int, changes: dict[str, Any], basis: str, tag: str, said: str
) -> None:
    one = make(tmp_path / "one", {"simclr": 0.0}, seeds=seeds, images=200)
    two = make(tmp_path / "two", {"random": 1.0, "simclr": 2.0}, seeds=seeds, images=200)
    for folder in (two / "cells").iterdir():
        held = json.loads((folder / "result.json").read_text())
        key = f"f{held['key'][1:]}"
        (folder / "result.json").write_text(json.dumps({**held, **changes, "key": key}))
        folder.rename(folder.with_name(key))
    (two / "plan.json").unlink()
    page = Path(compare_studies(str(one), str(two), QUICK)).read_text()
    assert f"0 have an interval over seeds and patients above 0 for made (two) and 0 below; not counted: {said}." in page
    row = page[page.index('<section id="results">') : page.index('<section id="statements">')]
    assert f"<td>{basis}</td>" in row
    assert (f'<span class="tag own">{tag}</span>' in row) is bool(tag)


def test_two_studies_that_declare_nothing_are_not_said_to_agree(tmp_path: Path) -> None:
    outs = [make(tmp_path / name, {"random": 0.0, "simclr": lift}, seeds=1) for name, lift in (("one", 0.0), ("two", 2.0))]
    page = Path(compare_studies(str(outs[0]), str(outs[1]), QUICK)).read_text()
    assert "Both say the same" not in page
    assert "No verdict differs. What neither declares may differ all the same" in page


# -- bad input


def test_equal_scores_one_task_and_metrics_without_a_number_give_a_truthful_page(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.0}, seeds=2, images=60)
    for cell in finished(str(out)):
        frame = pd.read_parquet(Path(cell.url, "predictions.parquet"))
        for name in [name for name in frame if str(name).startswith("score_")]:
            frame[name] = 0.5
        frame.to_parquet(Path(cell.url, "predictions.parquet"))
        metrics = [{**row, "value": 0.5} for row in cell.metrics]
        Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": metrics}))
    page = reports.page(gather(str(out), QUICK))
    assert "beats" not in page
    assert "▲ above" not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()
    for cell in finished(str(out)):
        metrics = [{**row, "value": None if row["split"] == "test" else row["value"]} for row in cell.metrics]
        Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": metrics}))
    assert "no number" in reports.page(gather(str(out), QUICK))


def test_a_running_study_says_what_is_not_there_yet(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=3, images=80)
    study = (out / "study.yaml").read_text() + "analyses: [convergence]\n"
    (out / "study.yaml").write_text(study)
    folder = sorted((out / "cells").iterdir())[0]
    (folder / "result.json").unlink()
    page = reports.page(gather(str(out), QUICK))
    assert "1 of 6 cells have no result" in page
    assert "Running or incomplete" in page
    assert "Asked for, and not computed yet" in page
    assert analysis_sections.sections(gather(str(out), QUICK))[0][0] == "convergence"
    (out / "analyses" / "convergence-0000").mkdir(parents=True)
    (out / "analyses" / "convergence-0000" / "analysis.json").write_text('{"schema": 1, "kind": "conv')  # being written
    assert "not computed yet" in reports.page(gather(str(out), QUICK))


# -- a second report


def test_comparisons_shared_out_over_processes_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"chest": "classification", "lungs": "segmentation"}
    out = make(tmp_path, {"random": 0.0, "simclr": 0.4, "random-b": 0.0}, tasks=tasks, seeds=3, images=60)
    alone = gather(str(out), QUICK)
    monkeypatch.setattr("analysis.comparisons.FEW", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    together = gather(str(out), QUICK)
    assert len(together.comparisons._coming) == 4
    assert repr(together.findings) == repr(alone.findings)
    assert together.comparisons.computed == alone.comparisons.computed == 4
    pool = together.comparisons._pool
    assert pool is not None
    assert len(pool._processes) == 2
    together.comparisons.end()
    shutil.rmtree(out / "cells")
    with gather(str(out), QUICK) as empty:  # planned, none finished: nothing to compare, nobody starts
        assert empty.comparisons._pool is None


def test_does_not_repeat_a_report_that_goes_on_computing_when_it_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.4}, seeds=3, images=60)
    monkeypatch.setattr("analysis.comparisons.FEW", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    evidence = gather(str(out), QUICK)
    pool = evidence.comparisons._pool
    assert pool is not None
    monkeypatch.setattr(reports, "page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reports.report(str(out), evidence)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(print)
    ended = gather(str(out), QUICK)
    killed = ended.comparisons._pool
    assert killed is not None
    for process in list(killed._processes.values()):
        process.kill()
    with pytest.raises(WorkError, match=r"ended from outside.*same command again"):
        ended.answer()


def computed(evidence: Evidence) -> int:
    """How many comparisons its findings took."""
    assert evidence.findings
    return evidence.comparisons.computed


def test_comparisons_are_kept_until_their_cells_or_numbers_change(tmp_path: Path) -> None:
    out = make(tmp_path, {"random": 0.0, "simclr": 0.7}, seeds=2, images=80)
    first = gather(str(out), QUICK)
    assert computed(first) == 1
    assert computed(gather(str(out), QUICK)) == 1  # nothing is written but by a report
    reports.report(str(out), first)
    again = gather(str(out), QUICK)
    assert computed(again) == 0
    assert again.answer() == first.answer()
    assert repr(again.findings[0].comparison) == repr(first.findings[0].comparison)
    assert computed(gather(str(out), Bootstrap(100))) == 1  # other draws
    cell = finished(str(out))[0]
    metrics = [{**row, "value": 0.9 if row["metric"] == "auroc_mean" else row["value"]} for row in cell.metrics]
    Path(cell.url, "result.json").write_text(json.dumps({**cell.result, "metrics": metrics}))
    assert computed(gather(str(out), QUICK)) == 1
