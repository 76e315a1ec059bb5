"""Parameters, operations and latency of what strategies make."""

from typing import Any

import pytest
import torch
from transplants import CHEST, SIDE, count, plant

from finetune import efficiency
from finetune.efficiency import cost
from finetune.strategies import resolve
from finetune.transplant import EncoderSpec


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Of the table in arXiv 2106.05152: ResNet-50 at 224 px, billions of multiply-accumulates.
PRINTED_GMACS = [
    ("full", {}, 4.12),
    ("truncated", {"cut": "layer3"}, 3.31),
    ("truncated", {"cut": "layer3.3"}, 2.87),
    ("slim", {"cut": "layer3"}, 3.56),
]


@pytest.mark.parametrize(("name", "options", "printed"), PRINTED_GMACS, ids=str)
def test_operations_are_those_of_the_published_table(name: str, options: dict[str, Any], printed: float) -> None:
    make, chosen = resolve({"name": name, **options})
    transplant = make.transplant(EncoderSpec(architecture="resnet50", in_chans=3), None, CHEST, chosen, 0)
    params, macs = cost(transplant.module.to("meta"), (3, 224, 224))
    assert macs / 1e9 == pytest.approx(printed, rel=0.02)
    assert params == count(transplant.module)


def test_latency_is_measured_before_and_after_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "SECONDS", 0.01)
    transplant, _ = plant("test_resnet", {"name": "truncated", "cut": "layer1"})
    after, before = (
        efficiency.measure(module, (1, SIDE, SIDE)) for module in (transplant.module, efficiency.whole(transplant.module.encoder, CHEST))
    )
    assert after.params < before.params
    assert after.macs < before.macs
    for found in (after, before):
        assert [latency.batch for latency in found.latency] == [1, 32]
        for latency in found.latency:
            assert latency.runs >= 7
            assert 0 < latency.q1_ms <= latency.median_ms <= latency.q3_ms
