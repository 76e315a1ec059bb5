"""Is this run healthy? A verdict in words from the rows that the run logged.

judge(rows, chance_loss=4.8, width=512, labelled=False) -> Verdict("healthy", "...")

The first rule that holds decides, the gravest first. What the thresholds were calibrated on is in docs/pretraining.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from scipy.stats import binom

COLLAPSED_STD, COLLAPSED_COSINE, COLLAPSED_RANK_SHARE, LEAST_RANK = 0.1, 0.98, 0.02, 1.5
CONSTANT_RANK = 1.001
AT_CHANCE, PAIRS_P = 0.99, 0.01
FEWEST_ROWS, FEWEST_STEPS, FEWEST_EPOCHS = 3, 50, 2.0
FALLING_RANK, RANK_ROWS = 0.7, 5  # rank over this many rows falls to under this share while the loss falls
MOST_DEAD, FEWEST_SAMPLES = 0.5, 5.0  # share of prototypes; samples a prototype before they are judged
LEAST_MOVED, LAST_PROGRESS = 0.5, 0.9  # share of a teacher's numbers that an update changes; later a schedule may hold it on purpose
LONGEST_WAIT, WAIT_STEPS = 0.1, 100
GRADIENT_FACTOR = 10.0
ADVICE = "lower the rate, check the temperature"

Health = Literal[
    "healthy",
    "collapsed",
    "dimensional collapse",
    "not learning",
    "dead prototypes",
    "frozen teacher",
    "unstable",
    "input-bound",
    "too short",
]


@dataclass(frozen=True)
class Verdict:
    """`why` is one sentence for the person who watches the run."""

    health: Health
    why: str


def judge(rows: Sequence[dict[str, Any]], *, chance_loss: float | None, width: int, labelled: bool) -> Verdict:
    """The verdict on a run so far.

    Args:
        rows: log rows in order, as the loop writes them.
        chance_loss: loss of a network that has learned nothing.
        width: D of the encoder.
        labelled: with labels few directions may be all there is to know, so only an outright constant counts as collapse.
    """
    if not rows:
        return Verdict("too short", "nothing was logged")
    last = rows[-1]
    if why := collapse(last, width, labelled):
        # The teacher of DINO and DINOv2; other networks that follow have other names.
        advice = "lower the rate or teacher_temperature / student_temperature" if "teacher_lag" in last else ADVICE
        return Verdict("collapsed", f"representation collapsed by step {last['step']} ({why}): {advice}")
    if len(rows) < FEWEST_ROWS or last["step"] < FEWEST_STEPS or last["epoch"] < FEWEST_EPOCHS:
        return Verdict("too short", f"{last['step']} steps in {last['epoch']:.1f} epochs are too few to judge")
    rules: dict[Health, Callable[[Sequence[dict[str, Any]]], str | None]] = {
        "frozen teacher": _frozen,
        "dead prototypes": _dead,
        "not learning": lambda found: _stuck(found, chance_loss),
        "unstable": _unstable,
        "dimensional collapse": lambda found: None if labelled else _narrowing(found),
        "input-bound": _waiting,
    }
    for health, rule in rules.items():
        if why := rule(rows):
            return Verdict(health, why)
    loss = f"loss {_recent_loss(rows):.4f}"
    if chance_loss is not None and _recent_loss(rows) >= chance_loss:
        loss += f" (over the {chance_loss:.4f} of a network that knows nothing: the rate may be too high)"
    return Verdict("healthy", f"{loss}, spread {last['std_ratio']:.2f}, effective rank {last['rankme']:.0f} of {width}")


def collapse(row: dict[str, Any], width: int, labelled: bool) -> str | None:
    """How this row shows that all images have come to look alike, or None."""
    if labelled:
        return f"effective rank {row['rankme']:.2f}: every image gives the same" if row["rankme"] < CONSTANT_RANK else None
    if row["std_ratio"] < COLLAPSED_STD:
        return f"spread {row['std_ratio']:.3f} is under {COLLAPSED_STD}"
    if row["mean_cosine"] > COLLAPSED_COSINE:
        return f"mean cosine {row['mean_cosine']:.3f} is over {COLLAPSED_COSINE}"
    least = max(LEAST_RANK, COLLAPSED_RANK_SHARE * min(width, row["window"] - 1))  # fewer samples have fewer directions
    return f"effective rank {row['rankme']:.2f} is under {least:.2f}" if row["rankme"] < least else None


def _recent_loss(rows: Sequence[dict[str, Any]]) -> float:
    recent = [float(row["loss"]) for row in rows[-FEWEST_ROWS:]]
    return sum(recent) / len(recent)


def _stuck(rows: Sequence[dict[str, Any]], chance_loss: float | None) -> str | None:
    loss, found = _recent_loss(rows), _pairs_found(rows)
    if chance_loss is not None:
        # A contrastive loss can stand above its value at random while pairs are already found: temperature sharpens mistakes too.
        stuck = loss >= AT_CHANCE * chance_loss and not (found and found.above_chance)
        return f"the loss {loss:.4f} is that of a network that knows nothing, {chance_loss:.4f}" if stuck else None
    if found and not found.above_chance:
        return f"the right view is found in {found.share:.2%} of cases, chance is {found.chance:.2%}"
    return None


class _Pairs(NamedTuple):
    share: float
    chance: float
    above_chance: bool


def _pairs_found(rows: Sequence[dict[str, Any]]) -> _Pairs | None:
    """How often the other view of an image was the nearest in the later half of the run, by an exact test: a row alone has few pairs."""
    later = [row for row in rows if "contrastive_top1" in row][-max(FEWEST_ROWS, len(rows) // 2) :]
    if len(later) < FEWEST_ROWS:
        return None
    chance = float(later[-1]["contrastive_chance"])
    pairs = len(later) * (round(1 / chance) + 1) // 2  # the two views of an image find one another or neither: they are one case
    share = sum(row["contrastive_top1"] for row in later) / len(later)
    p = binom.sf(round(share * pairs) - 1, pairs, chance)
    return _Pairs(share, chance, bool(p < PAIRS_P))


def _frozen(rows: Sequence[dict[str, Any]]) -> str | None:
    early = [row["teacher_moved"] for row in rows if "teacher_moved" in row and row["step"] < LAST_PROGRESS * row["steps"]]
    if len(early) < FEWEST_ROWS or max(early[-FEWEST_ROWS:]) >= LEAST_MOVED:
        return None
    return f"an update changes {early[-1]:.1%} of the teacher's numbers: is it stored in bf16?"


def _dead(rows: Sequence[dict[str, Any]]) -> str | None:
    last = rows[-1]
    if last.get("prototype_samples", 0.0) < FEWEST_SAMPLES or last["prototypes_dead"] <= MOST_DEAD:
        return None
    return f"{last['prototypes_dead']:.0%} of the prototypes are not used: ask for fewer"


def _unstable(rows: Sequence[dict[str, Any]]) -> str | None:
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    before = sorted(norms[:-1])
    if len(before) < RANK_ROWS:
        return None
    usual = before[len(before) // 2]
    return (
        f"the gradient's norm {norms[-1]:.3g} is over {GRADIENT_FACTOR:.0f} times the usual {usual:.3g}"
        if norms[-1] > GRADIENT_FACTOR * usual
        else None
    )


def _narrowing(rows: Sequence[dict[str, Any]]) -> str | None:
    if len(rows) < RANK_ROWS:
        return None
    first, last = rows[-RANK_ROWS], rows[-1]
    if last["window"] < first["window"]:  # at another number of ranks a run begins a window anew: fewer samples span fewer directions
        return None
    if last["rankme"] < FALLING_RANK * first["rankme"] and last["loss"] < first["loss"]:
        return f"the loss improves but the effective rank fell from {first['rankme']:.0f} to {last['rankme']:.0f}"
    return None


def _waiting(rows: Sequence[dict[str, Any]]) -> str | None:
    recent = [row for row in rows if row["step"] > rows[-1]["step"] - WAIT_STEPS]
    if rows[-1]["step"] < WAIT_STEPS or any(row["data_wait"] <= LONGEST_WAIT for row in recent):
        return None
    return f"{recent[-1]['data_wait']:.0%} of the time goes by waiting for images: more loader workers, or views.device_side"
