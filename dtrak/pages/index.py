"""The first page of a run's folder: its sets of queries, its evaluations, its costs."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.files import encode_text, write_atomically
from ..runs.measure import format_bytes
from ..runs.record import MANIFEST, PICTURE, REPORT, SCORES, list_queries, read_json
from ..runs.stages import read_seconds
from .html import render_page
from .tables import times_table, values_table

INDEX = "index.html"
# what evaluations leave for a reader
_EVALUATED = ("*.png", "table.json", "results.json")
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
    sizes = [
        (place.name, format_bytes(sum(f.stat().st_size for f in place.rglob("*") if f.is_file())))
        for place in sorted(run.iterdir())
        if place.is_dir()
    ]
    costs = times_table("Time, over all commands", list(read_seconds(run).items())).html()
    costs += values_table("Disk", sizes).html()
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
    table = values_table(name, [count, *known]).html()
    place = folder.relative_to(run).as_posix()
    files = ((REPORT, "report"), (PICTURE, "picture"), (SCORES, "scores"))
    links = _links({label: f"{place}/{file}" for file, label in files if (folder / file).is_file()})
    # inside the card of the table
    return table.removesuffix("</section>\n") + f'<p class="note">{links}</p>\n</section>\n'


def refresh_index(folder: Path) -> None:
    """Write the first page of a run anew, if it has one, after something was measured in it."""
    if (folder / INDEX).is_file():
        write_index(folder)


def _links(places: Mapping[str, str]) -> str:
    """Links to files of a run, by what they are called."""
    return " · ".join(
        f'<a href="{html.escape(place, quote=True)}">{html.escape(label)}</a>'
        for label, place in places.items()
    )


def _render_evaluations(run: Path) -> str:
    """Links to what `dtrak.lds` and `dtrak.counterfactual` left in the folder or beside it."""
    lds = "Do scores predict retraining? (LDS)"
    folders = {
        "report": lds,
        f"../lds-{run.resolve().name}/report": lds,
        "counterfactual": "Do pictures change without them?",
    }
    found = []
    for folder, question in folders.items():
        place = run.resolve() / folder
        files = [file for kind in _EVALUATED for file in sorted(place.glob(kind))]
        if files:
            links = _links({file.stem: f"{folder}/{file.name}" for file in files})
            found.append(f"<li>{question}<br>{links}</li>\n")
    if not found:
        return (
            '<p class="soft">Neither python -m dtrak.lds nor python -m dtrak.counterfactual has '
            "been run on it: how far its scores can be trusted was not measured.</p>"
        )
    return f'<section class="part">\n<h2>Evaluations</h2>\n<ul>\n{"".join(found)}</ul>\n</section>'
