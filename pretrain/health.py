"""Is this run healthy? A verdict in words from the rows that the run logged.

judge(rows, chance_loss=4.8, width=512, labelled=False) -> Verdict("healthy", "...")

Thresholds are proposals, calibrated on constant, rank-one and random embeddings only (tests): they are alarms, not measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLLAPSED_STD, COLLAPSED_COSINE, COLLAPSED_RANK_SHARE, LEAST_RANK = 0.1, 0.95, 0.02, 1.5
CONSTANT_RANK = 1.001
AT_CHANCE, CHANCE_FACTOR = 0.99, 2.0
FEWEST_ROWS, FEWEST_STEPS, FEWEST_EPOCHS = 3, 50, 2.0


@dataclass(frozen=True)
class Verdict:
    """`why` is one sentence for the person who watches the run."""

    health: Literal["healthy", "collapsed", "not learning", "too short"]
    why: str


def judge(rows: Sequence[dict[str, Any]], *, chance_loss: float | None, width: int, labelled: bool) -> Verdict:
    """The verdict on a run so far.

    Args:
        rows: log rows in order, each with step, epoch, loss, rankme, std_ratio, mean_cosine and, for pairs of views, contrastive_top1
            with its chance.
        chance_loss: loss of a network that has learned nothing.
        width: D of the encoder.
        labelled: with labels few directions may be all there is to know, so only an outright constant counts as collapse.
    """
    if not rows:
        return Verdict("too short", "nothing was logged")
    last = rows[-1]
    collapse = _collapse(last, width, labelled)
    if collapse:
        return Verdict("collapsed", f"representation collapsed by step {last['step']} ({collapse}): lower the rate, check the temperature")
    if len(rows) < FEWEST_ROWS or last["step"] < FEWEST_STEPS or last["epoch"] < FEWEST_EPOCHS:
        return Verdict("too short", f"{last['step']} steps in {last['epoch']:.1f} epochs are too few to judge")
    recent = rows[-FEWEST_ROWS:]
    loss = sum(row["loss"] for row in recent) / len(recent)
    pairs = "contrastive_top1" in last
    # A contrastive loss can stand above its value at random while pairs are already found: temperature sharpens mistakes too.
    stuck = chance_loss is not None and (abs(loss / chance_loss - 1) <= 1 - AT_CHANCE if pairs else loss >= AT_CHANCE * chance_loss)
    if stuck:
        return Verdict("not learning", f"the loss {loss:.4f} is that of a network that knows nothing, {chance_loss:.4f}")
    if pairs:
        top1 = sum(row["contrastive_top1"] for row in recent) / len(recent)
        if top1 <= CHANCE_FACTOR * last["contrastive_chance"]:
            return Verdict("not learning", f"the right view is found in {top1:.2%} of cases, chance is {last['contrastive_chance']:.2%}")
    return Verdict("healthy", f"loss {loss:.4f}, spread {last['std_ratio']:.2f}, effective rank {last['rankme']:.0f} of {width}")


def _collapse(row: dict[str, Any], width: int, labelled: bool) -> str | None:
    if labelled:
        return f"effective rank {row['rankme']:.2f}: every image gives the same" if row["rankme"] < CONSTANT_RANK else None
    if row["std_ratio"] < COLLAPSED_STD:
        return f"spread {row['std_ratio']:.3f} is under {COLLAPSED_STD}"
    if row["mean_cosine"] > COLLAPSED_COSINE:
        return f"mean cosine {row['mean_cosine']:.3f} is over {COLLAPSED_COSINE}"
    least = max(LEAST_RANK, COLLAPSED_RANK_SHARE * width)
    return f"effective rank {row['rankme']:.2f} is under {least:.2f}" if row["rankme"] < least else None
