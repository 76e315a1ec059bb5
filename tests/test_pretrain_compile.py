"""`compile: true`: the losses of eager execution, the names of its tensors, and a resume.

Graphs are captured and differentiated as for any backend; the last step, minutes of a C++ compiler, is benchmarks/compiled.py's.
"""

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain_run import metrics, tree
from tiny_corpus import write
from torch import nn
from two_ranks import StopAt

from base.config import parse
from encoders.export import read_export
from encoders.weights import load_local
from engine.context import LocalContext
from pretrain import methods
from pretrain.loop import Run
from pretrain.run import PretrainConfig, run

ALONE = {"start_from": None, "start_from_sha256": None, "start_from_name": None}


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_compiled_run_is_the_eager_one(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    shards, short = write(tmp_path / "shards"), {"epochs": 4, "global_batch": 20, "max_steps": 6, "checkpoint_every_steps": 3}
    configs = {}
    for name in ("eager", "compiled"):
        plan = tree("simclr", shards, name, **short, log_every_steps=1, compile=name == "compiled") | ALONE
        configs[name] = parse(plan | {"architecture": architecture, "out": str(tmp_path / name)}, PretrainConfig, "test")
    assert run(configs["eager"], LocalContext(dir=str(tmp_path / "log"))) is not None
    assert run(configs["compiled"], StopAt(0, 1, tmp_path, 2)) is None  # stopped after its checkpoint of step 3
    assert run(configs["compiled"], LocalContext(dir=str(tmp_path / "log"))) is not None
    eager, compiled = (metrics(tmp_path / name) for name in ("eager", "compiled"))
    assert [row["step"] for row in compiled] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=1e-3)
    names = [str(tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors") for name in ("eager", "compiled")]
    first, second = (load_local(name) for name in names)
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    exports = [load_local(tmp_path / name / "export") for name in ("eager", "compiled")]
    assert exports[0].keys() == exports[1].keys()
    assert read_export(tmp_path / "compiled" / "export").architecture == architecture


@pytest.mark.parametrize("name", ["simclr", "densecl", "mae", "simmim", "ijepa", "dinov2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_method_calls_of_its_encoder_is_compiled(
    name: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some go through the transformer's blocks or the network's last map, and not by the network's own call."""
    torch._dynamo.reset()
    reached: set[int] = set()

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            reached.update(id(value) for value in given)
            return graph.forward(*given)

        return count

    vit = methods.method_class(name).only == "vit"
    if checkpointing and not vit:
        pytest.skip("not with batch norm")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    plan = tree(name, write(tmp_path / "shards"), name, compile=True, activation_checkpointing=checkpointing) | ALONE
    plan |= {"architecture": "test_vit" if vit else "test_resnet", "out": str(tmp_path / "out")}
    one = Run(parse(plan, PretrainConfig, "test"), LocalContext(dir=str(tmp_path)))
    one._build()
    one.method(next(iter(one.loader.batches(0))))
    inside: Any = one.method.encoder.net.blocks if vit else one.method.encoder.net  # type: ignore[union-attr]
    assert {id(layer.weight) for layer in inside.modules() if isinstance(layer, nn.Conv2d | nn.Linear)} <= reached
