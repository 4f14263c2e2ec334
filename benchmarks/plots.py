"""Pictures of rows: one per suite and device, as SVG that says which rows it shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rows import format_seconds

from dtrak.runs.measure import format_bytes

Rows = Sequence[dict[str, Any]]

OURS, THEIRS, BASELINE = "#1f5fa8", "#9a9a9a", "#303030"
_STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "dtrak",
}


def fingerprint(rows: Rows) -> str:
    """Of the rows a picture shows: it is stale when they change."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()[:16]


def file_name(suite: str, device: str) -> str:
    """``sketcher-amd-epyc-2-threads.svg``."""
    return f"{suite}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.svg"


def is_current(file: Path, rows: Rows) -> bool:
    """Whether a picture exists and shows these rows."""
    return file.is_file() and fingerprint(rows) in file.read_text(encoding="utf-8")


def save(suite: str, rows: Rows, file: Path) -> None:
    """Draw the rows of one suite and device."""
    with mpl.rc_context(_STYLE):
        figure = DRAWINGS[suite](rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            file,
            format="svg",
            bbox_inches="tight",
            metadata={"Date": None, "Description": f"rows {fingerprint(rows)}"},
        )


def is_ours(provider: str) -> bool:
    """Whether a provider is this package's."""
    return provider.startswith(
        ("features: ", "philox", "fast_jl generator", "sjlt", "dual", "fused", "sketcher")
    )


def _groups(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def _readable(axis: Axis, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 times a power of ten, where there is room, written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: text(value))


def _points(axes: Axes, rows: Rows, scale: float, text: Callable[[float], str]) -> None:
    """A point per row from the first down, p20 to p80 as whiskers, on a logarithmic scale."""
    for place, row in enumerate(rows):
        low, middle, high = (row[f"{which}_seconds"] / scale for which in ("p20", "p50", "p80"))
        is_baseline = row["provider"] == row["baseline"]
        color = BASELINE if is_baseline else OURS if is_ours(row["provider"]) else THEIRS
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(middle, place, "o", color=color, markersize=6)
        axes.annotate(
            text(middle),
            (high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    _readable(axes.xaxis, text)
    axes.margins(x=0.12)
    axes.grid(axis="y", linewidth=0.3)


def draw_groups(rows: Rows) -> Figure:
    """A panel per group: times over the baseline's, or seconds where there is none."""
    groups = _groups(rows)
    heights = [len(group) + 2 for group in groups.values()]
    figure = Figure(figsize=(7.5, 0.26 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)
    for axes, (name, group) in zip(panels[:, 0], groups.items(), strict=True):
        baseline = next((row for row in group if row["provider"] == row["baseline"]), None)
        if baseline is None:
            _points(axes, group, 1.0, format_seconds)
            axes.set_xlabel("time", fontsize=8)
        else:
            _points(axes, group, baseline["p50_seconds"], lambda value: f"{value:.3g}x")
            axes.axvline(1, color=BASELINE, linewidth=0.8, linestyle=":")
            axes.set_xlabel(f"time over that of “{baseline['provider']}”", fontsize=8)
        axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
    return figure


def draw_layers(rows: Rows) -> Figure:
    """A line per kind of features: price of a backward, layer by layer."""
    groups = list(_groups(rows))
    curves: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["provider"] != row["baseline"] and row["ratio"] is not None:
            curves.setdefault(row["provider"], {})[row["group"]] = row["ratio"]
    figure = Figure(figsize=(9.5, max(2.0, 0.2 * len(groups) + 1.2)), layout="constrained")
    axes = figure.subplots()
    markers = "osD^vPX"
    for number, (provider, ratios) in enumerate(curves.items()):
        places = [groups.index(group) for group in ratios]
        axes.plot(
            list(ratios.values()),
            places,
            markers[number % len(markers)],
            label=provider,
            markersize=4,
            color=None if is_ours(provider) else THEIRS,
        )
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xscale("log")
    _readable(axes.xaxis, lambda value: f"{value:.3g}x")
    axes.axvline(1, color=BASELINE, linewidth=0.8, linestyle=":")
    axes.set_xlabel("time over that of the layer's training step")
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _count(size: int) -> str:
    """``800``, ``4,096``, ``186k``, ``1.66M``."""
    if size < 1e5:
        return f"{size:,}"
    return f"{size / 1e3:.0f}k" if size < 1e6 else f"{size / 1e6:.3g}M"


def draw_growth(rows: Rows) -> Figure:
    """Time above, peak memory below, an axis per column; exponents in the legends."""
    columns = _groups(rows)
    figure = Figure(figsize=(2.7 * len(columns), 5.6), layout="constrained")
    panels = figure.subplots(2, len(columns), squeeze=False)
    colors = {"sketcher, sjlt": OURS, "sketcher, rademacher": "#d07a1f"}
    for column, curves in enumerate(columns.values()):
        for row in curves:
            color = colors.get(row["provider"], OURS if is_ours(row["provider"]) else THEIRS)
            for line, (values, exponent) in enumerate(
                ((row["p50_seconds"], "time_exponent"), (row["peak_bytes"], "memory_exponent"))
            ):
                label = f"{row['provider']} ({row[exponent]:+.2f})"
                panels[line, column].plot(
                    row["x"], values, "o-", markersize=3, linewidth=1.2, color=color, label=label
                )
            panels[0, column].fill_between(
                row["x"], row["p20_seconds"], row["p80_seconds"], color=color, alpha=0.2
            )
        for line in range(2):
            axes = panels[line, column]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(curves[0]["x"], [_count(x) for x in curves[0]["x"]], fontsize=7)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(y=0.15)
            axes.legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
            axes.set_xlabel(curves[0]["axis"])
        _readable(panels[0, column].yaxis, format_seconds)
        _readable(panels[1, column].yaxis, lambda value: format_bytes(int(value)))
    panels[0, 0].set_ylabel("time")
    panels[1, 0].set_ylabel("peak memory")
    return figure


DRAWINGS: dict[str, Callable[[Rows], Figure]] = {
    "attribute": draw_groups,
    "growth": draw_growth,
    "layers": draw_layers,
    "projection": draw_groups,
    "ridge": draw_groups,
    "sketcher": draw_groups,
}
