"""The evidence of a study: all that its report is made of, and what its comparisons found.

with gather(out) as evidence: evidence.answer(); [finding.sentence(evidence) for finding in evidence.findings]

Which comparisons there are is fixed before a number is seen (analysis.family). A study with claims has its claims, and Holm's correction
runs over them alone (analysis.ledger); what else could be compared is printed and never declared. In any other study it runs over gains
and chains together, and over the A/A controls by themselves in either case; each over every one that is planned with two seeds a side,
whether or not its cells have come, and over those that were registered and are planned no longer, with p = 1. A late one is corrected for
all, and costs the others nothing. A statement is declared when its adjusted p is under 0.05 and its interval holds seeds and patients;
everything else reads "no difference shown" with its interval, which means that 0 is inside. A comparison is none where a cell of it failed
or has no number: those that did not are a selection.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

from analysis import diary, family, ledger, results, study_floors
from analysis.claims import Claim
from analysis.comparisons import Comparisons
from analysis.counted import failed_beside
from analysis.family import Family, Named
from analysis.findings import APART, Finding
from analysis.ledger import Entry
from analysis.replicates import Bootstrap
from analysis.results import Cell, Pretraining
from analysis.statistics import Comparison, not_comparable
from base import storage
from base.config import parse

SELECTED = "failed or ended without a number, and those that did not are a selection"


class Judged(NamedTuple):
    """What the comparisons say."""

    findings: list[Finding]
    ledger: list[Entry]  # of the study's claims
    withdrawn: list[str]  # claims that stood in the study file once and no longer do
    dropped: list[str]  # comparisons that were registered once and are planned no longer, in words
    corrected: int  # of a study without claims: how many comparisons Holm's correction ran over


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
    earlier: int = 0  # finished cells that the present plan no longer asks for
    finished: list[Cell] | None = None  # every one, those of an earlier plan and the controls included
    comparisons: Comparisons = field(init=False)

    def __post_init__(self) -> None:
        self.plan = results.expected(self.out)
        self.varied = {name: {getattr(c, name) for c in self.cells} for name in ("architecture", "resolution", "fraction")}
        self.varied["strategy"] = {(c.strategy, c.options) for c in self.cells}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.comparisons.end()

    @cached_property
    def pairs(self) -> Family:
        """The comparisons of its plan."""
        return family.of_evidence(self)

    @cached_property
    def judged(self) -> Judged:
        """What they found, which waits for those that are still being made."""
        return judge(self)

    @property
    def findings(self) -> list[Finding]:
        return self.judged.findings

    @property
    def ledger(self) -> list[Entry]:
        return self.judged.ledger

    @property
    def withdrawn(self) -> list[str]:
        return self.judged.withdrawn

    @property
    def dropped(self) -> list[str]:
        return self.judged.dropped

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
        return next((entry.family for entry in self.ledger if not entry.late), 0) if self.ledger else self.judged.corrected

    @property
    def asked(self) -> int:
        return len(self.cells) + len(self.missing)

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
        """Whether a trivial predictor does better than one side's mean on test images, by more than seeds vary."""
        metric = results.headline(cells)
        return metric is not None and bool(self.floors.standing(cells, metric).under)

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
        """(class, sentence) of what is said first: what is declared and claims that fail, then other comparisons, then controls; one line
        for the rest. What a claim is about is said by the claim alone."""
        claimed = {f.compared for f in self.findings if f.kind == "claim"}
        found = [f for f in self.findings if f.kind == "claim" or f.compared not in claimed]
        rank = {"claim": 2, "gain": 3, "chain": 3, "own": 4, "exposed": 4}

        def order(f: Finding) -> int:
            return 0 if f.declared else 1 if f.mark in ("good", "worse") else rank[f.kind]

        controls = sorted((f for f in found if f.kind == "control"), key=lambda f: not f.declared)
        others = sorted((f for f in found if f.kind != "control"), key=order)
        shown = others[: max(limit - 2, limit - len(controls))]
        shown += controls[: limit - len(shown)]
        lines = [(f.mark, f.sentence(self, brief=True)) for f in shown]
        if rest := len(found) - len(shown):
            lines.append(("none", f"{rest} more comparison{'s are' if rest > 1 else ' is'} in the report"))
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
        why = ", where no label of theirs has both values" if self._one_sided else ""
        return lead + (f"{len(self.numberless)} of {len(self.cells)} have no number on test images{why}: " if self.numberless else "")

    @cached_property
    def _one_sided(self) -> bool:
        """Whether the reason of those without a number is that every label of theirs is all positive or all negative on test images."""
        lost = [cell for cell in self.cells if cell.key in self.numberless]
        rows = [row for cell in lost for row in cell.metrics if row["split"] == "test" and row["metric"] == "prevalence"]
        return bool(rows) and all(row["value"] in (0, 1) for row in rows)

    def _unread(self) -> str:
        """Damaged files, in words."""
        more = f" and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"{self.damaged[0]}{more} cannot be read (run the study again); " if self.damaged else ""


def _ledger(evidence: Evidence, known: Mapping[str, tuple[str, bool]]) -> tuple[list[Entry], list[str]]:
    """The ledger of the study's claims, and the names of those that are no longer among them."""
    where = storage.join(evidence.out, "study.yaml")
    claims = [parse(claim, Claim, f"{where}: claims") for claim in evidence.study.get("claims") or []]
    withdrawn = [name for sha, (name, _) in known.items() if sha not in {claim.sha256 for claim in claims}]

    def apart(cell: Cell) -> str:
        return APART[cell.apart] if cell.apart else f"cells of it {SELECTED}" if evidence.lost([cell]) else ""

    early = {sha: before for sha, (_, before) in known.items()}
    judged_by = (evidence.compared, apart, evidence.independent, evidence.under_floor)
    return ledger.ledger(evidence.cells, claims, early, *judged_by, evidence.plan), withdrawn


def of_claim(entry: Entry) -> Finding:
    """A row of the ledger among the other findings."""
    held = entry.setting
    strategy = held.get("strategy") or {}
    options = results.canonical({name: value for name, value in strategy.items() if name != "name"})
    named = (str(held.get("architecture", "")), str(strategy.get("name", "")), options, str(held.get("task", "")), entry.dataset)
    numbers = (float(held.get("fraction", 0)), int(held.get("resolution", 0)))
    sides = (entry.claim.comparison.a.words(), entry.claim.comparison.b.words())
    return Finding("claim", *sides, *named, *numbers, entry.metric, entry.comparison, entry.adjusted, entry, low=entry.low)


def judge(evidence: Evidence) -> Judged:
    """All comparisons of the study, Holm-adjusted; its claims first."""
    claims = family.registrations(evidence.out)
    entries, withdrawn = _ledger(evidence, claims)
    pairs, planned, _ = evidence.pairs
    registered = family.family_of(evidence.out)
    gone, late = evidence.pairs.gone(registered), evidence.pairs.late(registered)
    found = []
    for kind, name, missing, a, b, metric in pairs:
        apart = {cell.apart for cell in (*a, *b)} - {""}
        architecture, strategy, options, task, fraction, resolution = a[0].group
        setting = (architecture, strategy, options, task, a[0].dataset, fraction, resolution, metric)
        compared = evidence.compared(a, b, metric)
        one = Finding(max(apart, default=kind), a[0].source, b[0].source, *setting, compared, late=name in late, missing=missing)
        found.append(replace(one, low=evidence.under_floor(a) and evidence.under_floor(b)))
    names, corrected = [pair.name for pair in pairs], 0
    controls = [registered[name].early for name in gone if registered[name].kind == "control"]
    found, _ = _adjust(found, names, ("control",), planned, late, controls)
    if not entries:
        left = [registered[name].early for name in gone if registered[name].kind != "control"]
        left += [early for name, early in claims.values() if name in withdrawn]
        found, corrected = _adjust(found, names, ("gain", "chain"), planned, late, left)
    claimed = [of_claim(entry) for entry in entries if entry.metric]
    return Judged([*claimed, *found], entries, withdrawn, family.in_words(gone), corrected)


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
    """Read OUT and begin the comparisons, whose processes end with the `with` of what is returned. Works on an empty, running or partly
    failed study."""
    comparisons = Comparisons(out, bootstrap or Bootstrap())
    if comparisons.fresh:
        comparisons.ready(len(storage.listing(storage.join(out, "cells"))))
    study, found, planned = results.read_study(out), results.finished(out), results.planned(out)
    # A study may grow or change under one `out`: cells of an earlier plan stay in results.csv but are no evidence for this one.
    every = [cell for cell in found if cell.key in planned] if planned else found
    cells, controls = [c for c in every if not c.shuffled], [c for c in every if c.shuffled]
    shards = results.shard_urls(out, every)
    manifests = {name: results.read_json(storage.join(url, "manifest.json")) for name, url in shards.items()}
    held = {cell.key for cell in every}
    failed = {key: why for key, why in diary.failures(out).items() if key not in held}
    evidence = Evidence(out, study, cells, controls, results.absent(out, cells), failed, results.pretrainings(out), manifests, shards)
    evidence.earlier, evidence.finished = len(found) - len(every), found
    evidence.comparisons = comparisons
    comparisons.begin([(a, b, metric) for *_, a, b, metric in evidence.pairs.pairs if not evidence.lost(a) + evidence.lost(b)])
    return evidence
