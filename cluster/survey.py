"""`allograft survey`: a folder that nobody has described, in tables, and the draft of its card."""

import os
import shlex
from collections import Counter
from pathlib import Path

from base import storage
from base.errors import RequestError
from cluster.screen import Rows, table
from shards.columns import MOST_ROWS, TableFacts
from shards.draft import draft
from shards.headers import DICOM_TAGS
from shards.open_points import OPEN
from shards.splitting import count
from shards.survey import Group, Survey, survey

SHOWN = 4  # values of a tag or column
WIDEST = 40  # characters of a value
SECRET = ("ALLOGRAFT_SECRET_FILE", "ALLOGRAFT_SECRET")


def show(raw: str, out: str | None) -> None:
    """Print what the folder holds, then the draft, or write the draft to a file that is not there yet.

    Raises:
        RequestError: no such folder, no image in it, or the file is there.
    """
    if out is not None and Path(out).exists():
        raise RequestError("this file is there already", where=out, hint="give another --out")
    found = survey(raw)
    print(f"{found.files:,} files, {found.bytes / 1e6:,.0f} MB in {raw}\n")
    table([_group(group) for group in found.groups], ("files", "where", "format", "height x width", "pixels"))
    _section("in the DICOM headers", _tags(found), ("tag", "values"))
    _section("cannot be read", _problems(found), ("files", "reason", "for instance"))
    for facts in found.tables:
        rows = f"the first {MOST_ROWS:,} rows" if facts.rows == MOST_ROWS else f"{facts.rows:,} rows"
        title = f"{facts.file}: {rows}, {facts.images:,} name an image that is there"
        if facts.doubled:
            title += f"; {count(facts.doubled, 'image')} in several rows, which {'agree' if facts.agree else 'differ'}"
        _section(title, _columns(facts), ("column", "filled", "values", "seems to be", "most often"))
    keys = [(key.where, f"{key.patients:,}", f"{key.largest:,}", f"{key.images:,}") for key in found.patients]
    _section("may tell patients apart", keys, ("by", "patients", "images of the largest", "of images"))
    text = draft(found)
    points = text.count(OPEN)
    if out is None:
        print(f"\n{text}")
    else:
        storage.put(str(Path(out).absolute()), text)
        print(f"\ndraft {out}: {points} open points, {text.count('check:')} guesses to check")
        print(f"when they are settled: {shlex.join(['allograft', 'pack', out, raw])} --out SHARDS")
    if not any(os.environ.get(name) for name in SECRET):
        print("\npack hashes the names of patients and files with a secret of yours, the same for every dataset of a project:")
        print(f"head -c 32 /dev/urandom | base64 > FILE; export {SECRET[0]}=FILE")


def _section(title: str, rows: Rows, header: tuple[str, ...]) -> None:
    if rows:
        print(f"\n{title}")
        table(rows, header)


def _group(group: Group) -> tuple[str, ...]:
    return (f"{len(group.files):,}", group.glob, *(_most(group.count(field)) for field in ("format", "size", "pixels")))


def _most(counts: Counter[str]) -> str:
    """The commonest values; how often, where there are several."""
    if len(counts) < 2:
        return "".join(counts)
    shown = ", ".join(f"{value} ({n:,})" for value, n in counts.most_common(SHOWN))
    return f"{shown}, {len(counts) - SHOWN:,} others" if len(counts) > SHOWN else shown


def _tags(found: Survey) -> Rows:
    rows = []
    for name in ("Type", "TransferSyntax", *DICOM_TAGS):
        counts: Counter[str] = sum((group.count(name) for group in found.groups if group.format == "dicom"), Counter())
        if counts:
            rows.append((name, _most(counts)))
    return rows


def _problems(found: Survey) -> Rows:
    broken = [header for group in found.groups for header in group.headers if header.problem]
    example = {header.problem: header.file for header in reversed(broken)}
    counts = Counter(header.problem for header in broken)
    return [(f"{n:,}", reason, example[reason]) for reason, n in counts.most_common(2 * SHOWN)]


def _columns(facts: TableFacts) -> Rows:
    rows = []
    for column in facts.columns:
        # Values that could name a patient or a file stay in the table.
        private = column.role in ("patient", "image", "mask") or column.distinct > column.filled / 2
        most = "" if private else ", ".join(f"{value[:WIDEST]} ({n:,})" for value, n in column.top[:SHOWN])
        role = "" if column.role == "other" else column.role
        rows.append((column.name, f"{column.filled:,}", f"{column.distinct:,}", role, most))
    return rows
