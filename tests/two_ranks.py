"""Runs checks in two gloo processes that see different data: `two_ranks("engine", folder)` starts them and returns what rank 0 saved.

Each process pays seconds of imports, so one pair does all checks of a room and writes its tensors to `<folder>/rank<r>.safetensors`.
The same functions run in the test's own process as the reference: one rank with the whole batch.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
BATCH, LABELS, SAMPLES = 8, 3, 24


class TinyEncoder(nn.Module):
    """Two convolutions with norms: enough for gradients through statistics of the global batch."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 12
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),  # a bias before a norm has no gradient but rounding
            nn.BatchNorm2d(12),
            nn.ReLU(),
        )

    def features(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.features(x))


def batch(rank: int, world: int, sizes: Sequence[int] = (16, 16)) -> Any:
    """This rank's part of a batch of 8; the first half knows almost all labels, the second few, so a mean per rank would be wrong."""
    random = np.random.default_rng(3)
    views = [torch.from_numpy(random.integers(0, 256, (BATCH, 1, size, size), dtype=np.uint8)) for size in sizes]
    target = torch.from_numpy(random.integers(0, 2, (BATCH, LABELS)).astype(np.float32))
    mask = torch.ones(BATCH, LABELS)
    mask[BATCH // 2 :, 1:] = 0
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    index, epoch = torch.arange(SAMPLES - BATCH, SAMPLES), torch.zeros(BATCH, dtype=torch.int64)
    labels = {"target_BL": target[mine], "mask_BL": mask[mine]}
    return SimpleNamespace(views=[v[mine] for v in views], index_B=index[mine], epoch_B=epoch[mine], **labels)


def norm_case(rank: int, world: int) -> dict[str, Tensor]:
    """Outputs, input and weight gradients and running statistics of every kind of norm, for this rank's part."""
    from timm.layers import BatchNormAct2d

    from engine import norm, ranks

    out: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "2d": (nn.BatchNorm2d(5), (6, 5, 4, 3)),
        "1d": (nn.BatchNorm1d(5), (6, 5)),
        "plain": (nn.BatchNorm2d(5, affine=False, momentum=None), (6, 5, 4, 3)),
        "act": (BatchNormAct2d(5, act_layer=nn.SiLU, inplace=False), (6, 5, 4, 3)),
    }
    for name, (layer, shape) in kinds.items():
        whole = torch.randn(shape, generator=generator) * 3 + 50  # a mean far from 0: raw moments in float32 would fail here
        weight = torch.randn(shape, generator=generator)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mine = slice(rank * shape[0] // world, (rank + 1) * shape[0] // world)
        if len(shape) == 4 and name == "act":
            whole = whole.contiguous(memory_format=torch.channels_last)
        x = whole[mine].clone().requires_grad_()
        layer = norm.convert(layer)
        for _ in range(2):
            y = layer(x)
        grads = torch.autograd.grad((y.sin() * weight[mine]).sum(), [x, *layer.parameters()])
        out |= {f"{name}.y": ranks.all_gather(y), f"{name}.dx": ranks.all_gather(grads[0])}
        out |= {f"{name}.dw{i}": ranks.all_sum(grad) for i, grad in enumerate(grads[1:])}
        out |= {f"{name}.{key}": value.clone() for key, value in layer.state_dict().items()}
    return out


def make_method(name: str, samples: int = 24) -> tuple[Any, tuple[int, ...]]:
    """A method as its smoke recipe has it, around a tiny encoder, and the sizes of its views."""
    from encoders.build import build
    from engine import norm
    from pretrain import methods
    from pretrain.recipe import load_recipe

    recipe, kind = load_recipe(f"{name}/smoke"), methods.method_class(name)
    sizes = tuple(recipe.views.sizes)
    encoder = build("test_vit", 1, seed=0, image_size=sizes[0]) if kind.only == "vit" else TinyEncoder()
    known: dict[str, Any] = {"labels": tuple("abc"[:LABELS]), "rates": (0.5,) * LABELS, "known": (1.0,) * LABELS, "exclusive": ((1, 2),)}
    facts = methods.Facts(0, samples, BATCH, sizes, **known)
    options = recipe.options | ({"prototypes": samples} if name.startswith("dino") else {})  # no more than there are images
    method = methods.build(name, encoder, options, facts)
    for network in (method, *method.teachers.values()):
        norm.convert(network)
        network.train()
    return method, sizes


def method_case(name: str, rank: int, world: int, zero_stage: int = 0) -> dict[str, Tensor]:
    """Loss of one batch and the update by plain SGD at rate 1: its change of the weights is minus the gradient of the global loss.

    Then the teachers and the loss of the same batch at the next step, which has passed through queues, banks and teachers.
    """
    from engine import ranks
    from engine.config import EngineConfig, OptimizerConfig
    from engine.step import Engine
    from pretrain import methods, probes

    torch.manual_seed(0)
    method, sizes = make_method(name, SAMPLES)
    config = EngineConfig(optimizer=OptimizerConfig(name="sgd", lr=1.0, momentum=0.0, schedule="constant"), zero_stage=zero_stage)
    engine = Engine(method, config, rank_batch=BATCH // world, warmup_steps=0, total_steps=2)
    corpus = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (SAMPLES, 1, sizes[0], sizes[0]), dtype=np.uint8))

    def embed(network: Any) -> tuple[Tensor, Tensor]:
        method.eval()
        with torch.no_grad():
            found = network(corpus).float()
        method.train()
        return torch.arange(SAMPLES), found

    method.clock = methods.Clock(0, 2, 1)
    method.on_epoch_start(embed)
    before, out = engine.model_state(), {}
    for step in range(2):
        method.clock = methods.Clock(step, 2, 2)
        output = engine.forward(batch(rank, world, sizes))
        out[f"{name}.loss{step}"] = (ranks.all_sum(output.loss.detach()) / world).reshape(1)
        if step:
            break
        window, seen = probes.Window(), batch(rank, world, sizes)
        window.count(output.features)
        row = window.measure(output.features, seen)
        engine.step(output.loss, 0)
        trained = dict(method.named_parameters())
        out |= {f"{name}.{key}": before[key] - value for key, value in engine.model_state().items() if key in trained}
        method.on_step_end()
        out |= {f"{name}.{key}": value for key, value in engine.model_state().items() if key not in trained}
        out |= {f"{name}.teacher.{t}.{k}": v.clone() for t, teacher in method.teachers.items() for k, v in teacher.state_dict().items()}
    return out | {f"{name}.probe.{key}": torch.tensor([value]) for key, value in row.items()}


def engine_job(rank: int, world: int, folder: Path) -> None:
    """All checks of the engine room."""
    from safetensors.torch import save_file

    from engine import checkpoint, ranks
    from engine.checkpoint import Snapshot
    from engine.saved import State

    ranks.start()
    tensors = norm_case(rank, world)
    module = nn.BatchNorm2d(3)
    facts: dict[str, Any] = {"equal": ranks.differing_buffers(module), "modules": sorted({name.split(".")[0] for name in sys.modules})}
    with torch.no_grad():
        module.running_mean.add_(rank)  # type: ignore[union-attr]
    facts["apart"] = ranks.differing_buffers(module)
    state = State.model_validate_json((ROOT / "tests" / "golden" / "checkpoint_state.json").read_text())
    snapshot = Snapshot(4, {"w": torch.arange(3.0)}, {}, state, {"mine": torch.tensor([rank])})
    saver = checkpoint.Saver(str(folder / "checkpoints"))
    saver.save(snapshot)
    saver.finish()
    ranks.barrier()
    found = checkpoint.find_newest(str(folder / "checkpoints"))
    assert found is not None
    facts["mine"] = int(checkpoint.load(found).mine["mine"])
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


def methods_job(rank: int, world: int, folder: Path) -> None:
    """One step of every method named in `<folder>/methods.json`."""
    from safetensors.torch import save_file

    from engine import ranks

    ranks.start()
    for name in json.loads((folder / "methods.json").read_text()):
        tensors = method_case(name, rank, world)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}-rank{rank}.safetensors")


class StopAt:
    """A context that asks to stop once the run has reported a step; only rank 1 asks, so the ranks must agree."""

    def __init__(self, rank: int, world: int, dir: Path, step: int | None) -> None:
        self.rank, self.world_size, self.dir, self.step, self.asked = rank, world, str(dir), step, False

    def report(self, row: dict[str, Any]) -> None:
        if self.step is not None and row["step"] >= self.step and self.rank == self.world_size - 1:
            self.asked = True

    def should_stop(self) -> str | None:
        return "test" if self.asked else None


def pretrain_job(rank: int, world: int, folder: Path) -> None:
    """One run undisturbed, the same stopped after step 6 and called again, for each configuration in `<folder>/configs.json`."""
    from base.config import parse
    from pretrain.run import PretrainConfig, run

    facts: list[list[Any]] = []
    for tree in json.loads((folder / "configs.json").read_text()):
        if tree.get("start_from") == "previous":
            came = {
                "start_from": str(folder / f"whole-{facts[-1][0]['name']}" / "export"),
                "start_from_sha256": facts[-1][0]["encoder_sha256"],
            }
            tree |= came
        whole = parse(tree | {"out": str(folder / f"whole-{tree['name']}")}, PretrainConfig, "test")
        cut = parse(tree | {"out": str(folder / f"cut-{tree['name']}")}, PretrainConfig, "test")
        first = run(whole, StopAt(rank, world, folder, None))
        stopped = run(cut, StopAt(rank, world, folder, 6))
        torch.rand(7)  # whatever the process drew in between must not matter
        second = run(cut, StopAt(rank, world, folder, None))
        again = run(cut, StopAt(rank, world, folder, None))
        facts.append([first, stopped, second, again])
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


def resumed_job(rank: int, world: int, folder: Path) -> None:
    """One run undisturbed, and another that goes on from its checkpoint of step 6, for each configuration in `<folder>/configs.json`; with
    `"resumed": false` the first alone."""
    from base.config import parse
    from engine import ranks
    from pretrain.run import PretrainConfig, run

    facts: list[list[Any]] = []
    for tree in json.loads((folder / "configs.json").read_text()):
        resumed, places = tree.pop("resumed", True), [folder / f"{kind}-{tree['name']}" for kind in ("whole", "cut")]
        whole, cut = (parse(tree | {"out": str(place)}, PretrainConfig, "test") for place in places)
        facts.append([run(whole, StopAt(rank, world, folder, None))])
        if resumed:
            if rank == 0:
                standing_at(places[0], places[1], 6)
            ranks.barrier()
            torch.rand(7)  # whatever the process drew in between must not matter
            facts[-1].append(run(cut, StopAt(rank, world, folder, None)))
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


def standing_at(source: Path, target: Path, step: int) -> None:
    """Copy a finished run's folder as it was when the checkpoint of that step was its newest."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("result.json", "export"))
    for place in (target / "checkpoints").iterdir():
        if int(place.name[5:]) > step:
            shutil.rmtree(place)
    assert (target / "checkpoints" / f"step-{step:08d}" / "COMMIT").exists()
    rows = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= step))


def spoil(put: Callable[[Any, str, Any], None], steps: Mapping[int, str], rank: int = 0) -> None:
    """Makes runs meet a NaN on that rank, where they stand at such a step: in the `images`, in the `loss`, or in a `gradient` alone."""
    from engine import ranks
    from pretrain import methods

    build = methods.build

    def built(*args: Any, **named: Any) -> Any:
        method: Any = build(*args, **named)
        met = lambda kind: steps.get(method.clock.step) == kind and ranks.rank() == rank  # noqa: E731
        first = next(layer for layer in method.encoder.net.modules() if isinstance(layer, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, x: (x[0] * float("nan"),) if met("images") else None)
        method.register_forward_hook(lambda _, x, out: out._replace(loss=out.loss * float("nan")) if met("loss") else None)
        for parameter in method.encoder.net.parameters():
            parameter.register_hook(lambda gradient: gradient * float("nan") if met("gradient") else None)
        return method

    put(methods, "build", built)


def spoiled_job(rank: int, world: int, folder: Path) -> None:
    """Two runs: rank 1's loss is not finite at the third step, and from the third step on."""
    from base.config import parse
    from base.errors import WorkError
    from pretrain import methods
    from pretrain.run import PretrainConfig, run

    told: list[Any] = []
    build = methods.build
    for tree, steps in zip(json.loads((folder / "configs.json").read_text()), ([2], range(2, 99)), strict=True):
        methods.build = build
        spoil(setattr, dict.fromkeys(steps, "loss"), rank=1)
        config = parse(tree | {"out": str(folder / tree["name"])}, PretrainConfig, "test")
        try:
            told.append(run(config, StopAt(rank, world, folder, None)))
        except WorkError as error:
            told.append(str(error))
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


def two_ranks(job: str, folder: Path, timeout: float = 240) -> None:
    """Run a job in two processes; raises with their output when one fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, str(Path(__file__).resolve()), job, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    (folder / "output.txt").write_text("\n".join(outputs))
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in outputs)


def main() -> None:
    job, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{job}", rank=rank, world_size=2)
    jobs = {"engine": engine_job, "methods": methods_job, "pretrain": pretrain_job, "resumed": resumed_job, "spoiled": spoiled_job}
    jobs[job](rank, 2, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
