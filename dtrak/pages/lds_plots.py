"""Plots of a linear datamodelling score: against method, damping and number of timesteps.

The figures are those of `table.make_table`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.lds.table import AUTO, UNIT
from .plots import FIXED, Curve, plot_bars, plot_curves

# more lines than this cannot be told apart
_MOST_CURVES = 6

Rows = Sequence[Mapping[str, Any]]


def plot_lds(rows: Rows) -> dict[str, Any]:
    """What there is to show of one kind of query; call it within `canvas.default_style`.

    Args:
        rows: of `table.select_rows`, the best first; at least one.

    Returns:
        Figures under ``methods``, ``damping`` and ``timesteps``, as far as there are rows for them.
    """
    most = max(row["timesteps"] for row in rows)
    main = _main_projection(rows)
    chosen = [row for row in rows if row["projection"] in ("", main)]
    at_most = [row for row in chosen if row["timesteps"] in (0, most)]
    suffix = f", S = {most}" if most else ""
    drawn = {"methods": _plot_methods(at_most, suffix)}
    swept = _foremost([row for row in at_most if "sweep" in row])
    if swept:
        drawn["damping"] = _plot_damping(swept, suffix)
    seen: dict[str, set[int]] = {}
    for row in chosen:
        seen.setdefault(row["method"], set()).add(row["timesteps"])
    # a method at one S alone has no curve
    several = [row for row in chosen if len(seen[row["method"]]) > 1]
    if several:
        drawn["timesteps"] = _plot_timesteps(several)
    return drawn


def _main_projection(rows: Rows) -> str:
    """The projection every method was evaluated with."""
    kinds = [row["projection"] for row in rows if row["projection"]]
    return max(kinds, key=kinds.count, default="")


def _foremost(rows: Rows) -> Rows:
    """As many rows as can be told apart: the two methods of the paper, then the best."""
    return sorted(rows, key=lambda row: row["method"] not in FIXED)[:_MOST_CURVES]


def _percent(estimate: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    # of few models there are no intervals
    low, high = estimate.get("bca", [estimate["lds"]] * 2)
    return 100 * estimate["lds"], (100 * low, 100 * high)


def _plot_methods(rows: Rows, suffix: str) -> Any:
    values = {row["method"]: _percent(row["held_out"]) for row in rows}
    interval = ", 95 % interval" if all("bca" in row["held_out"] for row in rows) else ""
    return plot_bars(values, f"held-out LDS (%){suffix}{interval}")


def _plot_damping(rows: Rows, suffix: str) -> Any:
    curves, marked = [], {}
    for row in rows:
        unit = row["sweep"][UNIT]["damping"]
        points = sorted(
            (point["damping"] / unit, 100 * point["lds"]) for point in row["sweep"].values()
        )
        x, y = zip(*points, strict=True)
        curves.append(Curve(row["method"], x, y))
        marked[row["method"]] = row["sweep"][AUTO]["damping"] / unit
    return plot_curves(
        curves,
        f"λ / mean squared feature norm{suffix}; large point: λ auto",
        "LDS on all models (%)",
        log_x=True,
        marked=marked,
    )


def _plot_timesteps(rows: Rows) -> Any:
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        best.setdefault(row["method"], row)
    curves = []
    for method in (row["method"] for row in _foremost(list(best.values()))):
        found = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["timesteps"]
        )
        y, intervals = zip(*(_percent(row["held_out"]) for row in found), strict=True)
        curves.append(Curve(method, [row["timesteps"] for row in found], y, intervals))
    return plot_curves(curves, "S, timesteps per feature", "held-out LDS (%)", log_x=True)
