"""Inflated encoders: equal slices give the image's features, at the ends too; depth matters otherwise."""

import pytest
import torch

from base.errors import RequestError
from encoders.build import build
from encoders.cuts import architectures, family
from encoders.truncate import truncate
from encoders.volumes import CAN, inflate


def moved(name: str) -> torch.nn.Module:
    """An encoder whose batch-norm statistics are not those of the start."""
    encoder = build(name, 1, mean=(0.4,), std=(0.2,), seed=1).train()
    with torch.no_grad():
        encoder(torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8))
    return encoder.eval()


@pytest.mark.parametrize("name", ["test_resnet", "resnet18d", "resnet26t", "densenet121", "cbr_tiny"])
def test_a_volume_of_equal_slices_has_the_images_features_on_every_slice(name: str) -> None:
    encoder = moved(name)
    x = torch.randint(0, 256, (2, 1, 64, 48), dtype=torch.uint8)
    volumes = inflate(encoder)  # type: ignore[arg-type]
    with torch.no_grad():
        stack = x[:, :, None].repeat(1, 1, 4, 1, 1)
        torch.testing.assert_close(volumes(stack), encoder(x), rtol=1e-3, atol=1e-4)
        for of_volume, of_image in zip(volumes.pyramid(stack), encoder.pyramid(x), strict=True):  # type: ignore[operator]
            torch.testing.assert_close(of_volume, of_image[:, :, None].expand_as(of_volume), rtol=1e-3, atol=1e-4)
    assert volumes.net.state_dict().keys() == encoder.net.state_dict().keys()  # type: ignore[union-attr]


def test_the_order_of_slices_matters() -> None:
    encoder = moved("test_resnet")
    x = torch.randint(0, 256, (1, 1, 5, 32, 32), dtype=torch.uint8)
    mixed = x[:, :, [2, 0, 4, 1, 3]]
    with torch.no_grad():
        assert (inflate(encoder)(x) - inflate(encoder)(mixed)).abs().max() > 1e-3  # type: ignore[arg-type]


def test_truncated_encoders_are_inflated_and_train() -> None:
    small = truncate(build("resnet18", 1, seed=1).eval(), "layer2")
    volumes = inflate(small)
    x = torch.randint(0, 256, (2, 1, 16, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(volumes(x[:, :, :1].repeat(1, 1, 3, 1, 1)), small(x[:, :, 0]), rtol=1e-3, atol=1e-4)
    volumes.train()(x).sum().backward()
    assert volumes.num_features == 128
    assert all(parameter.grad is not None for parameter in volumes.parameters())
    assert all(parameter.grad is None for parameter in small.parameters())


@pytest.mark.parametrize("name", [name for name in architectures() if family(name) in CAN])
def test_every_convolutional_architecture_is_inflated(name: str) -> None:
    with torch.device("meta"):
        volumes = inflate(build(name, 1).to("meta").eval())
        side = max(32, volumes.smallest)
        assert volumes(torch.zeros(1, 1, 3, side, side, dtype=torch.uint8)).shape == (1, volumes.num_features)


def test_what_cannot_be_inflated_is_said() -> None:
    with pytest.raises(RequestError, match="test_vit is not inflated to volumes"):
        inflate(build("test_vit", 1))
    with pytest.raises(RequestError, match="takes volumes: batch, channels, slices"):
        inflate(build("test_resnet", 1))(torch.zeros(1, 1, 32, 32))
    with pytest.raises(RequestError, match="flat features of volumes"):
        inflate(truncate(build("test_resnet", 1), "layer1", flat=32))
