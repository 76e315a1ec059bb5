"""Names that identify nobody: sample keys, patient hashes and the secret behind them; and what of a header may be kept at all.

    names = Names.of(card)                       # secret from ALLOGRAFT_SECRET or the file ALLOGRAFT_SECRET_FILE names
    names.key("images/a.png")                    # 20 hex
    names.patient("00000061")                    # 16 hex, equal in every dataset of the card's namespace

Of a DICOM header only the values of VALUES are kept, and only as one of those words: a name that stands in the wrong field is not one.
A public card uses the constant secret `public`: its names protect nothing, and equal input gives equal shards everywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import RequestError
from shards.card import BurnedIn, Card, Split
from shards.planes import Unusable

PUBLIC = b"public"
LEAST_SECRET = 16  # bytes
FINGERPRINT = "allograft fingerprint"  # what is hashed to tell secrets apart
PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 365 / 7, "D": 365}  # units of a DICOM age string (PS3.5, value representation AS)

DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}|(?:19|20)\d{6}(?:\d{6}(?:\.\d*)?)?")
Rectangle = tuple[int, int, int, int]  # top, left, bottom, right in pixels, ends excluded

# Name in a card's metadata -> attribute of the DICOM header and the words it may hold (PS3.3; body parts: PS3.16 annex L, the usual ones).
VALUES: dict[str, tuple[str, str]] = {
    "modality": ("Modality", "CR CT DX ES GM IO MG MR NM OP OPT OT PT PX RF RG SC SM US XA XC"),
    "view": ("ViewPosition", "AP PA LL RL LATERAL LAT RLD LLD RLO LLO CC MLO ML LM XCCL XCCM FB SIO"),
    "sex": ("PatientSex", "F M O"),
    "laterality": ("ImageLaterality", "L R U B"),
    "body_part": (
        "BodyPartExamined",
        "ABDOMEN ANKLE ARM BRAIN BREAST CHEST CSPINE ELBOW EXTREMITY EYE FOOT HAND HEAD HEART HIP KNEE LEG LIVER LSPINE LUNG NECK PELVIS"
        " PROSTATE SHOULDER SKIN SKULL SPINE TSPINE WHOLEBODY WRIST",
    ),
}
ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6")  # SOP classes and their parts, retired ones too
SECONDARY_CAPTURE = ("1.2.840.10008.5.1.4.1.1.7",)


def keyed(secret: bytes, text: str, digits: int) -> str:
    """The first hex digits of HMAC-SHA256(secret, text)."""
    try:
        return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:digits]
    except UnicodeEncodeError:
        raise RequestError("a name that is not UTF-8", where=ascii(text.rpartition("\x1f")[2]), hint="rename the file") from None


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
        return keyed(self.secret, FINGERPRINT, 12)

    def key(self, path: str) -> str:
        """20 hex for a file, by its path relative to the raw folder (and frame, if it has several)."""
        return keyed(self.secret, f"file\x1f{path}", 20)

    def patient(self, identity: str) -> str:
        """16 hex for a patient of the card's namespace."""
        return keyed(self.secret, f"patient\x1f{self.namespace}\x1f{identity}", 16)


def find_secret(card: Card, secret: bytes | None = None) -> bytes:
    """The secret to use: the given one, `public` for public cards, the environment's.

    Raises:
        RequestError: there is none, or one that could be guessed from its fingerprint, which every manifest carries.
    """
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
            hint="head -c 32 /dev/urandom | base64 > FILE; export ALLOGRAFT_SECRET_FILE=FILE; the same for every dataset of the project",
        )
    if len(secret) < LEAST_SECRET:
        raise RequestError(
            f"the secret has {len(secret)} bytes; one under {LEAST_SECRET} can be guessed, and every patient with it",
            where=f"card {card.dataset}",
            hint="head -c 32 /dev/urandom | base64 > FILE; export ALLOGRAFT_SECRET_FILE=FILE",
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
    `034Y`, `018M`, `006W`, `003D`), all above 89 as 90 (HIPAA safe harbour). A date is nothing."""
    text = (value or "").strip()
    if not text or DATE.fullmatch(text.split("T")[0].split(" ")[0]):
        return None
    if name == "age":
        match = re.match(r"(\d+)(?:\.\d*)?\s*([YMWD]?)", text, re.IGNORECASE)
        return min(int(int(match.group(1)) / PER_YEAR[match.group(2).upper()]), 90) if match else None
    return text


def header_values(header: Any) -> dict[str, str]:
    """What of a DICOM header may be kept, by metadata name; values of no list are left out. `age` is as clean_metadata takes it."""
    found = {name: str(header.get(attribute) or "").strip().upper() for name, (attribute, _) in VALUES.items()}
    kept = {name: word for name, word in found.items() if word in VALUES[name][1].split()}
    age = str(header.get("PatientAge") or "").strip()
    return kept | ({"age": age} if re.fullmatch(r"\d{3}[YMWD]", age) else {})


def blanked(header: Any, rules: Sequence[BurnedIn]) -> list[Rectangle]:
    """The rectangles to blank in an image with that DICOM header: of the first rule that matches, else none.

    Raises:
        Unusable: text may be burned into the pixels, and no rule says where.
    """
    rule = next((rule for rule in rules if _matches(header, rule.match)), None)
    found = suspect(header)
    if found is not None and not (rule and (rule.blank or found[1] != "BurnedInAnnotation")):
        says = "blanks it" if found[1] == "BurnedInAnnotation" else "says where"
        raise Unusable(f"{found[0]}, and no rule of the card's burned_in {says}")
    return list(rule.blank) if rule else []


def suspect(header: Any) -> tuple[str, str, str] | None:
    """Why text may be burned into an image with that DICOM header, and the tag and value that tell it; None where none is expected."""
    sop_class, says = str(header.get("SOPClassUID") or ""), str(header.get("BurnedInAnnotation") or "").strip().upper()
    if says == "YES":
        return "text is burned into the pixels", "BurnedInAnnotation", str(header.get("BurnedInAnnotation")).strip()
    if any(sop_class == uid or sop_class.startswith(f"{uid}.") for uid in ULTRASOUND):
        return "ultrasound may show the patient's name", "SOPClassUID", sop_class
    if header.get("Modality") == "US":
        return "ultrasound may show the patient's name", "Modality", "US"
    if says == "NO":
        return None
    if any(sop_class == uid or sop_class.startswith(f"{uid}.") for uid in SECONDARY_CAPTURE):
        return "a secondary capture may show the patient's name", "SOPClassUID", sop_class
    return ("a secondary capture may show the patient's name", "Modality", "SC") if header.get("Modality") == "SC" else None


def _matches(header: Any, match: Mapping[str, str | int]) -> bool:
    return all(str(header.get(name)).strip() == str(value) for name, value in match.items())


def may_show_a_face(header: Any) -> bool:
    """Whether slices of a head are left as they are (code 113102 of PS3.16 CID 7050 would say they are not)."""
    return header.get("Modality") in ("CT", "MR", "PT") and str(header.get("BodyPartExamined") or "").upper() in ("HEAD", "BRAIN", "SKULL")
