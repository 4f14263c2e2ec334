"""Plots that look alike: as PNG, or as SVG in the colours of a page, whether light or dark."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..methods import CLIP, METHODS, NOTHING
from ..runs.files import encode_text
from .canvas import INK, LINE, MINUS, PLUS, SOFT, default_style, text_width

# one colour per series, and the grey of what is there for comparison only
SERIES = (PLUS, MINUS, "#35589c", "#7d3f98", "#8a6d00", "#a3265e", "#4a6b1f", "#1f6f8b")
REFERENCE = SOFT
# the methods of the paper, with colours that no other has
FIXED = ("D-TRAK", "TRAK")
NO_REMOVAL = "No removal"
# how the colours of a plot are called in the style sheet of a page
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
SERIES_DARK = (
    "#53cdb8", "#f2a45f", "#93b4f5", "#d0a2e6", "#d9be5a", "#f08bb6", "#a9cf6f", "#6fc7e4",
)  # fmt: skip
_DPI = 150
# inches: of a figure, and of a legend's handle with the room between columns
_WIDTH, _BESIDE = 6.0, 0.55
_DASHES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 0.6)))
# ways of one method, which differ in their dashes
_WAYS = ("whitened", "mean of", "single")
# an axis with no more values than these shows them all
_FEW = 6
FEWEST_IN_A_BOX = 5


class Curve(NamedTuple):
    """A line of a plot: what it is, its points, and its interval at each where there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    interval: Sequence[tuple[float, float]] | None = None


def new_figure(width: float = _WIDTH, height: float = 3.4) -> Any:
    """A figure with one axes, sizes in inches; call it within `canvas.default_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.grid(True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=10)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure


def split_label(label: str) -> tuple[str, str]:
    """The title of the method that a label is of, and what the label says more.

    ``D-TRAK, whitened`` is D-TRAK; a label of no method of the registry is one of its own.
    """
    fitting = [
        method.title
        for method in METHODS.values()
        if label == method.title or label.startswith(f"{method.title}, ")
    ]
    title = max(fitting, key=len, default=label)
    return title, label[len(title) :]


def is_reference(label: str) -> bool:
    """Whether a label is of what scores are compared with: likeness, chance, nothing removed."""
    title, _ = split_label(label)
    needs = [method.needs for method in METHODS.values() if method.title == title]
    return label == NO_REMOVAL or needs in ([NOTHING], [CLIP])


def _number(title: str) -> int:
    """The same for a method wherever it is drawn: its place in the registry, or a hash."""
    titles = [m.title for m in METHODS.values() if not (m.title in FIXED or is_reference(m.title))]
    return titles.index(title) if title in titles else zlib.crc32(encode_text(title))


def colour_of(label: str) -> str:
    """The colour of a method, the same in every plot, whatever else is in it."""
    title, _ = split_label(label)
    if is_reference(label):
        return REFERENCE
    if title in FIXED:
        return SERIES[FIXED.index(title)]
    free = SERIES[len(FIXED) :]
    return free[_number(title) % len(free)]


def _dashes(label: str) -> Any:
    """What tells lines of one colour apart, likewise the same in every plot."""
    title, more = split_label(label)
    place = 0
    if title not in FIXED and not is_reference(label):
        place = _number(title) // (len(SERIES) - len(FIXED))
    place += sum(2**number for number, way in enumerate(_WAYS) if way in more)
    return _DASHES[place % len(_DASHES)]


def _keep_within(figure: Any) -> Any:
    """Break the labels of axes that would be cut off at an edge of the figure."""
    axes = figure.axes[0]
    for label, low, high in ((axes.yaxis.label, "y0", "y1"), (axes.xaxis.label, "x0", "x1")):
        text, edges = label.get_text(), figure.bbox
        for letters in range(len(text), 7, -4):
            # what is broken takes room from the axes, which the label stands in the middle of
            figure.draw_without_rendering()
            found = label.get_window_extent()
            inside = getattr(found, low) >= getattr(edges, low) - 0.5
            if inside and getattr(found, high) <= getattr(edges, high) + 0.5:
                break
            label.set_text(textwrap.fill(text, letters))
    return figure


def plot_boxes(groups: Mapping[str, Sequence[float]], label: str) -> Any:
    """Horizontal boxes, the first group on top, with every value as a point.

    A group of fewer than `FEWEST_IN_A_BOX` values has no quartiles worth a box: its points alone.

    Args:
        groups: values by name; at least one value each.
        label: of the axis of values.
    """
    figure = new_figure(6.0, 1.0 + 0.5 * len(groups))
    axes = figure.axes[0]
    for place, (name, given) in enumerate(groups.items()):
        values, colour = list(given), colour_of(name)
        line = {"color": colour, "linewidth": 1.6}
        if len(values) >= FEWEST_IN_A_BOX:
            axes.boxplot(
                [values], positions=[place], orientation="horizontal", widths=0.55,
                showfliers=False, boxprops=line, whiskerprops=line, capprops=line,
                medianprops={**line, "linewidth": 3},
            )  # fmt: skip
        # points of one value lie beside each other
        offsets = [0.16 * ((7 * index) % 5 - 2) / 2 for index in range(len(values))]
        axes.plot(
            values, [place + offset for offset in offsets], "o",
            color=colour, alpha=0.45, markersize=4, markeredgewidth=0,
        )  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups), color=INK)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
    return _keep_within(figure)


def plot_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    marked: Mapping[str, float] | None = None,
) -> Any:
    """Lines through their points, each at its own x, with their intervals as bars.

    Args:
        curves: at least one.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        log_x: a logarithmic horizontal axis.
        marked: by label of a curve, the x at which a larger point marks a choice.
    """
    figure = new_figure()
    axes = figure.axes[0]
    for curve in curves:
        colour, x = colour_of(curve.label), list(curve.x)
        axes.plot(
            x, curve.y, marker="o", linestyle=_dashes(curve.label),
            color=colour, label=curve.label, linewidth=1.8, markersize=3.5,
        )  # fmt: skip
        if curve.interval is not None:
            low, high = zip(*curve.interval, strict=True)
            axes.vlines(x, low, high, color=colour, alpha=0.6, linewidth=1.4)
        if marked and curve.label in marked:
            chosen = list(curve.x).index(marked[curve.label])
            axes.plot(x[chosen], curve.y[chosen], "o", color=colour, markersize=9)
    if log_x:
        axes.set_xscale("log")
        places = sorted({x for curve in curves for x in curve.x})
        if len(places) <= _FEW:
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(
        loc="outside upper left", ncols=_columns([curve.label for curve in curves]), frameon=False,
        labelcolor=INK, fontsize=10, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    return _keep_within(figure)


def _columns(labels: Sequence[str]) -> int:
    """Of a legend, so that the longest label is not cut off."""
    widest = max(text_width(label, 10 * _DPI / 72) for label in labels) / _DPI + _BESIDE
    return max(1, min(3, int(_WIDTH / widest)))


def plot_bars(
    values: Mapping[str, tuple[float, tuple[float, float] | None]],
    label: str,
) -> Any:
    """Horizontal points with their intervals, the first on top, from a line at 0.

    Args:
        values: by name, the value and its interval.
        label: of the axis of values.
    """
    figure = new_figure(6.0, 1.0 + 0.3 * len(values))
    axes = figure.axes[0]
    axes.axvline(0, color=SOFT, linewidth=1)
    for place, (name, (value, interval)) in enumerate(values.items()):
        colour = colour_of(name)
        axes.plot([0, value], [place, place], color=LINE, linewidth=5, solid_capstyle="butt")
        if interval is not None:
            axes.plot(interval, [place, place], color=colour, linewidth=1.6)
        axes.plot([value], [place], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(values)), list(values), color=INK)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
    return _keep_within(figure)


def write_png(figure: Any, path: Path) -> None:
    """Write a figure on white; the same figure gives the same bytes."""
    figure.savefig(path, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})


def write_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure for a paper: as PDF, with its fonts, and as PNG of 300 dots per inch.

    Args:
        figure: of matplotlib, of any size.
        path: without a suffix.

    Returns:
        The files. The same figure gives the same bytes.
    """
    import matplotlib

    pdf, png = path.with_name(f"{path.name}.pdf"), path.with_name(f"{path.name}.png")
    # letters stay letters, which journals ask for
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        nothing = dict.fromkeys(("Creator", "Producer", "CreationDate"))
        figure.savefig(pdf, format="pdf", facecolor="white", metadata=nothing)
    figure.savefig(png, format="png", dpi=300, facecolor="white", metadata={"Software": None})
    return [pdf, png]


def render_svg(figure: Any, title: str) -> str:
    """A figure as SVG to put inside a page, in colours of the page's style sheet.

    Args:
        figure: of this module.
        title: what it shows, for those who cannot see it.
    """
    import html

    import matplotlib

    buffer = io.StringIO()
    salt = hashlib.sha256(encode_text(title)).hexdigest()[:12]
    # text stays text; ids depend on the title alone and differ between the plots of a page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # within a page ids must differ from those of its other plots
    text = re.sub(r'\b(id="|href="#|url\(#)(?=\w)', rf"\g<1>{salt}-", text)
    label = html.escape(title, quote=True)
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" ', 1)


__all__ = [
    "FIXED",
    "Curve",
    "colour_of",
    "default_style",
    "is_reference",
    "new_figure",
    "plot_bars",
    "plot_boxes",
    "plot_curves",
    "render_svg",
    "split_label",
    "write_figure",
    "write_png",
]
