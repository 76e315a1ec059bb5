"""Every card and every layout: a miniature of the release is packed, and labels, patients, splits and masks come out as written."""

import csv
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import miniature_chest
import miniature_other
import miniatures
import numpy as np
import pytest
from miniatures import BUILDERS, Truths
from PIL import Image

from base.config import parse
from base.paths import ROOT, names
from shards import overlaps
from shards.card import Card, Layout, SplitRule, load_card
from shards.deidentify import Names
from shards.deidentify import keyed as keyed_by
from shards.pack import pack, plan

CARDS = {name: load_card(name) for name in names("card")}
LAYOUTS = [(name, layout.name) for name, card in CARDS.items() for layout in card.layouts]
PAGE = ROOT / "docs" / "datasets.md"
SECRET = b"a secret of the tests"


def build(card: Card, layout: Layout, folder: Path) -> Truths:
    if card.reader == "npz":
        return miniature_other.medmnist(folder, layout.name, card.dataset, card.labels)
    return BUILDERS[card.dataset, layout.name](folder)


def wide(card: Card) -> Card:
    """The card with shares of validation and test that are found among the few patients of a miniature too."""
    if card.dataset in ("drive", "chase-db1"):
        return card  # so small that the miniature holds every patient of the release
    rule = SplitRule(val=0.25, test=0.25 if card.split.test else 0)
    return card.model_copy(update={"split": rule})


def packed(out: Path) -> dict[str, dict[str, Any]]:
    """Each sample of the shards: its JSON, and its mask as u8 HW under "mask"."""
    samples: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, field = member.name.partition(".")
                stream = tar.extractfile(member)
                assert stream is not None
                data = stream.read()
                if field == "json":
                    samples[key] |= json.loads(data)
                elif field == "seg.png":
                    samples[key]["mask"] = np.asarray(Image.open(io.BytesIO(data)))
                else:
                    samples[key]["image"] = field
    return samples


@pytest.mark.parametrize(("name", "layout_name"), LAYOUTS, ids=["/".join(pair) for pair in LAYOUTS])
def test_a_miniature_of_every_layout_is_packed_as_it_was_written(name: str, layout_name: str, tmp_path: Path) -> None:
    card = wide(CARDS[name])
    layout = next(layout for layout in card.layouts if layout.name == layout_name)
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    truths = build(card, layout, raw)
    jobs = plan(card, str(raw), SECRET)
    assert {job.origin.layout for job in jobs} == {layout_name}
    manifest = pack(card, str(raw), str(out), secret=SECRET)
    assert manifest.quarantined == 0, (out / "quarantine.jsonl").read_text()
    samples = packed(out)
    assert len(samples) == len(truths)
    groups: dict[str, set[str]] = defaultdict(set)
    keyed = Names.of(card, SECRET)
    for file, truth in truths.items():
        name, _, frame = file.partition("#")
        key = keyed_by(keyed.key(name).encode(), f"frame\x1f{frame}", 20) if frame else keyed.key(name)
        sample = samples[f"{card.dataset}-{key}"]
        assert {label: value for label, value in sample["labels"].items() if value != 0} == {
            label: value for label, value in truth.labels.items() if value != 0
        }
        assert sample["split"] in ([truth.split] if truth.split else ["train", "val"] if _has_test(truths) else ["train", "val", "test"])
        if truth.mask is not None:
            assert np.array_equal(sample["mask"], truth.mask)
        assert ("mask" in sample) == card.has_masks
        groups[truth.patient].add(sample["patient"])
    assert all(len(hashes) == 1 for hashes in groups.values())
    assert len({next(iter(hashes)) for hashes in groups.values()}) == len(groups)
    assert set(manifest.counts) == {"train", "val", "test"}


def _has_test(truths: Truths) -> bool:
    return any(truth.split == "test" for truth in truths.values())


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_complete(name: str) -> None:
    card = CARDS[name]
    assert card.dataset == name
    assert all((card.title, card.licence, card.access, card.citation))
    if card.phantom:
        return
    assert len({layout.name for layout in card.layouts}) == len(card.layouts)
    assert card.layouts[0].of is None, "the official layout comes first, and is whole"
    for layout in card.layouts:
        parts = [n for part, n in layout.counts.items() if part != "total"]
        assert not parts or sum(parts) == layout.counts.get("total", sum(parts))
    if card.reader == "npz":
        channels, count = (miniature_other.MEDMNIST | miniature_other.VOLUMES)[name]
        assert (card.channels, len(card.labels)) == (channels, abs(count))


def test_the_miniatures_are_those_of_the_cards() -> None:
    assert set(BUILDERS) == {(name, layout) for name, layout in LAYOUTS if CARDS[name].reader != "npz"}


def test_official_label_orders() -> None:
    assert CARDS["chexpert"].labels == miniature_chest.CHEXPERT
    assert CARDS["mimic-cxr"].labels == sorted(miniature_chest.CHEXPERT)
    assert CARDS["vindr-cxr"].labels == miniature_chest.VINDR
    assert CARDS["rsna-pe"].labels == miniature_chest.RSNA_PE
    assert [len(CARDS["chexpert"].views[view]) for view in ("evaluation", "low-level", "high-level")] == [5, 7, 7]
    assert len(CARDS["imagenet-1k"].labels) == 1000
    assert CARDS["imagenet-1k"].labels == sorted(CARDS["imagenet-1k"].labels)


def test_the_register_of_overlaps_names_cards() -> None:
    named = {name for overlap in overlaps.known() for name in overlap.datasets}
    assert {"nih-cxr14", "siim-acr", "chestmnist", "ham10000", "dermamnist"} <= named & set(CARDS)
    assert all(not (set(overlap.datasets) - set(CARDS)) or overlap.source for overlap in overlaps.known())
    pairs = [frozenset(overlap.datasets) for overlap in overlaps.known()]
    assert len(set(pairs)) == len(pairs)


def test_the_page_lists_every_card() -> None:
    """ALLOGRAFT_UPDATE_GOLDEN=1 rewrites the table."""
    text = PAGE.read_text()
    head = text.index("| card |")
    end = text.index("\n\n", head)
    if os.environ.get("ALLOGRAFT_UPDATE_GOLDEN"):
        PAGE.write_text(text[:head] + _table() + text[end:])
        return
    assert text[head:end] == _table()


def _table() -> str:
    rows = ["| card | what | images | labels | split | layouts |", "|---|---|---|---|---|---|"]
    for name, card in CARDS.items():
        if card.phantom:
            continue
        official = card.layouts[0]
        images = official.counts.get("total") or sum(official.counts.values())
        labels = ["classes found"] if card.labels_found else [f"{n} label{'s' * (n > 1)}" for n in (len(card.labels),) if n]
        marks = ", ".join([*labels, *(["masks"] if card.has_masks else [])])
        split = "official" if official.split_rule or card.reader == "npz" else "by patient"
        cells = [
            f"`{name}`",
            card.title,
            f"{images:,}" if images else "not fixed",
            marks,
            split,
            ", ".join(layout.name for layout in card.layouts),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_card_on_the_page_is_ten_lines_and_packs(tmp_path: Path) -> None:
    import yaml

    page = PAGE.read_text()
    text = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0]
    assert len(text.splitlines()) == 10
    table = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)[0]
    rows = list(csv.DictReader(io.StringIO(table)))
    raw = tmp_path / "raw"
    many = [
        {"image": f"{k}-{row['image']}", "patient": f"{k}-{row['patient']}", "effusion": row["effusion"]} for k in range(12) for row in rows
    ]
    for k, row in enumerate(many):
        miniatures.image(raw, f"images/{row['image']}", k)
    miniatures.table(raw, "labels.csv", many)
    card = parse(yaml.safe_load(text), Card, str(PAGE))
    manifest = pack(card, str(raw), str(tmp_path / "out"), secret=SECRET)
    assert sum(manifest.counts.values()) == len(many)
    assert manifest.quarantined == 0
    values = [row["effusion"] for row in many]
    assert sum(counts["effusion"] for counts in manifest.positives.values()) == values.count("1")
