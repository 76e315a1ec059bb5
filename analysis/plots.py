"""Figures of analyses as PNG, and what draws them.

    storage.put(path, png(partial(layers, found.cuts, {"random": [...]}, "SVCCA"), 7, 3.2))

A drawing function takes the figure last, and names its colours C0 to C6, so that whoever calls it decides on the palette.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.convergence import Curve, Depth, Reached, first_reach
from analysis.correlation import Interval
from analysis.figures import DASHES, MARKERS

if TYPE_CHECKING:
    from analysis.layers import StartAgainstEnd
    from analysis.similarity import Similarity

# Okabe and Ito's colours without their yellow, which does not show on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
GREY = "0.55"
Draw = Callable[[Any], None]


def png(draw: Draw, width: float, height: float) -> bytes:
    """Draw on a new figure of width x height inches; 160 dots an inch."""
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.grid": True,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(settings):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def ink() -> str:
    """The colour of text: a page may be dark."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def layers(cuts: Sequence[str], lines: Mapping[str, Sequence["Similarity"]], measure: str, title: str, figure: Any) -> None:
    """A measure at every cut, a line a pair with its permuted baseline dashed below; with two pairs their difference dotted in grey."""
    axes = figure.subplots()
    x = np.arange(len(cuts))
    held = []
    for i, (label, found) in enumerate(lines.items()):
        values = np.array([one.values[measure] for one in found])
        held.append(values)
        axes.plot(x, values, f"C{i % 7}", marker=MARKERS[i % 7], markersize=4, label=label, linestyle=DASHES[0])
        axes.plot(x, [one.permuted[measure] for one in found], f"C{i % 7}", linewidth=1, linestyle=(0, (4, 2)))
    if len(held) == 2:
        axes.plot(x, held[0] - held[1], GREY, linestyle=":", linewidth=1.6, label="difference")
    axes.plot([], [], GREY, linewidth=1, linestyle=(0, (4, 2)), label="images of one side permuted")
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xticks(x, cuts, rotation=45 if len(cuts) > 6 else 0, ha="right" if len(cuts) > 6 else "center")
    shown = [*held, held[0] - held[1]] if len(held) == 2 else held
    axes.set_ylim(min([-0.03, *(float(np.nanmin(v)) - 0.03 for v in shown if np.isfinite(v).any())]), 1.03)
    axes.set_ylabel(measure)
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=2)


def coefficients(cuts: Sequence[str], lines: Mapping[str, Sequence["Similarity"]], title: str, figure: Any) -> None:
    """Boxes of the canonical correlations at every cut, a row a pair, the permuted ones in grey beside them; areas above."""
    rows = figure.subplots(len(lines), 1, squeeze=False, sharex=True)[:, 0]
    x = np.arange(len(cuts))
    for i, (axes, (label, found)) in enumerate(zip(rows, lines.items(), strict=True)):
        for shift, colour, which in ((-0.18, f"C{i % 7}", "coefficients"), (0.18, GREY, "permuted_coefficients")):
            at = [j for j, one in enumerate(found) if len(getattr(one, which))]
            drawn = axes.boxplot(
                [getattr(found[j], which) for j in at],
                positions=[j + shift for j in at],
                widths=0.3,
                patch_artist=True,
                showfliers=False,
                manage_ticks=False,
                medianprops={"color": ink()},
            )
            for box in drawn["boxes"]:
                box.set(facecolor=colour, alpha=0.75, edgecolor=colour)
        for j, one in enumerate(found):
            words = f"{one.area:.2f}" if math.isfinite(one.area) else "too few"
            axes.text(j, 1.04, words, ha="center", fontsize=7.5)
        axes.set_ylim(-0.03, 1.14)
        axes.set_xlim(-0.5, len(cuts) - 0.5)
        axes.set_ylabel("correlation")
        axes.set_title(label, loc="left")
    rows[-1].set_xticks(x, cuts, rotation=45 if len(cuts) > 6 else 0, ha="right" if len(cuts) > 6 else "center")
    figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
    figure.supxlabel("grey: images of one side permuted; numbers: area between", fontsize=8)


def intervals(rows: Mapping[str, Interval], unit: str, title: str, figure: Any) -> None:
    """Estimates with their 95 % intervals, one line each."""
    axes = figure.subplots()
    for y, (_, one) in enumerate(rows.items()):
        if math.isfinite(one.low):
            axes.plot([one.low, one.high], [y, y], f"C{y % 7}", linewidth=2)
        axes.plot([one.estimate], [y], "o", color=f"C{y % 7}")
        axes.annotate(one.words(), (one.estimate, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.margins(x=0.25)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")


def pairs(found: "StartAgainstEnd", unit: str, title: str, figure: Any) -> None:
    """Similarity after training against similarity at initialisation, a point a pair of runs."""
    axes = figure.subplots()
    x, y = [pair[2] for pair in found.pairs], [pair[3] for pair in found.pairs]
    low, high = min(x + y), max(x + y)
    pad = 0.05 * (high - low) or 0.05
    axes.plot([low - pad, high + pad], [low - pad, high + pad], GREY, linewidth=0.8, linestyle=":")
    axes.plot(x, y, "o", color="C0", markersize=4.5, alpha=0.8)
    axes.set_xlabel(f"{unit} at initialisation")
    axes.set_ylabel(f"{unit} after training")
    axes.set_title(f"{title}: R² {found.r_squared.words(2)}", loc="left")


def gallery(before: NDArray[np.uint8], after: NDArray[np.uint8] | None, notes: Sequence[str], title: str) -> tuple[Draw, float, float]:
    """Pictures of filters in a grid, those after below those before, a note under each: what draws it, and its size in inches."""
    count, columns = len(before), min(16, len(before))
    h, w = before.shape[1:3]
    each, gap, note = 1 if after is None else 2, 0.06 * h, 0.42 * h
    across, band = 1.25 * w, each * (h + gap) + note
    lines = math.ceil(count / columns)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.grid(visible=False)
        for i in range(count):
            x, y = (i % columns) * across, (i // columns) * band
            for j, held in enumerate((before,) if after is None else (before, after)):
                top = y + j * (h + gap)
                axes.imshow(held[i], extent=(x, x + w, top + h, top), interpolation="nearest")
            axes.text(x + w / 2, y + each * (h + gap), notes[i], ha="center", va="top", fontsize=7)
        axes.set_xlim(-0.1 * w, columns * across)
        axes.set_ylim(lines * band, -0.1 * h)
        axes.set_title(title, loc="left")

    inch = 0.5 / across  # a picture is 0.4 inches wide
    return draw, max(5.0, 0.3 + columns * across * inch), 0.45 + lines * band * inch


def learning(curves: Sequence[Curve], threshold: float, unit: str, by: str, title: str, figure: Any) -> None:
    """Learning curves of every run by what is compared; a mark where each first reaches the threshold, a cross where it never does."""
    axes = figure.subplots()
    order = list(dict.fromkeys(curve.label for curve in curves))
    for i, label in enumerate(order):
        for n, curve in enumerate(curve for curve in curves if curve.label == label):
            style: dict[str, Any] = {"color": f"C{i % 7}", "linestyle": DASHES[i % 7]}
            axes.plot(curve.at_T, curve.value_T, linewidth=1.1, alpha=0.8, label=label if not n else None, **style)
            at = first_reach(curve.at_T, curve.value_T, threshold)
            if math.isfinite(at):
                axes.plot([at], [threshold], MARKERS[i % 7], color=f"C{i % 7}", markersize=5)
            else:
                axes.plot([curve.end], [curve.value_T[-1]], "x", color=f"C{i % 7}", markersize=6, clip_on=False)
    axes.axhline(threshold, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(f" {threshold:.3g}", (0, threshold), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.xaxis.get_major_locator().set_params(integer=by != "seconds")
    axes.set_xlabel(f"{by}; x: a run that ended below the threshold")
    axes.set_ylabel(f"validation {unit}")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=2 if len(order) > 1 else 1)


def steps(rows: Sequence[Reached], by: str, title: str, figure: Any) -> None:
    """How long each run took, a line a source and strategy; open triangles are runs that ended before; medians and speed-ups in words."""
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for run, value in row.steps.items():
            if math.isinf(value):
                axes.plot([row.ends[run]], [y], ">", color=f"C{y % 7}", markerfacecolor="none", markersize=7, clip_on=False)
            else:
                axes.plot([value], [y], "o", color=f"C{y % 7}", markersize=4.5, alpha=0.7)
        if math.isfinite(row.median):
            axes.plot([row.median, row.median], [y - 0.28, y + 0.28], color=ink(), linewidth=1.6)
        ratio = row.speedup.words()
        words = row.words() + (f"   x {ratio}" if ratio != "-" else "")
        axes.annotate(words, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, annotation_clip=False)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=by != "seconds")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{by} to the threshold; open triangles ended before; right: median, times faster than random")
    axes.set_title(title, loc="left")


def depths(rows: Sequence[Depth], by: str, title: str, figure: Any) -> None:
    """Steps against the depth that was transfused, and what each block saves."""
    left, right = figure.subplots(1, 2)
    x, names = np.arange(len(rows)), [row.depth for row in rows]
    left.plot(x, [row.steps if math.isfinite(row.steps) else math.nan for row in rows], "C0", marker="o", markersize=4)
    right.bar(x[1:], [row.gain for row in rows[1:]], color="C0", width=0.6)
    for axes, label in ((left, f"{by} to the threshold"), (right, f"{by} saved over the depth before")):
        axes.set_xticks(x, names, rotation=45, ha="right")
        axes.set_ylabel(label)
    left.set_ylim(bottom=0)
    left.set_title(title, loc="left")


def movement(moved: NDArray[np.float64], gabor: NDArray[np.float64], noise: float, title: str, figure: Any) -> None:
    """How far filters moved, and that against how much of a Gabor each was; where kernels are too small for that, the first alone."""
    scored = np.isfinite(gabor)
    panels = figure.subplots(1, 2 if scored.any() else 1, squeeze=False)[0]
    panels[0].hist(moved, bins=min(30, max(8, len(moved) // 3)), color="C0")
    panels[0].set_xlabel("movement, share of a filter's length")
    panels[0].set_ylabel("filters")
    panels[0].set_title(title, loc="left")
    if scored.any():
        panels[1].plot(gabor[scored], moved[scored], "o", color="C0", markersize=4, alpha=0.8)
        panels[1].axvline(noise, color=GREY, linewidth=1, linestyle=":", label="95 % of noise is left of this")
        panels[1].set_xlabel("Gabor score before")
        panels[1].set_ylabel("movement")
        panels[1].legend(loc="best")


class Point(NamedTuple):
    """A source and strategy of one task: what its network costs, milliseconds an image, and mean and deviation of the metric."""

    source: str
    strategy: str
    params: int
    ms: float
    value: float
    sd: float


def efficiency(points: Sequence[Point], unit: str, title: str, figure: Any) -> None:
    """The metric against parameters and against latency: a colour a source, a marker a strategy; bars are deviations over seeds."""
    from matplotlib.ticker import EngFormatter

    panels = figure.subplots(1, 2, sharey=True)
    sources = list(dict.fromkeys(point.source for point in points))
    strategies = list(dict.fromkeys(point.strategy for point in points))
    for axes, name, label in zip(panels, ("params", "ms"), ("parameters", "ms an image, batches of 32"), strict=True):
        for point in points:
            colour, marker = f"C{sources.index(point.source) % 7}", MARKERS[strategies.index(point.strategy) % 7]
            error = point.sd if math.isfinite(point.sd) else 0.0
            axes.errorbar([getattr(point, name)], [point.value], yerr=[error], color=colour, marker=marker, markersize=6, capsize=2)
        if name == "params" and len({point.params for point in points}) > 1:
            axes.set_xscale("log")
            # Powers of ten would be set as mathematics, which these figures do not have.
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(EngFormatter(sep=""))
        elif name == "params":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.15)
        axes.set_xlabel(label)
    for i, source in enumerate(sources):
        panels[0].plot([], [], f"C{i % 7}", linewidth=3, label=source)
    for i, strategy in enumerate(strategies):
        panels[0].plot([], [], MARKERS[i % 7], color=GREY, label=strategy)
    panels[0].set_ylabel(unit)
    panels[0].set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=3)


def ranked(points: Sequence[tuple[float, float, str]], rho: str, unit: str, title: str, figure: Any) -> None:
    """A task's metric against the accuracy of its sources, each named."""
    axes = figure.subplots()
    for x, y, name in points:
        axes.plot([x], [y], "o", color="C0")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("accuracy of the source")
    axes.set_ylabel(unit)
    axes.set_title(f"{title}\nSpearman {rho}", loc="left")
