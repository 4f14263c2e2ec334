"""Figures for a paper: strips and plots of a run as PDF and PNG, of the width of a text column."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ..evaluation.lds.table import select_rows
from ..runs.files import encode_text
from .canvas import INK, LINE, SOFT, default_style
from .counterfactual import name_method, plot_distances
from .influence import COLOURS, HEADINGS, Row, choose_exponent, format_score
from .lds_plots import plot_lds
from .plots import write_figure

if TYPE_CHECKING:
    from ..evaluation.counterfactual.results import Counterfactual

# inches: of the text of a page, between pictures, between groups of them
_WIDTH, _GAP, _APART = 5.5, 0.05, 0.18
# points of letters, and inches from line to line and of a letter, on average
_POINTS, _LINE, _LETTER = 5.5, 0.088, 0.05
_MOST_LINES = 2
# pixels of a picture's side at least, so that no viewer blurs it
_SIDE = 192
# of counterfactual strips
_NUM_ROWS = 8


class Cell(NamedTuple):
    """A picture ``[C, H, W]`` uint8 and what stands below it, a colour for each text."""

    pixels: Tensor
    texts: Sequence[tuple[str, str]]


class Column(NamedTuple):
    """Columns that belong together: their head, its colour, how many they are."""

    head: str
    colour: str
    width: int


def write_figures(
    folder: Path,
    rows: Sequence[Row],
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
            figures["strips"] = draw_influence(rows, query_kind)
        kinds = [] if table is None else dict.fromkeys(row["queries"] for row in table["rows"])
        for kind in kinds:
            assert table is not None
            for name, figure in plot_lds(select_rows(table, kind)).items():
                figures[f"lds-{name}-{kind}"] = figure
        if changed is not None:
            for metric in changed.values:
                figures[f"counterfactual-{metric}"] = plot_distances(changed, metric)
            figures["counterfactual-strips"] = draw_counterfactual(changed)
        written = [write_figure(figure, folder / name) for name, figure in figures.items()]
    return [file for files in written for file in files]


def draw_influence(rows: Sequence[Row], query_kind: str) -> Any:
    """Each query, its proponents and its opponents, with scores, as D-TRAK's paper lays them out.

    Call it within `canvas.default_style`.
    """
    scores = (m.score for row in rows for kind in row.matches.values() for m in kind)
    exponent = choose_exponent(scores)
    most = {
        kind: max((len(row.matches.get(kind, ())) for row in rows), default=0)
        for kind, _, _ in HEADINGS
    }
    # a side that no query has anything on has no column
    shown = [(kind, heading) for kind, heading, _ in HEADINGS if most[kind]]
    columns = [Column(query_kind.capitalize(), INK, 1)]
    columns += [Column(heading, COLOURS[kind], most[kind]) for kind, heading in shown]
    lines = []
    for row in rows:
        groups = [[Cell(row.pixels, [] if row.caption is None else [(row.caption, SOFT)])]]
        for kind, _ in shown:
            cells = []
            for match in row.matches[kind]:
                said = [(text, SOFT) for text in (match.label, match.caption) if text is not None]
                score = (format_score(match.score, exponent), COLOURS[kind])
                cells.append(Cell(match.pixels, [score, *said]))
            groups.append(cells)
        lines.append(groups)
    unit = f"scores in units of 1e{exponent}" if exponent else ""
    return _draw(columns, lines, unit)


def draw_counterfactual(changed: Counterfactual) -> Any:
    """Each query as it was, and drawn again without what each method ranks highest for it."""
    methods = changed.methods
    columns = [Column("Original", INK, 1), *(Column(name_method(m), INK, 1) for m in methods)]
    lines = []
    for row in range(min(_NUM_ROWS, len(changed.query_ids))):
        cells = [[Cell(changed.originals[row], [])]]
        for method in methods:
            distance = float(changed.values["pixel_l2"][method][row, 0])
            cells.append([Cell(changed.pictures[method][row, 0], [(f"{distance:.3g}", SOFT)])])
        lines.append(cells)
    return _draw(columns, lines, "below: L2 distance of pixels from the original")


def _draw(columns: Sequence[Column], lines: Sequence[Sequence[Sequence[Cell]]], note: str) -> Any:
    """Pictures side by side, a line per query, its cells by column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = sum(column.width for column in columns)
    room = _WIDTH - (len(columns) - 1) * _APART - (count - len(columns)) * _GAP
    # few pictures are no larger than a thumb
    side = min(room / count, 0.9)
    letters = max(4, int(side / _LETTER))
    tall = max(
        (c.pixels.shape[1] / c.pixels.shape[2] for g in lines for cs in g for c in cs), default=1
    )
    heads = [
        textwrap.wrap(c.head, max(letters, int(c.width * (side + _GAP) / _LETTER))) for c in columns
    ]
    below = [
        max((sum(len(_wrap(t, letters)) for t, _ in c.texts) for cs in g for c in cs), default=0)
        for g in lines
    ]
    top = max(map(len, heads)) * _LINE + 0.1
    height = top + sum(side * tall + n * _LINE + 0.1 for n in below) + (_LINE if note else 0)
    figure = Figure((_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    starts, x = [], 0.0
    for column in columns:
        starts.append(x)
        x += column.width * (side + _GAP) - _GAP + _APART

    def write(x: float, y: float, text: str, colour: str, **style: Any) -> None:
        figure.text(
            x / _WIDTH, 1 - y / height, text, fontsize=_POINTS, color=colour, va="top",
            parse_math=False, **style,
        )  # fmt: skip

    for x, column, head in zip(starts, columns, heads, strict=True):
        for line, text in enumerate(head):
            write(x, 0.03 + line * _LINE, text, column.colour, fontweight="bold")
    y = top
    for groups, texts in zip(lines, below, strict=True):
        for x, cells in zip(starts, groups, strict=False):
            for place, cell in enumerate(cells):
                left = x + place * (side + _GAP)
                h = side * cell.pixels.shape[1] / cell.pixels.shape[2]
                box = (left / _WIDTH, 1 - (y + h) / height, side / _WIDTH, h / height)
                axes = figure.add_axes(box)
                axes.imshow(_enlarged(cell.pixels), interpolation="none", aspect="auto")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set(color=LINE, linewidth=0.4)
                under = y + h + 0.02
                for text, colour in cell.texts:
                    for part in _wrap(text, letters):
                        write(left, under, part, colour)
                        under += _LINE
        y += side * tall + texts * _LINE + 0.1
    if note:
        write(0, y - 0.02, note, SOFT)
    return figure


def _wrap(text: str, letters: int) -> list[str]:
    """At most two lines; what does not fit says so."""
    text = encode_text(text).decode()
    return textwrap.wrap(text, letters, max_lines=_MOST_LINES, placeholder="…") or [""]


def _enlarged(pixels: Tensor) -> np.ndarray:
    """``[H, W, 3]``, in whole squares per pixel."""
    array = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
    times = max(1, round(_SIDE / max(array.shape[:2])))
    return array.repeat(times, axis=0).repeat(times, axis=1)
