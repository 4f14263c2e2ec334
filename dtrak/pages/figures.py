"""Figures for a paper: strips and plots of a run as PDF and PNG, of the width of a text column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.lds.table import select_rows
from . import counterfactual, influence
from .canvas import default_style
from .lds_plots import plot_lds
from .plots import write_figure
from .strips import PRINT

if TYPE_CHECKING:
    from ..evaluation.counterfactual.results import Counterfactual


def write_figures(
    folder: Path,
    rows: Sequence[influence.Row],
    query_kind: str,
    table: Mapping[str, Any] | None,
    changed: Counterfactual | None,
) -> list[Path]:
    """Write all that there is to show; returns the files.

    Args:
        folder: made if missing.
        rows: of `influence.gather`; none for no strips.
        query_kind: what one query is, in words.
        table: of an LDS, as `table.make_table`.
        changed: pictures drawn again by retrained models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    with default_style():
        if rows:
            figures["strips"] = influence.draw(rows, query_kind, look=PRINT).figure
        kinds = [] if table is None else dict.fromkeys(row["queries"] for row in table["rows"])
        for kind in kinds:
            assert table is not None
            for name, figure in plot_lds(select_rows(table, kind)).items():
                figures[f"lds-{name}-{kind}"] = figure
        if changed is not None:
            for metric in changed.values:
                figures[f"counterfactual-{metric}"] = counterfactual.plot_distances(changed, metric)
            figures["counterfactual-strips"] = counterfactual.draw(changed, look=PRINT).figure
        written = [write_figure(figure, folder / name) for name, figure in figures.items()]
    return [file for files in written for file in files]
