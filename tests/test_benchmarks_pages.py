"""Tables of pages: replaced between their markers, and checked."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pages = importlib.import_module("pages")

PAGE = "before\n<!-- word: begin -->\nold\n<!-- word: end -->\nafter\n"
FRESH = PAGE.replace("old", "| a |\n| b |")


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    return pages.Table(tmp_path / "page.md", "word", lambda: ["| a |", "| b |"])


def run(table, monkeypatch, *flags):
    measured = []
    monkeypatch.setattr(sys, "argv", ["page", *flags])
    pages.run(table, "what it is", lambda *how: measured.append(how))
    return measured


def test_the_table_is_checked_then_rewritten(table, monkeypatch):
    with pytest.raises(SystemExit, match=r"page\.md does not match benchmarks/results: run with"):
        run(table, monkeypatch, "--check")
    assert table.page.read_text() == PAGE
    assert run(table, monkeypatch, "--docs") == []
    assert table.page.read_text() == FRESH
    assert run(table, monkeypatch, "--check") == []


def test_a_rehearsal_is_not_recorded(table, monkeypatch):
    # whether to record, whether it is a rehearsal
    assert run(table, monkeypatch) == [(False, False)]
    assert run(table, monkeypatch, "--record") == [(True, False)]
    assert run(table, monkeypatch, "--record", "--smoke") == [(False, True)]
    assert table.page.read_text() == PAGE


def test_a_command_that_keeps_its_work_is_told_where(table, monkeypatch, tmp_path):
    measured = []
    for flags in ([], ["--folder", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["page", *flags])
        pages.run(table, "what it is", lambda *how: measured.append(how), folder=Path("kept"))
    assert measured == [(False, False, Path("kept")), (False, False, tmp_path)]


def test_the_newest_row_is_the_one_recorded_last(tmp_path):
    results = tmp_path / "rows.jsonl"
    for value in (1, 2):
        pages.record(results, {"value": value})
    row = pages.newest(results)
    assert row["value"] == 2
    # what the figure depends on
    assert {"device", "torch", "commit", "utc"} <= set(row)
    assert json.loads(results.read_text().splitlines()[0])["value"] == 1
