"""`allograft explain`: what a run of a recipe would take, and the recipe in full, without a GPU and without data."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from base.config import apply
from base.errors import RequestError
from cluster.screen import WIDE, table
from engine import gpus
from engine.gpus import Gpu
from pretrain import methods
from pretrain.explain import Explained, explain
from pretrain.recipe import Recipe, load_recipe

SHARE = 0.5  # of the roofline: good code reaches 50 to 60 %
USUAL = {"dino": "vit_small_patch16_224"}  # of methods that take any encoder, where the paper's recipe is a transformer's
GIB = 2**30
MOST_GPUS = 4096
END_OF_VALUE = "...\n"  # which PyYAML writes after a value that stands alone


class Asked(NamedTuple):
    """What is explained: the words of the command."""

    recipe: str
    settings: Sequence[str]
    architecture: str
    images: int
    channels: int
    gpu_count: int

    def explained(self) -> Explained:
        """Raises RequestError for what a run would refuse."""
        recipe = load_recipe(self.recipe, apply({}, self.settings))
        return explain(recipe, self.architecture, images=self.images, channels=self.channels, gpu_count=self.gpu_count)


class Way(NamedTuple):
    """A change that saves memory. bytes: what would be left on a GPU, by proportion."""

    words: str
    settings: Sequence[str]
    gpu_count: int
    bytes: float


def show(recipe: str, settings: Sequence[str], architecture: str | None, images: int, channels: int, gpu_name: str, gpu_count: int) -> None:
    """Print the table of what the recipe takes, then the recipe with its settings and defaults.

    Raises:
        RequestError: what a run would refuse, or a GPU that is not in the table.
    """
    loaded = load_recipe(recipe, apply({}, settings))
    gpu = gpus.get(gpu_name)
    usual = "vit_base_patch16_224" if methods.method_class(loaded.method).only == "vit" else "resnet50"
    chosen = architecture or USUAL.get(loaded.method, usual)
    asked = Asked(recipe, settings, chosen, images, channels, gpu_count)
    found = asked.explained()
    about = [
        ("encoder", f"{asked.architecture}, {channels} channel(s); {found.parameters / 1e6:.1f} million parameters with heads"),
        ("data", f"{images:,} images, views of {_views(loaded.views.sizes)} px"),
        ("scaled to the data", ", ".join(f"{name} {size:,}" for name, size in found.scaled.items()) or "nothing"),
        ("steps", f"{found.steps:,} of {loaded.global_batch:,} images; {found.epoch_steps:,} in an epoch"),
    ]
    table(about + _work(found) + _memory(found, asked, gpu, gpu_name) + _time(found, gpu, gpu_name, gpu_count))
    print(f"\n{_in_few_lines(found.recipe)}", end="")


def _in_few_lines(recipe: Recipe) -> str:
    """The recipe as YAML, each key on a line of its own with all that is below it."""
    import yaml

    held = recipe.model_dump(mode="json", by_alias=True)
    shown = {key: yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=WIDE - 20) for key, value in held.items()}
    return "".join(f"{key}: {text.removesuffix(END_OF_VALUE)}" for key, text in shown.items())


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


def _memory(found: Explained, asked: Asked, gpu: Gpu, gpu_name: str) -> list[tuple[str, str]]:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.cost.memory._asdict().items() if size > GIB / 200)
    rows = [(f"memory, {found.cost.images} images a GPU", f"{_gib(found):.1f} GiB: {parts}")]
    if _gib(found) <= gpu.memory:
        return rows
    fitting = [
        f"{way.words}: {_gib(other):.1f} GiB, {other.least_hours(gpu) / SHARE:.1f} h at {SHARE:.0%} of the roofline"
        for way, other in _fitting(found, asked, gpu)
    ]
    rows.append(("does not fit", f"{_gib(found):.1f} GiB into the {gpu.memory} of {gpu_name}"))
    return rows + [("would fit", words) for words in fitting or ["nothing that is known here"]]


def _gib(found: Explained) -> float:
    return sum(found.cost.memory) / GIB


def _fitting(found: Explained, asked: Asked, gpu: Gpu) -> Iterator[tuple[Way, Explained]]:
    """Of every kind of change the least with which the run fits, each gone through as the run itself was."""
    fewest = MOST_GPUS
    for kind in _ways(found, asked):
        for way in [way for way in kind if way.bytes <= gpu.memory * GIB and way.gpu_count < fewest][:2]:
            try:
                other = asked._replace(settings=[*asked.settings, *way.settings], gpu_count=way.gpu_count).explained()
            except RequestError:
                break
            if _gib(other) <= gpu.memory:
                yield way, other
                fewest = way.gpu_count if way.gpu_count > asked.gpu_count else fewest  # what takes more GPUs to save less is not said
                break


def _ways(found: Explained, asked: Asked) -> list[list[Way]]:
    """By kind, ever larger changes."""
    memory, images = found.cost.memory, found.cost.images
    shared = memory.weights + memory.gradients + memory.optimizer if found.recipe.zero_stage == 0 else 0
    fixed, doublings = sum(memory) - memory.activations, range(1, MOST_GPUS.bit_length())
    counts, fewer = [asked.gpu_count << i for i in doublings], [images >> i for i in doublings if images >> i]
    less = [memory.activations * n / images for n in fewer]
    return [
        [Way(f"--gpus {n}", [], n, fixed + memory.activations * asked.gpu_count / n) for n in counts],
        [
            Way(f"zero_stage=3 --gpus {n}", ["zero_stage=3"], n, fixed - shared + (shared + memory.activations * asked.gpu_count) / n)
            for n in counts
        ],
        [Way("activation_checkpointing=true", ["activation_checkpointing=true"], asked.gpu_count, 0)],
        [Way(f"virtual_batch={n}", [f"virtual_batch={n}"], asked.gpu_count, fixed + held) for n, held in zip(fewer, less, strict=True)],
        [
            Way(
                f"global_batch={n * asked.gpu_count} and a rate to match",
                [f"global_batch={n * asked.gpu_count}"],
                asked.gpu_count,
                fixed + held,
            )
            for n, held in zip(fewer, less, strict=True)
        ],
    ]


def _time(found: Explained, gpu: Gpu, gpu_name: str, gpu_count: int) -> list[tuple[str, str]]:
    cost, precision = found.cost, found.recipe.precision
    bound = (
        "bandwidth"
        if gpus.least_seconds(gpu, precision, 0, cost.moved) > gpus.least_seconds(gpu, precision, cost.flops, 0)
        else "operations"
    )
    hours = found.least_hours(gpu)
    where, fits = f"{gpu_count} x {gpu_name}", "" if _gib(found) <= gpu.memory else "; if it fitted"
    return [
        ("at the roofline", f"{hours:.1f} h on {where}, bound by {bound}{fits}"),
        (f"at {SHARE:.0%} of it", f"{hours / SHARE:.1f} h, {hours / SHARE * gpu_count:.1f} GPU hours{fits or '; if the loader keeps up'}"),
    ]
