"""DINO, DINOv2, MAE, SimMIM and I-JEPA: each loss against a few lines of NumPy, masks, and what the encoder may see.

Two ranks against one and stop-and-resume are in test_pretrain_methods.py, with every other method.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from base.errors import RequestError
from base.seeds import rng
from encoders import vit
from encoders.build import build
from engine import ema
from pretrain import masking, methods
from pretrain.methods import dino, dinov2

SIDE = 48
HEADS: dict[str, Any] = {"prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "dino": HEADS,
    "dinov2": HEADS,
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "simmim": {"mask_side": 16},
    "ijepa": {"predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2},
}
MASKED = ["mae", "simmim", "ijepa"]


def batch(sizes: tuple[int, ...] = (SIDE,), seed: int = 0, epoch: int = 0) -> Any:
    random = np.random.default_rng(seed)
    views = [torch.from_numpy(random.integers(0, 256, (6, 1, size, size), dtype=np.uint8)) for size in sizes]
    return SimpleNamespace(views=views, index_B=torch.arange(6) + 3, epoch_B=torch.full((6,), epoch))


def sizes_of(name: str) -> tuple[int, ...]:
    return (SIDE, SIDE, 16) if name.startswith("dino") else (SIDE,)


def make(name: str, **options: Any) -> Any:
    torch.set_num_threads(1)
    facts = methods.Facts(seed=1, samples=24, global_batch=6, sizes=sizes_of(name))
    method = methods.build(name, build("test_vit", 1, seed=0, image_size=SIDE), OPTIONS[name] | options, facts)
    method.clock = methods.Clock(3, 20, 5)
    return method


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def head(module: Any, z: Tensor) -> np.ndarray:
    """Logits of a DINO head: cosines with the prototypes."""
    return unit(module.project(z).detach().numpy()) @ unit(module.prototypes.weight.detach().numpy()).T


def test_tokens_are_those_of_timm_and_masked_ones_know_nothing() -> None:
    encoder, x = build("test_vit", 1, image_size=SIDE), batch().views[0]
    torch.testing.assert_close(vit.tokens(encoder, x), encoder.features(x))
    everything = torch.arange(9).flip(0).expand(6, 9)
    torch.testing.assert_close(vit.tokens(encoder, x, everything)[:, 0], encoder(x), atol=1e-5, rtol=1e-4)
    pixels = vit.patches(encoder, x)
    assert pixels.shape == (6, 9, 256)
    torch.testing.assert_close(pixels[:, 4].reshape(6, 16, 16), encoder.normalise(x)[:, 0, 16:32, 16:32])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_encoders_state_is_plain_timm(name: str) -> None:
    import timm

    state = {key[12:]: value for key, value in make(name).state_dict().items() if key.startswith("encoder.net.")}
    timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=SIDE).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ["dinov2", *MASKED])
def test_a_resnet_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} trains a vision transformer, not resnet18.*vit_small_patch16_224"):
        methods.check(name, {}, architecture="resnet18")


def test_views_that_do_not_fit_are_refused() -> None:
    facts = methods.Facts(seed=0, samples=9, global_batch=3, sizes=(50,))
    with pytest.raises(RequestError, match=r"50 px is not a multiple.*views.size=48"):
        methods.check("mae", {}, facts=facts)
    with pytest.raises(RequestError, match=r"squares of 32 px do not tile a view of 48 px.*mask_side=16"):
        methods.check("simmim", {}, facts=facts._replace(sizes=(48,)))
    with pytest.raises(RequestError, match=r"first two views.*48, 16 px"):
        methods.check("dino", {}, facts=facts._replace(sizes=(48, 16)))


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_more_prototypes_than_images_are_refused(name: str) -> None:
    facts = methods.Facts(seed=0, samples=50, global_batch=8, sizes=(48, 48))
    with pytest.raises(RequestError, match=r"50 samples cannot have 64 prototypes.*prototypes=50"):
        methods.check(name, {"prototypes": 64}, facts=facts)
    methods.check(name, {"prototypes": 50}, facts=facts)


# ---- masks


def test_masks_hang_on_seed_epoch_and_image_alone() -> None:
    def drawn(seed: int = 0, epoch: int = 0) -> Tensor:
        return masking.draw(seed, batch(epoch=epoch), lambda stream: stream.permutation(100))

    first = drawn()
    assert torch.equal(first, drawn())
    assert torch.equal(first[2], torch.from_numpy(rng("mask", 0, 0, 5).permutation(100)))
    assert len({tuple(row.tolist()) for row in [*first, *drawn(seed=1), *drawn(epoch=1)]}) == 18


@pytest.mark.parametrize("count", [0, 1, 7, 98, 196])
def test_blocks_mask_exactly_as_many_as_asked(count: int) -> None:
    masks = [masking.blocks(rng("mask", 0, 0, i), 14, count) for i in range(20)]
    assert {int(mask.sum()) for mask in masks} == {count}
    if count == 98:  # blocks, not confetti: a masked patch has far more masked neighbours than the half that chance gives
        neighbours = [(grid := mask.reshape(14, 14))[:, 1:][grid[:, :-1]].mean() for mask in masks]
        assert np.mean(neighbours) > 0.75


def test_counts_of_masked_patches() -> None:
    units = np.stack([masking.units(rng("mask", 0, 0, i), 14, 2, 0.6) for i in range(20)])
    assert {int(mask.sum()) for mask in units} == {30 * 4}  # 30 of 49 squares: the next whole one above 60 %
    squares = units.reshape(20, 7, 2, 7, 2)
    assert (squares == squares[:, :, :1, :, :1]).all()
    assert (make("mae").kept, make("mae", mask_ratio=0.5).kept) == (2, 4)
    method = make("dinov2")
    shares = np.stack([method.masks(rng("mask", 0, 0, i), 14) for i in range(300)]).mean(axis=2).ravel()
    assert 0.4 < (shares > 0).mean() < 0.6
    masked = shares[shares > 0]
    assert masked.min() >= 0.095
    assert masked.max() <= 0.505
    assert masked.mean() == pytest.approx(0.3, abs=0.02)


def test_blocks_of_ijepa() -> None:
    method = make("ijepa")
    method.side = 14
    for step in range(20):
        method.clock = methods.Clock(step, 20, 5)
        (height, width), (tall, wide), kept = method.shapes()
        assert 0.12 * 196 <= height * width <= 0.23 * 196
        assert (tall == wide, 12 <= tall <= 14, kept) == (True, True, 49)
        indices = method.indices(rng("mask", 0, 0, step), (height, width), (tall, wide), kept)
        targets, context = np.split(indices, [4 * height * width])
        assert len(set(context)) == kept
        assert not set(context) & set(targets)
        for target in targets.reshape(4, -1):
            rows, columns = target // 14, target % 14
            assert (np.ptp(rows), np.ptp(columns), len(set(target))) == (height - 1, width - 1, height * width)
    assert len({method.shapes()[0] for method.clock in [methods.Clock(step, 20, 5) for step in range(20)]}) > 3


# ---- losses


def test_mae_loss() -> None:
    method, seen = make("mae"), batch()
    found = method(seen)
    order = np.stack([rng("mask", 1, 0, 3 + i).permutation(9) for i in range(6)])
    kept, masked = order[:, :2], order[:, 2:]
    tokens = vit.tokens(method.encoder, seen.views[0], torch.from_numpy(kept))
    predicted = method.decoder(tokens, torch.from_numpy(kept), torch.from_numpy(masked)).detach().numpy()
    pixels = (seen.views[0].numpy()[:, 0] / 255 - 0.5) / 0.25
    patches = pixels.reshape(6, 3, 16, 3, 16).transpose(0, 1, 3, 2, 4).reshape(6, 9, 256)
    target = np.take_along_axis(patches, masked[:, :, None], axis=1)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
    assert found.loss.item() == pytest.approx(((predicted - target) ** 2).mean(), rel=1e-5)
    assert torch.equal(found.features["backbone"], tokens[:, 0].detach())


def test_simmim_loss() -> None:
    method, seen = make("simmim"), batch()
    masked = np.stack([masking.units(rng("mask", 1, 0, 3 + i), 3, 1, 0.6) for i in range(6)])
    assert (masked.sum(axis=1) == 6).all()
    tokens = vit.tokens(method.encoder, seen.views[0], masked_BN=torch.from_numpy(masked), mask_token_D=method.mask_token_D)
    predicted = method.head(tokens[:, 1:]).detach().numpy()
    pixels = (seen.views[0].numpy()[:, 0] / 255 - 0.5) / 0.25
    patches = pixels.reshape(6, 3, 16, 3, 16).transpose(0, 1, 3, 2, 4).reshape(6, 9, 256)
    expected = (np.abs(predicted - patches).mean(axis=2) * masked).sum() / masked.sum()
    assert method(seen).loss.item() == pytest.approx(expected, rel=1e-5)


def test_ijepa_loss() -> None:
    method, seen = make("ijepa"), batch()
    with torch.no_grad():  # a target network that has come apart from the encoder
        for parameter in method.teachers["target"].parameters():
            parameter.mul_(1.1)
    target, context, kept = method.shapes()
    size = target[0] * target[1]
    indices = np.stack([method.indices(rng("mask", 1, 0, 3 + i), target, context, kept) for i in range(6)])
    keep = torch.from_numpy(indices[:, 4 * size :])
    tokens = vit.tokens(method.encoder, seen.views[0], keep)
    whole = method.teachers["target"].features(seen.views[0])[:, 1:].detach().numpy()
    whole = (whole - whole.mean(-1, keepdims=True)) / np.sqrt(whole.var(-1, keepdims=True) + 1e-5)
    terms = []
    for block in range(4):
        asked = indices[:, block * size : (block + 1) * size]
        predicted = method.predictor(tokens, keep, torch.from_numpy(asked)).detach().numpy()
        apart = np.abs(predicted - np.take_along_axis(whole, asked[:, :, None], axis=1))
        terms.append(np.where(apart < 1, apart**2 / 2, apart - 0.5).mean())
    assert method(seen).loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_dino_loss_and_centre() -> None:
    method, seen = make("dino", freeze_epochs=0), batch(sizes_of("dino"))
    centre = torch.linspace(-0.2, 0.2, 16)
    method.loss.center.copy_(centre)
    z = [method.encoder(view) for view in seen.views]
    student = [head(method.head, z_BD) for z_BD in z]
    teacher = student[:2]  # at the first step both networks are one
    temperature = 0.04 + 0.03 * 3 / (30 * 5)
    targets = [softmax((t - centre.numpy()) / temperature) for t in teacher]
    terms = [-(targets[t] * np.log(softmax(student[s] / 0.1))).sum(axis=1).mean() for t in range(2) for s in range(3) if s != t]
    found = method(seen)
    assert found.loss.item() == pytest.approx(np.mean(terms), rel=1e-4)
    torch.testing.assert_close(found.features["prototypes"], torch.from_numpy(targets[0]).float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.features["projector_1"].norm(dim=1), torch.ones(6))
    expected = 0.9 * centre + 0.1 * torch.from_numpy(np.concatenate(teacher).mean(axis=0)).float()
    torch.testing.assert_close(method.loss.center.flatten(), expected)
    assert "loss.center" in method.state_dict()
    assert method.chance_loss(6) == pytest.approx(np.log(16))


def test_sinkhorn() -> None:
    logits = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    q = np.exp(logits.double().numpy() / 0.05)
    for _ in range(3):
        q /= q.sum(axis=0)
        q /= q.sum(axis=1, keepdims=True)
    found = dinov2.sinkhorn(logits, 0.05, 3)
    np.testing.assert_allclose(found.numpy(), q, rtol=1e-4, atol=1e-7)
    many = dinov2.sinkhorn(logits, 0.05, 200)
    torch.testing.assert_close(many.sum(dim=0), torch.full((16,), 40 / 16), rtol=1e-3, atol=1e-3)
    assert dinov2.sinkhorn(logits[:0], 0.05, 3).shape == (0, 16)  # a rank without any masked patch


def test_koleo() -> None:
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    u = unit(z.numpy())
    apart = np.linalg.norm(u[:, None] - u[None], axis=2) + 9 * np.eye(12)
    assert dinov2.koleo(z).item() == pytest.approx(-np.log(apart.min(axis=1)).mean(), rel=1e-5)


def test_dinov2_loss() -> None:
    method, seen = make("dinov2", freeze_epochs=0), batch(sizes_of("dinov2"))
    masked = np.stack([method.masks(rng("mask", 1, 0, 3 + i), 3) for i in range(6)]).transpose(1, 0, 2).reshape(12, 9)
    assert 0 < (masked.sum(axis=1) == 0).sum() < 12  # some views are masked, some are not
    both = torch.cat(seen.views[:2])
    tokens = vit.tokens(method.encoder, both, masked_BN=torch.from_numpy(masked), mask_token_D=method.mask_token_D).detach()
    whole = method.teachers["teacher"]["encoder"].features(both).detach()
    temperature = 0.04 + 0.03 * 3 / (30 * 5)

    def target(logits: np.ndarray) -> np.ndarray:
        return dinov2.sinkhorn(torch.from_numpy(logits), temperature, 3).numpy()

    teacher = np.split(target(head(method.head, whole[:, 0])), 2)
    z = [*tokens[:, 0].chunk(2), method.encoder(seen.views[2])]
    logs = [np.log(softmax(head(method.head, z_BD) / 0.1)) for z_BD in z]
    expected = np.mean([-(teacher[t] * logs[s]).sum(axis=1).mean() for t in range(2) for s in range(3) if s != t])
    patches = target(head(method.patch_head, whole[:, 1:][torch.from_numpy(masked)]))
    terms = -(patches * np.log(softmax(head(method.patch_head, tokens[:, 1:][torch.from_numpy(masked)]) / 0.1))).sum(axis=1)
    image = np.nonzero(masked)[0]
    expected += sum(terms[image == g].mean() for g in set(image)) / 12
    expected += 0.1 * sum(float(dinov2.koleo(z_BD)) for z_BD in z[:2])
    assert method(seen).loss.item() == pytest.approx(expected, rel=1e-4)


def test_dinov2_at_chance_gives_each_prototype_the_same() -> None:
    method, seen = make("dinov2", freeze_epochs=0, mask_p=1.0, koleo=0.0), batch(sizes_of("dinov2"))
    for network in (method, *method.teachers.values()):
        for name, parameter in network.named_parameters():
            if name.endswith("prototypes.weight"):
                torch.nn.init.ones_(parameter)
    assert method(seen).loss.item() == pytest.approx(method.chance_loss(6), rel=1e-5)
    assert make("dinov2").chance_loss(6) == pytest.approx(1.5 * np.log(16))  # half of the views are masked


def test_schedules_of_dino() -> None:
    options = dino.DINOOptions()
    at = [methods.Clock(step, 1001, 10) for step in (0, 150, 300, 1000)]
    assert [dino.teacher_temperature(options, clock) for clock in at] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert at[0].momentum(options.momentum) == pytest.approx(0.996)
    assert methods.Clock(500, 1001, 10).momentum(options.momentum) == pytest.approx(0.998)
    assert at[3].momentum(options.momentum) == 1
    assert [dino.frozen(options, methods.Clock(step, 100, 10)) for step in (0, 9, 10)] == [True, True, False]


# ---- gradients, and what must not leak


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_prototypes_stand_still_in_the_first_epoch(name: str) -> None:
    method = make(name)
    prototypes = method.head.prototypes.weight
    method(batch(sizes_of(name))).loss.backward()
    assert prototypes.grad is None
    assert method.head.project.layers[0].weight.grad.abs().sum() > 0
    method.clock = methods.Clock(5, 20, 5)
    method(batch(sizes_of(name))).loss.backward()
    assert method.head.prototypes.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "teacher"), [("dino", "teacher"), ("dinov2", "teacher"), ("ijepa", "target")])
def test_teachers_get_no_gradient_and_follow(name: str, teacher: str) -> None:
    method, seen = make(name), batch(sizes_of(name))
    followed, before = method.teachers[teacher], {k: v.clone() for k, v in method.teachers[teacher].state_dict().items()}
    method(seen).loss.backward()
    assert all(parameter.grad is None for parameter in followed.parameters())
    assert followed.training
    assert not any(key.startswith("teachers") for key in method.state_dict())
    student = method.followed(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    method.on_step_end()
    moved = {key: (value - before[key]).mean().item() for key, value in followed.state_dict().items()}
    assert all(0 < by < 0.01 for by in moved.values())
    assert ema.lag(followed, student) > 0


def hidden_pixels(method: Any, seen: Any) -> Tensor:
    """bool BHW: pixels that the encoder must not see."""
    masked = torch.zeros(6, 9, dtype=torch.bool)
    for i in range(6):
        stream = rng("mask", 1, 0, 3 + i)
        if isinstance(method, methods.method_class("mae")):
            masked[i, torch.from_numpy(stream.permutation(9)[2:])] = True
        elif isinstance(method, methods.method_class("simmim")):
            masked[i] = torch.from_numpy(masking.units(stream, 3, 1, 0.6))
        else:
            (height, width), context, kept = method.shapes()
            indices = method.indices(stream, (height, width), context, kept)
            masked[i] = True
            masked[i, torch.from_numpy(indices[4 * height * width :])] = False
    return masked.view(6, 3, 3).repeat_interleave(16, 1).repeat_interleave(16, 2)


@pytest.mark.parametrize("name", MASKED)
def test_the_encoder_does_not_see_masked_pixels(name: str) -> None:
    method, seen = make(name), batch()
    hidden, other = hidden_pixels(method, seen), batch(seed=1)
    first = method(seen)
    swapped = torch.where(hidden[:, None], other.views[0], seen.views[0])
    second = method(SimpleNamespace(**(vars(seen) | {"views": [swapped]})))
    assert torch.equal(first.features["backbone"], second.features["backbone"])
    assert first.loss != second.loss
    visible = torch.where(hidden[:, None], seen.views[0], other.views[0])
    third = method(SimpleNamespace(**(vars(seen) | {"views": [visible]})))
    assert not torch.equal(first.features["backbone"], third.features["backbone"])


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_the_loss_is_of_masked_pixels_only(name: str) -> None:
    """With an encoder that ignores its input, pixels that are seen change nothing."""
    method, seen = make(name), batch()
    nn.init.zeros_(method.encoder.net.patch_embed.proj.weight)
    visible = torch.where(hidden_pixels(method, seen)[:, None], seen.views[0], batch(seed=1).views[0])
    second = method(SimpleNamespace(**(vars(seen) | {"views": [visible]})))
    assert method(seen).loss.item() == second.loss.item()


@pytest.mark.parametrize("way", ["virtual batches", "activation checkpointing"])
@pytest.mark.parametrize("name", OPTIONS)
def test_less_memory_gives_the_same_gradients(name: str, way: str) -> None:
    whole, thrifty = make(name), make(name)
    if way == "virtual batches":
        thrifty.chunk = 4
    else:
        thrifty.encoder.net.set_grad_checkpointing(True)
    losses = [method(batch(sizes_of(name))).loss for method in (whole, thrifty)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (key, a), b in zip(whole.named_parameters(), thrifty.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("name", OPTIONS)
def test_bf16_computes_the_loss_in_float32(name: str) -> None:
    method = make(name, **({"freeze_epochs": 0} if name.startswith("dino") else {}))
    exact = method(batch(sizes_of(name))).loss.item()
    if name == "dino":
        method.loss.center.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method(batch(sizes_of(name)))
    assert found.loss.dtype == torch.float32
    assert {value.dtype for value in found.features.values()} == {torch.float32}
    assert found.loss.item() == pytest.approx(exact, rel=0.03)
    found.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("hidden", [64, 512, 2048])
def test_a_dino_head_of_any_width_starts_with_the_gain_of_the_official_one(hidden: int) -> None:
    """With the official 0.02 at 64 dimensions outputs began so small that gradients were 60 times larger and biases soon all there was."""
    torch.manual_seed(0)
    head = dino.DINOHead(64, dino.DINOOptions(prototypes=8, hidden_dim=hidden, bottleneck_dim=32))
    middle = next(layer for layer in list(head.project.layers)[1:] if isinstance(layer, nn.Linear))
    assert float(middle.weight.detach().std()) * hidden**0.5 == pytest.approx(0.02 * 2048**0.5, rel=0.03)
