"""Methods with memory: each loss against NumPy, queues, banks and clusters, what is refused."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_shards_views import official_views
from torch import Tensor
from torch.nn import functional as F
from two_ranks import TinyEncoder

from base.errors import RequestError
from base.seeds import seed_of
from pretrain import methods, probes
from pretrain.memory import Bank, Queue, info_nce, queue_length
from pretrain.methods.pcl import cluster_counts, concentrations
from pretrain.recipe import load_recipe

SAMPLES, BATCH, SIDE = 40, 8, 16
SMALL: dict[str, dict[str, Any]] = {
    "moco-v1": {"output_dim": 6},
    "moco-v2": {"output_dim": 6, "hidden_dim": 10},
    "infomin": {"output_dim": 6, "hidden_dim": 10, "patch_weight": 0.3},
    "densecl": {"output_dim": 6, "hidden_dim": 10, "dense_weight": 0.3},
    "pcl-v1": {"output_dim": 6, "clusters": [4, 7], "warmup_epochs": 1},
    "pcl-v2": {"output_dim": 6, "hidden_dim": 10, "clusters": [4, 7], "warmup_epochs": 1},
    "insdis": {"output_dim": 6},
    "pirl": {"output_dim": 6, "patch_weight": 0.3},
}
QUEUED = [name for name in SMALL if name not in ("insdis", "pirl")]


def make(name: str, samples: int = SAMPLES, **options: Any) -> Any:
    torch.manual_seed(0)
    method = methods.build(name, TinyEncoder(), SMALL[name] | options, methods.Facts(seed=3, samples=samples, global_batch=BATCH))
    method.train()
    return method


def batch(name: str, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    wholes = {"insdis": 1, "pirl": 1}.get(name, 2)
    sizes = [SIDE] * wholes + ([8] * 9 if name in ("pirl", "infomin") else [])
    views = [torch.from_numpy(random.integers(0, 256, (BATCH, 1, size, size), dtype=np.uint8)) for size in sizes]
    return SimpleNamespace(views=views, index_B=torch.from_numpy(random.permutation(SAMPLES)[:BATCH]))


def clear_drift(method: Any) -> Any:
    """A key encoder that differs from the encoder, so that a loss which used the wrong one would be seen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.teachers["key"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method


def unit(x: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / norms


def nce(positive: np.ndarray, negative: np.ndarray, temperature: float) -> float:
    """Row by row as the papers have it; a negative of -inf is none."""
    rows = [
        -math.log(math.exp(p / temperature) / (math.exp(p / temperature) + np.exp(n / temperature).sum()))
        for p, n in zip(positive, negative, strict=True)
    ]
    return float(np.mean(rows))


def numpy_of(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().double().numpy()
    return found


def pairs(method: Any, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys by hand."""
    q = method.head(method.encoder(given.views[0]))
    encoder, head = method.teachers["key"]
    return unit(numpy_of(q)), unit(numpy_of(head(encoder(given.views[1]))))


def patches_of(method: Any, views: list[Tensor]) -> np.ndarray:
    """g by hand, image by image: nine projections in the order of the views, then one of all."""
    z = method.encoder(torch.cat(views)).reshape(9, BATCH, -1)
    rows = [torch.cat([method.patch_head.each(z[p, i]) for p in range(9)]) for i in range(BATCH)]
    return unit(numpy_of(method.patch_head.all(torch.stack(rows))))


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "infomin"])
def test_moco_and_infomin_against_numpy(name: str) -> None:
    method, given = clear_drift(make(name)), batch(name)
    output = method(given)
    q, k = pairs(method, given)
    queue, t = numpy_of(method.queue.keys_Kd), method.options.temperature
    expected = nce((q * k).sum(1), q @ queue.T, t)
    if name == "infomin":
        g = patches_of(method, given.views[2:])
        expected = 0.7 * expected + 0.3 * nce((g * k).sum(1), g @ queue.T, t)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(output.logs["queue_top1"]) == pytest.approx(((q * k).sum(1) > (q @ queue.T).max(1)).mean())
    output.loss.backward()
    assert all(parameter.grad is None for parameter in method.teachers["key"].parameters())


def test_densecl_against_numpy() -> None:
    method, given = clear_drift(make("densecl")), batch("densecl")
    output = method(given)
    key = method.teachers["key"]
    maps = [net.features(view).flatten(2).transpose(1, 2) for net, view in zip((method.encoder, key["encoder"]), given.views, strict=True)]
    q, k = (unit(numpy_of(h["whole"](z.mean(1)))) for h, z in zip((method.head, key["head"]), maps, strict=True))
    r, raw = numpy_of(method.head["places"](maps[0])), numpy_of(key["head"]["places"](maps[1]))
    alike = unit(numpy_of(maps[0])) @ unit(numpy_of(maps[1])).transpose(0, 2, 1)
    t = np.stack([unit(raw)[i][alike[i].argmax(1)] for i in range(BATCH)]).reshape(-1, 6)
    r = unit(r).reshape(-1, 6)
    places = nce((r * t).sum(1), r @ numpy_of(method.dense_queue.keys_Kd).T, 0.2)
    whole = nce((q * k).sum(1), q @ numpy_of(method.queue.keys_Kd).T, 0.2)
    assert float(output.loss.detach()) == pytest.approx(0.7 * whole + 0.3 * places, rel=1e-5)
    method.on_step_end()
    np.testing.assert_allclose(numpy_of(method.queue.keys_Kd)[:BATCH], k, atol=1e-6)
    np.testing.assert_allclose(numpy_of(method.dense_queue.keys_Kd)[:BATCH], unit(raw.mean(1)), atol=1e-6)


@pytest.mark.parametrize("negatives", [None, 9])
@pytest.mark.parametrize("name", ["insdis", "pirl"])
def test_banks_against_numpy(name: str, negatives: int | None) -> None:
    """An image's own row is never its negative; left open, all others are."""
    method, given = make(name, negatives=negatives), batch(name)
    method.clock = methods.Clock(4, 10, 5)
    output, bank = method(given), numpy_of(method.bank.rows_Nd)
    v, index = unit(numpy_of(method.head(method.encoder(given.views[0])))), given.index_B.numpy()
    drawn = np.arange(SAMPLES)
    if negatives:
        drawn = torch.randint(SAMPLES, (9,), generator=torch.Generator().manual_seed(seed_of("negatives", 3, 4))).numpy()
    hidden = np.where(index[:, None] == drawn, -np.inf, 0.0)
    expected = nce((v * bank[index]).sum(1), v @ bank[drawn].T + hidden, 0.07)
    if name == "pirl":
        g = patches_of(method, given.views[1:])
        expected = 0.7 * expected + 0.3 * nce((g * bank[index]).sum(1), g @ bank[drawn].T + hidden, 0.07)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert method.chance_loss(BATCH) == pytest.approx(math.log((negatives or SAMPLES - 1) + 1))
    method.on_step_end()
    bank[index] = unit(0.5 * bank[index] + 0.5 * v)
    np.testing.assert_allclose(numpy_of(method.bank.rows_Nd), bank, atol=1e-6)


def test_a_bank_row_that_comes_twice_is_written_once() -> None:
    bank, v_Bd = Bank(5, 3), F.normalize(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    before = bank.rows_Nd.clone()
    bank.update(v_Bd, torch.tensor([2, 4, 2]), momentum=0.8)
    torch.testing.assert_close(bank.rows_Nd[2], F.normalize(0.8 * before[2] + 0.2 * v_Bd[0], dim=0))
    assert torch.equal(bank.rows_Nd[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("name", ["pcl-v1", "pcl-v2"])
def test_pcl_against_numpy(name: str) -> None:
    method, given = clear_drift(make(name)), batch(name)
    corpus_Nd = F.normalize(torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1)), dim=1)

    def embed(network: Any) -> tuple[Tensor, Tensor]:
        assert network(given.views[1]).shape == (BATCH, 6)
        return torch.arange(SAMPLES), corpus_Nd

    q, k = pairs(method, given)
    expected = nce((q * k).sum(1), q @ numpy_of(method.queue.keys_Kd).T, 0.2)
    method.clock = methods.Clock(4, 20, 5)
    method.on_epoch_start(embed)
    assert float(method(given).loss.detach()) == pytest.approx(expected, rel=1e-5)  # warm-up
    method.clock = methods.Clock(5, 20, 5)
    method.on_epoch_start(embed)
    found = []
    for clustering in method.clusterings:
        centres, cluster = numpy_of(clustering.centres_kd), clustering.cluster_N.numpy()
        np.testing.assert_array_equal(cluster, (numpy_of(corpus_Nd) @ centres.T).argmax(1))
        members = [numpy_of(corpus_Nd)[cluster == j] for j in range(len(centres))]
        phi = np.array(
            [np.linalg.norm(v - c, axis=1).sum() / (len(v) * math.log(len(v) + 10)) for v, c in zip(members, centres, strict=True)]
        )
        phi[[len(v) < 2 for v in members]] = phi.max()
        phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
        phi *= 0.2 / phi.mean()
        np.testing.assert_allclose(numpy_of(clustering.phi_k), phi, rtol=1e-5)
        weights = np.exp(q @ centres.T / phi)
        found.append(-np.log(weights[np.arange(BATCH), cluster[given.index_B]] / weights.sum(1)).mean())
    output = method(given)
    assert float(output.loss.detach()) == pytest.approx(expected + np.mean(found), rel=1e-5)
    torch.testing.assert_close(output.features["prototypes"].sum(1), torch.ones(BATCH))


def test_concentrations_of_clusters_without_spread() -> None:
    """Equal images make no division by zero, and one that is alone does not count as tight."""
    z_Nd = F.normalize(torch.ones(6, 3), dim=1)
    flat = concentrations(z_Nd, z_Nd[:2].clone(), torch.tensor([0, 0, 0, 1, 1, 1]), 0.2)
    torch.testing.assert_close(flat, torch.full((2,), 0.002))
    spread = F.normalize(torch.tensor([[1.0, 0.1], [1, -0.1], [0, 1]]), dim=1)
    phi_k = concentrations(spread, torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 0, 1]), 0.2)
    torch.testing.assert_close(phi_k, torch.full((2,), 0.2))


def test_clusters_follow_the_size_of_the_corpus() -> None:
    assert cluster_counts(1_281_167) == (25_000, 50_000, 100_000)
    assert cluster_counts(1000) == (20, 39, 78)
    assert cluster_counts(2) == (2, 2, 2)
    facts = methods.Facts(seed=0, samples=1000, global_batch=BATCH)
    kind: Any = methods.method_class("pcl-v2")
    assert kind.scaled(kind.Options(), facts) == {"queue": 248, "clusters.0": 20, "clusters.1": 39, "clusters.2": 78}
    assert kind.scaled(kind.Options(queue=16, clusters=(3,)), facts) == {}


def test_a_queue_wraps_around() -> None:
    """lightly's drops keys that pass its end."""
    torch.manual_seed(0)
    queue, keys = Queue(6, 3), F.normalize(torch.randn(4, 4, 3), dim=2)
    for number in range(4):
        queue.push(keys[number])
    assert int(queue.place) == 16 % 6
    torch.testing.assert_close(queue.keys_Kd.roll(-int(queue.place), 0), keys.flatten(0, 1)[-6:])  # from the oldest on


@pytest.mark.parametrize("name", list(SMALL))
def test_memory_is_in_the_checkpoint(name: str) -> None:
    """Does not repeat lightly's memory bank, whose queue is in no checkpoint, so that a resumed run meets a random one."""
    from lightly.loss import NTXentLoss

    assert not NTXentLoss(memory_bank_size=(16, 6)).state_dict()  # the defect stands: our own queue is still needed
    method = make(name)
    before = method.state_dict()["bank.rows_Nd" if name in ("insdis", "pirl") else "queue.keys_Kd"].clone()
    method(batch(name))
    method.on_step_end()
    state = method.state_dict()
    assert not torch.equal(state["bank.rows_Nd" if name in ("insdis", "pirl") else "queue.keys_Kd"], before)
    assert {key for key, _ in method.named_buffers()} <= state.keys()
    if name in QUEUED:
        assert int(state["queue.place"]) == BATCH % len(state["queue.keys_Kd"])


@pytest.mark.parametrize("name", QUEUED)
def test_the_key_encoder_follows(name: str) -> None:
    method = make(name, momentum=0.9)
    for parameter in method.parameters():
        parameter.data.add_(1.0)
    before = [parameter.clone() for parameter in method.teachers["key"].parameters()]
    method.on_step_end()
    students = list(method.followed("key").parameters())
    for old, now, student in zip(before, method.teachers["key"].parameters(), students, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * student.detach())


def test_all_micro_batches_of_an_update_reach_the_queue() -> None:
    method = make("moco-v1", samples=200)
    given = [batch("moco-v1", seed) for seed in (0, 1)]
    keys = [method(part).features["projector_1"] for part in given]
    method.on_step_end()
    torch.testing.assert_close(method.queue.keys_Kd[: 2 * BATCH], torch.cat(keys))


def test_equal_embeddings_find_nothing() -> None:
    same = torch.ones(4)
    loss, top1 = info_nce(same, torch.ones(4, 15), temperature=0.2)
    assert (float(loss), float(top1)) == (pytest.approx(math.log(16)), 0.0)


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "insdis"])
def test_it_learns(name: str) -> None:
    """Forty steps on images that differ: the loss falls below that of chance, and the other view of an image is found within the batch."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.integers(0, 256, (SAMPLES, 1, 4, 4)).astype(np.float32))
    corpus = F.interpolate(coarse, size=SIDE, mode="bilinear")
    options = {"temperature": 0.2, "output_dim": 16} | ({} if name == "insdis" else {"momentum": 0.9})
    method = methods.build(name, TinyEncoder(), options, methods.Facts(seed=0, samples=SAMPLES, global_batch=BATCH))
    method.train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses, found = [], []
    for step in range(40):
        method.clock = methods.Clock(step, 40, SAMPLES // BATCH)
        index_B = torch.from_numpy(random.permutation(SAMPLES)[:BATCH])
        views = [(corpus[index_B] + 10 * torch.randn(BATCH, 1, SIDE, SIDE)).clamp(0, 255).to(torch.uint8) for _ in range(2)]
        output = method(SimpleNamespace(views=views, index_B=index_B))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.on_step_end()
        losses.append(float(output.loss.detach()))
        found.append(probes.contrastive_top1(output.features["projector_0"], output.features["projector_1"]) if name != "insdis" else 1.0)
    chance = method.chance_loss(BATCH)
    assert chance is not None
    assert np.mean(losses[-5:]) < 0.8 * chance
    assert np.mean(found[-5:]) > 0.5


def test_what_is_refused() -> None:
    with pytest.raises(RequestError, match=r"queue of 20 keys is not a multiple of the global batch of 8 \(options.queue=16\)"):
        make("moco-v2", queue=20)
    with pytest.raises(RequestError, match=r"queue of 3 .*options.queue=8"):
        make("densecl", queue=3)
    with pytest.raises(RequestError, match=r"40 images cannot make 41 clusters .*options.clusters=\[2, 2, 3\]"):
        make("pcl-v1", clusters=[41])
    with pytest.raises(RequestError, match=r"40 negatives, and every image has only 39 others.*options.negatives=39"):
        make("insdis", negatives=40)
    for name, wholes in (("infomin", 2), ("pirl", 1)):
        facts = methods.Facts(seed=0, samples=SAMPLES, global_batch=BATCH, sizes=(SIDE,) * (3 - wholes) + (8,) * 9)
        with pytest.raises(RequestError, match=rf"views.crops=\[\{{count: {wholes}\}}\]"):
            methods.build(name, TinyEncoder(), SMALL[name], facts)
    with pytest.raises(RequestError, match="convolutional"):
        methods.check("densecl", {}, architecture="vit_small_patch16_224")


def test_a_queue_that_is_left_open() -> None:
    """The largest multiple of the batch in a quarter of the corpus, one batch at least, the official length at most."""
    lengths = [queue_length(65536, methods.Facts(seed=0, samples=n, global_batch=256)) for n in (300, 5000, 1_281_167)]
    assert lengths == [256, 1024, 65536]


@pytest.mark.parametrize("name", list(SMALL))
def test_paper_values(name: str) -> None:
    recipe, kind = load_recipe(f"{name}/paper"), methods.method_class(name)
    optimizer, first_version = recipe.optimizer, name in ("moco-v1", "pcl-v1", "insdis", "pirl")
    assert (recipe.global_batch, optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.momentum) == (256, "sgd", 0.03, 1e-4, 0.9)
    assert recipe.epochs == (800 if name in ("moco-v2", "infomin") else 200)
    assert optimizer.milestones == ((0.6, 0.8) if first_version else ())
    official = {"densecl": "moco-v2", "pcl-v2": "moco-v2"}.get(name, name)
    assert recipe.views == official_views().get(official, recipe.views)
    scaled = kind.scaled(kind.Options(**recipe.options), methods.Facts(seed=0, samples=1_281_167, global_batch=256))
    clusters = {"clusters.0": 25_000, "clusters.1": 50_000, "clusters.2": 100_000}
    if name in ("insdis", "pirl"):
        assert scaled == {"negatives": 65536}
    else:
        assert scaled == ({"queue": 16384} | clusters if name.startswith("pcl") else {"queue": 65536})


@pytest.mark.parametrize("name", list(SMALL))
def test_losses_are_float32_under_bf16(name: str) -> None:
    """Networks in bf16, keys, banks and softmaxes in float32."""
    given = batch(name)
    expected = float(make(name)(given).loss.detach())
    method = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(given)
    assert output.loss.dtype == torch.float32
    assert float(output.loss.detach()) == pytest.approx(expected, rel=0.03)
    method.on_step_end()
    assert all(buffer.dtype != torch.bfloat16 for buffer in method.buffers())
