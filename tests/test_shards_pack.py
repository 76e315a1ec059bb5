"""Packing: equal input gives equal bytes, stock readers read them, broken files are named and left out, nothing half-written is trusted."""

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from raw_files import mask

from base import storage
from base.config import parse
from base.errors import RequestError, WorkError
from base.paths import ROOT
from cluster.pack import pack_on_ray
from shards import pack as packing
from shards.card import Card, load_card
from shards.corpus import Corpus
from shards.ingest import Unusable, image, strip_jpeg
from shards.manifest import MANIFEST, Manifest, load_index, read
from shards.pack import commit, pack, plan, write

CHEST = load_card("phantom-chest")
FUNDUS = load_card("phantom-fundus")
SHARED = ROOT.parent / "shared" / "data"
PAIRS = load_card("montgomery").model_dump(mode="json", by_alias=True) | {"dataset": "pairs", "split": {"val": 0.2, "test": 0.2}}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pairs(folder: Path, n: int = 24) -> str:
    """A folder in Montgomery's official layout."""
    for name in ("CXR_png", "ManualMask/leftMask", "ManualMask/rightMask"):
        (folder / name).mkdir(parents=True)
    for k in range(n):
        name = f"MCUCXR_{k:04d}_{k % 2}.png"
        (folder / "CXR_png" / name).write_bytes(encoded(noise(20, 30) // 2 + k))
        left, right = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
        left[2:9, 3:8], right[4:12, 20:29] = 255, 255
        (folder / "ManualMask/leftMask" / name).write_bytes(encoded(left))
        (folder / "ManualMask/rightMask" / name).write_bytes(encoded(right))
    return str(folder)


def test_two_packs_are_equal_to_the_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(FUNDUS, "phantom:40/48", str(tmp_path / name), shard_samples=10)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert read(str(tmp_path / "a")).digest == read(str(tmp_path / "b")).digest


def test_hashes_counts_and_index_are_true(tmp_path: Path) -> None:
    manifest = pack(FUNDUS, "phantom:40/48", str(tmp_path), shard_samples=10)
    assert read(str(tmp_path)) == manifest
    positives = {split: dict.fromkeys(FUNDUS.labels, 0) for split in manifest.counts}
    patients: dict[str, set[str]] = {split: set() for split in manifest.counts}
    for shard in manifest.shards:
        tar, index = (tmp_path / f"{shard.name}{ext}" for ext in (".tar", ".idx"))
        data = tar.read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        assert hashlib.sha256(index.read_bytes()).hexdigest() == shard.index_sha256
        assert len(data) == shard.bytes
        index_N = load_index(index.read_bytes())
        assert len(index_N) == shard.samples
        for row in index_N:
            parts = {}
            for part in ("image", "json", "seg"):
                parts[part] = data[row[f"{part}_off"] : row[f"{part}_off"] + row[f"{part}_len"]]
                assert zlib.crc32(parts[part]) == row[f"{part}_crc"]
            sample = json.loads(parts["json"])
            assert sample["split"] == shard.split
            assert sample["patient"].encode() == row["patient"]
            pixels, seg = (cv2.imdecode(np.frombuffer(parts[part], np.uint8), cv2.IMREAD_UNCHANGED) for part in ("image", "seg"))
            assert pixels is not None
            assert seg is not None
            assert pixels.shape == (48, 48, 3)
            assert set(np.unique(seg)) == {0, 1}
            patients[shard.split].add(sample["patient"])
            for label, value in sample["labels"].items():
                positives[shard.split][label] += value
    assert manifest.positives == positives
    assert manifest.patients == {split: len(found) for split, found in patients.items()}
    assert not patients["train"] & patients["test"]
    assert sum(manifest.counts.values()) == 40


def test_stock_webdataset_and_tar_read_the_shards(tmp_path: Path) -> None:
    manifest = pack(CHEST, "phantom:30/48", str(tmp_path))
    urls = [str(tmp_path / f"{shard.name}.tar") for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert len(samples) == 30
    assert {"png", "json"} <= set(samples[0])
    assert samples[0]["png"].size == (48, 48)
    with tarfile.open(urls[0]) as archive:
        member = archive.getmembers()[0]
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert archive.format in (tarfile.USTAR_FORMAT, tarfile.DEFAULT_FORMAT)
        assert not member.pax_headers


def test_jobs_pickle_and_may_run_in_any_order(tmp_path: Path) -> None:
    jobs = pickle.loads(pickle.dumps(plan(CHEST, "phantom:40/48", shard_samples=8)))
    entries = [pickle.loads(pickle.dumps(write(job, str(tmp_path / "a")))) for job in reversed(jobs)]
    manifest = commit(CHEST, entries, str(tmp_path / "a"))
    assert manifest == pack(CHEST, "phantom:40/48", str(tmp_path / "b"), shard_samples=8)


def test_a_second_pack_writes_only_what_changed(tmp_path: Path) -> None:
    raw, out = pairs(tmp_path / "raw"), tmp_path / "out"
    card = parse(PAIRS, Card, "card")
    first = pack(card, raw, str(out), shard_samples=4)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert pack(card, raw, str(out), shard_samples=4) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    (tmp_path / "raw/CXR_png/MCUCXR_0000_0.png").write_bytes(encoded(noise(20, 30)[::-1].copy()))
    second = pack(card, raw, str(out), shard_samples=4)
    assert second.digest != first.digest
    changed = [name for name, time in times.items() if (out / name).stat().st_mtime_ns != time]
    assert len(changed) == 1
    (out / f"{second.shards[-1].name}.tar").write_bytes(b"cut short")  # a damaged shard is noticed and written again
    assert pack(card, raw, str(out), shard_samples=4) == second
    assert hashlib.sha256((out / f"{second.shards[-1].name}.tar").read_bytes()).hexdigest() == second.shards[-1].sha256


def test_another_secret_does_not_key_a_packed_folder_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out = pairs(tmp_path / "raw"), tmp_path / "out"
    card = parse(PAIRS | {"public": False}, Card, "card")
    pack(card, raw, str(out), secret=b"old" * 16)
    before = digests(out)
    for other, secret in ((card, b"new" * 16), (parse(PAIRS, Card, "card"), None)):
        with pytest.raises(RequestError, match="another secret") as refused:
            pack(other, raw, str(out), secret=secret)
        assert str(out) in str(refused.value)
        assert refused.value.hint is not None
        assert "--out" in refused.value.hint
        assert digests(out) == before
    (out / MANIFEST).unlink()  # a packing that was stopped: its receipts know the secret
    with pytest.raises(RequestError, match="another secret"):
        pack(card, raw, str(out), secret=b"new" * 16)
    assert pack(card, raw, str(out), secret=b"old" * 16).counts
    assert digests(out) == before
    monkeypatch.setenv("ALLOGRAFT_SECRET", "new" * 16)
    monkeypatch.delenv("ALLOGRAFT_SECRET_FILE", raising=False)
    with pytest.raises(RequestError, match="another secret"):  # before Ray is started
        pack_on_ray(card, raw, str(out), lambda so_far: None)
    assert digests(out) == before


def test_shards_of_patients_who_left_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = load_card("phantom-chest")
    pack(card, "phantom:120/32", str(out), shard_samples=20)
    (out / "notes.txt").write_text("not ours")
    manifest = pack(card, "phantom:60/32", str(out), shard_samples=20)
    assert {path.stem for path in out.glob("*.tar")} == {shard.name for shard in manifest.shards}
    assert {path.stem for path in out.glob("*.idx")} == {path.name.removesuffix(".entry.json") for path in out.glob("*.entry.json")}
    assert len(list(out.glob("*.idx"))) == len(manifest.shards)
    assert (out / "notes.txt").exists()


def test_masks_are_merged_and_labels_come_from_names(tmp_path: Path) -> None:
    card = parse(PAIRS, Card, "card")
    manifest = pack(card, pairs(tmp_path / "raw"), str(tmp_path / "out"))
    assert sum(found["tuberculosis"] for found in manifest.positives.values()) == 12
    samples = list(wds.WebDataset(str(tmp_path / "out" / "pairs-train-00000.tar"), shardshuffle=False).decode("l8"))
    assert samples[0]["seg.png"].sum() == 7 * 5 + 8 * 9


def test_what_does_not_decode_is_named_and_the_rest_packed(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    pairs(raw)
    good = (raw / "CXR_png/MCUCXR_0000_0.png").read_bytes()
    flipped = bytearray(good)
    flipped[60] ^= 1
    bad = {0: b"", 1: good[: len(good) // 2], 2: b"not an image", 3: bytes(flipped), 4: encoded(noise(20, 30, 4))}
    for k, data in bad.items():
        (raw / f"CXR_png/MCUCXR_{k:04d}_{k % 2}.png").write_bytes(data)
    (raw / "ManualMask/leftMask/MCUCXR_0005_1.png").write_bytes(encoded(np.zeros((5, 5), np.uint8)))
    (raw / "ManualMask/rightMask/MCUCXR_0006_0.png").unlink()
    manifest = pack(parse(PAIRS, Card, "card"), str(raw), str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    reasons = {int(row["file"][15:19]): row["reason"] for row in rows}
    assert manifest.quarantined == 7
    assert sum(manifest.counts.values()) == 17
    for k, says in enumerate(
        ["empty file", "truncated", "none of JPEG, PNG", "checksum", "transparent", "mask measures 5 x 5", "mask is not there"]
    ):
        assert says in reasons[k]


def test_names_of_private_files_stay_out_of_the_output(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    pairs(raw)
    (raw / "CXR_png/MCUCXR_0003_1.png").write_bytes(b"")
    pack(parse(PAIRS | {"public": False}, Card, "card"), str(raw), str(tmp_path / "out"), secret=b"s" * 16)
    assert not any(b"MCUCXR_0" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_killed_pack_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    raw, out = pairs(tmp_path / "raw"), str(tmp_path / "out")
    card = parse(PAIRS, Card, "card")
    whole = pack(card, raw, out)
    changed = encoded(noise(20, 30) // 3)
    for path in (tmp_path / "raw/CXR_png").iterdir():
        path.write_bytes(changed)
    jobs = plan(card, raw)
    write(jobs[0], out)  # killed after the first shard: the old manifest may not speak for the new one
    with pytest.raises(RequestError, match="no packed dataset"):
        read(out)
    with pytest.raises(WorkError, match="by another run"):
        commit(card, whole.shards, out)
    assert pack(card, raw, out).counts == whole.counts


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.tar")

    monkeypatch.setattr(packing, "write_tar", full)
    with pytest.raises(WorkError, match="no space left"):
        pack(CHEST, "phantom:30/48", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    raw = pairs(tmp_path / "raw")
    for path in (tmp_path / "raw/CXR_png").iterdir():
        path.write_bytes(b"")
    with pytest.raises(WorkError, match="is usable, of 16: 16 because image is an empty file"):
        pack(parse(PAIRS, Card, "card"), raw, str(tmp_path / "out"))
    assert not storage.exists(str(tmp_path / "out" / "manifest.json"))


def test_a_clean_jpeg_keeps_its_pixels_and_loses_its_words() -> None:
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    data = encoded(noise(24, 40), "JPEG", exif=exif.tobytes(), comment=b"DOE^JANE", quality=90) + b"DOE^JANE"
    assert data.count(b"DOE^JANE") == 3
    stored = image(data, channels=1)
    assert (stored.ext, stored.height, stored.width) == ("jpg", 24, 40)
    assert b"DOE" not in stored.data
    assert (np.asarray(Image.open(io.BytesIO(stored.data))) == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert strip_jpeg(stored.data) == stored.data
    progressive = encoded(noise(24, 40), "JPEG", progressive=True, restart_marker_blocks=2)
    assert (np.asarray(Image.open(io.BytesIO(strip_jpeg(progressive)))) == np.asarray(Image.open(io.BytesIO(progressive)))).all()


def test_every_cut_of_a_jpeg_is_refused() -> None:
    data = encoded(noise(24, 40), "JPEG")
    for cut in range(0, len(data) - 2, 7):
        with pytest.raises(Unusable):
            image(data[:cut], channels=1)


def test_colour_alpha_palette_and_turned_images() -> None:
    grey = noise(8, 6)
    rgb = np.repeat(grey[..., None], 3, 2)
    opaque = np.concatenate([rgb, np.full((8, 6, 1), 255, np.uint8)], 2)
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    for data in (encoded(grey), encoded(rgb), encoded(opaque), palette.getvalue()):
        assert (np.asarray(Image.open(io.BytesIO(image(data, 1).data))) == grey).all()
        assert (np.asarray(Image.open(io.BytesIO(image(data, 3).data))) == rgb).all()
    opaque[0, 0, 3] = 7
    with pytest.raises(Unusable, match="transparent"):
        image(encoded(opaque), 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    stored = image(encoded(grey, "JPEG", exif=turned.tobytes()), 1)
    assert (stored.ext, stored.height, stored.width) == ("png", 6, 8)


def test_giant_images_are_refused_before_they_unfold() -> None:
    header = bytearray(encoded(noise(8, 8)))
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(Unusable, match="million pixels"):
        image(bytes(header), 1)


def test_large_images_are_reduced_and_their_masks_stay_as_they_were_drawn() -> None:
    stored = image(encoded(noise(200, 100)), 1, max_side=50)
    assert (stored.height, stored.width, stored.reduced_from) == (50, 25, (200, 100))
    half = np.zeros((200, 100), np.uint8)
    half[:100] = 255
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask(encoded(half), 1, stored)))), half // 255)
    with pytest.raises(Unusable, match="holds the value 255"):
        mask(encoded(half), 2, stored)


def test_packs_whose_masks_were_reduced_are_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, card, out = pairs(tmp_path / "raw"), parse(PAIRS, Card, "card"), str(tmp_path / "out")
    with monkeypatch.context() as before:
        before.setattr(packing, "PACK_VERSION", 2)
        pack(card, raw, out)
        assert all(packing.kept(job, out) for job in plan(card, raw))
    assert not any(packing.kept(job, out) for job in plan(card, raw))


def test_a_mask_of_another_size_is_damage_unless_the_card_reduces_or_resizes(tmp_path: Path) -> None:
    raw, card = pairs(tmp_path / "raw"), parse(PAIRS | {"max_side": 40}, Card, "card")
    for name in ("CXR_png", "ManualMask/leftMask", "ManualMask/rightMask"):
        for path in (tmp_path / "raw" / name).iterdir():
            path.write_bytes(encoded(np.kron(np.asarray(Image.open(path)), np.ones((2, 2), np.uint8))))
    out = tmp_path / "out"
    manifest = pack(card, raw, str(out))
    assert Corpus(str(out))[0].image.shape == (27, 40, 1)
    (out / MANIFEST).write_text(manifest.model_copy(update={"card": card.model_copy(update={"max_side": None})}).text())
    with pytest.raises(WorkError, match=r"its mask is \(40, 60\), its image \(27, 40\)"):
        Corpus(str(out))[0]


def test_golden_manifest_still_reads() -> None:
    """The committed manifest of 12 phantoms: its format stands still, its digest too."""
    path = ROOT / "tests" / "golden" / "manifest.json"
    data = json.loads(path.read_text())
    manifest = parse(data, Manifest, str(path))
    assert manifest.model_dump(mode="json", by_alias=True) == data
    assert manifest.text() == path.read_text()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")
def test_real_montgomery(tmp_path: Path) -> None:
    manifest = pack(load_card("montgomery"), str(SHARED / "montgomery"), str(tmp_path))
    assert manifest.counts == {"train": 97, "val": 14, "test": 27}
    assert manifest.quarantined == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")
def test_real_nih_subset() -> None:
    jobs = plan(load_card("nih-cxr14"), str(SHARED / "nih_cxr14_256"))
    assert {split: sum(len(job.records) for job in jobs if job.split == split) for split in ("train", "val", "test")} == {
        "train": 1063,
        "val": 160,
        "test": 382,
    }
    assert jobs[0].origin.of == 112120
