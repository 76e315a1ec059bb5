"""`allograft list`: what there is, as a table."""

from base.errors import unknown
from base.paths import names


def show(what: str) -> None:
    """Print the names of a kind, each with a line about it.

    Raises:
        RequestError: no such kind.
    """
    if what not in KINDS:
        raise unknown("list", what, KINDS)
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, about in KINDS[what]():
        table.add_row(name, about)
    Console(highlight=False, markup=False).print(table)


def _methods() -> list[tuple[str, str]]:
    from pretrain.methods import METHODS

    return sorted(METHODS.items())


def _strategies() -> list[tuple[str, str]]:
    from finetune.strategies import STRATEGIES

    return sorted(STRATEGIES.items())


def _tasks() -> list[tuple[str, str]]:
    from finetune.task import load_task

    return [(name, f"{task.kind} on {task.dataset}, by {task.metric}") for name in names("task") for task in [load_task(name)]]


def _datasets() -> list[tuple[str, str]]:
    from shards.card import load_card

    return [(name, f"{card.title} ({card.licence})") for name in names("card") for card in [load_card(name)]]


def _architectures() -> list[tuple[str, str]]:
    from encoders.cuts import architectures, cuts

    return [(name, "cut points: " + " ".join(cut.name for cut in cuts(name))) for name in architectures()]


def _recipes() -> list[tuple[str, str]]:
    from pretrain.recipe import load_recipe

    return [
        (name, f"{recipe.epochs} epochs, global batch {recipe.global_batch}") for name in names("recipe") for recipe in [load_recipe(name)]
    ]


def _studies() -> list[tuple[str, str]]:
    from base.config import load_tree
    from base.paths import named

    rows = []
    for name in names("study"):
        tree = load_tree(named("study", name))
        rows.append((name, f"data: {', '.join(tree.get('data', {}))}"))
    return rows


KINDS = {
    "methods": _methods,
    "strategies": _strategies,
    "tasks": _tasks,
    "datasets": _datasets,
    "architectures": _architectures,
    "recipes": _recipes,
    "studies": _studies,
}
