"""Who goes into which split: by official lists, by files of the user's own, or by a word in a column or path.

mine = SplitFiles.read("lists/")                 # train.txt, val.txt, test.txt; or a CSV with the columns image and split
mine.find("images/a.png", "a.png"), mine.rule    # "train", and what the manifest says of them
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from base import storage
from base.config import digest
from base.errors import RequestError
from shards.card import SPLITS, Card, Layout, Part, Split
from shards.rawfiles import files, stem
from shards.tables import Table

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
OWN = "split files of the user's own"  # how the rule of such a split begins
SHOWN = 5  # of the offenders an error lists


def count(n: int, one: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{n:,} {one}" + ("" if n == 1 else "s")


def some(items: Iterable[str]) -> str:
    """The first few of those names, and how many more there are."""
    listed = sorted(set(items))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def part_of(layout: Layout, text: str, where: str) -> Part:
    """The split that a word of a column or a path means. Raises RequestError for another word."""
    part = layout.split_words.get(text) or SPLIT_WORDS.get(text.lower())
    if part is None:
        raise RequestError(f"'{text}' is not a split: {', '.join(layout.split_words) or 'train, val or test'}", where=where)
    return part


def official(layout: Layout, raw: str) -> dict[str, Part]:
    """The part of each name in the official lists. Raises RequestError for a missing or empty list, or a name in two."""
    of_name: dict[str, Part] = {}
    twice = []
    for part, pattern in layout.split_lists.items():
        for name in _lines(storage.join(raw, _only(raw, pattern))):
            name = os.path.basename(name) if layout.split_lists_by == "image" else name
            if of_name.setdefault(name, part) != part:
                twice.append(name)
    if twice:
        raise RequestError(f"{len(twice)} {layout.split_lists_by}s are in two of the official lists: {some(twice)}", where=raw)
    return of_name


def _only(raw: str, pattern: str) -> str:
    found = files(raw, [pattern])
    if not found:
        raise RequestError("this official list is not there", where=storage.join(raw, pattern))
    return min(found)


def _lines(url: str) -> list[str]:
    try:
        names = [line.strip() for line in storage.read_bytes(url).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 at byte {error.start}", where=url) from None
    names = [name for name in names if name]
    if not names:
        raise RequestError("the list is empty", where=url)
    return names


@dataclass
class SplitFiles:
    """Lists of the user's own, which replace the card's rule: images that none of them names are left out, and counted."""

    url: str
    of_name: dict[str, Split]
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, url: str) -> SplitFiles:
        """A folder with train.txt, val.txt, test.txt (one image a line), or a CSV with the columns image and split.

        Raises:
            RequestError: nothing there, an empty list, a word that is no split, an image in two splits.
        """
        if not storage.exists(url):
            raise RequestError("no such split files", where=url, hint="a folder with train.txt, val.txt, test.txt, or a CSV image,split")
        pairs: list[tuple[str, Split]] = []
        if url.endswith((".csv", ".csv.gz")):
            table = Table.read(url, ["image", "split"])
            for row in table:
                word = SPLIT_WORDS.get(row["split"].lower())
                if word is None:
                    raise RequestError(f"'{row['split']}' is not a split: train, val or test", where=table.place(row))
                pairs.append((row["image"], word))
        else:
            there = set(storage.listing(url))
            missing = [f"{split}.txt" for split in ("train", "test") if f"{split}.txt" not in there]
            if missing:
                raise RequestError(f"{' and '.join(missing)} not there", where=url)
            lists = [split for split in SPLITS if f"{split}.txt" in there]
            pairs = [(name, split) for split in lists for name in _lines(storage.join(url, f"{split}.txt"))]  # type: ignore[misc]
        of_name: dict[str, Split] = {}
        twice = [name for name, split in pairs if of_name.setdefault(name, split) != split]
        if twice:
            raise RequestError(f"{count(len(twice), 'image')} in two splits: {some(twice)}", where=url)
        return cls(url, of_name)

    @property
    def rule(self) -> str:
        """What the manifest says: never where the files lie, which may be anywhere."""
        listed = list(self.of_name.values())
        counts = ", ".join(f"{split} {listed.count(split)}" for split in SPLITS if split in listed)
        return f"{OWN} ({counts}; {digest(self.of_name)[:12]})"

    def find(self, file: str, said: str) -> Split | None:
        """The split of an image, listed by its path, by what the table calls it, or by its name; None where it is not listed."""
        for name in (file, said, os.path.basename(file), stem(file)):
            if name in self.of_name:
                self.used.add(name)
                return self.of_name[name]
        return None

    def check(self) -> None:
        """Raises RequestError if an image that the files list was not found: they are of another release, or misspelled."""
        absent = self.of_name.keys() - self.used
        if absent:
            raise RequestError(f"{len(absent)} of the {len(self.of_name)} listed images are not there: {some(absent)}", where=self.url)


def rule_of(card: Card, layout: Layout | None, mine: SplitFiles | None, counts: Mapping[Split, int]) -> str:
    """How the images were split, in words: what the manifest and the report say, and whether it is the split of the card's benchmark."""
    by_hash = f"keyed hash of the patient: val {card.split.val:g}, test {card.split.test:g}"
    rule = mine.rule if mine else (layout.split_rule if layout else None) or by_hash
    if not mine and layout and layout.split_rule and "train_val" in layout.parts and card.split.val:
        rule += f"; validation from the training patients by keyed hash, {card.split.val / (1 - card.split.test):.3g}"
    if card.benchmark is not None:
        wanted = dict(card.benchmark.counts)
        same = all(counts.get(split) == n for split, n in wanted.items())
        stated = f"{card.benchmark.name}: {'/'.join(str(n) for n in wanted.values())}"
        rule += f"; {'the counts of' if same else 'not'} the benchmark's split ({stated})"
    return rule
