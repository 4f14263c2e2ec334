"""What was found of what was planted, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.planted.retrieval import FIRST, Found, mean_interval
from ..methods import get_method
from ..runs.choices import counted
from .tables import Table


def retrieval_table(rows: Sequence[Found], num_train: int, planted: int) -> Table:
    """The methods on queries of one kind, the best first.

    Args:
        rows: of one kind of queries, at least one.
        num_train: N.
        planted: P.
    """
    ordered = sorted(rows, key=lambda row: -mean_interval(row.average_precision)[0])
    cells = []
    for row in ordered:
        mean, low, high = mean_interval(row.average_precision)
        method = get_method(row.method)
        way = row.whitening if method.is_damped else ""
        cells.append(
            (
                method.title,
                {"none": "no"}.get(way, way),
                f"{mean:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{mean_interval(row.precision)[0]:.0%}",
                f"{mean_interval(row.recall)[0]:.0%}",
            )
        )
    count = len(ordered[0].average_precision)
    note = (
        f"{counted(count, 'query', 'queries')}, {planted:,} planted images of {num_train:,}; a "
        f"random order finds {planted / num_train:.0%} of each. 95 % percentile bootstrap "
        "intervals of the mean over queries: of one training, with one draw of planted images."
    )
    columns = (
        "method",
        "whitened",
        "average precision",
        "95 % interval",
        f"of the first {FIRST}",
        f"found in {planted:,}",
    )
    words = ("whitened", "95 % interval")
    return Table(columns, cells, f"Queries: {ordered[0].queries}", note, words)
