"""The first page of a run's folder: its sets of queries, its evaluations, its costs."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.counterfactual.results import METRICS
from ..features.fit import FIT, WARNING
from ..runs.choices import counted
from ..runs.files import encode_text, write_atomically
from ..runs.measure import format_bytes
from ..runs.record import MANIFEST, PICTURE, REPORT, SCORES, list_queries, read_json
from ..runs.stages import read_seconds
from .counterfactual import name_method
from .html import encode_webp, render_page
from .lds_report import lds_table
from .tables import Table, times_table, values_table

INDEX = "index.html"
# what evaluations leave for a reader
_EVALUATED = ("*.png", "*.pdf", "table.json", "results.json")
_TITLE = "What this run found"
# what a reader asks first, of the settings of a set, and of its facts
_SHOWN = (
    "method",
    "output function",
    "timesteps",
    "projection",
    "proj_dim",
    "whitening",
    "damping",
)
_FACTS = ("pictures", FIT)
_LDS = ("method", "S", "projection", "LDS", "95 % interval")
_BEST = 8
# pixels of a picture's preview
_PREVIEW = (560, 320)


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
    settings, facts = manifest["settings"], manifest["facts"]
    known = [(key, facts[key]) for key in _FACTS if key in facts]
    known += [(key, settings[key]) for key in _SHOWN if key in settings]
    table = values_table(name, known).html()
    place = folder.relative_to(run).as_posix()
    files = ((REPORT, "report"), (PICTURE, "picture"), (SCORES, "scores"))
    links = _links({label: f"{place}/{file}" for file, label in files if (folder / file).is_file()})
    said = f'<p class="note">{links}</p>\n'
    if WARNING in facts:
        said = f'<p class="warning">{html.escape(facts[WARNING])}</p>\n{said}'
    preview = _render_preview(folder / PICTURE, f"The first pictures of {name}")
    if preview and (folder / REPORT).is_file():
        said += f'<a href="{html.escape(f"{place}/{REPORT}", quote=True)}">{preview}</a>\n'
    # inside the card of the table
    return table.removesuffix("</section>\n") + f"{said}</section>\n"


def _render_preview(file: Path, alt: str) -> str:
    """The top of a picture, small."""
    try:
        with Image.open(file) as picture:
            top = picture.crop((0, 0, picture.width, min(picture.height, picture.width * 4 // 7)))
            small = top.convert("RGB")
            small.thumbnail(_PREVIEW)
    # a preview is nice to have, and no more
    except OSError:
        return ""
    encoded = base64.b64encode(encode_webp(small)).decode()
    return (
        f'<img width="{small.width}" height="{small.height}" alt="{html.escape(alt)}" '
        f'src="data:image/webp;base64,{encoded}">'
    )


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
    """What `dtrak.lds` and `dtrak.counterfactual` found, in the folder or beside it."""
    beside = f"../lds-{run.resolve().name}/report"
    parts = [
        _render_evaluation(run, "Do scores predict retraining? (LDS)", place, _lds_tables)
        for place in ("report", beside)
    ]
    question = "Do pictures change without them?"
    parts.append(_render_evaluation(run, question, "counterfactual", _counterfactual_tables))
    if not any(parts):
        return (
            '<p class="soft">Neither python -m dtrak.lds nor python -m dtrak.counterfactual has '
            "been run on it: how far its scores can be trusted was not measured.</p>"
        )
    return "\n".join(part for part in parts if part)


def _render_evaluation(
    run: Path, question: str, place: str, tables: Callable[[Path], list[Table]]
) -> str:
    """The figures of an evaluation and links to its files; nothing where it has left none."""
    folder = run.resolve() / place
    files = [file for kind in _EVALUATED for file in sorted(folder.glob(kind))]
    if not files:
        return ""
    try:
        shown = "".join(table.html() for table in tables(folder))
    # what is damaged is said by the command that reads it
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        shown = ""
    links = _links({file.name: f"{place}/{file.name}" for file in files})
    return (
        f'<section class="part">\n<h2>{question}</h2>\n<div class="tables">\n{shown}</div>\n'
        f'<p class="note">{links}</p>\n</section>'
    )


def _lds_tables(folder: Path) -> list[Table]:
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    found = []
    for kind in dict.fromkeys(row["queries"] for row in table["rows"]):
        whole = lds_table(table, kind, f"LDS on {kind} queries, %").select(_LDS)
        part = f"The best {_BEST} of {len(whole.rows)}." if len(whole.rows) > _BEST else ""
        found.append(replace(whole, rows=whole.rows[:_BEST], note=part))
    return found


def _counterfactual_tables(folder: Path) -> list[Table]:
    metrics = json.loads((folder / "results.json").read_text(encoding="utf-8"))["metrics"]
    found = []
    for metric, methods in metrics.items():
        rows = []
        for method, values in methods.items():
            ends = values["interval"]
            between = "" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"
            rows.append((name_method(method), f"{values['median']:.3g}", between))
        count = len(next(iter(methods.values()))["queries"])
        columns = ("Removed by", "Median", "95 % interval")
        title, note = METRICS[metric].title, f"Over {counted(count, 'query', 'queries')}."
        found.append(Table(columns, rows, title, note).without_empty())
    return found
