"""The first page of a run's folder: its sets of queries, its evaluations, its costs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ..runs.files import encode_text, write_atomically
from ..runs.measure import format_bytes
from ..runs.record import MANIFEST, PICTURE, REPORT, SCORES, list_queries, read_json
from ..runs.stages import read_seconds
from .html import format_seconds, render_page, render_table

INDEX = "index.html"
_TITLE = "What this run found"
# what a reader asks first, of the settings of a set
_SHOWN = ("method", "output function", "timesteps", "projection", "proj_dim", "damping")


def write_index(run: Path) -> Path:
    """Write ``index.html`` of the folder of a run of `dtrak.attribute`.

    Args:
        run: the folder, with at least one set of queries.

    Returns:
        The file.

    Raises:
        ResultsError: a manifest in it is damaged.
    """
    sets = [
        _render_set(run, name, folder, read_json(folder / MANIFEST))
        for name, folder in list_queries(run).items()
    ]
    seconds = [(name, format_seconds(value)) for name, value in read_seconds(run).items()]
    if seconds:
        seconds.append(("Total", format_seconds(sum(read_seconds(run).values()))))
    sizes = [
        (place.name, format_bytes(sum(f.stat().st_size for f in place.rglob("*") if f.is_file())))
        for place in sorted(run.iterdir())
        if place.is_dir()
    ]
    costs = render_table("Time, over all commands", seconds, timed=True)
    costs += render_table("Disk", sizes)
    body = (
        f'<div class="tables">\n{"".join(sets)}</div>\n{_render_evaluations(run)}\n'
        f'<section class="part">\n<h2>What it cost</h2>\n<div class="tables">\n{costs}</div>\n'
        "</section>"
    )
    lead = f'<p class="lead">{html.escape(run.resolve().name)}</p>'
    file = run / INDEX
    write_atomically(file, encode_text(render_page(_TITLE, lead, body)))
    return file


def _render_set(run: Path, name: str, folder: Path, manifest: dict[str, Any]) -> str:
    settings = manifest["settings"]
    known = [(key, settings[key]) for key in _SHOWN if key in settings]
    count = ("pictures", manifest["facts"].get("pictures", ""))
    table = render_table(name, [count, *known])
    place = folder.relative_to(run).as_posix()
    links = " · ".join(
        f'<a href="{html.escape(f"{place}/{file}", quote=True)}">{label}</a>'
        for file, label in ((REPORT, "report"), (PICTURE, "picture"), (SCORES, "scores"))
        if (folder / file).is_file()
    )
    # inside the card of the table
    return table.removesuffix("</section>\n") + f'<p class="note">{links}</p>\n</section>\n'


def _render_evaluations(run: Path) -> str:
    """Links to what `dtrak.lds` and `dtrak.counterfactual` left in the folder or beside it."""
    beside = run.resolve().parent / f"lds-{run.resolve().name}"
    places = [
        ("Do scores predict retraining? (LDS)", run / "report" / "table.html", "."),
        (
            "Do scores predict retraining? (LDS)",
            beside / "report" / "table.html",
            f"../{beside.name}",
        ),
        ("Do pictures change without them?", run / "counterfactual" / "report.html", "."),
    ]
    found = [
        f'<li><a href="{html.escape(f"{base}/{file.parent.name}/{file.name}", quote=True)}">'
        f"{html.escape(title)}</a></li>"
        for title, file, base in places
        if file.is_file()
    ]
    if not found:
        return (
            '<p class="soft">Neither python -m dtrak.lds nor python -m dtrak.counterfactual has '
            "been run on it: how far its scores can be trusted was not measured.</p>"
        )
    return f'<section class="part">\n<h2>Evaluations</h2>\n<ul>\n{"".join(found)}</ul>\n</section>'
