"""Leakage: test images of a task inside a pretraining corpus, or other images of their patients.

    matches = by_index(corpus, test)                           # patients and equal files: nothing is decoded
    parts = [by_pixels(url, "train", shard, [prepare(test_url)]) for shard in range(shards)]     # equal pixels and near-duplicates
    check = conclude(corpus, test, matches, [part[0] for part in parts])
    check.leaked                                               # ids of the corpus's samples

Patients can be told equal only where both cards have one namespace and both were packed with one secret. A pair of images of one patient
that look like one picture is marked `same_patient`: follow-ups of a patient can be that much alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.compared import Check, Match, Side
from analysis.near_duplicates import NEAR_DUPLICATES_VERSION, Pixels, Reference, duplicates, look, mean_image
from base.config import digest
from shards.corpus import Corpus, DamagedSample
from shards.manifest import Manifest

LEAKAGE_VERSION = 1  # part of the name under which a check is kept
MEAN_IMAGES = 512  # of a dataset, evenly spaced over its splits: what its mean image is taken of


@dataclass(frozen=True)
class Prepared:
    """The test images of a dataset, decoded once for all corpora."""

    reference: Reference
    keys: list[str]
    patients: list[str]
    names: tuple[str, str]
    unread: int


@dataclass
class Part:
    """What comparing a shard of a corpus with one set of test images gave."""

    matches: list[Match] = field(default_factory=list)
    unread: int = 0
    test_unread: int = 0


def check_key(corpus: Manifest, split: str, test: Manifest) -> str:
    """16 hex under which the check of a corpus against the test split of a dataset is kept."""
    version = [LEAKAGE_VERSION, NEAR_DUPLICATES_VERSION]
    return digest({"leakage": version, "corpus": [corpus.digest, split], "test": test.digest})[:16]


def patients_in_two_splits(url: str, splits: Sequence[str]) -> int:
    """How many patients of a packed dataset stand in more than one of its splits."""
    held = [_patients(Corpus(url, (split,))) for split in splits]
    return sum(len(np.intersect1d(one, other, assume_unique=True)) for i, one in enumerate(held) for other in held[:i])


def _patients(corpus: Corpus) -> np.ndarray:
    found = [np.unique(rows["patient"]) for rows in corpus.rows()]
    every = np.unique(np.concatenate(found)) if found else np.empty(0, "S16")
    return every[every != b""]


def by_index(corpus: Corpus, test: Corpus) -> list[Match]:
    """Shared patients and equal files, from the indexes alone. Of the files whose checksum and length agree, the bytes are compared."""
    tests = np.concatenate(list(test.rows()))
    keys = test.keys()
    comparable = _names(corpus.manifest) == _names(test.manifest)
    patients = {patient: i for i, patient in reversed(list(enumerate(tests["patient"].tolist()))) if patient} if comparable else {}
    files: dict[int, list[int]] = {}
    for i, mark in enumerate(_file_marks(tests).tolist()):
        files.setdefault(mark, []).append(i)
    named, marked = np.array(list(patients), "S16"), np.array(list(files), np.uint64)
    found = []
    start = 0
    for rows in corpus.rows():
        for at in np.flatnonzero(np.isin(rows["patient"], named)).tolist():
            names = {"corpus": _key(corpus, rows, at), "test": keys[patients[rows["patient"][at]]]}
            found.append(Match(kind="patient", corpus_id=start + at, **names, same_patient=True))
        marks = _file_marks(rows)
        for at in np.flatnonzero(np.isin(marks, marked)).tolist():
            for other in files[int(marks[at])]:
                if _bytes(corpus, start + at) == _bytes(test, other):
                    same = comparable and bool(rows["patient"][at]) and rows["patient"][at] == tests["patient"][other]
                    names = {"corpus": _key(corpus, rows, at), "test": keys[other]}
                    found.append(Match(kind="file", corpus_id=start + at, **names, same_patient=bool(same)))
        start += len(rows)
    return found


def _names(manifest: Manifest) -> tuple[str, str]:
    """Within what patient hashes mean the same: the namespace of ids, and the secret."""
    return manifest.card.namespace, manifest.secret_fingerprint


def _file_marks(rows: np.ndarray) -> np.ndarray:
    return (rows["image_len"].astype(np.uint64) << np.uint64(32)) | rows["image_crc"].astype(np.uint64)


def _key(corpus: Corpus, rows: np.ndarray, at: int) -> str:
    return f"{corpus.manifest.dataset}-{rows['key'][at].decode()}"


def _bytes(corpus: Corpus, i: int) -> bytes:
    return bytes(corpus.stored(i, seg=False, text=False)[1]["image"])


def prepare(url: str) -> Prepared:
    """The test split of a packed dataset, decoded, with the mean image of the whole dataset."""
    whole = Corpus(url, tuple(Corpus(url, ("test",)).manifest.counts))
    some = np.unique(np.linspace(0, len(whole) - 1, MEAN_IMAGES).astype(int)) if len(whole) > MEAN_IMAGES else np.arange(len(whole))
    mean_HW = mean_image(look(_readable(whole, some.tolist(), [])).small_NHW)
    test, ids = Corpus(url, ("test",)), list[int]()
    looks = look(_readable(test, range(len(test)), ids))
    rows, keys = np.concatenate(list(test.rows())), test.keys()
    patients = [rows["patient"][i].decode() for i in ids]
    reference = Reference.of(looks, mean_HW)
    return Prepared(reference, [keys[i] for i in ids], patients, _names(test.manifest), len(test) - len(ids))


def by_pixels(url: str, split: str, shard: int, tests: Sequence[Prepared]) -> list[Part]:
    """One shard of a corpus, decoded once, against several sets of test images: equal pixels and near-duplicates, a part a set."""
    corpus, ids = Corpus(url, (split,)), list[int]()
    start, end = (int(corpus.starts[at]) for at in (shard, shard + 1))
    looks = look(_readable(corpus, range(start, end), ids))
    rows = next(rows for number, rows in enumerate(corpus.rows()) if number == shard)
    parts = []
    for test in tests:
        part = Part(unread=end - start - len(ids), test_unread=test.unread)
        contents: dict[str, list[int]] = {}
        for i, content in enumerate(test.reference.looks.content):
            contents.setdefault(content, []).append(i)
        equal = {(i, j) for j, content in enumerate(looks.content) for i in contents.get(content, ())}
        near = [pair for pair in duplicates(test.reference, looks) if (pair.test, pair.corpus) not in equal]
        comparable = _names(corpus.manifest) == test.names
        for kind, i, j, correlation, inverted in [
            *(("pixels", i, j, None, False) for i, j in sorted(equal)),
            *(("near-duplicate", pair.test, pair.corpus, round(pair.correlation, 4), pair.inverted) for pair in near),
        ]:
            row = rows[ids[j] - start]
            same = comparable and bool(row["patient"]) and row["patient"].decode() == test.patients[i]
            names = {"corpus": f"{corpus.manifest.dataset}-{row['key'].decode()}", "test": test.keys[i]}
            shown = {"correlation": correlation, "inverted": inverted, "same_patient": same}
            part.matches.append(Match.model_validate({"kind": kind, "corpus_id": ids[j], **names, **shown}))
        parts.append(part)
    return parts


def _readable(corpus: Corpus, wanted: Sequence[int], read: list[int]) -> Iterator[Pixels]:
    """Images, and in `read` their ids; those that cannot be read are left out, as training would."""
    for i in wanted:
        try:
            image = corpus.read(i, seg=False, text=False).image
        except DamagedSample:
            continue
        read.append(i)
        yield image


def conclude(corpus: Corpus, test: Corpus, matches: Sequence[Match], parts: Sequence[Part]) -> Check:
    """The check of a split of one dataset against the test split of another. A pair that is one file is not named again for its pixels."""
    files = {(match.corpus, match.test) for match in matches if match.kind == "file"}
    seen = [match for part in parts for match in part.matches if match.kind != "pixels" or (match.corpus, match.test) not in files]
    one, other = _names(corpus.manifest), _names(test.manifest)
    unread = sum(part.unread for part in parts)
    return Check(
        corpus=_side(corpus, unread),
        test=_side(test, max((part.test_unread for part in parts), default=0)),
        patients="compared" if one == other else "other secret" if one[0] == other[0] else "other namespace",
        matches=sorted([*matches, *seen], key=lambda match: (match.corpus_id, match.kind, match.test)),
    )


def _side(corpus: Corpus, unread: int) -> Side:
    held = corpus.manifest
    return Side(dataset=held.dataset, split="+".join(corpus.splits), digest=held.digest, images=len(corpus), unread=unread)
