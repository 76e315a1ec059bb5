"""What a recipe will do, before it does it: sizes that follow from the data, steps, operations, bytes, memory. Needs no GPU and no data.

    found = explain(load_recipe("simclr/paper"), "resnet50", images=112_120, channels=1, gpu_count=8)
    hours = found.least_hours(gpus.get("h100-sxm")) / share

One step of one GPU is gone through without values (engine.work), as in the middle of the run: the method's own forward and backward, and
what follows the update. The optimiser's part is added by a formula. Left out: clustering of a corpus, messages between GPUs, the loader,
workspaces of kernels, and what lives for one operation only.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from base.errors import RequestError
from encoders.build import build
from engine import ranks
from engine.gpus import Gpu, least_seconds
from engine.step import rank_batch
from engine.work import Work, pretend
from pretrain import methods
from pretrain.economy import economise
from pretrain.recipe import Recipe
from shards.batches import Batch

STATES = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}  # numbers that an optimiser keeps of a parameter
FLOAT = 4  # bytes: parameters, gradients and states are float32 at every precision
LABELS = tuple(f"label {i}" for i in range(14))  # of a corpus that is not there: as many as ChestX-ray14 has
EMBED_BATCH = 256


class Memory(NamedTuple):
    """Bytes on each GPU. buffers: queues, banks, centres, statistics. activations: what a forward pass keeps, and the batch itself."""

    weights: int
    gradients: int
    optimizer: int
    teachers: int
    buffers: int
    activations: int


class Cost(NamedTuple):
    """Of a step on one GPU.

    flops, moved: operations and bytes, of everything that a step does.
    embed_flops, embed_moved: of one image when the method looks at the whole corpus between epochs; else 0.
    """

    images: int
    flops: int
    moved: int
    embed_flops: float
    embed_moved: float
    memory: Memory


class Explained(NamedTuple):
    """recipe: with the method's defaults. scaled: sizes that it leaves open, from the data. parameters: of encoder and heads."""

    recipe: Recipe
    scaled: dict[str, int]
    parameters: int
    steps: int
    epoch_steps: int
    cost: Cost

    def least_hours(self, gpu: Gpu) -> float:
        """Of the run at the roofline, looks at the whole corpus included."""
        cost, precision = self.cost, self.recipe.precision
        embedded = self.steps * cost.images
        seconds = self.steps * least_seconds(gpu, precision, cost.flops, cost.moved)
        return (seconds + embedded * least_seconds(gpu, precision, cost.embed_flops, cost.embed_moved)) / 3600


def explain(recipe: Recipe, architecture: str, *, images: int, channels: int, gpu_count: int) -> Explained:
    """The recipe on a corpus of so many images.

    Raises:
        RequestError: what a run of it would refuse.
    """
    kind = methods.method_class(recipe.method)
    if images < recipe.global_batch:
        raise RequestError(
            f"{images} images are fewer than the global batch of {recipe.global_batch}: not one step",
            where="--images",
            hint=f"--images {recipe.global_batch} at least, or a smaller global_batch",
        )
    epoch_steps = -(-images // recipe.global_batch) if kind.exact_epochs else images // recipe.global_batch
    steps = recipe.steps(epoch_steps)
    facts = methods.Facts(
        seed=0,
        samples=images,
        global_batch=recipe.global_batch,
        sizes=tuple(recipe.views.sizes),
        labels=LABELS if kind.labelled else (),
        rates=(0.5,) * len(LABELS) if kind.labelled else (),
    )
    options = methods.check(recipe.method, recipe.options, views=recipe.views, architecture=architecture, facts=facts)
    method = sketch(recipe, architecture, channels, facts, epoch_steps)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    filled = recipe.model_copy(update={"options": options.model_dump(mode="json")})
    return Explained(filled, kind.scaled(options, facts), parameters, steps, epoch_steps, cost(recipe, method, channels, gpu_count))


def sketch(recipe: Recipe, architecture: str, channels: int, facts: methods.Facts, epoch_steps: int) -> methods.Method:
    """The method around its encoder, without values, at the start of an epoch in the middle of the run."""
    with torch.device("meta"):
        encoder = build(architecture, channels, image_size=recipe.views.size)
        method = methods.build(recipe.method, encoder, recipe.options, facts)
    economise(recipe, encoder)
    steps = recipe.steps(epoch_steps)
    method.clock = methods.Clock(steps // 2 // epoch_steps * epoch_steps, steps, epoch_steps)
    return method


def cost(recipe: Recipe, method: methods.Method, channels: int, gpu_count: int) -> Cost:
    """Of a step of one of so many GPUs; the method's clock says which.

    Raises:
        RequestError: the batch does not divide.
    """
    images = rank_batch(recipe.global_batch, gpu_count, recipe.accumulate)
    micro = images // recipe.accumulate
    networks = (method, *method.teachers.values())
    index_B, epoch_B = torch.arange(micro) % method.facts.samples, torch.zeros(micro, dtype=torch.int64)  # methods read their values
    with ranks.alone(), pretend() as work:
        for network in networks:
            network.to_empty(device="cpu").train()
        views = [torch.empty(micro, channels, side, side, dtype=torch.uint8) for side in recipe.views.sizes]
        known_BL = torch.ones(micro, len(method.facts.labels))
        batch = Batch(index_B, views, known_BL, known_BL, None, torch.ones(micro, dtype=torch.bool), epoch_B)
        encoded = _watch_encoder(method, work)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            with work.keeping(*networks):
                loss = method(batch).loss
            loss.backward()
            chunked = _chunked(encoded, recipe.virtual_batch)
            flops, moved = (work.flops + chunked.flops) * recipe.accumulate, (work.moved + chunked.moved) * recipe.accumulate
            before = work.moved
            method.on_step_end()
            moved += work.moved - before
            embedded = _embedded(method, recipe, channels, work)
    weights = FLOAT * sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    states = STATES[recipe.optimizer.name]
    moved += (3 + 2 * states) * weights  # weight, gradient and states are read, weight and states written
    cut = [gpu_count if recipe.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    memory = Memory(
        weights=weights // cut[0],
        gradients=weights // cut[1],
        optimizer=states * weights // cut[2],
        teachers=sum(FLOAT * parameter.numel() for teacher in method.teachers.values() for parameter in teacher.parameters()),
        buffers=sum(buffer.numel() * buffer.element_size() for network in networks for buffer in network.buffers()),
        activations=work.kept + chunked.kept + sum(view.numel() for view in views),
    )
    return Cost(images, flops, moved, *embedded, memory)


def least_step(gpu: Gpu, recipe: Recipe, architecture: str, channels: int, facts: methods.Facts, epoch_steps: int, gpu_count: int) -> float:
    """Seconds of a step at the roofline of one of so many GPUs."""
    found = cost(recipe, sketch(recipe, architecture, channels, facts, epoch_steps), channels, gpu_count)
    return least_seconds(gpu, recipe.precision, found.flops, found.moved)


class _Encoded(NamedTuple):
    """A call of the encoder that keeps activations: rows that went in; operations, bytes moved and kept by it."""

    rows: int
    flops: int
    moved: int
    kept: int


def _watch_encoder(method: methods.Method, work: Work) -> list[_Encoded]:
    """The calls of the encoder from now on, as they are made."""
    calls: list[_Encoded] = []
    encode = method.encode

    def watched(x: Tensor, network: Callable[..., Tensor] | None = None, *along: Tensor) -> Tensor:
        before = work.flops, work.moved, work.kept
        out = encode(x, network, *along)
        if torch.is_grad_enabled():
            calls.append(_Encoded(len(x), work.flops - before[0], work.moved - before[1], work.kept - before[2]))
        return out

    method.encode = watched  # type: ignore[method-assign]
    return calls


def _chunked(calls: list[_Encoded], chunk: int | None) -> _Encoded:
    """What virtual batches change: each forward pass of the encoder is made twice, and memory holds the activations of one chunk."""
    large = [call for call in calls if call.rows > (chunk or call.rows)]
    held = max((call.kept * (chunk or 0) // call.rows for call in large), default=0)
    flops, moved, kept = (sum(column) for column in zip(*(call[1:] for call in large), strict=True)) if large else (0, 0, 0)
    return _Encoded(0, flops, moved, held - kept)


class _Asked(Exception):
    """Ends `on_epoch_start`, whose clustering is not gone through."""


def _embedded(method: methods.Method, recipe: Recipe, channels: int, work: Work) -> tuple[float, float]:
    """Operations and bytes of one image when the method embeds the corpus at the start of this epoch."""
    spent = [0.0, 0.0]

    @torch.no_grad()
    def embed(network: Callable[[Tensor], Tensor]) -> Any:
        before = work.flops, work.moved
        network(torch.empty(EMBED_BATCH, channels, recipe.views.size, recipe.views.size, dtype=torch.uint8))
        spent[:] = (work.flops - before[0]) / EMBED_BATCH, (work.moved - before[1]) / EMBED_BATCH
        raise _Asked

    with contextlib.suppress(_Asked, DynamicOutputShapeException):  # the latter where it clusters what it holds
        method.on_epoch_start(embed)
    return spent[0], spent[1]
