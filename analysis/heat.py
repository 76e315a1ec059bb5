"""Heat maps of several cells beside each other: the same images, one column a source and strategy.

    held = {name: read(url) for name, url in kept(cells).items()}      # what finetune.explain wrote beside the results
    figure(held, loss).savefig("heat.png")                             # the worst, the median and the best image

Legend: K images, H W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.results import Cell
from analysis.tables import esc
from base import storage

FILE = "heat.npz"
COLUMNS = 6  # cells of a figure
WORDS = ("worst", "below the middle", "median", "above the middle", "best")
Item = TypeVar("Item")
Held = dict[str, NDArray[Any]]  # ids K, label K, image K H W [3] u8, heat K H W f16, cut


def cases(ranked: Sequence[Item], count: int = 3) -> list[tuple[str, Item]]:
    """Of items from the worst to the best the first, the last and those evenly between, each with its word; fewer where there are fewer."""
    places = sorted({round(q * (len(ranked) - 1)) for q in np.linspace(0, 1, count)}) if ranked else []
    words = {1: (WORDS[2],), 2: (WORDS[0], WORDS[4]), 3: WORDS[::2], 5: WORDS}.get(len(places), [""] * len(places))
    return [(word, ranked[at]) for word, at in zip(words, places, strict=True)]


def kept(cells: Sequence[Cell]) -> dict[str, str]:
    """Addresses of the heat maps that cells have kept, the first cell of each source, strategy and options, by the names of columns."""
    found: dict[str, str] = {}
    for cell in cells:
        name, url = f"{cell.source}\n{cell.setting}", storage.join(cell.url, FILE)
        if name not in found and storage.exists(url):
            found[name] = url
    return found


def read(url: str) -> Held:
    """The heat maps of a cell."""
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def section(cells: Sequence[Cell], loss: Mapping[str, float] | None = None) -> str:
    """The figure of the first cells as HTML, empty where they kept no heat maps. loss: of each image, by which they are chosen."""
    found = kept(cells)
    if not found:
        return ""
    held = {name: read(url) for name, url in list(found.items())[:COLUMNS]}
    if loss and not all(str(key) in loss for one in held.values() for key in one["ids"]):  # predictions of studies, maps of their images
        loss = None
    buffer = io.BytesIO()
    figure(held, loss).savefig(buffer, format="png", dpi=100)
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    names = ", ".join(name.replace("\n", " ") for name in held)
    text = f"Grad-CAM of {names} (one seed each): where in the image the network finds what speaks for the label at the left"
    text += "; of the images that were kept the worst, the median and the best by the loss of the best cell on validation" if loss else ""
    text += f"; the first {COLUMNS} of {len(found)} that kept them" if len(found) > COLUMNS else ""
    return f'<figure><img style="max-width:100%" alt="{esc(text)}" src="{address}"><figcaption>{esc(text)}.</figcaption></figure>'


def figure(held: Mapping[str, Held], loss: Mapping[str, float] | None = None) -> Any:
    """A matplotlib figure: of the images that all have the one of the highest loss, of the middle one and of the lowest, by name, or three
    evenly spaced ones where no loss is known; beside each the heat of each cell over it, the more opaque the hotter, and "none" where
    nothing in the image speaks for the label.

    Raises:
        ValueError: no image that all have.
    """
    from matplotlib.figure import Figure

    first = next(iter(held.values()))
    place = {name: {str(key): at for at, key in enumerate(kept["ids"])} for name, kept in held.items()}
    common = [str(key) for key in first["ids"] if all(str(key) in at for at in place.values())]
    if not common:
        raise ValueError("these cells have no image in common")
    shown = cases(sorted(common, key=lambda key: -loss[key]) if loss else common)
    made = Figure(figsize=(1.7 * (1 + len(held)), 1.8 * len(shown) + 0.5), layout="constrained")
    axes = made.subplots(len(shown), 1 + len(held), squeeze=False)
    for row, (word, key) in enumerate(shown):
        at = place[next(iter(held))][key]
        image = first["image"][at]
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=255)
        axes[row, 0].set_ylabel("\n".join([word] * bool(loss) + [str(first["label"][at])]), fontsize=8)
        for column, (name, kept) in enumerate(held.items(), 1):
            hot = kept["heat"][place[name][key]].astype(float)
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=255)
            axes[row, column].imshow(hot, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * hot, interpolation="bilinear")
            if not hot.any():
                axes[row, column].text(0.5, 0.5, "none", color="white", fontsize=9, ha="center", transform=axes[row, column].transAxes)
    for name, column in zip(["image", *(f"{name}\nat {kept['cut']}" for name, kept in held.items())], axes[0], strict=True):
        column.set_title(name, fontsize=8)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    return made
