"""Encoders: one contract for every architecture."""

import pytest
import torch

from base.errors import RequestError
from encoders.build import build
from encoders.cuts import architectures, cuts, family
from encoders.weights import sha256_of

SMALL = ["test_resnet", "resnet10t", "resnet18"]


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_has_cuts_that_describe_it(name: str) -> None:
    # On the meta device: shapes of all of them cost nothing there.
    with torch.device("meta"):
        encoder = build(name, in_chans=1).to("meta").eval()
        maps = encoder.pyramid(torch.zeros(2, 1, 64, 96, dtype=torch.uint8))
    assert [(64 // m.shape[-2], 96 // m.shape[-1]) for m in maps] == [(cut.reduction,) * 2 for cut in cuts(name)]
    assert tuple(m.shape[1] for m in maps) == encoder.pyramid_channels
    assert encoder.num_features == encoder.pyramid_channels[-1]


@pytest.mark.parametrize("name", SMALL)
def test_pooled_features_are_the_mean_of_the_last_map(name: str) -> None:
    encoder = build(name, in_chans=3, seed=1).eval()
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder.pyramid(x)[-1].mean((2, 3)), encoder(x))


def test_build_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    states = [build("test_resnet", 1, seed=seed).net.state_dict() for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(3), expected)
    assert sha256_of(states[0]) == sha256_of(states[1]) != sha256_of(states[2])


def test_pixels_are_normalised_in_the_first_layer_and_nowhere_else() -> None:
    encoder = build("test_resnet", 3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    stored = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    by_hand = (stored.float() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(stored), encoder.net(by_hand))
        torch.testing.assert_close(encoder(stored.float() / 255), encoder(stored))
    assert not any(name.startswith("normalise") for name in encoder.state_dict())


def test_unknown_architectures_name_the_families_and_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"did you mean 'resnet50'.*resnet:"):
        family("resnet50x")
    with pytest.raises(RequestError, match="families are resnet"):
        build("vgg16", 3)
    assert build("resnet50", 3).net.num_features == 2048


def test_resnet50_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in build("resnet50", 3).net.parameters()) == 23_508_032
