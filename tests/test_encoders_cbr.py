"""CBR: the counts that Transfusion prints, the layers in their order, and the sides that vanish without padding."""

from typing import Any

import pytest
import torch
from torch import nn

from base.errors import RequestError
from encoders.build import build
from encoders.cuts import cuts

CLASSES = 5
# As printed in the paper: without the first convolution, batch norm and biases. The last is what the paper's text describes.
PRINTED = {
    "cbr_larget": 8_532_480,
    "cbr_largew": 8_432_128,
    "cbr_small": 2_108_672,
    "cbr_tiny": 1_076_480,
    "cbr_tiny_text": 4_303_360,
}
WHOLE = {
    "cbr_larget": 8_539_173,
    "cbr_largew": 8_443_461,
    "cbr_small": 2_114_341,
    "cbr_tiny": 1_079_845,
    "cbr_tiny_text": 4_310_085,
}


@pytest.mark.parametrize("padding", ["", "_valid"])
@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_counts_to_the_unit(name: str, padding: str) -> None:
    with torch.device("meta"):
        encoder = build(f"{name}{padding}", 3)
    convolutions = [module for module in encoder.net.modules() if isinstance(module, nn.Conv2d)]
    head = encoder.num_features * CLASSES
    assert sum(conv.weight.numel() for conv in convolutions[1:]) + head == PRINTED[name]
    assert sum(parameter.numel() for parameter in encoder.net.parameters()) + head + CLASSES == WHOLE[name]


@pytest.mark.parametrize("name", PRINTED)
def test_the_forward_is_that_of_the_layers_in_a_row(name: str) -> None:
    encoder = build(name, 1, seed=3).train()
    layers: list[nn.Module] = []
    for i, _ in enumerate(cuts(name), 1):
        ours: Any = encoder.net.get_submodule(f"conv{i}").conv
        conv = nn.Conv2d(ours.in_channels, ours.out_channels, ours.kernel_size, padding="same", bias=False)
        conv.weight = ours.weight
        layers += [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()] + ([nn.MaxPool2d(3, 2, 1)] if i <= 4 else [])
    by_hand = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 1, 64, 48)
    torch.testing.assert_close(encoder(x), by_hand(encoder.normalise(x)))
    assert encoder.features(x).shape[2:] == (4, 3)


def test_without_padding_large_t_takes_217_px_and_no_less() -> None:
    encoder = build("cbr_larget_valid", 1).eval()
    with torch.no_grad():
        assert encoder.features(torch.rand(1, 1, 217, 217)).shape == (1, 512, 1, 1)
        assert encoder.features(torch.rand(1, 1, 224, 224)).shape == (1, 512, 1, 1)
        with pytest.raises(RequestError, match="cbr_larget_valid takes images of at least 217 px, not of 216 x 216"):
            encoder(torch.rand(1, 1, 216, 216))


def test_timm_makes_one_with_a_classifier() -> None:
    import timm

    import encoders.cbr  # noqa: F401

    net = timm.create_model("cbr_tiny", num_classes=CLASSES, in_chans=1)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, CLASSES)
    assert sum(parameter.numel() for parameter in net.parameters()) == WHOLE["cbr_tiny"] - 2 * 25 * 32  # one channel instead of three
    assert set(timm.list_models("cbr_*")) == {f"{name}{padding}" for name in PRINTED for padding in ("", "_valid")}


def test_widths_narrow_the_last_layers() -> None:
    narrow = build("cbr_larget", 1, widths=(32, 64, 128, 128, 256))
    assert (narrow.num_features, narrow.pyramid_channels) == (256, (32, 64, 128, 256))
    with pytest.raises(RequestError, match="a CBR one for each of its layers"):
        build("cbr_larget", 1, widths=(32, 64))
