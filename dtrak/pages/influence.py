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
from .canvas import MINUS, PLUS, SOFT, Canvas, default_style
from .embedding import render_embedded
from .html import render_image, render_name
from .strips import PAGE, Cell, Column, Look, draw_strips

if TYPE_CHECKING:
    from ..data.samples import Samples

TITLE = "Which training images made these pictures?"
PNG_QUERIES = 16
OPPONENTS = 3
# pixels of a query
SUBJECT = 256
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


def draw(
    rows: Sequence[Row], query_kind: str, total: int | None = None, *, look: Look = PAGE
) -> Canvas:
    """Draw each query, its proponents and its opponents; call it within `canvas.default_style`.

    Args:
        rows: of `gather`; a page shows the first ``PNG_QUERIES``.
        query_kind: what one query is, in words.
        total: rows there are, where these are the first of more.
        look: in print, all rows and no names of files, as D-TRAK's paper lays them out.
    """
    total, names = len(rows) if total is None else total, look is PAGE
    rows = rows[:PNG_QUERIES] if look is PAGE else rows
    exponent = _exponent(rows)
    # a side that no query has anything on has no column
    most = {
        kind: max((len(row.matches.get(kind, ())) for row in rows), default=0)
        for kind, _, _ in HEADINGS
    }
    columns = [Column(query_kind.capitalize(), room=SUBJECT)] + [
        Column(f"{heading}: {meaning}", most[kind], COLOURS[kind])
        for kind, heading, meaning in HEADINGS
        if most[kind]
    ]
    lines = []
    for row in rows:
        said = [row.id] if names else []
        said += [] if row.caption is None else [_quote(row.caption)]
        line = [[Cell(row.pixels, [(text, SOFT) for text in said])]]
        for kind in most:
            if most[kind]:
                line.append([_cell(match, exponent, names) for match in row.matches[kind]])
        lines.append(line)
    unit = f"Scores in units of 1e{exponent}." if exponent else ""
    if look is not PAGE:
        return draw_strips(columns, lines, notes=[unit], look=look)
    part = f"The first {len(rows)} of {total}." if len(rows) < total else ""
    note = f"+ lowers the error, − raises it; compare scores within a row only. {unit} {part}"
    caveat = "Estimates from gradients: nothing was retrained without these images."
    return draw_strips(columns, lines, title=TITLE, lead=lead(query_kind), notes=[note, caveat])


def _cell(match: Match, exponent: int, names: bool) -> Cell:
    """A match as it is drawn: score, name, class, caption."""
    said = [match.id] if names else []
    said += [] if match.label is None else [match.label]
    said += [] if match.caption is None else [_quote(match.caption)]
    score = (format_score(match.score, exponent), PLUS if match.score >= 0 else MINUS)
    return Cell(match.pixels, [score, *((text, SOFT) for text in said)], match.share)


def render_strips(train: Samples, queries: Samples, scores: Tensor, num_proponents: int) -> str:
    """Queries and their proponents as a table of pictures, for a notebook; else as `gather`."""
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
