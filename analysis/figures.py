"""Figures as SVG text, to be set inline in a page: their colours are CSS variables, so one figure serves light and dark.

svg = forest(name, rows, "AUROC"); svg = learning(name, title, series, "AUROC"); svg = overlay(image, true, predicted, text)

Lines of a source have the same colour, dash and marker everywhere (Okabe and Ito's palette, safe for the colour-blind; --s0 to --s6
in report.html). Text stays text: it can be searched, scaled and read aloud; every figure has a title and a description.
"""

import base64
import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from analysis.findings import Finding
from analysis.ledger import signed

INK, FAINT = "#010203", "#040506"  # placeholders that become CSS variables
SERIES = tuple(f"#0a0b{i:02x}" for i in range(7))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)), (0, (2, 2)))


def svg(name: str, title: str, text: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """Draw on a new figure of width x height inches and return it as inline SVG with a title and a description. C0 to C6 are SERIES."""
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 9.5,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "axes.grid": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.5,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=SERIES),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        figure, layout = Figure(figsize=(width, height)), ConstrainedLayoutEngine()
        canvas = FigureCanvasSVG(figure)
        figure.set_layout_engine(layout)
        draw(figure)
        layout.execute(figure)
        figure.set_layout_engine("none")  # laid out once: drawing would do it again
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})  # savefig draws everything once more before
    raw = buffer.getvalue()
    raw = raw[raw.index("<svg") :]
    raw = re.sub(r"<metadata>.*?</metadata>", "", raw, count=1, flags=re.S)
    # Ids are unique in a figure only; several figures share a page.
    raw = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', raw)
    raw = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", raw)
    raw = raw.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
    for i, colour in enumerate(SERIES):
        raw = raw.replace(colour, f"var(--s{i})")
    head = f'<svg role="img" aria-labelledby="{name}-t {name}-d" class="figure" style="max-width:{width:.1f}in"'
    raw = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", raw, count=1), count=1)
    raw = raw.replace("<svg", head, 1)
    described = f'<title id="{name}-t">{html.escape(title)}</title><desc id="{name}-d">{html.escape(text)}</desc>'
    return re.sub(r"(<svg[^>]*>)", lambda found: found.group(1) + described, raw, count=1)


# The light colours of report.html, for a figure that is opened by itself.
LIGHT = {"ink": "#1b1f24", "rule": "#c9cfd6"}
LIGHT |= {f"s{i}": colour for i, colour in enumerate(("#0072b2", "#d55e00", "#009e73", "#b0568c", "#8a6d00", "#2e9bd6", "#6b6b6b"))}


def alone(drawn: str) -> str:
    """The figure as a file of its own: its colours have the values that they fall back to where no page sets them."""
    return re.sub(r"var\(--(\w+)\)", lambda found: f"var(--{found[1]}, {LIGHT[found[1]]})", drawn)


def _style(i: int) -> dict[str, Any]:
    return {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}


def _wrapped(text: str, inches: float) -> str:
    """In lines that are no longer than so many inches; a number stays beside its unit."""
    return textwrap.fill(re.sub(r"(?<=\d) (?=%|px)", "\u00a0", text), int(11 * inches))


def forest(name: str, rows: Sequence[tuple[str, Finding, bool]], unit: str) -> str:
    """Differences with their intervals, one line each: (label, finding, whether it is a control). Filled where declared. `unit` names the
    axis."""
    bounds = [value for _, f, _ in rows for value in (f.comparison.low, f.comparison.high, f.comparison.estimate) if math.isfinite(value)]
    bounds = bounds or [0.0]
    # An interval of one lucky or unlucky seed pair can be wide enough to hide all others: it is cut at the frame and marked.
    typical = 4 * max([abs(f.comparison.estimate) for _, f, _ in rows if math.isfinite(f.comparison.estimate)] + [0.02])
    low, high = max(min([*bounds, 0.0]), -typical), min(max([*bounds, 0.0]), typical)
    pad = 0.06 * (high - low) or 0.01

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.9)
        for y, (_, f, control) in enumerate(rows):
            c, colour = f.comparison, SERIES[1 if control else 0]
            if not math.isfinite(c.estimate):
                axes.text(0, y, "  not comparable", va="center", fontsize=8)
                continue
            axes.plot([max(c.low, low - pad), min(c.high, high + pad)], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
            for bound, edge, marker in ((c.low, low - pad, "<"), (c.high, high + pad, ">")):
                if abs(bound) > abs(edge) and (bound < 0) == (edge < 0):
                    axes.plot([edge], [y], marker, color=colour, markersize=4, clip_on=False)
            face = colour if f.declared else "none"
            axes.plot([c.estimate], [y], "s" if control else "o", markersize=6, markerfacecolor=face, markeredgecolor=colour)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(low - pad, high + pad)
        axes.grid(axis="y", visible=False)
        figure.supxlabel(_wrapped(f"difference in {unit}, with 95 % interval", 7.2), fontsize=9)  # the axes may be narrower than it

    labels = [_wrapped(label, 4.2) for label, _, _ in rows]
    lines = sum(1 + label.count("\n") for label in labels)
    told = [(label, f.comparison) for label, f, _ in rows]
    text = "; ".join(f"{label}: {signed(c.estimate)} from {c.low:.3f} to {c.high:.3f}" for label, c in told)
    return svg(name, f"Differences in {unit}", text, 7.2, 0.85 + 0.12 * len(rows) + 0.18 * lines, draw)


def learning(name: str, title: str, series: Mapping[str, tuple[int, Sequence[Sequence[float]]]], label: str) -> str:
    """Validation curves by epoch: source -> (colour number, one curve a seed). Mean and, shaded, range while all seeds still train; by
    itself and thin a seed that trained on."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for source, (i, curves) in series.items():
            held = [np.asarray(curve, float) for curve in curves if len(curve)]
            if not held:
                continue
            shared = min(len(curve) for curve in held)
            stack = np.stack([curve[:shared] for curve in held])
            x = np.arange(1, shared + 1)
            axes.plot(
                x,
                stack.mean(axis=0),
                label=f"{source}, n {len(held)}",
                marker=MARKERS[i % 7],
                markersize=3,
                markevery=max(1, shared // 8),
                **_style(i),
            )
            if len(held) > 1:
                axes.fill_between(x, stack.min(axis=0), stack.max(axis=0), color=SERIES[i % 7], alpha=0.15, linewidth=0)
            for curve in held:
                if len(curve) > shared:  # a seed that trained on alone
                    axes.plot(np.arange(shared, len(curve) + 1), curve[shared - 1 :], color=SERIES[i % 7], linewidth=0.7, alpha=0.7)
        axes.set_title(_wrapped(title, 4.6), loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if max(len(curve) for _, curves in series.values() for curve in curves) == 1:
            axes.set_xticks([1])
        axes.legend(loc="best", fontsize=8)

    finals = [
        f"{source}: {np.nanmax([max(c) for c in curves if len(c)]):.3f} at best" for source, (_, curves) in series.items() if any(curves)
    ]
    return svg(name, title, f"{label} by epoch. " + "; ".join(finals), 4.6, 2.9, draw)


def fractions(name: str, title: str, series: Mapping[str, tuple[int, Sequence[tuple[float, float, float]]]], label: str) -> str:
    """A metric against the share of labels: source -> (colour number, [(fraction, mean, sd over seeds)])."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for source, (i, points) in series.items():
            x, mean, sd = np.array(sorted(points), float).T
            axes.errorbar(x, mean, yerr=np.nan_to_num(sd), label=source, marker=MARKERS[i % 7], markersize=4, capsize=2, **_style(i))
        axes.set_xscale("log")
        ticks = sorted({point[0] for _, points in series.values() for point in points})
        axes.set_xticks(ticks, [f"{tick * 100:g} %" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(_wrapped(title, 4.6), loc="left")
        axes.set_xlabel("share of the training labels")
        axes.set_ylabel(label)
        axes.legend(loc="best", fontsize=8)

    values = "; ".join(
        f"{source}: {', '.join(f'{mean:.3f} at {fraction * 100:g} %' for fraction, mean, _ in sorted(points))}"
        for source, (_, points) in series.items()
    )
    text = f"{label} against the share of labels, bars are one standard deviation over seeds. {values}"
    return svg(name, title, text, 4.6, 2.9, draw)


def traces(name: str, title: str, series: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], label: str) -> str:
    """One quantity of several pretrainings against the step: name -> (colour number, [(step, value)])."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for run, (i, points) in series.items():
            x, y = np.array(points, float).T
            axes.plot(x, y, label=run, **_style(i))
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8)

    ends = "; ".join(f"{run}: {points[0][1]:.3g} to {points[-1][1]:.3g}" for run, (_, points) in series.items())
    return svg(name, title, f"{label} by step. {ends}", 3.6, 2.5, draw)


def critical(name: str, average: Mapping[str, float], settings: int, apart: float, cliques: Sequence[Sequence[str]]) -> str:
    """Average ranks on a line, best at the left; bars join the sources of a clique, nearer than the critical difference `apart` (Demsar
    2006)."""
    names = list(average)
    half = (len(names) + 1) // 2

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.grid(visible=False)
        low, high = 1, max(2, len(names))
        axes.plot([low, high], [0, 0], color=INK, linewidth=1)
        for tick in range(low, high + 1):
            axes.plot([tick, tick], [0, 0.25], color=INK, linewidth=1)
            axes.text(tick, 0.35, str(tick), ha="center", fontsize=8)
        for i, source in enumerate(names):
            left, rank = i < half, average[source]
            below = -0.9 - 0.55 * (i if left else len(names) - 1 - i) - 0.35 * len(cliques)
            end: float = low - 0.04 * (high - low) if left else high + 0.04 * (high - low)
            axes.plot([rank, rank, end], [0, below, below], color=SERIES[i % 7], linewidth=1.2)
            axes.text(end, below, f" {source} {rank:.2f} ", ha="right" if left else "left", va="center", fontsize=8.5)
        for i, clique in enumerate(cliques):
            near, far = average[clique[0]], average[clique[-1]]
            axes.plot([near - 0.02, far + 0.02], [-0.3 - 0.35 * i] * 2, color=INK, linewidth=4, solid_capstyle="butt")
        if math.isfinite(apart):
            axes.plot([low, min(high, low + apart)], [1.1, 1.1], color=INK, linewidth=2)
            axes.text(low, 1.25, f"critical difference {apart:.2f}", fontsize=8)
        axes.set_xlim(low - 0.45 * (high - low), high + 0.45 * (high - low))

    together = "; ".join(f"not told apart: {', '.join(clique)}" for clique in cliques) or "all told apart"
    text = ", ".join(f"{source} {rank:.2f}" for source, rank in average.items())
    said = f"Average ranks over {settings} settings: {text}. Critical difference {apart:.2f}; {together}"
    return svg(name, "Average ranks", said, 7.2, 1.3 + 0.24 * half + 0.15 * len(cliques), draw)


def reliability(name: str, title: str, series: Mapping[str, tuple[int, Sequence[tuple[float, float, int]]]]) -> str:
    """Share right against confidence: source -> (colour number, [(mean confidence, share right, images)]). Marks grow with the images."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for source, (i, points) in series.items():
            x, y, n = np.array(points, float).T
            enough = n >= 10  # a bin of one image is 0 or 1, and no curve should go there
            axes.plot(x[enough], y[enough], label=source, **_style(i))
            axes.scatter(x, y, s=4 + 60 * n / n.sum(), color=SERIES[i % 7], marker=MARKERS[i % 7])
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(title, loc="left")
        axes.set_xlabel("score")
        axes.set_ylabel("share that is right")
        axes.legend(loc="best", fontsize=8)

    text = "; ".join(f"{source}: " + ", ".join(f"{x:.2f} {y:.2f}" for x, y, _ in points) for source, (_, points) in series.items())
    return svg(name, title, f"Reliability diagram, score and share right by bin. {text}", 3.8, 3.4, draw)


def searched(name: str, title: str, points: Sequence[tuple[str, float, float, bool]], choice: str, best: str, label: str) -> str:
    """What a search saw: (candidate, mean, standard error, trained in full?) in order. The shade is one standard error under the best mean,
    the filled point the choice; points of shorter trainings are crosses."""
    held = {at: (x, mean, error) for x, (at, mean, error, _) in enumerate(points)}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _, top, error = held[best]
        if math.isfinite(error):
            axes.axhspan(top - error, top, color=SERIES[0], alpha=0.12, linewidth=0)
        for full, marker in ((True, "o"), (False, "x")):
            x, mean, bars = np.array([(*held[at],) for at, _, _, whole in points if whole == full]).reshape(-1, 3).T
            line = {"linestyle": "-" if full else "none", "linewidth": 1.2, "elinewidth": 1, "capsize": 2, "markersize": 5}
            axes.errorbar(x, mean, yerr=np.nan_to_num(bars), marker=marker, color=SERIES[0], markerfacecolor="none", **line)
        at, height, error = held[choice]
        axes.plot(at, height, "o", color=SERIES[0], markersize=7)
        above = (at, height + np.nan_to_num(error))
        axes.annotate(choice, above, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8, color=INK)
        axes.set_xticks(
            range(len(points)),
            [at for at, *_ in points],
            rotation=40 if len(points) > 4 else 0,
            ha="right" if len(points) > 4 else "center",
        )
        axes.margins(y=0.2)
        axes.set_title(title, loc="left")
        axes.set_ylabel(label)

    text = "; ".join(f"{at}: {mean:.3f} with a standard error of {error:.3f}" for at, mean, error, _ in points)
    return svg(name, title, f"{label}. Chosen: {choice}. {text}", 4.6, 2.9, draw)


def thumbnail(image: NDArray[np.uint8]) -> str:
    """A u8 image (H, W), (H, W, 1) or (H, W, 3) RGB as a PNG data address."""
    held = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    stored = cv2.cvtColor(held, cv2.COLOR_RGB2BGR) if held.ndim == 3 else held
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", stored)[1].tobytes()).decode()


def _outline(mask: NDArray[Any]) -> str:
    found, _ = cv2.findContours(np.ascontiguousarray(mask > 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    paths = []
    for contour in found:
        # Pixel centres: contours run through them, the image is drawn from their corners.
        points = " ".join(f"{x + 0.5:g},{y + 0.5:g}" for x, y in contour[:, 0])
        paths.append(f"M{points}Z")
    return "".join(paths)


def overlay(image: NDArray[np.uint8], true: NDArray[Any] | None, predicted: NDArray[Any] | None, text: str) -> str:
    """An image with the outline of the true mask (solid) and of the predicted one (dashed), as SVG at the image's own pixels."""
    height, width = image.shape[:2]
    parts = [f'<image href="{thumbnail(image)}" width="{width}" height="{height}"/>']
    if true is not None:
        parts.append(f'<path class="true" d="{_outline(true)}"/>')
    if predicted is not None:
        parts.append(f'<path class="predicted" d="{_outline(predicted)}"/>')
    label = html.escape(text, quote=True)
    return f'<svg role="img" aria-label="{label}" class="sample" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
