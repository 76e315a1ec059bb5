"""The engine room in one process: schedules, losses, optimiser, step, checkpoints, context, speed."""

import json
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from base import storage
from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from engine import checkpoint, losses, optimizers, ranks, schedules, zero
from engine.ahead import ahead
from engine.checkpoint import Snapshot
from engine.config import EngineConfig, OptimizerConfig
from engine.context import LocalContext
from engine.saved import RunState, State
from engine.step import Engine, rank_batch
from engine.throughput import Meter


@given(
    total=st.integers(1, 500), warmup=st.integers(0, 100), final=st.floats(0, 1), shape=st.sampled_from(["cosine", "linear", "constant"])
)
@settings(max_examples=60, deadline=None)
def test_schedule_warms_up_then_never_rises(total: int, warmup: int, final: float, shape: schedules.Shape) -> None:
    values = [schedules.factor(step, total, warmup, shape, final) for step in range(total)]
    assert all(0 <= value <= 1 + 1e-9 for value in values)
    assert all(a <= b + 1e-12 for a, b in pairwise(values[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(values[warmup:]))
    if shape != "constant" and total > warmup + 1:
        assert math.isclose(values[-1], final, abs_tol=1e-9)


def test_label_loss_is_the_mean_over_known_answers() -> None:
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    target, mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    terms = [math.log1p(math.exp(-0.3)), math.log1p(math.exp(-1.0)), math.log1p(math.exp(-0.5))]
    loss = losses.label_loss(logits, target, mask)
    assert math.isclose(float(loss.detach()), sum(terms) / 3, rel_tol=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1, 0] == 0
    nothing = losses.label_loss(logits, target, torch.zeros(2, 2))
    assert float(nothing.detach()) == 0
    half = torch.tensor([0.5, 0.5])
    assert math.isclose(losses.least_constant(half, torch.ones(2)), math.log(2), rel_tol=1e-6)


def test_a_set_of_classes_is_one_answer_and_the_best_constant_is_what_frequencies_score() -> None:
    """Label 0 stands alone; 1 to 3 are classes, unknown for the second half."""
    generator = torch.Generator().manual_seed(0)
    n, group = 600, (1, 2, 3)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=generator)
    alone = (torch.rand(n, generator=generator) < 0.2).float()
    target = torch.cat([alone[:, None], torch.nn.functional.one_hot(which, 3).float()], dim=1)
    mask = torch.ones(n, 4)
    mask[n // 2 :, 1:] = 0
    logits = torch.randn(n, 4, generator=generator)
    terms = [torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], alone, reduction="sum")]
    terms.append(torch.nn.functional.cross_entropy(logits[: n // 2, 1:], which[: n // 2], reduction="sum"))
    assert float(losses.label_loss(logits, target, mask, [group])) == pytest.approx(float(sum(terms)) / (n + n // 2), rel=1e-5)
    rates, known = (target * mask).sum(0) / mask.sum(0), mask.mean(0)
    best = torch.cat([(rates[:1] / (1 - rates[:1])).log(), rates[1:].log()]).expand(n, 4)
    expected = losses.least_constant(rates, known, [group])
    assert float(losses.label_loss(best, target, mask, [group])) == pytest.approx(expected, rel=1e-4)
    assert float(losses.label_loss(best + 0.1 * torch.randn(4, generator=generator), target, mask, [group])) > expected


def test_batch_must_divide_and_lars_needs_whole_tensors() -> None:
    assert rank_batch(96, 4) == 24
    with pytest.raises(RequestError, match=r"96 does not divide over 5 workers.*global_batch=95"):
        rank_batch(96, 5)
    assert rank_batch(96, 4, 8) == 24
    with pytest.raises(RequestError, match=r"24 does not divide over 2 workers in 8 micro-batches each.*accumulate=6, or global_batch=16"):
        rank_batch(24, 2, 8)
    with pytest.raises(ValidationError, match="silently wrong"):
        EngineConfig(optimizer=OptimizerConfig(name="lars", lr=1.0, weight_decay=1e-6), zero_stage=1)
    with pytest.raises(ValidationError, match="plain sgd"):
        OptimizerConfig(name="lars", lr=1.0)


def test_a_decay_that_would_never_move_or_end_as_plain_sgd_is_refused() -> None:
    """At a decay of 0 the last step of LARS was 200 times as long as those before it; a decay from 0 on stayed 0."""
    with pytest.raises(ValidationError, match="weight_decay_end moves a weight_decay above 0"):
        OptimizerConfig(lr=1.0, weight_decay_end=0.4)
    for name in ("lars", "lamb"):
        with pytest.raises(ValidationError, match=f"{name} needs a weight_decay_end above 0"):
            OptimizerConfig(name=name, lr=1.0, weight_decay=1e-6, weight_decay_end=0.0)
    assert OptimizerConfig(lr=1.0, weight_decay=0.1, weight_decay_end=0.0).weight_decay_end == 0


def test_no_decay_on_biases_and_norms() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, spared = optimizers.groups(net, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in decayed["params"]] == [4]
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 3
    for name in ("adamw", "sgd", "lars", "lamb"):
        assert optimizers.make(net, OptimizerConfig(name=name, lr=0.1, weight_decay=1e-6)).param_groups[0]["lr"] == 0.1


def small_engine(
    seed: int, name: str = "adamw", zero_stage: int = 0, state: dict[str, torch.Tensor] | None = None, precision: str = "fp32"
) -> Engine:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    if state is not None:
        net.load_state_dict(state)
    config = EngineConfig(
        optimizer=OptimizerConfig(name=name, lr=0.05, weight_decay=0.01, clip=1.0), zero_stage=zero_stage, precision=precision
    )
    return Engine(net, config, rank_batch=6, warmup_steps=2, total_steps=9)


def test_alone_gradients_are_not_copied_for_an_average_and_what_has_none_decays_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(0)
    monkeypatch.setattr(engine._engine, "allreduce_gradients", lambda: pytest.fail("nobody to average with"))
    still, moved = engine.module[0].bias, engine.module[3].weight  # type: ignore[index]
    before = still.detach().clone(), moved.detach().clone()
    engine.step((moved.square().sum()), 5)
    assert not torch.equal(moved, before[1])
    torch.testing.assert_close(still, before[0])  # a bias has no decay
    unused = engine.module[0].weight  # type: ignore[index]
    kept = unused.detach().clone()
    engine.step((moved.square().sum()), 5)
    torch.testing.assert_close(unused, kept * (1 - engine.rate(5) * 0.01))


def test_a_step_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's timer of its throughput, which nobody reads, waited twice in every step from the third on."""
    from deepspeed.accelerator import get_accelerator

    waited: list[int] = []
    engine = small_engine(0)
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *given: waited.append(1))
    steps(engine, 0, 6)
    assert not waited


def steps(engine: Engine, first: int, last: int) -> list[float]:
    seen = []
    for step in range(first, last):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = (engine.forward(x) - x.sum(dim=1, keepdim=True)).square().mean()
        engine.step(loss, step, measure=True)
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_resume_is_bit_identical(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    whole = small_engine(0, name)
    expected = steps(whole, 0, 9)
    first = small_engine(0, name)
    begun = steps(first, 0, 4)
    tensors, values = first.optimizer_state()
    save(str(tmp_path), Snapshot(4, first.model_state(), tensors, said(optimizer_values=values), checkpoint.random_state()))
    second = small_engine(1, name)
    found = checkpoint.find_newest(str(tmp_path))
    assert found is not None
    snapshot = checkpoint.load(found)
    second.module.load_state_dict(snapshot.model)
    second.load_optimizer_state(snapshot.optimizer, snapshot.state.optimizer_values)
    checkpoint.restore_random_state(snapshot.mine)
    assert begun + steps(second, 4, 9) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.model_state().values(), second.model_state().values(), strict=True))


def test_clipping_and_rate_follow_the_configuration() -> None:
    engine = small_engine(0)
    x = torch.randn(6, 4)
    norm = engine.step((engine.forward(x) * 1e3).square().mean(), 0, measure=True)
    assert norm is not None
    assert norm > 1
    assert engine.rate(0) == pytest.approx(0.025)
    assert engine.rate(8) == pytest.approx(0.0)


def said(**changes: Any) -> RunState:
    """What a run says of itself in a checkpoint."""
    return parse(storage.read_json(str(ROOT / "tests" / "golden" / "checkpoint_state.json")) | changes, State, "golden")


def save(url: str, snapshot: Snapshot) -> str:
    saver = checkpoint.Saver(url, keep=2)
    place = saver.save(snapshot)
    saver.finish()
    return place


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitioned_states_resume_bit_identical_at_any_stage(stage: int) -> None:
    torch.set_num_threads(1)
    whole = small_engine(0, zero_stage=stage)
    expected = steps(whole, 0, 6)
    assert expected == pytest.approx(steps(small_engine(0), 0, 6), rel=1e-5)
    first = small_engine(0, zero_stage=stage)
    begun, state, held = steps(first, 0, 3), first.optimizer_state(), first.model_state()
    for later in (stage, 0):
        second = small_engine(1, zero_stage=later, state=held)
        second.load_optimizer_state(*state)
        assert begun + steps(second, 3, 6) == (expected if later else pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gathers_and_averages_in_float32_at_every_stage(stage: int) -> None:
    """Does not repeat DeepSpeed's default of bf16 for linear layers and convolutions above stage 0."""
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    engine = small_engine(0, zero_stage=stage, precision="bf16")
    assert {get_comm_dtype(p) for p in engine.module.parameters()} == {torch.float32}
    assert steps(engine, 0, 3) == pytest.approx(steps(small_engine(0), 0, 3), rel=0.05)
    assert engine.forward(torch.randn(6, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_changed_after_an_update_stays_changed_at_every_stage(stage: int) -> None:
    """SwAV's prototypes grew above stage 0: the next update began from the optimiser's own copy of them."""
    torch.set_num_threads(1)
    plain, cut_up = small_engine(0), small_engine(0, zero_stage=stage)
    seen = []
    for engine in (plain, cut_up):
        losses = []
        for step in range(4):
            losses += steps(engine, step, step + 1)
            zero.change(engine.module[0].weight, nn.functional.normalize)  # type: ignore[index]
            torch.testing.assert_close(engine.model_state()["0.weight"].norm(dim=1), torch.ones(8))
        seen.append(losses)
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"w": torch.full((2,), float(step))}, {"exp_avg|w": torch.ones(2)}, said(), {"r": torch.zeros(1)})


@pytest.mark.parametrize("damage", ["flip", "missing", "uncommitted", "garbage"])
def test_newest_whole_checkpoint_is_found_over_damaged_ones(tmp_path: Path, damage: str) -> None:
    url = str(tmp_path / "c")
    assert checkpoint.find_newest(url) is None
    for step in (3, 12):
        place = Path(save(url, snapshot(step)))
    model = place / "model.safetensors"
    if damage == "flip":
        raw = bytearray(model.read_bytes())
        raw[-1] ^= 1
        model.write_bytes(raw)
    elif damage == "missing":
        model.unlink()
    elif damage == "uncommitted":
        (place / "COMMIT").unlink()
    else:
        (place / "COMMIT").write_text("{")
    found = checkpoint.find_newest(url)
    assert found is not None
    assert found.step == 3
    assert "step-00000012" in found.refused[0]
    assert float(checkpoint.load(found).model["w"][0]) == 3
    save(url, snapshot(12))  # the same step is written again, over the damaged folder
    again = checkpoint.find_newest(url)
    assert again is not None
    assert again.step == 12


def test_a_damaged_newest_one_does_not_take_the_place_of_those_that_are_whole(tmp_path: Path) -> None:
    """It counted as the newest, so that what was saved after it was removed as soon as it stood: nothing whole was left."""
    saver = checkpoint.Saver(str(tmp_path / "c"), keep=1)
    for step in (100, 200):
        saver.save(snapshot(step))
    saver.finish()
    (tmp_path / "c" / "step-00000200" / "model.safetensors").write_bytes(b"damaged")
    for step in (120, 140):
        saver.save(snapshot(step))
    saver.finish()
    assert storage.listing(saver.url) == ["step-00000140"]
    found = checkpoint.find_newest(saver.url)
    assert found is not None
    assert found.step == 140


def test_a_rank_fetches_no_other_ranks_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, fetched = "memory://engine-parts-of-ranks", list[str]()
    place = save(url, snapshot(1))
    storage.put(storage.join(place, "rank1.safetensors"), b"of another")
    found = checkpoint.Found(place, 1)
    get_file = storage.get_file

    def noted(given: str, local: str | Path) -> None:
        fetched.append(given.rsplit("/", 1)[-1])
        get_file(given, local)

    monkeypatch.setattr(storage, "get_file", noted)
    assert float(checkpoint.load(found).mine["r"][0]) == 0
    assert {"model.safetensors", "rank0.safetensors"} <= set(fetched)
    assert not {"rank1.safetensors", "rank0.done"} & set(fetched)


def test_last_k_are_kept_on_any_storage(tmp_path: Path) -> None:
    for url in (str(tmp_path / "c"), "memory://engine-checkpoints"):
        for step in range(1, 6):
            save(url, snapshot(step))
        assert storage.listing(url) == ["step-00000004", "step-00000005"]
        found = checkpoint.find_newest(url)
        assert found is not None
        loaded = checkpoint.load(found)
        assert float(loaded.model["w"][0]) == 5
        assert loaded.state == said(step=5, world_size=1)
        assert loaded.optimizer.keys() == {"exp_avg|w"}
        assert loaded.ema is None


def test_training_goes_on_while_a_checkpoint_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store: `save` returns at once, nothing is committed before all is there, the next save waits, an error reaches the run."""
    put_file = storage.put_file

    def slowly(local: str | Path, url: str) -> None:
        time.sleep(0.3)
        put_file(local, url)

    monkeypatch.setattr(storage, "put_file", slowly)
    saver = checkpoint.Saver(str(tmp_path / "c"), keep=2)
    started = time.perf_counter()
    saver.save(snapshot(1))
    assert time.perf_counter() - started < 0.2
    assert checkpoint.find_newest(saver.url) is None
    saver.save(snapshot(2))
    assert time.perf_counter() - started > 1.0
    found = checkpoint.find_newest(saver.url)
    assert found is not None
    assert found.step == 1
    saver.finish()

    def full(local: str | Path, url: str) -> None:
        raise WorkError("no space left", where=url)

    monkeypatch.setattr(storage, "put_file", full)
    saver.save(snapshot(3))
    with pytest.raises(WorkError, match="no space left"):
        saver.finish()
    found = checkpoint.find_newest(saver.url)
    assert found is not None
    assert found.step == 2


def test_the_best_and_the_last_sound_checkpoint_stay_beside_the_newest(tmp_path: Path) -> None:
    saver = checkpoint.Saver(str(tmp_path / "c"), keep=1)
    for step, score in enumerate([0.6, 0.8, None, 0.7], 1):
        saver.save(replace(snapshot(step), state=said(score=score, sound=step == 1)))
    saver.finish()
    assert storage.listing(saver.url) == ["step-00000001", "step-00000002", "step-00000004"]
    sound = checkpoint.newest_sound(saver.url)
    assert sound is not None
    assert sound.endswith("step-00000001")


def test_a_damaged_commit_is_no_checkpoint_and_stops_no_later_one(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    for step, text in ((1, "{"), (2, json.dumps({"schema": 2, "step": 2}))):
        Path(save(url, snapshot(step)), "COMMIT").write_text(text)
        assert checkpoint.find_newest(url) is None
        assert checkpoint.newest_sound(url) is None
    place = save(url, snapshot(3))
    assert [checkpoint.newest_sound(url), storage.listing(url)] == [place, ["step-00000003"]]


def test_the_newest_step_is_that_of_a_checkpoint_that_stands(tmp_path: Path) -> None:
    saver = checkpoint.Saver(str(tmp_path / "c"))
    assert checkpoint.newest_step(saver.url) == 0
    for step in (5, 10):
        saver.save(snapshot(step))
    saver.finish()
    (tmp_path / "c" / "step-00000010" / "COMMIT").unlink()  # as of a save that was cut off
    assert checkpoint.newest_step(saver.url) == 5


def test_random_state_survives(tmp_path: Path) -> None:
    state = checkpoint.random_state()
    expected = torch.rand(3)
    checkpoint.restore_random_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_local_context_appends_rows_of_rank_0(tmp_path: Path) -> None:
    LocalContext(0, 2, str(tmp_path)).report({"step": 1})
    LocalContext(1, 2, str(tmp_path)).report({"step": 1})
    LocalContext(0, 2, "memory://nowhere").report({"step": 1})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 1}]
    assert LocalContext().should_stop() is None


CPU = torch.device("cpu")


def test_batches_are_made_one_ahead_in_order_and_errors_come_through() -> None:
    made: list[int] = []
    seen = []
    for item in ahead(lambda i: made.append(i) or i * i, range(5), CPU):  # type: ignore[func-returns-value]
        seen.append(item)
        assert len(made) <= len(seen) + 1
    assert seen == [0, 1, 4, 9, 16]
    assert list(ahead(abs, [], CPU)) == []
    assert list(ahead(abs, [-7], CPU)) == [7]
    stream = ahead(lambda i: 1 // i, [1, 0], CPU)
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_items_are_asked_for_one_ahead_and_an_error_of_theirs_comes_through() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for i in range(5):
            asked.append(i)
            yield i
            if i == 2:
                raise WorkError("cannot be read", where="here")

    stream = ahead(abs, items(), CPU)
    assert [(next(stream), list(asked)) for _ in range(2)] == [(0, [0, 1]), (1, [0, 1, 2])]
    with pytest.raises(WorkError, match="cannot be read"):
        next(stream)


def test_who_stops_early_leaves_no_thread_and_the_items_are_let_go() -> None:
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            yield from range(5)
        finally:
            closed.append(True)

    for _ in ahead(abs, items(), CPU):
        break
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_item_that_was_made_is_held_no_longer() -> None:
    """A batch of the loader's lies in memory that it uses again."""

    class Lent:
        pass

    lent: list[weakref.ref[Lent]] = []

    def lend(_: int) -> Lent:
        one = Lent()
        lent.append(weakref.ref(one))
        return one

    stream = ahead(lambda item: None, map(lend, range(3)), CPU)
    next(stream)
    end = time.monotonic() + 10
    while any(one() for one in lent) and time.monotonic() < end:
        time.sleep(0.001)
    assert [one() for one in lent] == [None, None]


def test_what_a_gpu_makes_ahead_is_waited_for_by_its_stream_and_not_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's notes on CUDA semantics ask: made on another stream, an event waited for, the memory marked as used here."""
    beside: list[str] = []
    here: list[str] = []

    class OnGpu(Tensor):
        is_cuda = True

        def record_stream(self, stream: Any) -> None:
            here.append(f"{stream.name} uses {int(self)}")

    @contextmanager
    def inside(stream: Any) -> Iterator[None]:
        beside.append(f"on {stream.name}")
        yield
        beside.append("off")

    def make(i: int) -> tuple[list[Tensor], Tensor, None]:
        beside.append(f"make {i}")
        return [torch.tensor(i).as_subclass(OnGpu)], torch.tensor(-1), None

    def record_event() -> str:
        beside.append("event")
        return f"event {beside.count('event')}"

    side = SimpleNamespace(name="side", record_event=record_event)
    own = SimpleNamespace(name="own", wait_event=lambda event: here.append(f"own waits for {event}"))
    monkeypatch.setattr("engine.ahead._beside", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own)
    for i, ([_], _, _) in enumerate(ahead(make, range(3), torch.device("cuda"))):
        assert here == [said for j in range(i + 1) for said in (f"own waits for event {j + 1}", f"own uses {j}")]
    assert beside == [said for i in range(3) for said in ("on side", f"make {i}", "event", "off")]


def test_meter_counts_images_and_waiting() -> None:
    meter = Meter(8)
    with meter.waiting():
        pass
    meter.tick()
    meter.tick()
    row = meter.read()
    assert row["img_per_s"] > 0
    assert 0 <= row["data_wait"] <= 1
    assert ranks.world() == 1
