"""Counterfactual results to look at: a box plot, strips of pictures, and a section of a page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation.counterfactual.options import NOTHING
from ..evaluation.counterfactual.results import METRICS, Counterfactual, Summary
from ..methods import METHODS
from ..runs.choices import counted
from .canvas import SOFT, Canvas, default_style
from .html import render_image
from .plots import NO_REMOVAL, plot_boxes, render_svg, write_png
from .strips import PAGE, Cell, Column, Look, draw_strips
from .tables import Table

# pixels of a picture, and queries that are shown: on a page and in print
ROOM, PNG_QUERIES, PRINTED = 160, 16, 8
_SHORT = {"pixel_l2": "L2", "latent_l2": "latent L2", "clip_cosine": "CLIP", "loss": "loss +"}
TITLE = "The same pictures without their top training images"


def name_method(method: str) -> str:
    """What chose the images that were removed, as readers know it."""
    if method == NOTHING:
        return NO_REMOVAL
    return METHODS[method].title if method in METHODS else method


def plot_distances(results: Counterfactual, metric: str) -> Any:
    """Box plot of one metric over queries; call it within `canvas.default_style`."""
    groups = {
        name_method(method): results.values[metric][method].mean(1).tolist()
        for method in results.methods
    }
    found = METRICS[metric]
    label = f"{found.title} ({'larger' if found.rises else 'lower'} = more change)"
    return plot_boxes(groups, label)


def write_box_plot(path: Path, results: Counterfactual) -> None:
    """Write the box plot of the pixels' distances, and one beside it for every other metric."""
    with default_style():
        for metric in results.values:
            file = path if metric == "pixel_l2" else path.with_stem(f"{path.stem}-{metric}")
            write_png(plot_distances(results, metric), file)


def write_strips(path: Path, results: Counterfactual) -> None:
    """Write a picture of the first ``PNG_QUERIES`` queries: the original, then every method's."""
    with default_style():
        draw(results).save(path)


def draw(results: Counterfactual, *, look: Look = PAGE) -> Canvas:
    """Draw each query as it was, and again without what each method ranks highest for it.

    Args:
        results: the first queries are shown, with the pictures of the first retraining.
        look: in print, fewer queries and no names of files.
    """
    count = len(results.query_ids)
    shown = range(min(PNG_QUERIES if look is PAGE else PRINTED, count))
    columns = [
        Column(head, room=ROOM)
        for head in ("Original", *(name_method(method) for method in results.methods))
    ]
    lines = []
    for row in shown:
        name = [(results.query_ids[row], SOFT)] if look is PAGE else []
        line = [[Cell(results.originals[row], name)]]
        for method in results.methods:
            distance = f"L2 {float(results.values['pixel_l2'][method][row, 0]):.3g}"
            line.append([Cell(results.pictures[method][row, 0], [(distance, SOFT)])])
        lines.append(line)
    if look is not PAGE:
        notes = ["L2: distance of pixels from the original"]
        return draw_strips(columns, lines, notes=notes, look=look)
    settings = results.settings
    done = (
        f"retrained without {settings['removed']:,} of {settings['training images']:,} images, "
        "drawn from the same seed"
    )
    part = "" if len(shown) == count else f"{len(shown)} of "
    queries = counted(count, "query", "queries")
    note = f"{part}{queries}; first retraining; L2 of pixels in [-1, 1]."
    return draw_strips(columns, lines, title=TITLE, lead=done, notes=[note])


def render_section(results: Counterfactual, num_shown: int) -> str:
    """The results as HTML: what was done, a table and a plot per metric, strips of pictures.

    Args:
        results: to show.
        num_shown: queries whose pictures are shown, the first.
    """
    settings = results.settings
    parts = [
        "<p>Each query was drawn again, from the same seed, by models trained from scratch without "
        f"the {settings['removed']:,} of {settings['training images']:,} images that a method "
        "ranks highest for it. The more a picture changes, the more those images mattered. "
        "Random removal shows how much any removal changes."
        + (
            " “No removal” is a retraining with another seed, whose noise differs at every step; "
            "removals keep the run's, and may change less."
            if NOTHING in results.methods
            else ""
        )
        + "</p>"
    ]
    with default_style():
        for metric in results.values:
            title = METRICS[metric].title
            svg = render_svg(plot_distances(results, metric), f"Box plot: {title} by method")
            parts.append(
                f'<div class="pair">\n{distance_table(results, metric).html()}\n'
                f'<figure class="card">{svg}</figure>\n</div>'
            )
    parts.append(_render_strips(results, num_shown))
    return "\n".join(parts)


def distance_table(results: Counterfactual, metric: str) -> Table:
    """How far pictures moved in one metric, by who chose what was removed."""
    rows: list[tuple[str, ...]] = []
    for method in results.methods:
        summary = results.summary(metric, method)
        beyond = results.beyond_random(metric, method)
        rows.append(
            (
                name_method(method),
                _with_interval(summary, ""),
                f"{summary.mean:.3g}",
                "" if beyond is None else _with_interval(beyond, "+"),
            )
        )
    first = results.summary(metric, results.methods[0])
    over = f"Medians over {counted(first.count, 'query', 'queries')}"
    direction = "more" if METRICS[metric].rises else "less"
    note = (
        f"{over}, with 95 % percentile bootstrap intervals over queries (not over training seeds)."
        if first.interval
        else f"{over}, too few for an interval."
    )
    title = f"{METRICS[metric].title} ({direction} = more change)"
    columns = ("Removed by", "Median", "Mean", "Beyond random")
    return Table(columns, rows, title, note).without_empty()


def _with_interval(summary: Summary, sign: str) -> str:
    ends = () if summary.interval is None else summary.interval
    values = [format(value, f"{sign}.3g") for value in (summary.median, *ends)]
    return values[0] if summary.interval is None else f"{values[0]} [{', '.join(values[1:])}]"


def _render_strips(results: Counterfactual, num_shown: int) -> str:
    rows = []
    for row, query in enumerate(results.query_ids[:num_shown]):
        name = html.escape(query)
        cells = [_cell(results.originals[row], f"original {query}", "original", name)]
        for method in results.methods:
            name = name_method(method)
            values = "<br>".join(
                f"{label} {float(results.values[metric][method][row, 0]):.3g}"
                for metric, label in _SHORT.items()
                if metric in results.values
            )
            cells.append(
                _cell(results.pictures[method][row, 0], f"{query} without {name}", name, values)
            )
        rows.append(f'<section class="card changes">{"".join(cells)}</section>')
    part = (
        f'<p class="soft">The first {num_shown} of {len(results.query_ids)} queries.</p>'
        if num_shown < len(results.query_ids)
        else ""
    )
    return "\n".join(rows) + part


def _cell(pixels: Tensor, alt: str, head: str, below: str) -> str:
    return (
        f"<figure>{render_image(pixels, alt)}<figcaption><b>{html.escape(head)}</b><br>"
        f"{below}</figcaption></figure>"
    )
