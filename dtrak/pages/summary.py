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
    from torch import Tensor

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


def print_findings(query_ids: Sequence[str], scores: Tensor, findings: Findings | None) -> None:
    """Show what is known beside the scores of the first queries; nothing where nothing is.

    Args:
        query_ids: M names.
        scores: ``[M, N]``.
        findings: of these.
    """
    if findings is None:
        return
    from ..methods.verdicts import RATE, count_clear

    N, shown = scores.shape[1], range(min(len(query_ids), _SHOWN))
    columns: dict[str, list[str]] = {"query": [query_ids[row] for row in shown]}
    notes = []
    if findings.errors is not None and findings.reliabilities is not None:
        clear = count_clear(scores, findings.errors).tolist()
        columns["beyond noise"] = [f"{clear[row]:,}" for row in shown]
        columns["reliability"] = [f"{float(findings.reliabilities[row]):.2f}" for row in shown]
        notes.append(f"noise alone puts {RATE * N:,.0f} of {N:,} scores beyond 1.96 errors")
    if findings.stands_out is not None:
        counts = findings.stands_out.sum(1).tolist()
        columns["stand out"] = [f"{counts[row]:,}" if counts[row] else "nothing" for row in shown]
        notes.append(f"stand out: against {findings.num_held_out:,} held-out images, 5 % false")
    if findings.look_alikes is not None and findings.agreement is not None:
        count = findings.look_alikes.shape[1]
        columns[f"of {count} look-alikes"] = [
            str(round(count * float(findings.agreement[row]))) for row in shown
        ]
        notes.append(f"look-alikes, by {findings.likeness}, among the {count} highest scores")
    if findings.groups is not None:
        columns["groups (share of what is positive)"] = [
            findings.groups.describe(row) for row in shown
        ]
    if len(query_ids) > _SHOWN:
        notes.append(f"the first {_SHOWN} of {len(query_ids):,} queries")
    rows = list(zip(*columns.values(), strict=True))
    words = [name for name in columns if name.startswith("groups")]
    said = "; ".join(notes)
    # "CLIP" keeps its capitals
    note = f"{said[:1].upper()}{said[1:]}." if notes else ""
    Table(tuple(columns), rows, note=note, words=words).show(Console())
