"""Cards: what a dataset is, where its files lie, what may be kept of them.

    card = load_card("nih-cxr14")              # datasets/nih-cxr14.yaml, or a path to a YAML file
    card.labels, card.layouts[0].table, card.split.val

A card holds several layouts of the raw files, the official one first. `shards.readers` takes the first layout whose `requires`
globs all match; everything a layout says is about names of files and columns, nothing about pixels.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from base.config import Strict, load
from base.paths import named

SPLITS: tuple[str, ...] = ("train", "val", "test")
Split = Literal["train", "val", "test"]


class SplitRule(Strict):
    """Shares of the patients for validation and test where no official split exists; the rest trains.

    Where official lists join training and validation (`train_val`), the share of validation inside them is val / (1 - test).
    """

    val: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitRule:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on")
        return self


class PhantomSpec(Strict):
    """Which generator of `shards.phantoms` and the side of its images in pixels (raw `phantom:N@SEED/SIZE` overrides the size)."""

    generator: Literal["chest", "fundus"]
    size: int = Field(64, ge=32, le=1024)


class Layout(Strict):
    """One arrangement of the raw files.

    With `table`, each row of that CSV is a sample; without, each file that matches `images`. The image of a row is found by its
    relative path or, failing that, by its base name among the files that match `images`.
    """

    name: str
    requires: list[str] = Field(min_length=1)  # globs, all must match: how the layout is recognised
    images: list[str] = Field(min_length=1)  # globs of image files
    table: str | None = None  # CSV, relative to the raw folder
    image_column: str | None = None
    masks: list[str] = Field(default_factory=list)  # templates with {stem}; several are merged by union
    mask_column: str | None = None
    findings_column: str | None = None  # names of labels, joined by `separator`
    separator: str = "|"
    no_finding: list[str] = Field(default_factory=list)  # values of the findings column that mean "none of the labels"
    label_columns: dict[str, str] = Field(default_factory=dict)  # label -> column holding 1, 0, -1 (uncertain) or nothing (unknown)
    label_pattern: str | None = None  # regular expression over the file's stem; a group per label catches 1 or 0
    patient_column: str | None = None
    patient_pattern: str | None = None  # group 1 is the patient: of the column's value, or of the stem without a column
    split_column: str | None = None
    split_lists: dict[Literal["train", "val", "test", "train_val"], str] = Field(default_factory=dict)  # text files, one image name a line
    metadata: dict[str, str] = Field(default_factory=dict)  # name in the card's allow-list -> column
    counts: dict[Literal["train", "val", "test", "train_val", "total"], int] = Field(default_factory=dict)  # images expected
    of: int | None = None  # a subset: how many images the whole dataset has

    @model_validator(mode="after")
    def _is_consistent(self) -> Layout:
        columns = (self.image_column, self.mask_column, self.findings_column, self.patient_column, self.split_column)
        needs_table = any(columns) or bool(self.label_columns) or bool(self.metadata)
        if needs_table and self.table is None:
            raise ValueError(f"layout {self.name}: columns are named, but no table")
        if self.table is not None and self.image_column is None:
            raise ValueError(f"layout {self.name}: a table needs image_column")
        for field in ("label_pattern", "patient_pattern"):
            pattern = getattr(self, field)
            if pattern is not None:
                try:
                    groups = re.compile(pattern).groups
                except re.error as error:
                    raise ValueError(f"layout {self.name}: {field} is not a regular expression: {error}") from None
                if groups < 1:
                    raise ValueError(f"layout {self.name}: {field} needs a group")
        for template in self.masks:
            if "{stem}" not in template:
                raise ValueError(f"layout {self.name}: mask template {template!r} needs {{stem}}")
        return self


class Card(Strict):
    """One dataset. `datasets/*.yaml` are its instances, `docs/schemas/card.json` its JSON Schema."""

    schema_: Literal[1] = Field(alias="schema")
    dataset: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")  # prefixes the sample keys, so no dots: WebDataset cuts at the first
    title: str
    reader: Literal["csv", "pairs", "phantom"]
    kind: Literal["multilabel", "multiclass", "segmentation", "mixed"]
    channels: Literal[1, 3]
    labels: list[str] = Field(default_factory=list)
    mask_classes: list[str] = Field(
        default_factory=list
    )  # classes 1.. of the index mask; with one class every non-zero mask value means it
    layouts: list[Layout] = Field(default_factory=list)
    phantom: PhantomSpec | None = None
    namespace: str  # of patient ids: two datasets with the same patients share it
    split: SplitRule = SplitRule()
    metadata: list[str] = Field(default_factory=list)  # allow-list: nothing else about an image is kept
    stratify_by: str | None = None
    max_side: int | None = Field(None, ge=32)  # larger images are reduced by area averaging when packed
    public: bool = False  # keys and patient hashes use the constant secret `public`
    share_images: bool = False  # images may appear in reports and tracking
    licence: str
    access: str
    citation: str

    @model_validator(mode="after")
    def _is_consistent(self) -> Card:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels holds a name twice")
        if self.kind == "multiclass" and len(self.labels) < 2:
            raise ValueError("kind multiclass needs at least two labels")
        if self.kind in ("multilabel", "mixed") and not self.labels:
            raise ValueError(f"kind {self.kind} needs labels")
        if self.kind in ("segmentation", "mixed") and not self.mask_classes:
            raise ValueError(f"kind {self.kind} needs mask_classes")
        if (self.reader == "phantom") != (self.phantom is not None):
            raise ValueError("reader phantom and the key phantom go together")
        if self.reader != "phantom" and not self.layouts:
            raise ValueError(f"reader {self.reader} needs layouts")
        if self.stratify_by is not None and self.stratify_by not in self.metadata:
            raise ValueError(f"stratify_by {self.stratify_by!r} is not in metadata")
        for layout in self.layouts:
            stray = (set(layout.metadata) - set(self.metadata)) | (set(layout.label_columns) - set(self.labels))
            if stray:
                raise ValueError(f"layout {layout.name}: {sorted(stray)} are not in the card's metadata or labels")
            if self.has_masks and not (layout.masks or layout.mask_column):
                raise ValueError(f"layout {layout.name}: kind {self.kind} needs masks or mask_column")
        return self

    @property
    def has_masks(self) -> bool:
        """Whether samples carry a mask: only then is one packed."""
        return self.kind in ("segmentation", "mixed")


def load_card(name_or_path: str) -> Card:
    """The card of that name in `datasets/`, or of that YAML file. Raises RequestError for an unknown name or a bad file."""
    return load(named("card", name_or_path), Card)
