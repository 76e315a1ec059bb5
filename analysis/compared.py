"""Formats of what comparing corpora with test images found: the check of one pair, and OUT/leakage.json, the sum of a study's checks."""

from typing import Literal

from pydantic import Field

from base.config import Strict

Kind = Literal["patient", "file", "pixels", "near-duplicate"]
Patients = Literal["compared", "other namespace", "other secret"]


class Match(Strict):
    """A sample of the corpus and a test image. `correlation`: of near-duplicates, after alignment. `corpus_id`: of the whole split."""

    kind: Kind
    corpus_id: int
    corpus: str
    test: str
    correlation: float | None = None
    inverted: bool = False
    same_patient: bool = False


class Side(Strict):
    """A split of a packed dataset; `unread`: samples of it that could not be read, and so not compared."""

    dataset: str
    split: str
    digest: str
    images: int
    unread: int = 0


class Check(Strict):
    """A corpus held against test images: OUT/analyses/<key>/leakage.json. `patients`: whether patients could be told equal."""

    schema_: Literal[1] = Field(1, alias="schema")
    corpus: Side
    test: Side
    patients: Patients
    matches: list[Match]

    @property
    def leaked(self) -> list[int]:
        """Ids of the corpus's samples that match, sorted."""
        return sorted({match.corpus_id for match in self.matches})

    def count(self, *kinds: Kind) -> int:
        """Samples of the corpus that match in one of these ways."""
        return len({match.corpus_id for match in self.matches if match.kind in kinds})


class Row(Strict):
    """A check in numbers, each of samples of the corpus.

    Args:
        key: the check itself stands in OUT/analyses/<key>/leakage.json.
        follow_up: of the near-duplicates those that are of the test image's patient.
        leaked: that match in any way.
        known: what the register of overlaps says of the two datasets.
    """

    corpus: Side
    test: Side
    key: str
    patients: Patients
    same_patient: int
    same_pixels: int
    near_duplicate: int
    follow_up: int
    leaked: int
    known: list[str]


class Summary(Strict):
    """OUT/leakage.json. `setting`: what the study does with what matches; `own`: training images of tasks against their test images."""

    schema_: Literal[1] = Field(1, alias="schema")
    setting: Literal["stop", "exclude"]
    checks: list[Row]
    own: list[Row]
