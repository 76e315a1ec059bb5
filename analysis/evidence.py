"""The evidence of a study: all that its report is made of, and which comparisons it holds.

evidence = gather(out); evidence.answer(); [finding.sentence(evidence) for finding in evidence.findings]

The family of comparisons is fixed before a number is seen: a driver registers it in OUT/events.jsonl (cluster.claims). A study with
claims has its claims, and Holm's correction runs over them alone (analysis.ledger); what else could be compared is printed and never
declared. Any other study has every source against the baseline (the first random source, else the first), each link of a continual chain
against the one before it, and, as a control, a source against its twin under another name (A/A): Holm's runs over the first two kinds
together, and over the controls by themselves in either case; each over every one that is planned with two seeds a side, whether or not
its cells have come, and over those that were registered and are planned no longer, with p = 1. One that was registered when results of
both its sides stood is late: corrected for all, it costs the others nothing. A statement is declared when its adjusted p is under 0.05
and its interval holds seeds and patients; everything else reads "no difference" with its interval, which only means that 0 is inside. A
comparison is none where a cell of it failed or has no number: those that did not are a selection.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from analysis import ledger, results, study_floors
from analysis.claims import Claim
from analysis.comparisons import Comparisons
from analysis.findings import APART, Finding
from analysis.ledger import Entry
from analysis.replicates import Bootstrap
from analysis.results import Cell, Pretraining
from analysis.statistics import Comparison, not_comparable
from base import storage
from base.config import digest, parse

DIGITS = 8  # of the digest of a setting in the diary
SELECTED = "failed or ended without a number, and those that did not are a selection"
Named = tuple[str, str, str, str]  # a comparison: architecture, digest of the rest of its setting, and its two sources, sorted


@dataclass
class Evidence:
    """All that a report is made of, read from OUT once."""

    out: str
    study: dict[str, Any]
    cells: list[Cell]  # without the shuffled-label controls
    controls: list[Cell]  # those
    missing: list[dict[str, Any]]
    failed: dict[str, str]
    pretrainings: list[Pretraining]
    manifests: dict[str, Any] = field(default_factory=dict)  # dataset: manifest.json as plain data
    shards: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    ledger: list[Entry] = field(default_factory=list)  # of the study's claims
    withdrawn: list[str] = field(default_factory=list)  # claims that stood in the study file once and no longer do
    dropped: list[str] = field(default_factory=list)  # comparisons that were registered once and are planned no longer, in words
    earlier: int = 0  # finished cells that the present plan no longer asks for
    finished: list[Cell] | None = None  # every one, those of an earlier plan and the controls included
    comparisons: Comparisons = field(init=False)
    corrected: int = 0  # of a study without claims: how many comparisons Holm's correction ran over

    def __post_init__(self) -> None:
        self.plan = results.expected(self.out)
        self.varied = {name: {getattr(c, name) for c in self.cells} for name in ("architecture", "resolution", "fraction")}
        self.varied["strategy"] = {(c.strategy, c.options) for c in self.cells}

    @cached_property
    def floors(self) -> study_floors.StudyFloors:
        """What trivial predictors reach on its tasks."""
        return study_floors.of_study(self)

    @property
    def single(self) -> bool:
        """One setting only: the words need not say which."""
        return len({cell.group for cell in self.cells}) == 1

    @property
    def family(self) -> int:
        """How many comparisons Holm's correction runs over."""
        return next((entry.family for entry in self.ledger if not entry.late), 0) if self.ledger else self.corrected

    @property
    def asked(self) -> int:
        return len(self.cells) + len(self.missing)

    def exposed(self, cell: Cell) -> bool:
        """Whether a cell stays out of ranks because its source may have seen its test images."""
        return bool(cell.exposed_to) and self.study.get("exposed") != "ranked"

    @cached_property
    def _checkpoints(self) -> dict[str, list[str]]:
        """By the hash of a pretrained encoder those of the steps that led to it, itself last."""
        done = [p.result for p in self.pretrainings if p.result]
        return {str(result["encoder_sha256"]): [str(step.get("sha256")) for step in result.get("lineage") or []] for result in done}

    def independent(self, cells: Sequence[Cell]) -> int:
        """From how many pretrainings a source's cells come that share no step: three runs that all go on from one checkpoint are one.

        Random weights are drawn with every fine-tuning seed, and count by them.
        """
        weights = {str(cell.result.get("encoder_sha256") or f"drawn with {cell.seed}") for cell in cells}
        paths = [self._checkpoints.get(sha) or [sha] for sha in weights]
        least = min(map(len, paths))
        return min(len({path[at] for path in paths}) for at in (*range(least), -1))

    def compared(self, a: Sequence[Cell], b: Sequence[Cell], metric: str) -> Comparison:
        """The primary comparison, which speaks of methods only where no side's pretrainings share a step; none where cells are lost."""
        if lost := self.lost(a) + self.lost(b):
            return not_comparable(f"{lost} cell{' of it' if lost == 1 else 's of it'} {SELECTED}")
        found = self.comparisons.of(a, b, metric)
        return replace(found, pretraining_seeds=min(found.pretraining_seeds, self.independent(a), self.independent(b)))

    @cached_property
    def numberless(self) -> set[str]:
        """Keys of finished cells without a number in their task's headline metric on test images."""
        lost: set[str] = set()
        for cells in results.by(self.cells, "task").values():
            metric = results.headline(cells) or ""
            lost |= {cell.key for cell in cells if not math.isfinite(cell.value(metric))}
        return lost

    @cached_property
    def _failed_beside(self) -> dict[str, int]:
        return failed_beside(self.plan, self.failed)

    @cached_property
    def damaged(self) -> list[str]:
        """Files of results that stand and cannot be read, by their place in OUT."""
        whole = {cell.key for cell in self.finished or ()}
        return [url.removeprefix(self.out).strip("/") for url in results.damaged(self.out, whole)]

    def lost(self, cells: Sequence[Cell]) -> int:
        """Of one side: how many cells failed or have no number."""
        return sum(cell.key in self.numberless for cell in cells) + max((self._failed_beside.get(cell.key, 0) for cell in cells), default=0)

    def under_floor(self, cells: Sequence[Cell]) -> bool:
        """Whether a trivial predictor does better than one side's mean on test images."""
        metric = results.headline(cells)
        if metric is None:
            return False
        return bool(study_floors.not_reached(self.floors.under(cells), metric, results.mean_sd(c.value(metric) for c in cells)[0]))

    def card(self, dataset: str) -> dict[str, Any]:
        return (self.manifests.get(dataset) or {}).get("card") or {}

    def unit(self, metric: str, dataset: str) -> str:
        """The metric in the field's words, naming the stratum where the card does: `AUROC within source`."""
        word = results.WORDS.get(metric, metric)
        return word.replace("stratum", str(self.card(dataset).get("stratify_by") or "stratum"))

    def where(self, one: Cell | Finding) -> list[str]:
        """What of a setting varies in this study, as short as that allows: `["resnet18", "linear", "10 % of the labels"]`."""
        settings = (("architecture", one.architecture), ("strategy", one.setting), ("resolution", f"{one.resolution} px"))
        parts = [str(text) for name, text in settings if len(self.varied[name]) > 1]
        return parts + ([results.share(float(one.fraction))] if len(self.varied["fraction"]) > 1 else [])

    def sources(self) -> list[str]:
        """Sources in the order of the study file, then any others."""
        there = {c.source: None for c in self.cells}
        return list(dict.fromkeys([row["source"] for row in self.plan if row["source"] in there] + list(there)))

    def headlines(self, limit: int = 6) -> list[tuple[str, str]]:
        """(class, sentence) of what is said first: declared differences, then other comparisons, then controls; one line for the rest."""
        rank = {"claim": 0, "gain": 1, "chain": 1, "own": 3, "exposed": 3, "control": 2}
        ordered = sorted(self.findings, key=lambda f: 0 if f.declared and f.kind != "control" else rank[f.kind])
        controls = sorted((f for f in ordered if f.kind == "control"), key=lambda f: not f.declared)
        others = [f for f in ordered if f.kind != "control"]
        shown = others[: max(limit - 2, limit - len(controls))]
        shown += controls[: limit - len(shown)]
        lines = [(f.mark, f.sentence(self, brief=True)) for f in shown]
        if len(self.findings) > len(shown):
            lines.append(("none", f"{len(self.findings) - len(shown)} more comparisons are in the report"))
        return lines

    def answer(self, limit: int = 6) -> str:
        """The study's answer in words, in one line."""
        if not self.cells:
            return self._unread() + (f"no finished cell yet (0 of {self.asked})" if self.asked else "no finished cell yet")
        low = self.floors.warning()
        said = "; ".join(sentence for _, sentence in self.headlines(limit)) or "no two sources can be compared"
        return self.lead() + (f"{low}; " if low else "") + said

    def lead(self) -> str:
        """What is missing, before anything is said."""
        lead = self._unread()
        lead += f"{len(self.cells)} of {self.asked} cells finished: " if self.missing else ""
        return lead + (f"{len(self.numberless)} of {len(self.cells)} have no number on test images: " if self.numberless else "")

    def _unread(self) -> str:
        """Damaged files, in words."""
        more = f" and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"{self.damaged[0]}{more} cannot be read (run the study again); " if self.damaged else ""


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


def judge(evidence: Evidence) -> list[Entry]:
    """The ledger of the study's claims."""
    where = storage.join(evidence.out, "study.yaml")
    claims = [parse(claim, Claim, f"{where}: claims") for claim in evidence.study.get("claims") or []]
    known = registrations(evidence.out)
    evidence.withdrawn = [name for sha, (name, _) in known.items() if sha not in {claim.sha256 for claim in claims}]

    def apart(cell: Cell) -> str:
        if cell.own_source or evidence.exposed(cell):
            return APART["own" if cell.own_source else "exposed"]
        return f"cells of it {SELECTED}" if evidence.lost([cell]) else ""

    early = {sha: before for sha, (_, before) in known.items()}
    return ledger.ledger(evidence.cells, claims, early, evidence.compared, apart, evidence.independent, evidence.plan)


def of_claim(entry: Entry) -> Finding:
    """A row of the ledger among the other findings."""
    held = entry.setting
    strategy = held.get("strategy") or {}
    options = results.canonical({name: value for name, value in strategy.items() if name != "name"})
    named = (str(held.get("architecture", "")), str(strategy.get("name", "")), options, str(held.get("task", "")), entry.dataset)
    numbers = (float(held.get("fraction", 0)), int(held.get("resolution", 0)))
    sides = (entry.claim.comparison.a.words(), entry.claim.comparison.b.words())
    return Finding("claim", *sides, *named, *numbers, entry.metric, entry.comparison, entry.adjusted, entry)


def find(evidence: Evidence, bootstrap: Bootstrap | None = None) -> list[Finding]:
    """All comparisons of the study, Holm-adjusted; its claims first, which also become `evidence.ledger`."""
    evidence.comparisons = Comparisons(evidence.out, bootstrap or Bootstrap())
    evidence.ledger = judge(evidence)
    order = list(dict.fromkeys([row["source"] for row in evidence.plan] + evidence.sources()))
    random = _random(evidence)
    weights = {cell.source: str(cell.result.get("encoder_sha256") or "") for cell in evidence.cells}
    pairs = [(a, b) for a in order for b in order if a != b]
    twin = {frozenset(pair) for pair in pairs if weights.get(pair[0]) and weights.get(pair[0]) == weights.get(pair[1])}
    same = twin | {frozenset(pair) for pair in pairs if set(pair) <= random}
    asked: list[tuple[str, Named, int, list[Cell], list[Cell], str]] = []
    planned: dict[Named, str] = {}
    there: set[Named] = set()
    for (architecture, rest), sides, held in _settings(evidence):
        metric = results.headline(cell for own in held.values() for cell in own)
        for kind, one, other in pairs_of(evidence.study, [source for source in order if source in sides], same, random):
            name = named(architecture, rest, one, other)
            if min(sides[one].cells, sides[other].cells) > 1:
                there.add(name)
            if min(len(sides[one].units), len(sides[other].units)) > 1:
                planned[name] = kind
            if one in held and other in held and metric:
                missing = sum(sides[source].cells - len(held[source]) for source in (one, other))
                asked.append((kind, name, missing, held[one], held[other], metric))
    evidence.comparisons.make([(a, b, metric) for *_, a, b, metric in asked if not evidence.lost(a) + evidence.lost(b)])
    registered = family_of(evidence.out)
    gone = _withdrawn((name for name, held in registered.items() if held.several), there)
    evidence.dropped = _in_words(gone)
    early = {name for name, held in registered.items() if held.early}
    late = {name for name in planned if registered and name[0] and not early & {name, ("", *name[1:])}}
    found, names = [], []
    for kind, name, missing, a, b, metric in asked:
        apart = "own" if any(c.own_source for c in (*a, *b)) else "exposed" if any(map(evidence.exposed, (*a, *b))) else ""
        architecture, strategy, options, task, fraction, resolution = a[0].group
        setting = (architecture, strategy, options, task, a[0].dataset, fraction, resolution, metric)
        compared = evidence.compared(a, b, metric)
        found.append(Finding(apart or kind, a[0].source, b[0].source, *setting, compared, late=name in late, missing=missing))
        names.append(name)
    controls = [registered[name].early for name in gone if registered[name].kind == "control"]
    found, _ = _adjust(found, names, ("control",), planned, late, controls)
    if not evidence.ledger:
        left = [registered[name].early for name in gone if registered[name].kind != "control"]
        left += [early for name, early in registrations(evidence.out).values() if name in evidence.withdrawn]
        found, evidence.corrected = _adjust(found, names, ("gain", "chain"), planned, late, left)
    return [*(of_claim(entry) for entry in evidence.ledger if entry.metric), *found]


def named(architecture: str, rest: str, one: str, other: str) -> Named:
    """A comparison as the diary has it."""
    return architecture, rest, min(one, other), max(one, other)


def _withdrawn(registered: Iterable[Named], there: Collection[Named]) -> list[Named]:
    """Comparisons that are there no longer. One whose weights' architecture was or is not known is the same in any."""
    rest, unknown = {name[1:] for name in there}, {name[1:] for name in there if not name[0]}
    return [name for name in registered if name not in there and name[1:] not in (unknown if name[0] else rest)]


def _in_words(names: Iterable[Named]) -> list[str]:
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


def _random(evidence: Evidence) -> set[str]:
    """Sources that are random initializations, also those without a finished cell."""
    first = {cell.source: cell for cell in reversed(evidence.cells)}
    return _named_random(evidence.study) | {source for source, cell in first.items() if is_random(cell)}


def setting_of(row: Mapping[str, Any]) -> list[Any]:
    """What two rows of a plan must share for their sources to be compared, the architecture first.

    Of a search the strategy as it was asked for: sources whose cuts it chose otherwise are compared all the same.
    """
    return [*(row[name] for name in ("architecture", "strategy", "task", "fraction", "resolution")), row.get("asked") or row.get("options")]


Side = tuple[set[Any], list[str]]  # of a source: its units (pretraining seed, fine-tuning seed), and the keys of its cells


def failed_beside(rows: Sequence[Mapping[str, Any]], failed: Collection[str]) -> dict[str, int]:
    """By the key of a cell how many cells of its source in its setting failed, where any did."""
    groups: dict[str, list[str]] = {}
    for row in rows if failed else ():
        groups.setdefault(results.canonical([*setting_of(row), row["source"]]), []).append(row["key"])
    return {key: lost for keys in groups.values() if (lost := sum(key in failed for key in keys)) for key in keys}


def losses(out: str) -> dict[str, int]:
    """`failed_beside` of the cells whose last attempt failed."""
    done = storage.holding(storage.join(out, "cells"), "result.json")
    return failed_beside(results.expected(out), results.failures(out).keys() - set(done))


def counted(out: str, cells: Iterable[Cell]) -> list[Cell]:
    """Cells that sources may be ranked by: not of labels that theirs has seen nor, unless the study ranks them, of images it may have, and
    none of a setting that lost another of them."""
    ranked, beside = results.read_study(out).get("exposed") == "ranked", losses(out)
    return [cell for cell in cells if not cell.own_source and (ranked or not cell.exposed_to) and cell.key not in beside]


def in_settings(rows: Sequence[Mapping[str, Any]], study: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Side]]:
    """Of each setting (architecture, digest of the rest) by source what the study asks for: units, none of those that are evidence for
    nothing, and keys."""
    spelled: dict[str, dict[str, Side]] = {}
    for row in rows:
        units, keys = spelled.setdefault(results.canonical(setting_of(row)), {}).setdefault(row["source"], (set(), []))
        apart = row.get("own_source") or (row.get("exposed_to") and study.get("exposed") != "ranked")
        units.update([] if apart else [(row.get("source_seed"), row["seed"])])
        keys.append(row["key"])
    held = [(json.loads(text), sides) for text, sides in spelled.items()]
    return {(str(architecture), digest(rest)[:DIGITS]): sides for (architecture, *rest), sides in held}


class Asked(NamedTuple):
    """Of one side what the plan has: units that are evidence, and cells."""

    units: set[Any]
    cells: int


def _settings(evidence: Evidence) -> Iterable[tuple[tuple[str, str], dict[str, Asked], dict[str, list[Cell]]]]:
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


def _adjust(
    found: list[Finding],
    names: Sequence[Named],
    kinds: tuple[str, ...],
    planned: Mapping[Named, str],
    late: set[Named],
    gone: Sequence[bool],
) -> tuple[list[Finding], int]:
    """The findings after Holm's correction of one family, and its size; of what is planned or was, and has no p, it is 1.

    gone: of each that is planned no longer, whether it was registered before its results stood.
    """
    adjusted = list(found)
    at = [i for i, f in enumerate(found) if f.kind in kinds and f.comparison.basis == "seeds and patients"]
    has = {names[i] for i in at}
    without = [name for name, kind in planned.items() if kind in kinds and name not in has]
    p = [*(found[i].comparison.p for i in at), *(1.0 for _ in without)]
    corrected = ledger.corrected(p, [*(found[i].late for i in at), *(name in late for name in without)], gone)
    for i, (value, size) in zip(at, corrected, strict=False):
        adjusted[i] = replace(found[i], adjusted=value, family=size)
    return adjusted, min((size for _, size in corrected), default=len(gone))


def floors_of(out: str, cells: Sequence[Cell], compute: bool) -> study_floors.StudyFloors:
    """Floors of the tasks of finished cells, of those that the study still asks for; without `compute` only what stands in OUT/analyses."""
    planned = results.planned(out)
    asked = [cell for cell in cells if not cell.shuffled and (cell.key in planned or not planned)]
    shards = results.shard_urls(out, asked)
    manifests = {name: results.read_json(storage.join(url, "manifest.json")) for name, url in shards.items()}
    return study_floors.of_study(Evidence(out, {}, asked, [], [], {}, [], manifests, shards), compute)


def gather(out: str, bootstrap: Bootstrap | None = None) -> Evidence:
    """Read OUT and compute the findings. Works on an empty, running or partly failed study."""
    study, found = results.read_study(out), results.finished(out)
    # A study may grow or change under one `out`: cells of an earlier plan stay in results.csv but are no evidence for this one.
    planned = results.planned(out)
    every = [cell for cell in found if cell.key in planned] if planned else found
    cells, controls = [c for c in every if not c.shuffled], [c for c in every if c.shuffled]
    shards = results.shard_urls(out, every)
    manifests = {name: results.read_json(storage.join(url, "manifest.json")) for name, url in shards.items()}
    held = {cell.key for cell in every}
    failed = {key: why for key, why in results.failures(out).items() if key not in held}
    evidence = Evidence(out, study, cells, controls, results.absent(out, cells), failed, results.pretrainings(out), manifests, shards)
    evidence.earlier, evidence.finished = len(found) - len(every), found
    evidence.findings = find(evidence, bootstrap)
    return evidence
