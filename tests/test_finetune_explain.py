"""Heat maps: where the signal is, for every family, at any cut, and without leaving a trace in the network."""

from pathlib import Path

import numpy as np
import pytest
import tiny_cell
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import heat
from analysis.results import Cell
from base.errors import RequestError
from encoders.build import build
from encoders.truncate import truncate
from encoders.volumes import inflate
from encoders.weights import sha256_of
from engine.context import LocalContext
from finetune.explain import SHOWN, chosen, grad_cam, heat_maps
from finetune.heads import head_for
from finetune.network import Network
from finetune.run import run
from finetune.task import load_task

torch.set_num_threads(1)
CHEST, LUNGS = load_task("phantom-chest"), load_task("lxs")
TWO = CHEST.model_copy(update={"kind": "multiclass", "labels": ["nothing", "square"], "metric": "accuracy", "loss": "ce"})
SIDE, SQUARE = 64, 16


def planted(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Noise; in every second image a bright square somewhere."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 120, (count, 1, SIDE, SIDE)).astype(np.uint8)
    corners = [tuple(int(v) for v in draw.integers(0, SIDE - SQUARE, 2)) for _ in range(count)]
    for i, (top, left) in enumerate(corners):
        if i % 2:
            x[i, 0, top : top + SQUARE, left : left + SQUARE] += 110
    return torch.from_numpy(x), torch.arange(count) % 2, corners  # type: ignore[return-value]


@pytest.fixture(scope="module")
def looking() -> Network:
    """A network that has learned to tell images with a square; its maps are 8 x 8."""
    encoder = truncate(build("test_resnet", 1), "layer2")
    torch.manual_seed(0)
    network = Network(encoder, head_for(TWO, encoder, linear=False), pyramid=False).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5  # so that its averages keep up with a dozen steps
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x, y, _ = planted(16, 0)
    for _ in range(16):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    assert (network.eval()(x).argmax(1) == y).all()
    return network


def test_heat_peaks_inside_a_planted_square(looking: Network) -> None:
    """T18, on images that were not trained on."""
    x, _, corners = planted(16, 7)
    heat_BHW = grad_cam(looking, x[1::2], [1] * 8)
    assert heat_BHW.shape == (8, SIDE, SIDE)
    for one, (top, left) in zip(heat_BHW, corners[1::2], strict=True):
        row, column = divmod(int(one.argmax()), SIDE)
        assert top <= row < top + SQUARE
        assert left <= column < left + SQUARE
        assert one[top : top + SQUARE, left : left + SQUARE].mean() > 3 * one.mean()
        assert one.max() == 1


def test_at_the_last_map_of_a_pooled_network_it_is_the_class_activation_map(looking: Network) -> None:
    """Selvaraju et al., section 3.1: with global average pooling and a linear layer Grad-CAM is CAM."""
    x = planted(4, 3)[0]
    with torch.no_grad():
        maps = looking.encoder.features(x)
        assert isinstance(looking.head.linear, torch.nn.Linear)
        cam = torch.einsum("bchw,c->bhw", maps, looking.head.linear.weight[1]).relu()
        cam = F.interpolate(cam[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    torch.testing.assert_close(grad_cam(looking, x, [1] * 4), cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30))


FAMILIES = ["test_resnet", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_tiny_patch4_window7_224", "cbr_tiny", "test_vit"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_has_heat_maps_and_is_left_as_it_was(architecture: str) -> None:
    """Frozen or not; also with tokens, and with channels last."""
    x = planted(2, 0)[0][:, :, :64, :64]
    encoder = build(architecture, 1, image_size=64)
    network = Network(encoder.requires_grad_(architecture != "test_resnet"), head_for(CHEST, encoder, linear=False), pyramid=False).train()
    before = sha256_of(network.state_dict())
    found = grad_cam(network, x, [0, 1])
    assert found.shape == (2, 64, 64)
    assert torch.isfinite(found).all()
    assert grad_cam(network, x, [0, 1]).equal(found)
    assert not any(parameter.grad is not None for parameter in network.parameters())
    assert sha256_of(network.state_dict()) == before
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(("architecture", "cut"), [("test_vit", "stem"), ("test_vit", "block1"), ("swin_tiny_patch4_window7_224", "stem")])
def test_heat_of_tokens_lies_where_the_image_differs(architecture: str, cut: str) -> None:
    """One patch is bright and all else equal: patches that are equal have equal heat, so positions were not mixed up."""
    encoder = truncate(build(architecture, 1, image_size=64, seed=3), cut)
    network = Network(encoder, head_for(CHEST, encoder, linear=False), pyramid=False)
    if architecture == "test_vit":
        torch.nn.init.zeros_(encoder.net.pos_embed)  # type: ignore[arg-type]
    x = torch.full((1, 1, 64, 64), 90, dtype=torch.uint8)
    x[:, :, 16:32, 32:48] = 255
    column = next(i for i in range(3) if grad_cam(network, x, [i]).any())
    raw = grad_cam(network, x, [column])[0]
    other = raw[:8, :8].mean()
    assert not torch.isclose(raw[23:25, 39:41].mean(), other, rtol=1e-3)
    torch.testing.assert_close(raw[56:, :8].mean(), other)


def test_masks_and_cuts_by_name() -> None:
    encoder = build("test_resnet", 1)
    network = Network(encoder, head_for(LUNGS, encoder, linear=False), pyramid=True)
    x = planted(2, 0)[0][:, :, :50, :60]
    for cut in ("stem", "layer2", "layer4"):
        assert grad_cam(network, x, cut=cut).shape == (2, 50, 60)
    with pytest.raises(RequestError, match="has no cut 'layer9'"):
        grad_cam(network, x, cut="layer9")
    short = truncate(encoder, "layer2")
    with pytest.raises(RequestError, match=r"truncated before 'layer4'.*stem, layer1\.0, layer2\.0"):
        grad_cam(Network(short, head_for(CHEST, short, linear=False), pyramid=False), x, [0, 0], "layer4")
    volumes = inflate(encoder)
    with pytest.raises(RequestError, match="not of 3-dimensional volumes"):
        grad_cam(Network(volumes, head_for(CHEST, volumes, linear=False), pyramid=False), torch.zeros(1, 1, 3, 32, 32), [0])


# -- of cells


@pytest.mark.parametrize("task", ["phantom-chest", "phantom-vessels"])
def test_the_same_images_are_shown_for_every_strategy(tmp_path: Path, task: str) -> None:
    shards = tiny_cell.corpora(tmp_path)
    held = {}
    for strategy in ("full", "linear", "knn") if task == "phantom-chest" else ("full", "linear"):
        trainer, _, _ = tiny_cell.trained(tiny_cell.config(shards, tmp_path, task, strategy={"name": strategy}), tmp_path)
        held[strategy] = heat_maps(trainer.module, trainer.task, trainer.arrays("test"))
    full = held["full"]
    assert len(full["ids"]) == SHOWN
    assert full["heat"].shape == (SHOWN, 32, 32)
    for other in held.values():
        assert (other["ids"] == full["ids"]).all()
        assert (other["label"] == full["label"]).all()
    if task == "phantom-chest":
        arrays = trainer.arrays("test")
        for at, label in zip(*chosen(trainer.task, arrays), strict=True):
            assert arrays.target[at, trainer.task.labels.index(label)] == 1
    drawn = heat.figure(held)
    FigureCanvasAgg(drawn).draw()
    assert len(drawn.axes) == 3 * (1 + len(held))
    loss = {str(key): wrong for key, wrong in zip(full["ids"], (3, 9, 4, 8, 1, 7, 2, 6), strict=True)}
    drawn = heat.figure(held, loss)
    first = drawn.axes[:: 1 + len(held)]
    assert [one.get_ylabel().splitlines()[0] for one in first] == ["worst", "median", "best"]
    for one, at in zip(first, (1, 2, 4), strict=True):  # of losses 9, 4 and 1
        assert (one.images[0].get_array() == full["image"][at]).all()
    with pytest.raises(ValueError, match="no image in common"):
        heat.figure({"a": full, "b": full | {"ids": np.array(["other"] * SHOWN)}})


def test_the_report_shows_what_cells_kept(tmp_path: Path) -> None:
    shards = tiny_cell.corpora(tmp_path)
    cells = []
    for strategy in ("full", "linear"):
        config = tiny_cell.config(shards, tmp_path, strategy={"name": strategy}, key=strategy.ljust(16, "0"))
        config = config.model_copy(update={"out": str(tmp_path / strategy)})
        cells.append(Cell(config.out, run(config, LocalContext(dir=str(tmp_path / "context")))))
    assert heat.section(cells) == ""  # the card of this dataset does not share images
    trainer, _, _ = tiny_cell.trained(tiny_cell.config(shards, tmp_path), tmp_path)
    np.savez_compressed(tmp_path / "full" / "heat.npz", **heat_maps(trainer.module, trainer.task, trainer.arrays("test")))  # type: ignore[arg-type]
    made = heat.section(cells)
    assert "Grad-CAM of random full" in made
    assert "linear" not in made
    assert "data:image/png;base64," in made
    assert "the first" not in made
    with np.load(tmp_path / "full" / "heat.npz") as arrays:
        loss = {str(key): 0.0 for key in arrays["ids"]}
    many = [Cell(cells[0].url, cells[0].result | {"source": f"s{n}"}) for n in range(8)]
    made = heat.section(many, loss)
    assert "the worst, the median and the best by the loss of the best cell on validation; the first 6 of 8 that kept them." in made
    assert "the worst" not in heat.section(many, {"a study": 0.0})  # whose images have no loss of their own
