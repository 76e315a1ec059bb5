"""The family of a study's comparisons, fixed before a number is seen: which the plan makes, and which the diary registered.

planned_family(study, rows); registered = family_of(out); family = of_evidence(evidence); family.gone(registered)

A driver registers it in OUT/events.jsonl (cluster.claims). A study without claims has every source against the baseline (the first random
source, else the first), each link of a continual chain against the one before it, and, as a control, a source against its twin under
another name (A/A). A comparison is one of the plan, whatever is missing of it. Registered when results of both its sides stood, it is late.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis import results
from analysis.counted import setting_of
from analysis.results import Cell
from base import storage
from base.config import digest

if TYPE_CHECKING:
    from analysis.evidence import Evidence

DIGITS = 8  # of the digest of a setting in the diary
Named = tuple[str, str, str, str]  # a comparison: architecture, digest of the rest of its setting, and its two sources, sorted


def pairs_of(study: dict[str, Any], sources: list[str], same: set[frozenset[str]], random: set[str]) -> Iterable[tuple[str, str, str]]:
    """(kind, a, b) of the study's family."""
    baseline = next((source for source in sources if source in random), sources[0])
    twins = {source for source in sources if source != baseline and frozenset((source, baseline)) in same}
    for source in sources:
        if source != baseline:
            yield ("control", baseline, source) if source in twins else ("gain", source, baseline)
    for entry in study.get("pretrain") or []:
        child, parent = str(entry.get("name", "")), results.plain(str(entry.get("start_from", "")))
        if child in sources and parent in sources and parent != baseline:
            yield "chain", child, parent


def is_random(cell: Cell) -> bool:
    """Whether the source is a random initialization, as the cell's configuration says (or, without one, the source's name)."""
    kind = results.read_yaml(storage.join(cell.url, "config.yaml")).get("source_kind")
    return kind == "random" if kind else cell.source.split("-")[0] == "random"


def registrations(out: str) -> dict[str, tuple[str, bool]]:
    """Claims that were ever in the study file, by sha256: their name, and whether they came before their results. See cluster.claims."""
    found: dict[str, tuple[str, bool]] = {}
    for row in storage.read_rows(storage.join(out, "events.jsonl")):
        if row.get("event") == "claim":
            found.setdefault(str(row["sha256"]), (str(row["claim"]), not row["standing"]))
    return found


def named(architecture: str, rest: str, one: str, other: str) -> Named:
    """A comparison as the diary has it."""
    return architecture, rest, min(one, other), max(one, other)


def in_words(names: Iterable[Named]) -> list[str]:
    """Comparisons by their sources."""
    counts = Counter((one, other) for _, _, one, other in names)
    return [f"{one} and {other} in {n} setting{'s' * (n > 1)}" for (one, other), n in counts.items()]


class Registered(NamedTuple):
    """early: before results of both sides stood. several: with two seeds a side or more, now or later, so that it may be declared."""

    kind: str
    early: bool
    several: bool


def family_of(out: str) -> dict[Named, Registered]:
    """Comparisons that were ever planned. See cluster.claims."""
    found: dict[Named, Registered] = {}
    for row in storage.read_rows(storage.join(out, "events.jsonl")):
        for pair in row["pairs"] if row.get("event") == "family" else ():
            standing, single = set(pair["standing"]), set(pair.get("single", ()))
            for rest in pair["settings"]:
                name = named(pair["architecture"], rest, pair["a"], pair["b"])
                held = found.get(name, Registered(pair["kind"], rest not in standing, False))
                found[name] = held._replace(several=held.several or rest not in single)
    return found


class Planned(NamedTuple):
    """A comparison of a plan: `several` as of Registered."""

    kind: str
    a: str
    b: str
    several: bool


def planned_family(study: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[Named, Planned]:
    """The comparisons that rows of a plan make, told without a result: twins by their weights are not known yet."""
    order, random = list(dict.fromkeys(str(row["source"]) for row in rows)), _named_random(study)
    same = {frozenset((a, b)) for a in random for b in random}
    found = {}
    for (architecture, rest), sides in in_settings(rows, study).items():
        for kind, one, other in pairs_of(study, [source for source in order if source in sides], same, random):
            if fewest := min(len(sides[one][0]), len(sides[other][0])):
                found[named(architecture, rest, one, other)] = Planned(kind, one, other, fewest > 1)
    return found


def _named_random(study: Mapping[str, Any]) -> set[str]:
    """Sources that are random initializations by the study file."""
    asked = (study.get("cells") or {}).get("sources") or []
    spelled = [one if isinstance(one, dict) else {"name": one, "source": one} for one in asked]
    return {str(one["name"]) for one in spelled if one["source"] == "random"}


def _random(evidence: "Evidence") -> set[str]:
    """Sources that are random initializations, also those without a finished cell."""
    first = {cell.source: cell for cell in reversed(evidence.cells)}
    return _named_random(evidence.study) | {source for source, cell in first.items() if is_random(cell)}


Side = tuple[set[Any], list[str]]  # of a source: its units (pretraining seed, fine-tuning seed), and the keys of its cells


def in_settings(rows: Sequence[Mapping[str, Any]], study: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Side]]:
    """Of each setting (architecture, digest of the rest) by source what the study asks for: units, none of those that are evidence for
    nothing, and keys."""
    spelled: dict[str, dict[str, Side]] = {}
    for row in rows:
        units, keys = spelled.setdefault(results.canonical(setting_of(row)), {}).setdefault(row["source"], (set(), []))
        units.update([] if results.apart(row, study.get("exposed")) else [(row.get("source_seed"), row["seed"])])
        keys.append(row["key"])
    held = [(json.loads(text), sides) for text, sides in spelled.items()]
    return {(str(architecture), digest(rest)[:DIGITS]): sides for (architecture, *rest), sides in held}


class Asked(NamedTuple):
    """Of one side what the plan has: units that are evidence, and cells."""

    units: set[Any]
    cells: int


def _settings(evidence: "Evidence") -> Iterable[tuple[tuple[str, str], dict[str, Asked], dict[str, list[Cell]]]]:
    """Of each setting by source: what the study asks for, and the finished cells.

    A comparison is one that the plan has, whatever is missing of it: no source becomes the baseline because its cells came first.
    """
    if not evidence.plan:
        for group, cells in results.in_groups(evidence.cells).items():
            held = {source: own for (source,), own in results.by(cells, "source").items()}
            yield (str(group[0]), digest(group[1:])[:DIGITS]), {source: Asked(set(), len(own)) for source, own in held.items()}, held
        return
    finished = {cell.key: cell for cell in evidence.cells}
    for setting, sides in in_settings(evidence.plan, evidence.study).items():
        done = {source: [finished[key] for key in keys if key in finished] for source, (_, keys) in sides.items()}
        asked = {source: Asked(units, len(keys)) for source, (units, keys) in sides.items()}
        yield setting, asked, {source: own for source, own in done.items() if own}


class Pair(NamedTuple):
    """A comparison that can be made: how many cells are missing of its sides, those that are there, and the metric."""

    kind: str
    name: Named
    missing: int
    a: list[Cell]
    b: list[Cell]
    metric: str


class Family(NamedTuple):
    """Comparisons of a plan: those that can be made; by name the kind of those that may be declared, two seeds a side or more; and the
    names of those with two cells a side or more."""

    pairs: list[Pair]
    planned: dict[Named, str]
    there: set[Named]

    def gone(self, registered: Mapping[Named, Registered]) -> list[Named]:
        """Those that may have been declared once and are planned no longer. One whose weights' architecture was or is not known is the
        same in any."""
        rest, unknown = {name[1:] for name in self.there}, {name[1:] for name in self.there if not name[0]}
        several = (name for name, held in registered.items() if held.several)
        return [name for name in several if name not in self.there and name[1:] not in (unknown if name[0] else rest)]

    def late(self, registered: Mapping[Named, Registered]) -> set[Named]:
        """Those that were registered when results of both sides stood, or never where others were."""
        early = {name for name, held in registered.items() if held.early}
        return {name for name in self.planned if registered and name[0] and not early & {name, ("", *name[1:])}}


def of_evidence(evidence: "Evidence") -> Family:
    """The comparisons of a study's plan with its finished cells."""
    order, random = list(dict.fromkeys([row["source"] for row in evidence.plan] + evidence.sources())), _random(evidence)
    weights = {cell.source: str(cell.result.get("encoder_sha256") or "") for cell in evidence.cells}
    both = [(a, b) for a in order for b in order if a != b]
    twin = {frozenset(pair) for pair in both if weights.get(pair[0]) and weights.get(pair[0]) == weights.get(pair[1])}
    same = twin | {frozenset(pair) for pair in both if set(pair) <= random}
    family = Family([], {}, set())
    for (architecture, rest), sides, held in _settings(evidence):
        metric = results.headline(cell for own in held.values() for cell in own)
        for kind, one, other in pairs_of(evidence.study, [source for source in order if source in sides], same, random):
            name = named(architecture, rest, one, other)
            if min(sides[one].cells, sides[other].cells) > 1:
                family.there.add(name)
            if min(len(sides[one].units), len(sides[other].units)) > 1:
                family.planned[name] = kind
            if one in held and other in held and metric:
                missing = sum(sides[source].cells - len(held[source]) for source in (one, other))
                family.pairs.append(Pair(kind, name, missing, held[one], held[other], metric))
    return family
