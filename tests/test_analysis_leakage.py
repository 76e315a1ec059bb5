"""Leakage: near-duplicates are found through every transformation and nothing else is; corpora are held against test images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import alignment, leakage
from analysis.exposure import exposed_to, overlap_notes
from analysis.near_duplicates import Looks, Pair, Reference, duplicates, hashes, look, mean_image
from base.errors import RequestError
from base.paths import ROOT
from shards import phantoms
from shards.corpus import Corpus

Pixels = np.ndarray
REAL = ROOT.parent / "shared" / "data" / "nih_cxr14_256"


def jpeg(image: Pixels, quality: int) -> Pixels:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE))


def resize(image: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def gamma(image: Pixels, power: float) -> Pixels:
    return np.rint(255 * (image / 255) ** power).astype(np.uint8)


def crop(image: Pixels, left: float, top: float, right: float, bottom: float) -> Pixels:
    height, width = image.shape
    return image[round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)]


COPIES = {
    "re-encoded": lambda image: jpeg(image, 50),
    "smaller": lambda image: resize(image, 96, 96),
    "another aspect": lambda image: resize(image, 224, 300),
    "darker": lambda image: gamma(image, 2.0),
    "brighter": lambda image: gamma(image, 0.5),
    "inverted": lambda image: 255 - image,
    "cropped by 5 % on a side": lambda image: crop(image, 0.05, 0, 0, 0),
    "cropped at a corner": lambda image: crop(image, 0, 0.05, 0.05, 0),
    "cropped by 5 % on all sides": lambda image: crop(image, 0.05, 0.05, 0.05, 0.05),
}
ALL_OF_IT = {"all of it": lambda image: jpeg(255 - gamma(resize(crop(image, 0.04, 0.01, 0.02, 0.05), 192, 192), 1.5), 75)}


@pytest.fixture(scope="module")
def chests() -> list[Pixels]:
    return [phantoms.chest(0, i, 128).image for i in range(60)]


def reference(images: list[Pixels]) -> Reference:
    looks = look(images)
    return Reference.of(looks, mean_image(looks.small_NHW))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_and_only_it(chests: list[Pixels], name: str) -> None:
    copies = look([COPIES[name](image) for image in chests[:20]])
    found = duplicates(reference(chests), copies)
    assert [(pair.test, pair.corpus) for pair in found] == [(i, i) for i in range(20)]
    assert all(pair.inverted == (name == "inverted") for pair in found)


def test_which_of_the_two_is_the_copy_does_not_matter(chests: list[Pixels]) -> None:
    cropped = reference([COPIES["cropped at a corner"](image) for image in chests])
    assert [(pair.test, pair.corpus) for pair in duplicates(cropped, look(chests[:20]))] == [(i, i) for i in range(20)]


def test_different_phantoms_are_no_pairs() -> None:
    for draw in (phantoms.chest, phantoms.fundus):
        images = [draw(0, i, 64).image for i in range(120)]
        pairs = duplicates(reference(images), look(images))
        assert [(pair.test, pair.corpus) for pair in pairs] == [(i, i) for i in range(120)]


def test_images_with_nothing_in_them_match_nothing() -> None:
    blank = [np.full((64, 64), grey, np.uint8) for grey in (0, 128, 255)]
    assert duplicates(reference(blank), look(blank)) == []
    assert not hashes(look(blank).small_NHW, np.zeros((128, 128), np.float32)).any()
    assert duplicates(reference(blank), Looks(np.empty((0, 128, 128), np.uint8), [])) == []


def test_looks_take_any_shape_and_keep_what_the_pixels_were() -> None:
    grey = phantoms.chest(0, 1, 100).image
    looks = look([grey, np.repeat(grey[:, :, None], 3, axis=2), np.repeat(grey[:, :, None], 2, axis=2), grey[:50]])
    assert looks.small_NHW.shape == (4, 128, 128)
    assert np.array_equal(looks.small_NHW[0], looks.small_NHW[2])
    assert len(set(looks.content)) == 4


def test_inversion_mirrors_a_look_and_flips_every_bit() -> None:
    image = phantoms.chest(0, 1, 128).image
    looks, inverted = look([image]).small_NHW.astype(int), look([255 - image]).small_NHW.astype(int)
    assert np.abs(looks + inverted - 255).max() <= 1
    mean_HW = mean_image(look([phantoms.chest(0, i, 128).image for i in range(20)]).small_NHW)
    agreement = hashes(look([image]).small_NHW, mean_HW)[0, 0].astype(int) @ hashes(look([255 - image]).small_NHW, mean_HW)[0, 0]
    assert agreement <= -250


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.floats(0.93, 1.07), st.floats(-0.03, 0.03), st.floats(0.93, 1.07), st.floats(-0.03, 0.03)),
    st.integers(0, 5),
)
def test_alignment_finds_the_way_back(placement: alignment.Placement, index: int) -> None:
    moving = look([phantoms.chest(1, index, 128).image]).small_NHW[0]
    fixed = alignment.warp(moving.astype(np.float32), placement).astype(np.uint8)
    mean_HW: np.ndarray = np.zeros((128, 128), np.float32) + np.arange(128, dtype=np.float32)
    alike = alignment.Target.of(fixed, mean_HW).compare(moving, (1, 0, 1, 0))
    assert alike is not None
    assert min(alike) > 0.9


@pytest.mark.skipif(not REAL.exists(), reason="the real images are not here")
class TestRealChests:
    """NIH ChestX-ray14: images of 1,281 patients, where hashes alone flag thousands of pairs."""

    @pytest.fixture(scope="class")
    def real(self) -> tuple[list[Pixels], list[str], Reference]:
        import pandas as pd

        table = pd.read_csv(REAL / "labels.csv", dtype=str)
        images = [np.asarray(cv2.imread(str(REAL / name), cv2.IMREAD_GRAYSCALE)) for name in table["image"]]
        return images, table["patient_id"].tolist(), reference(images)

    @pytest.mark.parametrize("name", COPIES | ALL_OF_IT)
    def test_recall(self, real: tuple[list[Pixels], list[str], Reference], name: str) -> None:
        images, _, test = real
        some = list(range(0, len(images), 16))
        found = duplicates(test, look([(COPIES | ALL_OF_IT)[name](images[i]) for i in some]))
        assert len({(pair.test, pair.corpus) for pair in found} & {(i, at) for at, i in enumerate(some)}) >= 0.99 * len(some)

    def test_no_pair_of_different_patients(self, real: tuple[list[Pixels], list[str], Reference]) -> None:
        images, patients, test = real
        pairs = [pair for pair in duplicates(test, look(images)) if pair.test != pair.corpus]
        assert all(patients[pair.test] == patients[pair.corpus] for pair in pairs)  # 1,285,840 pairs, either way round
        assert {"00002658"} == {patients[pair.test] for pair in pairs}  # follow-ups, equal but for their names


def repeated(monkeypatch: pytest.MonkeyPatch, period: int) -> None:
    """Corpora in which picture i is picture i mod `period`."""
    picture = tiny_corpus.picture
    monkeypatch.setattr(tiny_corpus, "picture", lambda i, size, channels=1: picture(i % period, size, channels))


SPLITS = ("train", "val", "test")


def compared(corpus: Corpus, test: Corpus) -> leakage.Check:
    prepared = leakage.prepare(test.url)
    parts = [leakage.by_pixels(corpus.url, corpus.splits[0], shard, [prepared])[0] for shard in range(len(corpus.shards))]
    return leakage.conclude(corpus, test, leakage.by_index(corpus, test), parts)


def test_a_clean_dataset_is_clean(tmp_path: Path) -> None:
    url = tiny_corpus.write(tmp_path / "a", (20, 10, 10), splits=SPLITS, size=64)
    check = compared(Corpus(url, ("train",)), Corpus(url, ("test",)))
    assert check.matches == []
    assert check.patients == "compared"
    assert leakage.patients_in_two_splits(url, SPLITS) == 0


def test_equal_files_are_found_without_decoding_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated(monkeypatch, 30)
    url = tiny_corpus.write(tmp_path / "a", (12, 18, 10), splits=SPLITS, size=64)  # test pictures 30 to 39 are those of 0 to 9
    corpus, test = Corpus(url, ("train",)), Corpus(url, ("test",))
    check = compared(corpus, test)
    assert {match.kind for match in check.matches} == {"file"}
    assert check.leaked == list(range(10))
    assert [match.test for match in check.matches] == test.keys()
    assert not any(match.same_patient for match in check.matches)


def test_equal_pixels_and_near_duplicates_across_datasets(tmp_path: Path) -> None:
    """One dataset stored losslessly and, under other names and in colour, again: then as JPEG."""
    test = Corpus(tiny_corpus.write(tmp_path / "a", (20, 10), splits=("train", "test"), size=64, suffix="png"), ("test",))
    same = Corpus(tiny_corpus.write(tmp_path / "b", (15, 15), dataset="b", size=64, suffix="png"), ("train",))
    assert {match.kind for match in compared(same, test).matches} == {"file"}  # equal pixels are equal files here
    near = compared(Corpus(tiny_corpus.write(tmp_path / "c", (15, 15), dataset="c", size=64), ("train",)), test)
    assert {match.kind for match in near.matches} == {"near-duplicate"}
    assert near.leaked == list(range(20, 30))
    assert near.patients == "other namespace"
    assert all(match.correlation is not None and match.correlation > 0.93 for match in near.matches)
    assert leakage.Check.model_validate_json(near.model_dump_json(by_alias=True)) == near


def test_shared_patients_are_found_by_the_index(tmp_path: Path) -> None:
    one = tiny_corpus.write(tmp_path / "a", (20, 10), splits=("train", "test"), size=64)
    other = tiny_corpus.write(tmp_path / "b", (30,), splits=("test",), size=64)
    matches = leakage.by_index(Corpus(one, ("train",)), Corpus(other, ("test",)))
    assert {match.kind for match in matches} == {"patient", "file"}
    assert {match.corpus_id for match in matches} == set(range(20))
    assert all(match.same_patient for match in matches)


def test_a_damaged_sample_is_counted_and_not_compared(tmp_path: Path) -> None:
    url = tiny_corpus.write(tmp_path / "a", (20, 10), splits=("train", "test"), size=64)
    corpus = Corpus(url, ("train",))
    first = next(corpus.rows())[3]
    tar = tmp_path / "a" / f"{corpus.shards[0].name}.tar"
    data = bytearray(tar.read_bytes())
    data[int(first["image_off"]) + 20] ^= 0xFF
    tar.write_bytes(bytes(data))
    part = leakage.by_pixels(url, "train", 0, [leakage.prepare(url)])[0]
    assert part.unread == 1


def test_samples_left_out_of_a_corpus(tmp_path: Path) -> None:
    url = tiny_corpus.write(tmp_path / "a", (20, 10, 15), size=64)
    whole, some = Corpus(url), Corpus(url, without=[3, 21, 44])
    assert len(some) == 42
    kept = [i for i in range(45) if i not in (3, 21, 44)]
    assert some.keys() == [whole.keys()[i] for i in kept]
    assert [some[i].meta for i in range(42)] == [whole[i].meta for i in kept]
    assert some.source.shard_samples == (19, 9, 14)
    assert some.source.digest != whole.source.digest
    some.check_keys()
    assert Corpus(url, without=[]).source == whole.source
    with pytest.raises(RequestError, match="cannot be left out"):
        Corpus(url, without=[45])


def test_exposure_by_lineage_and_by_the_register() -> None:
    nih = {"dataset": "nih-cxr14", "split": "train", "digest": "d1", "licence": "x"}
    assert exposed_to([nih], "nih-cxr14", "d1") == []  # the other split of one packing
    assert exposed_to([nih], "nih-cxr14", "d2") == ["nih-cxr14"]  # split otherwise: nothing is known
    assert exposed_to([nih | {"split": "test"}], "nih-cxr14", "d1") == ["nih-cxr14"]
    assert exposed_to([nih], "siim-acr", "d3") == ["nih-cxr14"]
    assert exposed_to([nih], "siim-acr", "d3", {("nih-cxr14", "train", "d1", "")}) == []
    assert exposed_to([nih | {"without": "abc"}], "siim-acr", "d3", {("nih-cxr14", "train", "d1", "")}) == ["nih-cxr14"]
    assert exposed_to([{"dataset": "imagenet-1k", "digest": "not ours"}], "montgomery", "d4") == []
    assert overlap_notes("nih-cxr14", "siim-acr")[0].startswith("siim-acr and nih-cxr14 share images (all): ")
    assert overlap_notes("montgomery", "nih-cxr14") == []


def test_pairs_are_plain_numbers(chests: list[Pixels]) -> None:
    pair = duplicates(reference(chests[:10]), look(chests[:1]))[0]
    assert isinstance(pair, Pair)
    assert [type(value) for value in pair] == [int, int, float, bool]
