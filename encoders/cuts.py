"""Named cut points of every family that can be transplanted, from the stem to the last block.

    cuts("resnet18")[0]         # Cut(name="stem", module="act1", reduction=2)
    refuse an unknown name:     family("vgg16") raises RequestError with the families

One explicit list a family; those of vision transformers differ by depth. A cut is where feature maps are taken for pyramids and, by
strategies, where networks are cut; it is the output of a module of the timm network, so the tensors that a decoder sees come from the very
weights that were loaded.
"""

from typing import Any, NamedTuple

from base.errors import RequestError, nearest


class Cut(NamedTuple):
    """A place in the network: its name, the timm module whose output it is, and the input side divided by the map's side."""

    name: str
    module: str
    reduction: int


class Family(NamedTuple):
    """Architectures that share one list of cuts, and the residual blocks' common shape."""

    architectures: tuple[str, ...]
    cuts: tuple[Cut, ...]


def _blocks(depth: int) -> tuple[Cut, ...]:
    return tuple(Cut(f"block{i + 1}", f"blocks.{i}", 16) for i in range(depth))


# The stem's cut is its activation, before the max pooling: that is the /2 map which a U-Net's last skip needs.
FAMILIES: dict[str, Family] = {
    "resnet": Family(
        (
            "resnet10t",
            "resnet14t",
            "resnet18",
            "resnet18d",
            "resnet26",
            "resnet26d",
            "resnet26t",
            "resnet34",
            "resnet34d",
            "resnet50",
            "resnet50d",
            "resnet101",
            "resnet152",
            "test_resnet",
        ),
        (
            Cut("stem", "act1", 2),
            Cut("layer1", "layer1", 4),
            Cut("layer2", "layer2", 8),
            Cut("layer3", "layer3", 16),
            Cut("layer4", "layer4", 32),
        ),
    ),
    "vit": Family(("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"), _blocks(12)),
    "vit-large": Family(("vit_large_patch16_224",), _blocks(24)),
    "vit-test": Family(("test_vit",), _blocks(6)),
}


def architectures() -> list[str]:
    """Every architecture that can be built, in the families' order."""
    return [name for family in FAMILIES.values() for name in family.architectures]


def family(architecture: str) -> str:
    """The family's name.

    Raises:
        RequestError: not in any family; names the families and the nearest architecture.
    """
    for name, members in FAMILIES.items():
        if architecture in members.architectures:
            return name
    close = nearest(architecture, architectures())
    listed = "; ".join(f"{name}: {', '.join(members.architectures)}" for name, members in FAMILIES.items())
    raise RequestError(
        f"unknown architecture '{architecture}'",
        hint=(f"did you mean '{close}'? " if close else "") + f"families are {listed}",
    )


def is_vit(architecture: str) -> bool:
    """Whether images become tokens: patches of 16 px, and positions that belong to an image size."""
    return family(architecture).startswith("vit")


def cuts(architecture: str) -> tuple[Cut, ...]:
    """Cut points from the stem to the last block. Raises RequestError as `family` does."""
    return FAMILIES[family(architecture)].cuts


def depths(architecture: str, net: Any) -> dict[str, int]:
    """Parameter name -> index of the cut that it belongs to, 0 for the stem's; parameters after the last cut belong to the last."""
    order = {name: position for position, (name, _) in enumerate(net.named_modules())}
    points = cuts(architecture)
    ends = [max(at for name, at in order.items() if f"{name}.".startswith(f"{point.module}.")) for point in points]
    found = {}
    for name, _ in net.named_parameters():
        at = order[name.rpartition(".")[0]]
        found[name] = next((i for i, end in enumerate(ends) if at <= end), len(points) - 1)
    return found
