"""Inflated encoders: equal slices give the image's features, at the ends too; depth matters otherwise."""

import copy

import pytest
import torch

from base.errors import RequestError
from encoders.build import Encoder, build
from encoders.cuts import architectures, family
from encoders.truncate import truncate
from encoders.volumes import CANNOT, inflate
from engine import norm

# One of each family, with a cut in it, and what differs inside of ResNets.
OF_FAMILIES = {
    "test_resnet": "layer2",
    "resnet18d": "layer1.0",
    "resnet26t": "stem",
    "densenet121": "denseblock1.denselayer3",
    "cbr_tiny": "conv2",
    "alexnet": "conv2",
    "resnet50_clip_gap": "stages.1",
    "resnetv2_50x1_bit": "stages.0",
    "inception_v3": "Mixed_6b",
    "efficientnet_b0": "blocks.2",
    "convnext_tiny": "stages.1",
}
SIDES = {"inception_v3": (96, 80), "alexnet": (64, 80)}


def pixels(name: str, *shape: int) -> torch.Tensor:
    """Of that many images, or volumes and slices."""
    count, *slices = shape
    size = (count, 1, *slices, *SIDES.get(name, (64, 32)))
    return torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moved(name: str) -> Encoder:
    """An encoder in double precision, with batch-norm statistics, scales and biases that are not those of the start: there blocks do next
    to nothing, as the last scales of most are 0 or 1e-6."""
    encoder = build(name, 1, mean=(0.4,), std=(0.2,), seed=1).double().train()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=draw, dtype=torch.float64))
        encoder(pixels(name, 4))
    return encoder.eval()


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_a_volume_of_equal_slices_has_the_images_features_on_every_slice(name: str) -> None:
    whole = moved(name)
    x = pixels(name, 2)
    stack = x[:, :, None].repeat(1, 1, 4, 1, 1)
    for encoder in (whole, truncate(whole, OF_FAMILIES[name])):
        volumes = inflate(encoder)
        with torch.no_grad():
            torch.testing.assert_close(volumes(stack), encoder(x))
            for of_volume, of_image in zip(volumes.pyramid(stack), encoder.pyramid(x), strict=True):
                torch.testing.assert_close(of_volume, of_image[:, :, None].expand_as(of_volume))
        assert volumes.net.state_dict().keys() == encoder.net.state_dict().keys()
        assert volumes.cuts == encoder.cuts


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_the_order_of_slices_matters(name: str) -> None:
    volumes = inflate(moved(name))
    x = pixels(name, 1, 5)
    with torch.no_grad():
        z = volumes(x)
        assert (z - volumes(x[:, :, [2, 0, 4, 1, 3]])).abs().max() > 1e-6 * z.abs().max()


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_truncated_encoders_are_inflated_and_train(name: str) -> None:
    small = truncate(moved(name), OF_FAMILIES[name])
    volumes = inflate(small)
    assert volumes.num_features == small.num_features
    volumes.train()(pixels(name, 2, 5)).square().sum().backward()
    assert [name for name, parameter in volumes.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []
    assert all(parameter.grad is None for parameter in small.parameters())
    frozen = inflate(small.requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("name", [name for name in architectures() if family(name) not in CANNOT])
def test_every_convolutional_architecture_is_inflated(name: str) -> None:
    with torch.device("meta"):
        volumes = inflate(build(name, 1).to("meta").eval())
        side = volumes.smallest
        assert volumes(torch.zeros(1, 1, 3, side, side, dtype=torch.uint8)).shape == (1, volumes.num_features)


def test_what_cannot_be_inflated_is_said() -> None:
    for name in ("test_vit", "swin_tiny_patch4_window7_224"):
        with pytest.raises(RequestError, match=f"{name} is not inflated to volumes: it attends among the patches of one image"):
            inflate(build(name, 1))
    with pytest.raises(RequestError, match="takes volumes: batch, channels, slices"):
        inflate(build("test_resnet", 1))(torch.zeros(1, 1, 32, 32))
    with pytest.raises(RequestError, match="flat features of volumes"):
        inflate(truncate(build("test_resnet", 1), "layer1", flat=32))


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0"])
def test_batch_norms_with_an_activation_keep_it_as_synchronised_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs and several workers they lost it: timm converts the kind that it knows, which those over slices are not."""
    volumes = inflate(moved(name)).eval()
    x = pixels(name, 1, 4)
    with torch.no_grad():
        expected = volumes(x)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        converted = norm.convert(copy.deepcopy(volumes)).eval()
        assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in converted.modules())
        torch.testing.assert_close(converted(x), expected)
