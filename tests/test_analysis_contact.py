"""The contact sheet: samples of every split, readable captions, outlines where the mask ends."""

import io

import numpy as np
import pytest
from PIL import Image

from analysis import contact
from shards.card import load_card
from shards.pack import pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("sheet") / "fundus")
    pack(load_card("phantom-fundus"), "phantom:60/32", url, shard_samples=20)
    return url


def test_samples_come_from_every_split_and_follow_the_seed(packed: str) -> None:
    tiles = contact.draw(packed, 0)
    assert len(tiles) <= contact.SHOWN
    assert {tile.caption.split()[0] for tile in tiles} == {"train", "val", "test"}
    again, other = contact.draw(packed, 0), contact.draw(packed, 1)
    assert [tile.caption for tile in tiles] == [tile.caption for tile in again]
    assert [tile.caption for tile in tiles] != [tile.caption for tile in other]
    assert all(tile.seg is not None and tile.seg.any() and tile.image.shape == (32, 32, 3) for tile in tiles)


def test_the_sheet_is_a_png_with_a_tile_a_sample(packed: str) -> None:
    tiles = contact.draw(packed, 0)
    page = Image.open(io.BytesIO(contact.sheet(tiles, "phantoms", ["vessel"])))
    assert page.format == "PNG"
    assert page.width > contact.COLUMNS * contact.TILE
    assert page.height > -(-len(tiles) // contact.COLUMNS) * contact.TILE


def test_the_outline_follows_the_mask() -> None:
    seg = np.zeros((contact.TILE, contact.TILE), np.uint8)
    seg[50:100, 60:120] = 1
    page = np.asarray(Image.open(io.BytesIO(contact.sheet([contact.Tile(np.full_like(seg, 90), seg, "one")], "title", ["lung"]))))
    coloured = (page == contact.COLOURS[0]).all(axis=2)
    rows, columns = np.nonzero(coloured[3 * contact.MARGIN + 2 * contact.LINE :])
    assert (columns.max() - columns.min(), rows.max() - rows.min()) == (59, 49)


@pytest.mark.parametrize(
    ("labels", "says"),
    [({"a": 1, "b": -1, "c": 0}, "a, b?"), ({"a": 0}, "none"), ({"a": None}, "labels unknown"), ({}, "")],
)
def test_captions_say_what_is_known(labels: dict[str, int | None], says: str) -> None:
    assert contact.described(labels) == says


def test_windows_and_slabs_show_their_middle_channel() -> None:
    image = np.arange(5, dtype=np.uint8) * np.ones((4, 4, 1), np.uint8)
    assert (contact.visible(image, colour=False) == 2).all()
    assert contact.visible(image[:, :, :3], colour=True).shape == (4, 4, 3)


def test_long_captions_and_odd_shapes_fit() -> None:
    tiles = [contact.Tile(np.zeros((1, 900), np.uint8), None, "word " * 80), contact.Tile(np.zeros((700, 2), np.uint8), None, "w" * 300)]
    assert contact.sheet(tiles, "t" * 1000)
