"""Claims: what may be one, which cells it asks for, what the ledger says of it, and that a claim made after its results says so."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_study import CLAIM, claim, make, write_claims
from scipy import stats

from analysis import convergence, statistics_sections, study_floors, tables
from analysis.claims import Claim, load_claim
from analysis.components import Parts
from analysis.evidence import Evidence, gather
from analysis.findings import significance
from analysis.ledger import LEAST_EVALUATIONS, Entry, of_curves
from analysis.replicates import Bootstrap
from analysis.results import finished
from analysis.statistics import Comparison, holm
from base.config import load
from base.errors import RequestError
from base.paths import ROOT, names
from base.storage import put
from cluster.claims import Asked, axes_of_matrix, register_claims, row, show
from cluster.events import Events
from cluster.load import load_study
from cluster.study import Study
from finetune.task import load_task


def with_claims(out: Path, *claims: Claim, registered: bool = True) -> Evidence:
    """A made study whose file holds claims, written into its diary before its results or not at all."""
    write_claims(out, claims, () if registered else None)
    return gather(str(out), Bootstrap(300))


# -- what may be a claim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparison": {"a": {"source": "simclr"}, "b": {"strategy": "full"}}}, "the same axes"),
        ({"comparison": {"a": {"source": "random"}, "b": {"source": "random"}}}, "the same"),
        ({"comparison": {"a": {"task": "dxc14"}, "b": {"task": "lxs"}}}, "two tasks are not compared"),
        ({"where": {"source": "simclr"}}, "where names what is compared: source"),
        ({"sentence": "SimCLR is the better method."}, "does not speak of methods"),
        ({"margin": 0}, "margin"),
        ({"expect": "more"}, "expect"),
        ({"wher": {}}, "did you mean 'where'"),
    ],
)
def test_what_is_no_claim_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        claim(**changes)


def test_another_sentence_is_another_claim_and_another_name_is_not() -> None:
    assert claim().sha256 == claim(name="renamed", paper="elsewhere").sha256
    for changes in ({"margin": 0.01}, {"sentence": "It hurts."}, {"about": "methods"}, {"expect": "less"}, {"where": {"fraction": 0.1}}):
        assert claim(**changes).sha256 != claim().sha256


def test_a_strategy_matches_by_the_options_that_are_named() -> None:
    one = claim(comparison={"a": {"strategy": {"name": "truncated", "cut": "layer3"}}, "b": {"strategy": "full"}})
    assert one.side({"strategy": {"name": "truncated", "cut": "layer3", "head": "pooled"}}) == "a"
    assert one.side({"strategy": {"name": "truncated", "cut": "layer4", "head": "pooled"}}) is None
    assert one.side({"strategy": {"name": "full"}}) == "b"
    assert one.comparison.a.words() == "truncated cut=layer3"


# -- verdicts


def entry(expect: str, estimate: float, se: float, df: float = 20, margin: float = 0.02, family: int = 1, of_seeds: float = 0.5) -> Entry:
    half = stats.t.ppf(0.975, df) * se
    p = 2 * stats.t.sf(abs(estimate) / se, df)
    numbers = (float(estimate), float(estimate - half), float(estimate + half), float(se), float(df), float(p))
    parts: dict[str, Any] = {"seed_variance": of_seeds * se**2, "patient_variance": (1 - of_seeds) * se**2}
    held = Comparison(*numbers, "seeds and patients", units=5, patients=200, **parts)
    made = Entry(claim(expect=expect, margin=margin), {"task": "t"}, "auroc_mean", "d", held, 1)
    return Entry(**{**vars(made), "adjusted": holm([made.p, *[1.0] * (family - 1)])[0], "family": family})


def needs(expect: str, estimate: float, se: float, of_seeds: float) -> str:
    """What a claim would take of which the variance over five seeds is known as such."""
    made = entry(expect, estimate, se, of_seeds=of_seeds)
    return replace(made, comparison=replace(made.comparison, seeds_df=4.0)).needs()


@pytest.mark.parametrize(
    ("expect", "estimate", "se", "verdict"),
    [
        ("greater", 0.05, 0.01, "holds"),
        ("greater", -0.05, 0.01, "fails"),
        ("greater", 0.00, 0.005, "fails"),  # 0.02 is ruled out
        ("greater", 0.015, 0.001, "fails"),  # there, but less than the claim needs
        ("greater", 0.01, 0.02, "underpowered"),  # 0 and 0.02 are both inside
        ("less", -0.05, 0.01, "holds"),
        ("less", 0.05, 0.01, "fails"),
        ("less", -0.01, 0.02, "underpowered"),
        ("equivalent", 0.001, 0.005, "holds"),
        ("equivalent", 0.015, 0.001, "holds"),  # a difference, and a small one
        ("equivalent", 0.05, 0.01, "fails"),
        ("equivalent", -0.05, 0.01, "fails"),
        ("equivalent", 0.0, 0.02, "underpowered"),
        ("equivalent", 0.019, 0.005, "underpowered"),
    ],
)
def test_verdicts(expect: str, estimate: float, se: float, verdict: str) -> None:
    assert entry(expect, estimate, se).verdict == verdict


@pytest.mark.parametrize(("expect", "sign"), [("greater", 1), ("less", -1)])
def test_a_claim_that_holds_under_its_margin_says_that_it_is_of_its_direction(expect: str, sign: int) -> None:
    under, over = (entry(expect, sign * estimate, 0.005) for estimate in (0.025, 0.05))
    assert (under.verdict, over.verdict) == ("holds", "holds")
    assert (under.direction_only, over.direction_only) == (True, False)
    assert under.why.endswith(f"; of its direction: a difference of {sign * 0.02:+g} is not shown")
    assert "holds in direction for these encoders" in under.sentence()
    assert "direction" not in over.sentence()
    assert not entry("equivalent", 0.001, 0.005).direction_only


@given(st.sampled_from(["greater", "less", "equivalent"]), st.floats(-0.2, 0.2), st.floats(1e-4, 0.2), st.integers(1, 40))
def test_more_claims_never_turn_one_into_holding_and_never_change_a_failure(expect: str, estimate: float, se: float, family: int) -> None:
    alone, among = entry(expect, estimate, se), entry(expect, estimate, se, family=family)
    assert among.adjusted >= alone.adjusted
    assert (alone.verdict == "fails") == (among.verdict == "fails")
    assert not (among.verdict == "holds" and alone.verdict != "holds")


def test_equivalence_is_two_one_sided_tests() -> None:
    """Against the two t tests as textbooks give them, of d = 0.004 with standard error 0.006 and margins of 0.02."""
    found = entry("equivalent", 0.004, 0.006)
    upper, lower = stats.t.cdf((0.004 - 0.02) / 0.006, 20), stats.t.sf((0.004 + 0.02) / 0.006, 20)
    assert found.p == pytest.approx(max(upper, lower))
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.95, 20) * 0.006)
    assert (found.p < 0.05) == (low > -0.02 and high < 0.02)
    assert "(90 %)" in found.effect()


@pytest.mark.parametrize(("expect", "true"), [("greater", 0.0), ("equivalent", 0.02)])
def test_a_claim_that_is_not_so_holds_in_few_studies(expect: str, true: float) -> None:
    """Simulated estimates at the border of what the claim says: at most 5 % of them hold."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        x = draw.normal(true, 0.02, 8)
        held += entry(expect, float(x.mean()), float(x.std(ddof=1) / math.sqrt(8)), df=7).verdict == "holds"
    assert held <= stats.binom.ppf(0.999, 400, 0.05)


def test_what_a_claim_would_take_is_enough() -> None:
    """With as many seeds as are asked for, and the variance between seeds as it was, the claim is settled in most repetitions."""
    short = entry("greater", 0.01, 0.012, of_seeds=0.9)
    words = needs("greater", 0.01, 0.012, of_seeds=0.9)
    assert words.endswith(" fine-tuning seeds")
    seeds = int(words.split()[0])
    assert seeds > 5
    of_seed, of_patients = short.comparison.seed_variance * 5, short.comparison.patient_variance
    drawn = np.random.default_rng(0)
    found = of_seed / seeds * drawn.chisquare(seeds - 1, 2_000) / (seeds - 1)
    parts = [Parts(float(seed_part), seeds - 1, of_patients, short.comparison.patients - 1) for seed_part in found]
    away = drawn.normal(0.02, math.sqrt(of_seed / seeds + of_patients), 2_000)
    held = [estimate > part.critical(0.025) * part.se for estimate, part in zip(away, parts, strict=True)]
    assert np.mean(held) > 0.78
    assert entry("greater", 0.05, 0.01).needs() == ""
    assert needs("equivalent", 0.0, 0.02, of_seeds=0.02).endswith("times the test patients")


def test_does_not_repeat_patients_that_settle_what_seeds_leave_open() -> None:
    """Half of the variance is of seeds, half of patients, and each alone is more than the margin: no number of either is enough."""
    for expect in ("greater", "equivalent"):
        assert needs(expect, 0.0, 0.2, of_seeds=0.5) == "more seeds and more test patients: neither alone is enough"


# -- the ledger of a study


def test_the_ledger_holds_and_fails_what_was_planted(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=4, images=300)
    worse = claim(name="hurts", sentence="Pretraining on chests hurts.", expect="less")
    same = claim(name="same", sentence="It makes no difference.", expect="equivalent", margin=0.01)
    evidence = with_claims(out, claim(), worse, same)
    assert {e.claim.name: e.verdict for e in evidence.ledger} == {"pretraining-helps": "holds", "hurts": "fails", "same": "fails"}
    assert all(not e.late for e in evidence.ledger)
    assert [f.kind for f in evidence.findings] == ["claim", "claim", "claim", "gain"]
    first = evidence.ledger[0].sentence()
    assert first.startswith('"Pretraining on chests helps." holds for these encoders on phantom-chest')
    frame = significance(evidence)
    assert list(frame["verdict"].fillna("")) == ["holds", "fails", "fails", ""]
    assert '"Pretraining on chests helps." holds' in evidence.answer()


def test_holm_runs_over_the_claims_alone_and_other_pairs_are_not_declared(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=4, images=300)
    assert gather(str(out), Bootstrap(300)).findings[0].declared  # without claims the automatic pair is the family
    evidence = with_claims(out, claim(), claim(name="hurts", sentence="It hurts.", expect="less"))
    assert evidence.family == 2
    gain = next(f for f in evidence.findings if f.kind == "gain")
    assert not gain.declared
    assert math.isnan(gain.adjusted)
    assert "no claim of this study, nothing declared" in gain.sentence(evidence)
    p = [e.p for e in evidence.ledger]
    assert [e.adjusted for e in evidence.ledger] == holm(p)


def test_does_not_repeat_an_answer_without_the_claims_that_are_settled(tmp_path: Path) -> None:
    """Claims stand in the order of the file and the settled ones last; a claim and the study's own comparison of its sides are one."""
    out = make(tmp_path / "out", {"random": 0.0, "random-b": 0.0, "simclr": 1.0}, seeds=4, images=300)
    twins = {"a": {"source": "random-b"}, "b": {"source": "random"}}
    open_ones = [claim(name=f"open-{i}", sentence=f"Open, {i}.", comparison=twins, margin=0.002 + i / 1000) for i in range(6)]
    evidence = with_claims(out, *open_ones, claim(name="hurts", sentence="It hurts.", expect="less"), claim())
    assert [f.kind for f in evidence.findings] == ["claim"] * 8 + ["control", "gain"]
    said = [sentence for _, sentence in evidence.headlines()]
    assert said[0].startswith('"Pretraining on chests helps." holds')
    assert said[1].startswith('"It hurts." fails')
    assert [sentence[1:8] for sentence in said[2:-1]] == [f"Open, {i}" for i in range(4)]
    assert said[-1] == "2 more comparisons are in the report"
    assert len(evidence.headlines(limit=8)) == 8
    assert [sentence for _, sentence in evidence.headlines(limit=7)][-1] == "1 more comparison is in the report"


def test_does_not_repeat_a_p_that_is_not_the_one_that_was_corrected(tmp_path: Path) -> None:
    """Of a claim of equivalence Holm's correction takes the p of the larger of its two one-sided tests, not that of a difference of 0."""
    out = make(tmp_path / "out", {"random": 0.0, "random-b": 0.0, "simclr": 1.0}, seeds=4, images=300)
    twins = {"a": {"source": "random-b"}, "b": {"source": "random"}}
    alike = claim(name="alike", sentence="The two are alike.", comparison=twins, expect="equivalent", margin=0.1)
    methods = claim(name="methods", about="methods", sentence="As a method, pretraining on chests helps.")
    frame = significance(with_claims(out, alike, claim(), methods)).set_index("name")
    of_alike = {name: float(frame[name]["alike"]) for name in ("p", "p_tested", "p_holm")}
    assert of_alike["p"] > of_alike["p_holm"] > of_alike["p_tested"]
    known = frame["p_holm"].notna()
    assert (frame["p_tested"].notna() == known).all()
    assert (frame["p_holm"] >= frame["p_tested"])[known].all()
    assert frame["claim"]["methods"] == "encoders (these weights)"  # one pretraining


def test_too_few_seeds_for_its_kind_is_underpowered_whatever_the_difference(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 3.0}, seeds=4, images=300)
    evidence = with_claims(out, claim(about="methods", sentence="As a method, pretraining on chests helps."))
    (found,) = evidence.ledger
    assert found.verdict == "underpowered"
    assert found.why == "1 pretraining seed, and a claim about methods takes 3"
    assert found.needs() == "3 pretraining seeds"
    one = make(tmp_path / "one", {"random": 0.0, "simclr": 3.0}, seeds=1, images=300)
    (single,) = with_claims(one, claim()).ledger
    assert (single.verdict, single.needs()) == ("underpowered", "more fine-tuning seeds")


def test_a_claim_about_encoders_is_never_worded_as_one_about_methods(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=4, images=200)
    evidence = with_claims(out, claim(), claim(name="less", sentence="It hurts.", expect="less", where={"strategy": "full"}))
    for found, finding in zip(evidence.ledger, evidence.findings, strict=False):
        assert "method" not in found.sentence()
        assert "for these encoders" in found.sentence()
        assert finding.about == "encoders (these weights)"


def test_a_claim_is_tested_in_every_setting_that_has_both_sides(tmp_path: Path) -> None:
    tasks = {"phantom-chest": "classification", "phantom-vessels": "segmentation"}
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=3, images=120, tasks=tasks, fractions=(1.0, 0.1))
    named = claim(name="masks", where={"kind": "segmentation", "fraction": 0.1})
    evidence = with_claims(out, claim(), named, claim(name="none", where={"fraction": 0.5}))
    settings = [(e.claim.name, e.setting.get("task"), e.setting.get("fraction")) for e in evidence.ledger]
    assert len([name for name, *_ in settings if name == "pretraining-helps"]) == 4
    assert [row for row in settings if row[0] == "masks"] == [("masks", "phantom-vessels", 0.1)]
    (missing,) = [e for e in evidence.ledger if e.claim.name == "none"]
    assert missing.verdict == "underpowered"
    assert "no finished cells of both sides" in missing.why
    assert evidence.family == 6  # what could not be tested counts: the family was fixed before


def test_own_sources_and_exposed_ones_are_evidence_for_nothing(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 2.0}, seeds=4, images=200, own=[("simclr", "phantom-chest")])
    evidence = with_claims(out, claim())
    (found,) = evidence.ledger
    assert "own source" in found.why
    assert (found.verdict, found.needs()) == ("not comparable", "")  # no number of seeds would settle it
    assert found.comparison.seed_variance > 0
    assert '" cannot be judged for these encoders on phantom-chest' in found.sentence()
    assert row(found)[1:5:3] == ("not comparable", "-")
    assert evidence.findings[0].mark == "none"
    assert '<span class="tag ">not comparable</span>' in statistics_sections.claims(evidence)


@pytest.mark.parametrize("own", [False, True])
def test_does_not_repeat_an_interval_of_one_seed_that_is_left_without_saying_so(tmp_path: Path, own: bool) -> None:
    """Of two seeds one cell is gone: its interval is narrower than that of both, since it holds patients alone."""
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.5}, seeds=2, images=80, own=[("simclr", "phantom-chest")] * own)
    assert "patients only" not in with_claims(out, claim()).answer()
    gone = next(cell for cell in finished(str(out)) if cell.source == "simclr")
    Path(gone.url, "result.json").unlink()
    evidence = with_claims(out, claim())
    first, second = evidence.findings
    told = "one seed so far: patients only, nothing declared"
    assert first.sentence(evidence).endswith(f", {told}, so far: 1 of its cells is missing")
    assert second.sentence(evidence).endswith(f", {told}")
    assert evidence.ledger[0].why.endswith(f", {told}")
    assert "so far, 1 cell missing" in row(evidence.ledger[0])[1]
    assert (", patients only against random" in tables.winners(evidence)) is not own  # an own source leads nowhere
    (out / "plan.json").unlink()
    assert gather(str(out), Bootstrap(300)).findings[1].sentence(evidence).endswith(", one seed: patients only, nothing declared")


def test_a_verdict_of_a_study_that_is_running_says_so(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=5, images=200)
    rows = []
    for place in sorted((out / "cells").iterdir()):
        held = json.loads((place / "result.json").read_text())
        axes = {name: held[name] for name in ("key", "architecture", "source", "strategy", "task", "fraction", "resolution", "seed")}
        rows.append({**axes, "shuffle_labels": False})
        if held["seed"] == 4:
            (place / "result.json").unlink()
    (out / "plan.json").write_text(json.dumps(rows))
    (found,) = with_claims(out, claim()).ledger
    assert found.missing == 2
    assert "so far: 2 of its cells are missing" in found.sentence()


def without(out: Path, task: str) -> None:
    """Take away what is finished of a task; the plan keeps it."""
    for result in sorted((out / "cells").glob("*/result.json")):
        if json.loads(result.read_text())["task"] == task:
            result.unlink()


TASKS = ("one", "two", "three", "four", "five")


def test_does_not_repeat_a_family_that_shrinks_with_missing_cells(tmp_path: Path) -> None:
    """Planned in five tasks and finished in one: the family is five, and the missing cells are counted."""
    tasks = dict.fromkeys(TASKS, "classification")
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.3}, seeds=3, images=60, tasks=tasks)
    for task in TASKS[1:]:
        without(out, task)
    evidence = with_claims(out, claim(where={"kind": "classification"}))
    found = {e.setting["task"]: e for e in evidence.ledger}
    assert {task: e.missing for task, e in found.items()} == {task: 6 * (task != "one") for task in TASKS}
    assert [e.family for e in evidence.ledger] == [5] * 5
    assert evidence.family == 5
    assert found["one"].adjusted == pytest.approx(min(1, 5 * found["one"].p))
    assert {found[task].verdict for task in TASKS[1:]} == {"underpowered"}
    assert [f.kind for f in evidence.findings].count("claim") == 1


def test_does_not_repeat_an_automatic_family_that_shrinks_with_missing_cells(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.3}, seeds=3, images=60, tasks=dict.fromkeys(TASKS, "classification"))
    for task in TASKS[1:]:
        without(out, task)
    evidence = gather(str(out), Bootstrap(100))
    assert evidence.family == 5
    (found,) = evidence.findings
    assert found.adjusted == pytest.approx(min(1, 5 * found.comparison.p))


def test_does_not_repeat_a_withdrawn_claim_that_leaves_the_family(tmp_path: Path) -> None:
    """Three failing claims are taken out after the results: what is left is corrected for all four, and so is a later one."""
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 0.3}, seeds=3, images=60)
    failing = [claim(name=f"hurts-{i}", sentence=f"It hurts, {i}.", expect="less") for i in range(3)]
    before = with_claims(out, claim(), *failing)
    after = with_claims(out, claim(), registered=False)
    assert after.withdrawn == [one.name for one in failing]
    assert (before.ledger[0].family, after.ledger[0].family, after.family) == (4, 4, 4)
    assert after.ledger[0].adjusted == before.ledger[0].adjusted
    late = with_claims(out, claim(), claim(name="late", sentence="It helps, they say."), registered=False)
    assert [(e.late, e.family) for e in late.ledger] == [(False, 4), (True, 5)]


def write_curve(cell: Path, metric: str, values: Sequence[float]) -> None:
    rows = [{"epoch": e, f"val_{metric}": value} for e, value in enumerate(values, 1)]
    (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def curves(out: Path, epochs: int, slower: float, level: float, spread: float = 0.01) -> Path:
    """Learning curves: pretrained weights take 3 epochs to come near 0.8, random ones `slower` times as long and to `level` of the way."""
    for place in (out / "cells").iterdir():
        config = yaml.safe_load((place / "config.yaml").read_text())
        random = config["source_kind"] == "random"
        own = 1 + spread * json.loads((place / "result.json").read_text())["seed"] * (1 if random else -1)
        pace, way = 3 * own * (slower if random else 1), 0.3 * (level if random else 1)
        write_curve(place, "auroc_mean", [0.5 + way * (1 - math.exp(-e / pace)) for e in range(1, epochs + 1)])
    return out


def test_convergence_is_of_speed_towards_a_level_that_both_reach(tmp_path: Path) -> None:
    """Two sides as fast as each other: neither is sooner. One that is slower and ends higher is later; so is one that ends no lower."""
    sooner = claim(outcome="convergence", margin=0.01)
    made = make(tmp_path / "out", {"random": 0.0, "simclr": 2.0}, seeds=4, images=60)
    (same,) = with_claims(curves(made, 30, slower=1.0, level=1.0), sooner).ledger
    assert abs(same.comparison.estimate) < 0.005  # seeds of one side are a little sooner than those of the other
    assert same.verdict == "fails"
    for level in (1.0, 1.1):
        (found,) = with_claims(curves(made, 30, slower=3.0, level=level), sooner).ledger
        assert found.verdict == "holds"
        assert "on these validation images, over seeds alone" in found.sentence()
    assert found.metric == "share of the common level of validation auroc_mean reached so far, mean over the run"
    assert found.level == pytest.approx(0.8, abs=5e-4)


def test_does_not_repeat_a_run_that_learned_nothing_as_the_soonest(tmp_path: Path) -> None:
    """It has nearly all of its own best from the first evaluation on, and its best is chance."""
    out = curves(make(tmp_path / "out", {"random": 0.0, "simclr": 2.0}, seeds=4, images=60), 30, slower=1.0, level=1.0)
    for place in (out / "cells").iterdir():
        if yaml.safe_load((place / "config.yaml").read_text())["source_kind"] == "random":
            late = 10 + json.loads((place / "result.json").read_text())["seed"]
            write_curve(place, "auroc_mean", [0.49 + 0.03 * (e >= late) for e in range(30)])
    (found,) = with_claims(out, claim(outcome="convergence")).ledger
    assert found.verdict == "holds"
    assert found.comparison.estimate == pytest.approx(np.mean([(late - 1) / 29 for late in range(10, 14)]), abs=0.04)


def test_does_not_repeat_a_verdict_on_speed_that_is_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same curves over another chance level are as fast: what a predictor scores that knows nothing is no share of a level."""

    def made(source: str, pace: float, chance: float) -> list[convergence.Curve]:
        at = np.arange(1.0, 21)
        return [
            convergence.Curve(("t",), source, "full", seed, "auroc_mean", at, chance + 0.3 * (1 - np.exp(-at / (pace + 0.2 * seed))))
            for seed in range(3)
        ]

    found = []
    for chance in (0.0, 0.5, 0.6):
        monkeypatch.setattr(convergence, "CHANCE", chance)
        sides = made("simclr", 2, chance), made("random", 6, chance)
        found.append(of_curves(*sides, convergence.common_threshold(sides)))
    assert found[0].estimate > 0.1
    for other in found[1:]:
        assert (other.estimate, other.low, other.p) == pytest.approx((found[0].estimate, found[0].low, found[0].p))


def test_convergence_is_not_comparable_where_no_level_is_one_of_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(out: Path) -> tuple[str, str, str]:
        (found,) = with_claims(out, claim(outcome="convergence")).ledger
        return found.verdict, found.why, found.needs()

    sources, none = {"random": 0.0, "simclr": 2.0}, ("not comparable", "")
    out = curves(make(tmp_path / "out", sources, seeds=4, images=60), 30, slower=3.0, level=1.0)
    assert judged(out)[0] == "holds"
    monkeypatch.setattr(study_floors.StudyFloors, "of", lambda *_: {"pixels": {"auroc_mean": 0.9}})
    assert judged(out)[0] == "holds"  # a floor is of worth, not of speed
    monkeypatch.undo()
    for storey, words in ((0.48, "chance, 0.500"), (0.6, "the first evaluation of both, 0.600")):
        for place in (out / "cells").iterdir():
            write_curve(place, "auroc_mean", [storey] * 5)
        verdict, why, needs = judged(out)
        assert (verdict, needs) == none
        assert why == f"the common level of {storey:.3f} is not above {words}"
    masks = make(tmp_path / "masks", sources, seeds=3, images=60, tasks={"phantom-vessels": "segmentation"})
    for place in (masks / "cells").iterdir():
        write_curve(place, "dice", [0.4, 0.5, 0.6])
    assert judged(masks)[:2] == (
        "not comparable",
        "what a predictor that knows nothing scores in dice is not known, and so no share of a level",
    )


@pytest.mark.parametrize(("floor", "low"), [(0.2, False), (0.999, True)])
def test_does_not_repeat_a_claim_that_holds_under_a_floor_without_a_word(
    floor: float, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_floors, "of_shards", lambda *_, **__: {1.0: [{"pixels": {"auroc_mean": floor}}]})
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 2.0}, seeds=4, images=80)
    put(f"{out}/shards/phantom-chest/manifest.json", '{"card": {}}')
    evidence = with_claims(out, claim())
    assert [f.low for f in evidence.findings] == [low] * 2
    said = [*(f.sentence(evidence) for f in evidence.findings), tables.findings(evidence), statistics_sections.claims(evidence)]
    assert [("both sides under a floor" in text) for text in said] == [low] * 4


def test_does_not_repeat_convergence_judged_from_one_evaluation(tmp_path: Path) -> None:
    out = curves(make(tmp_path / "out", {"random": 0.0, "simclr": 2.0}, seeds=4, images=60), 1, slower=3.0, level=0.5)
    (found,) = with_claims(out, claim(outcome="convergence")).ledger
    assert (found.verdict, found.why) == ("not comparable", "a run of 1 evaluation: convergence takes 3")
    equal = curves(out, 8, slower=1.0, level=1.0, spread=0.0)
    (alike,) = with_claims(equal, claim(outcome="convergence")).ledger
    assert (alike.verdict, alike.why) == ("underpowered", "the seeds do not vary")


def test_does_not_repeat_verdicts_of_scores_at_a_bound(tmp_path: Path) -> None:
    """Every mask of both sides is right: nothing varied, and nothing is known of what would."""
    out = make(tmp_path / "out", {"random": 9.0, "simclr": 9.0}, seeds=3, images=60, tasks={"phantom-vessels": "segmentation"})
    same = claim(name="same", sentence="It makes no difference.", expect="equivalent")
    for found in with_claims(out, claim(), same).ledger:
        assert (found.verdict, found.why) == ("underpowered", "both at a bound: patients and seeds do not vary")


def test_does_not_repeat_equivalence_at_the_degrees_of_freedom_of_another_tail() -> None:
    """Half of seeds (2 df), half of patients (199): the claim holds after Holm exactly where its interval at that level is inside."""
    made = entry("equivalent", 0.0, 0.004)
    parts: dict[str, Any] = {"seed_variance": 0.5 * 0.004**2, "patient_variance": 0.5 * 0.004**2, "seeds_df": 2.0}
    comparison = replace(made.comparison, **parts)
    for tail in (0.05, 0.005, 0.0005):
        margin = comparison.parts.critical(tail) * 0.004
        found = replace(made, comparison=comparison, claim=claim(expect="equivalent", margin=margin))
        assert found.p == pytest.approx(tail)


def test_does_not_repeat_a_reason_that_its_interval_contradicts() -> None:
    """The printed 90 % lie over the margin as a whole and the 95 % do not: the reason names the interval that it is of."""
    found = entry("equivalent", 0.0415, 0.0115)
    assert found.verdict == "underpowered"
    assert found.interval[0] > 0.02
    assert found.why == "the 95 % interval [+0.018, +0.065] reaches over +0.02"
    assert entry("equivalent", 0.0, 0.02).why.endswith("reaches over -0.02 and +0.02")


def test_a_claim_of_equivalence_that_fails_says_which_way_and_one_that_holds_that_it_is_equivalent() -> None:
    assert entry("equivalent", 0.05, 0.01).why == "higher by 0.050: not equivalent within 0.02, by its 95 % interval, uncorrected"
    assert entry("equivalent", -0.05, 0.01).why.startswith("lower by 0.050: not equivalent")
    assert entry("equivalent", 0.001, 0.005).why.endswith("; equivalent within 0.02")


@pytest.mark.parametrize(("seeds", "verdict"), [(2, "underpowered"), (4, "holds")])
def test_does_not_repeat_methods_on_random_weights_without_seeds(tmp_path: Path, seeds: int, verdict: str) -> None:
    """Random weights are drawn anew with every seed: each is a pretraining seed, and two are too few."""
    out = make(tmp_path / "out", {"random": 0.0, "random-b": 3.0}, seeds=seeds, images=200)
    drawn = claim(
        about="methods", sentence="As a method, b is better.", comparison={"a": {"source": "random-b"}, "b": {"source": "random"}}
    )
    (found,) = with_claims(out, drawn).ledger
    assert found.verdict == verdict
    assert found.pretraining_seeds == seeds


# -- before and after the results


def test_a_claim_added_after_the_results_says_so_and_one_changed_is_withdrawn(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=4, images=200)
    events = Events(str(out))
    study = Study.model_construct(out=str(out), claims=[claim()])  # type: ignore[call-arg]
    register_claims(study, events)  # a driver that comes when results stand on both sides
    (found,) = with_claims(out, claim(), registered=False).ledger
    assert found.late
    assert "ADDED AFTER THE RESULTS" in found.sentence()
    early = claim(name="written-first", sentence="It was said before.", where={"strategy": "full"})
    evidence = with_claims(out, early, claim())
    assert [e.late for e in evidence.ledger] == [False, False]
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    rows[1]["standing"] = 1
    (out / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = with_claims(out, early, claim(), registered=False)
    assert [e.late for e in mixed.ledger] == [False, True]
    assert [e.family for e in mixed.ledger] == [1, 2]
    assert mixed.ledger[0].adjusted == pytest.approx(mixed.ledger[0].p)  # a later claim takes nothing from an earlier one
    changed = with_claims(out, early, claim(margin=0.001), registered=False)
    assert changed.withdrawn == ["pretraining-helps"]
    assert changed.ledger[1].late


def test_the_diary_holds_each_claim_once_and_how_much_stood(tmp_path: Path) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=2, images=60)
    other = claim(name="other", comparison={"a": {"source": "byol"}, "b": {"source": "random"}})
    study, events = Study.model_construct(out=str(out), claims=[claim(), other]), Events(str(out))  # type: ignore[call-arg]
    register_claims(study, events)
    register_claims(study, Events(str(out)))
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [(row["claim"], row["standing"]) for row in rows] == [("pretraining-helps", 1), ("other", 0)]
    assert all(row["time"] for row in rows)


# -- ready claims


def test_the_ready_claims_are_named_like_their_files_and_the_study_holds_them_all() -> None:
    study = load_study("claims")
    assert len(study.claims) >= 12
    assert sorted(one.name for one in study.claims) == names("claim")
    assert all(load_claim(name).name == name for name in names("claim"))
    assert all(one.paper for one in study.claims)
    assert "claims/transfer-on-few-data" not in names("study")


@pytest.mark.parametrize("name", names("claim"))
def test_does_not_repeat_a_ready_claim_about_encoders_that_speaks_of_pretraining_at_large(name: str) -> None:
    """What one checkpoint shows is of these weights; pretraining as such is of methods."""
    one = load_claim(name)
    said = one.sentence.lower()
    assert one.about == "methods" or not ("pretraining on" in said or "pretraining that" in said)


@pytest.mark.parametrize("settings", [[], ["preset=radiographs", "data.nih-cxr14.raw=/x", "data.montgomery.raw=/y"]])
def test_every_ready_claim_has_both_sides_on_phantoms_and_on_the_users_data(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study("claims", settings)  # refuses a claim without both sides
    assert study.cells is not None
    asked = Asked(study)
    every = [axes for axes, _ in axes_of_matrix(study)]
    assert 0 < len(asked.settings) < 0.4 * len(every)
    for one in study.claims:
        assert {one.side(axes) for axes in every} >= {"a", "b"}


def test_does_not_repeat_a_smallest_run_that_is_too_short_to_judge_convergence() -> None:
    study = load_study("claims", ["preset=smoke"])
    assert study.cells is not None
    for name in study.cells.tasks:
        assert load_task(name, study.cells.task_settings[name]).recipe.epochs >= LEAST_EVALUATIONS


def test_a_claim_without_cells_is_refused(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "studies" / "demo.yaml").read_text())
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**tree, "claims": [{**CLAIM, "comparison": {"a": {"source": "byol"}, "b": {"source": "random"}}}]}))
    with pytest.raises(RequestError, match=r"claims.pretraining-helps: no setting of the matrix has both 'byol' and 'random'"):
        load_study(str(path))
    path.write_text(yaml.safe_dump({**tree, "claims": ["transfer-on-fw-data"]}))
    with pytest.raises(RequestError, match="did you mean 'transfer-on-few-data'"):
        load_study(str(path))
    path.write_text(yaml.safe_dump({**tree, "claims": [CLAIM, CLAIM]}))
    with pytest.raises(RequestError, match="pretraining-helps stands twice"):
        load_study(str(path))


def test_the_command_prints_a_line_a_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make(tmp_path / "out", {"random": 0.0, "simclr": 1.0}, seeds=4, images=200)
    with pytest.raises(RequestError, match="makes no claims"):
        show([str(out)])
    with_claims(out, claim())
    show([str(out)])
    printed = capsys.readouterr().out
    assert "pretraining-helps" in printed
    assert "holds" in printed
    assert "simclr against random: greater, margin 0.02" in printed
    show([])
    assert "transfer-on-few-data" in capsys.readouterr().out


def test_json_schema_is_committed_and_the_golden_claim_still_reads() -> None:
    """To change the format: raise its `schema`, then write what this test prints."""
    schema = json.dumps(Claim.model_json_schema(by_alias=True), indent=1) + "\n"
    assert (ROOT / "docs" / "schemas" / "claim.json").read_text() == schema
    golden = load(ROOT / "tests" / "golden" / "claim.yaml", Claim)
    assert golden.comparison.a.strategy == {"name": "truncated", "cut": "layer3"}
