"""Names that identify nobody: sample keys, patient hashes and the secret behind them.

    names = Names.of(card)                       # secret from ALLOGRAFT_SECRET or the file ALLOGRAFT_SECRET_FILE names
    names.key("images/a.png")                    # 20 hex
    names.patient("00000061")                    # 16 hex, equal in every dataset of the card's namespace

A public card uses the constant secret `public`: its names protect nothing, and equal input gives equal shards everywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from base.errors import RequestError
from shards.card import Card, Split

PUBLIC = b"public"
PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 365 / 7, "D": 365}  # units of a DICOM age string (PS3.5, value representation AS)


def keyed(secret: bytes, text: str, digits: int) -> str:
    """The first hex digits of HMAC-SHA256(secret, text)."""
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:digits]


@dataclass(frozen=True)
class Names:
    """Keyed names of one dataset."""

    secret: bytes
    namespace: str

    @classmethod
    def of(cls, card: Card, secret: bytes | None = None) -> Names:
        """The names of that card's dataset. Raises RequestError if the card is not public and there is no secret."""
        return cls(find_secret(card, secret), card.namespace)

    @property
    def fingerprint(self) -> str:
        """12 hex that tell two secrets apart and give neither away."""
        return keyed(self.secret, "allograft fingerprint", 12)

    def key(self, path: str) -> str:
        """20 hex for a file, by its path relative to the raw folder (and frame, if it has several)."""
        return keyed(self.secret, f"file\x1f{path}", 20)

    def patient(self, identity: str) -> str:
        """16 hex for a patient of the card's namespace."""
        return keyed(self.secret, f"patient\x1f{self.namespace}\x1f{identity}", 16)


def find_secret(card: Card, secret: bytes | None = None) -> bytes:
    """The secret to use: the given one, `public` for public cards, the environment's. Raises RequestError where none is."""
    if card.public:
        return PUBLIC
    if secret is None:
        path = os.environ.get("ALLOGRAFT_SECRET_FILE")
        if path is not None:
            try:
                secret = Path(path).read_bytes().strip()
            except OSError as error:
                raise RequestError(f"cannot read the secret: {error.strerror}", where=f"ALLOGRAFT_SECRET_FILE={path}") from None
        else:
            secret = os.environ.get("ALLOGRAFT_SECRET", "").encode()
    if not secret:
        raise RequestError(
            "not a public dataset, and there is no secret to hash its patients with",
            where=f"card {card.dataset}",
            hint="export ALLOGRAFT_SECRET_FILE=FILE, with the same secret for every dataset of the project",
        )
    return secret


def share(patient: str) -> float:
    """Place of a patient hash in [0, 1), for keyed splits: it depends on nothing else, so a growing dataset moves no patient."""
    return int.from_bytes(hashlib.blake2b(f"split\x1f{patient}".encode(), digest_size=8).digest(), "big") / 2**64


def keyed_split(patient: str, val: float, test: float) -> Split:
    """The split of a patient hash where `val` and `test` are shares of the patients."""
    place = share(patient)
    return "test" if place < test else "val" if place < test + val else "train"


def clean_metadata(name: str, value: str | None) -> str | int | None:
    """An allow-listed value as it is kept: text, None for nothing; ages in completed years (of a number, or of one with a unit:
    `034Y`, `018M`, `006W`, `003D`), all above 89 as 90 (HIPAA safe harbour)."""
    text = (value or "").strip()
    if not text:
        return None
    if name == "age":
        match = re.match(r"(\d+)(?:\.\d*)?\s*([YMWD]?)", text, re.IGNORECASE)
        return min(int(int(match.group(1)) / PER_YEAR[match.group(2).upper()]), 90) if match else None
    return text
