"""Queries beside their proponents and opponents: rows of a page, and one picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..data.walk import IMAGE_SUFFIXES
from ..methods.scores import top_k
from .canvas import LINE, MINUS, PLUS, SOFT, Canvas, default_style, fit, text_width
from .html import render_image, render_name

if TYPE_CHECKING:
    from ..data.samples import Samples

TITLE = "Which training images made these pictures?"
PNG_QUERIES = 16
_OPPONENTS = 3
CELL, SUBJECT, GAP, MARGIN = 192, 256, 16, 48
COLOURS = {"proponents": PLUS, "opponents": MINUS}
HEADINGS = (
    ("proponents", "Proponents", "presence lowered the error"),
    ("opponents", "Opponents", "presence raised the error"),
)
CAVEAT = (
    "Scores are estimates from the gradients of a trained model: nothing was retrained without "
    "these images. A high score does not prove that an image was copied, and images that look "
    "alike need not score high."
)


@dataclass(frozen=True)
class Match:
    """A training image beside a query: pixels [C, H, W] uint8, and bar length in [0, 1]."""

    pixels: Tensor
    id: str
    label: str | None
    score: float
    share: float
    caption: str | None = None


@dataclass(frozen=True)
class Row:
    """A query, pixels [C, H, W] uint8, and its matches per heading that was asked for."""

    pixels: Tensor
    id: str
    matches: dict[str, list[Match]]
    caption: str | None = None


def gather(
    train: Samples,
    queries: Samples,
    scores: Tensor,
    num_proponents: int,
    num_opponents: int = _OPPONENTS,
) -> list[Row]:
    """Put every query together with the images of its matches.

    Args:
        train: N pictures, C 1 or 3.
        queries: at least M pictures, of which the first M are taken.
        scores: ``[M, N]``, positive for proponents; those that are not positive are left out, and
            opponents that are not negative.
        num_proponents: R; all N where there are fewer.
        num_opponents: likewise.

    Raises:
        ValueError: these are no grey or RGB pictures, or a score is not finite.
    """
    M, N = scores.shape
    pictures = queries.pictures(range(M))
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(f"queries must be [M, 1 or 3, H, W], got {list(pictures.shape)}")
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    found = top_k(scores, min(max(num_proponents, num_opponents), N))
    ranked = {
        "proponents": (found.proponents, found.proponent_scores, num_proponents),
        "opponents": (found.opponents, found.opponent_scores, num_opponents),
    }
    labels, captions = train.classes, _captions(train)
    rows = []
    asked = _captions(queries)
    for m, pixels in enumerate(to_uint8(pictures)):
        best = {
            kind: list(zip(places[m, :k].tolist(), values[m, :k].tolist(), strict=True))
            for kind, (places, values, k) in ranked.items()
            if k
        }
        strongest = max((abs(score) for pairs in best.values() for _, score in pairs), default=0.0)
        matches = {
            kind: [
                Match(
                    pixels=to_uint8(train[index]),
                    id=train.ids[index],
                    label=_label(train.ids[index], None if labels is None else labels[index]),
                    score=score,
                    share=abs(score) / strongest if strongest else 0.0,
                    caption=None if captions is None else captions[index],
                )
                for index, score in pairs
                # the lowest of all-positive scores is no opponent
                if (score > 0 if kind == "proponents" else score < 0)
            ]
            for kind, pairs in best.items()
        }
        rows.append(Row(pixels, queries.ids[m], matches, None if asked is None else asked[m]))
    return rows


def _captions(samples: Samples) -> list[str] | None:
    """What goes with samples, as text: captions, or classes that were drawn."""
    if samples.conditions is None:
        return None
    return [c if isinstance(c, str) else f"class {c}" for c in samples.conditions]


def _label(name: str, label: int | str | None) -> str | None:
    """The class of an image in words: its number, its name, or the folder it lies in."""
    if label is None:
        folder = PurePosixPath(name).parent.name
        return folder if name.lower().endswith(IMAGE_SUFFIXES) and folder else None
    return label if isinstance(label, str) else f"label {label}"


def lead(query_kind: str) -> str:
    """What the rows show, in a sentence."""
    return (
        f"For each {query_kind}: the training images whose presence most lowered or raised "
        "the model's error on it."
    )


def _exponent(rows: Sequence[Row]) -> int:
    """Choose one power of ten for all scores, 0 where they are readable as they are."""
    scores = [abs(m.score) for row in rows for kind in row.matches.values() for m in kind]
    largest = max(scores, default=0.0)
    if largest == 0 or 0.01 <= largest < 1000:
        return 0
    return math.floor(math.log10(largest))


def _format_score(score: float, exponent: int) -> str:
    return f"{score / 10.0**exponent:+#.3g}".rstrip(".").replace("-", "−")


def render_explanation(rows: Sequence[Row]) -> str:
    """How to read the scores, as HTML paragraphs."""
    exponent = _exponent(rows)
    power = f"10<sup>{exponent}</sup>".replace("-", "−")
    unit = f" Scores here are in units of {power}." if exponent else ""
    return f"""<p>A <b class="plus">positive</b> score marks a proponent: with this image in the
training set, the model's error on the picture is estimated to be lower than without it. A
<b class="minus">negative</b> score marks an opponent: the error is estimated to be higher. The size
has no natural unit: compare scores within one row, not between rows or runs. The thin bar is the
size of a score against the strongest in its row.{unit}</p>
<p class="soft">{html.escape(CAVEAT)}</p>"""


def render_rows(rows: Sequence[Row], query_kind: str) -> str:
    """One HTML section per row."""
    exponent = _exponent(rows)
    return "\n".join(_render_query(row, exponent, query_kind) for row in rows)


def _render_query(row: Row, exponent: int, query_kind: str) -> str:
    sides = []
    for kind, heading, meaning in HEADINGS:
        if kind not in row.matches:
            continue
        items = "\n".join(_render_match(match, exponent) for match in row.matches[kind])
        items = items or '<li class="soft">none</li>'
        sides.append(
            f'<div class="side {kind}">\n<h3>{heading} <span>{meaning}</span></h3>\n'
            f'<ol class="strip">\n{items}\n</ol>\n</div>'
        )
    image = render_image(row.pixels, f"{query_kind} {row.id}")
    return (
        f'<section class="query">\n<div class="subject">{image}'
        f'<h2 title="{html.escape(row.id)}">{html.escape(row.id)}</h2>'
        f"{_render_caption(row.caption)}</div>\n" + "\n".join(sides) + "\n</section>"
    )


def _render_caption(caption: str | None) -> str:
    return "" if caption is None else f'<small class="soft">{html.escape(_quote(caption))}</small>'


def _quote(caption: str) -> str:
    return f"“{caption}”" if caption else "no caption"


def _render_match(match: Match, exponent: int) -> str:
    shown = _format_score(match.score, exponent)
    label = "" if match.label is None else f'<span class="soft">{html.escape(match.label)}</span>'
    colour = "minus" if match.score < 0 else "plus"
    return (
        f"<li><figure>{render_image(match.pixels, f'training image {match.id}, score {shown}')}"
        f'<figcaption><span class="bar {colour}"><i style="width:{match.share:.1%}"></i></span>'
        f'<data class="{colour}" value="{match.score!r}">{shown}</data>'
        f'<span class="name" title="{html.escape(match.id)}">{render_name(match.id)}</span>'
        f"{_render_caption(match.caption)}{label}</figcaption></figure></li>"
    )


def write_png(path: Path, rows: Sequence[Row], query_kind: str, total: int | None = None) -> None:
    """Write the picture of the first ``PNG_QUERIES`` rows, of ``total`` if there are more."""
    with default_style():
        draw(rows, query_kind, total).save(path)


def draw(rows: Sequence[Row], query_kind: str, total: int | None = None) -> Canvas:
    """Draw at most ``PNG_QUERIES`` rows: query, proponents, a line, opponents."""
    total = len(rows) if total is None else total
    shown = rows[:PNG_QUERIES]
    exponent = _exponent(rows)
    matches = [match for row in shown for kind in row.matches.values() for match in kind]
    cell = max((fit(match.pixels, CELL) for match in matches), default=CELL)
    subject = max((fit(row.pixels, SUBJECT) for row in shown), default=SUBJECT)
    subject = max(subject, text_width(query_kind.capitalize(), 20, bold=True))
    widths = {
        # room for the heading, and for the word "none" where there is no match at all
        kind: max(
            max(1, *(len(row.matches[kind]) for row in shown)) * (cell + GAP) - GAP,
            text_width(f"{heading}: {meaning}", 20, bold=True),
        )
        for kind, heading, meaning in HEADINGS
        if shown and kind in shown[0].matches
    }
    starts, x = {}, MARGIN + subject + 2 * GAP
    for kind, width in widths.items():
        starts[kind] = x
        x += width + 3 * GAP
    width = max(x - 3 * GAP + MARGIN, 1100, text_width(lead(query_kind), 21) + 2 * MARGIN)
    top, pitch = MARGIN + 150, max(subject + 32, cell + 94) + 2 * GAP
    canvas = Canvas(width, top + len(shown) * pitch + 96)
    inner = width - 2 * MARGIN
    canvas.write(MARGIN, MARGIN - 8, TITLE, pixels=34, width=inner, bold=True)
    canvas.write(MARGIN, MARGIN + 40, lead(query_kind), pixels=21, width=inner, colour=SOFT)
    canvas.write(MARGIN, top - 50, query_kind.capitalize(), pixels=20, width=subject, bold=True)
    for kind, heading, meaning in HEADINGS:
        if kind in widths:
            colour, room = COLOURS[kind], widths[kind]
            text = f"{heading}: {meaning}"
            canvas.write(
                starts[kind], top - 50, text, pixels=20, width=room, colour=colour, bold=True
            )
            canvas.fill(starts[kind], top - 18, room, 3, colour)
    for number, row in enumerate(shown):
        y = top + number * pitch
        canvas.paste(MARGIN, y, row.pixels, fit(row.pixels, SUBJECT))
        canvas.write(MARGIN, y + subject + 6, row.id, pixels=18, width=subject, colour=SOFT)
        if row.caption is not None:
            text = _quote(row.caption)
            canvas.write(MARGIN, y + subject + 30, text, pixels=17, width=subject, colour=SOFT)
        if len(widths) == 2:
            canvas.fill(starts["opponents"] - 1.5 * GAP - 1, y, 2, pitch - 2 * GAP, LINE)
        for kind in widths:
            if not row.matches[kind]:
                canvas.write(starts[kind], y, "none", pixels=20, width=cell, colour=SOFT)
            for place, match in enumerate(row.matches[kind]):
                _draw_match(canvas, starts[kind] + place * (cell + GAP), y, match, cell, exponent)
    unit = f" Scores in units of 1e{exponent}." if exponent else ""
    part = f" The first {len(shown)} of {total}." if len(shown) < total else ""
    notes = (
        f"+ lowers the error, − raises it; compare scores within a row only.{unit}{part}",
        "Estimates from gradients: nothing was retrained without these images.",
    )
    for line, note in enumerate(notes):
        y = top + len(shown) * pitch + 28 * line
        canvas.write(MARGIN, y, note, pixels=18, width=inner, colour=SOFT)
    return canvas


def _draw_match(canvas: Canvas, x: int, y: int, match: Match, cell: int, exponent: int) -> None:
    canvas.paste(x, y, match.pixels, fit(match.pixels, CELL))
    colour = PLUS if match.score >= 0 else MINUS
    y += cell + 6
    canvas.fill(x, y, cell, 5, LINE)
    canvas.fill(x, y, cell * match.share, 5, colour)
    score = _format_score(match.score, exponent)
    canvas.write(x, y + 11, score, pixels=20, width=cell, colour=colour, bold=True)
    canvas.write(x, y + 37, match.id, pixels=17, width=cell, colour=SOFT)
    if match.caption is not None:
        canvas.write(x, y + 61, _quote(match.caption), pixels=17, width=cell, colour=SOFT)
    elif match.label is not None:
        canvas.write(x, y + 61, match.label, pixels=17, width=cell, colour=SOFT)


def render_strips(train: Samples, queries: Samples, scores: Tensor, num_proponents: int) -> str:
    """Queries and their proponents as a table of pictures, for a notebook.

    Args:
        train: as `gather`, like the others.
        queries: likewise.
        scores: likewise.
        num_proponents: likewise.

    Raises:
        ValueError: as `gather`.
    """
    rows = gather(train, queries, scores, num_proponents, 0)
    exponent = _exponent(rows)
    lines = []
    for row in rows:
        cells = [_render_cell(row.pixels, row.id, "")]
        for match in row.matches["proponents"]:
            cells.append(_render_cell(match.pixels, match.id, _format_score(match.score, exponent)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    unit = f" Scores in units of 1e{exponent}." if exponent else ""
    return (
        "<table><caption>Each query, and the training images whose presence most lowered the "
        f"model's error on it.{unit}</caption>{''.join(lines)}</table>"
    )


def _render_cell(pixels: Tensor, name: str, score: str) -> str:
    image = render_image(pixels, name).replace(
        "<img", '<img style="width:72px;image-rendering:pixelated"', 1
    )
    return (
        f'<td style="text-align:center">{image}<br><small>{html.escape(name)}<br>'
        f"{score}</small></td>"
    )
