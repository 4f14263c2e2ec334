"""Pictures side by side, a line per query: of a run, of retrained models, on a page or in print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import NamedTuple

from torch import Tensor

from .canvas import INK, LINE, SOFT, Canvas, fit, wrap

# pixels: between pictures, between groups of them, below what is drawn; thickness of a bar
_GAP, _APART, _BELOW, _BAR = 16, 48, 6, 5
# lines that a head, and a text below a picture, may take
_HEAD_LINES, _TEXT_LINES = 3, 2


class Look(NamedTuple):
    """Pixels of a page, its margin and its letters, dots per inch; whether pictures fill it."""

    width: int
    margin: int
    letters: int
    dpi: int
    fills: bool


# a page grows with what is on it; print is 5.5 inches wide, with letters of 5.5 points
PAGE = Look(1100, 48, 18, 150, fills=False)
PRINT = Look(1650, 0, 23, 300, fills=True)
# few pictures are no larger than a thumb in print
_THUMB = 270


class Cell(NamedTuple):
    """A picture ``[C, H, W]`` uint8 and what stands below it, a colour for each text.

    ``share`` is the length in [0, 1] of a bar in the colour of the first text.
    """

    pixels: Tensor
    texts: Sequence[tuple[str, str]]
    share: float | None = None


class Column(NamedTuple):
    """Columns that belong together: their head, how many they are, room in pixels for a picture."""

    head: str
    places: int = 1
    colour: str = INK
    room: int = 192


def draw_strips(
    columns: Sequence[Column],
    lines: Sequence[Sequence[Sequence[Cell]]],
    *,
    title: str = "",
    lead: str = "",
    notes: Sequence[str] = (),
    look: Look = PAGE,
) -> Canvas:
    """Draw the cells of every query below their columns; call it within `canvas.default_style`.

    Args:
        columns: groups of pictures, from left to right.
        lines: of every query the cells of every column; where there are none it says so.
        title: above, large.
        lead: below the title.
        notes: below the pictures, a line or two each.
        look: of the page.
    """
    size = look.letters
    step = round(1.35 * size)
    count = sum(column.places for column in columns)
    between = (count - len(columns)) * _GAP + (len(columns) - 1) * _APART
    if look.fills:
        rooms = [min((look.width - between) // count, _THUMB)] * len(columns)
    else:
        rooms = [
            max((fit(cell.pixels, column.room) for line in lines for cell in line[n]), default=0)
            or column.room
            for n, column in enumerate(columns)
        ]
    widths = [c.places * (room + _GAP) - _GAP for c, room in zip(columns, rooms, strict=True)]
    starts = [look.margin + sum(widths[:n]) + n * _APART for n in range(len(widths))]
    width = max(look.width, starts[-1] + widths[-1] + look.margin)
    inner = width - 2 * look.margin

    # what is drawn once the height is known
    drawn: list[Callable[[Canvas], None]] = []

    def write(
        text: str, x: int, y: int, room: int, lines: int, colour: str = INK, *, bold: bool = False,
        pixels: int = size,
    ) -> int:  # fmt: skip
        """Where the next line begins."""
        for part in wrap(text, room, pixels, bold=bold, lines=lines):
            drawn.append(methodcaller("write", x, y, part, pixels=pixels, colour=colour, bold=bold))
            y += round(1.35 * pixels)
        return y

    y = max(look.margin, _BELOW)
    if title:
        y = write(title, look.margin, y, inner, 2, bold=True, pixels=round(1.75 * size))
    if lead:
        y = write(lead, look.margin, y, inner, 2, SOFT) + step
    heads = [
        write(column.head, x, y, room, _HEAD_LINES, column.colour, bold=True)
        for column, x, room in zip(columns, starts, widths, strict=True)
    ]
    y = max(heads) + _BELOW
    for column, x, room in zip(columns, starts, widths, strict=True):
        drawn.append(methodcaller("fill", x, y, room, 3, column.colour))
    y += 3 + 2 * _BELOW
    for line in lines:
        ends = [y]
        for x, room, cells in zip(starts, rooms, line, strict=True):
            if not cells:
                ends.append(write("none", x, y, room, 1, SOFT))
            for place, cell in enumerate(cells):
                left, (high, wide) = x + place * (room + _GAP), cell.pixels.shape[1:]
                side = room if look.fills else fit(cell.pixels, room)
                drawn.append(methodcaller("paste", left, y, cell.pixels, side))
                below = y + round(side * high / max(high, wide)) + _BELOW
                if cell.share is not None:
                    colour, long = cell.texts[0][1], room * cell.share
                    drawn.append(methodcaller("fill", left, below, room, _BAR, LINE))
                    drawn.append(methodcaller("fill", left, below, long, _BAR, colour))
                    below += _BAR + _BELOW
                for number, (text, colour) in enumerate(cell.texts):
                    bold = number == 0 and cell.share is not None
                    below = write(text, left, below, room, _TEXT_LINES, colour, bold=bold)
                ends.append(below)
        y = max(ends) + _GAP
    for note in notes:
        y = write(note, look.margin, y, inner, 3, SOFT)

    canvas = Canvas(width, y + look.margin, look.dpi)
    for draw in drawn:
        draw(canvas)
    return canvas
