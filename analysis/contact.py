"""A contact sheet: random samples of a packed dataset on one PNG, labels below them, masks outlined.

data = sheet(draw("OUT/shards/montgomery", seed=0), title="montgomery", mask_classes=["lung"])
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from base.seeds import rng
from shards import manifest
from shards.card import SPLITS
from shards.corpus import Corpus

COLUMNS = 6
SHOWN = 24  # samples on a sheet
TILE = 240  # pixels, the longer side of an image on the sheet
LINE, LINES, MARGIN = 16, 3, 10  # height of a caption's line, lines of a caption, gap between tiles; pixels
COLOURS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0))  # Okabe and Ito, for mask classes


class Tile(NamedTuple):
    """One sample: image u8 HW or HWC (RGB), mask u8 HW of class indices or None, caption."""

    image: NDArray[np.uint8]
    seg: NDArray[np.uint8] | None
    caption: str


def draw(url: str, seed: int, cache_dir: str | None = None) -> list[Tile]:
    """Up to SHOWN random samples of the shards at `url`, equally many of each split, those of a split from one random shard.

    One shard a split, because remote shards are fetched whole.

    Raises:
        RequestError: nothing is packed there.
        WorkError: a shard is missing or damaged.
    """
    splits = [split for split in SPLITS if manifest.read(url).counts.get(split)]
    tiles = []
    for place, split in enumerate(splits):
        random = rng("contact sheet", seed, split)
        corpus = Corpus(url, (split,), cache_dir)
        sizes = [shard.samples for shard in corpus.shards]
        shard = int(random.choice(len(sizes), p=np.array(sizes) / sum(sizes)))
        share = SHOWN // len(splits) + (place < SHOWN % len(splits))
        chosen = random.choice(sizes[shard], size=min(share, sizes[shard]), replace=False)
        for i in sorted(sum(sizes[:shard]) + int(offset) for offset in chosen):
            sample = corpus[i]
            key = corpus.stored(i, image=False, seg=False)[0].key.decode()[:6]
            words = described(sample.labels)
            caption = f"{split} {key}" + (f": {words}" if words else "")
            tiles.append(Tile(visible(sample.image, corpus.card.colour), sample.seg, caption))
    return tiles


def visible(image: NDArray[np.uint8], colour: bool) -> NDArray[np.uint8]:
    """What a person is shown of u8 HWC pixels: colours as they are, of windows and slabs the middle channel."""
    return image if colour else image[:, :, image.shape[2] // 2]


def described(labels: Mapping[str, int | None]) -> str:
    """Raw labels in words: those that are 1, uncertain ones with a question mark."""
    positive = [name for name, value in labels.items() if value == 1] + [f"{name}?" for name, value in labels.items() if value == -1]
    if positive:
        return ", ".join(positive)
    return "" if not labels else "labels unknown" if all(value is None for value in labels.values()) else "none"


def sheet(tiles: Sequence[Tile], title: str, mask_classes: Sequence[str] = ()) -> bytes:
    """The tiles on one page as PNG bytes; the legend names the outlines' colours."""
    columns = min(COLUMNS, max(1, len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    cell = (TILE + MARGIN, TILE + LINES * LINE + MARGIN)
    head = 2 * MARGIN + LINE * (2 if mask_classes else 1)
    page = Image.new("RGB", (columns * cell[0] + MARGIN, head + rows * cell[1]), "white")
    pen = ImageDraw.Draw(page)
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    pen.text((MARGIN, MARGIN), _fitted(title, bold, page.width - 2 * MARGIN, 1)[0], "black", bold)
    x = MARGIN
    for number, name in enumerate(mask_classes):
        pen.rectangle((x, MARGIN + LINE + 4, x + 10, MARGIN + LINE + 14), fill=_colour(number))
        pen.text((x + 15, MARGIN + LINE + 2), name, "black", font)
        x += 15 + round(font.getlength(name)) + 2 * MARGIN
    for i, tile in enumerate(tiles):
        left, top = MARGIN + i % columns * cell[0], head + i // columns * cell[1]
        page.paste(Image.fromarray(_picture(tile)), (left, top))
        for line, text in enumerate(_fitted(tile.caption, font, TILE, LINES)):
            pen.text((left, top + TILE + line * LINE), text, "black", font)
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _colour(number: int) -> tuple[int, int, int]:
    return COLOURS[number % len(COLOURS)]


def _picture(tile: Tile) -> NDArray[np.uint8]:
    """The image with its outlines, u8 TILE x TILE x 3, its proportions kept on a grey ground."""
    height, width = tile.image.shape[:2]
    scale = TILE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = cv2.resize(tile.image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    pixels: Any = cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB) if scaled.ndim == 2 else scaled.copy()
    if tile.seg is not None:
        seg = cv2.resize(tile.seg, size, interpolation=cv2.INTER_NEAREST)
        for value in np.unique(seg[seg > 0]).tolist():
            outlines, _ = cv2.findContours((seg == value).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(pixels, outlines, -1, _colour(value - 1), 1)
    ground = np.full((TILE, TILE, 3), 225, np.uint8)
    top, left = (TILE - size[1]) // 2, (TILE - size[0]) // 2
    ground[top : top + size[1], left : left + size[0]] = pixels
    return ground


def _fitted(text: str, font: Any, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of that width in pixels, broken between words, with an ellipsis where it is cut."""
    fitted: list[str] = [""]
    for word in text.split():
        longer = f"{fitted[-1]} {word}".strip()
        if font.getlength(longer) <= width or not fitted[-1]:
            fitted[-1] = longer
        else:
            fitted.append(word)
    if len(fitted) > lines:
        fitted = [*fitted[: lines - 1], f"{fitted[lines - 1]} ..."]
    return [_cut(line, font, width) for line in fitted]


def _cut(line: str, font: Any, width: int) -> str:
    while font.getlength(line) > width:
        line = line.removesuffix("...")[:-1].rstrip() + "..."
    return line
