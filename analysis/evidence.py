"""The findings of a study: which comparisons it holds, what each says, and in which words.

evidence = gather(out); evidence.answer(); [finding.sentence(evidence) for finding in evidence.findings]

The family of comparisons is fixed by the study file before a number is seen. A study with claims has its claims, and Holm's correction
runs over them alone (analysis.ledger); what else could be compared is printed and never declared. Any other study has every source
against the baseline (the first random source, else the first), each link of a continual chain against the one before it, and, as a
control, a source against its twin under another name (A/A): Holm's runs over the first two kinds together, and over the controls by
themselves in either case; each over every one that is planned with two seeds a side, whether or not its cells have come. A statement
is declared when its adjusted p is under 0.05 and its interval holds seeds and patients; everything else reads "no difference" with its
interval, which only means that 0 is inside.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import ledger, results
from analysis.claims import PRETRAINING_SEEDS, Claim
from analysis.comparisons import Comparisons
from analysis.ledger import Entry
from analysis.results import Cell, Pretraining
from analysis.statistics import Bootstrap, Comparison, Scores, detectable, holm
from base import storage
from base.config import parse

LEVEL = 0.05
HELD = 48  # predictions of cells in memory, some 10 MB each where 25,000 test images have 14 labels
APART = {"own": "own source (its pretraining saw these labels)", "exposed": "exposed (its pretraining may have seen these test images)"}


@dataclass(frozen=True)
class Finding:
    """One comparison of two sources in one setting. `kind`: "gain", "chain", "control" (A/A), "own" (pretrained on these labels),
    "exposed" (pretrained on corpora that may hold these test images) or "claim": then `entry` is its row of the ledger, a and b are its
    sides in words, and of the setting what is compared is empty or 0."""

    kind: str
    a: str
    b: str
    architecture: str
    strategy: str
    options: str
    task: str
    dataset: str
    fraction: float
    resolution: int
    metric: str
    comparison: Comparison
    adjusted: float = math.nan
    entry: Entry | None = None

    @property
    def declared(self) -> bool:
        if self.entry is not None:
            return self.entry.verdict != "underpowered"
        return self.kind not in APART and self.comparison.basis == "seeds and patients" and self.adjusted < LEVEL

    @property
    def mark(self) -> str:
        """How the page marks it: good, worse, bad (a flagged control) or none."""
        if not self.declared:
            return "none"
        if self.entry is not None:
            return "good" if self.entry.verdict == "holds" else "worse"
        return "bad" if self.kind == "control" else "good" if self.comparison.estimate > 0 else "worse"

    @property
    def about(self) -> str:
        """What may be claimed: methods need at least 3 pretraining seeds, and a claim speaks of no more than it was written for."""
        if self.entry is not None:
            return "methods" if self.entry.claim.about == "methods" else "encoders (these weights)"
        return "methods" if self.comparison.pretraining_seeds >= PRETRAINING_SEEDS else "encoders (these weights)"

    def words(self, evidence: "Evidence") -> str:
        """Where and in which setting, as short as the study allows: `phantom-chest`, `dxc14, linear, 10 % of the labels`."""
        parts = [self.dataset if len(evidence.tasks.get(self.dataset, ())) < 2 else self.task]
        settings = (("architecture", self.architecture), ("strategy", self.setting), ("resolution", f"{self.resolution} px"))
        parts += [text for name, text in settings if len(evidence.varied[name]) > 1]
        if len(evidence.varied["fraction"]) > 1:
            parts.append(f"{self.fraction * 100:g} % of the labels")
        return ", ".join(parts)

    @property
    def setting(self) -> str:
        return f"{self.strategy} {self.options}".strip()

    def sentence(self, evidence: "Evidence", brief: bool = False) -> str:
        """The finding in words; the same in the report and in the terminal."""
        if self.entry is not None:
            return self.entry.sentence()
        c, unit = self.comparison, evidence.unit(self.metric, self.dataset)
        where = "" if brief and self.kind == "control" and evidence.single else f" on {self.words(evidence)}"
        if c.basis == "not comparable":
            return f"{self.a} against {self.b}{where}: not comparable, {c.why}"
        numbers = effect(c, unit)
        if self.kind in APART:
            return f"{self.a} against {self.b}{where}: {numbers}, {APART[self.kind]}, nothing declared"
        if self.declared:
            if self.kind == "control":
                return f"{self.a} against {self.b}{where}: FLAGGED, {numbers}, though the two are the same source"
            verb = "beats" if c.estimate > 0 else "is worse than"
            return f"{self.a} {verb} {self.b}{where}: {numbers}"
        if c.basis == "patients only":
            return f"{self.a} against {self.b}{where}: {numbers}, one seed: patients only, nothing declared"
        if c.excludes_zero:
            control = self.kind == "control"
            if evidence.ledger and not control:
                return f"{self.a} against {self.b}{where}: {numbers}, no claim of this study, nothing declared"
            size = sum(f.kind == "control" for f in evidence.findings) if control else evidence.family
            after = f"after correction for {size} {'controls' if control else 'comparisons'}"
            return f"{self.a} against {self.b}{where}: {numbers}, not {'flagged' if control else 'declared'} {after}"
        return f"{self.a} against {self.b}{where}: no difference ({numbers}, {decimal(c.width, digits(c))} wide)"


def digits(c: Comparison) -> int:
    """Two decimals, three where two would hide which side of 0 a bound is on or the whole effect."""
    near = min(abs(c.low), abs(c.high))
    return 3 if abs(c.estimate) < 0.02 or near < 0.005 else 2


def decimal(value: float, places: int) -> str:
    return f"{value:.{places}f}" if math.isfinite(value) else "unbounded"


def effect(c: Comparison, unit: str) -> str:
    """`+0.11 AUROC [0.06, 0.16]`."""
    places = digits(c)
    return f"{c.estimate:+.{places}f} {unit} [{decimal(c.low, places)}, {decimal(c.high, places)}]"


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
    earlier: int = 0  # finished cells that the present plan no longer asks for
    finished: list[Cell] | None = None  # every one, those of an earlier plan and the controls included
    comparisons: Comparisons = field(init=False)
    corrected: int = 0  # of a study without claims: how many comparisons Holm's correction ran over

    def __post_init__(self) -> None:
        self._planned = [cell["source"] for cell in results.expected(self.out)]
        self.varied = {name: {getattr(c, name) for c in self.cells} for name in ("architecture", "resolution", "fraction")}
        self.varied["strategy"] = {(c.strategy, c.options) for c in self.cells}
        self.tasks: dict[str, set[str]] = {}
        for cell in self.cells:
            self.tasks.setdefault(cell.dataset, set()).add(cell.task)

    @property
    def single(self) -> bool:
        """One setting only: the words need not say which."""
        return len({cell.group() for cell in self.cells}) == 1

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

    def card(self, dataset: str) -> dict[str, Any]:
        return (self.manifests.get(dataset) or {}).get("card") or {}

    def unit(self, metric: str, dataset: str) -> str:
        """The metric in the field's words, naming the stratum where the card does: `AUROC within source`."""
        word = results.WORDS.get(metric, metric)
        return word.replace("stratum", str(self.card(dataset).get("stratify_by") or "stratum"))

    def sources(self) -> list[str]:
        """Sources in the order of the study file, then any others."""
        there = {c.source: None for c in self.cells}
        return list(dict.fromkeys([s for s in self._planned if s in there] + list(there)))

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
            return f"no finished cell yet (0 of {self.asked})" if self.asked else "no finished cell yet"
        lead = f"{len(self.cells)} of {self.asked} cells finished: " if self.missing else ""
        return lead + ("; ".join(sentence for _, sentence in self.headlines(limit)) or "no two sources to compare")


def scores(cell: Cell) -> Scores | None:
    """Test predictions of a cell as arrays; None when they were not kept or hold a score that is not a number."""
    frame = results.predictions(cell)
    if frame is None:
        return None
    held = [name.removeprefix("score_") for name in frame.columns if name.startswith("score_")]
    # Some tasks train on labels that they do not measure.
    measured = {row.get("class") for row in cell.result.get("metrics", [])}
    labels = [label for label in held if label in measured] or held
    dice, iou = (frame[name].to_numpy(float) if name in frame and frame[name].notna().any() else None for name in ("dice", "iou"))
    target = score = strata = true = decided = None
    if labels and dice is None:
        score = frame[[f"score_{label}" for label in labels]].to_numpy(float)
        target = frame[[f"target_{label}" for label in labels]].to_numpy(float)
        target = np.where(target < 0, math.nan, target)
        if not np.isfinite(score).all():
            return None
        if "decided" in frame:
            true = frame[[f"target_{label}" for label in held]].to_numpy(float).argmax(1)
            decided = np.array([held.index(label) for label in frame["decided"]], np.int64)
    if "stratum" in frame.columns and frame["stratum"].notna().any():
        known = zip(frame["stratum"], frame["stratum"].notna(), strict=True)
        strata = np.array([str(value) if there else None for value, there in known], object)
    # An image without a patient is a patient of its own.
    named = zip(frame["patient"], frame["sample_id"], strict=True)
    patients = np.array([str(patient) if patient else f"image {image}" for patient, image in named], object)
    ids = frame["sample_id"].to_numpy(str)
    return Scores(int(cell.seed), ids, patients, target, score, dice, strata, cell.source_seed, iou, true, decided)


def _pairs(study: dict[str, Any], sources: list[str], same: set[frozenset[str]], random: set[str]) -> Iterable[tuple[str, str, str]]:
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


class Loaded:
    """Predictions of cells, the HELD last ones kept: a study of 10,000 cells has more of them than memory."""

    def __init__(self) -> None:
        self._held: dict[str, Scores | None] = {}

    def __call__(self, cell: Cell) -> Scores | None:
        found = self._held.pop(cell.key) if cell.key in self._held else scores(cell)
        self._held[cell.key] = found
        if len(self._held) > HELD:
            del self._held[next(iter(self._held))]
        return found


def registrations(out: str) -> dict[str, tuple[str, bool]]:
    """Claims that were ever in the study file, by sha256: their name, and whether they came before their results. See cluster.claims."""
    found: dict[str, tuple[str, bool]] = {}
    for row in results.read_rows(storage.join(out, "events.jsonl")):
        if row.get("event") == "claim":
            found.setdefault(str(row["sha256"]), (str(row["claim"]), not row["standing"]))
    return found


def judge(evidence: Evidence, load: Loaded) -> list[Entry]:
    """The ledger of the study's claims."""
    where = storage.join(evidence.out, "study.yaml")
    claims = [parse(claim, Claim, f"{where}: claims") for claim in evidence.study.get("claims") or []]
    known = registrations(evidence.out)
    evidence.withdrawn = [name for sha, (name, _) in known.items() if sha not in {claim.sha256 for claim in claims}]
    drawn = {cell.source: is_random(cell) for cell in {cell.source: cell for cell in evidence.cells}.values()}

    def apart(cell: Cell) -> str:
        return APART["own"] if cell.own_source else APART["exposed"] if evidence.exposed(cell) else ""

    early, planned = {sha: before for sha, (_, before) in known.items()}, results.expected(evidence.out)
    compared = functools.partial(evidence.comparisons.of, load=load)
    return ledger.ledger(evidence.cells, claims, early, compared, apart, lambda cell: drawn[cell.source], planned)


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
    bootstrap, load = bootstrap or Bootstrap(), Loaded()
    evidence.comparisons = Comparisons(evidence.out, bootstrap)
    evidence.ledger = judge(evidence, load)
    order = evidence.sources()
    random = {source for source in order if is_random(next(cell for cell in evidence.cells if cell.source == source))}
    weights = {cell.source: str(cell.result.get("encoder_sha256") or "") for cell in evidence.cells}
    pairs = [(a, b) for a in order for b in order if a != b]
    same = {frozenset(pair) for pair in pairs if set(pair) <= random or (weights[pair[0]] and weights[pair[0]] == weights[pair[1]])}
    found = []
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in evidence.cells:
        groups.setdefault(cell.group(), []).append(cell)
    for group, cells in groups.items():
        held = results.by(cells, "source")
        sources = [source for source in order if (source,) in held]
        metric = next((m for m in results.PRIMARY if any(cell.primary() == m for cell in cells)), None)
        if len(sources) < 2 or metric is None:
            continue
        for kind, a, b in _pairs(evidence.study, sources, same, random):
            two = [cell for source in (a, b) for cell in held[(source,)]]
            apart = "own" if any(cell.own_source for cell in two) else "exposed" if any(map(evidence.exposed, two)) else ""
            result = evidence.comparisons.of(held[(a,)], held[(b,)], metric, load)
            architecture, strategy, options, task, fraction, resolution = group
            setting = (architecture, strategy, options, task, cells[0].dataset, fraction, resolution, metric)
            found.append(Finding(apart or kind, a, b, *setting, result))
    planned = _planned(evidence, same, random)
    found, _ = _adjust(found, ("control",), planned)
    if not evidence.ledger:
        found, evidence.corrected = _adjust(found, ("gain", "chain"), planned)
    return [*(of_claim(entry) for entry in evidence.ledger if entry.metric), *found]


def _planned(evidence: Evidence, same: set[frozenset[str]], random: set[str]) -> list[str]:
    """Kind of every comparison that the study asks for with two seeds a side or more, whether or not its cells are there."""
    units: dict[str, dict[str, set[Any]]] = {}
    for row in results.expected(evidence.out):
        apart = row.get("own_source") or (row.get("exposed_to") and evidence.study.get("exposed") != "ranked")
        group = [row[name] for name in ("architecture", "strategy", "task", "fraction", "resolution")] + [row.get("options")]
        if not apart:
            units.setdefault(results.canonical(group), {}).setdefault(row["source"], set()).add((row.get("source_seed"), row["seed"]))
    order = list(dict.fromkeys(row["source"] for row in results.expected(evidence.out)))
    kinds = []
    for held in units.values():
        sources = [source for source in order if source in held]
        pairs = _pairs(evidence.study, sources, same, random)
        kinds += [kind for kind, a, b in pairs if min(len(held[a]), len(held[b])) > 1]
    return kinds


def _adjust(found: list[Finding], family: tuple[str, ...], planned: Sequence[str]) -> tuple[list[Finding], int]:
    """The findings after Holm's correction of one family, and its size; of what is planned and has no p it is 1."""
    adjusted = list(found)
    at = [i for i, f in enumerate(found) if f.kind in family and f.comparison.basis == "seeds and patients"]
    size = max(len(at), sum(kind in family for kind in planned))
    p = [found[i].comparison.p for i in at] + [1.0] * (size - len(at))
    for i, value in zip(at, holm(p), strict=False):
        adjusted[i] = replace(found[i], adjusted=value)
    return adjusted, size


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


def significance(evidence: Evidence) -> pd.DataFrame:
    """Table of the findings, one row a comparison, as written to significance.csv. Effects in the metric's own unit (fractions)."""
    rows = []
    for f in evidence.findings:
        c = f.comparison
        shared = {
            name: getattr(f, name) for name in ("kind", "a", "b", "architecture", "strategy", "options", "task", "dataset", "fraction")
        }
        own = {name: getattr(c, name) for name in ("estimate", "low", "high", "se", "df", "p")}
        rest = {name: getattr(c, name) for name in ("basis", "units", "patients", "images", "seed_variance", "patient_variance", "redrawn")}
        least = {"detectable": detectable(c), "claim": f.about, "per_seed": " ".join(f"{d:.6g}" for d in c.per_seed)}
        words = {"resolution": f.resolution, "metric": f.metric}
        told = {"name": f.entry.claim.name, "verdict": f.entry.verdict, "why": f.entry.why, "late": f.entry.late} if f.entry else {}
        rows.append({**shared, **words, **own, "p_holm": f.adjusted, "declared": f.declared, **rest, **least, **told})
    return pd.DataFrame(rows)
