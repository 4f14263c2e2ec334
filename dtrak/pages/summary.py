"""What a finished run shows in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..runs.measure import Stage, format_bytes
from ..runs.record import REPORT, SCORES
from .tables import Table, values_table

if TYPE_CHECKING:
    from ..findings import Findings

_SHOWN = 16


def print_summary(
    results: Path,
    reused: Mapping[str, float | None],
    stages: Sequence[Stage],
    facts: Mapping[str, str],
) -> None:
    """Show what a run cost, its figures and where its results are.

    Args:
        results: folder of its scores and report.
        reused: the stages that needed no work, with what they once took, where that is known.
        stages: the others.
        facts: figures, as name and text.
    """
    once = [
        (name, "reused" if seconds is None else f"reused ({seconds:.1f})", "")
        for name, seconds in reused.items()
    ]
    now = [
        (
            stage.name,
            f"{stage.seconds:.1f}",
            format_bytes(stage.peak_bytes) if stage.peak_bytes else "not known",
        )
        for stage in stages
    ]
    rows = [*once, *now, ("total", f"{sum(stage.seconds for stage in stages):.1f}", "")]
    console = Console()
    columns = ("stage", "seconds", "peak memory")
    Table(columns, rows, soft=range(len(once)), total=(len(rows) - 1,)).show(console)
    values_table("", list(facts.items())).show(console)
    for name, file in (("scores", SCORES), ("report", REPORT)):
        console.print(f"{name}: {results / file}", highlight=False, soft_wrap=True)


def print_findings(query_ids: Sequence[str], findings: Findings | None) -> None:
    """Show what is known beside the scores of the first queries; nothing where nothing is.

    Args:
        query_ids: M names.
        findings: of M queries.
    """
    if findings is None:
        return
    rows = []
    for row, name in enumerate(query_ids[:_SHOWN]):
        parts = [] if findings.verdicts is None else [findings.verdicts[row]]
        if findings.reliabilities is not None:
            parts.append(f"Reliability {float(findings.reliabilities[row]):.2f}.")
        if findings.agreement is not None and findings.look_alikes is not None:
            count = findings.look_alikes.shape[1]
            alike = round(count * float(findings.agreement[row]))
            parts.append(f"{alike} of {count} look-alikes ({findings.likeness}) score highest.")
        if findings.groups is not None:
            parts.append(f"Groups: {findings.groups.describe(row)}.")
        rows.append((name, " ".join(parts)))
    more = len(query_ids) - len(rows)
    note = f"{more:,} more queries are in the report." if more else ""
    columns = ("query", "what is known of its scores")
    Table(columns, rows, note=note, words=columns).show(Console())
