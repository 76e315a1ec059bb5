"""Truncated encoders: prefixes of the whole network, under its names, with the published counts."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from base.errors import RequestError
from encoders.build import Encoder, build, steps
from encoders.cuts import cuts, depths, smallest
from encoders.truncate import Truncated, truncate
from encoders.weights import load_into

ONE_OF_EACH = [
    *("resnet18", "densenet121", "inception_v3", "efficientnet_b0", "convnext_tiny", "swin_tiny_patch4_window7_224"),
    *("cbr_larget", "cbr_larget_valid", "alexnet", "resnet50_clip_gap", "resnetv2_50x1_bit", "test_vit"),
]


def on_meta(name: str, in_chans: int = 3) -> Encoder:
    with torch.device("meta"):
        return build(name, in_chans).to("meta").eval()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs(encoder: Encoder, side: int) -> float:
    """Of convolutions and matrix products, in billions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


# From the paper's table and the reference: parameters after n bottlenecks, and MACs (printed: 4.12, 3.31, 2.87 for 16, 13, 11 of them).
BOTTLENECKS = {0: 9_536, 3: 225_344, 7: 1_444_928, 11: 6_308_928, 13: 8_543_296, 16: 23_508_032}
PRINTED_GMACS = {16: 4.12, 13: 3.31, 11: 2.87}


def test_the_17_points_of_truncated_transfer_to_the_unit() -> None:
    whole = on_meta("resnet50")
    found = {i: truncate(whole, cut.name) for i, cut in enumerate(whole.cuts)}
    assert {i: parameters(found[i].net) for i in BOTTLENECKS} == BOTTLENECKS
    counts = [parameters(found[i].net) for i in range(17)]
    assert counts == sorted(set(counts))
    for i, printed in PRINTED_GMACS.items():
        assert macs(found[i], 224) == pytest.approx(printed, rel=0.02)
    assert macs(whole, 224) == pytest.approx(4.12, rel=0.02)


def test_transfusions_slim_network_has_the_printed_operations() -> None:
    with torch.device("meta"):
        slim = build("resnet50", 3, widths=(64, 128, 256, 256)).to("meta").eval()
    assert macs(slim, 224) == pytest.approx(3.56, rel=0.02)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_cut_is_a_prefix_of_the_whole_network(name: str) -> None:
    whole = build(name, 1, seed=1, image_size=64 if name == "test_vit" else None).eval()
    side = max(64, whole.smallest)
    x = torch.randint(0, 256, (2, 1, side, side), dtype=torch.uint8)
    outputs: dict[str, torch.Tensor] = {}
    for module, block in whole.net.named_modules():
        block.register_forward_hook(lambda _, __, out, module=module: outputs.__setitem__(module, out))
    with torch.no_grad():
        features = whole(x)
        maps = whole.pyramid(x)
    tensors = whole.net.state_dict()
    points = whole.cuts if len(whole.cuts) < 10 else whole.cuts[:: len(whole.cuts) // 4]
    before = 0
    for point in (*points, whole.cuts[-1]):
        small = truncate(whole, point.name)
        with torch.no_grad():
            z, pyramid = small(x), small.pyramid(x)
        state = small.net.state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in state.items())
        assert z.shape == (2, small.num_features)
        assert tuple(m.shape[1] for m in pyramid) == small.pyramid_channels
        assert len(pyramid) == len(small.pyramid_reductions)
        for ours, theirs in itertools.takewhile(lambda pair: pair[0].shape == pair[1].shape, zip(pyramid[:-1], maps, strict=False)):
            torch.testing.assert_close(ours, theirs)
        if point == whole.cuts[-1]:
            torch.testing.assert_close(z, features)
            assert state.keys() == tensors.keys()
        elif (point.name != "stem" or name == "test_vit") and "denselayer" not in point.name:  # pooling follows; layers are gathered
            at = outputs[point.module]
            expected = at[:, 1:].mean(1) if at.ndim == 3 else at.mean((1, 2)) if "swin" in name else at.mean((2, 3))
            if not name.startswith(("inception", "alexnet")):  # after some of whose cuts there is pooling
                torch.testing.assert_close(z, expected)
        count = parameters(small.net)
        assert count > before or point == whole.cuts[-1]
        before = count


def test_a_dense_blocks_layers_are_gathered() -> None:
    whole = on_meta("densenet121")
    assert [truncate(whole, f"denseblock1.denselayer{i}").num_features for i in (1, 2, 6)] == [96, 128, 256]
    assert truncate(whole, "transition1").num_features == 128
    block = truncate(whole, "transition3")  # block and transition: the children that TruncatedTL keeps
    kept = nn.Sequential(*list(whole.net.features.children())[:9])  # type: ignore[union-attr]
    assert parameters(block.net) == parameters(kept)
    assert block.num_features == 512


def test_pooling_after_the_stem_belongs_to_it() -> None:
    small = truncate(build("resnet18", 1).eval(), "stem")
    assert [name for name, _ in steps(small.net)] == ["conv1", "bn1", "act1", "maxpool"]
    x = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    assert small.features(x).shape[2:] == (16, 16)
    assert small.pyramid(x)[-1].shape[2:] == (32, 32)


def test_a_transformer_truncated_at_its_stem_has_patches_and_positions_alone() -> None:
    whole = build("test_vit", 1, seed=1, image_size=64).eval()
    small = truncate(whole, "stem")
    assert [name for name, _ in small.net.named_parameters()] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    assert small.pyramid_cuts == small.cuts == whole.cuts[:1]
    x = torch.randint(0, 256, (2, 1, 64, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert truncate(whole, "block2").pyramid_cuts == whole.cuts[1:3]  # decoders are fed blocks where there are any
        assert [m.shape for m in small.pyramid(x)] == [(2, small.num_features, 4, 2)]
        torch.testing.assert_close(small(x), small.pyramid(x)[0].mean((2, 3)))
    small.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_flat_features_are_the_whole_map_of_images_of_one_side() -> None:
    whole = build("resnet18", 1).eval()
    small = truncate(whole, "layer2", flat=64)
    x = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    assert small.num_features == 128 * 8 * 8
    with torch.no_grad():
        torch.testing.assert_close(small(x), whole.pyramid(x)[2].flatten(1))
    with pytest.raises(RequestError, match="flat features of 64 px were asked for, this image is 96 x 64"):
        small(torch.zeros(1, 1, 96, 64, dtype=torch.uint8))
    # TruncatedTL's head on all of DenseNet-201, at 224 px
    assert truncate(on_meta("densenet201"), "denseblock4", flat=224).num_features == 94_080


def test_the_least_side_falls_with_the_cut() -> None:
    whole = on_meta("cbr_larget_valid")
    # By hand from the last layer: a convolution adds 6, a pooling doubles and adds 1.
    assert [truncate(whole, cut.name).smallest for cut in whole.cuts] == [9, 25, 57, 121, 217]
    assert truncate(on_meta("inception_v3"), "Mixed_6e").smallest < smallest("inception_v3")
    with pytest.raises(RequestError, match="cbr_larget_valid takes images of at least 57 px"):
        truncate(whole, "conv3")(torch.zeros(1, 3, 56, 56, device="meta"))


def test_weights_of_the_whole_network_go_into_a_truncated_one_and_depths_are_the_same() -> None:
    whole, small = build("resnet18", 1, seed=1), truncate(build("resnet18", 1, seed=2), "layer3")
    report = load_into(small.net, whole.net.state_dict())
    assert not report.missing
    assert all(name.startswith("layer4.") for name in report.unexpected)
    of_whole = depths("resnet18", whole.net)
    assert depths("resnet18", small.net) == {name: of_whole[name] for name, _ in small.net.named_parameters()}


def test_truncating_leaves_the_encoder_alone_and_trains() -> None:
    whole = build("resnet18", 1)
    count = parameters(whole.net)
    small = truncate(whole, "layer1").train()
    assert isinstance(small, Truncated)
    small(torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert parameters(whole.net) == count
    assert all(parameter.grad is None for parameter in whole.parameters())
    with pytest.raises(RequestError, match="no cut 'layer5'"):
        truncate(whole, "layer5")
    assert [len(truncate(whole, cut.name).cuts) for cut in cuts("resnet18")] == list(range(1, 10))
