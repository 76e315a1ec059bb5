"""The draft of a card from a survey: a YAML text that loads as a card, with its open points marked.

    text = draft(survey("RAW"))            # write it to a file, settle what says OPEN, then: allograft pack FILE RAW --out SHARDS

What the files prove is stated with its count; what is a guess is marked `check`; what no file can tell says OPEN.
"""

import os
import re
from collections import Counter
from typing import Any

from base import storage
from base.errors import RequestError
from shards.columns import Column, TableFacts
from shards.open_points import OPEN
from shards.rawfiles import opened
from shards.splitting import SPLIT_WORDS, count
from shards.survey import PatientKey, Survey

RULES = 8  # of burned_in are drafted, for the commonest files
LARGE = 1024  # longer sides are reduced when packed: networks see a few hundred pixels
CT_WINDOWS = [[-600, 1500], [40, 400]]  # lung and mediastinum: centre, width in HU
Draft = dict[str, Any]
Remarks = dict[str, str]  # key -> what stands behind it in the YAML


def draft(found: Survey) -> str:
    """The YAML text. Raises RequestError where no file is an image that any reader knows."""
    remarks: Remarks = {}
    card = _card(found, remarks)
    lines = [f"# Drafted from {found.files:,} files. Settle what says OPEN (pack refuses it) and look at what says check."]
    for key, value in card.items():
        if key != "layouts":
            lines.append(_line(key, value, remarks.get(key), ""))
            continue
        lines.append("layouts:")
        for name, inner in value[0].items():
            lines.append(_line(name, inner, remarks.get(f"layout.{name}"), "  - " if name == "name" else "    "))
    return "\n".join(lines) + "\n"


def _line(key: str, value: object, remark: str | None, indent: str) -> str:
    import yaml

    shown = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False).removesuffix("...\n").strip()
    text = f"{indent}{key}: {shown}"
    return f"{text.ljust(40)}  # {remark}" if remark else text


def _card(found: Survey, remarks: Remarks) -> Draft:
    name = re.sub(r"[^a-z0-9]+", "-", os.path.basename(os.path.abspath(found.raw)).lower()).strip("-")[:40] or "dataset"
    table = next((table for table in found.tables if table.images), None)
    layout, labels = _layout(found, table, remarks), _labels(found, table, remarks)
    masks = _masks(found, table, remarks)
    card: Draft = {"schema": 2, "dataset": name, "title": f"{OPEN} what these images are, in a line"}
    remarks["dataset"] = "check: prefixes every sample's key"
    card["reader"] = _reader(found, table, masks)
    named, classes = labels.pop("labels", None), labels.pop("multiclass", False)
    card["kind"] = _kind(bool(masks), bool(named), classes)
    card |= _pixels(found, remarks) | _burned_in(found, remarks)
    if named:
        card["labels"] = named
    if masks:
        card["mask_classes"] = ["mask"]
    card["namespace"] = name
    remarks["namespace"] = "check: datasets with the same patients share it"
    metadata = _metadata(table)
    in_headers = any(header.format == "dicom" for group in found.image_groups() for header in group.headers)
    if not any(key in layout for key in ("split_column", "split_lists", "split_pattern")):
        card["split"] = {"val": 0.1, "test": 0.2}
        remarks["split"] = "shares of the patients, by a keyed hash; check: is there an official split?"
    if metadata or in_headers:
        card["metadata"] = list(metadata) or ["view", "sex", "age"]
        remarks["metadata"] = "check: all that is kept of a sample besides its labels" + ("" if metadata else "; from the DICOM headers")
    if metadata:
        layout["metadata"] = metadata
    card["layouts"] = [layout | labels | masks | _patient(found, table, remarks)]
    card["public"] = False
    remarks["public"] = "names are hashed with the secret in ALLOGRAFT_SECRET_FILE"
    card["licence"] = f"{OPEN} who may do what with these images"
    card["access"] = f"{OPEN} where the raw files are asked for"
    card["citation"] = f"{OPEN} the paper, or none"
    return card


def _burned_in(found: Survey, remarks: Remarks) -> Draft:
    """A rule for each kind and size of DICOM image that may show a name: without one packing leaves all of them out."""
    headers = [header for group in found.image_groups() for header in group.headers if header.format == "dicom" and not header.problem]
    kinds = Counter((*header.suspect, *header.size.split(" x ")[:2]) for header in headers if header.suspect)
    if not kinds:
        return {}
    why = "; ".join(dict.fromkeys(reason for reason, *_ in kinds))
    more = f" and {len(kinds) - RULES:,} kinds more" if len(kinds) > RULES else ""
    remarks["burned_in"] = (
        f"{sum(kinds.values()):,} of {len(headers):,} headers{more}: {why}. Without a rule they are quarantined: look at some, "
        "write into blank what to blacken, [top, left, bottom, right] in pixels, or nothing where clean, and take the word OPEN away"
    )
    rules = [
        {"match": {tag: f"{OPEN} {value}", "Rows": int(rows), "Columns": int(columns)}, "blank": []}
        for (_, tag, value, rows, columns), _ in kinds.most_common(RULES)
    ]
    return {"burned_in": rules}


def _kind(masks: bool, labels: bool, classes: bool) -> str:
    if masks:
        return "mixed" if labels else "segmentation"
    return "multiclass" if classes else "multilabel" if labels else "unlabelled"


def _reader(found: Survey, table: TableFacts | None, masks: Draft) -> str:
    if not found.images:
        return next(group.format for group in found.groups if group.format in ("npz", "tar")).replace("tar", "tars")
    return "csv" if table else "folders" if found.class_folders and not masks else "pairs"


def _layout(found: Survey, table: TableFacts | None, remarks: Remarks) -> Draft:
    """Where the images lie and how they are split."""
    packed = [group for group in found.groups if group.format in ("npz", "tar")]
    groups = found.image_groups() or packed[:1]
    if not groups:
        formats = ", ".join(sorted({group.format for group in found.groups}))
        raise RequestError(f"no image among {found.files:,} files ({formats})", where=found.raw, hint="unpack archives first")
    globs = [group.glob for group in groups]
    layout: Draft = {"name": "official", "requires": [*([table.file] if table else []), *found.lists.values(), globs[0]], "images": globs}
    remarks["layout.images"] = f"{sum(len(group.files) for group in groups):,} files"
    beside = [group for group in groups if found.images and not set(group.files) <= set(found.images)]
    if beside:
        layout["exclude"] = [f"{os.path.dirname(group.glob)}/*mask*".lstrip("/") for group in beside]
        remarks["layout.exclude"] = "check: masks beside their images"
    if table:
        layout |= {"table": table.file, "image_column": table.having("image")[0].name}
        remarks["layout.table"] = f"{table.images:,} of its {table.rows:,} rows name an image that is there"
        if table.separator != ",":
            layout["sep"] = table.separator
    if table and table.doubled:
        remarks["layout.repeated"] = f"{count(table.doubled, 'image')} in several rows, which {'agree' if table.agree else 'differ'}"
        layout["repeated"] = (
            f"{OPEN} majority, if rows agree or are readers' votes (not of one class an image); else keep one row of each, drop this key"
        )
    return layout | _split(found, table, remarks)


def _split(found: Survey, table: TableFacts | None, remarks: Remarks) -> Draft:
    column = next(iter(table.having("split")), None) if table else None
    if column is not None:
        words = [word for word, _ in column.top]
        remarks["layout.split_column"] = ", ".join(f"{word} {n:,}" for word, n in column.top)
        return {"split_column": column.name} | _split_words(words, remarks)
    if table and "test" in found.lists:
        remarks["layout.split_lists"] = "check: by patient?"
        return {"split_lists": found.lists}
    if found.split_folders:
        level = next(i for i, name in enumerate(found.images[0].split("/")) if name in found.split_folders)
        remarks["layout.split_pattern"] = f"folders {', '.join(found.split_folders)}"
        return {"split_pattern": "^" + "[^/]+/" * level + "([^/]+)/"} | _split_words(found.split_folders, remarks)
    return {}


def _split_words(words: list[str], remarks: Remarks) -> Draft:
    """Nothing where all three splits are there; else validation or test is taken from training, or test is what they call validation."""
    known = {word: SPLIT_WORDS[word.lower()] for word in words}
    if set(known.values()) == {"train", "val", "test"}:
        return {}
    remarks["layout.split_words"] = "check: patients of train_val are divided by their hash"
    return {"split_words": {word: "train_val" if split == "train" else "test" for word, split in known.items()}}


def _labels(found: Survey, table: TableFacts | None, remarks: Remarks) -> Draft:
    """`labels`, whether they are classes, and the layout's keys that read them; nothing for images without labels."""
    if not found.images:
        return _packed_labels(found, remarks)
    if table is None:
        if not found.class_folders:
            return {}
        remarks["labels"] = "check: names of the folders"
        return {"labels": found.class_folders, "multiclass": True}
    columns = table.having("label")
    if columns:
        remarks["labels"] = f"check: columns of {table.file} that hold 1 and 0" + (", one 1 a row" if table.one_of else "")
        return {
            "labels": [column.name for column in columns],
            "multiclass": table.one_of,
            "label_columns": {column.name: column.name for column in columns},
        }
    if table.having("findings"):
        return _findings(table.having("findings")[0], remarks)
    if table.having("class"):
        return _classes(min(table.having("class"), key=lambda column: column.distinct), remarks)
    return {}


def _packed_labels(found: Survey, remarks: Remarks) -> Draft:
    """Of .npz files by their label arrays: (N, L) are L labels, (N, 1) and (N,) the number of a class. Of tars: what they name."""
    import numpy as np

    for header in (header for group in found.groups for header in group.headers if header.format == "npz"):
        shape = next((shape for name, shape in header.tags.items() if name.endswith("train_labels")), None)
        if shape is None:
            continue
        remarks["labels"] = f"check: names; {header.file} holds numbers"
        columns = int(shape.split(" x ")[1]) if " x " in shape else 1
        if columns > 1:
            return {"labels": [f"label-{n}" for n in range(columns)], "multiclass": False}
        with opened(storage.join(found.raw, header.file)) as stream, np.load(stream, allow_pickle=False) as arrays:
            classes = int(arrays["train_labels"].max()) + 1
        return {"labels": [f"class-{n}" for n in range(classes)], "multiclass": True}
    remarks["labels"] = "check: the classes that the files name"
    return {"labels": "found", "multiclass": True}


def _findings(column: Column, remarks: Remarks) -> Draft:
    nothing = [word for word in column.words if re.fullmatch(r"no[ _-]?(findings?|abnormality)|normal|none|healthy", word, re.IGNORECASE)]
    remarks["labels"] = f"check: names joined by '{column.separator}' in the column {column.name}{_slips(column)}"
    keys: Draft = {"labels": [word for word in column.words if word not in nothing], "findings_column": column.name}
    keys |= {"separator": column.separator} if column.separator != "|" else {}
    return keys | ({"no_finding": nothing} if nothing else {})


def _classes(column: Column, remarks: Remarks) -> Draft:
    remarks["labels"] = f"check: values of the column {column.name}{_slips(column)}"
    if not all(word.isdigit() for word in column.words):
        return {"labels": list(column.words), "multiclass": True, "findings_column": column.name}
    names = {word: f"{re.sub(r'[^a-z0-9]+', '-', column.name.lower())}-{word}" for word in column.words}
    remarks["layout.values"] = "check: give the numbers their names"
    return {"labels": list(names.values()), "multiclass": True, "findings_column": column.name, "values": names}


def _slips(column: Column) -> str:
    return "".join(f"; '{word}' 1 row: did you mean '{near}'?" for word, near in column.slips)


def _masks(found: Survey, table: TableFacts | None, remarks: Remarks) -> Draft:
    column = next(iter(table.having("mask")), None) if table else None
    if column is not None:
        remarks["mask_classes"] = "check: what the mask outlines"
        return {"mask_column": column.name}
    if not found.masks:
        return {}
    remarks["mask_classes"] = "check: what the masks outline; several classes: see docs/datasets.md"
    some = max(found.masks.values()) < len(found.images)
    remarks["layout.masks"] = "check: united; found for " + ", ".join(f"{n:,}" for n in found.masks.values()) + " images"
    return {"masks": list(found.masks)} | ({"mask_optional": True} if some else {})


def _metadata(table: TableFacts | None) -> dict[str, str]:
    roles = ("view", "sex", "age")
    return {role: table.having(role)[0].name for role in roles if table.having(role)} if table else {}  # type: ignore[arg-type]


def _patient(found: Survey, table: TableFacts | None, remarks: Remarks) -> Draft:
    if not found.images:
        return {}  # arrays and tars name no patient: each image counts as one
    usable = [key for key in found.patients if key.kind != "column" or (table and key.where.endswith(f" of {table.file}"))]
    if not usable:
        return {"patient_pattern": f"({OPEN} group 1 catches the patient in the path)"}
    best: PatientKey = usable[0]
    key = {"column": "patient_column", "tag": "patient_tag", "path": "patient_pattern"}[best.kind]
    remarks[f"layout.{key}"] = f"check: {best.patients:,} patients, at most {best.largest:,} images each; {best.where}"
    return {key: best.key}


def _pixels(found: Survey, remarks: Remarks) -> Draft:
    """Channels, depth and size, by the headers."""
    headers = [header for group in found.image_groups() for header in group.headers if header.size]
    colour = [header for header in headers if re.search(r"RGB|YBR|palette|PALETTE", header.pixels)]
    volumes = [header for header in headers if header.format == "nifti"]
    ct = [header for header in headers if header.tags.get("Modality") == "CT"]
    arrays = [shape for group in found.groups for header in group.headers for name, shape in header.tags.items() if name == "train_images"]
    if not found.images and arrays:
        shape = [int(n) for n in arrays[0].split(" x ")[1:]]
        if len(shape) == 3 and shape[2] not in (1, 3):
            remarks["slab"] = "slices of a volume"
            return {"channels": shape[0], "depth": 16, "frames": "slab", "slab": shape[0]}
        return {"channels": 3 if len(shape) == 3 and shape[2] == 3 else 1}
    keys: Draft = {"channels": 3 if len(colour) > len(headers) / 2 else 1}
    remarks["channels"] = (
        f"check: {len(colour):,} of {len(headers):,} headers say colour (grey images are often stored so)" if colour else ""
    )
    if len(volumes) + len(ct) > len(headers) / 2:
        keys = {"channels": len(CT_WINDOWS), "depth": 16, "windows": CT_WINDOWS} | ({"frames": "each"} if volumes else {})
        remarks["windows"] = "check: [centre, width] of each channel; these are lung and mediastinum in CT"
    elif deep := sum("16 bits" in header.pixels for header in headers):
        keys["depth"] = 8
        remarks["depth"] = f"check: {deep:,} of {len(headers):,} headers say 16 bits; depth 16 keeps them"
    sides = [max(int(n) for n in re.findall(r"\d+", header.size)[:2]) for header in headers]
    if sides and sorted(sides)[len(sides) // 2] > LARGE:
        keys["max_side"] = LARGE
        remarks["max_side"] = f"check: half of the images measure {sorted(sides)[len(sides) // 2]:,} pixels or more"
    return keys
