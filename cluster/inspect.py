"""`allograft inspect`: what a packed dataset holds, in words, and a contact sheet of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base import storage
from cluster.screen import Rows, table
from shards.card import SPLITS
from shards.copies import count as count_copies
from shards.manifest import Manifest, read
from shards.pack import QUARANTINE, by_reason
from shards.splitting import OWN, count

LABELS = 40  # labels whose counts are printed
REASONS = 6  # kinds of reasons that are listed; the file has them all
NAMED = 5  # samples of a kind that are named


def show(url: str, sheet: str | None, seed: int) -> None:
    """Print the manifest at `url` and write the sheet to a local file (default: `<dataset>-sheet.png`, here).

    Raises:
        RequestError: nothing is packed there.
        WorkError: a shard is missing or damaged.
    """
    found = read(url)
    table(_facts(found, url))
    print()
    table(*_splits(found))
    if found.card.labels:
        print()
        table(*_labels(found))
    told = [line for line in (left_out(found), copies(url, found)) if line]
    if told:
        print("", *told, sep="\n")
    lines = quarantine_lines(url)
    for line in lines:
        print(line)
    if lines and not found.card.public:
        print("  (names of private files are not kept: pack again with this raw folder to see the names)")
    from analysis import contact

    place = Path(sheet or f"{found.dataset}-sheet.png").absolute()
    title = f"{found.dataset}: {found.card.title}; digest {found.digest[:16]}, seed {seed}"
    storage.put(str(place), contact.sheet(contact.draw(url, seed), title, found.card.mask_classes))
    print(f"\ncontact sheet {place}")


def _facts(found: Manifest, url: str) -> list[tuple[str, str]]:
    card = found.card
    counted = f"{sum(found.counts.values()):,} images"
    counted += f", a subset of {found.of:,}" if found.of else ""
    labels = f"{len(card.labels)} labels" if card.labels else "no labels"
    stored = f"{card.channels} channels of {card.depth} bits" + (f", at most {card.max_side} px" if card.max_side else "")
    stored += f", windows {', '.join(f'{centre:g}/{width:g}' for centre, width in card.windows)}" if card.windows else ""
    return [
        ("dataset", f"{found.dataset}: {card.title}"),
        ("at", url),
        ("digest", found.digest),
        ("layout", f"{found.layout}: {counted}"),
        ("kind", f"{card.kind}, {labels}" + (f", masks of {', '.join(card.mask_classes)}" if card.has_masks else "")),
        ("stored", stored),
        ("split by", found.split_rule),
        ("licence", card.licence),
        ("names", "public" if card.public else f"keyed with the secret {found.secret_fingerprint}"),
    ]


def _splits(found: Manifest) -> tuple[Rows, Sequence[str]]:
    """A row a split, and one for all where the card expects a total."""
    rows = []
    for split in (split for split in SPLITS if split in found.counts):
        shards = found.splits([split])
        size = f"{sum(shard.bytes for shard in shards) / 1e6:,.1f}"
        rows.append((split, found.counts[split], found.expected.get(split), found.patients[split], len(shards), size))
    if "total" in found.expected:
        size = f"{sum(shard.bytes for shard in found.shards) / 1e6:,.1f}"
        rows.append(("total", sum(found.counts.values()), found.expected["total"], sum(found.patients.values()), len(found.shards), size))
    shown = [(split, f"{n:,}", _against(n, expected), f"{people:,}", str(m), size) for split, n, expected, people, m, size in rows]
    return shown, ("split", "images", "expected", "patients", "shards", "MB")


def _against(n: int, expected: int | None) -> str:
    return "" if expected is None else f"{expected:,}" if expected == n else f"{expected:,} ({n - expected:+,})"


def _labels(found: Manifest) -> tuple[Rows, Sequence[str]]:
    """Samples whose value is 1, a label and split, with their share of the split."""
    splits = [split for split in SPLITS if split in found.counts]
    rows = []
    for label in found.card.labels[:LABELS]:
        positives = [(found.positives[split][label], found.counts[split]) for split in splits]
        rows.append((label, *(f"{n:,} ({n / total:.1%})" for n, total in positives)))
    if len(found.card.labels) > LABELS:
        rows.append((f"and {len(found.card.labels) - LABELS:,} others", *("" for _ in splits)))
    return rows, ("positive", *splits)


def left_out(found: Manifest) -> str:
    """How many images the plan left out, and why; nothing where it took all."""
    if not found.left_out:
        return ""
    layout = found.card.layouts[0]
    rules = [
        "no row of the table names them" if layout.has_table else "",
        "the card's `keep` drops their rows" if layout.keep else "",
        "the split files do not name them" if found.split_rule.startswith(OWN) else "",
    ]
    why = " or ".join(rule for rule in rules if rule)
    return f"{count(found.left_out, 'image')} left out: {why or 'by a rule of the card'}"


def copies(url: str, found: Manifest) -> str:
    """How many packed images are exact copies of others; nothing where none is. Raises WorkError where an index is missing or damaged."""
    of = count_copies(url, found)
    across = f", {of.across:,} across patients (one person under two names, or a wrong patient key)" if of.across else ""
    what = "is an exact copy of another" if of.images == 1 else "are exact copies of others"
    return f"{of.images:,} of {count(sum(found.counts.values()), 'image')} {what}{across}" if of.images else ""


def quarantine_lines(url: str, files: Mapping[str, str] | None = None) -> list[str]:
    """What was left out of the shards at `url` and why, a line a kind of reason, the commonest first; nothing where all was packed.

    files: the raw files of those keys, for whoever packs and has them; the file of reasons names those of public datasets only.
    """
    where = storage.join(url, QUARANTINE)
    rows: list[dict[str, Any]] = [json.loads(line) for line in storage.read_bytes(where).splitlines()] if storage.exists(where) else []
    kinds = by_reason([row["reason"] for row in rows])
    lines = [f"{len(rows):,} quarantined, each with its reason: {where}"] if rows else []
    for reason, held in list(kinds.items())[:REASONS]:
        of_kind = [rows[i] for i in held[:NAMED]]
        names = [row.get("file") or (files or {}).get(row["key"], row["key"]) for row in of_kind]
        more = f" and {len(held) - NAMED:,} more" if len(held) > NAMED else ""
        lines.append(f"  {len(held):,} x {reason}: {', '.join(names)}{more}")
    if len(kinds) > REASONS:
        lines.append(f"  and {len(kinds) - REASONS} other reasons")
    return lines
