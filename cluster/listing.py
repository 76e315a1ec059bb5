"""`allograft list`: what there is, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from base.errors import unknown
from base.paths import names
from cluster.screen import Rows, brief, table

if TYPE_CHECKING:
    from shards.card import Card

Listing = tuple[Sequence[str], Rows]  # header and rows


def show(what: str | None) -> None:
    """Print the names of a kind, each with a line about it; without a kind, the kinds.

    Raises:
        RequestError: no such kind.
    """
    if what is None:
        table([(f"allograft list {kind}", about) for kind, (about, _) in KINDS.items()])
        return
    if what not in KINDS:
        raise unknown("list", what, KINDS)
    header, rows = KINDS[what][1]()
    table(brief(rows, header), header)


def _methods() -> Listing:
    from pretrain.methods import METHODS

    return ("method", "about"), [(name, entry.about) for name, entry in METHODS.items()]


def _strategies() -> Listing:
    from finetune.catalogue import STRATEGIES

    return ("strategy", "about"), sorted((name, about.text) for name, about in STRATEGIES.items())


def _tasks() -> Listing:
    from finetune.task import load_task

    tasks = [(name, load_task(name)) for name in names("task")]
    return ("task", "kind", "dataset", "metric"), [(name, task.kind, task.dataset, task.metric) for name, task in tasks]


def _datasets() -> Listing:
    from shards.card import load_card

    cards = [(name, load_card(name)) for name in names("card")]
    rows = [(name, _images(card), card.kind, card.title, card.licence) for name, card in cards]
    return ("dataset", "images", "kind", "title", "licence"), rows


def _images(card: "Card") -> str:
    """Images of the official release, as the card expects them."""
    if card.phantom is not None:
        return "any"
    layout = card.layouts[0]
    splits = [n for split, n in layout.counts.items() if split != "total"]
    total = layout.of or layout.counts.get("total") or sum(splits)
    return f"{total:,}" if total else "?"


def _architectures() -> Listing:
    import torch

    from encoders.build import build
    from encoders.cuts import architectures, brief, cuts, smallest

    rows = []
    for name in architectures():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build(name, 3).net.parameters())
        rows.append((name, f"{parameters:,}", f"{smallest(name)} px" if smallest(name) > 1 else "any", str(len(cuts(name))), brief(name)))
    return ("architecture", "parameters", "least side", "cuts", "from the stem to the last"), rows


def _recipes() -> Listing:
    from pretrain.recipe import load_recipe

    recipes = [(name, load_recipe(name)) for name in names("recipe")]
    return ("recipe", "epochs", "global batch"), [(name, f"{recipe.epochs:g}", str(recipe.global_batch)) for name, recipe in recipes]


def _studies() -> Listing:
    from base.config import load_tree
    from base.paths import named

    return ("study", "data"), [(name, ", ".join(load_tree(named("study", name)).get("data", {}))) for name in names("study")]


def _weights() -> Listing:
    from cluster.published import stands
    from encoders.published import load_zoo

    cards = [load_zoo(name) for name in names("weights")]
    rows = [(c.name, c.architecture, "here" if stands(f"zoo:{c.name}") else "", ", ".join(c.exposed_to), c.licence, c.title) for c in cards]
    return ("weights", "architecture", "converted", "have seen", "licence", "title"), rows


KINDS = {
    "methods": ("what a pretraining optimises", _methods),
    "strategies": ("how an encoder is moved to a task", _strategies),
    "tasks": ("what is fine-tuned and measured", _tasks),
    "datasets": ("cards: what raw files must be, and where to ask for them", _datasets),
    "architectures": ("encoders and their cuts", _architectures),
    "recipes": ("a method with all its settings", _recipes),
    "studies": ("ready study files", _studies),
    "weights": ("published weights that can be fetched", _weights),
}
