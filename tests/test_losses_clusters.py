"""Methods that predict, decorrelate or cluster: losses against NumPy, what they keep between steps, the defects they must not repeat."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from base.errors import RequestError
from engine import ema
from pretrain import methods
from pretrain.methods import Clock, Facts
from pretrain.methods.swav import Prototypes

SIDE, WIDTH, BATCH, SAMPLES = 4, 16, 6, 40
Array = np.ndarray[Any, np.dtype[np.float64]]


class Pixels(nn.Module):
    """An encoder that hands on the pixels, so that a test chooses the features."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.flatten(1).float()


def make(name: str, views: int = 2, **options: Any) -> tuple[Any, Any, list[Array]]:
    """A method without a projector, a batch of float views (some like each other) and those views as NumPy."""
    facts = Facts(seed=0, samples=SAMPLES, global_batch=BATCH, sizes=(SIDE,) * views)
    method = methods.build(name, Pixels(), options, facts)
    method.head = nn.Identity()
    random = np.random.default_rng(0)
    base = random.normal(size=(BATCH, WIDTH))
    x = [base + 0.5 * random.normal(size=base.shape) for _ in range(views)]
    tensors = [torch.from_numpy(v).float().reshape(BATCH, 1, SIDE, SIDE) for v in x]
    return method, SimpleNamespace(views=tensors, index_B=torch.arange(10, 10 + BATCH)), x


def unit(z: Array) -> Array:
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def log_softmax(z: Array) -> Array:
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def equal_shares(scores: Array) -> Array:
    q = np.exp(scores / 0.05)
    for _ in range(3):
        q /= q.sum(axis=0)
        q /= q.sum(axis=1, keepdims=True)
    return q


def of(module: nn.Linear) -> Array:
    return module.weight.detach().double().numpy().T


def test_byol_is_the_squared_distance_of_prediction_and_target() -> None:
    method, batch, (x, y) = make("byol", hidden_dim=8, output_dim=8)
    method.predictor, project = nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8, bias=False)
    method.teachers["target"] = nn.Sequential(Pixels(), project)
    (q_x, q_y), (t_x, t_y) = ([unit(v @ of(layer)) for v in (x, y)] for layer in (method.predictor, project))
    expected = (((q_x - t_y) ** 2).sum(axis=1) + ((q_y - t_x) ** 2).sum(axis=1)).mean()
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_simsiam_is_half_of_both_cosines_and_stops_the_gradient_at_the_target() -> None:
    method, batch, (x, y) = make("simsiam", hidden_dim=8, output_dim=WIDTH, predictor_dim=8)
    method.head, method.predictor = nn.Linear(WIDTH, 8, bias=False), nn.Identity()
    z_x, z_y = unit(x @ of(method.head)), unit(y @ of(method.head))
    loss = method(batch).loss
    assert loss.item() == pytest.approx(-(z_x * z_y).sum(axis=1).mean(), rel=1e-5)
    loss.backward()
    free = -nn.functional.cosine_similarity(*(method.head(view.flatten(1)) for view in batch.views)).mean()
    both = torch.autograd.grad(free, method.head.weight)[0]
    torch.testing.assert_close(method.head.weight.grad, both / 2)  # each order has one of the two sides


def test_barlow_twins_is_its_equation() -> None:
    method, batch, views = make("barlow-twins", hidden_dim=8, output_dim=WIDTH)
    x, y = ((v - v.mean(axis=0)) / np.sqrt(v.var(axis=0) + 1e-5) for v in views)
    c = x.T @ y / BATCH
    expected = ((1 - np.diag(c)) ** 2).sum() + 5e-3 * ((c**2).sum() - (np.diag(c) ** 2).sum())
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_is_its_equations() -> None:
    method, batch, (x, y) = make("vicreg", hidden_dim=8, output_dim=WIDTH)
    x[:] *= 0.5  # some standard deviations below one, some above
    batch.views[0] = batch.views[0] * 0.5
    expected = 25 * ((x - y) ** 2).mean()
    for v in (x, y):
        s = np.cov(v.T)
        expected += 25 * np.maximum(0, 1 - np.sqrt(np.diag(s) + 1e-4)).mean() / 2 + ((s**2).sum() - (np.diag(s) ** 2).sum()) / WIDTH
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-4)


def test_swav_predicts_the_codes_of_the_other_views_and_then_with_its_queue() -> None:
    method, batch, views = make("swav", 3, queue=BATCH, queue_epoch=0, freeze_epochs=0, output_dim=WIDTH)
    c, z = unit(method.prototypes.weight.detach().double().numpy()).T, [unit(v) for v in views]
    for step in range(2):
        method.clock = Clock(step, 10, 5)
        expected = 0.0
        for s in range(2):
            rows = np.concatenate([z[s] @ c] * (1 + step))  # the queue holds the same batch
            q = equal_shares(rows)[:BATCH]
            expected += sum(-(q * log_softmax(z[t] @ c / 0.1)).sum(axis=1).mean() for t in range(3) if t != s) / 4
        output = method(batch)
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(method.queue.numpy(), np.stack(z[:2]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.features["prototypes"].sum(dim=1), torch.ones(BATCH))


def test_swav_prototypes_rest_in_the_first_epoch_and_the_queue_waits() -> None:
    method, batch, _ = make("swav", queue_epoch=1, output_dim=WIDTH)
    for step, learns in ((4, False), (5, True)):
        method.clock = Clock(step, 10, 5)
        method(batch).loss.backward()
        assert (method.prototypes.weight.grad is not None) == learns
        assert bool(method.queue.any()) == learns
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.on_step_end()
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("name", ["deepcluster-v2", "sela-v2"])
def test_self_labelling_is_cross_entropy_to_the_labels_of_each_head(name: str) -> None:
    method, batch, views = make(name, 3, output_dim=WIDTH)
    corpus_Nd = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
    method.on_epoch_start(lambda network: (torch.arange(SAMPLES), network(corpus_Nd)))
    torch.testing.assert_close(method.bank, nn.functional.normalize(corpus_Nd).expand(2, -1, -1))
    if name == "deepcluster-v2":
        assert torch.equal(method.labels[1], (method.bank[1] @ method.centroids[1].T).argmax(dim=1))
        assert "centroids" in dict(method.named_buffers())  # no optimiser sees them
    else:
        assert torch.bincount(method.labels[0], minlength=8).max() <= 8  # 40 images over 8 labels, nearly 5 each
    expected = 0.0
    for h in range(3):
        c = method.centroids[h] if name == "deepcluster-v2" else method.prototypes[h].weight.detach()
        y = method.labels[h, 10 : 10 + BATCH].numpy()
        for v in views:
            expected -= log_softmax(unit(v) @ c.double().numpy().T / 0.1)[np.arange(BATCH), y].mean() / 9
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-4)
    method.on_step_end()
    np.testing.assert_allclose(method.bank[:, 10 : 10 + BATCH].numpy(), np.stack([unit(v) for v in views[:2]]), rtol=1e-5, atol=1e-6)


def test_labels_are_made_again_each_epoch_from_the_bank_alone() -> None:
    method, batch, _ = make("deepcluster-v2", output_dim=WIDTH)
    method.clock = Clock(5, 10, 5)
    method.bank.normal_()
    method.bank[:, 7] = 0  # could not be read
    method.labels[:, 7] = -7

    def never(network: Any) -> Any:
        raise AssertionError("only the first epoch embeds the corpus")

    method.on_epoch_start(never)
    assert method.labels[:, 7].tolist() == [-7] * 3
    first = method.labels.clone()
    method.clock = Clock(10, 10, 5)
    method.on_epoch_start(never)
    assert not torch.equal(method.labels, first)  # another epoch draws other first centroids
    batch.index_B = torch.tensor([3, 4, 3, 5, 4, 3])  # where two epochs meet
    method(batch)
    method.on_step_end()
    z_Bd = nn.functional.normalize(batch.views[0].flatten(1))
    torch.testing.assert_close(method.bank[0, [3, 4, 5]], z_Bd[[5, 4, 3]])


def test_prototypes_do_not_repeat_lightlys_bias() -> None:
    from lightly.models.modules.heads import SwaVPrototypes

    assert "heads.0.bias" in SwaVPrototypes(WIDTH, 8).state_dict()
    method, _, _ = make("swav", output_dim=WIDTH)
    assert [key for key in method.state_dict() if "prototypes" in key] == ["prototypes.weight"]
    assert torch.equal(Prototypes(8, WIDTH)(torch.zeros(2, WIDTH)), torch.zeros(2, 8))


def test_barlow_twins_does_not_repeat_normalisation_over_each_ranks_part() -> None:
    """lightly normalises each rank's part and averages the matrices; the loss of the same images then hangs on the number of ranks."""
    from lightly.loss import BarlowTwinsLoss

    method, batch, _ = make("barlow-twins", hidden_dim=8, output_dim=WIDTH)
    x, y = (view.flatten(1) for view in batch.views)
    whole = BarlowTwinsLoss()(x, y)
    halves = []
    for rows in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        norm = nn.BatchNorm1d(WIDTH, affine=False)
        halves.append(norm(x[rows]).T @ norm(y[rows]) / (BATCH // 2))
    c = (halves[0] + halves[1]) / 2
    as_lightly = (1 - c.diagonal()).square().sum() + 5e-3 * (c.square().sum() - c.diagonal().square().sum())
    assert method(batch).loss.item() == pytest.approx(float(whole), rel=0.01)
    assert float(as_lightly) != pytest.approx(float(whole), rel=0.1)


def test_the_target_does_not_repeat_the_standstill_of_bfloat16() -> None:
    """At a momentum of 0.999 a step is below the spacing of bfloat16: lightly's update leaves a bfloat16 copy where it was."""
    from lightly.models.utils import update_momentum

    student = nn.Linear(8, 8)
    teacher, stuck = ema.follower(student.bfloat16()), nn.Linear(8, 8).bfloat16()
    assert isinstance(teacher, nn.Linear)
    stuck.load_state_dict(student.state_dict())
    start = student.weight.detach().float().clone()
    with torch.no_grad():
        student.weight.add_(0.1)
    for _ in range(100):
        ema.follow(teacher, student, 0.999)
        update_momentum(student, stuck, 0.999)
    expected = (1 - 0.999**100) * float((student.weight.float() - start).mean())
    assert float((teacher.weight - start).mean()) == pytest.approx(expected, rel=1e-3)
    assert float((stuck.weight.float() - start).mean()) < 0.5 * expected


def test_byols_momentum_rises_to_one_along_a_cosine() -> None:
    method, _, _ = make("byol", hidden_dim=8, output_dim=8)
    method.encoder.factor.data.fill_(2.0)
    teacher = method.teachers["target"]
    method.head = teacher[1]
    for step, momentum in ((0, 0.996), (50, 0.998), (100, 1.0)):
        teacher[0].factor.data.fill_(1.0)
        method.clock = Clock(step, 101, 10)
        method.on_step_end()
        assert float(teacher[0].factor) == pytest.approx(2 - momentum, abs=1e-6)


@pytest.mark.parametrize(
    ("samples", "global_batch", "prototypes", "queue"),
    [(1_281_167, 256, 3000, 3840), (1_281_167, 4096, 3000, 0), (100_000, 256, 234, 3840), (2553, 128, 8, 512), (24, 8, 6, 8), (3, 2, 1, 2)],
)
def test_sizes_left_open_follow_from_the_data(samples: int, global_batch: int, prototypes: int, queue: int) -> None:
    facts = Facts(seed=0, samples=samples, global_batch=global_batch)
    for name in ("swav", "deepcluster-v2", "sela-v2"):
        kind = methods.method_class(name)
        sizes = {"prototypes": prototypes} | ({"queue": queue} if name == "swav" else {})
        assert kind.scaled(kind.Options(), facts) == sizes
        chosen = kind.Options(**sizes)
        assert kind.scaled(chosen, facts) == {}
        kind.check(chosen, facts)


def test_sizes_that_do_not_fit_the_data_are_refused() -> None:
    facts = Facts(seed=0, samples=50, global_batch=8, sizes=(32, 32))
    for name in ("swav", "deepcluster-v2", "sela-v2"):
        with pytest.raises(RequestError, match=r"50 samples cannot have 64 prototypes.*") as caught:
            methods.check(name, {"prototypes": 64}, facts=facts)
        assert caught.value.hint == "options.prototypes=50"
        with pytest.raises(RequestError, match="first two views must be of one size"):
            methods.check(name, {}, facts=facts._replace(sizes=(32, 16, 16)))
    for queue, near in ((30, 32), (3, 8)):
        with pytest.raises(RequestError, match=f"queue of {queue} keys is not a multiple of the global batch of 8") as caught:
            methods.check("swav", {"queue": queue}, facts=facts)
        assert caught.value.hint == f"options.queue={near}"
