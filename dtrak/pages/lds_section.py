"""A linear datamodelling score as a section of a page: a table and plots for each kind of query.

The figures are those of `table.make_table`; nothing is computed here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from ..evaluation.lds.table import select_rows
from ..runs.choices import counted
from .canvas import default_style
from .lds_plots import plot_lds
from .lds_report import lds_table, row_notes
from .plots import render_svg

_AGAINST = {
    "methods": "by method",
    "damping": "against damping",
    "timesteps": "against number of timesteps",
}
_HEADINGS = {"validation": "Held-out images", "generated": "Generated images"}


def render_section(table: Mapping[str, Any]) -> str:
    """The table as HTML.

    Args:
        table: of `table.make_table`.
    """
    about = table["about"]
    models = counted(about["models"], "model")
    parts = [
        f"<p>How well each method's scores rank {models}, retrained on random subsets of "
        f"{about['subset_size']:,} of {about['samples']:,} training images, by the loss of a "
        "query: mean rank correlation, 100 is perfect and 0 is chance. The damping λ of the "
        "main figure was chosen on other models than those it is judged on. “In-sample” is "
        "the published protocol, which picks the λ that looks best on the very models it "
        "reports: it flatters the methods that have one. “λ auto” looks at no retrained "
        f"model. Intervals are bootstraps with {table['num_resamples']:,} resamples of the "
        "subset models.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in row_notes(table)),
    ]
    for kind in dict.fromkeys(row["queries"] for row in table["rows"]):
        rows = select_rows(table, kind)
        heading = _HEADINGS.get(kind, kind)
        parts.append(f"<h3>{html.escape(heading)}</h3>")
        parts.append(lds_table(table, kind, f"LDS on {heading.lower()}, %").html())
        with default_style():
            plots = "".join(
                f'<figure class="card">'
                f"{render_svg(figure, f'LDS {_AGAINST[name]} on {heading.lower()}')}</figure>"
                for name, figure in plot_lds(rows).items()
            )
        parts.append(f'<div class="plots">{plots}</div>')
    return "\n".join(parts)
