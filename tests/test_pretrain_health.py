"""Probes on known numbers, and each verdict raised by what it is for, by real parts: a constant encoder, a bf16 teacher, a slow loader."""

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_pretrain_run import metrics, tree
from tiny_corpus import write
from torch import Tensor, nn

from base import storage
from base.config import parse
from base.errors import WorkError
from engine import ema
from engine.context import LocalContext
from engine.throughput import Meter
from pretrain import ends, probes
from pretrain.health import Health, collapse, judge
from pretrain.run import PretrainConfig, run

STEPS = range(10, 210, 10)


def features(kind: str, n: int = 256, d: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(n, d, generator=generator)
    if kind == "constant":
        draws = torch.ones(n, d)
    if kind == "rank one":
        draws = torch.randn(n, 1, generator=generator) @ torch.randn(1, d, generator=generator)
    if kind == "narrow":
        draws = 1 + 0.02 * draws
    near = draws + 0.3 * torch.randn(n, d, generator=generator) * (kind == "normal")
    return {"backbone": draws, "projector_0": draws, "projector_1": near}


def batch(n: int = 256) -> Any:
    return SimpleNamespace(index_B=torch.arange(n), target_BL=None, mask_BL=None)


def rows(kind: str = "normal", **more: Any) -> list[dict[str, Any]]:
    """A run of 200 steps whose features are of that kind throughout."""
    row = probes.Window().measure(features(kind), batch()) | {
        "loss": 2.0,
        "contrastive_chance": 1 / 511,
        "grad_norm": 1.0,
        "data_wait": 0.01,
    }
    return [row | {"step": step, "steps": 1000, "epoch": step / 10} | more for step in STEPS]


def verdict(found: list[dict[str, Any]], labelled: bool = False) -> str:
    return judge(found, chance_loss=6.2, width=64, labelled=labelled).health


def moved(teacher: nn.Module, student: nn.Module) -> float:
    """Share of the teacher's numbers that one update changes, as the loop measures it."""
    largest = list(teacher.parameters())[ema.largest(teacher)].data
    before = largest.clone()
    if largest.dtype == torch.float32:
        ema.follow(teacher, student, 0.996)
    else:
        largest.lerp_(list(student.parameters())[ema.largest(student)].data.to(largest.dtype), 0.004)
    return ema.moved(before, teacher, student)


def ahead(teacher: nn.Module) -> nn.Module:
    """A student that is a little ahead of the teacher, as while training."""
    student = copy.deepcopy(teacher).float()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003)
    return student


def made(kind: str) -> list[dict[str, Any]]:
    if kind == "frozen teacher":
        torch.manual_seed(0)
        teacher = nn.Linear(64, 64)
        return rows(teacher_moved=moved(copy.deepcopy(teacher).bfloat16(), ahead(teacher)))
    if kind == "dead prototypes":
        window, p_BK = probes.Window(), torch.zeros(256, 32)
        p_BK[:, :8] = torch.rand(256, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            window.count({"prototypes": p_BK})
        return [row | window.measure({**features("normal"), "prototypes": p_BK}, batch()) for row in rows()]
    if kind == "input-bound":
        meter = Meter(8)
        for _ in range(3):
            with meter.waiting():
                time.sleep(0.01)
            meter.tick()
        waited: dict[str, Any] = {name: value for name, value in meter.read().items() if name == "data_wait"}
        return rows(**waited)
    found = rows({"collapsed": "constant"}.get(kind, "normal"))
    if kind == "not learning":
        return [row | {"loss": 6.19, "contrastive_top1": 1 / 511} for row in found]
    if kind == "dimensional collapse":
        return [row | {"loss": 3 - i / 10, "rankme": 60.0 - 2.5 * i} for i, row in enumerate(found)]
    if kind == "unstable":
        return [*found[:-1], found[-1] | {"grad_norm": 20.0}]
    return found[:2] if kind == "too short" else found


@pytest.mark.parametrize("kind", get_args(Health))
def test_each_verdict_is_raised_by_what_it_is_for_and_by_nothing_else(kind: str) -> None:
    assert verdict(made(kind)) == kind


def test_a_window_that_began_anew_is_no_collapse_of_dimensions() -> None:
    """At another number of ranks the window begins anew, and 64 samples span fewer directions than 1,024 did."""
    found = made("dimensional collapse")
    shrunk = [row | {"window": 1024 if i < 2 else 64} for i, row in enumerate(found[-4:])]
    assert verdict([*found[:-4], *shrunk]) == "healthy"
    assert verdict([row | {"window": 64} for row in found]) == "dimensional collapse"


@pytest.mark.parametrize("kind", ["constant", "rank one", "narrow"])
def test_collapse_is_seen(kind: str) -> None:
    found = judge(rows(kind), chance_loss=6.2, width=64, labelled=False)
    assert found.health == "collapsed"
    assert "step 200" in found.why


def test_a_collapse_with_a_teacher_that_sharpens_names_the_ratio_of_temperatures() -> None:
    plain = judge(rows("constant"), chance_loss=6.2, width=64, labelled=False).why
    assert "check the temperature" in plain
    for name, said in (("teacher_lag", True), ("target_lag", False), ("key_lag", False)):
        found = judge([row | {name: 0.1} for row in rows("constant")], chance_loss=6.2, width=64, labelled=False).why
        assert ("lower the rate or teacher_temperature / student_temperature" in found) == said


def test_a_narrow_cone_that_runs_leave_again_is_no_collapse() -> None:
    """InfoMin on phantoms, step 175: six rows like it would have ended a run that gained 0.076. Then DINO, which stayed there."""
    assert collapse({"std_ratio": 0.1438, "mean_cosine": 0.9761, "rankme": 70.3, "window": 512}, 96, labelled=False) is None
    assert collapse({"std_ratio": 0.1002, "mean_cosine": 0.9866, "rankme": 66.2, "window": 640}, 96, labelled=False)


def test_with_labels_only_a_constant_is_a_collapse() -> None:
    assert verdict(rows("constant"), labelled=True) == "collapsed"
    assert verdict(rows("narrow"), labelled=True) == "healthy"


def test_a_network_without_projector_is_judged_by_centred_features() -> None:
    """Raw pooled ReLU features all point into one corner: not a collapse."""
    corner = features("normal")["backbone"] * 0.05 + 1
    row = probes.Window().measure({"backbone": corner}, batch())
    assert row["std_ratio"] > 0.9
    assert abs(row["mean_cosine"]) < 0.1
    dead = probes.Window().measure({"backbone": torch.ones(256, 64)}, batch())
    assert dead["std_ratio"] < 0.1


def test_a_teacher_in_float32_moves_and_one_in_bf16_does_not() -> None:
    """Does not repeat the bf16 teacher that stays where it is."""
    torch.manual_seed(0)
    halved = nn.Linear(64, 64).bfloat16()
    student, teacher = ahead(halved), ema.follower(halved)
    assert next(teacher.parameters()).dtype == torch.float32
    assert moved(teacher, student) > 0.99
    assert moved(halved, student) < 0.5
    part = copy.deepcopy(teacher)  # a student most of whose numbers have no gradient, and decay by less than a step can follow
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1 + 1e-6)
        next(part.parameters())[:4] += 0.1
    assert moved(teacher, part) == 1
    with pytest.raises(RuntimeError, match="BFloat16"):
        ema.follow(halved, student, 0.996)


def test_a_run_at_chance_is_seen() -> None:
    assert judge([row | {"contrastive_top1": 0.002} for row in rows()], chance_loss=None, width=64, labelled=False).health == "not learning"
    at_chance = [row | {"contrastive_top1": 0.002, "loss": 6.19} for row in rows()]
    assert judge(at_chance, chance_loss=6.2, width=64, labelled=False).health == "not learning"


def test_pairs_that_find_one_another_are_one_case_and_a_loss_over_chance_is_said() -> None:
    """SimCLR at a rate of 1000: its loss stood over ln 63, twice as many views as by chance found their own, in both directions of few
    pairs, and the verdict was healthy."""
    diverged = [row | {"contrastive_top1": 20 / 640, "contrastive_chance": 1 / 63, "loss": 4.9} for row in rows()]
    found = judge(diverged, chance_loss=4.143, width=64, labelled=False)
    assert found.health == "not learning"
    sharp = judge([row | {"contrastive_top1": 0.2} for row in diverged], chance_loss=4.143, width=64, labelled=False)
    assert sharp.health == "healthy"
    assert "loss 4.9000 (over the 4.1430 of a network that knows nothing: the rate may be too high)" in sharp.why


def test_few_pairs_in_the_last_rows_do_not_make_a_run_that_learns_look_stuck() -> None:
    """Batches of 64 on phantoms: Barlow Twins found 3.5 % of the pairs where chance is 0.79 %, but 1.3 % in its last three rows."""
    found = [0.03, 0.05, 0.02, 0.04, 0.03, 0.05, 0.04, 0.013, 0.013, 0.013]
    learns = [row | {"contrastive_top1": share, "contrastive_chance": 1 / 127} for row, share in zip(rows(), found + found, strict=True)]
    assert judge(learns, chance_loss=None, width=64, labelled=False).health == "healthy"


def test_a_loss_under_chance_is_learning_whatever_pairs_say() -> None:
    """PIRL's image and its patches lie apart, so the nearest is never the other view; its loss says that it learns."""
    apart = [row | {"contrastive_top1": 0.0} for row in rows()]
    assert judge(apart, chance_loss=6.2, width=64, labelled=False).health == "healthy"
    assert judge([], chance_loss=6.2, width=64, labelled=False).health == "too short"


def test_probes_on_known_spectra() -> None:
    eye = torch.eye(32).repeat(2, 1)
    assert probes.rankme(probes.spectrum(eye)) == pytest.approx(31, rel=1e-3)  # centring removes one direction
    assert probes.rankme(probes.spectrum(torch.ones(8, 4))) == 1
    normal = features("normal")
    assert probes.std_ratio(normal["backbone"]) == pytest.approx(1, abs=0.02)
    assert probes.mean_cosine(normal["backbone"]) == pytest.approx(0, abs=0.01)
    assert probes.mean_cosine(torch.ones(5, 3)) == pytest.approx(1)
    assert probes.contrastive_top1(normal["projector_0"], normal["projector_1"]) == 1
    assert probes.contrastive_top1(torch.ones(6, 3), torch.ones(6, 3)) == 0
    shuffled = normal["projector_1"].roll(1, dims=0)
    assert probes.contrastive_top1(normal["projector_0"], shuffled) == 0
    falling = torch.arange(1, 101, dtype=torch.float64) ** -0.6  # eigenvalues fall with the power 1.2
    fit = probes.alpha_req(falling)
    assert fit is not None
    assert fit == pytest.approx((1.2, 1.0), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=20, max_size=80))
def test_a_label_counts_where_enough_of_both_classes_are_known(pairs: list[tuple[int, bool]]) -> None:
    score, target = np.array([pair[0] for pair in pairs], float), np.array([pair[1] for pair in pairs], float)
    columns = torch.from_numpy(np.stack([score, score], axis=1)), torch.from_numpy(np.stack([target, np.ones_like(target)], axis=1))
    found = probes._macro(*columns, torch.ones(len(pairs), 2))
    enough = min(target.sum(), len(target) - target.sum()) >= probes.FEWEST_OF_A_CLASS
    assert found == (pytest.approx(roc_auc_score(target, score)) if enough else None)


def test_labels_that_were_smoothed_are_judged_as_the_nearer_class() -> None:
    score_NL = torch.arange(20.0)[:, None]
    smoothed_NL = torch.where(score_NL < 10, 0.2, 0.7)
    assert probes._macro(score_NL, smoothed_NL, torch.ones(20, 1)) == 1
    assert probes._macro(torch.full((20, 1), float("nan")), smoothed_NL, torch.ones(20, 1)) is None


def test_labels_are_found_where_features_hold_them_and_not_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(400, 16, generator=generator)
    target_NL = torch.stack([(z_ND[:, 0] > 0).float(), torch.randint(0, 2, (400,), generator=generator).float()], dim=1)
    seen = (z_ND, torch.arange(400), target_NL, torch.tensor([[1.0, 0.0]]).expand(400, 2))
    blind = (z_ND, torch.arange(400), target_NL, torch.tensor([[0.0, 1.0]]).expand(400, 2))
    for probe in (probes.knn_auroc, probes.linear_auroc):
        found, nothing = probe(*seen), probe(*blind)
        assert found is not None
        assert nothing is not None
        assert found > 0.8
        assert nothing == pytest.approx(0.5, abs=0.1)
    doubled = [torch.cat([part, part]) for part in blind]  # every image twice: its copy would know the answer
    assert probes.knn_auroc(*doubled) == pytest.approx(0.5, abs=0.1)


def test_few_samples_of_a_wide_network_are_no_collapse_and_ridge_is_the_same_either_way() -> None:
    """ResNet-50 at batch 16: sixteen samples have fifteen directions, of 2,048."""
    wide = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0))
    row = probes.Window().measure({"backbone": wide}, batch(16)) | {"loss": 1.0, "step": 60, "epoch": 3.0}
    assert row["rankme"] < 0.02 * 2048
    assert collapse(row, 2048, labelled=False) is None
    x, y = wide[:, :12].double(), torch.randn(16, 3, dtype=torch.float64)
    thin = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(12), x.T @ y)
    torch.testing.assert_close(probes._ridge(x, y, 0.5), thin)
    torch.testing.assert_close(probes._ridge(x[:5], y[:5], 0.5), torch.linalg.solve(x[:5].T @ x[:5] + 0.5 * torch.eye(12), x[:5].T @ y[:5]))


def test_a_collapsed_run_stops_and_names_the_last_healthy_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = ends.begin

    def constant(config: PretrainConfig) -> Any:
        encoder, parent = begin(config)
        last: Any = list(encoder.net.modules())[-1]
        last.register_forward_hook(lambda module, given, out: torch.ones_like(out) + 0 * out)
        return encoder, parent

    shards = write(tmp_path / "shards")
    plan = tree("simclr", shards, "constant", epochs=40, max_steps=80, log_every_steps=10, checkpoint_every_steps=5)
    config = parse(plan | {"out": str(tmp_path / "out")}, PretrainConfig, "test")
    assert (
        run(config.model_copy(update={"recipe": config.recipe.model_copy(update={"max_steps": 5})}), LocalContext(dir=str(tmp_path)))
        is not None
    )
    for leftover in ("result.json", "attempts.json"):
        (tmp_path / "out" / leftover).unlink()
    monkeypatch.setattr(ends, "begin", constant)
    with pytest.raises(WorkError, match=r"representation collapsed by step 50 .* last checkpoint before: .*step-00000005"):
        run(config, LocalContext(dir=str(tmp_path)))
    assert metrics(tmp_path / "out")[-1]["health"] == "collapsed"
    assert not storage.exists(str(tmp_path / "out" / "result.json"))


def test_batches_and_state_of_a_loss_that_is_not_finite_replay(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shards = write(tmp_path / "shards")
    plan = tree("simclr", shards, "diverged", **{"optimizer": {"name": "sgd", "lr": 1e30, "warmup_epochs": 0}})
    config = parse(plan | {"out": str(tmp_path / "out")}, PretrainConfig, "test")
    with pytest.raises(WorkError, match=r"on rank \[0\], 3 steps in a row"):
        run(config, LocalContext(dir=str(tmp_path)))
    places = sorted((tmp_path / "out" / "not-finite").iterdir())
    assert len(places) == 3
    held = load_file(places[0] / "rank0.safetensors")
    assert {"index_B", "view0", "view1"} <= held.keys()
    from pretrain import methods

    encoder, _ = ends.begin(config)
    method = methods.build("simclr", encoder, config.recipe.options, methods.Facts(seed=3, samples=100, global_batch=32))
    method.load_state_dict(load_file(places[0] / "model.safetensors"))
    again = method(SimpleNamespace(views=[held["view0"], held["view1"]]))
    assert not bool(torch.isfinite(again.loss))


def test_counting_prototypes_reads_nothing_back_from_the_device() -> None:
    """A meta tensor has no values that could be read."""
    window, p_BK = probes.Window(), torch.eye(4)[[0, 0, 2]]
    for _ in range(2):
        window.count({"prototypes": p_BK})
    assert window.state["use_K"].tolist() == pytest.approx([2 * (1 + probes.KEPT_USE), 0, 1 + probes.KEPT_USE, 0])
    window = probes.Window()
    for _ in range(2):
        window.count({"prototypes": p_BK.to("meta")})
    assert window.state["use_K"].is_meta
