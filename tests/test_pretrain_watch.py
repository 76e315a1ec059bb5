"""Steps whose loss is not finite: named, written down, skipped without a trace; the third in a row ends the run, on every device alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain_run import metrics, tree
from tiny_corpus import write
from two_ranks import StopAt, spoil, two_ranks

from base.config import parse
from base.errors import WorkError
from engine.context import LocalContext
from engine.schedules import Plateau
from pretrain.run import PretrainConfig, run

ALONE = {"start_from": None, "start_from_sha256": None, "start_from_name": None}
SHORT = {"epochs": 4, "global_batch": 20, "max_steps": 8, "checkpoint_every_steps": 4, "log_every_steps": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config(folder: Path, method: str, **settings: Any) -> PretrainConfig:
    plan = tree(method, write(folder / "shards"), method, **SHORT | settings) | ALONE
    return parse(plan | {"out": str(folder / "out")}, PretrainConfig, "test")


def events(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == "not finite"]


def states(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {f"{path.stem} {name}": value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("method", ["moco-v2", "densecl", "insdis", "swav", "deepcluster-v2", "dino", "supervised"])
def test_one_bad_batch_is_skipped_and_leaves_nothing_behind(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not repeat a run whose weights look sound and whose batch-norm statistics are NaN for ever, which no training loss shows."""
    spoil(monkeypatch.setattr, {2: "images"})
    queue = {"options": {"queue": 40, "queue_epoch": 0}} if method == "swav" else {}
    one = config(tmp_path, method, stop_when_collapsed=False, **queue)
    result = run(one, LocalContext(dir=str(tmp_path)))
    out = Path(one.out)
    assert result is not None
    assert [(event["step"], event["why"]) for event in events(out)] == [(3, "the loss on rank [0]")]
    assert [row["step"] for row in metrics(out)] == [1, 2, 4, 5, 6, 7, 8]
    last = states(out, 8)
    assert any("running_var" in name for name in last)
    assert all(bool(torch.isfinite(value).all()) for value in last.values() if value.is_floating_point())
    if method == "moco-v2":
        assert int(last["model queue.place"]) == 7 * 20 % len(last["model queue.keys_Kd"])
    held = load_file(out / "not-finite" / "step-00000003" / "rank0.safetensors")
    assert held["index_B"].shape == (20,)
    place = out / "not-finite" / "step-00000003"
    before = load_file(place / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in before.values() if value.is_floating_point())
    teachers = {name for name in last if name.startswith("ema ")}
    kept = {f"ema {name}" for name in load_file(place / "ema.safetensors")} if teachers else set()
    assert kept == teachers  # without them the step could not be computed again


@pytest.mark.parametrize("kind", ["loss", "images"])
def test_the_third_in_a_row_ends_the_run_at_its_last_sound_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps are seldom logged: every step is looked at."""
    spoil(monkeypatch.setattr, {2: kind, 4: kind, 5: kind, 6: kind})
    one = config(tmp_path, "simclr", log_every_steps=100)
    with pytest.raises(WorkError, match=r"not finite at step 7 on rank \[0\], 3 steps in a row"):
        run(one, LocalContext(dir=str(tmp_path)))
    assert [event["step"] for event in events(Path(one.out))] == [3, 5, 6, 7]
    assert sorted(path.name for path in Path(one.out, "checkpoints").iterdir()) == ["step-00000004"]


def test_a_run_that_was_killed_before_it_said_what_it_is_says_so_later(tmp_path: Path) -> None:
    """Between its two first files: it was never shown, registered or gone on with by its own configuration."""
    one = config(tmp_path, "simclr", max_steps=2)
    Path(one.out).mkdir(parents=True)
    Path(one.out, "attempts.json").write_text('{"attempts": 1, "at": "2026-01-01T00:00:00Z"}')
    assert run(one, LocalContext(dir=str(tmp_path))) is not None
    assert Path(one.out, "config.yaml").exists()


def test_a_stop_at_a_skipped_step_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch.setattr, {2: "images"})
    one = config(tmp_path, "simclr", checkpoint_every_steps=100)
    assert run(one, StopAt(0, 1, tmp_path, 2)) is None
    assert [path.name for path in Path(one.out, "checkpoints").iterdir()] == ["step-00000003"]


def test_a_plateau_counts_epochs_whose_last_step_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sum ran into the next epoch, which was then one epoch less to be patient for."""
    seen: list[float] = []
    observe = Plateau.observe

    def noted(self: Plateau, loss: float) -> None:
        seen.append(loss)
        observe(self, loss)

    plateau = {"name": "adamw", "lr": 1e-3, "schedule": "plateau"}
    for folder, steps in (("whole", ()), ("spoiled", (4,))):  # 86 images in steps of 20: an epoch ends with its fifth
        monkeypatch.undo()
        monkeypatch.setattr(Plateau, "observe", noted)
        spoil(monkeypatch.setattr, dict.fromkeys(steps, "images"))
        assert run(config(tmp_path / folder, "simclr", optimizer=plateau, max_steps=10), LocalContext(dir=str(tmp_path))) is not None
    assert len(seen) == 4


def test_micro_batches_before_it_end_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch.setattr, {2: "loss"})
    one = config(tmp_path, "simclr", accumulate=2)
    with pytest.raises(WorkError, match=r"not finite at step 3 on rank \[0\], and micro-batches before it have left their gradients"):
        run(one, LocalContext(dir=str(tmp_path)))
    held = load_file(Path(one.out) / "not-finite" / "step-00000003" / "rank0.safetensors")
    assert held["index_B"].shape == (10,)


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch.setattr, {3: "gradient"})
    one = config(tmp_path, "simclr", checkpoint_every_steps=2)
    with pytest.raises(WorkError, match=r"not finite at step 4: encoder\.net\.\S+, .* and \d+ more"):
        run(one, LocalContext(dir=str(tmp_path)))
    assert [path.name for path in Path(one.out, "checkpoints").iterdir()] == ["step-00000002"]


def test_nothing_that_is_not_finite_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch.setattr, {7: "gradient"})
    one = config(tmp_path, "simclr", checkpoint_every_steps=0)
    with pytest.raises(WorkError, match="not finite at step 8"):
        run(one, LocalContext(dir=str(tmp_path)))
    assert not Path(one.out, "export").exists()


def test_two_ranks_skip_together_what_one_of_them_found(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards")
    trees = [tree("simclr", shards, name, **SHORT) | ALONE for name in ("once", "always")]
    (tmp_path / "configs.json").write_text(json.dumps(trees))
    two_ranks("spoiled", tmp_path)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert "not finite at step 5 on rank [1], 3 steps in a row" in told[0][1]
    for name, steps in (("once", [3]), ("always", [3, 4, 5])):
        assert [(event["step"], event["why"]) for event in events(tmp_path / name)] == [(step, "the loss on rank [1]") for step in steps]
        place = tmp_path / name / "not-finite" / "step-00000003"
        assert {path.name for path in place.iterdir()} == {f"rank{r}.{kind}" for r in (0, 1) for kind in ("json", "safetensors")} | {
            "model.safetensors"
        }
