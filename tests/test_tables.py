"""One table in a terminal, in Markdown and in HTML."""

import io

import pytest
from page import HOSTILE, Page
from rich.console import Console

from dtrak.pages.tables import Table, times_table, values_table

ROWS = [("one", 1, "[2, 3]", "x", ""), (HOSTILE, "", -4, "-y", "")]
TABLE = Table(["name", "a", HOSTILE, "kind", "none"], ROWS, "[red]title", HOSTILE, words=("kind",))


def printed(table, width=200, **how):
    out = io.StringIO()
    table.show(Console(file=out, width=width), **how)
    return out.getvalue()


def cells(lines, bar):
    return [[cell.strip() for cell in line.split(bar)[1:-1]] for line in lines if bar in line]


def test_every_rendering_has_every_cell():
    expected = [["one", "1", "[2, 3]", "x", ""], [HOSTILE, "", "-4", "-y", ""]]
    text = printed(TABLE)
    assert cells([line for line in text.splitlines() if line.startswith("│")], "│") == expected
    assert text.splitlines()[0].strip() == "[red]title"
    assert text.splitlines()[-1] == HOSTILE
    lines = TABLE.markdown()
    assert lines[1] == "|---|--:|--:|---|--:|"
    assert cells(lines[:1] + lines[2:], "|") == [list(TABLE.columns), *expected]
    page = Page(TABLE.html())
    assert [e["text"] for e in page.all("th", scope="col")] == TABLE.columns
    assert [e["text"] for e in page.all("th", scope="row")] == ["one", HOSTILE]
    # a sign is typeset as one, in numbers
    assert [e["text"] for e in page.all("td")] == ["1", "[2, 3]", "x", "", "", "−4", "-y", ""]
    assert [e["text"] for e in page.all("td", **{"class": None})] == ["x", "-y"]
    assert [e["text"] for e in page.all("h2") + page.all("p")] == ["[red]title", HOSTILE]
    assert not Page(Table(["a"], []).html()).all("p")


@pytest.mark.parametrize("width, shown", [(200, 5), (40, 2), (9, 1)])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_cells(width, shown):
    table = Table(["name", "a", "b", "c", "d"], [("one", *(["0123456789"] * 4))])
    text = printed(table, width, narrower=[("name", "a", "b", "c"), ("name", "c"), ("name",)])
    (line,) = [line for line in text.splitlines() if line.startswith("│")]
    assert cells([line], "│") == [["one", *["0123456789"] * (shown - 1)]]


def test_columns_of_nothing_are_left_out():
    assert TABLE.without_empty().columns == ["name", "a", HOSTILE, "kind"]
    assert Table(["name", "a"], []).without_empty().columns == ["name", "a"]


def test_names_and_values():
    page = Page(values_table("t", [("a", -1), (HOSTILE, HOSTILE)]).html())
    assert [e["text"] for e in page.all("td")] == ["-1", HOSTILE]
    assert [e["text"] for e in page.all("th")] == ["a", HOSTILE]
    assert values_table("t", []).html() == times_table("t", []).html() == ""
    assert [line.split() for line in printed(values_table("", [("a", 1)])).splitlines()] == [
        ["a", "1"]
    ]
    page = Page(times_table("t", [("a", 50.0), ("b", 70.0)]).html())
    assert [e["text"] for e in page.all("td", **{"class": "number"})] == [
        "50.0 s", "70.0 s", "2 min 00 s"
    ]  # fmt: skip
    assert page.all("tr", **{"class": "total"})[0]["text"] == "Total2 min 00 s"
