"""The ledger: every claim of a study beside what its results say of it: holds, fails, underpowered or not comparable, with the interval.

entries = ledger(evidence.cells, claims, registered, compared, planned=planned); entries[0].verdict, entries[0].sentence()

A directed claim holds when its difference goes its way and 0 is ruled out after Holm's correction over the claims, which is what its seeds
are planned for; that is its direction only, unless the 95 % interval rules out differences under its margin too. It fails when its own
interval, uncorrected, rules out every difference as large as its margin. A claim of equivalence holds when two one-sided tests rule out
differences of the margin both ways (Schuirmann 1987), again after Holm; it fails when its interval lies outside of the margins as a whole.
Everything else is underpowered, and so is a claim whose kind of seeds the study lacks: about methods takes 3 pretraining seeds of every
side. Not comparable is what no number of seeds settles: a side whose cells are evidence for nothing (own source, exposed, failed), or
curves that say nothing of speed. The family is what the study file held before it ran: every claim in every setting that is planned,
whether or not its cells have come, and those that were withdrawn since. A claim that was added when both of its sides stood already says
so and is corrected for all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from analysis import convergence, results, secondary
from analysis.claims import PRETRAINING_SEEDS, Claim, settings_of
from analysis.components import ROUNDING
from analysis.convergence import Curve
from analysis.power import observed
from analysis.results import Cell
from analysis.statistics import Comparison, holm, not_comparable

Verdict = Literal["holds", "fails", "underpowered", "not comparable"]
LEVEL = 0.05
LEAST_EVALUATIONS = 3  # of a run, under which a learning curve is its first value and little more
MOST = 1000  # seeds, and times the test patients, that are asked for


def axes_of(cell: Cell) -> dict[str, Any]:
    """A finished cell as claims see it."""
    kind = "segmentation" if cell.primary() in ("dice", "iou") else "classification"
    held = {name: cell.result[name] for name in ("architecture", "task")}
    numbers = {"fraction": float(cell.fraction), "resolution": int(cell.resolution)}
    return {
        **held,
        **numbers,
        "source": cell.source,
        "kind": kind,
        "strategy": {"name": cell.strategy, **(cell.result.get("options") or {})},
    }


def planned_axes(rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> list[tuple[str, dict[str, Any]]]:
    """(key, axes) of every planned cell. One without a result has the options of a finished one whose strategy was asked for in the same
    words, else those that were asked for; `kind` is missing where nothing of its task is finished."""
    done = {cell.key: axes_of(cell) for cell in cells}
    kinds = {str(axes["task"]): axes["kind"] for axes in done.values()}

    def words(row: Mapping[str, Any]) -> str:
        return results.canonical([row["strategy"], row.get("options")])

    strategies = {words(row): done[row["key"]]["strategy"] for row in rows if row["key"] in done}
    planned = []
    for row in rows:
        strategy = strategies.get(words(row), {"name": row["strategy"], **(row.get("options") or {})})
        held = {"architecture": row["architecture"], "task": row["task"], "source": row["source"], "kind": kinds.get(row["task"])}
        axes = {**held, "strategy": strategy, "fraction": float(row["fraction"]), "resolution": int(row["resolution"])}
        planned.append((str(row["key"]), done.get(row["key"], axes)))
    return planned


@dataclass(frozen=True)
class Entry:
    """A claim in one setting. `comparison` is a - b; p is that of the hypothesis which the claim must rule out, adjusted by Holm's."""

    claim: Claim
    setting: dict[str, Any]
    metric: str
    dataset: str
    comparison: Comparison
    pretraining_seeds: int  # of the side that has fewer; random weights are drawn anew with every fine-tuning seed
    late: bool = False  # the claim was not in the study file when its results were not yet there
    missing: int = 0  # cells of its sides that have no result yet
    adjusted: float = math.nan
    family: int = 1
    short: str = ""  # why the study cannot judge the claim at all, or ""
    level: float = math.nan  # of a claim about convergence, the one that both sides reach
    low: bool = False  # both sides are under a floor of their task
    comparable: bool = True  # no cell of its sides is evidence for nothing, nor are their curves of what is claimed

    @property
    def p(self) -> float:
        """One-sided for equivalence, the larger of its two; else two-sided, and 1 where the difference goes the other way."""
        c, claim = self.comparison, self.claim
        if self.short or not math.isfinite(c.estimate):
            return 1.0
        if claim.expect == "equivalent":
            if not c.se > 0:
                return 0.0 if abs(c.estimate) < claim.margin and math.isfinite(c.width) else 1.0
            inside, p = abs(c.estimate) < claim.margin, c.parts.p(abs(claim.margin - abs(c.estimate)) / c.se)
            return p / 2 if inside else 1 - p / 2
        return c.p if (c.estimate > 0) == (claim.expect == "greater") else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 %; for equivalence 90 %, which is what two one-sided tests at 5 % look at."""
        c = self.comparison
        if self.claim.expect != "equivalent" or not (c.se > 0 and c.df > 0):
            return c.low, c.high
        half = c.parts.critical(LEVEL) * c.se
        return c.estimate - half, c.estimate + half

    @property
    def contradicted(self) -> bool:
        """Whether the 95 % interval rules out what the claim says."""
        c, margin = self.comparison, self.claim.margin
        if self.short:
            return False
        if self.claim.expect == "greater":
            return c.high < margin
        if self.claim.expect == "less":
            return c.low > -margin
        return c.low > margin or c.high < -margin

    @property
    def verdict(self) -> Verdict:
        if not self.comparable:
            return "not comparable"
        if self.contradicted:
            return "fails"
        return "holds" if self.adjusted < LEVEL else "underpowered"

    @property
    def direction_only(self) -> bool:
        """Whether a claim holds by 0 being ruled out, and not differences under its margin."""
        c, margin = self.comparison, self.claim.margin
        if self.verdict != "holds" or self.claim.expect == "equivalent":
            return False
        return not (c.low >= margin if self.claim.expect == "greater" else c.high <= -margin)

    @property
    def why(self) -> str:
        """What stands behind the verdict, in words."""
        c, claim = self.comparison, self.claim
        if self.short:
            return self.short + (f", {one_seed(self.missing)}" if c.basis == "patients only" else "")
        if self.verdict == "fails":
            if claim.expect == "equivalent":
                way = "higher" if c.estimate > 0 else "lower"
                return f"{way} by {abs(c.estimate):.3f}: not equivalent within {claim.margin:g}, by its 95 % interval, uncorrected"
            return f"a difference of {self.wanted:+g} is ruled out by its 95 % interval, uncorrected"
        if self.verdict == "holds":
            size = f"; of its direction: a difference of {self.wanted:+g} is not shown" if self.direction_only else ""
            size += f"; equivalent within {claim.margin:g}" if claim.expect == "equivalent" else ""
            return f"p = {self.adjusted:.2g} after correction for {self.family} claim{'s' * (self.family != 1)}{size}"
        if self.p < LEVEL:
            return f"p = {self.p:.2g} alone, {self.adjusted:.2g} after correction for {self.family} claim{'s' * (self.family != 1)}"
        if claim.expect == "equivalent":
            ends = [f"{sign}{claim.margin:g}" for sign, end in (("-", -c.low), ("+", c.high)) if end > claim.margin]
            return f"the 95 % interval [{signed(c.low)}, {signed(c.high)}] reaches over {' and '.join(ends)}"
        return f"the interval holds 0 and {self.wanted:+g}"

    @property
    def wanted(self) -> float:
        """The difference that a directed claim needs."""
        return -self.claim.margin if self.claim.expect == "less" else self.claim.margin

    @property
    def about(self) -> str:
        """Of what the verdict speaks, never of more than was sampled."""
        seeds = f"{self.pretraining_seeds} pretraining seed{'' if self.pretraining_seeds == 1 else 's'}"
        return f"methods, {seeds}" if self.claim.about == "methods" else "these encoders"

    def needs(self) -> str:
        """What would settle it in 80 % of repetitions: so many seeds, else so many test patients, and where neither alone does, that. Empty
        for a claim that is settled or cannot be, or of whose variance nothing is known."""
        if self.verdict != "underpowered":
            return ""
        c, seeds = self.comparison, self.comparison.units
        if self.claim.about == "methods" and self.pretraining_seeds < PRETRAINING_SEEDS:
            return f"{PRETRAINING_SEEDS} pretraining seeds"
        if not (c.se > 0 and math.isfinite(c.seed_variance) and seeds > 1):
            return "more fine-tuning seeds" if c.basis == "patients only" else ""
        parts, alpha, equivalent = c.parts, LEVEL / self.family, self.claim.expect == "equivalent"

        def with_seeds(n: int) -> bool:
            held = replace(parts, seeds=parts.seeds * seeds / n, seeds_df=parts.seeds_df * (n - 1) / (seeds - 1))
            return observed(held, c.patients, alpha, equivalent) <= self.claim.margin

        def with_patients(times: int) -> bool:
            held = replace(parts, patients=parts.patients / times)
            return observed(held, c.patients * times, alpha, equivalent) <= self.claim.margin

        if number := _fewest(seeds, with_seeds):
            return f"{number} {'fine-tuning' if math.isnan(c.pretraining_variance) else 'pretraining'} seeds"
        if parts.patients > 0 and (number := _fewest(1, with_patients)):
            return f"{number} times the test patients"
        return "more seeds and more test patients: neither alone is enough" if c.patients else f"more than {MOST} seeds"

    def effect(self) -> str:
        """`+0.021 [0.004, 0.038]`, with its level where it is not 95 %."""
        if not math.isfinite(self.comparison.estimate):
            return "-"
        low, high = self.interval
        ends = f"{signed(low)}, {signed(high)}" if math.isfinite(low) else "unbounded"
        return f"{signed(self.comparison.estimate)} [{ends}]" + (" (90 %)" if self.claim.expect == "equivalent" else "")

    def where(self) -> str:
        """The setting in words."""
        held = self.setting
        strategy = held.get("strategy") or {}
        options = results.canonical({name: value for name, value in strategy.items() if name != "name" and value is not None})
        parts = [held.get("task"), held.get("source"), results.setting(strategy.get("name", ""), options), held.get("architecture")]
        parts.append(results.share(held["fraction"]) if held.get("fraction", 1) != 1 else None)
        return ", ".join(str(part) for part in parts if part)

    def sentence(self) -> str:
        """The claim with its verdict, in one sentence that says of what it speaks."""
        added = ", ADDED AFTER THE RESULTS" if self.late else ""
        added += f", {so_far(self.missing)}" if self.missing else ""
        numbers = f"{self.effect()}, " if math.isfinite(self.comparison.estimate) else ""
        if self.claim.outcome == "convergence" and numbers:
            added = f", towards {self.level:.3f} on these validation images, over seeds alone{added}"
        added += f", {LOW}" if self.low else ""
        judged = {"underpowered": "is not settled", "not comparable": "cannot be judged"}.get(self.verdict, self.verdict)
        judged += " in direction" if self.direction_only else ""
        return f'"{self.claim.sentence}" {judged} for {self.about} on {self.where()}: {numbers}{self.why}{added}'


def signed(value: float) -> str:
    """A difference with its sign; none where it rounds to nothing."""
    text = f"{value:+z.3f}"
    return text.removeprefix("+") if float(text) == 0 else text


def one_seed(missing: int) -> str:
    """What an interval of one seed a side holds, whose comparison lacks as many cells."""
    return f"one seed{' so far' if missing else ''}: patients only, nothing declared"


def so_far(missing: int) -> str:
    """What a verdict without all of its cells is."""
    return f"so far: {missing} of its cells {'is' if missing == 1 else 'are'} missing"


def _fewest(low: int, enough: Callable[[int], bool]) -> int | None:
    """The least number over `low` that is enough; None where MOST is not."""
    high = MOST
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


LOW = "both sides under a floor"
Compared = Callable[[Sequence[Cell], Sequence[Cell], str], Comparison]


def pretraining_seeds(cells: Sequence[Cell]) -> int:
    """Of one side, as its cells name them."""
    return len({cell.source_seed for cell in cells})


def ledger(
    cells: Sequence[Cell],
    claims: Sequence[Claim],
    registered: Mapping[str, bool],
    compared: Compared,
    apart: Callable[[Cell], str] = lambda _: "",
    independent: Callable[[Sequence[Cell]], int] = pretraining_seeds,
    low: Callable[[Sequence[Cell]], bool] = lambda _: False,
    planned: Sequence[Mapping[str, Any]] = (),
) -> list[Entry]:
    """Every claim in every setting in which both sides are planned, and once without a setting where there is none.

    Args:
        cells: finished cells, controls left out.
        registered: by its sha256 every claim that ever was in the study file, and whether it was there before both of its sides had
            results. One that is in `claims` no longer stays in the family.
        compared: the primary comparison of two sides in a metric, as analysis.comparisons keeps it.
        apart: why a cell is evidence for nothing ("own source", "exposed"), or "".
        independent: from how many pretrainings that share no step the cells of a side come.
        low: whether a side is under a floor of its task.
        planned: every cell that the study asks for, as analysis.results.expected gives them; without them the finished ones.
    """
    held = {cell.key: cell for cell in cells}
    seen = planned_axes(planned, cells) if planned else [(cell.key, axes_of(cell)) for cell in cells]
    entries = []
    for claim in claims:
        late = not registered.get(claim.sha256, False)
        made = []
        for setting, *asked in settings_of(claim, seen):
            a, b = ([held[key] for key in side if key in held] for side in asked)
            judged_by = (compared, apart, independent, low)
            entry = _entry(claim, setting, a, b, late, *judged_by) if a and b else _absent(claim, setting, late)
            made.append(replace(entry, missing=sum(key not in held for side in asked for key in side)))
        entries += made or [_absent(claim, {}, late)]
    gone = [before for sha, before in registered.items() if sha not in {claim.sha256 for claim in claims}]
    found = corrected([entry.p for entry in entries], [entry.late for entry in entries], gone)
    return [replace(entry, adjusted=p, family=size) for entry, (p, size) in zip(entries, found, strict=True)]


def _absent(claim: Claim, setting: dict[str, Any], late: bool) -> Entry:
    lacking = "no finished cells of both sides in one setting"
    return Entry(claim, setting, "", "", not_comparable(lacking), 0, late, short=lacking)


def _entry(
    claim: Claim,
    setting: dict[str, Any],
    a: list[Cell],
    b: list[Cell],
    late: bool,
    compared: Compared,
    apart: Callable[[Cell], str],
    independent: Callable[[Sequence[Cell]], int],
    low: Callable[[Sequence[Cell]], bool],
) -> Entry:
    metric, level, untimed = results.headline([*a, *b]) or "", math.nan, ""
    if claim.outcome == "metric":
        comparison = compared(a, b, metric) if metric else not_comparable("no result has a number")
    else:
        comparison, metric, level, untimed = _of_speed(a, b)
    pretrained = min(independent(side) for side in (a, b))
    entry = Entry(claim, setting, metric, a[0].dataset, comparison, min(pretrained, comparison.units or pretrained), late)
    reason = next((reason for cell in (*a, *b) if (reason := apart(cell))), untimed)
    return replace(entry, short=reason or _lacking(entry, a, b), low=low(a) and low(b), comparable=not reason, level=level)


def _lacking(entry: Entry, a: list[Cell], b: list[Cell]) -> str:
    """Why the study cannot judge the claim as it stands, or nothing."""
    c = entry.comparison
    for side in (a, b):
        if len({results.canonical([cell.strategy, cell.result.get("options"), cell.source, cell.architecture]) for cell in side}) > 1:
            return "one of its sides fits several settings of this study"
    if c.basis == "not comparable":
        return c.why
    if c.basis == "patients only":
        return "nothing is known of how seeds differ"
    if c.se == 0 and not math.isfinite(c.width):
        return c.why
    if entry.claim.about == "methods" and entry.pretraining_seeds < PRETRAINING_SEEDS:
        there = f"{entry.pretraining_seeds} pretraining seed{'' if entry.pretraining_seeds == 1 else 's'}"
        return f"{there}, and a claim about methods takes {PRETRAINING_SEEDS}"
    return ""


def _of_speed(a: Sequence[Cell], b: Sequence[Cell]) -> tuple[Comparison, str, float, str]:
    """What a claim about convergence is judged by, its metric in words, the level, and why the curves say nothing of speed, or nothing."""
    sides = [convergence.curves_of(side) for side in (a, b)]
    metric = str((a[0].result.get("selection") or {}).get("metric"))
    if not all(sides):
        why = "one of the two has no learning curve"
        return not_comparable(why), metric, math.nan, why
    level = convergence.common_threshold(sides)
    words = f"share of the common level of validation {metric} reached so far, mean over the run"
    why = _untimed(sides, level)
    return not_comparable(why) if why else of_curves(sides[0], sides[1], level), words, level, why


def _untimed(sides: Sequence[Sequence[Curve]], level: float) -> str:
    """Why the way to a level says nothing of speed, or nothing. Floors do not: one sooner or later reaches a level under them too."""
    metric, fewest = sides[0][0].metric, min(len(curve.value_T) for side in sides for curve in side)
    if fewest < LEAST_EVALUATIONS:
        return f"a run of {fewest} evaluation{'s' * (fewest > 1)}: convergence takes {LEAST_EVALUATIONS}"
    chance = convergence.chance(metric)
    if math.isnan(chance):
        return f"what a predictor that knows nothing scores in {metric} is not known, and so no share of a level"
    begins = min(float(np.quantile([curve.value_T[0] for curve in side], 0.5, method="lower")) for side in sides)
    untrained = ((chance, "chance"), (begins, "the first evaluation of both"))
    over = next((f"{words}, {value:.3f}" for value, words in untrained if level <= value), "")
    return f"the common level of {level:.3f} is not above {over}" if over else ""


def of_curves(a: Sequence[Curve], b: Sequence[Curve], level: float) -> Comparison:
    """How much of the way from chance to a level a run has gone by its best value so far, mean from its first evaluation to the end of
    the longest run (1: the whole from the first evaluation on); difference of the sides, paired where fine-tuning seeds are the units.

    Only seeds are resampled: the curves are of the validation images as they are, and the interval says nothing of other patients.
    """
    chance, horizon = convergence.chance(a[0].metric), max(curve.end for curve in (*a, *b))

    def share(curve: Curve) -> float:
        return convergence.area(curve.at_T, np.clip((curve.value_T - chance) / (level - chance), 0, 1), horizon)

    areas = [{curve.run: share(curve) for curve in side} for side in (a, b)]
    (one, one_nested), (other, other_nested) = map(secondary.units, areas)
    scale = max(abs(value) for held in areas for value in held.values())
    if not (one_nested or other_nested):
        return _student([np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])], scale)
    found = _student([np.array(list(one.values())), -np.array(list(other.values()))], scale)
    return replace(found, pretraining_variance=found.seed_variance)


def _student(parts: Sequence[np.ndarray[Any, np.dtype[np.float64]]], scale: float) -> Comparison:
    """Sum of the parts' means with Student's, or for two parts Welch's, interval. `scale`: of the numbers that were subtracted."""
    if min(len(part) for part in parts) < 2:
        return not_comparable("one seed: nothing is known of how seeds differ")
    terms = [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in parts]
    variance, estimate = sum(term for term, _ in terms), float(sum(part.mean() for part in parts))
    units = min(map(len, parts))
    if variance <= (ROUNDING * scale) ** 2:
        why = "the seeds do not vary"
        return Comparison(estimate, -math.inf, math.inf, 0.0, math.nan, 1.0, "seeds", units=units, why=why)
    se, df = math.sqrt(variance), variance**2 / sum(term**2 / free for term, free in terms)
    half, p = float(stats.t.ppf(0.975, df)) * se, float(2 * stats.t.sf(abs(estimate) / se, df))
    return Comparison(estimate, estimate - half, estimate + half, se, df, p, "seeds", units=units, seed_variance=variance, seeds_df=df)


def corrected(p: Sequence[float], late: Sequence[bool], gone: Sequence[bool]) -> list[tuple[float, int]]:
    """(adjusted p, size of its family) of each: Holm over those that were registered first; each later one together with all of those and
    the other later ones.

    gone: of each that was withdrawn, whether it was registered first. It stays in the family with p = 1.
    """
    first = [i for i, later in enumerate(late) if not later]
    early, every = [*(p[i] for i in first), *(1.0 for before in gone if before)], [*p, *(1.0 for _ in gone)]
    own, whole = dict(zip(first, holm(early), strict=False)), holm(every)
    return [(own.get(i, whole[i]), len(every) if later else len(early)) for i, later in enumerate(late)]
