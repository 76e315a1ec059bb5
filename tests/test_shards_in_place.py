"""Tars of others are read where they lie, as if they had been packed."""

import itertools
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from pydantic import ValidationError
from tiny_corpus import picture

from base.errors import WorkError
from shards import in_place, shardfile
from shards.card import Card
from shards.corpus import Corpus
from shards.loader import TrainLoader
from shards.pack import pack
from shards.views import ViewsConfig

CARD = Card.model_validate(
    {
        "schema": 2,
        "dataset": "photos",
        "title": "tiny",
        "reader": "tars-in-place",
        "kind": "multiclass",
        "channels": 3,
        "labels": ["cat", "dog", "newt"],
        "layouts": [
            {
                "name": "tars",
                "requires": ["*-train-*.tar"],
                "images": ["*.tar"],
                "split_pattern": "-(train|val)-",
                "split_words": {"train": "train_val", "val": "test"},
            }
        ],
        "namespace": "photos",
        "split": {"val": 0.3, "test": 0},
        "public": True,
        "licence": "none",
        "access": "none",
        "citation": "none",
    }
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars as webdataset's own writer makes them: a time in each header, jpeg and cls; and one image that is no JPEG or PNG."""
    folder = tmp_path_factory.mktemp("tars")
    for number, name in enumerate(("x-train-0", "x-train-1", "x-val-0")):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for i in range(number * 12, number * 12 + 12):
                image = cv2.imencode(".jpeg", picture(i, 40, 3)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
                writer.write({"__key__": f"{i % 3}/{i:06d}", "bmp" if i == 5 else "jpeg": image, "cls": i % 3})
    return folder


SPLITS = ("train", "val", "test")


def test_they_give_what_packing_gives(tars: Path, tmp_path: Path) -> None:
    made = pack(CARD, str(tars), str(tmp_path / "there"))
    packed = pack(CARD.model_copy(update={"reader": "tars"}), str(tars), str(tmp_path / "packed"), shard_samples=7)
    assert sum(made.counts.values()) == sum(packed.counts.values()) - 1 == 35
    there, copied = Corpus(str(tmp_path / "there"), SPLITS), Corpus(str(tmp_path / "packed"), SPLITS)
    assert not (tmp_path / "there").joinpath("cache").exists()
    place = {key: i for i, key in enumerate(copied.keys())}
    for i, key in enumerate(there.keys()):
        sample, other = there[i], copied[place[key]]
        assert (sample.labels, sample.patient, sample.meta) == (other.labels, other.patient, other.meta)
        assert np.abs(sample.image.astype(int) - other.image).mean() < 3  # packing may encode anew
    (left_out,) = (row for shard in made.shards for row in shard.quarantined)
    assert left_out.file is not None
    assert left_out.file.endswith("000005.bmp")
    batch = next(TrainLoader([Corpus(str(tmp_path / "there"))], None, ViewsConfig(kind="two", size=16), 8, seed=0, workers=1).batches(0))
    assert batch.target_BL is not None
    assert torch.equal(batch.target_BL.sum(1), torch.ones(8))


def test_they_are_indexed_once(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(tars, raw)
    out = str(tmp_path / "out")
    first = pack(CARD, str(raw), out)
    written: list[str] = []
    real = in_place.index_of_tar

    def indexed(tar: str | Path) -> np.ndarray:
        written.append(Path(tar).stem)
        return real(tar)

    monkeypatch.setattr(in_place, "index_of_tar", indexed)
    assert pack(CARD, str(raw), out).digest == first.digest
    assert not written
    with webdataset.TarWriter(str(raw / "x-val-0.tar")) as writer:
        image = cv2.imencode(".png", picture(99, 40, 3))[1].tobytes()
        writer.write({"__key__": "new", "png": image, "cls": 2})
    changed = pack(CARD, str(raw), out)
    assert written == ["photos-test-00000"]
    assert changed.counts["test"] == 1
    assert Corpus(out, ("test",))[0].labels["newt"] == 1


def test_tars_that_were_moved_are_pointed_to_anew(tars: Path, tmp_path: Path) -> None:
    """Packing again kept the old address, and said to pack again."""
    shutil.copytree(tars, tmp_path / "raw")
    pack(CARD, str(tmp_path / "raw"), str(tmp_path / "out"))
    (tmp_path / "raw").rename(tmp_path / "moved")
    pack(CARD, str(tmp_path / "moved"), str(tmp_path / "out"))
    assert Corpus(str(tmp_path / "out"), ("train",))[0].image.shape[2] == 3


def test_they_come_from_a_store_through_the_node_s_cache(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out, cache_dir = f"file://{tmp_path}/out", tmp_path / "cache"
    pack(CARD, f"file://{tars}", out)
    here = str(tmp_path / "here")
    pack(CARD, str(tars), here)
    there, near = Corpus(out, SPLITS, str(cache_dir)), Corpus(here, SPLITS)
    assert there.keys() == near.keys()
    views = ViewsConfig(kind="two", size=16)
    for batch in itertools.islice(TrainLoader([there], None, views, 8, seed=0, workers=2, labels=[]).batches(0), 4):
        assert batch.valid_B.all()
    shardfile.forget()
    assert all(np.array_equal(there[i].image, near[i].image) for i in range(len(near)))
    assert {path.stat().st_size for path in cache_dir.rglob("*.tar")} >= {path.stat().st_size for path in tars.glob("*.tar")}


def test_a_tar_that_changed_since_is_refused(tars: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", str(tmp_path / "out")
    shutil.copytree(tars, raw)
    pack(CARD, str(raw), out)
    path = raw / "x-val-0.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(WorkError, match=r"x-val-0\.tar: the shard is damaged: \d+ bytes where the manifest says"):
        Corpus(out, ("test",))[0]


MASKS = {"kind": "mixed", "mask_classes": ["mask"], "layouts": [CARD.layouts[0].model_dump() | {"masks": ["{stem}.png"]}]}


@pytest.mark.parametrize("change", [{"public": False}, {"max_side": 64}, {"depth": 16}, MASKS])
def test_what_needs_packing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="images that stay where they lie are neither"):
        Card.model_validate(CARD.model_dump(by_alias=True) | change)
