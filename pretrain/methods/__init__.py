"""Pretraining objectives, one file a family. This file is their contract and their register.

    method = build("simclr", encoder, {"temperature": 0.1}, Facts(seed=0, samples=2553, global_batch=128))
    method.clock = Clock(step, total_steps, epoch_steps)      # before each step
    output = method(batch)                                    # Output(loss, features, logs)
    method.on_step_end()                                      # after each update

A method is an nn.Module that holds the encoder as `encoder` and its heads beside it. Its loss on a rank is such that the mean over
ranks is the loss of the global batch, gradients too: that is tested with two processes that see different data. Where its state lies:

    trained, and buffers equal on all ranks (queues, banks, centres)     parameters and persistent buffers of the module
    networks that follow another (momentum encoders, teachers)           `teachers`: outside of the module, float32 (engine.ema)
    what belongs to one rank                                             extra_state / load_extra_state

Every random draw is a function of (seed, step) or (seed, epoch, sample id), so that the number of ranks changes nothing.
"""

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base.config import Strict, parse
from base.errors import RequestError, unknown
from base.seeds import seed_of
from encoders.cuts import is_vit
from engine import ema

if TYPE_CHECKING:
    from shards.batches import Batch
    from shards.draws import ViewsConfig


class Entry(NamedTuple):
    """The module whose METHODS holds the class, and a line about the method."""

    module: str
    about: str


METHODS: dict[str, Entry] = {
    "barlow-twins": Entry("pretrain.methods.decorrelation", "correlations of two views' features become the identity; Zbontar et al. 2021"),
    "byol": Entry("pretrain.methods.byol", "predicts a slow copy's features of the other view; Grill et al. 2020"),
    "deepcluster-v2": Entry("pretrain.methods.deepcluster", "predicts clusters of the corpus, made each epoch; Caron et al. 2018, 2020"),
    "densecl": Entry("pretrain.methods.densecl", "contrast between places of the map, too; Wang et al. 2021"),
    "dino": Entry("pretrain.methods.dino", "a student's prototypes follow a slow teacher's; Caron et al. 2021"),
    "dinov2": Entry("pretrain.methods.dinov2", "DINO, masked patches and features spread out; Oquab et al. 2023 (vision transformers)"),
    "ijepa": Entry("pretrain.methods.ijepa", "predicts a teacher's features of hidden blocks; Assran et al. 2023 (vision transformers)"),
    "infomin": Entry("pretrain.methods.moco", "MoCo v2 with less shared by the views, and patches; Tian et al. 2020"),
    "insdis": Entry("pretrain.methods.instance", "each image a class, against a bank of all; Wu et al. 2018"),
    "mae": Entry("pretrain.methods.masked", "paints hidden patches from the few that are seen; He et al. 2022 (vision transformers)"),
    "moco-v1": Entry("pretrain.methods.moco", "contrast against a queue from a slow encoder; He et al. 2020"),
    "moco-v2": Entry("pretrain.methods.moco", "MoCo with a deeper head and stronger views; Chen et al. 2020"),
    "pcl-v1": Entry("pretrain.methods.pcl", "MoCo, and contrast between the corpus' clusters; Li et al. 2021"),
    "pcl-v2": Entry("pretrain.methods.pcl", "PCL with version 2's head and views; Li et al. 2021"),
    "pirl": Entry("pretrain.methods.instance", "an image and its jigsaw agree, against a bank; Misra and van der Maaten 2020"),
    "sela-v2": Entry("pretrain.methods.deepcluster", "labels that fill all clusters alike, by optimal transport; Asano et al. 2020"),
    "simclr": Entry("pretrain.methods.simclr", "two views attract, all others of the batch repel; Chen et al. 2020"),
    "simclr-v2": Entry("pretrain.methods.simclr", "SimCLR with a deeper head; Chen et al. 2020"),
    "simmim": Entry("pretrain.methods.masked", "paints hidden patches, which it sees as blanks; Xie et al. 2022 (vision transformers)"),
    "simsiam": Entry("pretrain.methods.byol", "BYOL without the slow copy; Chen and He 2021"),
    "supervised": Entry("pretrain.methods.supervised", "the labels of one corpus or several, missing ones left out"),
    "swav": Entry("pretrain.methods.swav", "one view predicts the other's balanced assignment to prototypes; Caron et al. 2020"),
    "vicreg": Entry("pretrain.methods.decorrelation", "views agree, features keep their variance and share nothing; Bardes et al. 2022"),
}


class Facts(NamedTuple):
    """What a method may know about its run before the first step; all of it is known to a plan too.

    Attributes:
        samples: of the corpus (all datasets together). Sample ids of batches are 0 to samples - 1.
        sizes: side of each view, pixels.
        labels, rates, known: union of the corpora's labels, their positive rate where known, the share of samples where they are known;
            exclusive: sets of positions in labels of which exactly one holds. For labelled methods only.
    """

    seed: int
    samples: int
    global_batch: int
    sizes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    known: tuple[float, ...] = ()
    exclusive: tuple[tuple[int, ...], ...] = ()


class Clock(NamedTuple):
    """Where a run stands, in steps of the global batch; step 0 is the first."""

    step: int
    total_steps: int
    epoch_steps: int

    @property
    def epoch(self) -> int:
        return self.step // self.epoch_steps

    @property
    def progress(self) -> float:
        """From 0 at the first step to 1 at the last."""
        return self.step / max(1, self.total_steps - 1)

    def momentum(self, first: float) -> float:
        """A teacher's: from `first` to 1 at the last step along half a cosine (BYOL, section 3.2; DINO, section 3.2)."""
        return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * self.progress))


class Output(NamedTuple):
    """What a step gives.

    Attributes:
        loss: scalar; the mean over ranks is the global loss.
        features: detached, this rank's samples only: `backbone` z_BD of one view; where there is a projector `projector_0`, `projector_1`
            (B,d; row i of both is the same image); where there are prototypes `prototypes` (B,K; each row sums to 1).
        logs: detached scalars, the same kind of mean as the loss.
    """

    loss: Tensor
    features: dict[str, Tensor]
    logs: dict[str, Tensor]


# A network of images -> (index_N, z_Nd float32 on the CPU) over the corpus in id order, evaluation views, the same on every rank.
Embed = Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


class Method(nn.Module):
    """Base of all methods; the hooks do nothing by default. Legend: B images of this rank, D features, d projections."""

    views: ClassVar[tuple[str, ...]]  # kinds of views that it can train on (shards.draws.ViewsConfig), the usual first
    labelled: ClassVar[bool] = False  # whether it reads labels: its encoder's lineage says so
    exact_epochs: ClassVar[bool] = False  # whether every sample must come exactly once an epoch
    only: ClassVar[Literal["vit", "convolutions"] | None] = None  # the encoders that it can train
    Options: ClassVar[type[Strict]]
    encoder: nn.Module
    clock: Clock
    teachers: dict[str, nn.Module]
    chunk: int | None = None  # images that the encoder sees at once (virtual batches)

    def __init__(self, encoder: nn.Module, options: Any, facts: Facts) -> None:
        super().__init__()
        self.encoder, self.options, self.facts = encoder, options, facts
        self.width = int(encoder.num_features)  # type: ignore[arg-type]
        self.teachers = {}
        self.clock = Clock(0, 1, 1)

    def forward(self, batch: "Batch") -> Output:
        """Loss of this rank's part of the global batch. views: u8 BCHW."""
        raise NotImplementedError

    def on_step_end(self) -> None:
        """After each update; `clock.step` is still that of the update (a momentum encoder moves here)."""

    def on_step_skipped(self) -> None:
        """After a forward pass that no update follows: what it left for `on_step_end` goes."""

    def moved_by_forward(self) -> list[Tensor]:
        """Buffers, beside batch norm's, that `forward` itself changes: such a step takes them back. Small ones, copied at every step."""
        return []

    def on_epoch_start(self, embed: Embed) -> None:
        """Before the first step of each epoch, `clock` set (clustering happens here)."""

    def extra_state(self) -> dict[str, Tensor]:
        """What belongs to this rank and is not in the state dict."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `extra_state`."""

    def chance_loss(self, global_batch: int) -> float | None:
        """The loss of a network that has learned nothing, or None when there is no such number."""
        return None

    @classmethod
    def check(cls, options: Any, facts: Facts) -> None:
        """Raises RequestError for options that do not fit the data. Called before any worker starts."""

    @classmethod
    def scaled(cls, options: Any, facts: Facts) -> dict[str, int]:
        """Sizes that were left open and follow from the data (queues, prototypes), by name, for the run's log and `explain`."""
        return {}

    def encode(self, x: Tensor, network: Callable[..., Tensor] | None = None, *along: Tensor) -> Tensor:
        """x: u8 BCHW -> z_BD by the encoder (or another network, which also gets its rows of `along`), in chunks where the run has virtual
        batches.

        A chunk's activations are computed again in the backward pass, so memory holds one chunk's whatever B is, and gradients are exact:
        gradient caching (Gao et al. 2021, arXiv 2101.06983). Heads and losses see the whole batch.
        """
        network = network or self.encoder
        if self.chunk is None or len(x) <= self.chunk:
            return network(x, *along)
        parts = zip(*(rows.split(self.chunk) for rows in (x, *along)), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([network(*part) for part in parts])
        return torch.cat([checkpoint(network, *part, use_reentrant=False) for part in parts])

    def compile_encoder(self) -> None:
        """Hands what this method calls of its encoder to torch.compile; names of tensors stay. Teachers stay as they are.

        Of a vision transformer each block: masked methods (encoders.vit) and checkpointed activations pass by the network's own call.
        """
        encoder: Any = self.encoder
        for module in encoder.net.blocks if is_vit(encoder.architecture) else [encoder.net]:
            module.compile()

    def encode_views(self, views: list[Tensor], network: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """z_BD of each view; views of one size go through the network in one pass and share its batch statistics."""
        out: list[Tensor | None] = [None] * len(views)
        for size in dict.fromkeys(view.shape[-1] for view in views):
            alike = [i for i, view in enumerate(views) if view.shape[-1] == size]
            together = self.encode(torch.cat([views[i] for i in alike]), network)
            for i, z_BD in zip(alike, together.chunk(len(alike)), strict=True):
                out[i] = z_BD
        return [z_BD for z_BD in out if z_BD is not None]

    def followed(self, teacher: str) -> nn.Module | None:
        """The module that the teacher of that name follows, parameter by parameter; None where there is no single one."""
        return None

    def add_teacher(self, name: str, network: nn.Module) -> nn.Module:
        """A float32 copy of the network that is saved with the run, converted and moved as the method is, and never trained."""
        self.teachers[name] = ema.follower(network)
        return self.teachers[name]


def method_class(name: str) -> type[Method]:
    """The class of a method by its name in recipes.

    Raises:
        RequestError: unknown name, with the nearest right one.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS, "recipe: method")
    found: type[Method] = importlib.import_module(METHODS[name].module).METHODS[name]
    return found


def check(
    name: str, options: dict[str, Any], *, views: "ViewsConfig | None" = None, architecture: str | None = None, facts: Facts | None = None
) -> Any:
    """The method's checked options; what is None is not looked at. Cheap: for plans.

    Raises:
        RequestError: unknown method or option, views of another kind, an encoder that the method cannot train, options that do not fit
            the data.
    """
    kind = method_class(name)
    checked = parse(options, kind.Options, "recipe: options")
    if views is not None and views.kind not in kind.views:
        wanted = "' or '".join(kind.views)
        raise RequestError(f"{name} needs views.kind '{wanted}'", where="recipe: views.kind", hint=f"views.kind={kind.views[0]}")
    if architecture is not None and kind.only is not None and (kind.only == "vit") != is_vit(architecture):
        wanted, other = ("a vision transformer", "vit_small_patch16_224") if kind.only == "vit" else ("a convolutional network", "resnet50")
        raise RequestError(f"{name} trains {wanted}, not {architecture}", where="architecture", hint=f"for instance {other}")
    if facts is not None:
        kind.check(checked, facts)
    return checked


def build(name: str, encoder: nn.Module, options: dict[str, Any], facts: Facts) -> Method:
    """A method around an encoder; its heads' weights are a function of the seed.

    Args:
        encoder: `encoders.build.Encoder`, or any module with `num_features` whose forward gives z_BD.

    Raises:
        RequestError: as `check`.
    """
    checked = check(name, options, architecture=getattr(encoder, "architecture", None), facts=facts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("head", name, facts.seed))
        return method_class(name)(encoder, checked, facts)
