"""Heads: every family of encoders with every decoder, any side of an image, ordered grades."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import RequestError
from encoders.build import Encoder, build
from encoders.truncate import truncate
from encoders.volumes import inflate
from encoders.weights import sha256_of
from finetune.heads import DecoderHead, PooledHead, PyramidHead, head_for, pad
from finetune.network import Network
from finetune.task import Task, load_task

torch.set_num_threads(1)
LUNGS, CHEST = load_task("lxs"), load_task("phantom-chest")
GRADES = CHEST.model_copy(update={"kind": "ordinal", "labels": ["none", "mild", "severe"], "loss": "cumulative"})
DECODERS = ("unet", "unetplusplus", "upernet")
# The smallest of each family, and the side that it is tried at beside 64: odd, where the network takes odd sides.
FAMILIES = {
    "test_resnet": 45,
    "densenet121": 45,
    "inception_v3": 75,
    "efficientnet_b0": 45,
    "convnext_tiny": 45,
    "swin_tiny_patch4_window7_224": 45,
    "cbr_tiny": 45,
    "cbr_tiny_valid": 99,
    "test_vit": 45,
}


def masks(decoder: str) -> Task:
    return LUNGS.model_copy(update={"decoder": decoder})


@cache
def shapes_only(architecture: str) -> Encoder:
    with torch.device("meta"):
        return build(architecture, 1, image_size=64).to("meta")


def shapes_of(encoder: Encoder, task: Task, size: tuple[int, int]) -> tuple[int, ...]:
    """The network's mask of a batch of two, on the device that computes shapes alone."""
    network = Network(encoder, head_for(task, encoder, linear=False), pyramid=True).to("meta").train()
    return tuple(network(torch.zeros(2, encoder.in_chans, *size, dtype=torch.uint8, device="meta")).shape)


# What decoders can tell apart: maps from /2 on, from /4 on, all of one size, without padding. Each meets every decoder, other families one.
PYRAMIDS = ("test_resnet", "convnext_tiny", "test_vit", "cbr_tiny_valid")
PAIRS = [
    pytest.param(architecture, decoder, marks=() if decoder == "unetplusplus" or architecture in PYRAMIDS else pytest.mark.long)
    for architecture in FAMILIES
    for decoder in DECODERS
]


@pytest.mark.parametrize(("architecture", "decoder"), PAIRS)
def test_masks_have_the_images_size(architecture: str, decoder: str) -> None:
    encoder, odd = shapes_only(architecture), FAMILIES[architecture]
    for size in ((64, 64), (odd, odd + 10)) if encoder.smallest <= 64 else ((odd, odd + 10),):
        assert shapes_of(encoder, masks(decoder), size) == (2, *size)


def test_labels_of_images_that_are_no_whole_patches_are_refused() -> None:
    """Masks pad their images; a classified image is not changed behind anybody's back."""
    for architecture, patch in (("test_vit", 16), ("swin_tiny_patch4_window7_224", 4)):
        encoder = build(architecture, 1, image_size=64).to("meta")
        with pytest.raises(RequestError, match=rf"multiples of {patch} px, not 50 x 50"):
            encoder(torch.zeros(1, 1, 50, 50, dtype=torch.uint8, device="meta"))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cut", ["stem", "layer1", "layer2", "layer4"])
def test_truncated_encoders_segment(cut: str, decoder: str) -> None:
    encoder = truncate(build("test_resnet", 1), cut).to("meta")
    assert shapes_of(encoder, masks(decoder), (45, 64)) == (2, 45, 64)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("architecture", "cut"),
    [("test_vit", "stem"), ("test_vit", "block3"), ("convnext_tiny", "stem"), ("densenet121", "denseblock2.denselayer5")],
)
def test_truncated_encoders_of_other_families_segment(architecture: str, cut: str, decoder: str) -> None:
    encoder = truncate(build(architecture, 1, image_size=64), cut).to("meta")
    assert shapes_of(encoder, masks(decoder), (45, 64)) == (2, 45, 64)


def test_slim_encoders_segment() -> None:
    encoder = build("resnet18", 1, widths=(64, 128, 128, 128)).to("meta")
    for decoder in DECODERS:
        assert shapes_of(encoder, masks(decoder), (64, 64)) == (2, 64, 64)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "cbr_tiny"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_of_a_decoder_learns(architecture: str, decoder: str) -> None:
    encoder = build(architecture, 1, image_size=32)
    network = Network(encoder, head_for(masks(decoder), encoder, linear=False), pyramid=True)
    x = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network(x).square().mean().backward()
    idle = [name for name, parameter in network.head.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []
    assert all(parameter.grad is not None for parameter in encoder.net.parameters() if parameter.ndim > 1 and architecture == "test_resnet")


def test_decoders_see_the_encoders_own_tensors() -> None:
    """A10: no second copy under other names stands between the weights that were loaded and the mask."""
    encoder = build("test_resnet", 1, seed=5)
    before = sha256_of(encoder.net.state_dict())
    network = Network(encoder, head_for(masks("unet"), encoder, linear=False), pyramid=True).eval()
    assert sha256_of(network.encoder.net.state_dict()) == before
    x = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = network(x)
    with torch.no_grad():
        next(encoder.net.parameters()).mul_(2)
    assert not torch.equal(first, network(x))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_missing_fine_map_is_no_skip_and_nothing_else_is_lost(decoder: str) -> None:
    """ConvNeXt's first map is /4: the decoder still reaches the full size, and reads every map that there is."""
    head = DecoderHead(decoder, (6, 8, 10, 12), (4, 8, 16, 32), 1).eval()  # type: ignore[arg-type]
    maps = [torch.randn(1, width, 64 // r, 64 // r, requires_grad=True) for width, r in zip((6, 8, 10, 12), (4, 8, 16, 32), strict=True)]
    head(maps, (64, 64)).sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in maps)
    assert head.levels == ((4, 8, 16, 32) if decoder == "upernet" else (2, 4, 8, 16, 32))


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_mask_of_a_padded_image_is_the_mask_of_the_image(decoder: str) -> None:
    """Sides that strides do not divide: what is cut off is what was padded, and nothing is stretched."""
    encoder = build("test_resnet", 1, seed=1)
    network = Network(encoder, head_for(masks(decoder), encoder, linear=False), pyramid=True).eval()
    x = torch.randint(0, 256, (1, 1, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = pad(x, 32)
    assert whole.shape == (1, 1, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(x), network(whole)[:, :50, :70])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 16, 32]))
def test_padding_repeats_the_edge(height: int, width: int, stride: int) -> None:
    x = torch.arange(height * width).view(1, 1, height, width)
    padded = pad(x, stride)
    assert padded.shape[-2] % stride == padded.shape[-1] % stride == 0
    assert padded.shape[-2] - height < stride
    wanted = F.pad(x.double(), (0, padded.shape[-1] - width, 0, padded.shape[-2] - height), mode="replicate").long()
    assert torch.equal(padded, wanted)


def test_the_linear_head_of_masks_has_the_images_size_and_is_linear() -> None:
    encoder = build("test_vit", 1, image_size=32)
    head = head_for(masks("upernet"), encoder, linear=True)
    assert isinstance(head, PyramidHead)
    network = Network(encoder.requires_grad_(False), head, pyramid=True).eval()
    assert network(torch.zeros(1, 1, 40, 50, dtype=torch.uint8)).shape == (1, 40, 50)


# -- labels and grades


@pytest.mark.parametrize("linear", [True, False])
def test_labels_get_a_logit_each_and_grades_one_less(linear: bool) -> None:
    encoder = build("test_resnet", 1)
    for task, outputs in ((CHEST, len(CHEST.labels)), (GRADES, 2)):
        head = head_for(task, encoder, linear=linear)
        assert isinstance(head, PooledHead)
        assert head([torch.randn(4, encoder.num_features)], (32, 32)).shape == (4, outputs)
        assert len(head.norms) == linear


def test_volumes_are_classified_by_the_same_head() -> None:
    encoder = inflate(build("test_resnet", 1))
    network = Network(encoder, head_for(CHEST, encoder, linear=False), pyramid=False)
    assert network(torch.zeros(2, 1, 5, 32, 32, dtype=torch.uint8)).shape == (2, len(CHEST.labels))


def test_thresholds_of_grades_rise_whatever_is_learned() -> None:
    torch.manual_seed(0)
    head = PooledHead(8, 5, ordinal=True)
    z = torch.randn(200, 8)
    optimizer = torch.optim.SGD(head.parameters(), lr=5.0)
    for step in range(30):
        target = torch.randint(0, 2, (200, 4), generator=torch.Generator().manual_seed(step)).float()  # contradictory on purpose
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head([z], (1, 1)), target).backward()
        optimizer.step()
        logits = head([10 * z], (1, 1))
        assert (logits.diff(dim=1) <= 0).all()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_grades_start_equally_likely() -> None:
    head = PooledHead(8, 4, ordinal=True)
    beyond = head([torch.zeros(1, 8)], (1, 1)).sigmoid()[0]
    torch.testing.assert_close(beyond, torch.tensor([0.75, 0.5, 0.25]))


def test_grades_share_one_direction() -> None:
    """Proportional odds: the difference of two thresholds' logits is the same for every image."""
    head = PooledHead(8, 4, ordinal=True)
    gaps = head([torch.randn(50, 8)], (1, 1)).diff(dim=1)
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps))


def test_two_grades_are_one_logit() -> None:
    assert PooledHead(8, 2, ordinal=True)([torch.randn(3, 8)], (1, 1)).shape == (3, 1)
