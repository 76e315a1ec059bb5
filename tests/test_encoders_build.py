"""Encoders: one contract for every architecture."""

from functools import cache

import pytest
import torch

from base.errors import RequestError
from encoders.build import Encoder, build, token_maps
from encoders.cuts import architectures, brief, cuts, depths, family, find, smallest
from encoders.weights import load_into, sha256_of

CONTRASTIVE = ["resnet50_clip_gap", "resnetv2_50x1_bit"]
SMALL = ["test_resnet", "resnet10t", "resnet18"]


@cache
def on_meta(name: str, in_chans: int = 1) -> Encoder:
    """Shapes and counts of the largest network cost nothing there, but for its making: once for all tests, which leave it alone."""
    with torch.device("meta"):
        return build(name, in_chans).to("meta").eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_has_cuts_that_describe_it(name: str) -> None:
    encoder = on_meta(name)
    side = max(64, encoder.smallest)
    with torch.device("meta"):
        x = torch.zeros(2, 1, side, side + 32, dtype=torch.uint8)
        maps = encoder.pyramid(x)
        assert encoder(x).shape == (2, encoder.num_features)
        assert encoder.pool(encoder.features(x)).shape == (2, encoder.num_features)
    assert tuple(m.shape[1] for m in maps) == encoder.pyramid_channels
    sides = [(m.shape[-2], m.shape[-1]) for m in maps]
    if family(name) not in ("inception", "cbr-valid", "alexnet"):  # whose convolutions have no padding
        assert sides == [(side // cut.reduction, (side + 32) // cut.reduction) for cut in encoder.pyramid_cuts]
    if family(name) != "vit":
        assert len(set(sides)) == len(sides)
    modules = [module for module, _ in encoder.net.named_modules()]
    order = [modules.index(cut.module) for cut in encoder.cuts]
    assert order == sorted(set(order))
    assert len({cut.name for cut in encoder.cuts}) == len(encoder.cuts)


@pytest.mark.parametrize("name", architectures())
def test_every_block_of_an_architecture_is_a_cut(name: str) -> None:
    encoder = on_meta(name)
    kinds: tuple[str, ...] = ("BasicBlock", "Bottleneck", "DenseLayer", "DenseTransition", "InvertedResidual", "DepthwiseSeparableConv")
    kinds += ("ConvNeXtBlock", "SwinTransformerBlock", "Block", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE")
    kinds += ("CbrLayer", "PreActBottleneck", "BottleneckBlock")
    blocks = [module for module, block in encoder.net.named_modules() if type(block).__name__ in kinds]
    named = {cut.module for cut in encoder.cuts} | {f"features.{cut.name}" for cut in encoder.cuts}
    closing = {cut.name for cut in encoder.cuts if cut.module == "final_conv"}  # does nothing, after CLIP's last block
    assert blocks or name == "alexnet"
    assert set(blocks) <= named | closing
    first = "conv1" if family(name) in ("alexnet", "cbr", "cbr-valid") else "stem"  # networks of so few layers have no stem
    assert encoder.cuts[0].name == first


def test_resnet50_has_the_17_cuts_of_truncated_transfer() -> None:
    names = ["stem"] + [f"layer{stage}.{i}" for stage, depth in enumerate((3, 4, 6, 3), 1) for i in range(depth)]
    assert [cut.name for cut in cuts("resnet50")] == names
    assert len(names) == 17
    assert [len(cuts(name)) for name in ("densenet121", "efficientnet_b0", "convnext_tiny", "inception_v3")] == [62, 17, 19, 13]


def test_the_list_of_cuts_fits_a_line() -> None:
    assert brief("resnet50") == "stem layer1.0-2 layer2.0-3 layer3.0-5 layer4.0-2"
    assert brief("densenet121").startswith("stem denseblock1.denselayer1-6 transition1 denseblock2.denselayer1-12")
    assert brief("vit_large_patch16_224") == "stem block1-24"
    assert len(brief("densenet201")) < 200


def test_a_stage_means_its_last_block_and_unknown_cuts_list_all() -> None:
    assert [find("resnet50", name) for name in ("stem", "layer1", "layer3.0", "layer3", "layer4")] == [0, 3, 8, 13, 16]
    assert [find("vit_small_patch16_224", name) for name in ("stem", "block1", "block12")] == [0, 1, 12]
    assert cuts("densenet121")[find("densenet121", "denseblock2")].name == "denseblock2.denselayer12"
    with pytest.raises(RequestError, match=r"no cut 'layer3\.9' \(from the stem to the last they are stem, layer1\.0"):
        find("resnet50", "layer3.9")
    for written, meant in (("layr3.0", "layer3.0"), ("laier3", "layer3"), ("layer9", None), ("layer7", None)):
        with pytest.raises(RequestError) as refused:
            find("resnet50", written)
        assert ("did you mean" in str(refused.value)) == (meant is not None)
        assert meant is None or f"did you mean '{meant}'?" in str(refused.value)


@pytest.mark.parametrize(
    "name", SMALL + ["efficientnet_b0", "convnext_tiny", "swin_tiny_patch4_window7_224", "densenet121", "test_vit", *CONTRASTIVE]
)
def test_maps_and_features_are_those_of_timm(name: str) -> None:
    encoder = build(name, in_chans=3, seed=1).eval()
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        of_timm = encoder.net.forward_intermediates(encoder.normalise(x), intermediates_only=True)  # type: ignore[operator]
        for ours, theirs in zip(encoder.pyramid(x), of_timm, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(encoder.pool(encoder.features(x)), encoder(x))
        if not name.startswith(("conv", "swin", "test_vit")):  # whose pooled features are normalised, or a token
            torch.testing.assert_close(encoder.features(x).mean((2, 3)), encoder(x))


def test_a_transformers_stem_gives_what_its_first_block_is_fed() -> None:
    encoder = build("test_vit", 1, seed=1, image_size=64).eval()
    fed: list[torch.Tensor] = []
    encoder.net.blocks[0].register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))  # type: ignore[index, union-attr]
    given: list[torch.Tensor] = []
    encoder.net.get_submodule(cuts("test_vit")[0].module).register_forward_hook(lambda _, __, out: given.append(out))
    x = torch.randint(0, 256, (2, 1, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        encoder(x)
        stem_BDhw = token_maps(encoder.net, encoder.prepare(x))[0]
    assert torch.equal(fed[0], given[0])
    assert torch.equal(stem_BDhw.flatten(2).mT, fed[0][:, 1:])
    assert stem_BDhw.shape[2:] == (4, 6)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "test_vit"])
def test_patches_positions_and_tokens_belong_to_a_transformers_stem(name: str) -> None:
    with torch.device("meta"):
        net = build(name, 1).net
        net.reg_token = torch.nn.Parameter(torch.zeros(1, 4, 8))
        net.norm_pre = torch.nn.LayerNorm(8)
    at = depths(name, net)
    stem = {parameter for parameter, index in at.items() if index == 0}
    embedding = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm_pre.weight", "norm_pre.bias"}
    assert stem == {"cls_token", "reg_token", "pos_embed"} | embedding
    assert {index for parameter, index in at.items() if parameter.startswith("blocks.0.")} == {1}
    last = len(cuts(name)) - 1
    assert {index for parameter, index in at.items() if parameter.startswith((f"blocks.{last - 1}.", "norm."))} == {last}


@pytest.mark.parametrize("name", [name for name in architectures() if smallest(name) > 1])
def test_images_under_the_minimum_are_refused_by_name(name: str) -> None:
    least = smallest(name)
    encoder = on_meta(name)
    with torch.device("meta"):
        encoder(torch.zeros(1, 1, least, least, dtype=torch.uint8))
        with pytest.raises(RequestError, match=f"{name} takes images of at least {least} px, not of {least} x {least - 1}"):
            encoder(torch.zeros(1, 1, least, least - 1, dtype=torch.uint8))
        if family(name) != "clip":  # which takes some sides that are no multiples of 32
            with pytest.raises((RuntimeError, AssertionError)):
                encoder.net(torch.zeros(1, 1, least - 1, least - 1))


@pytest.mark.parametrize(
    ("widths", "expected"), [((64, 128, 256, 256), 12_945_472), ((64, 128, 128, 256), 7_135_296), ((64, 64, 128, 256), 6_099_520)]
)
def test_the_slim_hybrids_of_transfusion_are_a_matter_of_widths(widths: tuple[int, ...], expected: int) -> None:
    with torch.device("meta"):
        assert parameters(build("resnet50", 3, widths=widths).net) == expected
    with pytest.raises(RequestError, match="a ResNet takes four"):
        build("densenet121", 3, widths=widths)


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


def test_alexnet_is_torchvisions() -> None:
    from torchvision.models import alexnet

    theirs, ours = alexnet(num_classes=1).eval(), build("alexnet", 3, seed=1).eval()
    report = load_into(ours.net, theirs.state_dict())
    assert not report.missing
    assert all(name.startswith("classifier.") for name in report.unexpected)
    x = torch.rand(2, 3, 63, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.features(ours.normalise(x)).mean((2, 3)))
    assert parameters(ours.net) == 2_469_696  # of the five convolutions


def test_resnet50_has_the_published_number_of_parameters() -> None:
    assert parameters(on_meta("resnet50", 3).net) == 23_508_032
