"""A table of text, and how a terminal, a page of Markdown and one of HTML show it."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

# a hyphen that is a sign
_MINUS = re.compile(r"(?<![\w.])-(?=[\d.])")


@dataclass(frozen=True)
class Table:
    """Rows of cells, shown as text; the first of a row names it.

    Attributes:
        columns: heads, one for each cell of a row; none for names and their values.
        rows: the cells.
        title: above it.
        note: below it.
        words: heads of the columns besides the first that hold no numbers.
        soft: rows that stand back, by their number.
        total: rows that stand out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    words: Collection[str] = ()
    soft: Collection[int] = ()
    total: Collection[int] = ()

    def select(self, columns: Collection[str]) -> Table:
        """Some of the columns, in the order they have."""
        kept = [place for place, name in enumerate(self.columns) if name in columns]
        rows = [[row[place] for place in kept] for row in self.rows]
        return replace(self, columns=[self.columns[place] for place in kept], rows=rows)

    def without_empty(self) -> Table:
        """Without columns in which no row has anything."""
        if not self.rows:
            return self
        return self.select(
            [name for place, name in enumerate(self.columns) if any(r[place] for r in self.rows)]
        )

    def show(self, console: Console, narrower: Sequence[Collection[str]] = ()) -> None:
        """Print it.

        Args:
            console: of the terminal.
            narrower: for one that does not hold it whole, the columns that are shown instead: the
                first that fit, and never shortened cells.
        """
        widest = console.options.update_width(10_000)
        for table in (self, *map(self.select, narrower)):
            laid_out = table._for_terminal(no_wrap=bool(narrower))
            if console.measure(laid_out, options=widest).maximum <= console.width:
                break
        console.print(laid_out)
        if self.note:
            console.print(self.note, style="dim", highlight=False, markup=False)

    def _for_terminal(self, *, no_wrap: bool) -> Any:
        import rich.table
        from rich.text import Text

        laid_out = rich.table.Table(header_style="bold", title_justify="left")
        if not self.columns:
            laid_out = rich.table.Table.grid(padding=(0, 2))
        laid_out.title = Text(self.title) if self.title else None
        for place, name in enumerate(self.columns):
            justify: Any = "right" if self._is_number(place) else "left"
            laid_out.add_column(name, justify=justify, no_wrap=no_wrap)
        for number, row in enumerate(self.rows):
            style = "dim" if number in self.soft else "bold" if number in self.total else None
            # what a cell holds is no markup
            laid_out.add_row(*(Text(str(cell)) for cell in row), style=style)
        return laid_out

    def markdown(self) -> list[str]:
        """Its lines, without title and note."""
        rules = "|".join("--:" if self._is_number(n) else "---" for n in range(len(self.columns)))
        lines = [f"| {' | '.join(map(str, cells))} |" for cells in (self.columns, *self.rows)]
        return [lines[0], f"|{rules}|", *lines[1:]]

    def html(self) -> str:
        """A section of a page; nothing for names and values of which there are none."""
        if not (self.columns or self.rows):
            return ""
        heads = "".join(
            f'<th scope="col"{self._kind(place)}>{html.escape(name)}</th>'
            for place, name in enumerate(self.columns)
        )
        lines = "\n".join(map(self._line, range(len(self.rows))))
        if heads:
            lines = (
                f'<div class="scroll"><table class="columns">\n<thead><tr>{heads}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody>\n</table></div>"
            )
        else:
            lines = f"<table>\n{lines}\n</table>"
        title = f"<h2>{html.escape(self.title)}</h2>\n" if self.title else ""
        note = f'<p class="note">{html.escape(self.note)}</p>\n' if self.note else ""
        return f'<section class="table">\n{title}{lines}\n{note}</section>\n'

    def _line(self, number: int) -> str:
        first, *others = map(str, self.rows[number])
        cells = "".join(
            f"<td{self._kind(place)}>{html.escape(self._typeset(place, cell))}</td>"
            for place, cell in enumerate(others, 1)
        )
        kind = ' class="total"' if number in self.total else ""
        return f'<tr{kind}><th scope="row">{html.escape(first)}</th>{cells}</tr>'

    def _typeset(self, place: int, cell: str) -> str:
        return _MINUS.sub("−", cell) if self._is_number(place) else cell

    def _kind(self, place: int) -> str:
        return ' class="number"' if self._is_number(place) else ""

    def _is_number(self, place: int) -> bool:
        name = self.columns[place] if self.columns else ""
        return place > 0 and name not in self.words


def values_table(title: str, values: Sequence[tuple[str, Any]]) -> Table:
    """Names and values, one a line."""
    return Table((), values, title, words=("",))


def times_table(title: str, times: Sequence[tuple[str, float]]) -> Table:
    """What steps took, in seconds, and their sum."""
    rows = [(name, format_seconds(seconds)) for name, seconds in times]
    if rows:
        rows.append(("Total", format_seconds(sum(seconds for _, seconds in times))))
    return Table((), rows, title, total=(len(times),))


def format_seconds(seconds: float) -> str:
    """A duration as a reader says it: ``61.3 s``, ``2 min 30 s``, ``2 h 01 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
