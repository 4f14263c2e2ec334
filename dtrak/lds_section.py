"""A linear datamodelling score as a section of a page: a table and plots for each kind of query.

The figures are those of `lds_table.make_table`; nothing is computed here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import default_style
from .lds_report import row_notes
from .lds_table import AUTO, select_rows
from .pages import render_columns
from .plots import FIXED, Curve, plot_bars, plot_curves, render_svg

_REFERENCE = "Random"
# more lines than this cannot be told apart
_MOST_CURVES = 6
_HEADINGS = {"validation": "Held-out images", "generated": "Generated images"}
_COLUMNS = ("Method", "LDS", "95 % (BCa)", "In-sample λ", "Auto λ", "S", "Projection")


def render_section(table: Mapping[str, Any]) -> str:
    """The table as HTML.

    Args:
        table: of `lds_table.make_table`.
    """
    about = table["about"]
    parts = [
        f"<p>How well each method's scores rank {about['models']} models, retrained on random "
        f"subsets of {about['subset_size']:,} of {about['samples']:,} training images, by the loss "
        "of a query: mean rank correlation, 100 is perfect and 0 is chance. The damping λ of the "
        "main figure was chosen on other models than those it is judged on. “In-sample λ” is the "
        "published protocol, which picks the λ that looks best on the very models it reports: it "
        "flatters the methods that have one. “Auto λ” looks at no retrained model. Intervals are "
        f"bootstraps with {table['num_resamples']:,} resamples of the subset models.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in row_notes(table)),
    ]
    for kind in dict.fromkeys(row["queries"] for row in table["rows"]):
        rows = select_rows(table, kind)
        heading = _HEADINGS.get(kind, kind)
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts.append(render_columns(f"LDS on {heading.lower()}, %", _COLUMNS, _cells(rows)))
        plots = "".join(
            f'<figure class="card">{svg}</figure>' for svg in _plots(rows, heading.lower())
        )
        parts.append(f'<div class="plots">{plots}</div>')
    return "\n".join(parts)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−")


def _interval(ends: Sequence[float]) -> str:
    return f"[{_percent(ends[0])}, {_percent(ends[1])}]"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            row["method"],
            _percent(row["held_out"]["lds"]),
            _interval(row["held_out"]["bca"]),
            _percent(row["in_sample"]["lds"]) if "in_sample" in row else "",
            _percent(row[AUTO]["lds"]) if AUTO in row else "",
            str(row["timesteps"] or ""),
            "exact" if row["projection"] == "none" else row["projection"],
        )
        for row in rows
    ]


def _plots(rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """LDS by method, against damping and against S, as far as there is something to show."""
    most = max((row["timesteps"] for row in rows), default=0)
    main = next((r["projection"] for r in rows if r["projection"] not in ("", "none")), "")
    chosen = [row for row in rows if row["projection"] in ("", main)]
    at_most = [row for row in chosen if row["timesteps"] in (0, most)]
    bars = {
        row["method"]: (
            100 * row["held_out"]["lds"],
            (100 * row["held_out"]["bca"][0], 100 * row["held_out"]["bca"][1]),
        )
        for row in at_most
    }
    drawn = []
    with default_style():
        suffix = f" at S = {most}" if most else ""
        figure = plot_bars(bars, f"LDS, %{suffix}", [_REFERENCE])
        drawn.append(render_svg(figure, f"LDS by method on {where}"))
        swept = _foremost([row for row in at_most if "sweep" in row])
        if swept:
            figure = plot_curves(
                [_sweep(row) for row in swept],
                f"λ, in mean squared feature norms{suffix}",
                "LDS, %",
                log_x=True,
            )
            drawn.append(render_svg(figure, f"LDS against damping on {where}"))
        counts = sorted({row["timesteps"] for row in chosen if row["timesteps"]})
        if len(counts) > 1:
            figure = plot_curves(
                _by_timesteps(chosen), "S, timesteps of a feature", "LDS, %", log_x=True
            )
            drawn.append(render_svg(figure, f"LDS against number of timesteps on {where}"))
    return drawn


def _foremost(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many rows as can be told apart: the two methods of the paper, then the best."""
    return sorted(rows, key=lambda row: row["method"] not in FIXED)[:_MOST_CURVES]


def _sweep(row: Mapping[str, Any]) -> Curve:
    points = [
        (float(rule), 100 * found["lds"]) for rule, found in row["sweep"].items() if rule != AUTO
    ]
    x, y = zip(*sorted(points), strict=True)
    return Curve(row["method"], x, y)


def _by_timesteps(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["timesteps"]:
            best.setdefault(row["method"], row)
    curves = []
    for method in (row["method"] for row in _foremost(list(best.values()))):
        found = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["timesteps"]
        )
        curves.append(
            Curve(
                method,
                [row["timesteps"] for row in found],
                [100 * row["held_out"]["lds"] for row in found],
                [
                    (100 * row["held_out"]["bca"][0], 100 * row["held_out"]["bca"][1])
                    for row in found
                ],
            )
        )
    return curves
