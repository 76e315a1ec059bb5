"""Cards: what a dataset is, where its files lie, what may be kept of them.

    card = load_card("nih-cxr14")              # datasets/nih-cxr14.yaml, or a path to a YAML file
    card.labels, card.layouts[0].table, card.split.val

A card holds several layouts of the raw files, the official one first. `shards.readers` takes the first layout whose `requires`
globs all match; everything a layout says is about names of files and columns, nothing about pixels, and never code.
Boxes are out of scope: a detection dataset is read for its images and image-level labels.
"""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from base.config import Strict, load
from base.errors import unknown
from base.paths import named

SPLITS: tuple[str, ...] = ("train", "val", "test")
Split = Literal["train", "val", "test"]
Part = Literal["train", "val", "test", "train_val"]  # what official releases call a split; train_val is divided by patient
OpenPoint = Annotated[str, Field(pattern="^OPEN:")]  # of a draft, see shards.open_points
NOT_JUDGED = 255  # in a mask: neither a class nor the background; everywhere, where an image among others has no mask
FOUND = "found"  # `labels: found`: the classes are those that the raw files name, sorted


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

    generator: Literal["chest", "fundus", "procedural", "scales"]
    size: int = Field(64, ge=32, le=1024)


class Smoothed(Strict):
    """An uncertain label becomes a draw from U(lo, hi), the same in every epoch (Pham et al., arXiv 1911.06475)."""

    smoothed: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _is_ordered(self) -> Smoothed:
        if self.smoothed[0] > self.smoothed[1]:
            raise ValueError("smoothed: [lo, hi] with lo above hi")
        return self


Policy = Literal["ones", "zeros", "ignore"] | Smoothed  # what an uncertain label (-1) counts as
Uncertain = Policy | dict[str, Policy]  # for all labels, or label by label, the others as `default` (ignore where none is given)


class Benchmark(Strict):
    """A published split whose lists are not ours to ship: the images of each of its splits."""

    name: str
    counts: dict[Split, int]


class Join(Strict):
    """Another CSV whose columns are added to each row by the column `by`; with `optional`, rows without a partner get empty cells."""

    table: str
    by: str  # not `on`, which YAML reads as true
    optional: bool = False


class RunLengths(Strict):
    """Masks as text in a column; several rows of an image make one mask. `label` is the label that a non-empty mask makes 1."""

    column: str
    kind: Literal["kaggle", "siim", "coco"]
    empty: list[str] = Field(default_factory=lambda: ["", "-1"])
    label: str | None = None


class RawPixels(Strict):
    """Image files that are nothing but pixels, row by row. With `invert`, the largest value of `bits` bits is black."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    dtype: Literal["u1", "<u2", ">u2"]
    bits: int = Field(8, ge=1, le=16)
    invert: bool = False


class BurnedIn(Strict):
    """A rule for DICOM files that may show text: for those whose tags match (keyword: value), the rectangles that are blanked.

    No rectangle says that such files are known to be clean. Files that may show text and match no rule are quarantined.
    """

    match: dict[str, str | int] = Field(min_length=1)
    blank: list[tuple[int, int, int, int]] = Field(default_factory=list)  # top, left, bottom, right in pixels, ends excluded


class Groups(Strict):
    """A CSV with one patient a row and, in those columns, the names of this patient's images."""

    table: str
    columns: list[str] = Field(min_length=1)
    sep: str = Field(",", min_length=1, max_length=1)


Reader = Literal["csv", "folders", "pairs", "npz", "tars", "tars-in-place", "phantom"]


class Layout(Strict):
    """One arrangement of the raw files.

    With `table` or `split_tables`, each row is a sample; without, each file that matches `images`; of reader `folders` both, the files that
    no row names being samples too. The image of a row is found by its relative path, by the end of its path, or by its name with or without
    the extension, among the files that match `images`.
    All patterns are regular expressions, searched in the relative path without its extension where nothing else is said.
    """

    name: str
    reader: Reader | None = None  # where it is not the card's
    requires: list[str] = Field(min_length=1)  # globs, all must match: how the layout is recognised
    images: list[str] = Field(min_length=1)  # globs of image files (npz, tars: of the files that hold the images)
    exclude: list[str] = Field(default_factory=list)  # globs of files that are no images of this dataset, though `images` match
    raw_pixels: RawPixels | None = None

    table: str | None = None  # glob of a CSV (.gz too), relative to the raw folder
    split_tables: dict[Part, str] = Field(default_factory=dict)  # one CSV a split, instead of `table`
    sep: str = Field(",", min_length=1, max_length=1)
    join: list[Join] = Field(default_factory=list)
    keep: dict[str, list[str]] = Field(default_factory=dict)  # column -> values: other rows are left out, and counted
    repeated: Literal["majority"] | OpenPoint | None = None  # several rows of an image are readers' votes; None: an error, but for `rle`
    image_column: str | None = None
    image_pattern: str | None = None  # group 1 is the part of that column's value that stands in the path

    findings_column: str | None = None  # names of labels, joined by `separator`
    separator: str = "|"
    no_finding: list[str] = Field(default_factory=list)  # names of findings that mean "none of the labels"
    label_columns: dict[str, str] = Field(default_factory=dict)  # label -> column holding 1, 0, -1 (uncertain) or nothing (unknown)
    # A named group per label catches 1 or 0 in the path. Or group 1 is what a findings column would hold, and where there is one, does.
    label_pattern: str | None = None
    values: dict[str, str] = Field(default_factory=dict)  # what cells, folders and pattern groups say -> label name, or 1, 0, -1, nothing

    masks: list[str] | dict[str, list[str]] = Field(default_factory=list)  # templates of {stem}, {dir}, {id} and *; by class, or united
    mask_pattern: str | None = None  # group 1 is {id}
    mask_column: str | None = None
    mask_optional: bool = False  # images without a mask are kept, with none
    mask_resize: bool = False  # masks may have another size than their image, in whose frame they lie
    field_of_view: str | None = None  # template; outside of it a mask is 255: not judged
    rle: RunLengths | None = None

    patient_column: str | None = None
    patient_pattern: str | None = None  # group 1 is the patient: of the value of the column or tag, or of the path where neither is named
    patient_tag: str | None = None  # attribute of the DICOM header, such as PatientID: the headers of all files are read
    patient_groups: Groups | None = None  # where only another table says which images are of one patient
    study_column: str | None = None
    study_tag: str | None = None
    study_pattern: str | None = None  # as for the patient; its keyed hash becomes the metadata `study`

    split_column: str | None = None
    split_pattern: str | None = None  # group 1 is a split's name
    split_words: dict[str, Part] = Field(default_factory=dict)  # names of splits in that column or pattern, where they are not plain
    split_lists: dict[Part, str] = Field(default_factory=dict)  # text files, one name a line
    split_lists_by: str = "image"  # what the lists name: image, patient, or a column

    metadata: dict[str, str] = Field(default_factory=dict)  # name in the card's allow-list -> column
    counts: dict[Literal["train", "val", "test", "train_val", "total"], int] = Field(default_factory=dict)  # images expected
    of: int | None = None  # a subset: how many images the whole dataset has

    @property
    def has_table(self) -> bool:
        """Whether the samples are rows of a table; else they are files."""
        return self.table is not None or bool(self.split_tables)

    @property
    def columns(self) -> list[str]:
        """Every column that is read of the tables."""
        single = (self.image_column, self.mask_column, self.findings_column, self.patient_column, self.study_column, self.split_column)
        by_list = None if self.split_lists_by in ("image", "patient") else self.split_lists_by
        one = [name for name in (*single, by_list, self.rle.column if self.rle else None) if name]
        return list(dict.fromkeys([*one, *self.label_columns.values(), *self.metadata.values(), *self.keep]))

    @property
    def templates(self) -> list[tuple[str | None, str]]:
        """The mask templates, each with its class (None: the values in the file say)."""
        if isinstance(self.masks, dict):
            return [(name, template) for name, templates in self.masks.items() for template in templates]
        return [(None, template) for template in self.masks]

    @property
    def parts(self) -> set[Part]:
        """The parts that the layout's lists, tables and words name; empty where nothing is named, or by plain words alone."""
        return {*self.split_tables, *self.split_lists, *self.split_words.values()}

    @property
    def split_rule(self) -> str | None:
        """How this layout splits, in words; None where it does not, and patients are split by their hash."""
        if self.split_tables:
            return f"official tables {', '.join(self.split_tables.values())}"
        if self.split_lists:
            return f"official lists {', '.join(self.split_lists.values())}"
        if self.split_column is not None:
            return f"column {self.split_column}"
        return f"folders, {self.split_pattern}" if self.split_pattern is not None else None

    @model_validator(mode="after")
    def _is_consistent(self) -> Layout:
        single = (self.image_column, self.mask_column, self.findings_column, self.patient_column, self.study_column, self.split_column)
        needs_table = any(single) or self.label_columns or self.metadata or self.rle or self.join or self.keep or self.repeated
        if self.table is not None and self.split_tables:
            raise ValueError(f"layout {self.name}: table or split_tables, not both")
        if needs_table and not self.has_table:
            raise ValueError(f"layout {self.name}: columns are named, but no table")
        if self.image_pattern is not None and self.image_column is None:
            raise ValueError(f"layout {self.name}: image_pattern is of image_column")
        if self.has_table and self.image_column is None:
            raise ValueError(f"layout {self.name}: a table needs image_column")
        if sum((bool(self.split_tables), bool(self.split_lists), self.split_column is not None, self.split_pattern is not None)) > 1:
            raise ValueError(f"layout {self.name}: one of split_tables, split_lists, split_column and split_pattern")
        for field in ("image_pattern", "label_pattern", "patient_pattern", "study_pattern", "split_pattern", "mask_pattern"):
            pattern = getattr(self, field)
            if pattern is not None:
                try:
                    groups = re.compile(pattern).groups
                except re.error as error:
                    raise ValueError(f"layout {self.name}: {field} is not a regular expression: {error}") from None
                if groups < 1:
                    raise ValueError(f"layout {self.name}: {field} needs a group")
        if self.label_pattern is not None and self.findings_column is not None and re.compile(self.label_pattern).groupindex:
            raise ValueError(
                f"layout {self.name}: label_pattern has named groups, which are of paths; with findings_column its first group tells"
            )
        for template in [*(template for _, template in self.templates), *([self.field_of_view] if self.field_of_view else [])]:
            self._check_template(template)
        return self

    def _check_template(self, template: str) -> None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise ValueError(f"layout {self.name}: mask template {template!r}: {error}") from None
        if not fields & {"stem", "id"} or fields - {"stem", "id", "dir"}:
            raise ValueError(f"layout {self.name}: mask template {template!r} needs {{stem}} or {{id}}, and knows {{dir}} besides")
        if "id" in fields and self.mask_pattern is None:
            raise ValueError(f"layout {self.name}: mask template {template!r} needs mask_pattern for its {{id}}")


class Card(Strict):
    """One dataset. `datasets/*.yaml` are its instances, `docs/schemas/card.json` its JSON Schema."""

    schema_: Literal[2] = Field(alias="schema")
    dataset: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")  # prefixes the sample keys, so no dots: WebDataset cuts at the first
    title: str
    reader: Reader
    kind: Literal["multilabel", "multiclass", "segmentation", "mixed", "unlabelled"]
    channels: int = Field(1, ge=1, le=256)
    labels: list[str] = Field(default_factory=list)
    labels_found: bool = False  # the classes are those that the raw files name, sorted; the manifest's card lists them
    mask_classes: list[str] = Field(default_factory=list)  # classes 1.. of the index mask; with one class every non-zero value means it
    uncertain: Uncertain = "ignore"
    unmentioned: Literal["zeros", "ignore"] = "ignore"  # what a label counts as that is neither 1, 0 nor uncertain
    views: dict[str, list[str] | dict[str, list[str]]] = Field(default_factory=dict)  # some of the labels, or new label -> any of these
    layouts: list[Layout] = Field(default_factory=list)
    phantom: PhantomSpec | None = None
    namespace: str  # of patient ids, by default the dataset's name: two datasets with the same patients share it
    split: SplitRule = SplitRule()
    benchmark: Benchmark | None = None
    metadata: list[str] = Field(default_factory=list)  # allow-list: nothing else about an image is kept
    stratify_by: str | None = None
    max_side: int | None = Field(None, ge=32)  # larger images are reduced by area averaging when packed
    depth: Literal[8, 16] = 8  # bits a pixel in the shard
    windows: list[tuple[float, Annotated[float, Field(gt=0)]]] = Field(default_factory=list)  # [centre, width], each a channel at load
    frames: Literal["first", "each", "slab"] = "first"  # of files with several frames or slices
    slab: int | None = Field(None, ge=1)  # slices of one sample
    burned_in: list[BurnedIn] = Field(default_factory=list)  # of DICOM files; the first rule that matches counts
    public: bool = False  # keys and patient hashes use the constant secret `public`
    share_images: bool = False  # images may appear in reports and tracking
    licence: str
    access: str
    citation: str

    @model_validator(mode="before")
    @classmethod
    def _fills_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        found = {"labels": [], "labels_found": True} if data.get("labels") == FOUND else {}
        return {"namespace": data.get("dataset")} | data | found

    @model_validator(mode="after")
    def _is_consistent(self) -> Card:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels holds a name twice")
        if self.labels_found and self.kind != "multiclass":
            raise ValueError("labels: found is for kind multiclass")
        if self.kind == "multiclass" and len(self.labels) < 2 and not self.labels_found:
            raise ValueError("kind multiclass needs at least two labels")
        if self.kind in ("multilabel", "mixed") and not self.labels:
            raise ValueError(f"kind {self.kind} needs labels")
        if self.kind == "unlabelled" and (self.labels or self.mask_classes):
            raise ValueError("kind unlabelled has neither labels nor mask_classes")
        if self.has_masks and not self.mask_classes:
            raise ValueError(f"kind {self.kind} needs mask_classes")
        if (self.reader == "phantom") != (self.phantom is not None):
            raise ValueError("reader phantom and the key phantom go together")
        if self.reader != "phantom" and not self.layouts:
            raise ValueError(f"reader {self.reader} needs layouts")
        if self.stratify_by is not None and self.stratify_by not in self.metadata:
            raise ValueError(f"stratify_by {self.stratify_by!r} is not in metadata")
        if (self.frames == "slab") != (self.slab is not None):
            raise ValueError("frames: slab and the key slab go together")
        planes = (len(self.windows) or 1) * (self.slab or 1)
        if planes > 1 and self.channels != planes:
            raise ValueError(f"channels {self.channels}: {len(self.windows) or 1} windows of {self.slab or 1} slices make {planes}")
        if planes == 1 and self.channels not in (1, 3):
            raise ValueError("channels is 1 or 3 where no windows or slabs make more")
        if self.depth == 8 and (self.windows or self.slab):
            raise ValueError("windows and slabs need depth: 16")
        self._check_labels_elsewhere()
        for layout in self.layouts:
            self._check_layout(layout)
        return self

    def _check_labels_elsewhere(self) -> None:
        lists = [part for view in self.views.values() for part in ([view] if isinstance(view, list) else view.values())]
        named = {label for part in lists for label in part}
        named |= {label for label in self.uncertain if label != "default"} if isinstance(self.uncertain, dict) else set()
        if not self.labels_found and named - set(self.labels):
            raise ValueError(f"views or uncertain name {sorted(named - set(self.labels))}, which are not in labels")
        if set(self.derived) & set(self.labels):
            raise ValueError(f"views: {sorted(set(self.derived) & set(self.labels))} stand in labels already")

    def _check_layout(self, layout: Layout) -> None:
        rle_label = {layout.rle.label} if layout.rle and layout.rle.label else set()
        classes = set(layout.masks) if isinstance(layout.masks, dict) else set()
        stray = (set(layout.metadata) - set(self.metadata)) | ((set(layout.label_columns) | rle_label) - set(self.labels))
        stray |= classes - set(self.mask_classes)
        if stray:
            raise ValueError(f"layout {layout.name}: {sorted(stray)} are not in the card's metadata, labels or mask_classes")
        if self.has_masks and not (layout.masks or layout.mask_column or layout.rle):
            raise ValueError(f"layout {layout.name}: kind {self.kind} needs masks, mask_column or rle")
        if layout.repeated == "majority" and self.kind == "multiclass":
            raise ValueError(f"layout {layout.name}: repeated is for labels, not for classes")
        reader = self.reader_of(layout)
        if reader == "csv" and not layout.has_table:
            raise ValueError(f"layout {layout.name}: reader csv needs a table")
        if reader in ("npz", "tars", "tars-in-place") and layout.has_table:
            raise ValueError(f"layout {layout.name}: reader {reader} reads no table")
        if reader == "folders" and layout.has_table and {*layout.columns} - {layout.image_column, layout.findings_column}:
            raise ValueError(f"layout {layout.name}: reader folders takes images and their classes from a table, nothing else")
        if reader == "tars-in-place" and (not self.public or self.has_masks or self.depth != 8 or self.max_side):
            raise ValueError(
                f"layout {layout.name}: images that stay where they lie are neither de-identified nor reduced: public ones alone, without "
                "masks, depth 16 and max_side; reader tars packs them"
            )

    def reader_of(self, layout: Layout) -> Reader:
        """The reader of one of the layouts: its own, or the card's."""
        return layout.reader or self.reader

    @property
    def in_place(self) -> bool:
        """Of the card with the layout that was found alone: whether its images stay where they lie."""
        return any(self.reader_of(layout) == "tars-in-place" for layout in self.layouts)

    @property
    def colour(self) -> bool:
        """Whether the three channels are red, green and blue, and not windows or slices."""
        return self.channels == 3 and not self.windows and self.slab is None

    @property
    def has_masks(self) -> bool:
        """Whether samples carry a mask: only then is one packed."""
        return self.kind in ("segmentation", "mixed")

    def mask_index(self, name: str, where: str) -> int:
        """The value of that class in the masks. Raises RequestError for a class that the masks do not have."""
        if name not in self.mask_classes:
            raise unknown("mask class", name, self.mask_classes, where=where)
        return self.mask_classes.index(name) + 1

    @property
    def derived(self) -> dict[str, list[str]]:
        """Labels that the views make: new label -> the labels any of which makes it 1."""
        return {label: of for view in self.views.values() if isinstance(view, dict) for label, of in view.items()}


def load_card(name_or_path: str) -> Card:
    """The card of that name in `datasets/`, or of that YAML file. Raises RequestError for an unknown name or a bad file."""
    return load(named("card", name_or_path), Card)
