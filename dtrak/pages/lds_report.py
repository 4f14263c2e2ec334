"""The table of an experiment for a terminal, as Markdown and as plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation.lds.options import RETRAIN
from ..evaluation.lds.table import (
    AUTO,
    FEWEST_WITH_INTERVALS,
    UNIT,
    Results,
    digest,
    packaged_table,
    select_rows,
)
from ..runs.choices import counted
from ..training.presets import PRESETS
from .lds_plots import plot_lds
from .plots import default_style, is_reference, write_png
from .tables import Table

_COLUMNS = (
    "method",
    "S",
    "projection",
    "LDS",
    "95 % interval",
    "λ chosen",
    "λ = 1",
    "λ auto",
    "in-sample",
)
# for terminals that do not hold them all, the first that fit
_NARROWER = (
    ("method", "S", "projection", "LDS", "95 % interval", "λ auto"),
    ("method", "S", "projection", "LDS", "95 % interval"),
    ("method", "S", "projection", "LDS"),
    ("method", "S", "LDS"),
)
_FEW_MODELS = 20
_CROSS_FITTED = (
    "Datamodel and empirical influence are cross-fitted: to one half of the models, and judged on "
    "the other, both ways. Published: fitted to 64 to 512 models of their own."
)
_RETRAINED = (
    "Datamodel and empirical influence, n models: fitted to the losses of the first n models of a "
    "family of their own, which nothing is judged on."
)
_ENSEMBLES = (
    "Mean of n models: scores averaged over the first n models of the retrain family, each trained "
    "on half of the data; λ is one multiple, for all, of each model's own mean squared norm, "
    "chosen as for other methods."
)
_LEGEND = (
    "LDS in %, mean over queries. λ in units of the mean squared feature norm. "
    "LDS: λ chosen on one half of the models and judged on the other, both ways; methods without λ "
    "are judged on the same halves. λ = 1 and auto: fixed rules, no model looked at, judged on all "
    "models. In-sample: the best λ on the models it is judged on, as published; optimistic.",
    "Intervals: 95 %, BCa, over resampled subset models (and with them their training noise), with "
    "λ chosen anew in each. They are for the LDS of infinitely many models, from which a rank "
    "correlation over few is biased towards zero. They do not cover other queries, another full "
    "model or other data.",
)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(estimate: Mapping[str, Any], kind: str = "bca") -> str:
    if kind not in estimate:
        return ""
    low, high = estimate[kind]
    return f"{_percent(low)} to {_percent(high)}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the table, in the order of `_COLUMNS`."""
    damped = "sweep" in row
    return (
        row["method"],
        str(row["timesteps"] or ""),
        {"none": "exact"}.get(row["projection"], row["projection"]),
        _percent(row["held_out"]["lds"]),
        _interval(row["held_out"]),
        ", ".join(dict.fromkeys(row["chosen"])) if damped else "",
        _percent(row[UNIT]["lds"]) if damped else "",
        _percent(row[AUTO]["lds"]) if damped else "",
        f"{_percent(row['in_sample']['lds'])} (λ {row['in_sample']['rule']})" if damped else "",
    )


def _title(table: Mapping[str, Any], kind: str) -> str:
    about = table["about"]
    queries = counted(about["queries"][kind], f"{kind} query", f"{kind} queries")
    return f"{about['preset']}, {queries}, {counted(about['models'], 'model')}"


def _kinds(table: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["queries"] for row in table["rows"]))


def lds_table(table: Mapping[str, Any], kind: str, title: str = "") -> Table:
    """What there is of one kind of query, best first."""
    rows = select_rows(table, kind)
    return Table(
        _COLUMNS,
        [_cells(row) for row in rows],
        title,
        words=("projection",),
        soft=[number for number, row in enumerate(rows) if is_reference(row["method"])],
    ).without_empty()


def print_table(table: Mapping[str, Any], console: Console) -> None:
    """The table, one per kind of query, and what the intervals cover.

    A narrow terminal gets fewer columns, never shortened figures.
    """
    for kind in _kinds(table):
        lds_table(table, kind, _title(table, kind)).show(console, _NARROWER)
    for line in _legend(table):
        console.print(line, style="dim", highlight=False)


def _legend(table: Mapping[str, Any]) -> list[str]:
    models = table["about"]["models"]
    few = f"Only {counted(models, 'model')}: too few for "
    few += (
        f"intervals, which need {FEWEST_WITH_INTERVALS}, and for any figure to mean much."
        if models < FEWEST_WITH_INTERVALS
        else "the intervals to mean much."
    )
    about = _LEGEND if models >= FEWEST_WITH_INTERVALS else _LEGEND[:1]
    return [*about, *row_notes(table), *([few] if models < _FEW_MODELS else [])]


def row_notes(table: Mapping[str, Any]) -> list[str]:
    """What rows that not every table has are, a paragraph each."""
    rows = table["rows"]
    notes = {
        _CROSS_FITTED: any("sweep" not in row and "all" not in row for row in rows),
        _RETRAINED: RETRAIN in table["about"],
        _ENSEMBLES: any("half-data" in row["method"] for row in rows),
    }
    return [note for note, is_needed in notes.items() if is_needed]


def render_markdown(table: Mapping[str, Any]) -> str:
    """The table and the differences as a page of documentation."""
    about = table["about"]
    whose = f"--preset {about['preset']}" if about["preset"] in PRESETS else "--run FOLDER"
    origin = f"Made by `python -m dtrak.lds report {whose} --markdown FILE`"
    if _is_packaged(table):
        origin += (
            "; every figure follows from the losses and ranks in the package, and a test "
            "recomputes them"
        )
    lines = [
        f"# Linear datamodelling score: {about['preset']}",
        "",
        f"{origin}.",
        "",
        f"{counted(about['models'], 'model')}, each trained on {about['subset_size']} of "
        f"{about['samples']} images ({about['steps']} steps); the loss of a query is its mean over "
        f"{counted(about['loss_timesteps'], 'timestep')} and "
        f"{counted(about['noise_seeds'], 'noise')}, the same for all models.",
        "",
        *(line + "\n" for line in _legend(table)),
    ]
    for kind in _kinds(table):
        lines += [f"## {kind.capitalize()} queries ({about['queries'][kind]})", ""]
        lines += [*lds_table(table, kind).markdown(), ""]
    lines += [
        "## Differences",
        "",
        "Between two rows, on the same resamples: LDS in points of a percent, 95 % BCa interval. "
        "`mean squared norm - auto` compares the two rules for λ, and `- exact` a projection with "
        "none, on all models; the others compare the column LDS.",
        "",
    ]
    differences = Table(
        ("difference", "queries", "S", "projection", "points", "95 % interval"),
        [
            (
                entry["name"],
                entry["queries"],
                str(entry["timesteps"] or ""),
                {"none": "exact"}.get(entry["projection"], entry["projection"]),
                f"{100 * entry['difference']:+.1f}",
                _interval(entry),
            )
            for entry in table["differences"]
        ],
        words=("queries", "projection"),
    )
    return "\n".join([*lines, *differences.without_empty().markdown()]) + "\n"


def _is_packaged(table: Mapping[str, Any]) -> bool:
    """Whether a table is the one that comes with the package, not of a user's own run."""
    return packaged_table(table["about"]["preset"]) == table


def read_table(file: Path, results: Results) -> dict[str, Any] | None:
    """The table an earlier report left in a run.

    Args:
        file: ``report/table.json``.
        results: of the run.

    Returns:
        The table; None where there is none, it is damaged or of other results, and is to be made
        anew.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        fits = table["results"] == digest(results) and isinstance(table["num_resamples"], int)
        # of few models there are no intervals
        figure = "bca" if len(results.subsets) >= FEWEST_WITH_INTERVALS else "lds"
        shown = [row["held_out"][figure] for row in table["rows"]]
        is_whole = bool(shown and table["about"]) and "differences" in table
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(table) if fits and is_whole else None


def write_plots(table: Mapping[str, Any], folder: Path) -> list[Path]:
    """LDS against damping, against S and against method, a PNG each per kind of query.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with default_style():
        for kind in _kinds(table):
            for name, figure in plot_lds(select_rows(table, kind)).items():
                written.append(folder / f"lds-{name}-{kind}.png")
                write_png(figure, written[-1])
    return written
