"""Heat maps of several cells beside each other: the same images, one column a source and strategy.

    held = read(cells)                        # what finetune.explain wrote beside the results, by the names of columns
    figure(held).savefig("heat.png")

Legend: K images, H W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.results import Cell
from analysis.tables import esc
from base import storage

FILE = "heat.npz"
ROWS, COLUMNS = 4, 6  # images and cells of a figure
Held = dict[str, NDArray[Any]]  # ids K, label K, image K H W [3] u8, heat K H W f16, cut


def read(cells: Sequence[Cell], most: int | None = None) -> dict[str, Held]:
    """The heat maps that cells have kept, the first cell of each source, strategy and options; at most so many."""
    held: dict[str, Held] = {}
    for cell in cells:
        if most is not None and len(held) >= most:
            break
        name, url = f"{cell.source}\n{cell.setting}", storage.join(cell.url, FILE)
        if name not in held and storage.exists(url):
            with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
                held[name] = {key: arrays[key] for key in arrays.files}
    return held


def section(cells: Sequence[Cell], loss: Mapping[str, float] | None = None) -> str:
    """The figure of these cells as HTML, empty where they kept no heat maps. loss: of each image, by which the worst comes first."""
    held = read(cells, COLUMNS)
    if not held:
        return ""
    buffer = io.BytesIO()
    figure(held, loss=loss).savefig(buffer, format="png", dpi=100)
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    names = ", ".join(name.replace("\n", " ") for name in held)
    text = f"Grad-CAM of {names} (one seed each): where in the image the network finds what speaks for the label at the left"
    text += "; the image that the best cell on validation errs most on comes first" if loss else ""
    return f'<figure><img style="max-width:100%" alt="{esc(text)}" src="{address}"><figcaption>{esc(text)}.</figcaption></figure>'


def figure(held: Mapping[str, Held], loss: Mapping[str, float] | None = None) -> Any:
    """A matplotlib figure: images that all have, evenly spaced, the one of the highest loss first where that is known, then the heat of
    each cell over them, the more opaque the hotter, and "none" where nothing in the image speaks for the label.

    Raises:
        ValueError: no image that all have.
    """
    from matplotlib.figure import Figure

    first = next(iter(held.values()))
    place = {name: {str(key): at for at, key in enumerate(kept["ids"])} for name, kept in held.items()}
    common = [str(key) for key in first["ids"] if all(str(key) in at for at in place.values())]
    if not common:
        raise ValueError("these cells have no image in common")
    if loss and all(key in loss for key in common):
        common.sort(key=lambda key: -loss[key])
    ids = [common[at] for at in sorted({round(q * (len(common) - 1)) for q in np.linspace(0, 1, ROWS)})]
    made = Figure(figsize=(1.7 * (1 + len(held)), 1.8 * len(ids) + 0.5), layout="constrained")
    axes = made.subplots(len(ids), 1 + len(held), squeeze=False)
    for row, key in enumerate(ids):
        at = place[next(iter(held))][key]
        image = first["image"][at]
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=255)
        axes[row, 0].set_ylabel(str(first["label"][at]), fontsize=8)
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
