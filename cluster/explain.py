"""`allograft explain`: what a recipe says in full, and what a run of it would take, without a GPU and without data."""

from collections.abc import Sequence

from base.config import apply, to_yaml
from cluster.screen import table
from engine import gpus
from engine.gpus import Gpu
from pretrain import methods
from pretrain.explain import Explained, Memory, explain
from pretrain.recipe import load_recipe

SHARE = 0.5  # of the roofline: good code reaches 50 to 60 %
GIB = 2**30


def show(recipe: str, settings: Sequence[str], architecture: str | None, images: int, channels: int, gpu_name: str, gpu_count: int) -> None:
    """Print the recipe with its settings and defaults, then the table of what it takes.

    Raises:
        RequestError: what a run would refuse, or a GPU that is not in the table.
    """
    loaded = load_recipe(recipe, apply({}, settings))
    gpu = gpus.get(gpu_name)
    usual = "vit_base_patch16_224" if methods.method_class(loaded.method).only == "vit" else "resnet50"
    found = explain(loaded, architecture or usual, images=images, channels=channels, gpu_count=gpu_count)
    print(to_yaml(found.recipe))
    about = [
        ("encoder", f"{architecture or usual}, {channels} channel(s); {found.parameters / 1e6:.1f} million parameters with heads"),
        ("data", f"{images:,} images, views of {_views(loaded.views.sizes)} px"),
        ("scaled to the data", ", ".join(f"{name} {size:,}" for name, size in found.scaled.items()) or "nothing"),
        ("steps", f"{found.steps:,} of {loaded.global_batch:,} images; {found.epoch_steps:,} in an epoch"),
    ]
    table(about + _work(found) + _memory(found, gpu, gpu_name, gpu_count) + _time(found, gpu, gpu_name, gpu_count))


def _views(sizes: Sequence[int]) -> str:
    counted = {size: sizes.count(size) for size in sizes}
    return " + ".join(f"{count} x {size}" for size, count in counted.items())


def _work(found: Explained) -> list[tuple[str, str]]:
    cost = found.cost
    rows = [
        ("operations", f"{cost.flops / cost.images / 1e9:.1f} GFLOP an image: all views forward and backward, teachers forward, heads"),
        ("memory traffic", f"{cost.moved / cost.images / 1e6:.0f} MB an image, each operation by itself"),
    ]
    if cost.embed_flops:
        rows.append(("each epoch", f"{cost.embed_flops / 1e9:.1f} GFLOP an image more, to embed the corpus; its clustering is not counted"))
    return rows


def _memory(found: Explained, gpu: Gpu, gpu_name: str, gpu_count: int) -> list[tuple[str, str]]:
    memory = found.cost.memory
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory._asdict().items() if size > GIB / 200)
    total = sum(memory) / GIB
    rows = [(f"memory, {found.cost.images} images a GPU", f"{total:.1f} GiB: {parts}")]
    if total > gpu.memory:
        rows.append(("", f"more than the {gpu.memory} GiB of {gpu_name}: {_advice(memory, gpu, gpu_count)}"))
    return rows


def _advice(memory: Memory, gpu: Gpu, gpu_count: int) -> str:
    left = gpu.memory * GIB - (sum(memory) - memory.activations)
    if left <= 0:
        return "zero_stage=1 to 3 over several GPUs"
    need = -(-memory.activations * gpu_count // left)
    return f"--gpus {_power_of_two(int(need))}, or with layer norm virtual_batch or activation_checkpointing"


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _time(found: Explained, gpu: Gpu, gpu_name: str, gpu_count: int) -> list[tuple[str, str]]:
    cost, precision = found.cost, found.recipe.precision
    bound = (
        "bandwidth"
        if gpus.least_seconds(gpu, precision, 0, cost.moved) > gpus.least_seconds(gpu, precision, cost.flops, 0)
        else "operations"
    )
    hours = found.least_hours(gpu)
    where = f"{gpu_count} x {gpu_name}"
    return [
        ("at the roofline", f"{hours:.1f} h on {where}, bound by {bound}"),
        (f"at {SHARE:.0%} of it", f"{hours / SHARE:.1f} h, {hours / SHARE * gpu_count:.1f} GPU hours; if the loader keeps up"),
    ]
