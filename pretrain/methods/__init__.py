"""Pretraining objectives, one file a family. This file is their contract and their register.

    method = build("simclr", encoder, {"temperature": 0.1}, seed=0)
    output = method(batch)              # Output(loss, features, logs)

A method is an nn.Module that holds the encoder as `encoder` and its heads beside it. Its loss on a rank is such that the mean over
ranks is the loss of the global batch, gradients too: that is tested with two processes that see different data.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from base.config import Strict, parse
from base.errors import unknown
from base.seeds import seed_of

if TYPE_CHECKING:
    from shards.loader import Batch

METHODS: dict[str, str] = {"simclr": "pretrain.methods.simclr", "supervised": "pretrain.methods.supervised"}
Embed = Callable[[], tuple[Tensor, Tensor]]  # index_N and z_ND over the corpus, in id order


class Output(NamedTuple):
    """What a step gives.

    Attributes:
        loss: scalar; the mean over ranks is the global loss.
        features: detached, this rank's samples only: `backbone` z_BD, and where there is a projector `projector_0`, `projector_1`
            (B,d; row i of both is the same image).
        logs: detached scalars, the same kind of mean as the loss.
    """

    loss: Tensor
    features: dict[str, Tensor]
    logs: dict[str, Tensor]


class Method(nn.Module):
    """Base of all methods; the hooks do nothing by default."""

    views: ClassVar[str]  # what the loader makes: "two" random views or "one"
    labelled: ClassVar[bool]  # whether it reads labels: its encoder's lineage says so
    Options: ClassVar[type[Strict]]
    encoder: nn.Module

    def forward(self, batch: "Batch") -> Output:
        """Loss of this rank's part of the global batch. views: u8 BCHW."""
        raise NotImplementedError

    def on_step_end(self, step: int) -> None:
        """After each update (a momentum encoder moves here)."""

    def on_epoch_start(self, epoch: int, embed: Embed) -> None:
        """Before each epoch (clustering happens here)."""

    def extra_state(self) -> dict[str, Tensor]:
        """What belongs to this rank and is not in the state dict: queues, banks."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `extra_state`."""

    def chance_loss(self, global_batch: int) -> float | None:
        """The loss of a network that has learned nothing, or None when there is no such number."""
        return None


def method_class(name: str) -> type[Method]:
    """The class of a method by its name in recipes.

    Raises:
        RequestError: unknown name, with the nearest right one.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS, "recipe: method")
    found: type[Method] = importlib.import_module(METHODS[name]).METHOD
    return found


def build(
    name: str, encoder: nn.Module, options: dict[str, Any], seed: int, labels: Sequence[str] = (), rates: Sequence[float] = ()
) -> Method:
    """A method around an encoder; its heads' weights are a function of the seed.

    Args:
        encoder: `encoders.build.Encoder`, or any module with `num_features` whose forward gives z_BD.
        labels: union of the corpora's labels; `rates` their positive rate among known ones. Only labelled methods look at them.

    Raises:
        RequestError: unknown method or option.
    """
    kind = method_class(name)
    checked = parse(options, kind.Options, "recipe: options")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("head", name, seed))
        return kind(encoder, checked, list(labels), list(rates))
