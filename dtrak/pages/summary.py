"""What a finished run shows in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..runs.measure import Stage, format_bytes
from ..runs.record import REPORT, SCORES
from .tables import Table, values_table


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
