"""One page to look at: each query beside its proponents and opponents, as HTML and PNG."""

import base64
import html
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtrak.data import encode_png, to_uint8

TITLE = "Which training images made these pictures?"
PNG_QUERIES = 16
HEADINGS = (
    ("proponents", "Proponents", "presence lowered the error"),
    ("opponents", "Opponents", "presence raised the error"),
)
CAVEAT = (
    "Scores are estimates from the gradients of a trained model: nothing was retrained without "
    "these images. A high score does not prove that an image was copied, and images that look "
    "alike need not score high."
)


class Images(Protocol):
    """Anything that gives the image [C, H, W] in [-1, 1] at a position, such as a tensor."""

    def __getitem__(self, index: int, /) -> Tensor:
        """Return the image at ``index``."""
        ...


def write_report(
    path_html: str | os.PathLike[str],
    path_png: str | os.PathLike[str],
    *,
    queries: Tensor,
    train: Images,
    proponents: tuple[Tensor, Tensor],
    opponents: tuple[Tensor, Tensor],
    train_ids: Sequence[str],
    query_ids: Sequence[str],
    settings: Mapping[str, Any],
    stages: Sequence[tuple[str, float]] = (),
    facts: Mapping[str, str] | None = None,
    train_labels: Sequence[int] | None = None,
    query_kind: str = "generated picture",
) -> None:
    """Write the attribution of M queries as one self-contained HTML page and one PNG picture.

    The page holds its images and needs no network and no script; the same input gives the same
    bytes. The picture shows the first 16 queries.

    Args:
        path_html: the page.
        path_png: the picture.
        queries: [M, C, H, W] in [-1, 1], C 1 or 3.
        train: the training images; ``train[i]`` is [C, H, W] in [-1, 1].
        proponents: positions [M, R] in ``train`` and their scores [M, R], strongest first; those
            whose score is not positive are left out, for they are no proponents.
        opponents: the same for the lowest scores, [M, Q] and [M, Q], lowest first; those whose
            score is not negative are left out.
        train_ids: names of the training images.
        query_ids: names of the M queries.
        settings: what decided the numbers, as name and value.
        stages: name and wall time in seconds of each step of the run, in order.
        facts: other figures of the run, as name and text.
        train_labels: class indices of the training images, shown where given.
        query_kind: what one query is, in words.

    Raises:
        ValueError: if queries are not [M, C, H, W] with C 1 or 3, ids, positions and scores do not
            fit them or each other, a position is no training image, or a score is not finite.
    """
    rows = _gather(queries, train, proponents, opponents, train_ids, query_ids, train_labels)
    page = _render_html(rows, settings, stages, facts or {}, query_kind)
    Path(path_html).write_text(page, encoding="utf-8")
    _write_png(Path(path_png), rows, query_kind)


@dataclass(frozen=True)
class _Match:
    """A training image beside a query: pixels [C, H, W] uint8, and bar length in [0, 1]."""

    pixels: Tensor
    id: str
    label: int | None
    score: float
    share: float


@dataclass(frozen=True)
class _Row:
    """A query, pixels [C, H, W] uint8, and its matches per heading that was asked for."""

    pixels: Tensor
    id: str
    matches: dict[str, list[_Match]]


def _gather(
    queries: Tensor,
    train: Images,
    proponents: tuple[Tensor, Tensor],
    opponents: tuple[Tensor, Tensor],
    train_ids: Sequence[str],
    query_ids: Sequence[str],
    train_labels: Sequence[int] | None,
) -> list[_Row]:
    if queries.ndim != 4 or queries.shape[1] not in (1, 3):
        raise ValueError(f"queries must be [M, 1 or 3, H, W], got {list(queries.shape)}")
    if len(query_ids) != len(queries):
        raise ValueError(f"query_ids must be {len(queries)} long, got {len(query_ids)}")
    if train_labels is not None and len(train_labels) != len(train_ids):
        raise ValueError(f"train_labels must be {len(train_ids)} long, got {len(train_labels)}")
    ranked = {"proponents": proponents, "opponents": opponents}
    for name, (indices, scores) in ranked.items():
        if indices.ndim != 2 or indices.shape != scores.shape or len(indices) != len(queries):
            raise ValueError(
                f"{name} must be positions and scores, both [{len(queries)}, any], "
                f"got {list(indices.shape)} and {list(scores.shape)}"
            )
        if not torch.isfinite(scores).all():
            raise ValueError(f"scores of {name} must be finite, got NaN or infinity")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(train_ids):
            raise ValueError(
                f"positions of {name} must lie in [0, {len(train_ids)}), "
                f"got {int(indices.min())} to {int(indices.max())}"
            )
    quantised = to_uint8(queries)
    rows = []
    for m, name in enumerate(query_ids):
        strongest = max((abs(s) for _, scores in ranked.values() for s in scores[m].tolist()))
        matches = {
            kind: [
                _Match(
                    pixels=to_uint8(train[index]),
                    id=train_ids[index],
                    label=None if train_labels is None else train_labels[index],
                    score=score,
                    share=abs(score) / strongest if strongest else 0.0,
                )
                for index, score in zip(indices[m].tolist(), scores[m].tolist(), strict=True)
                # the lowest of all-positive scores is no opponent
                if (score > 0 if kind == "proponents" else score < 0)
            ]
            for kind, (indices, scores) in ranked.items()
            if indices.shape[1]
        }
        rows.append(_Row(quantised[m], name, matches))
    return rows


def _lead(query_kind: str) -> str:
    return (
        f"For each {query_kind}: the training images whose presence most lowered or raised "
        "the model's error on it."
    )


def _exponent(rows: Sequence[_Row]) -> int:
    """Choose one power of ten for all scores, 0 where they are readable as they are."""
    scores = [abs(m.score) for row in rows for kind in row.matches.values() for m in kind]
    largest = max(scores, default=0.0)
    if largest == 0 or 0.01 <= largest < 1000:
        return 0
    return math.floor(math.log10(largest))


def _format_score(score: float, exponent: int) -> str:
    return f"{score / 10.0**exponent:+#.3g}".rstrip(".").replace("-", "−")


def _format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --ink: #1d1f23; --soft: #5d6168;
  --line: #dfddd7; --plus: #0d7268; --minus: #b34f0b; }
@media (prefers-color-scheme: dark) { :root { --page: #141619; --card: #1c1f23; --ink: #e9e7e2;
  --soft: #a3a8b0; --line: #343940; --plus: #53cdb8; --minus: #f2a45f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.125rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
sup { line-height: 0; }
header { margin-bottom: 1.5rem; }
.lead { font-size: 1.125rem; }
.plus { color: var(--plus); }
.minus { color: var(--minus); }
.soft { color: var(--soft); }
.query, .table { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; }
.query { margin: 0 0 1rem; display: grid; gap: 1rem; break-inside: avoid; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--line); }
.pixelated { image-rendering: pixelated; }
.subject { display: grid; grid-template-columns: 8rem 1fr; gap: .25rem 1rem; align-items: center; }
.subject h2 { font-size: .9375rem; margin: 0; }
.side h3 { font-size: .8125rem; line-height: 1.3; margin: 0 0 .5rem; }
.side h3 span { font-weight: 400; color: var(--soft); }
.side + .side { border-top: 1px solid var(--line); padding-top: 1rem; }
.strip { display: grid; gap: .75rem .5rem; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); }
.bar { display: block; height: 4px; margin-top: 5px; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 2px; background: currentColor; }
figcaption { font-size: .75rem; line-height: 1.35; }
figcaption data { display: block; font-size: .9375rem; font-weight: 600; margin-top: 2px;
  font-variant-numeric: tabular-nums; }
.name { display: flex; color: var(--soft); white-space: nowrap; overflow: hidden; }
.name span { flex: none; }
.name span:first-child:not(:last-child) { flex: 0 1 auto; overflow: hidden;
  text-overflow: ellipsis; }
.tables { display: grid; gap: 1rem; align-items: start; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 0;
  border-top: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); padding-right: 1rem; width: 45%; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr:first-child > * { border-top: 0; }
tr.total > * { color: var(--ink); font-weight: 600; }
@media (min-width: 44rem), print {
  .query { grid-template-columns: minmax(0, 1.5fr) minmax(0, 5fr) minmax(0, 3fr); gap: 1.75rem; }
  .subject { display: block; }
  .subject h2 { margin-top: .375rem; }
  .proponents .strip { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .opponents .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .side + .side { border-top: 0; padding-top: 0; position: relative; }
  .side + .side::before { content: ""; position: absolute; inset: 0 auto 0 -.875rem;
    border-left: 1px solid var(--line); }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --plus: #0d7268;
    --minus: #b34f0b; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 13px; }
  h1 { font-size: 1.375rem; }
  .lead { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  .subject h2, .side h3 { font-size: .6875rem; }
  .query { padding: .625rem; gap: .75rem; }
  .strip { gap: .5rem; }
  .side + .side::before { left: -.375rem; }
  figcaption data { font-size: .75rem; }
  .table { break-inside: avoid; }
}
"""


def _render_html(
    rows: Sequence[_Row],
    settings: Mapping[str, Any],
    stages: Sequence[tuple[str, float]],
    facts: Mapping[str, str],
    query_kind: str,
) -> str:
    exponent = _exponent(rows)
    power = f"10<sup>{exponent}</sup>".replace("-", "−")
    unit = f" Scores here are in units of {power}." if exponent else ""
    total = sum(seconds for _, seconds in stages)
    times = [(name, _format_seconds(seconds)) for name, seconds in stages]
    if times:
        times.append(("Total", _format_seconds(total)))
    tables = [
        _render_table("Settings", list(settings.items())),
        _render_table("This run", list(facts.items())),
        _render_table("Time per stage", times, timed=True),
    ]
    body = "\n".join(_render_query(row, exponent, query_kind) for row in rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{TITLE}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{TITLE}</h1>
<p class="lead">{html.escape(_lead(query_kind))}</p>
<p>A <b class="plus">positive</b> score marks a proponent: with this image in the training set,
the model's error on the picture is estimated to be lower than without it. A
<b class="minus">negative</b> score marks an opponent: the error is estimated to be higher. The size
has no natural unit: compare scores within one row, not between rows or runs. The thin bar is the
size of a score against the strongest in its row.{unit}</p>
<p class="soft">{html.escape(CAVEAT)}</p>
</header>
{body}
<div class="tables">
{"".join(tables)}</div>
</main>
</body>
</html>
"""


def _render_query(row: _Row, exponent: int, query_kind: str) -> str:
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
    image = _render_image(row.pixels, f"{query_kind} {row.id}")
    return (
        f'<section class="query">\n<div class="subject">{image}'
        f'<h2 title="{html.escape(row.id)}">{html.escape(row.id)}</h2></div>\n'
        + "\n".join(sides)
        + "\n</section>"
    )


def _render_match(match: _Match, exponent: int) -> str:
    shown = _format_score(match.score, exponent)
    label = "" if match.label is None else f'<span class="soft">label {match.label}</span>'
    colour = "minus" if match.score < 0 else "plus"
    return (
        f"<li><figure>{_render_image(match.pixels, f'training image {match.id}, score {shown}')}"
        f'<figcaption><span class="bar {colour}"><i style="width:{match.share:.1%}"></i></span>'
        f'<data class="{colour}" value="{match.score!r}">{shown}</data>'
        f'<span class="name" title="{html.escape(match.id)}">{_render_name(match.id)}</span>'
        f"{label}</figcaption></figure></li>"
    )


def _render_name(name: str) -> str:
    """Split an id so that its head, not its telling tail, is cut off where room is short."""
    cut = max(name.rfind("/"), len(name) - 10, 0)
    parts = (name[:cut], name[cut:])
    return "".join(f"<span>{html.escape(part)}</span>" for part in parts if part)


def _render_image(pixels: Tensor, alt: str) -> str:
    encoded = base64.b64encode(encode_png(pixels)).decode()
    height, width = pixels.shape[1:]
    # enlarged, small images must stay sharp; shrunk, large ones must stay smooth
    sharp = ' class="pixelated"' if max(height, width) <= 64 else ""
    return (
        f'<img{sharp} width="{width}" height="{height}" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{encoded}">'
    )


def _render_table(title: str, values: Sequence[tuple[str, Any]], *, timed: bool = False) -> str:
    if not values:
        return ""
    kind = ' class="number"' if timed else ""
    lines = [
        f'<tr><th scope="row">{html.escape(str(name))}</th>'
        f"<td{kind}>{html.escape(str(value))}</td></tr>"
        for name, value in values
    ]
    if timed:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">')
    return (
        f'<section class="table">\n<h2>{html.escape(title)}</h2>\n<table>\n'
        + "\n".join(lines)
        + "\n</table>\n</section>\n"
    )


# the PNG is laid out in whole pixels, so every image pixel becomes a square of the same size
CELL, SUBJECT, GAP, MARGIN = 192, 256, 16, 48
INK, SOFT, LINE = "#1d1f23", "#5d6168", "#dfddd7"
COLOURS = {True: "#0d7268", False: "#b34f0b"}


class _Canvas:
    """A white page measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.dpi = 150
        self.width, self.height = width, height
        self.figure = Figure((width / self.dpi, height / self.dpi), dpi=self.dpi, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        pixels: float,
        width: float,
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """Write one line with its top at ``y``, cut before its end where it is too wide."""
        artist = self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=pixels * 72 / self.dpi,
            color=colour,
            fontweight="bold" if bold else "normal",
            va="top",
            ha="left",
            # an id may hold a dollar sign
            parse_math=False,
        )
        if artist.get_window_extent(self.renderer).width <= width:
            return
        # what tells ids apart is their end
        tail = min(max(len(text) - text.rfind("/"), 1), 10)
        fits, too_long = tail, len(text)
        while too_long - fits > 1:
            kept = (fits + too_long) // 2
            artist.set_text(f"{text[: kept - tail]}…{text[len(text) - tail :]}")
            if artist.get_window_extent(self.renderer).width <= width:
                fits = kept
            else:
                too_long = kept
        artist.set_text(f"{text[: fits - tail]}…{text[len(text) - tail :]}")

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Paint a rectangle."""
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1 - (y + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.patches.append(
            Rectangle(corner, *size, color=colour, linewidth=0, transform=self.figure.transFigure)
        )

    def paste(self, x: int, y: int, pixels: Tensor, side: int) -> None:
        """Put an image [C, H, W] uint8 with its longest side ``side`` pixels long."""
        array = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
        longest = max(array.shape[:2])
        if longest <= side:
            array = array.repeat(side // longest, axis=0).repeat(side // longest, axis=1)
        else:
            height, width = (max(1, round(n * side / longest)) for n in array.shape[:2])
            array = np.asarray(Image.fromarray(array).resize((width, height)))
        self.figure.figimage(array, xo=x, yo=self.height - y - array.shape[0], origin="upper")

    def save(self, path: Path) -> None:
        # the default metadata name the version of matplotlib
        self.figure.savefig(path, format="png", dpi=self.dpi, metadata={"Software": None})


def _write_png(path: Path, rows: Sequence[_Row], query_kind: str) -> None:
    import matplotlib.style

    # a user's matplotlibrc must not change the picture, and a name may hold any script
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _draw(rows, query_kind).save(path)


def _fit(pixels: Tensor, room: int) -> int:
    """Choose the longest side at which an image fits, a whole multiple of its own."""
    longest = max(pixels.shape[1:])
    return room // longest * longest if longest <= room else room


def _draw(rows: Sequence[_Row], query_kind: str) -> _Canvas:
    """Draw at most ``PNG_QUERIES`` rows: query, proponents, a line, opponents."""
    shown = rows[:PNG_QUERIES]
    exponent = _exponent(rows)
    matches = [match for row in shown for kind in row.matches.values() for match in kind]
    cell = max((_fit(match.pixels, CELL) for match in matches), default=CELL)
    subject = max((_fit(row.pixels, SUBJECT) for row in shown), default=SUBJECT)
    widths = {
        # room for the word "none" where there is no match at all
        kind: max(1, *(len(row.matches[kind]) for row in shown)) * (cell + GAP) - GAP
        for kind, _, _ in HEADINGS
        if shown and kind in shown[0].matches
    }
    starts, x = {}, MARGIN + subject + 2 * GAP
    for kind, width in widths.items():
        starts[kind] = x
        x += width + 3 * GAP
    width = max(x - 3 * GAP + MARGIN, 1100)
    top, pitch = MARGIN + 150, max(subject + 32, cell + 94) + 2 * GAP
    canvas = _Canvas(width, top + len(shown) * pitch + 96)
    inner = width - 2 * MARGIN
    canvas.write(MARGIN, MARGIN - 8, TITLE, pixels=34, width=inner, bold=True)
    canvas.write(MARGIN, MARGIN + 40, _lead(query_kind), pixels=21, width=inner, colour=SOFT)
    canvas.write(MARGIN, top - 50, query_kind.capitalize(), pixels=20, width=subject, bold=True)
    for kind, heading, meaning in HEADINGS:
        if kind in widths:
            colour, room = COLOURS[kind == "proponents"], widths[kind]
            text = f"{heading}: {meaning}"
            canvas.write(
                starts[kind], top - 50, text, pixels=20, width=room, colour=colour, bold=True
            )
            canvas.fill(starts[kind], top - 18, room, 3, colour)
    for number, row in enumerate(shown):
        y = top + number * pitch
        canvas.paste(MARGIN, y, row.pixels, _fit(row.pixels, SUBJECT))
        canvas.write(MARGIN, y + subject + 6, row.id, pixels=18, width=subject, colour=SOFT)
        if len(widths) == 2:
            canvas.fill(starts["opponents"] - 1.5 * GAP - 1, y, 2, pitch - 2 * GAP, LINE)
        for kind in widths:
            if not row.matches[kind]:
                canvas.write(starts[kind], y, "none", pixels=20, width=cell, colour=SOFT)
            for place, match in enumerate(row.matches[kind]):
                _draw_match(canvas, starts[kind] + place * (cell + GAP), y, match, cell, exponent)
    unit = f" Scores in units of 1e{exponent}." if exponent else ""
    part = f" The first {len(shown)} of {len(rows)}." if len(shown) < len(rows) else ""
    notes = (
        f"+ lowers the error, − raises it; compare scores within a row only.{unit}{part}",
        "Estimates from gradients: nothing was retrained without these images.",
    )
    for line, note in enumerate(notes):
        y = top + len(shown) * pitch + 28 * line
        canvas.write(MARGIN, y, note, pixels=18, width=inner, colour=SOFT)
    return canvas


def _draw_match(canvas: _Canvas, x: int, y: int, match: _Match, cell: int, exponent: int) -> None:
    canvas.paste(x, y, match.pixels, _fit(match.pixels, CELL))
    colour = COLOURS[match.score >= 0]
    y += cell + 6
    canvas.fill(x, y, cell, 5, LINE)
    canvas.fill(x, y, cell * match.share, 5, colour)
    score = _format_score(match.score, exponent)
    canvas.write(x, y + 11, score, pixels=20, width=cell, colour=colour, bold=True)
    canvas.write(x, y + 37, match.id, pixels=17, width=cell, colour=SOFT)
    if match.label is not None:
        canvas.write(x, y + 61, f"label {match.label}", pixels=17, width=cell, colour=SOFT)
