"""Strategies that the studies lack: lp-ft, gradual, layer-decay, l2-sp, lora, knn."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transplants import CHEST, LUNGS, SIDE, data, plant, train

from base.errors import RequestError, WorkError
from encoders.build import build
from encoders.weights import sha256_of
from finetune.strategies import resolve
from finetune.strategies.knn import KnnHead
from finetune.strategies.lora import merge
from finetune.transplant import places


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_lp_ft_probes_first_with_the_head_of_linear() -> None:
    ours, linear = plant("test_resnet", "lp-ft")[0], plant("test_resnet", "linear")[0]
    assert ours.probe
    assert not linear.probe
    assert sha256_of(ours.module.head.state_dict()) == sha256_of(linear.module.head.state_dict())
    assert not ours.module.frozen


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6))
def test_gradual_unfreezes_from_the_top(stages: int) -> None:
    transplant, _ = plant("test_vit", {"name": "gradual", "stages": stages})
    at = places(transplant.module.encoder)
    names = {id(parameter): name for name, parameter in transplant.module.encoder.net.named_parameters()}
    starts: dict[int, float] = {}
    for group in transplant.groups:
        for parameter in group.params:
            if id(parameter) in names:
                assert starts.setdefault(at[names[id(parameter)]], group.start) == group.start
            else:
                assert group.start == 0
    ordered = [starts[cut] for cut in sorted(starts)]
    assert ordered == sorted(ordered, reverse=True)
    expected = [(stage + 1) / (stages + 1) for stage in reversed(range(stages))]
    assert sorted(set(ordered), reverse=True) == pytest.approx(expected)


def test_gradual_has_no_more_stages_than_cuts() -> None:
    with pytest.raises(RequestError, match="8 stages of an encoder with 7 cuts"):
        plant("test_vit", {"name": "gradual", "stages": 8})


def test_layer_decay_falls_towards_the_stem() -> None:
    transplant, _ = plant("test_resnet", {"name": "layer-decay", "decay": 0.5})
    rates = {group.name: group.lr_scale for group in transplant.groups}
    assert rates["encoder, stem"] == 0.5**5
    assert rates["encoder, layer4.0"] == 0.5
    assert rates["head"] == 1
    transplant, _ = plant("test_vit", {"name": "layer-decay", "decay": 0.5})
    rates = {group.name: group.lr_scale for group in transplant.groups}
    assert [rates[f"encoder, {cut}"] for cut in ("stem", "block1", "block6")] == [0.5**7, 0.5**6, 0.5]


def test_l2_sp_is_the_papers_penalty() -> None:
    transplant, weights = plant("test_resnet", {"name": "l2-sp", "alpha": 0.3, "beta": 0.07})
    assert transplant.penalty is not None
    assert not any(group.decay for group in transplant.groups)
    module = transplant.module
    head = sum(float(parameter.detach().double().square().sum()) for parameter in module.head.parameters())
    assert float(transplant.penalty().detach()) == pytest.approx(0.07 / 2 * head, rel=1e-5)
    train(transplant, CHEST, count=1)
    moved = sum(float((p.detach() - weights[name]).double().square().sum()) for name, p in module.encoder.net.named_parameters())
    head = sum(float(parameter.detach().double().square().sum()) for parameter in module.head.parameters())
    penalty = transplant.penalty()
    assert float(penalty.detach()) == pytest.approx(0.3 / 2 * moved + 0.07 / 2 * head, rel=1e-5)
    module.zero_grad()
    penalty.backward()
    for name, parameter in module.encoder.net.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.3 * (parameter.detach() - weights[name]), rtol=1e-5, atol=1e-8)


def test_lora_starts_as_the_source_and_merges_into_plain_weights() -> None:
    transplant, weights = plant("test_vit", {"name": "lora", "rank": 2, "alpha": 4})
    x = data(CHEST)[0]
    encoder = transplant.module.encoder
    plain = build("test_vit", 1, image_size=SIDE).eval()
    plain.net.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), plain(x))
    trained = {name for name, parameter in encoder.net.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 * 2 * 2  # blocks, projections, matrices
    assert all(name.endswith(("attn.qkv.down", "attn.qkv.up", "attn.proj.down", "attn.proj.up")) for name in trained)
    train(transplant, CHEST, count=20)
    encoder.eval()
    plain.net.load_state_dict(merge(encoder.net).state_dict(), strict=True)
    with torch.no_grad():
        adapted = encoder(x)
        assert (adapted - plain(x)).abs().max() < 1e-6
        assert (encoder.net(encoder.prepare(x)) - adapted).abs().max() == 0
        plain.net.load_state_dict(weights)
        assert (adapted - plain(x)).abs().max() > 1e-4
    with pytest.raises(RequestError, match=r"test_resnet is none .*vit_small_patch16_224"):
        plant("test_resnet", "lora")


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_is_that_of_scikit_learn_with_the_papers_weights(k: int) -> None:
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    draw = torch.Generator().manual_seed(k)
    z, x = torch.randn(40, 6, generator=draw), torch.randn(9, 6, generator=draw)
    grade = torch.randint(0, 3, (40,), generator=draw)
    peer = KNeighborsClassifier(min(k, 40), weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    expected = torch.from_numpy(peer.fit(z.numpy(), grade.numpy()).predict_proba(x.numpy())).float()
    target = nn.functional.one_hot(grade, 3).float()
    heads = {kind: KnnHead(kind, k, 0.07) for kind in ("multiclass", "multilabel", "ordinal")}
    for head in heads.values():
        head.fit(z, target, torch.ones_like(target))
    found = {kind: head([x], (1, 1)) for kind, head in heads.items()}
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(found["multiclass"].softmax(1), expected, **close)
    torch.testing.assert_close(found["multilabel"].sigmoid(), expected, **close)
    torch.testing.assert_close(found["ordinal"].sigmoid(), torch.stack([expected[:, 1:].sum(1), expected[:, 2]], 1), **close)
    assert all(logits.isfinite().all() for logits in found.values())


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "ordinal"])
def test_knn_votes_in_float32_under_bf16(kind: Any) -> None:
    """In bf16 neighbours are ties, and where all agree the share is 1 and its logit infinite."""
    generator = torch.Generator().manual_seed(0)
    z_ND, x_BD = (torch.rand(200, 64, generator=generator) + 2 for _ in range(2))
    target_NL = torch.nn.functional.one_hot(torch.arange(200) // 190, 2).float()
    head = KnnHead(kind, 5, 0.07)
    head.fit(z_ND, target_NL, torch.ones_like(target_NL))
    plain = head([x_BD], (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head([x_BD], (1, 1)), plain)
    assert bool(torch.isfinite(plain).all())


def test_knn_lets_only_those_vote_who_know() -> None:
    draw = torch.Generator().manual_seed(0)
    z, x, target = (
        torch.randn(30, 5, generator=draw),
        torch.randn(4, 5, generator=draw),
        torch.randint(0, 2, (30, 2), generator=draw).float(),
    )
    known = torch.ones(30, 2)
    known[10:, 1] = 0
    some, few = KnnHead("multilabel", 7, 0.07), KnnHead("multilabel", 7, 0.07)
    some.fit(z, target, known)
    few.fit(z[:10], target[:10], torch.ones(10, 2))
    torch.testing.assert_close(some([x], (1, 1))[:, 1], few([x], (1, 1))[:, 1])
    with pytest.raises(WorkError, match="no training image knows label number 1"):
        some.fit(z, target, known * torch.tensor([1.0, 0.0]))


def test_knn_trains_nothing_and_is_for_labels() -> None:
    transplant, weights = plant("test_resnet", "knn")
    assert (transplant.groups, transplant.views) == ([], "evaluation")
    assert not list(transplant.module.head.parameters())
    assert sha256_of(weights) == transplant.sha256
    with pytest.raises(RequestError, match="images, not pixels"):
        plant("test_resnet", "knn", LUNGS)


@pytest.mark.parametrize("pair", list(itertools.product(["transfusion", "truncated", "fat", "slim"], [{}, {"cut": None}])), ids=str)
def test_a_cut_must_be_given_where_there_is_no_strategy_without(pair: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="cut"):
        resolve({"name": pair[0], **pair[1]})
