"""A look at a folder that nobody has described: what lies where, what the headers and tables say, who the patients may be.

    found = survey("RAW")                 # Survey(groups, tables, patients, masks, ...); prints nothing, changes nothing
    text = shards.draft.draft(found)      # the draft of a card

Every file is listed; of each group of files that lie alike, at most HEADERS are opened, spread evenly.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from base import storage
from base.errors import RequestError
from shards.columns import FileNames, TableFacts, survey_table
from shards.content import IMAGES
from shards.headers import Header, header
from shards.rawfiles import extension, sizes, stem
from shards.splitting import SPLIT_WORDS

HEADERS = 400  # files of a group whose header is read
SIBLINGS = 8  # more folders than this beside each other become a `*`
LARGEST_TABLE = 1 << 30  # bytes
TABLES = (".csv", ".csv.gz", ".tsv", ".tab", ".txt")
_MASK = re.compile(
    r"mask|contour|(?<![a-z])(segs?|segmentations?|manual\d*|annotations?|labels?|gt|ground[ _-]?truth)(?![a-z])", re.IGNORECASE
)


@dataclass(frozen=True)
class Group:
    """Files that lie alike: a glob over their relative paths, and the headers of some of them."""

    glob: str
    files: list[str]
    headers: list[Header] = field(repr=False)

    @property
    def format(self) -> str:
        """The commonest format by content."""
        return Counter(found.format for found in self.headers).most_common(1)[0][0]

    def count(self, field: str) -> Counter[str]:
        """How often each value of a header's field (`size`, `pixels`, `format`) or DICOM tag occurs among the headers read."""
        values = (getattr(found, field) if hasattr(found, field) else found.tags.get(field, "") for found in self.headers)
        return Counter(value for value in values if value)


@dataclass(frozen=True)
class PatientKey:
    """Something that may tell patients apart: how many it tells and how many images the largest has, among the images looked at."""

    where: str  # in words
    kind: str  # column | path | tag
    key: str  # the column, the regular expression over the relative path, the DICOM tag
    images: int
    patients: int
    largest: int
    sure: bool  # its name says patient; the others only repeat as patients do


@dataclass(frozen=True)
class Survey:
    """All that was found. `masks` are templates (see shards.card), each with how many images have that mask."""

    raw: str
    files: int
    bytes: int
    images: list[str]  # image files that are not masks
    groups: list[Group]
    tables: list[TableFacts]
    lists: dict[str, str]  # split -> text file of image names
    patients: list[PatientKey]
    masks: dict[str, int]
    class_folders: list[str]
    split_folders: list[str]

    def image_groups(self) -> list[Group]:
        """Groups that hold images which are not masks, the largest first."""
        wanted = set(self.images)
        return [group for group in self.groups if not wanted.isdisjoint(group.files)]


def survey(raw: str) -> Survey:
    """Look at a folder, local or in a store.

    Raises:
        RequestError: no such folder, a file instead of one, or no file in it.
    """
    if not storage.exists(raw):
        raise RequestError("no such folder", where=raw)
    found = sizes(raw)
    if os.path.isfile(raw) or list(found) == [""]:
        raise RequestError("this is a file; survey takes the folder in which images and tables lie", where=raw)
    if not found:
        raise RequestError("the folder holds no file", where=raw)
    groups = [Group(glob, files, _headers(raw, files)) for glob, files in globs(sorted(found)).items()]
    groups.sort(key=lambda group: (-len(group.files), group.glob))
    pictures = [file for group in groups if group.format in IMAGES for file in group.files]
    names = FileNames(pictures)
    texts = [file for file, size in found.items() if file.lower().endswith(TABLES) and size < LARGEST_TABLE]
    tables = [table for file in sorted(texts) if (table := survey_table(raw, file, names))]
    tables.sort(key=lambda table: (-table.images, table.file))
    images = [file for file in pictures if not is_mask(file)] or pictures
    return Survey(
        raw=raw,
        files=len(found),
        bytes=sum(found.values()),
        images=images,
        groups=groups,
        tables=tables,
        lists=_split_lists(raw, [file for file in texts if file not in {table.file for table in tables}], names),
        patients=_patient_keys(images, groups, tables),
        masks=mask_templates(images, sorted(set(pictures) - set(images))),
        class_folders=class_folders(images),
        split_folders=_split_folders(images),
    )


def _headers(raw: str, files: Sequence[str]) -> list[Header]:
    step = max(1, -(-len(files) // HEADERS))
    return [header(raw, file) for file in files[::step]]


def globs(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by a glob that covers them: folders beside each other that are many, or named by number only, become one `*`."""
    found: dict[str, list[str]] = defaultdict(list)

    def descend(prefix: str, members: list[tuple[list[str], str]]) -> None:
        below: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
        for parts, file in members:
            if len(parts) == 1:
                found[f"{prefix}*{extension(parts[0])}"].append(file)
            else:
                below[parts[0]].append((parts[1:], file))
        for name, names in _merged(list(below)).items():
            descend(f"{prefix}{name}/", [member for folder in names for member in below[folder]])

    descend("", [(file.split("/"), file) for file in files])
    return dict(found)


def _merged(folders: list[str]) -> dict[str, list[str]]:
    shapes: dict[str, list[str]] = defaultdict(list)
    for name in folders:
        shapes[re.sub(r"\d+", "0", name)].append(name)
    merged = {}
    for names in shapes.values():
        merged[names[0] if len(names) == 1 else f"{re.match(r'[^0-9]*', names[0]).group()}*"] = names  # type: ignore[union-attr]
    return merged if len(merged) <= SIBLINGS else {"*": folders}


def is_mask(path: str) -> bool:
    """Whether folders or name say that it is a mask."""
    return _MASK.search(path) is not None


def mask_templates(images: Sequence[str], masks: Sequence[str]) -> dict[str, int]:
    """Templates with {stem} that lead from an image to a mask, each with how many masks follow it; the commonest first."""
    folders: dict[str, set[str]] = defaultdict(set)
    for file in images:
        folders[stem(file)].add(os.path.dirname(file))
    counts: Counter[str] = Counter()
    for file in masks:
        name, folder, end = stem(file), os.path.dirname(file), extension(os.path.basename(file))
        parts = re.split(r"([_\-. ])", name)
        # The longest run of the name's parts from its start that is an image's stem: `a_1_mask` belongs to `a_1`, not to `a`.
        whose = next((found for n in range(len(parts), 0, -2) if (found := "".join(parts[:n])) in folders), None)
        if whose is None:
            continue
        if folder in folders[whose]:  # beside its image, perhaps one of several
            counts["{dir}/{stem}" + re.sub(r"[_-]?\d+$", "", name[len(whose) :]) + f"*{end}"] += 1
        else:
            counts[f"{folder}/{{stem}}{name[len(whose) :]}{end}".lstrip("/")] += 1
    return {template: n for template, n in counts.most_common() if n >= 0.2 * len(folders)}


def class_folders(images: Sequence[str]) -> list[str]:
    """Names of the folders right above the images, where they are classes: several, not numbered like patients, not splits."""
    counts = Counter(file.split("/")[-2] for file in images if "/" in file)
    names = [name for name in counts if name.lower() not in SPLIT_WORDS]
    shapes = {re.sub(r"\d+", "0", name) for name in names}
    several = len(names) >= 2 and len(shapes) == len(names) and sum(counts[name] for name in names) == len(images)
    return sorted(names) if several and min(counts[name] for name in names) > 1 else []


def _split_folders(images: Sequence[str]) -> list[str]:
    """Names of the folders, at one level, that are all words for a split."""
    depth = min((file.count("/") for file in images), default=0)
    for level in range(depth):
        names = sorted({file.split("/")[level] for file in images})
        if len(names) > 1 and all(name.lower() in SPLIT_WORDS for name in names):
            return names
    return []


def _split_lists(raw: str, texts: Sequence[str], names: FileNames) -> dict[str, str]:
    """Text files of one image name a line, by the split that their own name says."""
    found: dict[str, str] = {}
    for file in texts:
        try:
            lines = storage.read_bytes(storage.join(raw, file)).decode().split()
        except (UnicodeDecodeError, OSError):
            continue
        if not lines or sum(names.knows(line) for line in lines) < 0.5 * len(lines):
            continue
        words = re.split(r"[^a-z]+", os.path.basename(file).lower())
        splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        name = "train_val" if splits == {"train", "val"} else next(iter(splits)) if len(splits) == 1 else ""
        if name:
            found[name] = file
    return found


def _patient_keys(images: Sequence[str], groups: Sequence[Group], tables: Sequence[TableFacts]) -> list[PatientKey]:
    """Candidates for the patient key, the likeliest first."""
    found = []
    for table in tables:
        for column in table.having("patient"):
            largest = column.top[0][1] if column.top else 0
            where = f"column {column.name} of {table.file}"
            found.append(PatientKey(where, "column", column.name, column.filled, column.distinct, largest, True))
    values = Counter(h.identities["PatientID"] for group in groups for h in group.headers if "PatientID" in h.identities)
    if values:
        found.append(_counted("PatientID in the DICOM headers", "tag", "PatientID", values, True))
    return found + _in_names(images)


def _counted(where: str, kind: str, key: str, values: Counter[str], sure: bool) -> PatientKey:
    return PatientKey(where, kind, key, sum(values.values()), len(values), max(values.values()), sure)


def _in_names(images: Sequence[str]) -> list[PatientKey]:
    """Folders and beginnings of names that several images share, but not all."""
    told = {*class_folders(images), *_split_folders(images)}
    depth = min((file.count("/") for file in images), default=0)
    levels = [level for level in range(depth) if not told.issuperset(file.split("/")[level] for file in images)]
    patterns = [(f"folder {level + 1} of the path", "^" + "[^/]+/" * level + "([^/]+)/") for level in levels]
    for parts in (1, 2, 3):
        beginning = "[_-]".join(["[^/_-]+"] * parts)
        words = "part" if parts == 1 else f"{parts} parts"
        patterns.append((f"the first {words} of the name", f"(?:^|/)({beginning})[_-][^/]*$"))
    found = []
    for where, pattern in patterns:
        matches = [match.group(1) for file in images if (match := re.search(pattern, file))]
        values = Counter(matches)
        if len(matches) == len(images) and 2 <= len(values) < len(images) and len(values) >= 0.02 * len(images):
            sure = any(re.search(r"patient|subject|person", value, re.IGNORECASE) for value in list(values)[:3])
            found.append(_counted(where, "path", pattern, values, sure))
    return sorted(found, key=lambda key: not key.sure)
