"""Queries beside their proponents and opponents: rows of a page, and one picture."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..data.walk import IMAGE_SUFFIXES
from ..findings import Findings
from ..methods.scores import top_k
from .canvas import LINE, MINUS, PLUS, SOFT, Canvas, default_style, fit, text_width
from .embedding import render_embedded
from .html import render_image, render_name

if TYPE_CHECKING:
    from ..data.samples import Samples

TITLE = "Which training images made these pictures?"
PNG_QUERIES = 16
OPPONENTS = 3
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
    """A training image beside a query: pixels [C, H, W] uint8, and bar length in [0, 1].

    ``index`` is its column of the scores; ``error`` the standard error of the score, and
    ``stands_out`` whether it is more than held-out images get, where that is known.
    """

    index: int
    pixels: Tensor
    id: str
    label: str | None
    score: float
    share: float
    caption: str | None = None
    error: float | None = None
    stands_out: bool = False


@dataclass(frozen=True)
class Row:
    """A query, pixels [C, H, W] uint8, and its matches per heading that was asked for."""

    pixels: Tensor
    id: str
    matches: dict[str, list[Match]]
    caption: str | None = None
    verdict: str | None = None


def gather(
    train: Samples,
    queries: Samples,
    scores: Tensor,
    num_proponents: int,
    num_opponents: int = OPPONENTS,
    findings: Findings | None = None,
) -> list[Row]:
    """Put every query together with the images of its matches.

    Args:
        train: N pictures, C 1 or 3.
        queries: at least M pictures, of which the first M are taken.
        scores: ``[M, N]``, positive for proponents; those that are not positive are left out, and
            opponents that are not negative.
        num_proponents: R; all N where there are fewer.
        num_opponents: likewise.
        findings: what is known about the scores beside them.

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
    labels, captions = classes_of(train), captions_of(train)
    rows = []
    asked, known = captions_of(queries), findings or Findings()
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
                    index=index,
                    pixels=to_uint8(train[index]),
                    id=train.ids[index],
                    label=None if labels is None else labels[index],
                    score=score,
                    share=abs(score) / strongest if strongest else 0.0,
                    caption=None if captions is None else captions[index],
                    error=None if known.errors is None else float(known.errors[m, index]),
                    stands_out=known.stands_out is not None and bool(known.stands_out[m, index]),
                )
                for index, score in pairs
                # the lowest of all-positive scores is no opponent
                if (score > 0 if kind == "proponents" else score < 0)
            ]
            for kind, pairs in best.items()
        }
        caption = None if asked is None else asked[m]
        verdict = None if known.verdicts is None else known.verdicts[m]
        rows.append(Row(pixels, queries.ids[m], matches, caption, verdict))
    return rows


def captions_of(samples: Samples) -> list[str] | None:
    """What the model read beside samples, as text: captions, or classes that were drawn.

    None where it read nothing, or the labels that `classes_of` gives.
    """
    if samples.conditions is None or samples.conditions == samples.labels:
        return None
    names = samples.class_names
    return [c if isinstance(c, str) else names.get(c, f"class {c}") for c in samples.conditions]


def classes_of(samples: Samples) -> list[str] | None:
    """The class of every image in words: its number, its name, or the folder it lies in.

    None where they have none; an image in no folder is of the class "none" beside others that are.
    """
    if samples.classes is not None:
        return [c if isinstance(c, str) else f"label {c}" for c in samples.classes]
    folders = [
        PurePosixPath(name).parent.name if name.lower().endswith(IMAGE_SUFFIXES) else ""
        for name in samples.ids
    ]
    return [folder or "none" for folder in folders] if any(folders) else None


def lead(query_kind: str) -> str:
    """What the rows show, in a sentence."""
    return (
        f"For each {query_kind}: the training images whose presence most lowered or raised "
        "the model's error on it."
    )


def choose_exponent(scores: Iterable[float]) -> int:
    """One power of ten for all scores, 0 where they are readable as they are."""
    largest = max(map(abs, scores), default=0.0)
    if largest == 0 or 0.01 <= largest < 1000:
        return 0
    return math.floor(math.log10(largest))


def _exponent(rows: Sequence[Row]) -> int:
    return choose_exponent(m.score for row in rows for kind in row.matches.values() for m in kind)


def format_score(score: float, exponent: int) -> str:
    """A score as it is shown, with its sign, in units of a power of ten."""
    return f"{score / 10.0**exponent:+#.3g}".rstrip(".").replace("-", "−")


def render_explanation(exponent: int) -> str:
    """How to read the scores, in units of a power of ten, as HTML paragraphs."""
    power = f"10<sup>{exponent}</sup>".replace("-", "−")
    unit = f" Scores here are in units of {power}." if exponent else ""
    return f"""<p>A <b class="plus">positive</b> score marks a proponent: with this image in the
training set, the model's error on the picture is estimated to be lower than without it. A
<b class="minus">negative</b> score marks an opponent: the error is estimated to be higher. The size
has no natural unit: compare scores within one row, not between rows or runs. The thin bar is the
size of a score against the strongest in its row.{unit}</p>
<p class="soft">{html.escape(CAVEAT)}</p>"""


def render_findings(findings: Findings) -> str:
    """How to read what stands beside the scores, likewise."""
    said = []
    if findings.errors is not None:
        said.append("Whiskers and ± are two standard errors of a score.")
    if findings.p_values is not None:
        said.append("p is the chance that an image the model never saw scores as high.")
    if findings.stands_out is not None:
        said.append("“Stands out” marks scores that are more than held-out images get.")
    return f"<p>{' '.join(said)}</p>" if said else ""


def render_rows(
    rows: Sequence[Row], query_kind: str, exponent: int, places: Mapping[int, int]
) -> str:
    """One HTML section per row.

    Args:
        rows: to show, the first of the embedded queries.
        query_kind: what one query is, in words.
        exponent: of the power of ten in which scores are shown.
        places: of a column of the scores, the number of its embedded picture.
    """
    return "\n".join(
        _render_query(row, number, exponent, query_kind, places) for number, row in enumerate(rows)
    )


def _render_query(
    row: Row, number: int, exponent: int, query_kind: str, places: Mapping[int, int]
) -> str:
    sides = []
    for kind, heading, meaning in HEADINGS:
        if kind not in row.matches:
            continue
        items = "\n".join(_render_match(m, exponent, places[m.index]) for m in row.matches[kind])
        items = items or '<li class="soft">none</li>'
        sides.append(
            f'<div class="side {kind}">\n<h3>{heading} <span>{meaning}</span></h3>\n'
            f'<ol class="strip">\n{items}\n</ol>\n</div>'
        )
    image = render_embedded("q", number, f"{query_kind} {row.id}")
    verdict = "" if row.verdict is None else f'<p class="verdict">{html.escape(row.verdict)}</p>\n'
    return (
        f'<section class="query">\n<div class="subject">{image}<div>'
        f'<h2 title="{html.escape(row.id)}">{html.escape(row.id)}</h2>'
        f"{_render_caption(row.caption)}</div></div>\n"
        + "\n".join(sides)
        + f"\n{verdict}</section>"
    )


def _render_caption(caption: str | None) -> str:
    return "" if caption is None else f'<small class="soft">{html.escape(_quote(caption))}</small>'


def _quote(caption: str) -> str:
    return f"“{caption}”" if caption else "no caption"


def _render_match(match: Match, exponent: int, place: int) -> str:
    shown = format_score(match.score, exponent)
    label = "" if match.label is None else f'<span class="soft">{html.escape(match.label)}</span>'
    colour = "minus" if match.score < 0 else "plus"
    error = ""
    if match.error is not None:
        error = f"<small>±{2 * match.error / 10.0**exponent:#.2g}</small>".replace(".<", "<")
    star = '<b class="out">stands out</b>' if match.stands_out else ""
    return (
        f"<li><figure>{render_embedded('t', place, f'training image {match.id}, score {shown}')}"
        f'<figcaption><span class="bar {colour}"><i style="width:{match.share:.1%}"></i></span>'
        f'<data class="{colour}" value="{match.score!r}">{shown}</data>{error}{star}'
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
    lines = max((len(_below(match)) for match in matches), default=1)
    top, pitch = MARGIN + 150, max(subject + 32, cell + 70 + 24 * max(lines, 1)) + 2 * GAP
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
    score = format_score(match.score, exponent)
    canvas.write(x, y + 11, score, pixels=20, width=cell, colour=colour, bold=True)
    canvas.write(x, y + 37, match.id, pixels=17, width=cell, colour=SOFT)
    for line, text in enumerate(_below(match)):
        canvas.write(x, y + 61 + 24 * line, text, pixels=17, width=cell, colour=SOFT)


def _below(match: Match) -> list[str]:
    """What is said of a training image below its name: its class, and its caption."""
    label = [] if match.label is None else [match.label]
    return label if match.caption is None else [*label, _quote(match.caption)]


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
            cells.append(_render_cell(match.pixels, match.id, format_score(match.score, exponent)))
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
