"""A finding: one comparison of two sources in one setting, and what is said of it, in the report and in the terminal alike.

finding.sentence(evidence); finding.declared, finding.mark, finding.about; significance(evidence)        # a table of all of them

What is compared, and why these, is analysis.family.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import results
from analysis.claims import PRETRAINING_SEEDS
from analysis.ledger import LOW, Entry, one_seed, signed
from analysis.statistics import Comparison

if TYPE_CHECKING:
    from analysis.evidence import Evidence

LEVEL = 0.05
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
    late: bool = False  # it was not registered before results of both its sides stood
    family: int = 0  # how many Holm's correction ran over
    missing: int = 0  # cells of its sides that have no result yet
    low: bool = False  # both sides are under a floor of their task

    @property
    def compared(self) -> tuple[object, ...]:
        """What is compared, in either order: the same of a claim about two sources and of the study's own comparison of the two."""
        setting = (self.architecture, self.strategy, self.options, self.task, self.fraction, self.resolution)
        return frozenset((self.a, self.b)), *setting, self.metric

    @property
    def tested(self) -> float:
        """The p that Holm's correction took: of a claim that of what it must rule out; NaN of what is in no family."""
        return self.entry.p if self.entry is not None else self.comparison.p if math.isfinite(self.adjusted) else math.nan

    @property
    def declared(self) -> bool:
        if self.entry is not None:
            return self.entry.verdict == "holds" and self.comparison.basis == "seeds and patients"
        return self.kind not in APART and self.comparison.basis == "seeds and patients" and self.adjusted < LEVEL

    @property
    def detectable(self) -> float:
        """`Comparison.detectable`; NaN of one seed, with which nothing is declared."""
        return self.comparison.detectable if self.comparison.basis == "seeds and patients" else math.nan

    @property
    def mark(self) -> str:
        """How the page marks it: good, worse, bad (a flagged control) or none."""
        if self.entry is not None:
            return {"holds": "good", "fails": "worse"}.get(self.entry.verdict, "none")
        if not self.declared:
            return "none"
        return "bad" if self.kind == "control" else "good" if self.comparison.estimate > 0 else "worse"

    @property
    def about(self) -> str:
        """What may be claimed: methods need at least 3 pretraining seeds, and a claim speaks of no more than it was written for."""
        if self.entry is not None:
            whole = self.entry.claim.about == "methods" and self.entry.pretraining_seeds >= PRETRAINING_SEEDS
            return "methods" if whole else "encoders (these weights)"
        return self.comparison.about

    def words(self, evidence: "Evidence") -> str:
        """Where and in which setting, as short as the study allows: `phantom-chest`, `dxc14, linear, 10 % of the labels`."""
        return ", ".join([self.task, *evidence.where(self)])

    @property
    def setting(self) -> str:
        return results.setting(self.strategy, self.options)

    def sentence(self, evidence: "Evidence", brief: bool = False) -> str:
        """The finding in words; the same in the report and in the terminal."""
        if self.entry is not None:
            return self.entry.sentence()
        c, unit = self.comparison, evidence.unit(self.metric, self.dataset)
        where = "" if brief and self.kind == "control" and evidence.single else f" on {self.words(evidence)}"
        where += f" ({self.about.removeprefix('encoders (').removesuffix(')')})" if self.kind in ("gain", "chain") else ""
        if c.basis == "not comparable":
            return f"{self.a} against {self.b}{where}: not comparable, {c.why}"
        numbers = effect(c, unit) + (", ADDED AFTER THE RESULTS" if self.late and self.kind not in APART else "")
        numbers += f", {LOW}" if self.low else ""
        single = one_seed(self.missing) if c.basis == "patients only" else ""
        if self.kind in APART:
            return f"{self.a} against {self.b}{where}: {numbers}, {APART[self.kind]}, {single or 'nothing declared'}"
        if self.declared:
            if self.kind == "control":
                return f"{self.a} against {self.b}{where}: FLAGGED, {numbers}, though the two are the same source"
            verb = "beats" if c.estimate > 0 else "is worse than"
            return f"{self.a} {verb} {self.b}{where}: {numbers}"
        if single:
            return f"{self.a} against {self.b}{where}: {numbers}, {single}"
        if c.excludes_zero:
            control = self.kind == "control"
            if evidence.ledger and not control:
                return f"{self.a} against {self.b}{where}: {numbers}, no claim of this study, nothing declared"
            after = f"after correction for {self.family} {'controls' if control else 'comparisons'}"
            return f"{self.a} against {self.b}{where}: {numbers}, not {'flagged' if control else 'declared'} {after}"
        return f"{self.a} against {self.b}{where}: no difference shown ({numbers}, {decimal(c.width)} wide)"


def decimal(value: float) -> str:
    return f"{value:z.3f}" if math.isfinite(value) else "unbounded"


def effect(c: Comparison, unit: str) -> str:
    """`+0.110 AUROC [0.060, 0.160]`."""
    return f"{signed(c.estimate)} {unit} [{decimal(c.low)}, {decimal(c.high)}]"


def brief(c: Comparison) -> str:
    """The difference without its metric, saying where its interval is over patients alone; else why there is none."""
    if not math.isfinite(c.estimate):
        return c.why
    return effect(c, "").replace("  ", " ") + (", patients only" if c.basis == "patients only" else "")


def significance(evidence: "Evidence") -> pd.DataFrame:
    """Table of the findings, one row a comparison, as written to significance.csv. Effects in the metric's own unit (fractions). p is
    two-sided, of no difference; p_tested what Holm's correction took, p_holm what it made of that."""
    rows = []
    for f in evidence.findings:
        c = f.comparison
        shared = {
            name: getattr(f, name) for name in ("kind", "a", "b", "architecture", "strategy", "options", "task", "dataset", "fraction")
        }
        own = {name: getattr(c, name) for name in ("estimate", "low", "high", "se", "df", "p")}
        rest = {name: getattr(c, name) for name in ("basis", "units", "patients", "images", "seed_variance", "patient_variance", "redrawn")}
        least = {"detectable": f.detectable, "claim": f.about, "per_seed": " ".join(f"{d:.6g}" for d in c.per_seed)}
        words = {"resolution": f.resolution, "metric": f.metric}
        told: dict[str, Any] = {"why": c.why, "late": f.late}
        if f.entry:
            told = {"name": f.entry.claim.name, "verdict": f.entry.verdict, "why": f.entry.why, "late": f.entry.late}
        holm = {"p_tested": f.tested, "p_holm": f.adjusted, "declared": f.declared}
        rows.append({**shared, **words, **own, **holm, **rest, **least, **told})
    return pd.DataFrame(rows)
